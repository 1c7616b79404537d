"""Which matrices get which format."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.errors import ConfigurationError
from services.engine.calibrate.parts import sharings
from services.engine.models.spec import ModelSpec, read_config
from services.engine.quant.rules import FORMATS, Rules
from services.engine.quantize import __main__ as command
from services.engine.quantize import costs, job
from services.engine.quantize.budget import Item, Option, best, bits_of
from services.engine.weight_format import WeightFormat

INT4, INT8, NONE = WeightFormat.INT4_G32, WeightFormat.INT8, WeightFormat.NONE


def items(seed: int, count: int) -> list[Item]:
    """Matrices of different sizes, whose formats cost less the more bits they take, more or less."""
    draw = random.Random(seed)
    found = []
    for layer in range(count):
        weights = draw.randrange(1000, 9000)
        sizes = [(INT4, 4.5, draw.uniform(0.1, 5)), (INT8, 8.1, draw.uniform(0, 0.6)), (NONE, 16.0, 0.0)]
        options = tuple(Option(format, int(bits * weights), cost) for format, bits, cost in sizes)
        found.append(Item(layer, ("self_attn.o_proj",), weights, options))
    return found


@pytest.mark.parametrize("bits", [4.6, 5.0, 7.0, 12.0])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_within_the_budget_costs_less(seed: int, bits: float) -> None:
    """Of all 6,561 there are."""
    sets = items(seed, 8)
    weights = sum(item.weights for item in sets)
    choices = product(*(item.options for item in sets))
    costs = [
        sum(each.cost for each in choice) for choice in choices if sum(each.bits for each in choice) <= bits * weights
    ]
    found = best(sets, bits)
    assert found.bits <= bits
    assert found.cost == pytest.approx(min(costs), abs=1e-9)


def test_rules_say_what_was_chosen() -> None:
    """Read back in their order, every matrix has the format that was paid for."""
    sets = items(7, 12)
    found = best(sets, 6.0)
    rules = Rules(found.rules)
    formats = [rules.format(f"model.layers.{item.layer}.self_attn.o_proj").name for item in sets]
    taken = sum(
        option.bits
        for item, name in zip(sets, formats, strict=True)
        for option in item.options
        if option.format == name
    )
    assert taken / sum(item.weights for item in sets) == pytest.approx(found.bits)
    assert len(set(formats)) > 1


def test_a_budget_that_nothing_keeps_is_refused() -> None:
    """With what the smallest formats take."""
    with pytest.raises(
        ConfigurationError, match=r"a budget of 4 bits a weight cannot be kept: the smallest formats take 4\.[45]\d+"
    ):
        best(items(0, 5), 4.0)


@pytest.mark.parametrize("format", [INT4, WeightFormat.INT4_G32_ASYM, INT8, NONE])
def test_sizes_are_those_of_the_tensors_that_are_written(
    format: WeightFormat, stories260k: Path, tmp_path: Path
) -> None:
    """To the bit, shapes of packed matrices apart, which are two numbers each."""
    if format is NONE:
        sharing = next(sharings(ModelSpec.from_config(read_config(stories260k)), 0))
        assert bits_of(NONE, sharing, torch.bfloat16) == 16 * 64 * 128
        return
    command.main([str(stories260k), str(tmp_path / "out"), "--scheme", f"*.self_attn.*={format}"])
    content = load_file(tmp_path / "out" / "model.safetensors")
    found = sum(
        8 * each.numel() * each.element_size()
        for name, each in content.items()
        if ".layers.0.self_attn." in name and "shape" not in name
    )
    of_attention = [
        each for each in sharings(ModelSpec.from_config(read_config(stories260k)), 0) if "self_attn" in each.names[0]
    ]
    assert sum(bits_of(format, each, torch.float32) for each in of_attention) == found


def test_another_budget_goes_by_the_same_costs(
    stories260k: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one that cannot be kept has measured is not measured again, and what comes out is what comes out at once. Layers that
    one has made are not another one's: it says what to remove."""
    text, work = shared / "data" / "text" / "wikitext2_test.raw.gz", tmp_path / "out.work"
    few = ["--tokens", "256", "--window", "128", "--budget-tokens", "128", "--quality-tokens", "0"]
    asked = [
        str(stories260k),
        str(tmp_path / "out"),
        "--formats",
        "int4-g32,int8-weight",
        "--calibrate",
        str(text),
        *few,
    ]
    with pytest.raises(
        SystemExit, match=rf"the smallest formats take 5\.\d+; raise it.* {work} remains.*or another --budget"
    ):
        command.main([*asked, "--budget", "4"])
    real = job.quantize_layer

    def dies(*arguments: Any, **more: Any) -> Any:
        if arguments[3] == 1:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(costs, "load", None)  # nothing is read for what is known
        patched.setattr(job, "quantize_layer", dies)
        with pytest.raises(SystemExit, match="130"):
            command.main([*asked, "--budget", "8.5"])
        with pytest.raises(
            SystemExit, match=rf"{work} holds 1 layers as another --budget wants .* remove {work}/layer-\*"
        ):
            command.main([*asked, "--budget", "7"])
        for path in work.glob("layer-*"):
            path.unlink()
        patched.setattr(job, "quantize_layer", real)
        command.main([*asked, "--budget", "7"])
    command.main([*asked[:1], str(tmp_path / "at once"), *asked[2:], "--budget", "7"])
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "at once"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["command"]["bits"] == 7


def test_the_command_keeps_the_budget(stories260k: Path, shared: Path, tmp_path: Path) -> None:
    """What is chosen costs less than what a format for all of them costs that takes as much; the report has the rules, by which the engine
    itself rounds alike."""
    text = shared / "data" / "text" / "wikitext2_test.raw.gz"
    out = tmp_path / "out"
    command.main(
        [
            str(stories260k),
            str(out),
            "--budget",
            "6.5",
            "--formats",
            "int4-g32,int8-weight,none",
            "--calibrate",
            str(text),
        ]
        + ["--tokens", "512", "--window", "128", "--budget-tokens", "256", "--quality-tokens", "0"]
    )
    report = json.loads((out / "quantization_report.json").read_text())
    assignment = report["assignment"]
    assert 6.3 < assignment["bits"] <= 6.5
    names = {FORMATS[WeightFormat(key.split(",")[0])].name for key in report["matrices"] if key != "as they are"}
    assert names >= {"int4-g32", "int8-weight"}
    assert Rules(assignment["rules"]).quantizes
