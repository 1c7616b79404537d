"""Which layers are kept in which format."""

from __future__ import annotations

import re

import pytest

from holdfast.errors import ConfigurationError
from services.engine.kv_format import KVFormat, formats_of, rules_of

AUTO, FP8, INT8 = KVFormat


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("auto", [AUTO] * 5),
        ("int8", [INT8] * 5),
        ("*=fp8_e4m3", [FP8] * 5),
        ("0=auto,-1=auto,fp8_e4m3", [AUTO, FP8, FP8, FP8, AUTO]),
        ("1..2=int8, -2..-1=fp8_e4m3", [AUTO, INT8, INT8, FP8, FP8]),
        ("0..4=fp8_e4m3", [FP8] * 5),
        ("0..-2=int8,3..4=fp8_e4m3", [INT8, INT8, INT8, INT8, FP8]),
    ],
)
def test_the_first_rule_that_names_a_layer_counts(text: str, formats: list[KVFormat]) -> None:
    """And a layer that none names is kept in the model's dtype."""
    assert list(formats_of(text, num_layers=5)) == formats


@pytest.mark.parametrize("text", ["fp8", "", "int8,", "2-3=int8", "*..3=int8", "1=", "one=int8", "1..=int8"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    """With the formats there are, and how layers are named."""
    with pytest.raises(ValueError, match=r"is no KV format: say auto, fp8_e4m3, int8, or LAYERS=FORMAT"):
        rules_of(text)


@pytest.mark.parametrize("text", ["5=int8", "-6=int8", "4..5=auto", "7..6=int8"])
def test_layers_that_are_not_there_are_refused(text: str) -> None:
    """With those that are."""
    with pytest.raises(ConfigurationError, match=r"kv_cache_dtype: .* in a model of 5: they are 0 to 4, or -5 to -1"):
        formats_of(text, num_layers=5)


@pytest.mark.parametrize(
    ("text", "begin", "end"), [("3..2=int8", 3, 2), ("0=auto,-1..-2=int8", 4, 3), ("3..-4=int8", 3, 1)]
)
def test_a_range_that_runs_backwards_is_refused(text: str, begin: int, end: int) -> None:
    """As that, with the layers that it comes to."""
    with pytest.raises(
        ConfigurationError, match=rf"is empty, as it runs backwards .* 5 layers: from {begin} to {end};"
    ):
        formats_of(text, num_layers=5)


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("int8,fp8_e4m3", "fp8_e4m3"),
        ("0=int8,0=fp8_e4m3", "0=fp8_e4m3"),
        ("0..2=int8, 1..2=auto,auto", "1..2=auto"),
        ("*=auto,-5..-1=auto", "-5..-1=auto"),
    ],
)
def test_a_rule_that_decides_nothing_is_refused(text: str, dead: str) -> None:
    """Whether it names other formats than those before it or the same: who wrote it meant something else."""
    with pytest.raises(
        ConfigurationError, match=rf"kv_cache_dtype: the rule '{re.escape(dead)}' decides about no layer"
    ):
        formats_of(text, num_layers=5)
