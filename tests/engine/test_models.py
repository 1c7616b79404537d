"""Every family computes what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from holdfast.errors import ConfigurationError
from services.engine.kv_format import KVFormat
from services.engine.models import dtype_of, load
from services.engine.models.decoder import Decoder
from services.engine.models.spec import ModelSpec
from tests.engine.batches import Bench, Chunk

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

# What differs from SMALL, by test name; the model type is the name's first word.
NATIVE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biased, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama rope llama3": {"rope_parameters": LLAMA3},
    "llama rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "mistral": {"sliding_window": 20, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3 rope yarn": {"head_dim": 16, "rope_parameters": YARN},
    "qwen3_moe": dict(num_experts=5, moe_intermediate_size=16, norm_topk_prob=True, mlp_only_layers=[1], **EXPERTS),
    "mixtral": dict(num_local_experts=5, sliding_window=20, **EXPERTS),
}
FALLBACK: dict[str, dict[str, Any]] = {
    "cohere": {},
    "cohere2": {"sliding_window": 20},
    "deepseek_v2": dict(
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        **EXPERTS,
    ),
    "ernie4_5": {"head_dim": 8},
    "exaone4": {"sliding_window": 20},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 20, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 20, "query_pre_attn_scalar": 8},
    "glm": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "gpt_neox": {},
    "gpt_oss": dict(head_dim=8, sliding_window=20, num_local_experts=4, **EXPERTS),
    "granite": {},
    "olmo2": {},
    "olmoe": dict(num_experts=4, **EXPERTS),
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2_moe": dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, **EXPERTS),
    "smollm3": {},
    "starcoder2": {"sliding_window": 20},
}
PROMPT = [(7 * n * n + 3) % VOCABULARY for n in range(50)]

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, dict[str, Any]], Path]:
    """Writes a model of random weights as transformers does, once a module."""
    folders: dict[str, Path] = {}

    def save(name: str, changes: dict[str, Any]) -> Path:
        if name not in folders:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(name.split()[0], **SMALL | changes)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Away from the initial zeros and ones, and far enough that the logits have clear maxima.
                    parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
            folders[name] = tmp_path_factory.mktemp("model")
            model.save_pretrained(folders[name])
        return folders[name]

    return save


def reference(folder: Path) -> Callable[[list[int]], torch.Tensor]:
    """transformers' own eager logits at every position."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()

    @torch.inference_mode()
    def logits(token_ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]

    return logits


def check(folder: Path, *, implementation: str) -> None:
    """Logits in one shot and in chunks, and 64 greedy tokens, are those of transformers."""
    theirs = reference(folder)
    bench = Bench(load(folder, implementation=implementation))
    expected = theirs(PROMPT)
    torch.testing.assert_close(bench.logits(PROMPT), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(bench.logits(PROMPT, chunks=[17, 1, 30, 1, 1]), expected, rtol=0, atol=1e-5)
    greedy, logits = bench.greedy(PROMPT[:10], 64)
    expected = theirs([*PROMPT[:10], *greedy])[9:-1]
    assert greedy == expected.argmax(-1).tolist()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_the_native_decoder_agrees_with_transformers(name: str, saved: Callable[[str, dict[str, Any]], Path]) -> None:
    """A natively computed family has transformers' eager logits within 1e-5, in one shot, in chunks over shuffled
    blocks, and its tokens over 64 greedy steps."""
    folder = saved(name, NATIVE[name])
    assert isinstance(load(folder), Decoder)
    check(folder, implementation="auto")


@pytest.mark.parametrize("name", NATIVE)
def test_a_config_tells_how_many_parameters_there_are(name: str) -> None:
    """As many as transformers makes, a tied table once."""
    config = transformers.AutoConfig.for_model(name.split()[0], **SMALL | NATIVE[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    spec = ModelSpec.from_config(config.to_dict() | {"architectures": [type(model).__name__]})
    assert spec.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", FALLBACK)
def test_other_decoders_agree_with_transformers(name: str, saved: Callable[[str, dict[str, Any]], Path]) -> None:
    """A family that transformers' own code computes over our cache agrees with its eager attention just so."""
    check(saved(name, FALLBACK[name]), implementation="auto")


def test_a_native_family_can_be_left_to_transformers(saved: Callable[[str, dict[str, Any]], Path]) -> None:
    """Both implementations of one family agree with transformers."""
    check(saved("mistral", NATIVE["mistral"]), implementation="transformers")


def test_a_mixed_batch_computes_what_its_parts_compute_alone(
    saved: Callable[[str, dict[str, Any]], Path],
) -> None:
    """Decode rows of unlike length and prefill chunks, with and without prefix, do not touch one another."""
    bench = Bench(load(saved("mistral", NATIVE["mistral"])), num_blocks=128)
    contexts = [PROMPT[:length] * times for length, times in ((3, 1), (50, 6), (33, 1), (40, 1), (21, 1))]
    done = [2, 299, 32, 20, 0]
    alone = torch.cat([bench.logits(context)[-1:] for context in contexts])
    tables = [bench.table(len(context)) for context in contexts]
    for context, count, table in zip(contexts, done, tables, strict=True):
        if count:
            bench.forward(Chunk(context[:count], 0, table))
    rest = zip(contexts, done, tables, strict=True)
    together = bench.forward(*(Chunk(context[count:], count, table) for context, count, table in rest))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("format", "most"), [(KVFormat.FP8_E4M3, 0.1), (KVFormat.INT8, 0.02)])
@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2", "gpt_oss", "deepseek_v2"])
def test_keys_and_values_in_8_bits_change_logits_a_little(
    name: str, format: KVFormat, most: float, saved: Callable[[str, dict[str, Any]], Path]
) -> None:
    """Of families of ours and of those that transformers computes, with windows, caps, sinks and narrow values; and
    far less by how the prompt is cut than by being in 8 bits at all."""
    model = load(saved(name, (NATIVE | FALLBACK)[name]))
    exact = Bench(model).logits(PROMPT)
    bench = Bench(model, formats=[format] * 3)
    whole, cut = bench.logits(PROMPT), bench.logits(PROMPT, chunks=[17, 1, 30, 1, 1])
    error = (whole - exact).norm(dim=1).median()  # an expert less or more changes a row a lot
    assert 0 < error <= most * exact.norm(dim=1).median()
    assert (cut - whole).norm(dim=1).median() <= error / 10


def test_the_published_text_is_reproduced(stories260k: Path) -> None:
    """The trained checkpoint's greedy text from the first token on is the one that was published."""
    tokenizer = Tokenizer.from_file(str(stories260k / "tokenizer.json"))
    text = tokenizer.decode([1, *Bench(load(stories260k)).greedy([1], 199)[0]])
    expected = (stories260k / "expected_greedy_200.txt").read_text().strip()
    assert len(expected) > 400
    assert text.strip() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_transformers(
    dtype: torch.dtype, saved: Callable[[str, dict[str, Any]], Path]
) -> None:
    """Against float32 logits, our error in a 16-bit dtype is at most 1.2 times that of transformers in the same."""
    folder = saved("qwen3", NATIVE["qwen3"])
    truth = reference(folder)(PROMPT)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0].float()
    ours = Bench(load(folder, dtype=dtype)).logits(PROMPT)
    assert (ours - truth).square().mean() <= 1.44 * (theirs - truth).square().mean()


@pytest.mark.parametrize(
    ("name", "why"),
    [("bloom", "attention be replaced"), ("nemotron", "keyword"), ("llama4_text", "masks otherwise")],
)
def test_a_decoder_that_the_cache_cannot_hold_is_refused(
    name: str, why: str, saved: Callable[[str, dict[str, Any]], Path]
) -> None:
    """What transformers computes otherwise than by causal attention that can be replaced is refused by name."""
    changes = {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2} if name == "llama4_text" else {}
    with pytest.raises(ConfigurationError, match=why):
        load(saved(name, changes))


def test_native_can_be_insisted_on(saved: Callable[[str, dict[str, Any]], Path]) -> None:
    """`native` refuses an architecture that `auto` leaves to transformers, and names those it has."""
    with pytest.raises(ConfigurationError, match=r"GPT2LMHeadModel is not among .*LlamaForCausalLM"):
        load(saved("gpt2", FALLBACK["gpt2"]), implementation="native")


@pytest.mark.parametrize("implementation", ["native", "transformers"])
def test_a_config_alone_makes_a_dummy_model(implementation: Any, tmp_path: Path) -> None:
    """With load_format dummy a config without weights computes finite logits, the same ones every time."""
    transformers.AutoConfig.for_model(
        "qwen3", **SMALL, head_dim=16, architectures=["Qwen3ForCausalLM"]
    ).save_pretrained(tmp_path)
    first, second = (
        Bench(load(tmp_path, implementation=implementation, load_format="dummy")).logits(PROMPT) for _ in range(2)
    )
    assert first.isfinite().all() and first.std() > 0
    assert torch.equal(first, second)


def test_the_dtype_is_the_configs() -> None:
    """Without a dtype asked for, the config's older or newer key decides, float32 if neither is there."""
    assert dtype_of({"torch_dtype": "bfloat16"}) is torch.bfloat16
    assert dtype_of({"dtype": "float16"}) is torch.float16
    assert dtype_of({}) is torch.float32
    with pytest.raises(ConfigurationError, match="float8"):
        dtype_of({"dtype": "float8"})
