"""GGUF files that the package gguf wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from holdfast import models
from holdfast.convert import _NAMES
from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.models.decoder import Decoder
from services.engine.quality.sizes import bytes_of
from tests.conftest import missing
from tests.engine.batches import Bench
from tests.engine.quant.readers.checkpoints import (
    CONFIG,
    DOWN,
    Q,
    check_model,
    dequantized,
    logits,
    matrices,
    opened,
    others,
    size,
    weights_of,
    write,
)

KEPT = {"Q4_0": "int4-g32", "Q4_1": "int4-g32-asym", "Q4_K": "int4-g32-asym", "Q8_0": "none", "Q6_K": "none"}
TEXT = """Water boils at a hundred degrees Celsius at the level of the sea, and sooner on a mountain, where the air presses less. Paris is the
capital of France, Rome that of Italy; between them lie the Alps, over which Hannibal led his elephants in the year 218 before Christ."""
SHORT = {hugging_face: short for short, hugging_face in _NAMES.items()}
HEADS = {"q_proj": 4, "k_proj": 2}


def in_few_bits(weight: NDArray[np.float32], type: Type) -> NDArray[np.uint8]:
    """As the package rounds it. It cannot round to the types with superblocks, but knows what their bytes mean: those are drawn, with
    scales of the right size."""
    if type not in (Type.Q4_K, Type.Q6_K):
        rounded: NDArray[np.uint8] = quantize(weight, type)
        return rounded
    per_block, size = gguf.GGML_QUANT_SIZES[type]
    draw = np.random.default_rng(weight.shape[0])
    blocks = draw.integers(0, 256, (weight.size // per_block, size), dtype=np.uint8)
    scales = (draw.random((len(blocks), 2)) * 1e-4 + 1e-4).astype(np.float16)
    if type is Type.Q4_K:
        scales[:, 0] *= 2
        blocks[:, :4] = (scales * np.float16(1.0)).view(np.uint8)
    else:
        blocks[:, 208:210] = (scales[:, :1] / np.float16(6)).astype(np.float16).view(np.uint8)
    return blocks.reshape(weight.shape[0], -1)


def llama_cpp_name(name: str) -> str:
    """What llama.cpp calls this tensor."""
    match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.weight", name)
    assert match is not None
    prefix = "" if match[1] is None else f"blk.{match[1]}."
    return f"{prefix}{SHORT[match[2]]}.weight"


def in_pairs(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The rows of q or k as llama.cpp orders them (`permute` of its `conversion`): two that rotate together are neighbours."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def out_of_pairs(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `in_pairs`."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def written(folder: Path, type_of: Callable[[str], str], *, tied: bool = False, heads: int = 4) -> dict[str, Tensor]:
    """Writes the model, each matrix in the type that it should have, and says what the package makes of them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    oracle = {}
    for name, weight in (others() | weights_of(matrices())).items():
        if tied and name == "lm_head.weight":
            continue
        heads = next((heads for part, heads in HEADS.items() if part in name), None)
        if (kind := type_of(name)) in ("F32", "F16"):
            content = weight.numpy().astype(kind.replace("F", "float"))
            writer.add_tensor(llama_cpp_name(name), content if heads is None else in_pairs(content, heads))
            continue
        type, content = Type[kind], weight.numpy()
        packed = in_few_bits(content if heads is None else in_pairs(content, heads), type)
        plain = dequantize(packed, type)
        oracle[name.removesuffix(".weight")] = torch.from_numpy(plain if heads is None else out_of_pairs(plain, heads))
        writer.add_tensor(llama_cpp_name(name), packed, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return oracle


def of_layers(kind: str) -> Callable[[str], str]:
    """The matrices of layers in this type."""
    return lambda name: kind if "_proj" in name else "F32"


@pytest.mark.parametrize("kind", KEPT)
def test_matrices_and_logits_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    """Of each type; with the rows of q and k where they belong, and in four bits where there were four."""
    oracle = written(tmp_path, of_layers(kind))
    with opened(tmp_path) as checkpoint:
        for name, expected in oracle.items():
            torch.testing.assert_close(
                dequantized(checkpoint, name), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max())
            )
            assert checkpoint.format(name).name == KEPT[kind]
    check_model(tmp_path, oracle, most=1e-3)
    if KEPT[kind] != "none":
        tables = 2 * 4 * 96 * 256
        assert size(tmp_path) - tables < 0.26 * (size(tmp_path, quantization="*=none") - tables)


def test_rounding_by_the_package_keeps_the_model(tmp_path: Path) -> None:
    """So that the test above is not one of noise against noise: rows of q and k in a wrong order would change logits."""
    oracle = written(tmp_path, of_layers("Q8_0"))
    for name, weight in matrices().items():
        assert (oracle[name] - weight).norm() < 0.01 * weight.norm()


def test_a_tied_table_in_four_bits_is_embedding_and_head(tmp_path: Path) -> None:
    """Kept once."""
    oracle = written(tmp_path, lambda name: "F32" if "norm" in name else "Q4_1", tied=True)
    with opened(tmp_path) as checkpoint:
        assert checkpoint.format("model.embed_tokens").name == "int4-g32-asym"
    plain = write(tmp_path / "plain", weights_of(oracle | {"lm_head": oracle["model.embed_tokens"].clone()}))
    expected = logits(plain)
    torch.testing.assert_close(logits(tmp_path), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))


def test_types_may_be_mixed(tmp_path: Path) -> None:
    """As llama.cpp mixes them; where q, k and v are kept as one matrix and differ, they are unpacked."""
    oracle = written(tmp_path, lambda name: "Q8_0" if "v_proj" in name else "Q4_0" if "_proj" in name else "F32")
    with opened(tmp_path) as checkpoint:
        names = [Q.replace("q_proj", f"{each}_proj") for each in "qkv"]
        assert checkpoint.format(*names).name == "none"
        assert checkpoint.format(DOWN).name == "int4-g32"
    check_model(tmp_path, oracle, most=1e-3)


def test_half_precision_is_read_too(tmp_path: Path) -> None:
    """Rows of q and k in their order there as well."""
    written(tmp_path, lambda name: "F16" if "_proj" in name else "F32")
    with opened(tmp_path) as checkpoint:
        found = checkpoint.matrix(Q, 256, 256)
    torch.testing.assert_close(found, matrices()[Q], rtol=1e-3, atol=1e-4)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    """With the tensor and the types there are."""
    written(tmp_path, lambda name: "Q5_0" if name == f"{DOWN}.weight" else "F32")
    with pytest.raises(
        ConfigurationError, match=r"the tensor blk\.0\.ffn_down\.weight is of type Q5_0; there are F32, F16, BF16, Q4_0"
    ):
        load(tmp_path)


@pytest.mark.parametrize("left", [10, 500, 5000, -7])
def test_a_file_that_is_cut_off_is_refused(left: int, tmp_path: Path) -> None:
    """Wherever it was cut."""
    written(tmp_path, of_layers("Q4_0"))
    path = tmp_path / "model.gguf"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ConfigurationError, match=r"model\.gguf cannot be read as GGUF, or is cut off"):
        load(tmp_path)


def test_a_shape_that_contradicts_the_config_is_named(tmp_path: Path) -> None:
    """A config of another model."""
    written(tmp_path, of_layers("Q4_0"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"intermediate_size": 1024}))
    with pytest.raises(
        ConfigurationError,
        match=r"mlp\.gate_proj\.weight has shape \[512, 256\], but the config makes it \[1024, 256\]",
    ):
        load(tmp_path)


def test_heads_that_do_not_fit_the_rows_are_named(tmp_path: Path) -> None:
    """Their order could not be undone."""
    written(tmp_path, of_layers("Q4_0"), heads=3)
    with pytest.raises(ConfigurationError, match=r"the 256 rows of blk\.0\.attn_q\.weight are not those of 3 heads"):
        load(tmp_path)


def test_transformers_is_not_asked_to_read_it(tmp_path: Path) -> None:
    """It would unpack all of it."""
    written(tmp_path, of_layers("Q4_0"))
    with pytest.raises(ConfigurationError, match=r"is quantized \(GGUF\), and transformers computes this model"):
        load(tmp_path, implementation="transformers")


def test_one_file_must_be_there_alone(tmp_path: Path) -> None:
    """And say itself how it is quantized."""
    written(tmp_path, of_layers("Q4_0"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigurationError, match=r"model\.gguf says itself how it is quantized"):
        load(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"several GGUF files: model\.gguf, other\.gguf"):
        load(tmp_path)


def test_the_default_model_runs_from_its_own_file() -> None:
    """Its layers in the four bits they come in, of which nothing is rounded but scales and minimums, to the dtype of activations; its table, of 8 bits in
    groups, unpacked, bit for bit as it was converted. The mean KL from the converted model was found at 0.0018, where that is at 0.0008 from float32."""
    try:
        own, converted = (models.resolve(f"smollm2-135m-instruct{kind}") for kind in ("-q4_1", ""))
    except ConfigurationError as error:
        missing(f"no default model: {error}")
        raise
    with opened(own) as ours, opened(converted) as theirs:
        assert ours.names == theirs.names
        for name in ("model.layers.3.self_attn.q_proj", "model.layers.29.mlp.down_proj", "model.embed_tokens"):
            plain = theirs.matrix(name, *theirs.shape(f"{name}.weight"))
            assert torch.equal(ours.matrix(name, *plain.shape).dequant().bfloat16(), plain.bfloat16())
        assert ours.format("model.layers.3.mlp.down_proj").name == "int4-g32-asym"
    ids = [1, *Tokenizer.from_file(str(own / "tokenizer.json")).encode(TEXT).ids]
    kept, unpacked = load(own), load(converted)
    before, after = (Bench(model).logits(ids).log_softmax(-1) for model in (unpacked, kept))
    assert (before.exp() * (before - after)).sum(-1).mean() < 0.005
    assert (before.argmax(-1) == after.argmax(-1)).float().mean() > 0.95
    assert isinstance(kept, Decoder) and isinstance(unpacked, Decoder)
    assert bytes_of(kept.layers) < 0.32 * bytes_of(unpacked.layers)
