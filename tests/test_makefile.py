"""The Makefile: what its verbs hand on to the programs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that is installed already, whose Python prints its arguments, one a line."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    (tmp_path / ".installed-pypi").touch()
    return tmp_path


def run(venv: Path, *variables: str, **environment: str) -> list[str]:
    """What `make run` starts Python with."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ASK", "MODEL", "ARGS", "TORCH", "MAKEFLAGS")
    }
    command = ["make", "--silent", "run", f"VENV={venv}", *variables]
    done = subprocess.run(
        command, cwd=ROOT, env=kept | environment, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines()


def test_a_stack_has_a_key_for_its_cursors(tmp_path: Path) -> None:
    """Its own each time, where none is given."""
    compose = tmp_path / "compose"
    compose.write_text('#!/bin/sh\nprintf %s "$CURSOR_KEYS"\n')
    compose.chmod(0o755)

    def key(**given: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("CURSOR_KEYS", "MAKEFLAGS")}
        command = ["make", "--silent", "up", f"COMPOSE={compose}"]
        done = subprocess.run(
            command, cwd=ROOT, env=kept | given, check=True, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    drawn = [key(), key()]
    assert [len(bytes.fromhex(each)) for each in drawn] == [32, 32]
    assert drawn[0] != drawn[1]
    assert key(CURSOR_KEYS="one, another") == "one, another"


@pytest.mark.parametrize("question", ['Say "hi" $HOME', "It's `id`; $(shell id) # \\ 100%", "--help", ""])
def test_a_question_reaches_the_program_as_it_was_typed(venv: Path, question: str) -> None:
    """Given to make, or in the environment."""
    assert run(venv, f"ASK={question}") == ["-m", "services", f"--ask={question}"]
    assert run(venv, ASK=question) == ["-m", "services", f"--ask={question}"]


def test_a_model_that_is_named_is_the_one_that_runs(venv: Path) -> None:
    """One that is not is left to the settings; further flags follow as they are."""
    assert run(venv, "MODEL=tiny", "ASK=Why?", "ARGS=--exit --engine.threads 2") == [
        *("-m", "services", "--ask=Why?", "--model=tiny"),
        *("--exit", "--engine.threads", "2"),
    ]
    assert run(venv, MODEL="tiny", ASK="Why?")[-1] == "--model=tiny"
    assert run(venv, ASK="Why?") == ["-m", "services", "--ask=Why?"]
