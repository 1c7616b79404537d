"""What becomes of each matrix of a model, by rules; checked before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Choice, Treatment
from services.engine.calibrate.parts import experts, sharings
from services.engine.layers.linear import named
from services.engine.models.spec import ModelSpec
from services.engine.quant import Format
from services.engine.quant.int4 import require_groups
from services.engine.quant.rules import FORMATS, Rules
from services.engine.weight_format import EMBEDDING, HEAD, Method, WeightFormat

_NEAREST = (Method.ABSMAX, Method.PERCENTILE, Method.MSE)


class Table(Treatment):
    """The embedding or the head, and how it is rounded: to the nearest, whatever is done to layers."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """For every matrix."""

    spec: ModelSpec
    layers: tuple[tuple[Choice, ...], ...]
    embedding: Table
    head: Table

    @property
    def unties(self) -> bool:
        """Whether the head becomes a matrix of its own: other readers cannot share one that is in few bits."""
        return self.spec.tied and (self.embedding.quantizes or self.head.quantizes)

    @property
    def needs_text(self) -> bool:
        """Whether layers must be shown a text."""
        return any(choice.needs_moments or choice.needs_magnitudes for choice in self._choices())

    @property
    def methods(self) -> frozenset[Method]:
        """How what is rounded is rounded."""
        tables = {table.method for table in (self.embedding, self.head) if table.quantizes}
        return frozenset(tables | {choice.method for choice in self._choices() if choice.quantizes})

    @property
    def needs_static_scales(self) -> bool:
        """Whether any activations are to have one."""
        return any(choice.needs_magnitudes for choice in self._choices())

    def names(self) -> Iterator[tuple[str, Format]]:
        """Every matrix, and its format; experts apart, which are not quantized."""
        yield EMBEDDING, self.embedding.format
        for index, choices in enumerate(self.layers):
            for choice in choices:
                yield from ((f"model.layers.{index}.{name}", choice.format) for name in choice.sharing.names)
        yield HEAD, self.head.format

    def unpacking(self) -> str:
        """Rules by which the engine unpacks what multiplies activations as they are."""
        names = (name for name, format in self.names() if format.scheme is not None and not format.rounds_activations)
        return ",".join(f"{name}=none" for name in names) or WeightFormat.NONE

    def summary(self) -> dict[str, int]:
        """How many matrices are kept how."""
        done: Counter[str] = Counter()
        for choice in self._choices():
            how = f"{choice.format.name}, {choice.method}" if choice.quantizes else "as they are"
            done[how] += len(choice.sharing.names)
        for name, table in (("embedding", self.embedding), ("head", self.head)):
            if table.quantizes:
                done[f"{table.format.name}, {table.method} ({name})"] += 1
        return dict(done)

    def _choices(self) -> Iterator[Choice]:
        return (choice for layer in self.layers for choice in layer)


def plan_of(spec: ModelSpec, rules: Rules, method: Method) -> Plan:
    """What the rules say of every matrix; `method`: where they do not say how it is rounded. Raises `ConfigurationError`, with the
    names, for what cannot be."""
    layers = tuple(_layer(spec, index, rules, method) for index in range(spec.layers))
    embedding = _table(EMBEDDING, rules, method)
    if embedding.quantizes and embedding.format.table is None:
        raise ConfigurationError(
            f"quantization: {EMBEDDING} cannot be kept in {embedding.format.name}, for rows of it are looked up; say "
            f"`{EMBEDDING}=none` before the other rules, or int8-weight or int4-g64"
        )
    head = embedding if spec.tied and not rules.decides(HEAD) else _table(HEAD, rules, method)
    if embedding.format.rounds_activations:  # of which rows that are looked up have none
        embedding = replace(embedding, format=FORMATS[WeightFormat.INT8_WEIGHT])
    if head.format.needs_input_scale:
        raise ConfigurationError(
            f"quantization: {HEAD} cannot be kept in {head.format.name}: no scale is found for what it is given; say {HEAD}=int8"
        )
    for name, table in ((EMBEDDING, embedding), (HEAD, head)):
        with named(name):
            require_groups(table.format, spec.hidden)
    plan = Plan(spec, layers, embedding, head)
    rules.finish()
    if not (embedding.quantizes or head.quantizes or any(each.quantizes for layer in layers for each in layer)):
        raise ConfigurationError("quantization: the rules leave every matrix as it is; name a format")
    return plan


def _layer(spec: ModelSpec, index: int, rules: Rules, method: Method) -> tuple[Choice, ...]:
    choices = []
    for sharing in sharings(spec, index):
        names = [f"model.layers.{index}.{name}" for name in sharing.names]
        choice = Choice(rules.format(*names), rules.method(*names) or method, sharing)
        with named(*names):
            require_groups(choice.format, sharing.inputs)
        require_sense(choice, *names)
        choices.append(choice)
    if spec.moe is not None and index in spec.moe.layers:
        rules.refuse(f"model.layers.{index}.{spec.moe.name}.gate", why="other readers keep routers as they are")
    rules.refuse(
        *(f"model.layers.{index}.{name}" for name in experts(spec, index)),
        why="experts are multiplied in stacks of 16 or 32 bits",
    )
    return tuple(choices)


def require_sense(choice: Choice, *names: str) -> None:
    """Raises `ConfigurationError`, with the names of the matrices, where the method would be in vain."""
    if choice.quantizes and choice.method is Method.SMOOTHQUANT and choice.scheme.bits < 8:
        raise ConfigurationError(
            f"quantization: {', '.join(names)}: smoothquant makes activations easier to round, and {choice.format.name} keeps them as "
            "they are; say awq or gptq"
        )


def _table(name: str, rules: Rules, method: Method) -> Table:
    """Methods that go by what a matrix is given have nothing to go by here."""
    method = rules.method(name) or method
    return Table(rules.format(name), method if method in _NEAREST else Method.MSE)
