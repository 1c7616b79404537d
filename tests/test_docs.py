"""The documentation speaks of what is there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT


def named_files(page: str) -> list[str]:
    """The paths in code marks: those with a folder and an ending."""
    text = (ROOT / page).read_text()
    paths = re.findall(r"`((?:holdfast|services|protos|deploy|tests|benchmarks|docs|examples)/[\w./-]*\.\w+)`", text)
    return sorted(set(paths))


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/delivery.md",
        "docs/load.md",
        "docs/quantization.md",
    ],
)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    """The table of a request's life is kept true."""
    missing = [path for path in named_files(page) if not (ROOT / path).exists()]
    assert not missing


def test_the_page_on_architecture_names_files_at_all() -> None:
    """The test above would pass on an empty page."""
    assert len(named_files("docs/architecture.md")) > 15


def test_every_decision_is_in_the_list() -> None:
    """docs/decisions/README.md names all pages beside it."""
    index = (ROOT / "docs/decisions/README.md").read_text()
    for page in (ROOT / "docs/decisions").glob("0*.md"):
        assert f"({page.name})" in index
