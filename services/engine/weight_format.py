"""How a weight matrix is kept, by name, and the grammar of the rules that say which is kept how. What the formats do is in
`quant`, which needs torch; settings are checked without it.

Rules stand in order, separated by commas; the first that matches a matrix's name decides, and what none matches is kept
as it is:

    fp8                                  every matrix but those that it would harm most (`_SPARED`)
    *.down_proj=none,fp8                 and the second matrix of each MLP as it is
    model.layers.[0-3].*=none,*=fp8      every matrix from the fourth layer on, the head too

Names are those of the checkpoint without their `.weight`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fnmatch import fnmatchcase


class WeightFormat(enum.StrEnum):
    """One way to keep a weight matrix."""

    NONE = "none"
    """As it is."""
    FP8 = "fp8"
    """Floats of 4 bits of exponent and 3 of mantissa, with a scale for each output."""


_SPARED = ("lm_head", "*.gate", "*.experts.*")
"""What a format named without a glob leaves alone: the head and a router, whose products are compared with each other; and
experts, which are multiplied in stacks."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How some matrices are kept."""

    text: str
    """As it was given."""
    glob: str
    spared: tuple[str, ...]
    format: WeightFormat

    def matches(self, name: str) -> bool:
        """Whether it is about the matrix of this name."""
        return fnmatchcase(name, self.glob) and not any(fnmatchcase(name, glob) for glob in self.spared)


def rules_of(text: str) -> list[Rule]:
    """Reads `GLOB=FORMAT,...`. Raises ValueError with what would be right."""
    return [_rule(part.strip()) for part in text.split(",")]


def _rule(text: str) -> Rule:
    glob, equals, name = text.rpartition("=")
    if name not in list(WeightFormat) or (equals and not glob):
        raise ValueError(
            f"{text!r} is no rule; it must be one of {', '.join(WeightFormat)}, or `glob=format` with one of them"
        )
    format = WeightFormat(name)
    if not equals:
        return Rule(text, "*", () if format is WeightFormat.NONE else _SPARED, format)
    return Rule(text, glob, (), format)
