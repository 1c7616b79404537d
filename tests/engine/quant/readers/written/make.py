"""Writes one of the checkpoints of this folder: `python make.py NAME`, with GPTQModel 7.7.0 and AutoAWQ 0.2.9 on the path.

Neither is a dependency of the tests: GPTQModel asks for torch 2.14.1 and numpy 2.4.6, and installing it replaces ours; AutoAWQ is no longer kept, and brings datasets,
pandas and pyarrow. For these files both were put, without what they ask for, into folders of their own (`uv pip install --no-deps --target`), beside accelerate 1.15,
datasets 5.2 and the rest of what they import, and ran on a CPU with torch 2.11.0 and transformers 5.23.0.

A tiny Llama of random weights is quantized and saved by the package. Then the package loads what it saved and says what the matrices are: their SHA-256, in
float16, outputs first, go to `dequantized.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
GPTQMODEL: dict[str, dict[str, Any]] = {
    "gptq": {"bits": 4, "group_size": 32},
    "gptq_sorted": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "act_group_aware": False},
    "gptq_v2": {"bits": 4, "group_size": 64, "sym": False, "format": "gptq_v2"},
    "gptq_8_bits": {"bits": 8, "group_size": -1, "act_group_aware": False},
    "awq_gptqmodel": {"bits": 4, "group_size": 32, "method": "awq", "format": "gemm"},
}


def save_tiny(folder: Path) -> None:
    """The model that is quantized, and a tokenizer of a word for each token, without which the packages do not start."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def samples() -> list[list[int]]:
    """What it is calibrated with."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (32,), generator=draw).tolist() for _ in range(16)]


def by_gptqmodel(source: Path, out: Path, variant: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    model = GPTQModel.load(str(source), QuantizeConfig(**variant))
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples()], batch_size=1)
    model.save(str(out))
    backend = BACKEND.TORCH_AWQ if variant.get("method") == "awq" else BACKEND.TORCH
    saved = GPTQModel.load(str(out), backend=backend, device="cpu", dtype=torch.float16)
    modules = {name: module for name, module in saved.model.named_modules() if hasattr(module, "qweight")}
    if variant.get("method") == "awq":
        return {
            name: dequantize_gemm(each.qweight, each.qzeros, each.scales, 4, 32).t() for name, each in modules.items()
        }
    return {name: module.dequantize_weight().t() for name, module in modules.items()}


def by_autoawq(source: Path, out: Path) -> dict[str, torch.Tensor]:
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float16)
    texts = [" ".join(f"w{token}" for token in ids) for ids in samples()]
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    model.quantize(tokenizer, quant_config=config, calib_data=texts, max_calib_seq_len=32)
    model.save_quantized(str(out))
    modules = {name: module for name, module in model.model.named_modules() if hasattr(module, "qweight")}
    return {
        name: dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).t()
        for name, module in modules.items()
    }


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "tiny", Path(temporary) / name
        save_tiny(source)
        found = by_autoawq(source, out) if name == "awq" else by_gptqmodel(source, out, GPTQMODEL[name])
        kept = HERE / name
        kept.mkdir(exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(out / file, kept / file)
    assert all(weight.dtype is torch.float16 for weight in found.values())
    digests = {
        each: hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest()
        for each, weight in sorted(found.items())
    }
    (kept / "dequantized.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
