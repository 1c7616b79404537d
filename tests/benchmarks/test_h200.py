"""What the comparison with vLLM makes of what others print, and of a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.h200 import SCHEMES, compare, floor, main, read_line, wanted_experts
from benchmarks.report import Report
from services.engine.models.spec import MoESpec


@pytest.mark.parametrize(
    ("line", "figures"),
    [
        ("vllm Qwen3-0.6B none kv=auto tp=1 B batch 32 tpot 2.732 ms", {"batch 32": 2.732}),
        ("vllm Qwen3-0.6B none kv=auto tp=1 C prefill 394020 tok/s", {"prefill": 394020.0}),
        ("vllm x none A mixed 24601 out tok/s, 49315 total tok/s, 5.86 s", {"mixed": 24601.0}),
        ("vllm x none kv=auto tp=1 init 134.0 s", {}),
    ],
)
def test_figures_are_found_in_lines(line: str, figures: dict[str, float]) -> None:
    """Each of the three workloads by its own words; other lines hold none."""
    assert read_line(line) == figures


def test_the_floor_counts_weights_once_and_every_sequence_s_keys(shared: Path) -> None:
    """As the published floors of these shapes at 4.26 TB/s: 3.55 ms for one sequence of the 8B, 7.8 for 256 of the 0.6B."""
    configs = shared / "data" / "configs"
    assert floor(configs / "Meta-Llama-3.1-8B", 1, bandwidth=4.26e12) == pytest.approx(3.55, abs=0.02)
    assert floor(configs / "Qwen3-0.6B", 256, bandwidth=4.26e12) == pytest.approx(7.8, abs=0.05)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 1.45), (32, 13.27), (128, 17.5), (256, 20.7)])
def test_the_floor_of_a_mixture_counts_the_experts_that_are_wanted(
    batch: int, milliseconds: float, shared: Path
) -> None:
    """As the published floors of Qwen3-30B-A3B: eight experts for one token, nearly all 128 for many. In between the
    published one, 12.2 ms for 32, takes fewer to be wanted than tokens that choose evenly want."""
    folder = shared / "data" / "configs" / "Qwen3-30B-A3B"
    assert floor(folder, batch, bandwidth=4.26e12) == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_so_many_experts_are_wanted_as_tokens_choose(batch: int) -> None:
    """The mean over many draws in which every choice is as likely."""
    moe = MoESpec(
        num_experts=12,
        top_k=3,
        intermediate=8,
        normalize=True,
        layers=frozenset({0}),
        name="mlp",
        expert_names=("gate", "up", "down"),
    )
    draw = torch.Generator().manual_seed(0)
    chosen = torch.rand(4000, batch, 12, generator=draw).argsort(-1)[..., :3].flatten(1)
    different = torch.zeros(4000, 12).scatter_(1, chosen, 1.0).sum(1).mean()
    assert wanted_experts(moe, batch) == pytest.approx(float(different), rel=0.02)


def test_eight_bits_halve_what_is_read_of_layers_and_of_the_cache(shared: Path) -> None:
    """As the roofline of the 8B in fp8 says at 4.26 TB/s: 1.9 ms for one sequence, and half of everything but the
    head, which stays as it is."""
    folder = shared / "data" / "configs" / "Meta-Llama-3.1-8B"
    whole, half = (floor(folder, 256, SCHEMES[name], bandwidth=4.26e12) for name in ("bf16", "fp8"))
    head = 2 * 128256 * 4096 / 4.26e12 * 1e3
    assert half - head == pytest.approx((whole - head) / 2)
    assert floor(folder, 1, SCHEMES["fp8"], bandwidth=4.26e12) == pytest.approx(1.9, abs=0.03)
    weights = floor(folder, 256, SCHEMES["fp8-weights"], bandwidth=4.26e12)
    assert half < weights < whole


def test_four_bits_are_a_quarter_and_a_scale_for_each_group(shared: Path) -> None:
    """As the roofline of the 8B in int4 says: 1.12 ms for one sequence, with its head in 16 bits; attention in eight bits costs its
    part of the difference."""
    folder = shared / "data" / "configs" / "Meta-Llama-3.1-8B"
    four, mixed, eight = (floor(folder, 1, SCHEMES[name], bandwidth=4.26e12) for name in ("int4", "int8-int4", "int8"))
    assert four == pytest.approx(1.12, abs=0.04)
    assert eight == floor(folder, 1, SCHEMES["fp8"], bandwidth=4.26e12)
    attention = 4096 * 128 * (2 * 32 + 2 * 8)
    assert (mixed - four) / (eight - four) == pytest.approx(attention / (attention + 3 * 4096 * 14336))


def test_what_vllm_has_no_scheme_for_is_measured_alone(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is not asked, and the table says nothing of it."""
    script, out = tmp_path / "vllm.py", tmp_path / "report.json"
    script.write_text("raise SystemExit(7)")
    monkeypatch.setattr("benchmarks.h200.ours", lambda *_, **__: {"prefill": 400.0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.report._accelerator", lambda: None)
    shape = str(shared / "data" / "configs" / "Meta-Llama-3.1-8B")
    main([shape, "--schemes", "int8-int4", "--vllm", str(script), "--work", "C", "--out", str(out)])
    (table,) = json.loads(out.read_text())["tables"]
    assert table["rows"][0][:3] == ["prefill, tok/s", 400.0, None]


def test_an_unknown_scheme_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """By a message that has those there are."""
    with pytest.raises(SystemExit):
        main(["somewhere", "--schemes", "bf16,int3"])
    assert "'int3' is none of bf16, fp8, fp8-weights, int8, int4, int8-int4" in capsys.readouterr().err


def test_a_script_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before ours is measured, which takes minutes."""
    with pytest.raises(SystemExit) as ended:
        main(["somewhere", "--vllm", "/nosuch.py"])
    assert ended.value.code == 2
    assert "argument --vllm: there is no file /nosuch.py" in capsys.readouterr().err


def test_a_script_that_fails_ends_the_comparison(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the code that it gave; what was measured before is in the report, and no further shape is measured."""
    script, out, measured = tmp_path / "vllm.py", tmp_path / "report.json", []
    script.write_text("print('vllm x C prefill 200 tok/s'); raise SystemExit(7)")

    def ours(folder: Path, scheme: object, *, work: str, batches: str) -> dict[str, float]:
        measured.append((folder.name, work, batches))
        return {"prefill": 400.0}

    monkeypatch.setattr("benchmarks.h200.ours", ours)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.report._accelerator", lambda: None)
    shapes = [str(shared / "data" / "configs" / name) for name in ("Qwen3-0.6B", "Meta-Llama-3.1-8B")]
    with pytest.raises(SystemExit, match=r"h200: `.*vllm\.py .*--batches 1,2` failed with 7"):
        main([*shapes, "--vllm", str(script), "--work", "C", "--batches", "1,2", "--out", str(out)])
    assert measured == [("Qwen3-0.6B", "C", "1,2")]
    (table,) = json.loads(out.read_text())["tables"]
    assert table["rows"][0][:3] == ["prefill, tok/s", 400.0, None]


def test_a_ratio_above_one_is_in_our_favour(shared: Path) -> None:
    """A time is divided into theirs, a rate by theirs; what they did not measure has none."""
    report = Report("h200", settings={})
    folder = shared / "data" / "configs" / "Qwen3-0.6B"
    mine = {"batch 1": 1.0, "prefill": 400.0, "mixed": 5.0}
    compare(report, folder, SCHEMES["bf16"], mine, {"batch 1": 2.0, "prefill": 200.0}, bandwidth=4.26e12)
    rows = report.tables[0]["rows"]
    assert isinstance(rows, list)
    assert [row[3] for row in rows] == [2.0, 2.0, None]
