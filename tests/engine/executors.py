"""The ways in which a GPU's runner computes a step, each by itself: what they say can be compared only so."""

from __future__ import annotations

from services.engine.batch import Step
from services.engine.graphs import Graphs
from services.engine.loop import Runner
from services.engine.model_runner import Eager, Launched, ModelRunner
from services.engine.sampler import Sampled


class Nobody:
    """An executor for steps that must not come."""

    def run(self, step: Step) -> Sampled | None:
        raise AssertionError(f"no graph holds {step}")


def captured(runner: Runner[Launched]) -> Runner[Launched]:
    """The runner, in which a step that no graph holds is an AssertionError."""
    graphs, _ = _executors(runner)
    graphs._larger = Nobody()
    return runner


def uncaptured(runner: Runner[Launched]) -> Runner[Launched]:
    """A runner that computes every step as this one computes those that no graph holds."""
    _, eager = _executors(runner)
    return ModelRunner(eager)


def _executors(runner: Runner[Launched]) -> tuple[Graphs, Eager]:
    assert isinstance(runner, ModelRunner)
    graphs = runner._executor
    assert isinstance(graphs, Graphs)
    assert isinstance(graphs._larger, Eager)
    return graphs, graphs._larger
