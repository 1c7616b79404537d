"""Files that say by groups of layers how weights are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import ConfigurationError
from services.engine.quant.rules import Rules
from services.engine.settings import EngineSettings
from services.engine.weight_format import Method, rules_of

LAYER = "model.layers.3"


def file(folder: Path, content: Any) -> str:
    path = folder / "groups.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def decided(text: str, name: str) -> str | None:
    return next((rule.format.value for rule in rules_of(text) if rule.matches(name)), None)


def test_groups_are_ordered_rules(tmp_path: Path) -> None:
    """The first that names a matrix decides; what none names is kept as it is, and routers always are."""
    content = {
        "model.layers.0.*": {"bits": 16},
        "attention": {"bits": 8, "granularity": "channel", "symmetric": True, "calibration": "absmax"},
        "ffn": {"bits": 4, "group_size": 64, "symmetric": False},
        "embedding": {"bits": 16},
    }
    path = file(tmp_path, content)
    assert decided(path, f"{LAYER}.self_attn.q_proj") == "int8"
    assert decided(path, "model.layers.0.self_attn.q_proj") == "none"
    assert decided(path, f"{LAYER}.mlp.down_proj") == "int4-g64-asym"
    assert decided(path, f"{LAYER}.mlp.gate_proj") == "int4-g64-asym"
    assert decided(path, f"{LAYER}.mlp.gate") is None
    assert decided(path, "model.embed_tokens") == "none"
    assert decided(path, "lm_head") is None


def test_the_engine_rounds_to_the_nearest_and_no_other_way(tmp_path: Path) -> None:
    """What takes a text it leaves to the command that writes a checkpoint."""
    path = file(tmp_path, {"attention": {"bits": 8, "calibration": "none"}, "ffn": {"bits": 4, "calibration": "gptq"}})
    with pytest.raises(
        ConfigurationError, match=r"ffn: calibration gptq takes a text.*`python -m services\.engine\.quantize`"
    ):
        Rules(path)
    rules = Rules(path, methods=tuple(Method))
    assert rules.method(f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.gate_proj") is Method.GPTQ
    assert rules.method(f"{LAYER}.self_attn.q_proj") is Method.ABSMAX
    assert rules.method("lm_head") is None


def test_toml_says_the_same(tmp_path: Path) -> None:
    """As a setting of the engine, which stays the text that it is."""
    path = tmp_path / "groups.toml"
    path.write_text('attention = { bits = 8 }\n[ffn]\nbits = 4\n["lm_*"]\nbits = 8\nactivations = "none"\n')
    assert EngineSettings(quantization=str(path)).quantization == str(path)
    assert decided(str(path), f"{LAYER}.mlp.up_proj") == "int4-g128"
    assert decided(str(path), "lm_head") == "int8-weight"


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml_says_the_same(suffix: str, tmp_path: Path) -> None:
    """As people write it, to the engine and to the command that makes checkpoints."""
    path = tmp_path / f"groups{suffix}"
    path.write_text(
        """
        attention: {bits: 8}
        ffn: {bits: 4, granularity: group, group_size: 32, symmetric: no, activations: none, calibration: gptq}
        "*head": {bits: 8, activations: none}
        embedding: {bits: 16}
        """
    )
    assert EngineSettings(quantization=str(path)).quantization == str(path)
    rules = Rules(str(path), methods=tuple(Method))
    assert rules.format(f"{LAYER}.self_attn.q_proj").name == "int8"
    assert rules.format(f"{LAYER}.mlp.up_proj").name == "int4-g32-asym"
    assert rules.method(f"{LAYER}.mlp.up_proj") is Method.GPTQ
    assert rules.format("lm_head").name == "int8-weight"
    assert rules.format("model.embed_tokens").name == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("attention: {bits: 8", r"groups\.yaml: .*expected ',' or '}'"),
        ("*.lm_head: {bits: 8}", r"groups\.yaml: while scanning an alias.*line 1, column 1"),
        ("attention: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("ffn: {bits: 5}", "ffn: bits must be one of 16, 8, 4, 3, not 5"),
        ("8: {bits: 8}", "'8' is no group"),
        ("", "it must name groups"),
        ("- attention", "it must name groups"),
        (
            "ffn: {bits: 8}\nhead: {bits: 8}\nffn: {bits: 4}",
            r"groups\.yaml: it has the key 'ffn' twice .*line 3, column 1",
        ),
        ("ffn: {bits: 8, 'bits': 4}", "it has the key 'bits' twice"),
        ("? {a: 1}\n: {bits: 8}", r"groups\.yaml: .*unhashable key"),
        ("a: \0", r"groups\.yaml: .*special characters are not allowed"),
    ],
)
def test_yaml_that_cannot_be_is_refused(content: str, message: str, tmp_path: Path) -> None:
    """Plain data alone is read; and what is wrong is said as of any other file."""
    path = tmp_path / "groups.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        rules_of(str(path))


@pytest.mark.parametrize(
    ("group", "format"),
    [
        ({"bits": 16}, "none"),
        ({"bits": 8, "type": "float"}, "fp8"),
        ({"bits": 8, "type": "float", "granularity": "tensor"}, "fp8-tensor"),
        ({"bits": 8, "type": "float", "granularity": "block", "activations": "dynamic"}, "fp8-block"),
        ({"bits": 8}, "int8"),
        ({"bits": 8, "activations": "static"}, "int8-static"),
        ({"bits": 8, "activations": "none"}, "int8-weight"),
        ({"bits": 4}, "int4-g128"),
        ({"bits": 4, "granularity": "group", "group_size": 32, "activations": "none"}, "int4-g32"),
    ],
)
def test_every_format_can_be_said(group: dict[str, Any], format: str, tmp_path: Path) -> None:
    """In words for bits, type, granularity and activations."""
    assert decided(file(tmp_path, {"ffn": group}), f"{LAYER}.mlp.up_proj") == format


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mlp": {"bits": 8}}, "'mlp' is no group; there are attention, ffn, embedding, head, and globs"),
        ({"ffn": {"bit": 8}}, "ffn: it must say bits, and may say type, granularity"),
        ({"ffn": 8}, "ffn: it must say bits"),
        ({"ffn": {"bits": 8, "sym": True}}, "ffn: 'sym' is not known; it may say bits, type, granularity"),
        ({"ffn": {"bits": 5}}, "ffn: bits must be one of 16, 8, 4, 3, not 5"),
        ({"ffn": {"bits": True}}, "ffn: bits must be one of 16, 8, 4, 3, not true"),
        ({"ffn": {"bits": 4, "group_size": 48}}, "ffn: group_size must be one of 32, 64, 128, not 48"),
        ({"ffn": {"bits": 8, "group_size": 64}}, "ffn: int8 has no group_size 64; leave it out"),
        ({"ffn": {"bits": 8, "symmetric": False}}, "ffn: int8 has no symmetric false"),
        ({"ffn": {"bits": 8, "granularity": "tensor"}}, "ffn: granularity of int8 must be channel, not tensor"),
        ({"ffn": {"bits": 4, "activations": "dynamic"}}, 'ffn: int4 can only have activations "none"'),
        ({"ffn": {"bits": 4, "type": "float"}}, "ffn: float4 can only have bits 8"),
        (
            {"ffn": {"bits": 4, "calibration": "gtpq"}},
            'calibration must be one of "none", "absmax", "percentile".* not "gtpq"',
        ),
        ({"ffn": {"bits": 16, "calibration": "gptq"}}, '16 bits can only have calibration "none"'),
        ([], "it must name groups: attention, ffn"),
        ("{", "groups.json: Expecting"),
        ('{"ffn": {"bits": 8}, "head": {"bits": 8}, "ffn": {"bits": 4}}', r"groups\.json: it has the key 'ffn' twice"),
        ('{"ffn": {"bits": 8, "bits": 4}}', r"groups\.json: it has the key 'bits' twice"),
    ],
)
def test_what_cannot_be_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    """With what can, and with the file and the group."""
    with pytest.raises(ValueError, match=message):
        rules_of(file(tmp_path, content))


def test_a_file_that_is_not_there_is_named() -> None:
    """A name that ends so is a file's."""
    with pytest.raises(ValueError, match=r"/nowhere/groups\.toml: .*No such file"):
        rules_of("/nowhere/groups.toml")
