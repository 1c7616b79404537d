"""A file that says by groups of layers how weights are kept, as rules.

    attention: {bits: 8}
    ffn: {bits: 4, group_size: 64, symmetric: false}
    embedding: {bits: 16}

So in YAML (1.1, where a glob that begins with an asterisk stands in quotes); TOML and JSON say the same in their words. A group is `attention`, `ffn` (MLPs, their routers left alone), `embedding`, `head`, or a glob over the names of matrices, which has
a dot or an asterisk. Groups stand in order, and the first that names a matrix decides; what none names is kept as it is.
Of a group can be said:

    bits         16 for as they are, 8, 4 or 3 (which are kept in four)
    type         int (the default) or float; floats have 8 bits
    granularity  what shares a scale: channel (an output; the default of 8 bits), tensor, block (128 x 128), or group (the default of fewer)
    group_size   how many inputs of an output are a group: 32, 64 or 128 (the default)
    symmetric    whether zero lies in the middle (the default)
    activations  of 8 bits: dynamic (a scale for each row, found in every step; the default), static (one found by calibration), or none
                 (they are kept as they are)
    calibration  how weights are rounded: absmax, or none, as the engine does it when it loads them; percentile, mse, smoothquant, awq or gptq as
                 `services.engine.quantize` does it, which writes a checkpoint
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from services.engine.strict_json import parsed
from services.engine.weight_format import EMBEDDING, HEAD, Method, Rule, WeightFormat

GROUPS = {
    "attention": ("*.self_attn.*",),
    "ffn": ("*.mlp.*", "*.block_sparse_moe.*"),
    "embedding": (EMBEDDING,),
    "head": (HEAD,),
}
"""The matrices of each group."""


class _YAML(yaml.SafeLoader):  # type: ignore[misc]
    """Without keys that stand twice, of which the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise yaml.MarkedYAMLError(problem=f"it has the key {key.value!r} twice", problem_mark=key.start_mark)
            found.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


_READERS: dict[str, Callable[[str], object]] = {
    ".yaml": partial(yaml.load, Loader=_YAML),
    ".yml": partial(yaml.load, Loader=_YAML),
    ".toml": tomllib.loads,
    ".json": parsed,
}
"""By how a file's name ends. None of them takes a key twice."""

_ROUTERS = ("*.gate",)


@dataclass(frozen=True, slots=True)
class Group:
    """How the matrices of a group are kept, as a file says it; checked one by one. None: as `bits` suggest."""

    bits: int
    type: str = "int"
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    activations: str | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[object, ...]] = {
            "bits": (16, 8, 4, 3),
            "type": ("int", "float"),
            "granularity": (None, "tensor", "channel", "group", "block"),
            "group_size": (None, 32, 64, 128),
            "symmetric": (True, False),
            "activations": (None, "dynamic", "static", "none"),
            "calibration": (None, "none", *map(str, Method)),
        }
        for name, values in known.items():
            value = getattr(self, name)
            if not any(value is each or (value == each and type(value) is type(each)) for each in values):
                choices = ", ".join(json.dumps(each) for each in values if each is not None)
                raise ValueError(f"{name} must be one of {choices}, not {json.dumps(value, default=str)}")

    @property
    def format(self) -> WeightFormat:
        """Its name. Raises ValueError where there is none of this kind."""
        if self.bits == 16:
            self._only("bits", calibration="none")
            return WeightFormat.NONE
        if self.type == "float":
            self._only("bits", "type", "granularity", "calibration", activations="dynamic", bits=8)
            kinds = {"tensor": WeightFormat.FP8_TENSOR, "block": WeightFormat.FP8_BLOCK, "channel": WeightFormat.FP8}
            return self._of(kinds, default="channel")
        if self.bits == 8:
            self._only("bits", "granularity", "activations", "calibration")
            self._of({"channel": WeightFormat.INT8}, default="channel")
            return {
                "dynamic": WeightFormat.INT8,
                "static": WeightFormat.INT8_STATIC,
                "none": WeightFormat.INT8_WEIGHT,
            }[self.activations or "dynamic"]
        self._only("bits", "granularity", "group_size", "symmetric", "calibration", activations="none")
        self._of({"group": WeightFormat.INT4_G128}, default="group")
        return WeightFormat(f"int{self.bits}-g{self.group_size or 128}" + ("" if self.symmetric else "-asym"))

    @property
    def method(self) -> Method | None:
        """How its matrices are rounded, where it is said."""
        if self.calibration is None:
            return None
        return Method.ABSMAX if self.calibration == "none" else Method(self.calibration)

    def _only(self, *names: str, **values: object) -> None:
        """Raises ValueError where anything else is said than of these names, or other than these values."""
        kind = f"{self.type}{self.bits}" if self.bits < 16 else "16 bits"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in values:
                if value not in (None, values[field.name]):
                    raise ValueError(
                        f"{kind} can only have {field.name} {json.dumps(values[field.name])}, not {value!r}"
                    )
            elif field.name not in names and value != field.default:
                raise ValueError(f"{kind} has no {field.name} {json.dumps(value)}; leave it out")

    def _of(self, kinds: dict[str, WeightFormat], *, default: str) -> WeightFormat:
        found = kinds.get(self.granularity or default)
        if found is None:
            raise ValueError(
                f"granularity of {self.type}{self.bits} must be {' or '.join(kinds)}, not {self.granularity}"
            )
        return found


def groups_of(content: object) -> dict[str, Group]:
    """The groups of a file's content. Raises ValueError, with the group, for what is wrong."""
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it must name groups: {', '.join(GROUPS)}, or globs")
    return {str(name): _group(str(name), said) for name, said in content.items()}


def rules_of_file(path: str) -> list[Rule]:
    """The rules of a file of groups. Raises ValueError with what would be right."""
    try:
        content = _READERS[Path(path).suffix](Path(path).read_text(encoding="utf-8"))
        return [_rule(name, group) for name, group in groups_of(content).items()]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _rule(name: str, group: Group) -> Rule:
    try:
        format = group.format
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Rule(name, GROUPS.get(name, (name,)), _ROUTERS if name == "ffn" else (), format, group.method)


def _group(name: str, said: Any) -> Group:
    if name not in GROUPS and not any(sign in name for sign in ".*"):
        raise ValueError(f"{name!r} is no group; there are {', '.join(GROUPS)}, and globs")
    keys = [field.name for field in fields(Group)]
    if not isinstance(said, dict) or "bits" not in said:
        raise ValueError(f"{name}: it must say bits, and may say {', '.join(keys[1:])}")
    if unknown := [key for key in said if key not in keys]:
        raise ValueError(f"{name}: {unknown[0]!r} is not known; it may say {', '.join(keys)}")
    try:
        return Group(**said)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
