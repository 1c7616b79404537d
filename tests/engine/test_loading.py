"""Layers that are built side by side."""

from __future__ import annotations

import threading

import pytest
import torch

from services.engine import loading
from services.engine.loading import build_layers


def test_layers_come_in_their_order_whoever_is_done_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first waits for the second, which another thread builds meanwhile."""
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: {0, 1})
    second = threading.Event()

    def build(index: int) -> int:
        if index == 0:
            assert second.wait(20)
        if index == 1:
            second.set()
        return index * 10

    assert build_layers(build, 5) == [0, 10, 20, 30, 40]


def test_torch_has_as_many_threads_as_before() -> None:
    """Though those that build have one each."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert build_layers(lambda _: torch.get_num_threads(), 2) == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_layer_raises_is_raised_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a hundred layers is not read to its end for that."""
    monkeypatch.setattr(loading.os, "sched_getaffinity", lambda _: {0})
    built = []

    def build(index: int) -> None:
        if index == 2:
            raise ValueError("no such tensor")
        built.append(index)

    with pytest.raises(ValueError, match="no such tensor"):
        build_layers(build, 1000)
    assert built == [0, 1]


def test_a_long_load_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Again and again; of a short one nothing is told."""
    build_layers(lambda index: index, 3)
    assert "loading" not in capsys.readouterr().out
    monkeypatch.setattr(loading, "PROGRESS_SECONDS", 0.0)
    build_layers(lambda index: index, 3)
    assert "2 of 3" in capsys.readouterr().out
