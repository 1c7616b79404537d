"""Where a model's tensors come from.

Layers take their tensors one at a time, by the names of the checkpoint and with the shape they need, from a `Weights`:
the files of a folder (`Checkpoint`), or noise (`Dummy`). So names are mapped and matrices fused while they are read,
nothing is held twice, and whatever does not fit is named.
"""

from __future__ import annotations

import fnmatch
import math
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.quant import Format, Weight
from services.engine.quant.matrix import QuantizedMatrix, all_finite
from services.engine.quant.readers import reader_of
from services.engine.quant.readers.gguf import GGUFFile
from services.engine.quant.readers.source import Config, Reader, Source, refuse
from services.engine.quant.rules import FORMATS, Rules
from services.engine.shard import ALONE, Part, Shard
from services.engine.strict_json import object_of
from services.engine.weight_format import WeightFormat

log = structlog.stdlib.get_logger(__name__)

INV_FREQ = ".rotary_emb.inv_freq"
"""How the names end of what old checkpoints hold beside weights: the frequencies of rotations, which the config says."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Weights(ABC):
    """Tensors by name, in one dtype and on one device, for one rank, and the formats that matrices are to be kept in."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, shard: Shard, rules: Rules | None = None) -> None:
        self.dtype = dtype
        self.device = device
        self.shard = shard
        self._rules = rules or Rules()

    @abstractmethod
    def take(self, name: str, *shape: int | Part) -> Tensor:
        """The tensor of this name, ours to keep; of a dimension that is given as a `Part`, only that part is read.
        Raises `ConfigurationError` if there is none, or of another shape."""

    @abstractmethod
    def fill(self, name: str, out: Tensor) -> None:
        """Copies the tensor of this name, which must have the shape of `out`, there. Raises as `take` does."""

    @abstractmethod
    def leave(self, prefix: str) -> None:
        """Whatever stands under this name is for other ranks."""

    def matrix(self, name: str, outputs: int | Part, inputs: int | Part) -> Weight:
        """The weight matrix of this name, or the parts of it: as it is, or in few bits where it is kept so. Raises as `take`
        does."""
        return self.take(f"{name}.weight", outputs, inputs)

    @abstractmethod
    def input_scale(self, *names: str) -> Tensor:
        """Of the activations that the matrices of these names, side by side, are multiplied with: found by calibration, and kept
        beside the matrix as compressed-tensors does. Float32, [1]. Raises `ConfigurationError` where one has none."""

    def full_name(self, name: str) -> str:
        """What this matrix is called in the checkpoint."""
        return name

    def is_named(self, name: str) -> bool:
        """Whether a rule says how this matrix is to be kept."""
        return self._rules.decides(name)

    def format(self, *names: str) -> Format:
        """How the matrices of these names, side by side, are to be kept. Raises `ConfigurationError` if not alike."""
        return self._rules.format(*names)

    @property
    def invariant(self) -> bool:
        """Whether what a token gives must not depend on the tokens beside it, on a GPU."""
        return self._rules.invariant

    def unquantized(self, *names: str, why: str) -> None:
        """Raises `ConfigurationError` if these matrices are to be kept otherwise than as they are."""
        self._rules.refuse(*names, why=why)

    def under(self, prefix: str) -> Weights:
        """The same tensors, named from `prefix` on."""
        return _Under(self, prefix)


class _Under(Weights):
    def __init__(self, weights: Weights, prefix: str) -> None:
        super().__init__(dtype=weights.dtype, device=weights.device, shard=weights.shard)
        self._weights = weights
        self._prefix = prefix

    def take(self, name: str, *shape: int | Part) -> Tensor:
        return self._weights.take(f"{self._prefix}.{name}", *shape)

    def matrix(self, name: str, outputs: int | Part, inputs: int | Part) -> Weight:
        return self._weights.matrix(f"{self._prefix}.{name}", outputs, inputs)

    def input_scale(self, *names: str) -> Tensor:
        return self._weights.input_scale(*(f"{self._prefix}.{name}" for name in names))

    def full_name(self, name: str) -> str:
        return self._weights.full_name(f"{self._prefix}.{name}")

    def is_named(self, name: str) -> bool:
        return self._weights.is_named(f"{self._prefix}.{name}")

    def leave(self, prefix: str) -> None:
        self._weights.leave(f"{self._prefix}.{prefix}")

    def fill(self, name: str, out: Tensor) -> None:
        self._weights.fill(f"{self._prefix}.{name}", out)

    def format(self, *names: str) -> Format:
        return self._weights.format(*(f"{self._prefix}.{name}" for name in names))

    @property
    def invariant(self) -> bool:
        return self._weights.invariant

    def unquantized(self, *names: str, why: str) -> None:
        self._weights.unquantized(*(f"{self._prefix}.{name}" for name in names), why=why)


class TensorSlice(Protocol):
    """A tensor of a file, of which parts can be read."""

    def get_shape(self) -> list[int]:
        """Its whole shape."""
        ...

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """That part of it."""
        ...


class TensorFile(Protocol):
    """An open file of tensors, as safetensors has it."""

    def get_slice(self, name: str) -> TensorSlice:
        """The tensor of this name, not read yet."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        ...


class Checkpoint(Weights):
    """The files of a model folder. Open it with `open_checkpoint`."""

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, TensorFile],
        *,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard,
        rules: Rules | None = None,
        reader: Callable[[Source], Reader] | None = None,
    ) -> None:
        """`reader`: of the matrices that come in few bits."""
        super().__init__(dtype=dtype, device=device, shard=shard, rules=rules)
        self._folder = folder
        self._files = files
        self._reader = None if reader is None else reader(self)
        self._unpacked: set[str] = set()
        self._untaken = set(files)
        self._left: set[str] = set()
        self._lock = threading.Lock()  # layers are read side by side

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of the folder."""
        return frozenset(self._files)

    def num_values(self, name: str) -> int:
        """How many numbers the tensor of this name, which is there, holds."""
        return math.prod(self._files[name].get_slice(name).get_shape())

    def take(self, name: str, *shape: int | Part) -> Tensor:
        return self._read(name, shape).to(device=self.device, dtype=self.dtype)

    def matrix(self, name: str, outputs: int | Part, inputs: int | Part) -> Weight:
        if not self._is_quantized(name):
            return super().matrix(name, outputs, inputs)
        # All of it is read, for tiles, words and orders seldom fall into the parts of ranks.
        matrix, places = self._quantized(name, *_whole((outputs, inputs))), _index((outputs, inputs))
        if matrix.order_I is not None and _is_part((inputs,)):
            raise ConfigurationError(
                f"{self._folder}: {name} has its inputs sorted (act-order), which cannot be split over ranks; say tensor_parallel 1"
            )
        return matrix.part(*places).to(self.device)

    def leave(self, prefix: str) -> None:
        with self._lock:
            self._left.add(prefix)

    def fill(self, name: str, out: Tensor) -> None:
        matrix = name.removesuffix(".weight")
        if self._is_quantized(matrix):
            with self._lock:
                self._unpacked.add(matrix)
            out.copy_(self._quantized(matrix, *out.shape).dequant())
        else:
            out.copy_(self._read(name, tuple(out.shape)))

    def format(self, *names: str) -> Format:
        """As rules say. Of what comes in few bits, and about which none decides: as it comes; unpacked where no format keeps it so, or
        not all of the names. A rule never rounds such again: its format packs the values there are, or refuses them."""
        own = {self._own_format(name) for name in names}
        if own == {None} or any(self._rules.decides(name) for name in names):
            return self._rules.format(*names)
        self._rules.note(*names)
        (name, *others) = own
        if others or name in (None, WeightFormat.NONE):
            with self._lock:
                self._unpacked.update(each for each in names if self._is_quantized(each))
            return self._rules.format(*names)
        assert name is not None
        if self.device.type == "cuda" and self.invariant:
            raise ConfigurationError(
                f"deterministic: {self._folder} keeps {names[0]} in {name}, whose kernels on a GPU round by what stands beside a token"
            )
        return FORMATS[name]

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor of this name, which is there."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def require(self, name: str, *shape: int) -> None:
        """The model has a place for the tensor of this name. Raises `ConfigurationError` if there is none, or of another shape."""
        self._require_shape(name, self._file(name).get_slice(name).get_shape(), shape)
        with self._lock:
            self._untaken.discard(name)

    def raw(self, name: str, *shape: int, dtypes: Collection[torch.dtype]) -> Tensor:
        """The tensor of this name as it lies in its file. Raises `ConfigurationError` if there is none, if it has another shape or none
        of these dtypes, or if it holds floats that are not finite numbers."""
        tensor = self._file(name).get_tensor(name)
        self._require_shape(name, tensor.shape, shape)  # which is not the model's where a GGUF file packs
        if tensor.dtype not in dtypes:
            wanted = " or ".join(map(_named, dtypes))
            raise ConfigurationError(
                f"{self._folder}: the tensor {name} holds {_named(tensor.dtype)}, but the config makes it {wanted}"
            )
        if not all_finite(tensor):
            raise ConfigurationError(
                f"{self._folder}: the tensor {name} holds values that are not finite numbers, of which nothing can be made; is it as it was "
                "published?"
            )
        with self._lock:
            self._untaken.discard(name)
        return tensor

    def _require_shape(self, name: str, found: Sequence[int], shape: Sequence[int]) -> None:
        if list(found) != list(shape):
            raise ConfigurationError(
                f"{self._folder}: the tensor {name} has shape {list(found)}, but the config makes it {list(shape)}"
            )

    def _is_quantized(self, name: str) -> bool:
        """Whether the matrix of this name is here, in few bits."""
        return self._reader is not None and self._reader.holds(name) and name in self._modules

    def _own_format(self, name: str) -> WeightFormat | None:
        """In what the matrix of this name comes; None if it comes as it is."""
        return self._reader.format(name) if self._reader is not None and self._is_quantized(name) else None

    def _quantized(self, name: str, outputs: int, inputs: int) -> QuantizedMatrix:
        assert self._reader is not None
        try:
            return self._reader.matrix(name, outputs, inputs)
        except ConfigurationError as error:
            message = str(error)
            where = "" if message.startswith(str(self._folder)) else f"{self._folder}: "
            raise ConfigurationError(f"{where}{message}") from error

    @cached_property
    def _modules(self) -> frozenset[str]:
        """What has tensors other than a bias."""
        return frozenset(name.rpartition(".")[0] for name in self._files if not name.endswith(".bias"))

    def _file(self, name: str) -> TensorFile:
        file = self._files.get(name)
        if file is None:
            raise ConfigurationError(f"{self._folder} lacks the tensor {name}{self._neighbours(name)}")
        return file

    def input_scale(self, *names: str) -> Tensor:
        scales = []
        for name in (f"{name}.input_scale" for name in names):
            file = self._files.get(name)
            if file is None:
                raise ConfigurationError(
                    f"{self._folder} lacks the tensor {name}, without which activations cannot have a static scale: calibrate "
                    "the model, or say int8, which finds scales in every step"
                )
            scale = file.get_tensor(name)
            if scale.numel() != 1:
                raise ConfigurationError(f"{self._folder}: {name} must be one number, not of shape {list(scale.shape)}")
            scales.append(scale.float().view(1))
            with self._lock:
                self._untaken.discard(name)
        # They see the same activations, so that scales which differ come of different samples.
        return torch.cat(scales).amax().view(1).to(self.device)

    def _read(self, name: str, shape: tuple[int | Part, ...]) -> Tensor:
        """The tensor as the file has it, or a part, in the host's memory."""
        self.require(name, *_whole(shape))
        file = self._files[name]
        # Of a whole tensor no copy is made.
        tensor: Tensor = file.get_slice(name)[_index(shape)] if _is_part(shape) else file.get_tensor(name)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ConfigurationError(
                f"{self._folder}: the tensor {name} holds {_named(tensor.dtype)}, without scales that a quantization_config tells of; it "
                "must be unquantized"
            )
        return tensor

    def finish(self, *, ignored: Iterable[str] = ()) -> None:
        """Raises `ConfigurationError` if the folder holds tensors that the model did not take, other than those that
        match one of the globs in `ignored`, or that the reader knows to be needless. Says what was unpacked."""
        ours = sorted(name for name in self._untaken if self._left.isdisjoint(_prefixes(name)))
        unknown = [name for name in ours if not any(fnmatch.fnmatch(name, glob) for glob in ignored)]
        if self._reader is not None:
            unknown = [name for name in unknown if not self._reader.is_needless(name)]
        if unknown:
            raise ConfigurationError(
                f"{self._folder} holds tensors that the model has no place for: {_listed(unknown)}"
            )
        if self._unpacked:
            log.warning(
                "matrices in few bits are unpacked, for no one format keeps them as they come",
                count=len(self._unpacked),
                names=_listed(sorted(self._unpacked)),
            )

    def _neighbours(self, name: str) -> str:
        """What the folder has where the missing tensor would be, since a missing one is mostly a misnamed one."""
        near = sorted(n for n in self._files if n.rpartition(".")[0] == name.rpartition(".")[0])
        near = near or sorted(self._files)
        return f"; it holds {_listed(near)}"


@contextmanager
def open_checkpoint(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = ALONE,
    rules: Rules | None = None,
    quantization_config: Config | None = None,
) -> Iterator[Checkpoint]:
    """The weights of a folder, from one file or from the shards that the index lists; or from its GGUF file. The files stay open while
    the context lasts; tensors taken remain. `quantization_config`: what the config says of matrices in few bits."""
    more: dict[str, Any] = {"dtype": dtype, "device": device, "shard": shard, "rules": rules}
    if (path := gguf_file(folder)) is not None:
        if quantization_config:
            refuse(f"{path.name} says itself how it is quantized; the config must not")
        opened = GGUFFile(path)
        yield Checkpoint(folder, dict.fromkeys(opened.keys(), opened), reader=opened.reader, **more)
        return
    reader = partial(reader_of, quantization_config) if quantization_config else None
    with ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for path in _shards(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(f"{path} cannot be read as safetensors: {error}") from error
            if twice := sorted(files.keys() & file.keys()):
                raise ConfigurationError(
                    f"{path} holds tensors that another shard of {folder} holds too: {_listed(twice)}"
                )
            files |= dict.fromkeys(file.keys(), file)
        yield Checkpoint(folder, files, reader=reader, **more)


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file that a folder keeps its weights in. Raises `ConfigurationError` where it has several; safetensors come first."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return None
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise ConfigurationError(
            f"{folder} holds several GGUF files: {_listed([path.name for path in found])}; leave one"
        )
    return found[0] if found else None


def _shards(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        try:
            index = object_of((folder / INDEX_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigurationError(f"{folder / INDEX_FILE} is no index of shards: {error}") from error
        if not isinstance(places := index.get("weight_map"), dict):
            raise ConfigurationError(f"{folder / INDEX_FILE} is no index of shards: it has no weight_map")
        shards = sorted({folder / str(name) for name in places.values()})
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise ConfigurationError(f"{folder} lacks the shards {_listed(missing)} that {INDEX_FILE} names")
        return shards
    raise ConfigurationError(
        f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} nor a .gguf file is there (load_format dummy needs none)"
    )


class Dummy(Weights):
    """Noise of a trained model's size, for benchmarks of a config without weights: matrices as if drawn from
    N(0, 0.02), norms of ones. The same names give the same tensors in every process, on every rank."""

    # A prime, so that the rows of no matrix repeat in step.
    _POOL = 1_000_003

    def __init__(
        self, *, dtype: torch.dtype, device: torch.device, shard: Shard = ALONE, rules: Rules | None = None
    ) -> None:
        super().__init__(dtype=dtype, device=device, shard=shard, rules=rules)
        noise = torch.randn(self._POOL, generator=torch.Generator().manual_seed(0)) * 0.02
        self._pool = noise.to(device=device, dtype=dtype)

    def take(self, name: str, *shape: int | Part) -> Tensor:
        out = torch.empty(_whole(shape), dtype=self.dtype, device=self.device)
        self.fill(name, out)
        return out[_index(shape)].clone() if _is_part(shape) else out

    def leave(self, prefix: str) -> None:
        pass

    def input_scale(self, *names: str) -> Tensor:
        return torch.full((1,), 0.05, device=self.device)  # of rows of a norm of ones, up to six

    def fill(self, name: str, out: Tensor) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        # Slices of one pool, copied where they are: drawing eight billion numbers would take minutes.
        # By the name, for a rank does not take all of them.
        left, start = out.view(-1), zlib.crc32(name.encode()) % self._POOL
        while len(left):
            piece = self._pool[start:][: len(left)]
            left[: len(piece)] = piece
            left, start = left[len(piece) :], 0


def _prefixes(name: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    return accumulate(name.split("."), "{}.{}".format)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_part(shape: tuple[int | Part, ...]) -> bool:
    return any(isinstance(size, Part) and not size.is_whole for size in shape)


def _whole(shape: tuple[int | Part, ...]) -> list[int]:
    return [size.of if isinstance(size, Part) else size for size in shape]


def _index(shape: tuple[int | Part, ...]) -> tuple[slice, ...]:
    return tuple(
        slice(size.start, size.start + size.count) if isinstance(size, Part) else slice(None) for size in shape
    )


def _listed(names: list[str], *, most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
