"""How a layer's keys and values are kept: in the model's dtype or in 8 bits, and which layers are kept how.

In 8 bits every token has, for each kv head, one scale for its key and one for its value: the largest magnitude becomes
the largest number of the format. So nothing has to be calibrated, and what a token's keys and values become depends on
no other token: however a prompt is cut, found in a cache or computed again, the same bytes stand for it.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from holdfast.errors import ConfigurationError


class KVFormat(enum.StrEnum):
    """One way to keep keys and values."""

    AUTO = "auto"
    """The model's dtype."""
    FP8_E4M3 = "fp8_e4m3"
    """Floats of 4 bits of exponent and 3 of mantissa: a number is off by 6 % of itself at most, or by 0.0002 % of the token's largest."""
    INT8 = "int8"
    """Whole numbers from -127 to 127: a number is off by 0.4 % of the token's largest at most."""

    @property
    def is_quantized(self) -> bool:
        """Whether scales stand beside the values."""
        return self is not KVFormat.AUTO


_RULE = re.compile(r"(?:(?P<first>\*|-?\d+)(?:\.\.(?P<last>-?\d+))?=)?(?P<format>\w+)")


class Rule(NamedTuple):
    """How some layers are kept."""

    text: str
    """As it was given."""
    first: int
    last: int
    """Layers, counted from the end where negative."""
    format: KVFormat


def rules_of(text: str) -> list[Rule]:
    """Reads `LAYERS=FORMAT,...`. Raises ValueError with what would be right."""
    rules: list[Rule] = []
    for part in text.split(","):
        match = _RULE.fullmatch(part.strip())
        if match is None or match["format"] not in list(KVFormat) or (match["first"] == "*" and match["last"]):
            raise ValueError(
                f"{part.strip()!r} is no KV format: say {', '.join(KVFormat)}, or LAYERS=FORMAT with LAYERS a number, a "
                "range like 2..5, negative from the end, or *"
            )
        first, last = match["first"], match["last"]
        whole = first in (None, "*")
        begin = 0 if whole else int(first)
        rules.append(Rule(part.strip(), begin, -1 if whole else int(last or begin), KVFormat(match["format"])))
    return rules


def formats_of(text: str, *, num_layers: int) -> tuple[KVFormat, ...]:
    """The format of each layer: that of the first rule which names it, and `auto` where none does. Raises
    `ConfigurationError` for layers that the model does not have, and for a rule that decides about none."""
    formats: list[KVFormat | None] = [None] * num_layers
    for rule in rules_of(text):
        undecided = [layer for layer in _layers(rule, num_layers) if formats[layer] is None]
        if not undecided:
            raise ConfigurationError(
                f"kv_cache_dtype: the rule {rule.text!r} decides about no layer: earlier ones decide about all that it names; "
                "leave it out, or say it before them"
            )
        for layer in undecided:
            formats[layer] = rule.format
    return tuple(format or KVFormat.AUTO for format in formats)


def _layers(rule: Rule, num_layers: int) -> range:
    """Those that a rule names, counted from the start; never none."""
    begin, end = (layer + num_layers if layer < 0 else layer for layer in (rule.first, rule.last))
    if not (0 <= begin < num_layers and 0 <= end < num_layers):
        raise ConfigurationError(
            f"kv_cache_dtype: there are no layers {rule.first}..{rule.last} in a model of {num_layers}: they are 0 to "
            f"{num_layers - 1}, or -{num_layers} to -1 from the end"
        )
    if begin > end:
        raise ConfigurationError(
            f"kv_cache_dtype: the range of {rule.text!r} is empty, as it runs backwards in a model of {num_layers} layers: from {begin} to "
            f"{end}; say the first layer first"
        )
    return range(begin, end + 1)
