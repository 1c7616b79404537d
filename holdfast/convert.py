"""A GGUF file of the Llama family as a folder of Hugging Face files, without torch.

Weights are dequantised and rounded to bfloat16 (to nearest, ties to even). Facts used, with their sources: the GGUF
format, its tensor names and llama.cpp's order of the rows of q and k (ggml-org/llama.cpp, `docs/gguf` and
`convert_hf_to_gguf.py`); the safetensors format (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from holdfast.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

Progress = Callable[[str], None]

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""What llama.cpp calls a module, and what Hugging Face calls it."""

_CONTROL_TOKEN = 3
"""`token_type` of special tokens in GGUF."""

_REPORTS = 5
"""How many times the conversion of the weights says how far it is."""


def convert(
    gguf_file: Path, folder: Path, progress: Progress, *, sampling: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors into an
    empty folder; `sampling` goes into generation_config.json. All of it is on the disk when this returns.

    Raises:
        ConfigurationError: a package that this needs is not installed, or the file is of a kind not known here.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigurationError(
            f"converting {gguf_file.name} needs the package {error.name!r}: install holdfast[models]"
        ) from error
    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (architecture := fields["general.architecture"]) != "llama":
        raise ConfigurationError(f"{gguf_file.name} holds a {architecture!r} model; only 'llama' can be converted")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    _write_json(folder / "config.json", _config(fields, tied=tied))
    _write_json(folder / "generation_config.json", _special_ids(fields) | _sampling(sampling))
    _write_text(folder / "tokenizer.json", _tokenizer(fields).to_str())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _write_weights(folder / "model.safetensors", reader.tensors, fields, progress)


def _sampling(values: Mapping[str, float]) -> dict[str, Any]:
    """In transformers' words, where a temperature counts only if one says that there is sampling at all."""
    return {"do_sample": True, **values} if values else {}


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The model's shape in the words of transformers' `LlamaConfig`."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_special_ids(fields),
        "torch_dtype": "bfloat16",
    }


def _shortest(value: float) -> float:
    """The float whose decimal form is the shortest among those that are the same in single precision."""
    import numpy as np

    return float(str(np.float32(value)))


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")} | {
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"]
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The tokenizer of SmolLM: byte-level BPE with GPT-2's split, every digit a piece of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ConfigurationError(f"cannot convert a tokenizer of kind {kind}, only ('gpt2', 'smollm')")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    first_second = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[(a, b) for a, b in first_second])
    )
    # transformers reads GGUF files without the split at digits, and so gives other ids where a digit follows several
    # spaces. llama.cpp ("smollm" in src/llama-vocab.cpp) splits, as the model was trained.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == _CONTROL_TOKEN]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


def _write_weights(path: Path, tensors: list[Any], fields: dict[str, Any], progress: Progress) -> None:
    """One tensor at a time, so that memory holds no more than the largest."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in enumerate(tensors, 1):
            file.write(_bfloat16(_weights(tensor, fields)).tobytes())
            if number * _REPORTS // len(tensors) > (number - 1) * _REPORTS // len(tensors):
                progress(f"converted {number} of {len(tensors)} tensors")
        _to_disk(file.fileno(), file.flush)


def _name(gguf_name: str) -> str:
    """The Hugging Face name of a tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _NAMES:
        raise ConfigurationError(f"cannot convert the tensor {gguf_name!r}: not one of a Llama model")
    layer, module, kind = match.groups()
    return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[module]}.{kind}"


def _weights(tensor: Any, fields: dict[str, Any]) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        return _halves_together(weights, num_heads=fields["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return _halves_together(weights, num_heads=fields["llama.attention.head_count_kv"])
    return weights


def _halves_together(weights: NDArray[np.float32], *, num_heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's order of the rows of q and k. There the two rows that rotate together are neighbours; Hugging
    Face keeps each head's first halves of all pairs before the second halves."""
    pairs = weights.reshape(num_heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _bfloat16(weights: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to nearest, ties to even. No weight is a NaN."""
    import numpy as np

    bits = np.ascontiguousarray(weights).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        _to_disk(file.fileno(), file.flush)


def _to_disk(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)
