"""What parts of a model cost that are quantized by themselves."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from services.engine.models import load
from services.engine.models.decoder import Decoder
from services.engine.quality.passages import Passage
from services.engine.quality.scores import compare
from services.engine.quality.sensitivity import sensitivities
from tests.engine.quality.conftest import WINDOW, around, forced


def test_a_part_costs_what_a_model_of_which_only_it_is_quantized_costs(
    stories260k: Path, windows: list[Passage]
) -> None:
    """Every layer and the head, as rules for each alone give them. An embedding that is as it was costs nothing."""
    plain = load(stories260k)
    found = sensitivities(plain, load(stories260k, quantization="model.embed_tokens=none,*=fp8"), windows, name="fp8")
    layers = [f"model.layers.{index}" for index in range(5)]
    assert [each.part for each in found] == ["model.embed_tokens", *layers, "lm_head"]
    rules = [*(f"{layer}.*=fp8" for layer in layers), "lm_head=fp8"]
    expected = compare(around(plain), [forced(stories260k, rule) for rule in rules], windows, chunk=WINDOW)
    assert found[0].figures.mean_kl == 0
    assert found[0].figures.perplexity == pytest.approx(expected[0].figures().perplexity)
    for each, scores in zip(found[1:], expected[1:], strict=True):
        assert each.figures.mean_kl > 0
        assert asdict(each.figures) == pytest.approx(asdict(scores.figures()))


def test_parts_that_rules_spare_cost_nothing(stories260k: Path, windows: list[Passage]) -> None:
    """Of one matrix in one layer, that layer alone is seen, in its bytes too: a scale of four for each output."""
    quantized = load(stories260k, quantization="model.layers.2.mlp.down_proj=fp8")
    found = sensitivities(load(stories260k), quantized, windows, name="")
    assert [each.part for each in found if each.figures.mean_kl > 0] == ["model.layers.2"]
    grown = {each.part: each.quantized_bytes - each.plain_bytes for each in found}
    assert {part: more for part, more in grown.items() if more} == {"model.layers.2": 4 * 64}


def test_a_layer_that_gives_no_numbers_is_named(stories260k: Path, windows: list[Passage]) -> None:
    """With the format that it was in."""
    broken = load(stories260k, quantization="fp8")
    assert isinstance(broken, Decoder)
    broken.layers[3]._mlp._down._buffers[1].fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(ConfigurationError, match=r"fp8, only in model\.layers\.3: the logits behind token 0 "):
        sensitivities(load(stories260k), broken, windows, name="fp8")


def test_layers_of_transformers_are_refused(stories260k: Path, windows: list[Passage]) -> None:
    """Its code cannot go on from a layer of another model."""
    theirs = load(stories260k, implementation="transformers")
    with pytest.raises(ConfigurationError, match="transformers computes this model"):
        sensitivities(theirs, theirs, windows, name="fp8")
