"""How a weight matrix is kept, by name, and the grammar of the rules that say which is kept how. What the formats do is in
`quant`, which needs torch; settings are checked without it.

Rules stand in order, separated by commas; the first that matches a matrix's name decides, and what none matches is kept
as it is:

    fp8                                  every matrix but those that it would harm most (`_SPARED`)
    *.down_proj=none,fp8                 and the second matrix of each MLP as it is
    *.self_attn.*=int8,*.mlp.*=int4-g64  attention in eight bits, MLPs in four
    *=int4-g64                           every matrix, embedding and head too

Or the name of a file, `.yaml`, `.toml` or `.json`, that says it by groups of layers (`weight_groups`). Names are those of the checkpoint
without their `.weight`. A tied head is named `lm_head`; what no rule says of it, those for `model.embed_tokens` say.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from fnmatch import fnmatchcase

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""What matrices beside those of layers are called."""
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""And those of a module that are kept as one, and therefore in one format, side by side in this order."""


class WeightFormat(enum.StrEnum):
    """One way to keep a weight matrix."""

    NONE = "none"
    """As it is."""
    FP8 = "fp8"
    """Floats of 4 bits of exponent and 3 of mantissa, with a scale for each output; activations too, with one for each row."""
    FP8_TENSOR = "fp8-tensor"
    """The same with one scale for the matrix."""
    FP8_BLOCK = "fp8-block"
    """The same with a scale for each 128 x 128 weights, and each 128 inputs of a row."""
    INT8 = "int8"
    """Whole numbers of eight bits with a scale for each output; activations too, with one for each row, found in every step."""
    INT8_STATIC = "int8-static"
    """The same with one scale for all activations, which calibration has put into the checkpoint."""
    INT8_WEIGHT = "int8-weight"
    """The same with activations as they are."""
    INT4_G32 = "int4-g32"
    """Whole numbers of four bits with a scale for each 32 inputs of an output; activations as they are."""
    INT4_G32_ASYM = "int4-g32-asym"
    """And with a zero point for them."""
    INT4_G64 = "int4-g64"
    INT4_G64_ASYM = "int4-g64-asym"
    INT4_G128 = "int4-g128"
    INT4_G128_ASYM = "int4-g128-asym"
    INT3_G32 = "int3-g32"
    """Whole numbers of three bits, to find out what they cost: they are kept in four."""
    INT3_G32_ASYM = "int3-g32-asym"
    INT3_G64 = "int3-g64"
    INT3_G64_ASYM = "int3-g64-asym"
    INT3_G128 = "int3-g128"
    INT3_G128_ASYM = "int3-g128-asym"


class Method(enum.StrEnum):
    """How a matrix's weights become few bits. The engine does `absmax` when it loads them; `services.engine.quantize` does all, and writes
    a checkpoint."""

    ABSMAX = "absmax"
    """To the nearest, between levels that hold every weight."""
    PERCENTILE = "percentile"
    """To the nearest, some of the largest weights cut off."""
    MSE = "mse"
    """To the nearest, as many cut off as makes the squared error the least."""
    SMOOTHQUANT = "smoothquant"
    """What makes activations hard to round is moved into the weights first."""
    AWQ = "awq"
    """Inputs that are large get more of the levels."""
    GPTQ = "gptq"
    """Inputs that are still to be rounded make up for what rounding the others changed."""


GROUP_FILES = (".yaml", ".yml", ".toml", ".json")
"""How the name of a file of groups ends."""

_SPARED = (EMBEDDING, HEAD, "*.gate", "*.experts.*")
"""What a format named without a glob leaves alone: the embedding, which is looked up; the head and a router, whose products are
compared with each other; and experts, which are multiplied in stacks."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How some matrices are kept."""

    text: str
    """As it was given."""
    globs: tuple[str, ...]
    spared: tuple[str, ...]
    format: WeightFormat
    method: Method | None = None
    """How they are rounded; None where it is not said."""

    def matches(self, name: str) -> bool:
        """Whether it is about the matrix of this name."""
        return any(fnmatchcase(name, glob) for glob in self.globs) and not any(
            fnmatchcase(name, glob) for glob in self.spared
        )


def rules_of(text: str) -> list[Rule]:
    """Reads `GLOB=FORMAT,...`, or the file of that name. Raises ValueError with what would be right."""
    if text.endswith(GROUP_FILES):
        from services.engine.weight_groups import rules_of_file

        return rules_of_file(text)
    return [_rule(part.strip()) for part in text.split(",")]


def _rule(text: str) -> Rule:
    glob, equals, name = text.rpartition("=")
    if name not in list(WeightFormat) or (equals and not glob):
        raise ValueError(
            f"{text!r} is no rule; it must be one of {', '.join(WeightFormat)}, or `glob=format` with one of them; or a file "
            f"that ends in {', '.join(GROUP_FILES)}"
        )
    format = WeightFormat(name)
    if not equals:
        return Rule(text, ("*",), () if format is WeightFormat.NONE else _SPARED, format)
    return Rule(text, (glob,), (), format)
