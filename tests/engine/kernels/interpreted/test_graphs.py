"""A whole engine as a GPU runs it: forms, packets and kernels. What is captured runs when it is replayed, into the
same tensors each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from triton.runtime import interpreter

from services.engine import graphs, models
from services.engine.batch import Growth, Step, Work
from services.engine.graphs import Graphs, Replay, captured_counts
from services.engine.kernel_sampler import KernelSampler
from services.engine.model_runner import Eager, ModelRunner
from services.engine.models.decoder import Decoder
from services.engine.ops.kernels import activation, gemv, int4, norm, overlap, quantize, scaled
from services.engine.packets import Decodes, Tokens, decode_sizes, token_counts
from services.engine.sampler import Sampled
from services.engine.sequence import SamplingParams, Sequence, StopRules
from services.engine.state import DeviceState
from tests.engine import executors
from tests.engine.test_model_runner import Engine

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

T = TypeVar("T")
NUM_SLOTS = 4
MOST_TOKENS = 16
"""Larger steps are replayed if they are full ones."""
MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
}
"""A small one: three pairs of a token and an expert are few, six are not."""

TILED = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
"""One whose matrices fall into the tiles of a GPU."""


class Again:
    """Runs once more, and leaves what it finds where the first run did."""

    def __init__(self, compute: Callable[[], object], first: object) -> None:
        self._compute = compute
        self._first = first

    def replay(self) -> None:
        _overwrite(self._first, self._compute())


def capture(compute: Callable[[], T]) -> tuple[T, Replay]:
    """As on a GPU: kernels are noted, and none runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
        patch.setattr(torch, "empty", torch.zeros)  # operations beside them find indices there
        patch.setattr(torch, "empty_like", torch.zeros_like)
        first = compute()
    return first, Again(compute, first)


def _overwrite(target: object, source: object) -> None:
    if isinstance(target, torch.Tensor):
        assert isinstance(source, torch.Tensor)
        target.copy_(source)
    elif isinstance(target, tuple):
        assert isinstance(source, tuple)
        for one, other in zip(target, source, strict=True):
            _overwrite(one, other)
    elif is_dataclass(target):
        for field in fields(target):
            _overwrite(getattr(target, field.name), getattr(source, field.name))


def _mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """Of a GPU's products those that only it gives in another dtype."""
    return torch.matmul(a.to(out_dtype), b.to(out_dtype), out=out)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is taken for one of a GPU, whose kernels are interpreted; and few tokens make a large step."""
    monkeypatch.setattr(graphs, "MOST_TOKENS", MOST_TOKENS)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda _: False))
    monkeypatch.setattr(overlap, "_is_able", lambda _: False)
    monkeypatch.setattr(torch, "mm", _mm)


def captured(
    folder: Path, *, max_step_tokens: int = 20, deterministic: bool = False, **options: Any
) -> tuple[Engine, list[str]]:
    """An engine whose steps are replayed, and what each step was replayed as: a form, or `operations`."""
    engine = Engine(folder, max_sequences=NUM_SLOTS, max_model_len=64, max_step_tokens=max_step_tokens, **options)
    model, cache = engine.model, engine.cache
    if deterministic:
        model = models.load(folder, dtype=cache.shape.dtype, invariant=True)
    assert isinstance(model, Decoder)
    state = DeviceState(num_slots=NUM_SLOTS, max_len=64, block_size=cache.block_size)
    replayed: list[str] = []
    eager = Eager(model, cache, state, KernelSampler(state))
    executor = Graphs(model, cache, state, larger=eager, most_tokens=max_step_tokens, capture=capture)
    run, fitting = executor.run, executor._fitting

    def noted(step: Step) -> Sampled | None:
        found = fitting(step)
        replayed.append("operations" if found is None else str(found.form))
        return deepcopy(run(step))  # as the copy to the host, which the next step does not overtake

    executor.run = noted  # type: ignore[method-assign]
    engine.runner = ModelRunner(executor)
    return engine, replayed


def asked(prompt_ids: list[int], max_tokens: int, **sampling: float) -> Sequence:
    params = SamplingParams(**{"temperature": 0.0, "seed": 3, **sampling})  # type: ignore[arg-type]
    return Sequence("r", 0, prompt_ids, params, StopRules(max_tokens))


def requests() -> list[Sequence]:
    """Greedy, drawn, and one that takes sampling once more; prompts that make a large step, full or not."""
    story = [1, 403, 407, 261, 378, 398, 285, 322, 421, 395, 426, 338, 266, 298, 270, 273, 413, 302, 260, 413, 270]
    return [
        asked(story[:1], 6),
        asked(story, 4),
        asked(story[:3], 5, temperature=0.8),
        asked(story[:5], 5, temperature=1.0, top_p=0.9),
        asked(story[3:], 3),
    ]


@pytest.mark.parametrize(
    ("rules", "some", "kinds"),
    [
        ("auto", slice(5), {"Decodes", "Tokens", "operations"}),
        ("0=auto,-1=int8,fp8_e4m3", slice(1, 3), {"Decodes", "Tokens"}),
    ],
    ids=["auto", "8 bits"],
)
def test_replayed_steps_say_what_operations_say(
    rules: str, some: slice, kinds: set[str], stories260k: Path, request: pytest.FixtureRequest
) -> None:
    """Decodes, chunks beside them, chunks that sample nothing, full steps, and such as are too large for another form: in
    float32 every token is that of the reference."""
    options: dict[str, Any] = {"lookahead": 2, "max_step_tokens": 26, "num_blocks": 30, "kv_cache_dtype": rules}
    expected = Engine(stories260k, max_sequences=NUM_SLOTS, **options).run(*requests()[some])
    request.getfixturevalue("kernels")
    engine, replayed = captured(stories260k, **options)
    assert engine.run(*requests()[some]) == expected
    assert replayed[0] == "Tokens(count=26, num_slots=4)"
    assert {form.split("(")[0] for form in replayed} == kinds


def test_what_is_nobody_s_goes_to_the_spare_block(stories260k: Path, kernels: None) -> None:
    """When steps are captured, and where three sequences decode by the form of four: no other block is written but theirs."""
    engine, replayed = captured(stories260k)
    graphs, cache = engine.runner._executor, engine.cache  # type: ignore[attr-defined]
    assert cache.data[: cache.spare_block].count_nonzero() == 0
    engine.run(*[asked([1, 403, 407], 4, seed=seed) for seed in range(3)])
    assert replayed[-1] == "Decodes(size=4)"
    assert set(graphs._state.block_tables[graphs._state.spare_slot].tolist()) == {cache.spare_block}
    written = cache.data.flatten(1).count_nonzero(1).nonzero().flatten().tolist()
    assert len(written) == 4 and cache.spare_block in written


def test_either_way_can_be_taken_alone(stories260k: Path, kernels: None) -> None:
    """As tests on a GPU compare them: no step runs operation by operation, or every one does."""
    short, long = asked([1, 403, 407], 3), asked([1] * 17, 3)
    found, replayed = captured(stories260k)
    found.runner = executors.captured(found.runner)
    found.run(short)
    assert replayed == ["Tokens(count=16, num_slots=4)", *["Decodes(size=1)"] * 2]
    with pytest.raises(AssertionError, match="no graph holds"):
        found.run(long)
    expected, replayed = captured(stories260k)
    expected.runner = executors.uncaptured(expected.runner)
    assert expected.run(asked([1, 403, 407], 3)) == [short.output_ids]
    assert replayed == []


def test_replayed_steps_send_tokens_to_their_experts(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A mixture's steps are captured like any other: alone each token's experts are taken pair by pair, together they are
    sorted, and every token is that of the reference."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    save_file(mixture(), tmp_path / "model.safetensors")
    options = {"lookahead": 2, "max_step_tokens": 20, "num_blocks": 30}

    def requests() -> list[Sequence]:
        return [asked([3, 9, 4], 3), asked([5], 6)]

    expected = Engine(tmp_path, max_sequences=NUM_SLOTS, **options).run(*requests())
    request.getfixturevalue("kernels")
    engine, replayed = captured(tmp_path, **options)
    assert engine.run(*requests()) == expected
    assert {"Decodes(size=1)", "Decodes(size=2)"} < set(replayed)
    assert len({token for answer in expected for token in answer}) > 3


def mixture() -> dict[str, torch.Tensor]:
    """The tensors of `MIXTURE`, whose best tokens are clear ones."""
    shapes = {"model.embed_tokens.weight": (30, 16), "model.norm.weight": (16,), "lm_head.weight": (30, 16)}
    layer = "model.layers.0"
    shapes |= {f"{layer}.self_attn.{name}.weight": (16, 16) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    shapes |= {f"{layer}.self_attn.{name}_norm.weight": (8,) for name in "qk"}
    shapes |= {f"{layer}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}.mlp.gate.weight": (12, 16)}
    for expert in range(12):
        shapes |= {f"{layer}.mlp.experts.{expert}.{name}_proj.weight": (8, 16) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.experts.{expert}.down_proj.weight": (16, 8)}
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


MIXED = "*.o_proj=int8-weight,*.self_attn.*=int8-static,*.down_proj=fp8-block,*=int4-g32-asym"


@pytest.mark.parametrize("rules", ["lm_head=fp8,fp8", "*=int8", MIXED], ids=["fp8", "int8", "mixed"])
def test_replayed_steps_multiply_in_few_bits(rules: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Norms and gates round what they write, the head gives float32, and every token is that of the reference."""
    (tmp_path / "config.json").write_text(json.dumps(TILED))
    scales = {f"model.layers.0.self_attn.{name}_proj.input_scale": torch.tensor([0.05]) for name in "qkv"}
    save_file(tiled() | (scales if "static" in rules else {}), tmp_path / "model.safetensors")
    options = {"lookahead": 2, "max_step_tokens": 20, "num_blocks": 30, "quantization": rules}

    def requests() -> list[Sequence]:
        return [asked([3, 9, 4], 4), asked([5], 6), asked([60, 2], 3)]

    expected = Engine(tmp_path, max_sequences=NUM_SLOTS, **options).run(*requests())
    request.getfixturevalue("kernels")
    launched = noted_launches(request.getfixturevalue("monkeypatch"))
    engine, replayed = captured(tmp_path, **options)
    assert engine.run(*requests()) == expected
    assert {form.split("(")[0] for form in replayed} == {"Decodes", "Tokens"}
    assert launched == {"rms_norm_quantized", "silu_mul_quantized", "quantize", "matmul"}
    assert len({token for answer in expected for token in answer}) > 3


def test_a_single_row_is_normed_and_gated_where_it_is_multiplied(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In 16 bits, on matrices wide enough for the kernel of one row: the tokens are those of the reference."""
    (tmp_path / "config.json").write_text(json.dumps(TILED | {"hidden_size": 1024, "head_dim": 16}))
    tensors = {name: x / 16 if x.ndim == 2 else x for name, x in tiled(hidden=1024).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    options = {"lookahead": 2, "max_step_tokens": 20, "num_blocks": 30, "dtype": "float16"}
    expected = Engine(tmp_path, max_sequences=NUM_SLOTS, **options).run(asked([3, 9, 4], 3))
    request.getfixturevalue("kernels")
    launched: set[str] = set()
    request.getfixturevalue("monkeypatch").setattr(gemv, "gemv", _noting_rows(gemv.gemv, launched))
    engine, _ = captured(tmp_path, **options)
    assert engine.run(asked([3, 9, 4], 3)) == expected
    assert launched == {"Unnormed", "Unnormed gated", "Tensor"}
    assert len(set(expected[0])) > 1


def _noting_rows(launch: Callable[..., object], names: set[str]) -> Callable[..., object]:
    def noting(x: object, *args: Any, gated: bool = False, **kwargs: Any) -> object:
        names.add(type(x).__name__ + " gated" * gated)
        return launch(x, *args, gated=gated, **kwargs)

    return noting


def test_deterministic_steps_round_alike_whatever_is_computed_beside(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In float16, as chunks of a full step, of a small one or of one that is not replayed, or thrown out: tokens and log-probabilities
    are those of sequences that ran alone, to the last bit."""
    (tmp_path / "config.json").write_text(json.dumps(TILED))
    save_file(tiled(), tmp_path / "model.safetensors")
    request.getfixturevalue("kernels")
    options: dict[str, Any] = {"lookahead": 2, "dtype": "float16", "deterministic": True, "max_step_tokens": 24}
    expected, found = (
        [
            with_logprobs(asked([(7 * i) % 60 for i in range(20)], 15)),
            with_logprobs(asked([5] * 12, 14, temperature=0.9)),
        ]
        for _ in range(2)
    )
    alone, replayed_alone = captured(tmp_path, num_blocks=30, prefix_cache=False, **options)
    for each in expected:
        alone.run(each)
    together, replayed = captured(tmp_path, num_blocks=4, **options)
    together.run(*found)
    assert [told(each) for each in found] == [told(each) for each in expected]
    assert set(replayed_alone) == {"operations", "Tokens(count=16, num_slots=4)", "Decodes(size=1)"}
    assert {"Tokens(count=24, num_slots=4)", "Tokens(count=16, num_slots=4)", "Decodes(size=2)"} < set(replayed)
    assert together.scheduler.totals.num_preemptions > 0


def with_logprobs(each: Sequence) -> Sequence:
    return replace(each, sampling=replace(each.sampling, logprobs=2))


def told(each: Sequence) -> tuple[object, ...]:
    return each.output_ids, each.output_logprobs


def test_deterministic_steps_take_experts_in_one_way(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In float32, alone, where pairs are few, and together, where they are sorted by expert: a token hears the same."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    save_file(mixture(), tmp_path / "model.safetensors")
    request.getfixturevalue("kernels")
    engine, _ = captured(tmp_path, deterministic=True, max_step_tokens=20, num_blocks=30, prefix_cache=False)
    alone, together = ([with_logprobs(asked(ids, 3)) for ids in ([3, 9, 4], [5], [7, 7])] for _ in range(2))
    for each in alone:
        engine.run(each)
    engine.run(*together)
    assert [told(each) for each in together] == [told(each) for each in alone]


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the kernels for eight bits that are launched from now on."""
    names: set[str] = set()
    launches = (
        (norm, "rms_norm_quantized"),
        (activation, "silu_mul_quantized"),
        (quantize, "quantize"),
        (scaled, "matmul"),
        (int4, "matmul"),
    )
    for module, name in launches:
        monkeypatch.setattr(module, name, _noting(getattr(module, name), name, names))
    return names


def _noting(launch: Callable[..., object], name: str, names: set[str]) -> Callable[..., object]:
    def noting(*args: Any, **kwargs: Any) -> object:
        names.add(name)
        return launch(*args, **kwargs)

    return noting


def tiled(hidden: int = 64) -> dict[str, torch.Tensor]:
    """The tensors of `TILED`, or of one that is wider."""
    layer = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (64, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (64, hidden)}
    shapes |= {f"{layer}.self_attn.{name}_proj.weight": (64, hidden) for name in "qkv"}
    shapes |= {f"{layer}.self_attn.o_proj.weight": (hidden, 64)}
    shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (128, hidden) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, 128)}
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def test_forms_grow_up_to_the_largest_step() -> None:
    """Four to an octave of tokens, every size of a small batch; the largest is there, and none beyond it."""
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert decode_sizes(256)[-3:] == [192, 224, 256]
    assert token_counts(100) == [64, 80, 96, 100]
    counts = token_counts(2048)
    assert (counts[0], counts[-1]) == (64, 2048)
    assert all(following <= previous * 1.25 for previous, following in pairwise(counts))


def test_beyond_them_only_the_full_step_is_captured() -> None:
    """Where steps may be that large."""
    assert captured_counts(100) == token_counts(100)
    assert captured_counts(2048) == token_counts(2048)
    assert captured_counts(8192) == [*token_counts(2048), 8192]


def test_a_packet_names_nobody_beyond_its_step() -> None:
    """Works that are not there have no tokens, and what is sampled for them is the spare slot's."""
    step = Step(1, (Work(3, 7, 1, True), Work(0, 10, 4, False), Work(2, 0, 2, True)))
    slots, starts, ends, rows, to, at, decodes = Tokens(16, 5).numbers(step, spare_slot=9, grows=False).tolist()
    assert slots[:5] == [3, 0, 2, 9, 9]
    assert starts[:3] == [7, 10, 0]
    assert ends == [0, 1, 5, 7, 7, 7, 7, 7]
    assert (rows[:2], to[:5], at[:2]) == ([0, 6], [3, 2, 9, 9, 9], [8, 2])
    assert decodes[0] == 1
    decode = Step(2, (Work(3, 8, 1, True),))
    nothing = [[-1] * 4, [0] * 4]
    assert Decodes(2).numbers(decode, spare_slot=9, grows=False).tolist() == [[3, 9, 9, 9], [8, 0, 0, 0], *nothing]


def test_a_packet_of_decodes_says_how_their_tables_grow() -> None:
    """By a block each; more, or those of others, are left to operations before it."""
    works = (Work(3, 15, 1, True), Work(1, 32, 1, True))
    grown = Step(1, works, grown=(Growth(1, 2, (70,)), Growth(3, 1, (80,))))
    assert Decodes(2).grows(grown)
    assert Decodes(2).numbers(grown, spare_slot=9, grows=True)[:, :2].tolist() == [[3, 1], [15, 32], [1, 2], [80, 70]]
    for others in ((Growth(1, 2, (70, 71)),), (Growth(1, 2, (70,)), Growth(5, 0, (80,)))):
        left = Step(1, works, grown=others)
        assert not Decodes(2).grows(left)
        assert Decodes(2).numbers(left, spare_slot=9, grows=False)[2, :2].tolist() == [-1, -1]
    assert not Tokens(16, 4).grows(grown)
