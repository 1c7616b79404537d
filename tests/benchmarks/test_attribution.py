"""To what a step's time is put down."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import attribution
from benchmarks.alone import engine_alone
from benchmarks.attribution import BEGIN, Operation, TimedRunner, attribute, operations_of, part_of, profiled
from holdfast.errors import ConfigurationError


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(start: float, *, slower: int = 1) -> list[Operation]:
    """What a GPU runs for a decode step, of 30 microseconds where it is no slower. One kernel waits for the one before,
    another is over before that."""
    operations = [
        Operation("_lay_out", 0, 1),
        Operation("_gemv", 1, 10),
        Operation("_attend_decodes", 5, 20),
        Operation("_rms_norm", 6, 8),
        Operation("Memcpy DtoH", 24, 25),
    ]
    return [replace(each, start=start + slower * each.start, end=start + slower * each.end) for each in operations]


def in_turn(*kinds: list[Operation]) -> list[Operation]:
    """Steps, each of which begins 5 microseconds after the last operation of the one before."""
    operations: list[Operation] = []
    for kind in kinds:
        begin = max((each.end for each in operations), default=0) + 5
        operations += [replace(each, start=each.start + begin, end=each.end + begin) for each in kind]
    return operations


def test_every_instant_belongs_to_one_operation_or_to_a_gap() -> None:
    """A kernel that was set up early counts from the end of the one before; parts and gaps add up to the steps."""
    operations = [Operation("before the first step", 0, 2), *in_turn(*[step(0)] * 7)]
    found = attribute(operations, [3] * 7, batch=3)
    assert found.steps == 2
    assert found.parts == {"products": 2 * 9, "attention": 2 * 10, "other": 2 * 1, "copies": 2 * 1}
    assert found.names["_rms_norm"] == 0
    assert found.gaps == 2 * (4 + 5)
    assert sum(found.parts.values()) + found.gaps == 2 * 30


def test_only_steps_of_the_whole_batch_count() -> None:
    """Not those in which prompts are computed, one before such, smaller batches before and after, and a larger one; and of
    the others not the first and last two."""
    prefill = [Operation("_lay_out_works", 0, 500), Operation("_attend_decodes", 500, 900)]
    whole, other = step(0), step(0, slower=10)
    kinds = [(0, prefill), (2, other), (0, prefill), (3, other), (0, prefill), (4, other)]
    kinds += [(3, other), (3, other), *[(3, whole)] * 3, (3, other), (3, other), (2, other), (1, other)]
    found = attribute(in_turn(*[kind for _, kind in kinds]), [size for size, _ in kinds], batch=3)
    assert found.steps == 3
    assert sum(found.parts.values()) + found.gaps == 3 * 30


def test_too_few_whole_steps_are_no_mean() -> None:
    """The last decode of a trace is none, nor is one before a prompt: where those ended nobody knows."""
    with pytest.raises(ConfigurationError, match="only 5 steps decoded the whole batch, .* raise --output"):
        attribute(in_turn(*[step(0)] * 6), [3] * 6, batch=3)
    with pytest.raises(ConfigurationError, match="only 0 steps"):
        attribute(in_turn(*[step(0)] * 9), [3, 0] * 9, batch=3)


def test_a_trace_that_does_not_know_its_steps_is_refused() -> None:
    """Which of them would be of the whole batch?"""
    with pytest.raises(ValueError, match="the trace has 7 decode steps, and 8 were launched"):
        attribute(in_turn(*[step(0)] * 7), [3] * 8, batch=3)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attend_prompts", "attention"),
        ("_list_chunks", "attention"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("_route_experts", "experts"),
        ("_experts_product", "experts"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("_choose", "sampling"),
        ("_weigh_groups", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("_rms_norm", "other"),
        ("_prepare", "other"),
    ],
)
def test_names_say_what_operations_are_for(name: str, part: str) -> None:
    """Those of our kernels, of cuBLAS and of torch."""
    assert part_of(name) == part


def test_of_a_gpu_what_it_ran_counts_and_of_a_cpu_what_the_step_thread_called() -> None:
    """Not what other threads did, nor the calls that launched kernels."""
    trace = {
        "traceEvents": [
            {"cat": "kernel", "name": "_gemv", "ts": 1.0, "dur": 2.0, "tid": 7},
            {"cat": "cpu_op", "name": "aten::mm", "ts": 0.5, "dur": 9.0, "tid": 1},
            {"cat": "cpu_op", "name": "aten::copy_", "ts": 0.5, "dur": 9.0, "tid": 2},
            {"cat": "user_annotation", "name": attribution.DECODE, "ts": 0.0, "dur": 10.0, "tid": 1},
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert operations_of(trace, on_gpu=True) == [Operation("_gemv", 1.0, 3.0)]
    assert operations_of(trace, on_gpu=False) == [
        Operation("aten::mm", 0.5, 9.5),
        Operation(attribution.DECODE, 0.0, 0.0),
    ]
    assert BEGIN.search("_lay_out")


async def test_parts_and_gaps_are_as_long_as_the_steps_were(stories260k: Path) -> None:
    """Of a real engine on a CPU, which computes one prompt after the other, and so decodes one sequence at the beginning
    and at the end."""
    settings = {"device": "cpu", "threads": 1, "max_sequences": 2, "max_step_tokens": 48, "prefix_cache": False}
    async with engine_alone(stories260k, settings, around=TimedRunner) as engine:
        runner = engine.runner
        assert isinstance(runner, TimedRunner)
        await engine.answers([[1] * 40] * 2, [8] * 2)
        found = await profiled(engine, runner, [[1] * 40] * 2, 20)
    decodes = runner.decodes[2]
    assert (runner.launches[0], runner.launches[-1], runner.launches.count(2)) == (0, 1, len(decodes))
    assert found.steps == len(decodes) - 4
    took = decodes[2 + found.steps].launch - decodes[2].launch
    assert (sum(found.parts.values()) + found.gaps) / 1e6 == pytest.approx(took, rel=0.1)


async def test_a_real_step_is_explained(stories260k: Path) -> None:
    """On a CPU: most of it is computing."""
    arguments = argparse.Namespace(
        model=str(stories260k), device="cpu", dtype="auto", load_format="dummy", implementation="auto", threads=1,
        batches=[2], context=20, output=20, cache_gib=1, set=[("prefix_cache", "true")], out=None,
    )  # fmt: skip
    report = await attribution.measure(arguments)
    (row,) = report.tables[0]["rows"]  # type: ignore[misc]
    batch, step, *parts, launch, host = row
    assert batch == "2"
    assert all(part >= 0 for part in parts)
    assert dict(zip(attribution.PARTS, parts, strict=False))["products"] > 0
    assert 0 < launch <= step
    assert host >= 0


def test_too_few_steps_are_no_mean() -> None:
    """Where a batch came together for few of them only, or never."""
    steps = [attribution.Times(at, at + 0.25, at + 0.5, at + 1.0) for at in range(6)]
    assert attribution.host_share(steps) == (1000.0, 250.0, 500.0)
    for few in (steps[:5], []):
        with pytest.raises(
            ConfigurationError, match=f"only {len(few)} steps decoded the whole batch, .* raise --output"
        ):
            attribution.host_share(few)
