"""What the measurement of kernels counts, that it leaves none out, and that a wrong tiling is never the best."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.__main__ import main
from benchmarks.kernels.costs import Cost, Load, attention_cost, experts_cost, prepare_cost, product_cost
from benchmarks.kernels.shape import Shape
from benchmarks.kernels.timing import Ceilings, copies
from services.engine.kv_format import KVFormat
from services.engine.models.decoder import Layer
from services.engine.models.spec import ModelSpec, read_config
from services.engine.weights import Dummy

CPU = torch.device("cpu")
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MIXTURE = DENSE | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a shape that a laptop multiplies in no time."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps(DENSE))
    return tmp_path / "toy"


def spec_of(shared: Path, name: str) -> ModelSpec:
    return ModelSpec.from_config(read_config(shared / "data" / "configs" / name))


@pytest.mark.parametrize(
    ("cost", "bytes_", "flops"),
    [
        # 6144 x 4096 of two bytes, 32 rows in and out.
        (product_cost(32, 6144, 4096, form="bf16"), 50_331_648 + 262_144 + 393_216, 1_610_612_736),
        # A byte for each number, a scale for each of 4096 outputs and for the row, and what is added.
        (product_cost(1, 4096, 14336, form="fp8", adds=True), 58_736_640 + 14_340 + 8_192 + 8_192, 117_440_512),
        # As many in int8.
        (product_cost(1, 4096, 14336, form="w8a8", adds=True), 58_736_640 + 14_340 + 8_192 + 8_192, 117_440_512),
        # Half a byte and a scale of two for each 128; two parts of a row are as many bytes as one of 16 bits.
        (product_cost(1, 4096, 14336, form="w4a16", adds=True), 30_277_632 + 28_672 + 8_192 + 8_192, 117_440_512),
        # Logits of four bytes.
        (product_cost(2, 128256, 4096, form="bf16", out=4), 1_050_673_152 + 16_384 + 1_026_048, 2_101_346_304),
    ],
)
def test_a_product_reads_its_matrix_and_rows_once(cost: Cost, bytes_: int, flops: int) -> None:
    """Matrices of Llama-3.1-8B, computed by hand."""
    assert (cost.bytes_, cost.flops) == (bytes_, flops)


@pytest.mark.parametrize(
    ("load", "format", "bytes_", "flops"),
    [
        (Load.decode(256, 1024), KVFormat.AUTO, 1_073_741_824 + 4_194_304, 4_294_967_296),
        (Load.decode(1, 1024), KVFormat.INT8, 2_162_688 + 16_384, 16_777_216),
        (Load.prefill(2048), KVFormat.AUTO, 8_388_608 + 33_554_432, 34_376_515_584),
        (Load.prefill(8192), KVFormat.AUTO, 4 * (8_388_608 + 33_554_432), 4 * 34_376_515_584),
    ],
)
def test_attention_reads_what_is_seen_and_computes_causal_pairs(
    load: Load, format: KVFormat, bytes_: int, flops: int, shared: Path
) -> None:
    """Llama-3.1-8B, by hand: 4,096 bytes a token in 16 bits, 2,112 in 8; 2,048 tokens make 2,098,176 pairs."""
    cost = attention_cost(spec_of(shared, "Meta-Llama-3.1-8B"), load, format)
    assert (cost.bytes_, cost.flops) == (bytes_, flops)


@pytest.mark.parametrize("window", [1, 5, 12, 100])
@pytest.mark.parametrize("load", [Load(2, 1, 12), Load(3, 12, 12), Load(1, 4, 12)])
def test_a_window_is_all_that_is_counted(load: Load, window: int) -> None:
    """As one finds by going through the pairs of query and key."""
    spec = replace(ModelSpec.from_config(DENSE), windows=(window,) * 3)
    pairs = [
        (query, key)
        for query in range(load.context - load.queries, load.context)
        for key in range(query + 1)
        if key > query - window
    ]
    cost = attention_cost(spec, load, KVFormat.AUTO)
    assert cost.flops == 4 * 128 * load.sequences * len(pairs)
    assert cost.bytes_ == load.sequences * 2 * 2 * 64 * len({key for _, key in pairs}) + 4 * 128 * load.tokens


def test_experts_that_nobody_wants_are_not_read(shared: Path) -> None:
    """Qwen3-30B-A3B, one token: eight experts of three matrices of 2048 x 768."""
    spec = spec_of(shared, "Qwen3-30B-A3B")
    assert spec.moe is not None
    cost = experts_cost(spec.moe, spec.hidden, 1, wanted=8)
    assert cost.bytes_ == 8 * 3 * 2048 * 768 * 2 + 2 * (3 * 2048 + 128)
    assert cost.flops == 2 * 8 * 3 * 2048 * 768


def test_keys_and_values_are_written_as_the_cache_keeps_them(shared: Path) -> None:
    """Llama-3.1-8B, one token: 48 heads in, 32 out, angles of 128 features, 8 heads kept twice in int8 with scales."""
    cost = prepare_cost(spec_of(shared, "Meta-Llama-3.1-8B"), Load.decode(1, 1024), KVFormat.INT8)
    assert cost.bytes_ == 48 * 256 + 32 * 256 + 128 * 8 + 2 * 8 * (128 + 4)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_the_matrices_are_those_of_a_layer(config: dict[str, object]) -> None:
    """Nothing that a layer of the model loads is left out, and nothing else is measured."""
    spec = ModelSpec.from_config(config)

    class Counted(Dummy):
        size = 0

        def take(self, name: str, *shape: object) -> torch.Tensor:
            tensor = super().take(name, *shape)  # type: ignore[arg-type]
            self.size += tensor.numel() if tensor.dim() == 2 else 0
            return tensor

    weights = Counted(dtype=torch.bfloat16, device=CPU)
    Layer(weights, spec, layer=0)
    names = {kernel.name for kernel in Shape(spec, CPU).kernels() if kernel.among([Load.decode(2, 8)])}
    measured = sum(outputs * inputs for name, outputs, inputs in Shape(spec, CPU).matrices() if name in names)
    router = 0 if spec.moe is None else spec.moe.num_experts * spec.hidden
    assert measured + router == weights.size
    assert names >= {"norm", "qkv", "o", "qkv prepare", "attention", "quantize", "head", "sample"}
    assert ({"router", "experts"} <= names) is (spec.moe is not None)
    assert ("gate" in names) is (spec.moe is None)


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_every_kernel_has_a_row_of_positive_figures(config: dict[str, object], folder: Path, tmp_path: Path) -> None:
    """The whole program on a CPU: each kernel in each of its steps, and a report that says so."""
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "kernels.json"
    main([str(folder), "--batches", "1,3", "--context", "70", "--prefill", "80", "--device", "cpu", "--out", str(out)])
    ceilings, table, sums = json.loads(out.read_text())["tables"]
    assert all(rate > 0 for _, rate in ceilings["rows"])
    for load in (Load.decode(1, 70), Load.decode(3, 70), Load.prefill(80)):
        kernels = Shape(ModelSpec.from_config(config), CPU).kernels()
        expected = [(kernel.name, kernel.form) for kernel in kernels if kernel.times(load)]
        assert [(row[1], row[2]) for row in table["rows"] if row[0] == str(load)] == expected
    for _, _, _, micro, megabytes, flops, bandwidth, rate, share, bound in table["rows"]:
        assert micro > 0 and megabytes > 0 and bandwidth > 0 and share > 0
        assert (flops > 0) == (rate > 0)
        assert bound in ("memory", "arithmetic")
    assert len(sums["rows"]) == 12
    assert all(took > 0 and least > 0 for _, _, took, least, _ in sums["rows"])


def test_a_single_row_is_normed_and_gated_where_it_is_multiplied() -> None:
    """On a GPU, as the layers do it: what is left is the norm before the head."""
    kernels = list(Shape(ModelSpec.from_config(DENSE), torch.device("cuda")).kernels())
    for batch, norms, gates in ((1, 1, 0), (2, 7, 3)):
        times = {(each.name, each.form): each.times(Load.decode(batch, 70)) for each in kernels}
        for form in ("bf16", "fp8", "w8a8", "w4a16"):
            assert (times["norm", form], times["gate", form]) == (norms, gates)
        assert times["quantize", "fp8"] == gates and ("quantize", "w4a16") not in times
        assert times["head", ""] == 1
    assert {each.name for each in kernels if not each.times(Load.prefill(80))} == {"head", "sample"}


def test_a_ceiling_is_the_longer_of_moving_and_computing() -> None:
    """Each at its own rate."""
    ceilings = Ceilings(bandwidth=4e12, flops={"bf16": 8e14, "fp8": 16e14})
    assert ceilings.seconds(bytes_=4e9, flops=8e10, unit="bf16") == 1e-3
    assert ceilings.seconds(bytes_=4e9, flops=16e11, unit="bf16") == 2e-3
    assert ceilings.seconds(bytes_=4e9, flops=16e11, unit="fp8") == 1e-3


def test_what_is_read_in_turn_is_larger_than_a_cache() -> None:
    """Of a GPU's L2 cache of 50 MiB; one copy is enough of what is larger by itself, and of tiny things there are not thousands."""
    gpu = torch.device("cuda")
    assert copies(50 << 20, gpu) * (50 << 20) >= 5 * (50 << 20)
    assert copies(1 << 30, gpu) == 1
    assert copies(100, gpu) == 64


def test_tilings_are_compared_on_a_gpu_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to compare elsewhere, and it says so."""
    with pytest.raises(SystemExit):
        main([str(folder), "--device", "cpu", "--tune"])
    assert "--tune compares a GPU's kernels" in capsys.readouterr().err


class TestTuning:
    """The search itself, on functions that stand for kernels."""

    def explored(self, *, until: float = float("inf"), **others: object) -> object:
        """Settings of two axes, the more the better; one that is wrong, one that is not a number, one that does not run."""
        pytest.importorskip("triton")
        from benchmarks.kernels.tuning import Search, explore

        exact = torch.ones(4, 8)

        def calls(setting: dict[str, int]) -> list[object]:
            match setting:
                case {"chunk": 16}:
                    return [lambda: exact * 1.5]
                case {"chunk": 32}:
                    return [lambda: exact * torch.nan]
                case {"chunk": 64}:
                    raise RuntimeError("out of resource")
            return [
                lambda: (time.perf_counter_ns(), sum(range(40_000 // (setting["chunk"] + setting["warps"]))), exact)[2]
            ]

        axes = [{"chunk": (4, 8, 16, 32, 64)}, {"warps": (1, 4)}]
        search = Search(
            "toy", Load.decode(1, 8), "chunk 4 warps 1", {"chunk": 4, "warps": 1}, axes, calls, lambda: exact, **others
        )  # type: ignore[arg-type]
        return explore(search, CPU, until=until)

    def test_a_wrong_setting_is_refused_however_fast_it_is(self) -> None:
        """And one that does not run; each says why."""
        found = self.explored()
        assert {name: why.split(":")[0] for name, why in found.refused.items()} == {
            "chunk 16 warps 1": "off by 0.500",
            "chunk 32 warps 1": "off by nan",
            "chunk 64 warps 1": "RuntimeError",
        }
        assert set(found.seconds) == {"chunk 4 warps 1", "chunk 8 warps 1", "chunk 8 warps 4"}
        assert found.best in ("chunk 8 warps 1", "chunk 8 warps 4")

    def test_one_wrong_row_is_enough(self) -> None:
        """However many others are right."""
        pytest.importorskip("triton")
        from benchmarks.kernels.tuning import MOST_ERROR, distance

        exact = torch.randn(256, 64)
        wrong = exact.clone()
        wrong[77] = exact[78]
        assert distance(wrong, exact) > MOST_ERROR
        assert distance(exact.bfloat16(), exact) < MOST_ERROR

    def test_what_cannot_fit_is_not_tried(self) -> None:
        """Neither timed nor refused."""
        found = self.explored(fits=lambda setting: setting["chunk"] < 8)
        assert set(found.seconds) == {"chunk 4 warps 1", "chunk 4 warps 4"}
        assert not found.refused

    def test_others_compete(self) -> None:
        """What is no setting, such as another library."""
        found = self.explored(others={"library": [lambda: torch.ones(4, 8)], "wrong": [lambda: torch.zeros(4, 8)]})
        assert "library" in found.seconds
        assert found.refused["wrong"] == "off by 1.000"

    def test_when_there_is_no_time_left_it_says_so(self) -> None:
        """Nothing is tried, nothing is best."""
        found = self.explored(until=0.0)
        assert found.best is None
        assert set(found.refused.values()) == {"no time left"}

    def test_a_setting_is_what_kernels_go_by(self) -> None:
        """Of attention and of experts, while it is tried."""
        pytest.importorskip("triton")
        from benchmarks.kernels import tuning
        from services.engine.ops.kernels import decode_attention, grouped, moe, prefill_attention

        shape, (decode, prefill) = Shape(ModelSpec.from_config(MIXTURE), CPU), (Load.decode(3, 70), Load.prefill(80))
        auto = KVFormat.AUTO
        with tuning.decode_search(shape, decode, auto).under({"chunk": 128, "warps": 1, "stages": 4}):
            assert decode_attention.tuning(3, 8, 2) == decode_attention.tuning(300, 8, 2) == (128, 1, 4)
        with tuning.prefill_search(shape, prefill, auto).under({"rows": 128, "keys": 32, "warps": 8, "stages": 2}):
            assert prefill_attention.TUNING[2] == (128, 32, 8, 2)
        assert shape.spec.moe is not None
        (search,) = tuning.experts_searches(shape, [decode], shape.spec.moe)
        with search.under({"pairs": 16, "rows": 128, "columns": 64, "warps": 8, "stages": 3}):
            assert not moe.is_few(1, 1000)
            assert moe.tile_rows(1, 1000) == 16
            assert grouped.TILES == {16: (128, 64, 8, 3)}

    def test_tables_are_put_back(self) -> None:
        """Whatever happens meanwhile."""
        pytest.importorskip("triton")
        from benchmarks.kernels.tuning import replaced
        from services.engine.ops.kernels import decode_attention

        before = decode_attention.TUNING
        other = {2: {1 << 30: decode_attention.Tuning(64, 1, 1)}}

        def within() -> AbstractContextManager[None]:
            return replaced(decode_attention, TUNING=other)

        with pytest.raises(RuntimeError, match="meanwhile"), within():
            assert decode_attention.tuning(3, 8, 2) == (64, 1, 1)
            raise RuntimeError("meanwhile")
        assert decode_attention.TUNING is before
