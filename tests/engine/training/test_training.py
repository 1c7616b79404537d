"""The command: what comes out of it, and that an interruption changes nothing of that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from services.engine.models import dtype_of, load
from services.engine.models.spec import read_config
from services.engine.quant.rules import FORMATS
from services.engine.training import ranks
from services.engine.training.plan import Gradients
from services.engine.training.progress import Progress
from services.engine.training.trainer import Trainer
from services.engine.weight_format import WeightFormat
from tests.conftest import ROOT
from tests.engine.training.conftest import Train


def curve(folder: Path) -> list[dict[str, Any]]:
    """The points of a training that is done."""
    points: list[dict[str, Any]] = json.loads((folder / "training.json").read_text())["curve"]
    return points


def same(one: Path, other: Path) -> bool:
    """Whether two results have the same weights, bit for bit."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_learns_and_the_engine_loads_it(train: Train) -> None:
    """The text is simple: after sixty steps it is predicted far better, held-out files as well."""
    out = train("out", "--steps", "60", "--evaluate-every", "20", "--learning-rate", "3e-3", "--warmup", "5")
    points = curve(out)
    assert [point["step"] for point in points] == [20, 40, 60]
    assert points[-1]["held_out_cross_entropy"] < 0.7 * points[0]["held_out_cross_entropy"]
    assert load(out).vocab_size == 512


def test_a_student_gets_back_what_rounding_took(train: Train) -> None:
    """Its teacher is the unquantized model. Measured where it was not trained, in nats from the teacher, before and after."""
    teacher = train("teacher", "--steps", "60", "--learning-rate", "3e-3", "--warmup", "5")
    common = ("--from", str(teacher), "--quantization", "int3-g32", "--cross-entropy", "0", "--warmup", "1")
    rounded = curve(train("rounded", *common, "--steps", "1", "--learning-rate", "1e-12"))[-1]["held_out_kl"]
    trained = curve(train("trained", *common, "--steps", "40", "--learning-rate", "1e-3"))[-1]["held_out_kl"]
    assert rounded > 0.001
    assert trained < 0.6 * rounded


def test_a_student_is_saved_as_it_is_served(train: Train) -> None:
    """In the dtype of its training, in which it was rounded: an engine that is told nothing rounds to the same weights."""
    teacher = train("teacher", "--steps", "1")
    out = train("out", "--from", str(teacher), "--quantization", "int4-g32", "--steps", "1", "--dtype", "bfloat16")
    assert dtype_of(read_config(out)) is torch.bfloat16
    kept = load_file(out / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    format = FORMATS[WeightFormat.INT4_G32]
    served = format.dequant(format.pack(kept, dtype=torch.bfloat16), inputs=kept.shape[1])
    assert torch.equal(format.fake_quant(kept.float(), dtype=torch.bfloat16).to(kept.dtype), served.to(kept.dtype))


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on after the last step that was saved, to the same bits."""
    flags = ("--steps", "12", "--save-every", "5", "--evaluate-every", "6", "--quantization", "*=int8", "--kl", "0")
    whole = train("whole", *flags)
    take_step = Trainer._take_step

    def interrupted(self: Trainer, step: int) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return take_step(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_take_step", interrupted)
        train("cut", *flags)
    cut = whole.with_name("cut")
    assert not cut.exists()
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_take_step", lambda self, step: (steps.append(step), take_step(self, step))[1])
    assert same(train("cut", *flags), whole)
    assert steps == list(range(5, 12))
    assert not Progress(cut, {}).folder.exists()


def test_windows_computed_a_few_at_a_time_have_the_gradient_of_all(train: Train) -> None:
    """Up to the rounding of sums."""
    one, other = (
        load_file(train(name, "--steps", "3", "--warmup", "0", *flags) / "model.safetensors")
        for name, flags in (("at-once", ()), ("in-turn", ("--micro-batch", "1")))
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-4)


def test_two_ranks_train_the_model_of_one(train: Train, toy: Path, text: Path) -> None:
    """Each has half of every step, and gradients are means, as exactly as sums are."""
    flags = ["--steps", "4", "--warmup", "0", "--learning-rate", "1e-4", "--gradients", "float32"]
    alone = train("alone", *flags)
    out = alone.with_name("together")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "services.engine.training", str(out), "--config", str(toy), "--text", str(text), "--device", "cpu"),
        *("--batch", "4", "--length", "32", "--held-out", "0.1", "--dtype", "float32", *flags),
    ]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (alone, out))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("gradients", "tolerance"), [("float32", 0.0), ("bfloat16", 0.01), ("powersgd", 0.9)])
def test_gradients_travel_in_the_form_that_was_asked_for(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradients: Gradients, tolerance: float
) -> None:
    """Relative to their length, whole ones are as they were, those in 16 bits nearly, and of a matrix of low rank the direction stays."""
    monkeypatch.setattr(ranks, "POWERSGD_AFTER", 2)
    ids = torch.arange(32).view(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    plain = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shared = ranks.Ranks(torch.device("cpu"), 0, 2).wrapped(model, gradients)
        for _ in range(4):
            model.zero_grad()
            shared(input_ids=ids, labels=ids).loss.backward()
    finally:
        dist.destroy_process_group()
    for name, each in model.named_parameters():
        assert each.grad is not None
        error = (each.grad - plain[name]).norm() / plain[name].norm()
        assert error <= tolerance
    whole = [torch.equal(each.grad, plain[name]) for name, each in model.named_parameters() if each.grad is not None]
    assert all(whole) is (gradients == "float32")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", "0"), "steps must be above zero"),
        (("--steps", "1", "--held-out", "2"), "between 0 and 1"),
        (("--steps", "1", "--text", "nowhere"), "nowhere holds no text"),
        (("--steps", "1", "--config", "nowhere"), "no model 'nowhere': not a folder"),
        (("--steps", "1", "--from", "nowhere"), "not one known here (smollm2-135m-instruct"),
        (("--steps", "1", "--quantization", "int9"), "'int9' is no rule"),
        (("--steps", "5", "--learning-rate", "1e30", "--warmup", "0"), "is not finite"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_no_result(
    train: Train, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    """One line, with what would be right."""
    out = train("wrong", *flags, status=1)
    assert not out.exists()
    assert message in "".join(capsys.readouterr())


def test_the_folder_of_another_training_is_not_taken_up(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor is a result written over."""
    out = train("out", "--steps", "1")
    train("out", "--steps", "1", status=1)
    assert "exists" in "".join(capsys.readouterr())
    with Progress(out.with_name("next"), {"steps": 7}).begin():
        pass
    train("next", "--steps", "1", status=1)
    assert "was begun by another command: " in (said := "".join(capsys.readouterr()))
    assert "steps was 7 and is 1" in said


def test_two_processes_do_not_train_in_one_folder(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused, and what the first has is left as it is."""
    first = Progress(tmp_path / "out", {})
    with first.begin():
        train("out", "--steps", "1", status=1)
        assert f"another process is at work in {first.folder}" in "".join(capsys.readouterr())
    with first.begin():
        pass


def test_everything_else_of_the_model_comes_along(train: Train, toy: Path) -> None:
    """Also to what is trained from the result, which says of itself how it came about."""
    (toy / "LICENSE").write_text("free")
    (toy / "chat_template.jinja").write_text("{{ messages }}")
    out = train("out", "--steps", "1")
    again = train("again", "--steps", "1", "--from", str(out))
    for name in ("tokenizer.json", "LICENSE", "chat_template.jinja"):
        assert (again / name).read_bytes() == (toy / name).read_bytes()
    assert [json.loads((folder / "training.json").read_text())["task"].get("start") for folder in (out, again)] == [
        None,
        "out",
    ]
