"""What matrices cost in each format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Options
from services.engine.models import load
from services.engine.models.spec import ModelSpec, read_config
from services.engine.quality.forced import Forced
from services.engine.quality.passages import Passage, tokenizer_of, windows_of
from services.engine.quality.scores import compare
from services.engine.quantize import __main__ as command
from services.engine.quantize import costs
from services.engine.quantize.budget import Item
from services.engine.quantize.costs import Asked, measured_costs
from services.engine.weight_format import Method, WeightFormat

WINDOW = 48
INT8, INT8_WEIGHT, INT4, INT4_G64 = (
    WeightFormat.INT8,
    WeightFormat.INT8_WEIGHT,
    WeightFormat.INT4_G32,
    WeightFormat.INT4_G64,
)


@pytest.fixture
def windows(text: Path, stories260k: Path) -> list[Passage]:
    return windows_of(text.read_text(), tokenizer_of(stories260k), length=WINDOW, most_tokens=4 * WINDOW)


def asked(folder: Path, *formats: WeightFormat, method: Method = Method.ABSMAX) -> Asked:
    spec = ModelSpec.from_config(read_config(folder))
    return Asked(folder, spec, formats, method, Options(), torch.float32)


def cost_of(items: list[Item], layer: int, name: str, format: WeightFormat) -> float:
    (item,) = [each for each in items if each.layer == layer and name in each.names]
    (option,) = [each for each in item.options if each.format is format]
    return option.cost


def divergence(plain: Path, other: Path, windows: list[Passage], *, rules: str = "none") -> float:
    """Of a model in few bits from the one it was made of, computed as the engine computes prompts."""
    models = [
        Forced.of(name, load(folder, dtype=torch.float32, quantization=quantization), longest=WINDOW)
        for name, folder, quantization in (("plain", plain, "none"), ("other", other, rules))
    ]
    return compare(models[0], models[1:], windows, chunk=WINDOW)[1].figures().mean_kl


@pytest.mark.parametrize("format", [INT8, INT8_WEIGHT, INT4])
def test_a_matrix_costs_what_an_engine_costs_that_keeps_it_alone_so(
    format: WeightFormat, stories260k: Path, windows: list[Passage], tmp_path: Path
) -> None:
    """Rounded to the nearest, and its activations too where the format does that."""
    found = measured_costs(
        asked(stories260k, format, WeightFormat.NONE), windows, windows[:2], kept=tmp_path / "costs.json", say=print
    )
    rules = f"model.layers.3.self_attn.o_proj={format}"
    expected = divergence(stories260k, stories260k, windows[:2], rules=rules)
    assert expected > 1e-6
    assert cost_of(found, 3, "self_attn.o_proj", format) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("method", [Method.GPTQ, Method.AWQ, Method.SMOOTHQUANT])
def test_a_matrix_costs_what_it_costs_in_the_checkpoint_that_the_method_makes(
    method: Method, stories260k: Path, windows: list[Passage], text: Path, tmp_path: Path
) -> None:
    """Of which nothing else is rounded: what stands before has taken scales up there too."""
    format = INT8 if method is Method.SMOOTHQUANT else INT4
    name, matrices = "self_attn.q_proj", "model.layers.2.self_attn.[qkv]_proj"
    shown = ["--calibrate", str(text), "--tokens", str(4 * WINDOW), "--window", str(WINDOW), "--quality-tokens", "0"]
    out = tmp_path / "out"
    command.main([str(stories260k), str(out), "--scheme", f"{matrices}={format}", "--method", method, *shown])
    expected = divergence(stories260k, out, windows[:2])
    found = measured_costs(
        asked(stories260k, format, WeightFormat.NONE, method=method),
        windows,
        windows[:2],
        kept=tmp_path / "c",
        say=print,
    )
    assert cost_of(found, 2, name, format) == pytest.approx(expected, rel=0.01)
    nearest = measured_costs(
        asked(stories260k, format, WeightFormat.NONE), windows, windows[:2], kept=tmp_path / "nearest", say=print
    )
    assert cost_of(nearest, 2, name, format) != pytest.approx(expected, rel=0.05)


def test_layers_that_are_measured_are_not_measured_again(
    stories260k: Path, windows: list[Passage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was killed behind the third goes on with the fourth, and finds what it would have found."""
    job, kept, layers = asked(stories260k, INT4, WeightFormat.NONE, method=Method.GPTQ), tmp_path / "costs.json", []
    whole = measured_costs(job, windows, windows[:1], kept=tmp_path / "whole.json", say=print)
    real = costs._Measuring.costs

    def dies(self: costs._Measuring, index: int) -> dict[str, float]:
        layers.append(index)
        if len(layers) == 4:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(costs._Measuring, "costs", dies)
    with pytest.raises(KeyboardInterrupt):
        measured_costs(job, windows, windows[:1], kept=kept, say=print)
    assert measured_costs(job, windows, windows[:1], kept=kept, say=print) == whole
    assert layers == [0, 1, 2, 3, 3, 4]
    monkeypatch.setattr(costs, "load", None)  # nothing is read for what is known
    assert measured_costs(job, windows, windows[:1], kept=kept, say=print) == whole


@pytest.mark.parametrize(
    ("formats", "method", "message"),
    [
        ([INT4_G64], Method.ABSMAX, r"model\.layers\.0\.mlp\.down_proj: none of int4-g64 fits its 172 inputs"),
        ([INT8, INT4], Method.SMOOTHQUANT, r"layers\.0\.self_attn\.q_proj.*int4-g32 keeps them as they are; say awq"),
    ],
)
def test_what_could_not_be_made_is_refused_before_anything_is_measured(
    formats: list[WeightFormat],
    method: Method,
    message: str,
    stories260k: Path,
    windows: list[Passage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the name of the matrix."""
    monkeypatch.setattr(costs, "open_checkpoint", None)
    with pytest.raises(ConfigurationError, match=message):
        measured_costs(
            asked(stories260k, *formats, method=method), windows, windows, kept=tmp_path / "costs.json", say=print
        )
