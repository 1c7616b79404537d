"""The contract: what is generated from it is fresh, what it says is complete, and what it promised stays."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT, missing

PROTOS = ROOT / "protos"
GENERATED = ROOT / "holdfast" / "v1"


def buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of the buf that lies beside this interpreter."""
    program = Path(sys.executable).with_name("buf")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


def git(*arguments: str) -> str | None:
    """What git says about this checkout; None where it has no answer, or is not there."""
    try:
        answer = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=60, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    """The code in holdfast/v1 is, byte for byte, what `make protos` makes of protos/ today."""
    subprocess.run([sys.executable, PROTOS / "generate.py", tmp_path], check=True, timeout=60)
    made = {file.name: file.read_bytes() for file in (tmp_path / "holdfast" / "v1").iterdir()}
    kept = {file.name: file.read_bytes() for file in GENERATED.glob("*_pb2*.py*")}
    assert sorted(made) == sorted(kept)
    assert [name for name in made if made[name] != kept[name]] == []


def lower_bound(package: str) -> Version:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [
        Version(specifier.version)
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == package
        for specifier in requirement.specifier
        if specifier.operator == ">="
    ]
    (bound,) = bounds
    return bound


@pytest.mark.parametrize(
    ("package", "header"),
    [("grpcio", r"^GRPC_GENERATED_VERSION = '(.+)'$"), ("protobuf", r"^# Protobuf Python Version: (.+)$")],
)
def test_the_lowest_supported_runtime_is_the_generators(package: str, header: str) -> None:
    """pyproject admits no grpcio or protobuf older than generated code accepts when it is imported, and none newer."""
    text = "\n".join(file.read_text() for file in sorted(GENERATED.glob("*_pb2*.py")))
    generators = {Version(found) for found in re.findall(header, text, re.MULTILINE)}
    assert generators == {lower_bound(package)}


def test_the_contract_keeps_bufs_rules() -> None:
    """Every service, rpc, message, field, enum and value has a comment, and is named as buf's STANDARD rules want it."""
    lint = buf("lint", str(PROTOS))
    assert lint.returncode == 0, lint.stdout + lint.stderr


def test_the_contract_is_formatted() -> None:
    """`buf format` would change nothing."""
    formatted = buf("format", "--diff", "--exit-code", str(PROTOS))
    assert formatted.returncode == 0, formatted.stdout + formatted.stderr


def baseline() -> str | None:
    """The commit whose contract this checkout must keep: the last release; before the first release what the others
    have (origin/main), or where this checkout is just that, the commit before."""
    head = git("rev-parse", "HEAD")
    candidates = [git("describe", "--tags", "--abbrev=0", "--match", "v*"), "origin/main", "main", "HEAD~1"]
    for candidate in filter(None, candidates):
        commit = git("rev-parse", "--verify", "--quiet", f"{candidate}^{{commit}}")
        if commit is not None and commit != head and git("ls-tree", "--name-only", commit, "protos/") != "":
            return commit
    return None


def test_nothing_promised_is_broken(tmp_path: Path) -> None:
    """No field, rpc or value of the last release (before the first: of the published main) was removed or changed."""
    commit = baseline()
    if commit is None:
        missing("there is no earlier commit with a contract to compare with (a shallow clone, or no git)")
        return
    archive = tmp_path / "protos.tar"
    assert git("archive", "--output", str(archive), commit, "protos") is not None
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    breaking = buf("breaking", str(PROTOS), "--against", str(tmp_path / "protos"))
    assert breaking.returncode == 0, breaking.stdout + breaking.stderr
