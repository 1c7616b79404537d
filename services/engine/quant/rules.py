"""Which matrix is kept in which format.

Rules stand in order, separated by commas; the first that matches a matrix's name decides, and what none matches is kept
as it is:

    fp8                                  every matrix but those that it would harm most (`_SPARED`)
    *.down_proj=none,fp8                 and the second matrix of each MLP as it is
    model.layers.[0-3].*=none,*=fp8      every matrix from the fourth layer on, the head too

Names are those of the checkpoint without their `.weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from holdfast.errors import ConfigurationError
from services.engine.quant import Format
from services.engine.quant.fp8 import Fp8
from services.engine.quant.invariant import Invariant
from services.engine.quant.unquantized import Unquantized

UNQUANTIZED = "none"

_FORMATS: dict[str, Format] = {UNQUANTIZED: Unquantized(), "fp8": Fp8()}

_SPARED = ("lm_head", "*.gate", "*.experts.*")
"""What a format named without a glob leaves alone: the head and a router, whose products are compared with each other; and
experts, which are multiplied in stacks."""


@dataclass(frozen=True, slots=True)
class _Rule:
    text: str
    glob: str
    spared: tuple[str, ...]
    format: str

    def matches(self, name: str) -> bool:
        return fnmatchcase(name, self.glob) and not any(fnmatchcase(name, glob) for glob in self.spared)


class Rules:
    """Ordered rules, and which of them have decided."""

    def __init__(self, text: str = UNQUANTIZED, *, invariant: bool = False) -> None:
        """`invariant`: what is kept as it is, is multiplied so that a row does not depend on those beside it. Raises
        `ConfigurationError` for a rule that cannot be read."""
        self.invariant = invariant
        self._rules = [_rule(each.strip()) for each in text.split(",")]
        # Asked by threads that load layers side by side: to a set they may add.
        self._used: set[_Rule] = set()
        self._names: set[str] = set()

    @property
    def quantizes(self) -> bool:
        """Whether any rule names another format than none."""
        return any(rule.format != UNQUANTIZED for rule in self._rules)

    def format(self, *names: str) -> Format:
        """Of the matrices of these names, which are kept as one. Raises `ConfigurationError` where rules would keep them
        differently."""
        found = {self._decide(name) for name in names}
        if len(found) > 1:
            raise ConfigurationError(
                f"quantization: {', '.join(names)} are kept as one matrix; the rules must give all of them the same format"
            )
        name = found.pop()
        return Invariant() if self.invariant and name == UNQUANTIZED else _FORMATS[name]

    def refuse(self, *names: str, why: str) -> None:
        """Raises `ConfigurationError` where a rule quantizes one of these matrices, which cannot be."""
        for name in names:
            if self._decide(name) != UNQUANTIZED:
                raise ConfigurationError(f"quantization: {name} cannot be quantized: {why}")

    def finish(self) -> None:
        """Once all matrices are there: raises `ConfigurationError` if a rule decided about none of them."""
        if unused := [rule for rule in self._rules if rule not in self._used]:
            known = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in self._names})
            raise ConfigurationError(
                f"quantization: the rule {unused[0].text!r} decides about no matrix: none is named so, or an "
                f"earlier rule decides already; they are named {', '.join(known)}"
            )

    def _decide(self, name: str) -> str:
        self._names.add(name)
        for rule in self._rules:
            if rule.matches(name):
                self._used.add(rule)
                return rule.format
        return UNQUANTIZED


def _rule(text: str) -> _Rule:
    glob, equals, format = text.rpartition("=")
    if format not in _FORMATS or (equals and not glob):
        raise ConfigurationError(
            f"quantization: {text!r} is no rule; it must be one of {', '.join(_FORMATS)}, or `glob=format` with one of them"
        )
    if not equals:
        return _Rule(text, "*", () if format == UNQUANTIZED else _SPARED, format)
    return _Rule(text, glob, (), format)
