"""A GGUF file of the Llama family as a folder of Hugging Face files, without torch: its config and tokenizer (`describe`), and its weights
too (`convert`), dequantised and rounded to bfloat16 (to nearest, ties to even).

Facts used, with their sources: the GGUF format, its tensor names and llama.cpp's order of the rows of q and k (ggml-org/llama.cpp,
`docs/gguf` and `convert_hf_to_gguf.py`); the safetensors format (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from holdfast.errors import ConfigurationError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

Progress = Callable[[str], None]
Row = TypeVar("Row", bound="np.generic")

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

_SHORT = {"unknown": "unk", "padding": "pad"}
"""What Hugging Face calls a special token, where it is another name."""

_CONTROL_TOKEN = 3
"""`token_type` of special tokens in GGUF."""

_REPORTS = 5
"""How many times the conversion of the weights says how far it is."""


class _Fields(dict[str, Any]):
    """What a GGUF file says of its model. What it leaves out and must say is named."""

    def __init__(self, file: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self._file = file

    def __missing__(self, key: str) -> NoReturn:
        self.refuse(f"it does not say {key}")

    def refuse(self, why: str) -> NoReturn:
        """Raises `ConfigurationError`, with a way out."""
        raise ConfigurationError(
            f"{self._file}: {why}; the model's own config.json and tokenizer files, in a folder with this file, are read instead"
        )


def convert(
    gguf_file: Path, folder: Path, progress: Progress, *, sampling: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Writes what `describe` does, and model.safetensors. Raises as it does."""
    reader, fields = _opened(gguf_file)
    _describe(reader.tensors, fields, folder, sampling)
    _write_weights(folder / "model.safetensors", reader.tensors, fields, progress)


def describe(gguf_file: Path, folder: Path, *, sampling: Mapping[str, float] = MappingProxyType({})) -> None:
    """Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json into an empty folder; `sampling` goes
    into generation_config.json. All of it is on the disk when this returns.

    Raises:
        ConfigurationError: a package that this needs is not installed, or the file is of a kind not known here, or broken.
    """
    reader, fields = _opened(gguf_file)
    _describe(reader.tensors, fields, folder, sampling)


def opened(gguf_file: Path) -> Any:
    """The `GGUFReader` of a file of the Llama family. Raises `ConfigurationError` if that cannot be had."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigurationError(
            f"reading {gguf_file} needs the package {error.name!r}: install holdfast[models]"
        ) from error
    try:
        reader: Any = GGUFReader(gguf_file)
        architecture = reader.get_field("general.architecture").contents()
    except (ValueError, IndexError, KeyError, AttributeError, OverflowError, OSError, struct.error) as error:
        raise ConfigurationError(f"{gguf_file} cannot be read as GGUF, or is cut off: {error}") from error
    if architecture != "llama":
        raise ConfigurationError(f"{gguf_file} holds a {architecture!r} model; only 'llama' can be read")
    return reader


def _opened(gguf_file: Path) -> tuple[Any, _Fields]:
    reader = opened(gguf_file)
    return reader, _Fields(gguf_file, {name: field.contents() for name, field in reader.fields.items()})


def _describe(tensors: list[Any], fields: _Fields, folder: Path, sampling: Mapping[str, float]) -> None:
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    scaled = any(tensor.name == "rope_freqs.weight" for tensor in tensors)
    if scaled or fields.get("llama.rope.scaling.type", "none") != "none":
        fields.refuse("what it says of scaled rotary embeddings is not translated")
    _write_json(folder / "config.json", _config(fields, tied=tied))
    _write_json(folder / "generation_config.json", _special_ids(fields) | _sampling(sampling))
    _write_text(folder / "tokenizer.json", _tokenizer(fields).to_str())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))


def _sampling(values: Mapping[str, float]) -> dict[str, Any]:
    """In transformers' words, where a temperature counts only if one says that there is sampling at all."""
    return {"do_sample": True, **values} if values else {}


def _config(fields: _Fields, *, tied: bool) -> dict[str, Any]:
    """The model's shape in the words of transformers' `LlamaConfig`."""
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
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


def _special_ids(fields: _Fields) -> dict[str, int]:
    ids = {f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    padding = fields.get("tokenizer.ggml.padding_token_id")
    return ids if padding is None else ids | {"pad_token_id": padding}


def _tokenizer(fields: _Fields) -> Tokenizer:
    """The tokenizer of SmolLM: byte-level BPE with GPT-2's split, every digit a piece of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        fields.refuse(f"its tokenizer is of kind {kind}, and only ('gpt2', 'smollm') is translated")
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


def _tokenizer_config(fields: _Fields) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    special = {f"{_SHORT.get(name, name)}_token": tokens[id] for name, id in ids.items() if id is not None}
    template = fields.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": fields.get("tokenizer.ggml.add_bos_token", False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **({} if template is None else {"chat_template": template}),
    }


def _write_weights(path: Path, tensors: list[Any], fields: _Fields, progress: Progress) -> None:
    """One tensor at a time, so that memory holds no more than the largest."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[hugging_face_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, tensor in enumerate(tensors, 1):
            file.write(_bfloat16(_weights(tensor, fields)).tobytes())
            if number * _REPORTS // len(tensors) > (number - 1) * _REPORTS // len(tensors):
                progress(f"converted {number} of {len(tensors)} tensors")
        _to_disk(file.fileno(), file.flush)


def hugging_face_name(gguf_name: str) -> str:
    """The Hugging Face name of a tensor."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in _NAMES:
        raise ConfigurationError(f"cannot read the tensor {gguf_name!r}: not one of a Llama model")
    layer, module, kind = match.groups()
    return f"{'' if layer is None else f'model.layers.{layer}.'}{_NAMES[module]}.{kind}"


def _weights(tensor: Any, fields: _Fields) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    weights: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    if ".attn_q." in tensor.name:
        return halves_together(weights, num_heads=fields["llama.attention.head_count"])
    if ".attn_k." in tensor.name:
        return halves_together(weights, num_heads=fields["llama.attention.head_count_kv"])
    return weights


def halves_together(weights: NDArray[Row], *, num_heads: int) -> NDArray[Row]:
    """The rows of q or k, whatever they hold, out of llama.cpp's order. There the two rows that rotate together are neighbours; Hugging
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
