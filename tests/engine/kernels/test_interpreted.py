"""The kernels against their specification, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = Path(__file__).parent / "interpreted"


FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_every_kernel_computes_what_its_specification_does(file: Path) -> None:
    """The tests of a file in `interpreted` pass, under Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
