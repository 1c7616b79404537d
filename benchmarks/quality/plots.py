"""What was found, drawn: bits a weight against perplexity, and what each layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from holdfast.errors import ConfigurationError


class Point(NamedTuple):
    """One engine."""

    name: str
    bits: float
    """For each weight."""
    perplexity: float


def require_matplotlib() -> None:
    """Raises ConfigurationError where it is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: install holdfast[bench]")


def draw(folder: Path, points: Sequence[Point], sensitivity: Mapping[str, Mapping[str, float]]) -> list[Path]:
    """Writes bits.svg, and where there are any sensitivities, of formats and of their parts in nats, sensitivity.svg. The first point is
    the reference."""
    import matplotlib.figure as figures  # not above: no other part of a run needs it
    import matplotlib.ticker as tickers

    folder.mkdir(parents=True, exist_ok=True)
    # No pyplot: it keeps figures, and looks for a screen.
    figure = figures.Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    # Nine markers for ten colours: no two of ninety points look alike.
    for point, marker in zip(points, cycle("os^Dv<>pX"), strict=False):
        axes.scatter(point.bits, point.perplexity, marker=marker, label=point.name)
    axes.axhline(points[0].perplexity, linestyle=":", color="grey", linewidth=1)
    axes.set(xlabel="bits in memory for each weight of the model", ylabel="perplexity")
    figure.legend(loc="outside right upper", fontsize=8)
    written = [folder / "bits.svg"]
    figure.savefig(written[0])
    if sensitivity:
        figure = figures.Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for format, parts in sensitivity.items():
            # Zero, of what is not quantized, has no place on a logarithmic axis.
            axes.plot(range(len(parts)), [value or float("nan") for value in parts.values()], marker=".", label=format)
        names = [name.removeprefix("model.").removeprefix("layers.") for name in next(iter(sensitivity.values()))]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(tickers.NullFormatter())
        axes.set(xlabel="the only part that is quantized", ylabel="mean KL from the unquantized model, nats")
        axes.legend()
        written.append(folder / "sensitivity.svg")
        figure.savefig(written[1])
    return written
