"""Which matrix is kept in which format: the rules of `weight_format` on the matrices of a model, and the formats by name."""

from __future__ import annotations

import re
from collections.abc import Collection

from holdfast.errors import ConfigurationError
from services.engine.quant import Format
from services.engine.quant.fp8 import Fp8, Fp8Block, Fp8Tensor
from services.engine.quant.int4 import Int4
from services.engine.quant.int8 import Int8, Int8Static, Int8Weight
from services.engine.quant.invariant import Invariant
from services.engine.quant.unquantized import Unquantized
from services.engine.weight_format import Method, Rule, WeightFormat, rules_of

_QUANTIZED: tuple[Format, ...] = (
    Fp8(),
    Fp8Tensor(),
    Fp8Block(),
    Int8(),
    Int8Static(),
    Int8Weight(),
    *(Int4(group, bits=bits, symmetric=sym) for bits in (4, 3) for group in (32, 64, 128) for sym in (True, False)),
)
FORMATS: dict[WeightFormat, Format] = {WeightFormat(each.name): each for each in (Unquantized(), *_QUANTIZED)}


_NO_RULE = Rule("", (), (), WeightFormat.NONE)


class Rules:
    """Ordered rules, and which of them have decided."""

    def __init__(
        self, text: str = WeightFormat.NONE, *, invariant: bool = False, methods: Collection[Method] = (Method.ABSMAX,)
    ) -> None:
        """`invariant`: what is kept as it is, is multiplied so that a row does not depend on those beside it. `methods`: how
        matrices can be rounded here. Raises `ConfigurationError` for a rule that cannot be read or done."""
        self.invariant = invariant
        try:
            # A bare `none` is no rule: it leaves what comes in few bits as it comes, where `*=none` unpacks it.
            self._rules = [] if text == WeightFormat.NONE else rules_of(text)
        except ValueError as error:
            raise ConfigurationError(f"quantization: {error}") from error
        for rule in self._rules:
            if rule.method is not None and rule.method not in methods:
                raise ConfigurationError(
                    f"quantization: {rule.text}: calibration {rule.method} takes a text and time; `python -m services.engine.quantize` "
                    "does it and writes a checkpoint, which is served as it is. When it loads weights the engine can only do "
                    f"{', '.join(methods)}"
                )
        # Asked by threads that load layers side by side: to a set they may add.
        self._used: set[Rule] = set()
        self._names: set[str] = set()

    @property
    def quantizes(self) -> bool:
        """Whether any rule names another format than none."""
        return any(rule.format is not WeightFormat.NONE for rule in self._rules)

    def format(self, *names: str) -> Format:
        """Of the matrices of these names, which are kept as one. Raises `ConfigurationError` where rules would keep them
        differently."""
        found = {self._decide(name).format for name in names}
        if len(found) > 1:
            raise ConfigurationError(
                f"quantization: {', '.join(names)} are kept as one matrix; the rules must give all of them the same format"
            )
        name = found.pop()
        return Invariant() if self.invariant and name is WeightFormat.NONE else FORMATS[name]

    def method(self, *names: str) -> Method | None:
        """How the matrices of these names, which are kept as one, are rounded, where a rule says it. Raises `ConfigurationError` where
        rules would round them differently."""
        found = {self._decide(name).method for name in names}
        if len(found) > 1:
            raise ConfigurationError(
                f"quantization: {', '.join(names)} are kept as one matrix; the rules must give all of them the same calibration"
            )
        return found.pop()

    def decides(self, name: str) -> bool:
        """Whether any rule is about the matrix of this name."""
        return any(rule.matches(name) for rule in self._rules)

    def note(self, *names: str) -> None:
        """There are matrices of these names, about which no rule decides."""
        self._names.update(names)

    def refuse(self, *names: str, why: str) -> None:
        """Raises `ConfigurationError` where a rule quantizes one of these matrices, which cannot be."""
        for name in names:
            if self._decide(name).format is not WeightFormat.NONE:
                raise ConfigurationError(f"quantization: {name} cannot be quantized: {why}")

    def finish(self) -> None:
        """Once all matrices are there: raises `ConfigurationError` if a rule decided about none of them."""
        if unused := [rule for rule in self._rules if rule not in self._used]:
            known = sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in self._names})
            raise ConfigurationError(
                f"quantization: the rule {unused[0].text!r} decides about no matrix: none is named so, or an "
                f"earlier rule decides already; they are named {', '.join(known)}"
            )

    def _decide(self, name: str) -> Rule:
        self._names.add(name)
        for rule in self._rules:
            if rule.matches(name):
                self._used.add(rule)
                return rule
        return _NO_RULE
