"""What is written, as others and we read it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from tokenizers import Tokenizer
from torch import Tensor

from services.engine.models import load
from services.engine.quant.matrix import Scheme, nearest
from services.engine.quantize import __main__ as command
from services.engine.quantize.compressed_tensors import packed
from tests.engine.batches import Bench
from tests.engine.calibrate.toys import saved

SHOWN = ("--tokens", "192", "--window", "48", "--quality-tokens", "0")
PROMPT = [(7 * n * n + 3) % 97 for n in range(30)]

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return shared / "data" / "text" / "wikitext2_test.raw.gz"


def made(model: Path, out: Path, *arguments: object) -> Path:
    command.main([str(model), str(out), *(str(each) for each in arguments)])
    return out


def said_of(folder: Path) -> str:
    """Who else reads it, as the report says."""
    said: str = json.loads((folder / "quantization_report.json").read_text())["read_by"]
    return said


def theirs(folder: Path, ids: list[int], *, unpacks: bool = False) -> Tensor:
    """The logits of transformers with the package compressed-tensors; `unpacks`: all weights when they are loaded."""
    more = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if unpacks else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that what is asked for is added to what the checkpoint says
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **more).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def check_greedy(folder: Path, prompt: list[int], *, most: float, unpacks: bool = False) -> list[int]:
    """Both have the same tokens, and logits that differ by no more than `most`."""
    greedy, logits = Bench(load(folder)).greedy(prompt, 48)
    expected = theirs(folder, [*prompt, *greedy], unpacks=unpacks)[len(prompt) - 1 : -1]
    assert greedy == expected.argmax(-1).tolist()
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=most)
    return greedy


@pytest.mark.parametrize("method", ["mse", "awq", "gptq"])
def test_the_trained_checkpoint_tells_the_same_story_to_both(
    method: str, stories260k: Path, text: Path, tmp_path: Path
) -> None:
    """In four and eight bits, by every method; and it begins as it did."""
    shown = () if method == "mse" else ("--calibrate", text, *SHOWN)
    out = made(
        stories260k, tmp_path / "out", "--scheme", "*.down_proj=int8-weight,int4-g32", "--method", method, *shown
    )
    greedy = check_greedy(out, [1], most=5e-3)
    said = Tokenizer.from_file(str(out / "tokenizer.json")).decode(greedy).strip()
    assert said.startswith("Once upon a time, there was a little")


@pytest.mark.parametrize("name", ["llama", "llama biased, tied", "mistral", "qwen2", "qwen3"])
def test_both_read_every_family_alike(name: str, tmp_path: Path) -> None:
    """Heads that share values, biases, windows, heads that are normed."""
    folder = saved(tmp_path / "model", name)
    out = made(folder, tmp_path / "out", "--scheme", "*.mlp.*=int8-weight,*.self_attn.*=int4-g32")
    check_greedy(out, PROMPT, most=5e-3)


@pytest.mark.parametrize("scheme", ["model.embed_tokens=int8,lm_head=none", "*=int8-weight", "*=int8"])
def test_both_read_an_embedding_in_eight_bits_alike(scheme: str, tmp_path: Path) -> None:
    """A head that was the embedding is a matrix of its own."""
    folder = saved(tmp_path / "model", "llama biased, tied", intermediate_size=64)
    out = made(folder, tmp_path / "out", "--scheme", scheme)
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert said_of(out).startswith("transformers reads it; not vLLM: of an embedding")
    if scheme == "*=int8":  # theirs have half a level more where activations are rounded
        found, expected = Bench(load(out)).logits(PROMPT), theirs(out, PROMPT).float()
        assert float((found - expected).norm() / expected.norm()) < 0.05
    else:
        check_greedy(out, PROMPT, most=5e-3)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("*=int4-g32", "an embedding"),
        ("*.self_attn.*=int3-g32-asym", "zero points"),
        ("fp8-block", "no multiple of 128"),
        ("*.down_proj=int8-weight,int4-g32-asym", "zero points"),
    ],
)
def test_what_transformers_cannot_load_is_said(scheme: str, reason: str, tmp_path: Path) -> None:
    """Neither does it; what it unpacks when it loads gives the same, and that is said too, or else fails."""
    folder = saved(tmp_path / "model", "llama biased, tied", intermediate_size=64)
    out = made(folder, tmp_path / "out", "--scheme", scheme)
    (why,) = (part for part in said_of(out).split("; ") if part.startswith("not transformers: "))
    assert reason in why
    with pytest.raises((AttributeError, RuntimeError)):
        theirs(out, PROMPT)
    if scheme == "fp8-block":  # unpacked, theirs multiplies activations as they are
        assert why.endswith("CompressedTensorsConfig(dequantize=True)")
    elif why.endswith("CompressedTensorsConfig(dequantize=True)"):
        check_greedy(out, PROMPT, most=5e-3, unpacks=True)
    else:
        with pytest.raises(RuntimeError):
            theirs(out, PROMPT, unpacks=True)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("int8", "transformers and vLLM read it"),
        ("*.down_proj=int8-weight,int4-g32", "transformers and vLLM read it"),
        ("int4-g32-asym", "vLLM reads it; not transformers: it loads no zero points"),
        ("int3-g32", "transformers reads it; not vLLM: it has no kernel of its own for three bits"),
        ("int3-g32-asym", "this engine alone reads it as it comes; not transformers: it loads no zero points"),
        ("model.embed_tokens=int4-g32,*=int8", "vLLM reads it; not transformers: it loads an embedding"),
    ],
)
def test_the_report_ends_with_who_else_reads_it(
    scheme: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the command prints it."""
    folder = saved(tmp_path / "model", "llama", intermediate_size=64)
    out = made(folder, tmp_path / "out", "--scheme", scheme)
    assert said_of(out).startswith(said)
    line = f"Other systems: {said_of(out)}."
    assert line in capsys.readouterr().out
    assert (out / "quantization_report.md").read_text().rstrip().endswith(line)


@pytest.mark.parametrize(
    ("hidden", "kv_heads", "readers"),
    [(128, 4, "transformers and vLLM"), (128, 2, "transformers"), (192, 4, "this engine alone")],
)
def test_blocks_of_others_have_no_rest(hidden: int, kv_heads: int, readers: str, tmp_path: Path) -> None:
    """vLLM keeps queries, keys and values as one matrix."""
    sizes = {"hidden_size": hidden, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "head_dim": hidden // 4}
    folder = saved(tmp_path / "model", "llama", intermediate_size=128, **sizes)
    out = made(folder, tmp_path / "out", "--scheme", "fp8-block")
    assert said_of(out).startswith(f"{readers} read")
    if "transformers" in readers:
        found, expected = Bench(load(out)).logits(PROMPT), theirs(out, PROMPT).float()
        assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_groups_name_kinds_where_they_can(tmp_path: Path) -> None:
    """The head apart, which vLLM does not count among linear matrices."""
    folder = saved(tmp_path / "model", "llama", intermediate_size=64)
    out = made(folder, tmp_path / "out", "--scheme", "*=int8")
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Embedding"], ["lm_head", "Linear"]]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_mixtures_keep_their_experts(name: str, tmp_path: Path) -> None:
    """Beside attention in few bits, and MLPs where there are any; what is read is what the engine rounds itself."""
    folder = saved(tmp_path / "model", name)
    rules = "*.self_attn.*=int4-g32" + (",model.layers.1.mlp.*=int8-weight" if name == "qwen3_moe" else "")
    out = made(folder, tmp_path / "out", "--scheme", rules)
    torch.testing.assert_close(Bench(load(out)).logits(PROMPT), Bench(load(folder, quantization=rules)).logits(PROMPT))
    assert "not transformers: it takes the experts of a mixture to be quantized too" in said_of(out)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert [each for each in ignored if "experts" in each] and [each for each in ignored if "gate" in each]


@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        ("int8", 0.05),
        ("int8-weight", 1e-3),
        ("fp8", 0.2),
        ("fp8-tensor", 0.2),
        ("*.self_attn.*=int8,*.down_proj=int8-weight,*.mlp.*=int4-g32,lm_head=int8-weight", 0.1),
    ],
)
def test_both_read_every_format(scheme: str, most: float, stories260k: Path, tmp_path: Path) -> None:
    """And mixed ones. Where activations are rounded too, theirs have half a level more, and logits are near one another."""
    out = made(stories260k, tmp_path / "out", "--scheme", scheme)
    ids = [1, *Bench(load(stories260k)).greedy([1], 60)[0]]
    found, expected = Bench(load(out)).logits(ids), theirs(out, ids).float()
    assert float((found - expected).norm() / expected.norm()) < most
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


@pytest.mark.parametrize("method", ["absmax", "smoothquant"])
def test_static_scales_are_found_by_the_text(method: str, stories260k: Path, text: Path, tmp_path: Path) -> None:
    """And kept beside the weights; what is predicted hardly changes, with inputs that are scaled as with such that are not."""
    ids = [1, *Bench(load(stories260k)).greedy([1], 100)[0]]
    truth = Bench(load(stories260k)).logits(ids).log_softmax(-1)
    shown = ("--calibrate", text, "--tokens", 2048, "--window", 256, "--quality-tokens", 0)
    out = made(stories260k, tmp_path / "out", "--scheme", "int8-static", "--method", method, *shown)
    found, expected = Bench(load(out)).logits(ids), theirs(out, ids).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert float((truth.exp() * (truth - found.log_softmax(-1))).sum(-1).mean()) < 0.03


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("inputs", [32, 30, 7])
def test_words_are_those_of_the_package(bits: int, inputs: int) -> None:
    """Bit for bit, full or not."""
    values = nearest(torch.randn(5, inputs), Scheme(bits)).values_OI
    assert torch.equal(packed(values, bits), pack_to_int32(values, bits))
