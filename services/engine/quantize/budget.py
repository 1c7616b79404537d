"""Which matrices get which format, so that so many bits a weight cost the least.

What each costs is measured (`services.engine.quantize.costs`). Costs are added up, which is not what two layers cost together, but puts them in
order. Matrices that are kept as one get one format.

The choice is the multiple-choice knapsack problem (Sinha and Zoltners 1979): from each set of formats one, so that sizes fit and costs are
least. It is solved by dynamic programming over sizes, in steps of a 65,536th of the room: there are a few hundred sets of a few formats, and going
down the convex hull greedily would leave up to a whole matrix's difference unused. Sizes are rounded up, so that the budget is kept.

A budget counts the matrices of layers, scales and zero points included; embedding, head, norms and routers, which stay as they are, are
not counted, as is usual for formats of few bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from holdfast.errors import ConfigurationError
from services.engine.calibrate.parts import Sharing
from services.engine.quant.rules import FORMATS
from services.engine.weight_format import WeightFormat

_STEPS = 1 << 16


@dataclass(frozen=True, slots=True)
class Option:
    """A format that matrices may get."""

    format: WeightFormat
    bits: int
    """What they take, in all."""
    cost: float
    """KL in nats, when they alone are kept so."""


@dataclass(frozen=True, slots=True)
class Item:
    """Matrices that get one format."""

    layer: int
    names: tuple[str, ...]
    """Within the layer."""
    weights: int
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What is chosen."""

    rules: str
    """Ordered, as `--quantization` takes them."""
    bits: float
    """Of a weight of layers' matrices, scales included."""
    cost: float
    """All costs, added up."""


def best(items: Sequence[Item], bits: float) -> Assignment:
    """The least cost that takes no more than so many bits a weight. Raises `ConfigurationError` if nothing takes so few."""
    weights = sum(item.weights for item in items)
    smallest = [min(option.bits for option in item.options) for item in items]
    room = int(bits * weights) - sum(smallest)
    if room < 0:
        raise ConfigurationError(
            f"a budget of {bits:g} bits a weight cannot be kept: the smallest formats take {sum(smallest) / weights:.3f}; raise it, or "
            "name smaller formats"
        )
    chosen = _knapsack(
        [
            [(option.bits - least, option.cost) for option in item.options]
            for item, least in zip(items, smallest, strict=True)
        ],
        room,
    )
    picked = [item.options[index] for item, index in zip(items, chosen, strict=True)]
    taken = sum(option.bits for option in picked)
    assert taken <= bits * weights
    formats = [(item, option.format) for item, option in zip(items, picked, strict=True)]
    return Assignment(_rules(formats), taken / weights, sum(option.cost for option in picked))


def _knapsack(sets: Sequence[Sequence[tuple[int, float]]], room: int) -> list[int]:
    """Of each set of (size, cost) which one: the sizes fit into the room, and the costs are least."""
    step = max(1, room / _STEPS)
    places = int(room / step)
    least = np.zeros(places + 1)  # with so much room
    taken = []
    for each in sets:
        tried = np.full((len(each), places + 1), np.inf)
        for index, (size, cost) in enumerate(each):
            width = -int(-size // step)
            if width <= places:
                tried[index, width:] = least[: places + 1 - width] + cost
        taken.append(tried.argmin(0).astype(np.int16))
        least = tried.min(0)
    chosen, place = [], places
    for each, best_at in zip(reversed(sets), reversed(taken), strict=True):
        index = int(best_at[place])
        chosen.append(index)
        place -= -int(-each[index][0] // step)
    return chosen[::-1]


def _rules(formats: Sequence[tuple[Item, WeightFormat]]) -> str:
    """For each kind of matrices what most of them get, after those that get something else."""
    common = {
        names: Counter(format for item, format in formats if item.names == names).most_common(1)[0][0]
        for names in dict.fromkeys(item.names for item, _ in formats)
    }
    special = [
        f"model.layers.{item.layer}.{name}={format}"
        for item, format in formats
        if format is not common[item.names]
        for name in item.names
    ]
    return ",".join(
        [*special, *(f"model.layers.*.{name}={format}" for names, format in common.items() for name in names)]
    )


def bits_of(format: WeightFormat, sharing: Sharing, dtype: torch.dtype) -> int:
    """What these matrices take in this format, in all: values, scales in `dtype`, zero points as wide as values."""
    scheme = FORMATS[format].scheme
    weights = sum(sharing.outputs) * sharing.inputs
    if scheme is None:
        return weights * dtype.itemsize * 8
    tiles = 0
    for outputs in sharing.outputs:
        height, width = scheme.tile_of((outputs, sharing.inputs))
        tiles += -(-outputs // height) * -(-sharing.inputs // width)
    return weights * scheme.bits + tiles * (dtype.itemsize * 8 + (0 if scheme.symmetric else scheme.bits))
