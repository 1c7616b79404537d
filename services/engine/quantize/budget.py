"""Which matrices get which format, so that so many bits a weight cost the least.

What each costs is measured: of every format that may be chosen, matrices of one kind are quantized in one layer at a time, and the KL
divergence from the unquantized model is taken (`services.engine.quality.sensitivity`). Costs are added up, which is not what two layers cost
together, but puts them in order. Matrices that are kept as one get one format.

The choice is the multiple-choice knapsack problem (Sinha and Zoltners 1979): from each set of formats one, so that sizes fit and costs are
least. It is solved by dynamic programming over sizes, in steps of a 65,536th of the room: there are a few hundred sets of a few formats, and going
down the convex hull greedily would leave up to a whole matrix's difference unused. Sizes are rounded up, so that the budget is kept.

A budget counts the matrices of layers, scales and zero points included; embedding, head, norms and routers, which stay as they are, are
not counted, as is usual for formats of few bits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from holdfast.errors import ConfigurationError
from services.engine.calibrate.parts import Sharing, sharings
from services.engine.models import load
from services.engine.models.spec import ModelSpec
from services.engine.quality.passages import Passage
from services.engine.quality.sensitivity import sensitivities
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


def measured(
    model: Path,
    spec: ModelSpec,
    formats: Sequence[WeightFormat],
    passages: Sequence[Passage],
    *,
    dtype: torch.dtype,
    kept: Path,
    say: Callable[[str], None],
) -> list[Item]:
    """What every matrix costs in every format that fits it. Two models are in memory, in float32. `kept`: a file for what is measured, which is
    not measured again. `dtype`: of scales, and of what is not quantized. Raises `ConfigurationError` for what cannot be."""
    kinds = dict.fromkeys(sharing for layer in range(spec.layers) for sharing in _counted(spec, layer))
    wanted = [
        (sharing, format)
        for sharing in kinds
        for format in formats
        if format is not WeightFormat.NONE and _fits(format, sharing)
    ]
    known: dict[str, list[float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    plain = None
    for done, (sharing, format) in enumerate(wanted, 1):
        rules = ",".join(f"model.layers.*.{name}={format}" for name in sharing.names)
        if rules not in known:
            plain = plain or load(model, dtype=torch.float32)
            quantized = load(model, dtype=torch.float32, quantization=rules)
            found = {each.part: each.figures.mean_kl for each in sensitivities(plain, quantized, passages, name=rules)}
            known[rules] = [found[f"model.layers.{layer}"] for layer in range(spec.layers)]
            kept.write_text(json.dumps(known))
        say(f"what layers cost: {done} of {len(wanted)} formats of matrices")
    costs: dict[tuple[Sharing, WeightFormat], list[float]] = {
        (sharing, format): known[",".join(f"model.layers.*.{name}={format}" for name in sharing.names)]
        for sharing, format in wanted
    }
    return list(_items(spec, formats, costs, dtype))


def _items(
    spec: ModelSpec,
    formats: Sequence[WeightFormat],
    costs: dict[tuple[Sharing, WeightFormat], list[float]],
    dtype: torch.dtype,
) -> Iterator[Item]:
    for layer in range(spec.layers):
        for sharing in _counted(spec, layer):
            options = [
                Option(
                    format,
                    bits_of(format, sharing, dtype),
                    0.0 if format is WeightFormat.NONE else costs[sharing, format][layer],
                )
                for format in formats
                if _fits(format, sharing)
            ]
            if not options:
                raise ConfigurationError(
                    f"model.layers.{layer}.{sharing.names[0]}: none of {', '.join(formats)} fits its {sharing.inputs} inputs; name one that "
                    "does, or none"
                )
            yield Item(layer, sharing.names, sum(sharing.outputs) * sharing.inputs, tuple(options))


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


def _counted(spec: ModelSpec, layer: int) -> Iterator[Sharing]:
    """Routers are few weights that decide much."""
    return (sharing for sharing in sharings(spec, layer) if sharing.norm or sharing.rows_of)


def _fits(format: WeightFormat, sharing: Sharing) -> bool:
    scheme = FORMATS[format].scheme
    return scheme is None or scheme.groups(sharing.inputs)
