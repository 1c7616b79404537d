"""What a model's weights take, measured: by the buffers that it holds, whatever a format says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from services.engine.models.spec import read_config
from services.engine.weight_format import HEAD
from services.engine.weights import INV_FREQ, open_checkpoint


def num_weights(folder: Path) -> int:
    """How many numbers the unquantized checkpoint in a folder says the model has: what bits are divided by. A head that is the
    embedding's matrix counts once. Raises `ConfigurationError` if there is none."""
    tied = read_config(folder).get("tie_word_embeddings", False)
    with open_checkpoint(folder, dtype=torch.float32, device=torch.device("cpu")) as checkpoint:
        names = {name for name in checkpoint.names if not name.endswith(INV_FREQ)}
        return sum(checkpoint.num_values(name) for name in names - ({f"{HEAD}.weight"} if tied else set()))


def bytes_of(*owners: object) -> int:
    """Bytes of all tensors that these objects lead to, each counted once: weights and their scales, also where they are kept
    in two layouts, and what little else a model holds between steps."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in _tensors(list(owners)):
        # A layout of oneDNN's own has no address; it is never a view.
        place = ("at", tensor.data_ptr()) if tensor.layout is torch.strided else ("object", id(tensor))
        sizes[place] = max(sizes.get(place, 0), tensor.numel() * tensor.element_size())
    return sum(sizes.values())


def _tensors(waiting: list[object]) -> Iterator[Tensor]:
    """What is reached through attributes of our own objects and of modules, and through what holds several."""
    seen: dict[int, object] = {}  # kept alive, so that no other object gets the same id
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        elif isinstance(each, torch.nn.Module) or type(each).__module__.startswith("services."):
            waiting += _attributes(each)


def _attributes(owner: object) -> Iterator[object]:
    yield from getattr(owner, "__dict__", {}).values()
    for kind in type(owner).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(owner, name):
                yield getattr(owner, name)
