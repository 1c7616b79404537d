"""Which matrix is kept in which format."""

from __future__ import annotations

import pytest

from holdfast.errors import ConfigurationError
from services.engine.quant.fp8 import Fp8
from services.engine.quant.int4 import Int4
from services.engine.quant.int8 import Int8Static
from services.engine.quant.rules import Rules
from services.engine.quant.unquantized import Unquantized

LAYER = "model.layers.3"


@pytest.mark.parametrize(
    ("text", "name", "format"),
    [
        ("none", f"{LAYER}.mlp.down_proj", Unquantized),
        ("fp8", f"{LAYER}.mlp.down_proj", Fp8),
        ("fp8", f"{LAYER}.mlp.gate_proj", Fp8),
        ("fp8", f"{LAYER}.mlp.gate", Unquantized),
        ("fp8", f"{LAYER}.block_sparse_moe.experts.0.w1", Unquantized),
        ("fp8", "lm_head", Unquantized),
        ("int8", "model.embed_tokens", Unquantized),
        ("*=int4-g64", "model.embed_tokens", Int4),
        ("int8-static", f"{LAYER}.mlp.down_proj", Int8Static),
        ("lm_head=fp8", "lm_head", Fp8),
        ("lm_head=fp8", f"{LAYER}.mlp.down_proj", Unquantized),
        ("lm_head=fp8, fp8", f"{LAYER}.mlp.down_proj", Fp8),
        ("*.down_proj=none,fp8", f"{LAYER}.mlp.down_proj", Unquantized),
        ("*.down_proj=none,fp8", f"{LAYER}.mlp.up_proj", Fp8),
        ("*=fp8,*.down_proj=none", f"{LAYER}.mlp.down_proj", Fp8),
        ("model.layers.[0-2].*=none,fp8", f"{LAYER}.mlp.up_proj", Fp8),
        ("model.layers.[0-3].*=none,fp8", f"{LAYER}.mlp.up_proj", Unquantized),
    ],
)
def test_the_first_rule_that_matches_decides(text: str, name: str, format: type) -> None:
    """And where none does, a matrix stays as it is."""
    assert isinstance(Rules(text).format(name), format)


@pytest.mark.parametrize("text", ["", "fp9", "fp8,", "*.down_proj", "=fp8", "*.down_proj=", "*=fp8=none=int9"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    """With the formats that there are."""
    with pytest.raises(ConfigurationError, match="is no rule; it must be one of none, fp8, .*int8.*, or `glob=format`"):
        Rules(text)


def test_matrices_that_are_one_have_one_format() -> None:
    """A rule for the keys alone would change the queries beside them, or be ignored."""
    with pytest.raises(ConfigurationError, match="q_proj, k_proj are kept as one matrix"):
        Rules("k_proj=none,fp8").format("q_proj", "k_proj")


@pytest.mark.parametrize("unused", ["*.mlp.gate_up=fp8", "lm_head=none"])
def test_a_rule_that_decides_nothing_is_refused(unused: str) -> None:
    """Whether no matrix is named so or an earlier rule has them all; the names are shown, one for all layers."""
    rules = Rules(f"*=fp8,{unused}")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.10.mlp.down_proj", "lm_head"):
        rules.format(name)
    with pytest.raises(ConfigurationError, match=r"no matrix: .*named lm_head, model\.layers\.\*\.mlp\.down_proj$"):
        rules.finish()


def test_what_cannot_be_quantized_is_refused_with_the_reason() -> None:
    """Unless the rules leave it alone."""
    Rules("fp8").refuse(f"{LAYER}.mlp.experts.0.up_proj", why="it is odd")
    with pytest.raises(ConfigurationError, match=r"experts\.0\.up_proj cannot be quantized: it is odd"):
        Rules("*=fp8").refuse(f"{LAYER}.mlp.experts.0.up_proj", why="it is odd")


def test_rules_know_whether_they_quantize() -> None:
    """Any of them."""
    assert not Rules().quantizes and not Rules("lm_head=none").quantizes
    assert Rules("lm_head=none,fp8").quantizes
