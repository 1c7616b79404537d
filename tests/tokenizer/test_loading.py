"""What is read from a model's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ConfigurationError
from services.tokenizer.loading import ModelTokenizer, load


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be changed."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folders["stories260k"] / name, tmp_path / name)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    """Sets keys of the object in a file; None takes a key away."""
    content = (json.loads(path.read_text()) if path.is_file() else {}) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_limits_and_special_ids_are_the_models(tokenizers: dict[str, ModelTokenizer], folders: dict[str, Path]) -> None:
    """Vocabulary and context come from config.json, ids from the names of tokens (Qwen names no bos), the digest from
    tokenizer.json."""
    llama, qwen, smollm = (tokenizers[name] for name in ("llama-3", "qwen3", "smollm2"))
    assert (llama.vocab_size, llama.context_length, llama.bos_token_id) == (128256, 131072, 128000)
    assert (qwen.vocab_size, qwen.context_length, qwen.bos_token_id) == (151936, 40960, None)
    assert (smollm.vocab_size, smollm.context_length, smollm.bos_token_id) == (49152, 8192, 1)
    assert smollm.eos_token_ids == (2,)
    assert llama.digest == hashlib.sha256((folders["llama-3"] / "tokenizer.json").read_bytes()).hexdigest()


def test_all_files_together_say_which_tokens_end_a_sequence(folder: Path) -> None:
    """generation_config.json stands first, then config.json, then the tokenizer's eos token; none is named twice."""
    assert load(folder).eos_token_ids == (2,)
    change(folder / "generation_config.json", eos_token_id=[7, 5])
    change(folder / "config.json", eos_token_id=5)
    assert load(folder).eos_token_ids == (7, 5, 2)


def test_sampling_is_as_the_models_makers_say(folder: Path) -> None:
    """What generation_config.json names of it, and nothing else; a top_k of 0 or -1 is none."""
    assert load(folder).sampling == {}
    change(folder / "generation_config.json", temperature=0.6, top_p=0.95, top_k=20, do_sample=True, max_length=99)
    assert load(folder).sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    change(folder / "generation_config.json", temperature=None, top_k=-1)
    assert load(folder).sampling == {"top_p": 0.95}


@pytest.mark.parametrize("wrong", [{"temperature": "hot"}, {"top_p": 0}, {"top_k": 2.5}, {"min_p": True}])
def test_sampling_that_cannot_be_is_refused(folder: Path, wrong: dict[str, Any]) -> None:
    """The file is named, and what is wrong in it."""
    change(folder / "generation_config.json", **wrong)
    with pytest.raises(ConfigurationError, match=rf"generation_config.json names the {next(iter(wrong))} "):
        load(folder)


def test_neither_truncation_nor_padding_is_taken_from_the_file(folder: Path) -> None:
    """A tokenizer.json that was saved with both still gives every token and no more."""
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    whole = load(folder).backend.encode("a b c d e f").ids
    change(folder / "tokenizer.json", truncation=truncation, padding=padding)
    assert load(folder).backend.encode("a b c d e f").ids == whole
    assert load(folder).backend.encode("a").ids == [1, 261]


def test_templates_are_found_where_models_keep_them(folder: Path) -> None:
    """In tokenizer_config.json, one or several by name; or in files of their own, which stand before it."""
    assert load(folder).chat_templates == {}
    change(folder / "tokenizer_config.json", chat_template="inline")
    assert load(folder).chat_templates == {"default": "inline"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert load(folder).chat_templates == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.jinja").write_text("file")
    assert load(folder).chat_templates == {"default": "file"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert load(folder).chat_templates == {"default": "file", "rag": "rag"}


def test_special_tokens_are_read_in_both_forms(folder: Path) -> None:
    """A token is a string or an object with its content; one that is null is no variable for templates."""
    change(folder / "tokenizer_config.json", bos_token={"content": "<s>", "lstrip": False}, unk_token=None)
    assert load(folder).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert load(folder).bos_token_id == 1


def test_what_is_missing_stops_the_start(folder: Path) -> None:
    """The error names the file and what it should say."""
    change(folder / "config.json", max_position_embeddings=None)
    with pytest.raises(ConfigurationError, match="config.json does not say how long the context is"):
        load(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="tokenizer_config.json is not JSON"):
        load(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="tokenizer.json is not a tokenizer"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match="has no tokenizer.json"):
        load(folder)
