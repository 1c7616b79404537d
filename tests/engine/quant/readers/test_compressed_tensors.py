"""Checkpoints that the package compressed-tensors wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle import forward
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.ops.forms import Quantized, RowScaled
from services.engine.ops.quantize import dequantize
from services.engine.quant import Buffers
from services.engine.quant.matrix import Scheme, extremes
from services.engine.quant.readers.compressed_tensors import CompressedTensors
from services.engine.quant.rounding import Rounding
from services.engine.shard import Shard
from tests.engine.quant.readers.checkpoints import (
    CONFIG,
    DOWN,
    LAYERS,
    PROMPT,
    Q,
    assert_refused,
    check_model,
    corrupt,
    dequantized,
    logits,
    matrices,
    opened,
    relative_error,
    size,
    with_last,
    write,
)
from tests.engine.quant.test_matrix import arguments_of

DYNAMIC = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
STATIC = QuantizationArgs(num_bits=8, strategy="tensor")
FLOATS = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)


class Nothing:
    """A checkpoint without tensors."""

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...]:
        raise AssertionError(name)

    def raw(self, name: str, *shape: int, dtypes: Collection[torch.dtype]) -> Tensor:
        raise AssertionError(name)


@dataclass(frozen=True)
class Case:
    """A way to write matrices, and what comes of it."""

    format: str
    scheme: Scheme
    kept: str
    activations: QuantizationArgs | None = None
    most: float = 1e-3
    """How far logits may be off."""


CASES = {
    "int4 group": Case("pack-quantized", Scheme(4, tile=(1, 64)), "int4-g64"),
    "int4 group asymmetric": Case("pack-quantized", Scheme(4, tile=(1, 32), symmetric=False), "int4-g32-asym"),
    "int4 channel": Case("pack-quantized", Scheme(4), "int4-g128"),
    "int3 group": Case("pack-quantized", Scheme(3, tile=(1, 128)), "int4-g128"),
    "int8 packed": Case("pack-quantized", Scheme(8), "int8-weight"),
    "int8 packed in groups": Case("pack-quantized", Scheme(8, tile=(1, 128)), "none"),
    "int6 packed asymmetric": Case("pack-quantized", Scheme(6, symmetric=False), "none"),
    "int8 dynamic": Case("int-quantized", Scheme(8), "int8", DYNAMIC, most=0.03),
    "int8 tensor": Case("int-quantized", Scheme(8, tile=(None, None)), "int8", DYNAMIC, most=0.03),
    "int8 static": Case("int-quantized", Scheme(8), "int8-static", STATIC, most=0.1),
    "int8 weight": Case("naive-quantized", Scheme(8), "int8-weight"),
    "int8 asymmetric": Case("int-quantized", Scheme(8, symmetric=False), "none"),
    "fp8": Case("float-quantized", Scheme(is_float=True), "fp8", FLOATS, most=0.1),
    "fp8 tensor": Case("float-quantized", Scheme(is_float=True, tile=(None, None)), "fp8-tensor", FLOATS, most=0.1),
    "fp8 block": Case("float-quantized", Scheme(is_float=True, tile=(128, 128)), "fp8-block", FLOATS, most=0.1),
    "fp8 naive": Case("naive-quantized", Scheme(is_float=True), "fp8", FLOATS, most=0.1),
    "fp8 weight": Case("float-quantized", Scheme(is_float=True), "none"),
}


def written(folder: Path, case: Case, **changes: Any) -> dict[str, Tensor]:
    """Writes the model, and says what the package itself makes of its matrices."""
    args = arguments_of(case.scheme)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=case.activations)
    compressor = BaseCompressor.get_value_from_registry(case.format)
    content, oracle = {}, {}
    for name, weight in matrices().items():
        scales, zeros = calculate_qparams(*extremes(weight, case.scheme), args)
        state = {"weight": weight, "weight_scale": scales.view(1) if case.scheme.tile == (None, None) else scales}
        if not case.scheme.symmetric:
            state["weight_zero_point"] = zeros.to(torch.int8)
        state = compressor.compress(state, scheme)
        oracle[name] = compressor.decompress(state, scheme)["weight"].float()
        if case.activations is STATIC:
            state["input_scale"] = torch.tensor([0.02 if "o_proj" in name else 0.04])
        content |= {f"{name}.{key}": value for key, value in state.items()}
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=case.format, ignore=["lm_head"], quantization_status="compressed"
    )
    write(folder, content, config.model_dump(mode="json") | changes)
    return oracle


@pytest.mark.parametrize("name", CASES)
def test_matrices_and_logits_are_those_of_the_package(name: str, tmp_path: Path) -> None:
    """Of each scheme: the values as it dequantizes them, the format that keeps them, and what the model computes with it."""
    case = CASES[name]
    oracle = written(tmp_path, case)
    with opened(tmp_path) as checkpoint:
        for matrix, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, matrix), expected, rtol=1e-6, atol=1e-8)
            assert checkpoint.format(matrix).name == case.kept
    check_model(tmp_path, oracle, most=case.most)


def reference(folder: Path) -> Any:
    """The folder's model as transformers loads it, by the package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits_of(model: Any) -> Tensor:
    """The reference's logits of every position of the prompt."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(
    ("name", "most"), [("int4 group", 1e-4), ("int8 packed in groups", 1e-4), ("int8 dynamic", 0.05)]
)
def test_the_model_computes_what_transformers_computes(name: str, most: float, tmp_path: Path) -> None:
    """Which loads the same folder by the package. Activations that are whole numbers found in every step it rounds to other levels (to 127.5, as it rounds
    weights), which is as far from us as from what is not rounded."""
    written(tmp_path, CASES[name])
    assert relative_error(logits(tmp_path), logits_of(reference(tmp_path))) < most


@pytest.mark.parametrize("name", ["int8 static", "fp8", "fp8 tensor"])
def test_activations_are_rounded_as_transformers_rounds_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same values, but where one lies between two of them: there the last place decides, which a CPU sums in its own order, and all that follows
    is as far off as a step of the rounding makes it (the reference from itself by up to 2e-2 where its embedding is changed in the last place). So the
    reference goes on with what we rounded to, is to find it as near as what it would have rounded to itself, and the logits are the same."""
    written(tmp_path, CASES[name])
    model = reference(tmp_path)
    rounded = rounded_rows(tmp_path, monkeypatch)
    modules = {module: name for name, module in model.named_modules()}
    own, seen = forward.forward_quantize, set()

    def ours(module: torch.nn.Module, value: Tensor, base_name: str, args: QuantizationArgs) -> Tensor:
        theirs = own(module, value, base_name, args)
        if base_name != "input":
            return theirs
        found = rounded[modules[module]].expand_as(theirs)
        slack = 1e-6 * value.abs().amax(-1, keepdim=True)
        assert ((found - value).abs() <= (theirs - value).abs() + slack).all(), modules[module]
        seen.add(modules[module])
        return found

    monkeypatch.setattr(forward, "forward_quantize", ours)
    expected = logits_of(model)
    assert seen == set(matrices())
    assert relative_error(logits(tmp_path), expected) < 5e-6


def rounded_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What our model multiplies each matrix with for the prompt, [N, I]: rounded activations, as what they stand for."""
    rows: list[Tensor] = []
    products = Rounding._products

    def noted(self: Rounding, x: Tensor | Quantized, buffers: Buffers, **more: Any) -> Tensor:
        form = self.form(buffers)
        assert isinstance(form, RowScaled)
        x = self._rounded_rows(x, buffers)
        rows.append(dequantize(x, form))
        return products(self, x, buffers, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Rounding, "_products", noted)
        logits(folder)
    shares = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # matrices that are multiplied at once
    of_share = [[f"{kind}_proj" for kind in share] for share in shares] * LAYERS
    return {
        name: each
        for place, (share, each) in enumerate(zip(of_share, rows, strict=True))
        for name in matrices()
        if name.startswith(f"model.layers.{place // len(shares)}.") and name.rpartition(".")[2] in share
    }


def test_four_bits_stay_four_bits(tmp_path: Path) -> None:
    """And take a fraction of what they take unpacked."""
    written(tmp_path, CASES["int4 group"])
    tables = 2 * 4 * 96 * 256
    assert size(tmp_path) - tables < 0.2 * (size(tmp_path, quantization="*=none") - tables)


def test_ranks_read_their_parts(tmp_path: Path) -> None:
    """Which cut through tiles, of outputs and of inputs."""
    oracle = written(tmp_path, CASES["int4 group asymmetric"])
    for name, dim in ((Q, 0), (DOWN, 1)):
        pieces = []
        for rank in range(2):
            shard = Shard(rank, 2)
            with opened(tmp_path, shard=shard) as checkpoint:
                shape: list[Any] = list(oracle[name].shape)
                shape[dim] = shard.part(shape[dim], "places")
                pieces.append(checkpoint.matrix(name, *shape).dequant())
        torch.testing.assert_close(torch.cat(pieces, dim), oracle[name])


def test_experts_are_unpacked(tmp_path: Path) -> None:
    """They are multiplied in stacks; the attention beside them is kept, and the router is left as it is."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=4, num_experts_per_tok=2, vocab_size=96, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    args = QuantizationArgs(num_bits=8, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    plain, content = load_file(tmp_path / "model.safetensors"), {}
    for name, weight in plain.items():
        if not name.endswith("proj.weight"):
            content[name] = weight
            continue
        scales, _ = calculate_qparams(*extremes(weight, Scheme(8)), args)
        state = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
        content |= {name.replace("weight", key): value for key, value in state.items()}
        plain[name] = compressor.decompress(state, scheme)["weight"]
    save_file(plain, tmp_path / "model.safetensors")
    expected = logits(tmp_path)
    save_file({name: each.contiguous() for name, each in content.items()}, tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    ignore = ["lm_head", "re:.*mlp\\.gate$"]
    quantized = QuantizationConfig(config_groups={"a": scheme}, format="pack-quantized", ignore=ignore)
    (tmp_path / "config.json").write_text(json.dumps(said | {"quantization_config": quantized.model_dump(mode="json")}))
    with opened(tmp_path) as checkpoint:
        assert checkpoint.format("model.layers.0.self_attn.o_proj").name == "int8-weight"
    with structlog.testing.capture_logs() as lines:
        torch.testing.assert_close(logits(tmp_path), expected, rtol=0, atol=1e-3)
    assert [(line["count"], line["names"].split(", ")[0]) for line in lines if "unpacked" in line["event"]] == [
        (2 * 4 * 3, "model.layers.0.mlp.experts.0.down_proj")
    ]


def test_a_group_may_name_layers(tmp_path: Path) -> None:
    """By pattern, before one that names the kind; what `ignore` names is as it is."""
    args = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {
        "rest": {"targets": ["Linear"], "weights": args, "format": "int-quantized"},
        "mlp": {"targets": ["re:.*mlp.*"], "weights": args | {"num_bits": 4}, "format": "pack-quantized"},
    }
    mixed, ints = {}, written(tmp_path / "int8", CASES["int8 weight"])
    fours = written(tmp_path / "int4", CASES["int4 channel"])
    eight, four = (load_file(tmp_path / each / "model.safetensors") for each in ("int8", "int4"))
    spared = "model.layers.1.self_attn.o_proj"
    for name in ints:
        mixed |= {key: each for key, each in (four if "mlp" in name else eight).items() if key.startswith(name)}
    mixed = {key: each for key, each in mixed.items() if not key.startswith(spared)}
    mixed[f"{spared}.weight"] = matrices()[spared]
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": "mixed-precision",
        "ignore": ["lm_head", spared],
    }
    folder = write(tmp_path / "mixed", mixed, config)
    with opened(folder) as checkpoint:
        kept = {name: checkpoint.format(name).name for name in (Q, DOWN, spared)}
    assert kept == {Q: "int8-weight", DOWN: "int4-g128", spared: "none"}
    oracle = {name: fours[name] if "mlp" in name else ints[name] for name in ints} | {spared: matrices()[spared]}
    check_model(folder, oracle, most=1e-3)


def test_a_rule_wins_over_the_checkpoint(tmp_path: Path) -> None:
    """It unpacks, or takes the same values with activations of another kind; what it cannot keep it refuses, and rounds nothing again."""
    oracle = written(tmp_path, CASES["int8 dynamic"])
    truth = logits(tmp_path, quantization="*=none")
    assert relative_error(logits(tmp_path, quantization="model.layers.*=int8-weight"), truth) < 1e-3
    assert relative_error(logits(tmp_path), truth) > 1e-3
    with pytest.raises(
        ConfigurationError, match=r"layers\.\d\.self_attn\.q_proj.*int4-g64 cannot keep values of 8 bits"
    ):
        load(tmp_path, quantization="model.layers.*=int4-g64")
    with pytest.raises(ConfigurationError, match="kept as one matrix; the rules must give all of them the same"):
        load(tmp_path, quantization="*.q_proj=int8-weight")
    assert len(oracle) == 14


@pytest.mark.parametrize(
    ("targets", "kept"),
    [
        ([["Linear"], ["re:.*q_proj"]], 4),
        ([["re:.*q_proj"], ["Linear"]], 8),
        ([["re:.*proj"], ["re:.*k_proj", Q]], 4),
        ([["re:.*self_attn.*"], ["re:.*proj"]], 4),
        ([["re:.*proj"], ["re:.*self_attn.*"]], 8),
        ([["Linear"], ["Linear"]], 4),
    ],
)
def test_the_group_of_a_matrix_is_the_one_that_the_package_gives_it(targets: list[list[str]], kept: int) -> None:
    """A name before a pattern before a kind; among patterns the first by the alphabet; of the same target the last."""
    groups = {
        f"group_{place}": QuantizationScheme(targets=each, weights=QuantizationArgs(num_bits=bits, strategy="channel"))
        for place, (each, bits) in enumerate(zip(targets, (8, 4), strict=True))
    }
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", ignore=["lm_head", "re:.*down_proj"])
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    apply_quantization_config(model, config)
    reader = CompressedTensors(config.model_dump(mode="json"), Nothing())
    modules = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in modules.items():
        scheme = getattr(module, "quantization_scheme", None)
        assert reader.holds(name) == (scheme is not None)
        if scheme is not None:
            assert reader.format(name) == ("int8-weight" if scheme.weights.num_bits == 8 else "int4-g128")
    assert modules[Q].quantization_scheme.weights.num_bits == kept and not reader.holds(DOWN)


@pytest.mark.parametrize(
    ("weights", "activations", "kept"),
    [
        ({}, None, "int8-weight"),
        ({}, {"dynamic": True, "strategy": "token"}, "int8"),
        ({}, {"dynamic": True, "strategy": "tensor"}, "int8"),
        ({}, {"dynamic": True, "strategy": "token", "symmetric": False}, "int8-weight"),
        ({}, {"dynamic": True, "strategy": "group", "group_size": 128}, "int8-weight"),
        ({}, {"dynamic": True, "strategy": "token", "num_bits": 4}, "int8-weight"),
        ({}, {"strategy": "tensor"}, "int8-static"),
        ({}, {"strategy": "tensor", "symmetric": False}, "int8-weight"),
        ({"num_bits": 4}, {"dynamic": True, "strategy": "token"}, "int4-g128"),
        ({"type": "float"}, None, "none"),
        ({"type": "float"}, {"type": "float", "strategy": "tensor"}, "fp8"),
        ({"type": "float"}, {"type": "int", "dynamic": True, "strategy": "token"}, "none"),
        ({"type": "float"}, {"type": "float", "dynamic": True, "strategy": "group", "group_size": 128}, "none"),
        ({"type": "float", "strategy": "block", "block_structure": "128x128"}, {"type": "float", "dynamic": True, "strategy": "group", "group_size": 128}, "fp8-block"),
    ],
)  # fmt: skip
def test_activations_are_kept_no_coarser_than_the_config_says(
    weights: dict[str, Any], activations: dict[str, Any] | None, kept: str
) -> None:
    """And as they are where no format has them so."""
    group = {"targets": ["Linear"], "weights": {"strategy": "channel"} | weights, "input_activations": activations}
    reader = CompressedTensors({"config_groups": {"a": group}, "format": "naive-quantized"}, Nothing())
    assert reader.format(Q) == kept


def test_inputs_that_were_sorted_are_put_back(tmp_path: Path) -> None:
    """As the package wrote them until August 2026, and no longer can: with the group of each input in `weight_g_idx`, or with -1 in it for inputs in their
    own order."""
    oracle = written(tmp_path, CASES["int4 group"])
    content = load_file(tmp_path / "model.safetensors")
    for name in oracle:
        inputs = oracle[name].shape[1]
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
        values = unpack_from_int32(content[f"{name}.weight_packed"], 4, oracle[name].shape)
        places = torch.arange(inputs, dtype=torch.int32) // 64
        if "v_proj" in name:
            content[f"{name}.weight_g_idx"] = torch.full_like(places, -1)
            continue
        content[f"{name}.weight_g_idx"] = torch.empty_like(places).index_copy_(0, order, places)
        content[f"{name}.weight_packed"] = pack_to_int32(torch.empty_like(values).index_copy_(1, order, values), 4)
        oracle[name] = torch.empty_like(oracle[name]).index_copy_(1, order, oracle[name])
    save_file(content, tmp_path / "model.safetensors")
    with opened(tmp_path) as checkpoint:
        for name, expected in oracle.items():
            torch.testing.assert_close(dequantized(checkpoint, name), expected, rtol=1e-6, atol=1e-8)


def test_zero_points_in_the_middle_are_not_missed(tmp_path: Path) -> None:
    """Earlier versions wrote them for symmetric schemes too; others are."""
    written(tmp_path, CASES["int8 dynamic"])
    name = f"{Q}.weight_zero_point"
    content = load_file(tmp_path / "model.safetensors")
    save_file(content | {name: torch.zeros(256, 1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    load(tmp_path)
    save_file(content | {name: torch.ones(256, 1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.weight_zero_point"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        (f"{Q}.weight_scale", lambda each: None, r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.weight_scale"),
        (f"{Q}.weight_packed", lambda each: None, r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.weight_packed"),
        (f"{Q}.weight_packed", lambda each: each[:, 1:], r"q_proj\.weight_packed has shape \[256, 31\], but the config makes it \[256, 32\]"),
        (f"{Q}.weight_packed", lambda each: each.float(), r"q_proj\.weight_packed holds float32, but the config makes it int32"),
        (f"{Q}.weight_scale", lambda each: each[:, :2], r"q_proj\.weight_scale has shape \[256, 2\], but the config makes it \[256, 4\]"),
        (f"{Q}.weight_scale", lambda each: each.int(), r"q_proj\.weight_scale holds int32, but the config makes it float32 or"),
        (f"{Q}.weight_scale", lambda each: each * torch.nan, r"q_proj\.weight_scale holds values that are not finite numbers"),
        (f"{Q}.weight_shape", lambda each: each.flip(0) * 2, r"q_proj\.weight_shape says \[512, 512\], but the config makes it \[256, 256\]"),
    ],
)  # fmt: skip
def test_a_tensor_that_contradicts_the_config_is_named(tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    """Missing, cut, mislabelled, of another shape."""
    written(tmp_path, CASES["int4 group"])
    corrupt(tmp_path, tensor, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("case", ["fp8", "fp8 tensor", "fp8 block"])
@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
def test_floats_that_are_no_numbers_are_refused(case: str, tensor: str, tmp_path: Path) -> None:
    written(tmp_path, CASES[case])
    corrupt(tmp_path, f"{Q}.{tensor}", lambda each: with_last(each, torch.nan))
    assert_refused(
        tmp_path, rf"the tensor model\.layers\.0\.self_attn\.q_proj\.{tensor} holds values that are not finite"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'; there are readers for compressed-tensors, gptq"),
        ({"format": "marlin-24"}, r"config_groups\.group_0: the format is 'marlin-24'; there are pack-quantized"),
        ({"config_groups": {}}, "it names no config_groups"),
        ({"ignore": ["lm_head", "re:("]}, r"'re:\(' is no pattern: missing \), unterminated subpattern"),
        ({"config_groups": {"a": {"targets": ["re:*"], "weights": {"num_bits": 8}}}}, r"'re:\*' is no pattern: nothing to repeat"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 16}}}}, r"config_groups\.a: weights are int of 16 bits"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"strategy": "group"}}}}, r"config_groups\.a: the strategy of weights is 'group' with group_size None"),
        ({"transform_config": {"x": 1}}, "transforms of activations are not computed"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_read_says_why(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the key and what there is."""
    written(tmp_path, CASES["int4 group"], **changes)
    assert_refused(tmp_path, message)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    """Before anything of it is used."""
    written(tmp_path, CASES["int4 group"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        load(tmp_path)


def test_eight_bits_that_nothing_announces_are_refused(tmp_path: Path) -> None:
    """A config without `quantization_config`: its values would be taken for weights."""
    written(tmp_path, CASES["fp8"])
    content = {name: each for name, each in load_file(tmp_path / "model.safetensors").items() if "scale" not in name}
    write(tmp_path, content)
    with pytest.raises(
        ConfigurationError,
        match=r"_proj\.weight holds float8_e4m3fn, without scales that a quantization_config tells of",
    ):
        load(tmp_path)
