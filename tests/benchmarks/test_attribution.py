"""To what a step's time is put down."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import attribution
from benchmarks.attribution import BEGIN, Operation, attribute, operations_of, part_of
from holdfast.errors import ConfigurationError


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """An engine sets the number of torch's threads for the whole process; other tests have their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_instant_belongs_to_one_operation_or_to_a_gap() -> None:
    """A kernel that was set up early counts from the end of the one before; parts and gaps add up to the span."""
    found = attribute(
        [
            Operation("before the first step", 0, 5),
            Operation("_lay_out", 10, 11),
            Operation("_gemv", 11, 20),
            Operation("_attend", 15, 30),
            Operation("_rms_norm", 16, 18),
            Operation("Memcpy DtoH", 34, 35),
            Operation("_lay_out", 40, 41),
            Operation("_gemv", 41, 99),
        ]
    )
    assert found.steps == 1
    assert found.parts == {"products": 9, "attention": 10, "other": 1, "copies": 1}
    assert found.gaps == 4 + 5
    assert sum(found.parts.values()) + found.gaps == 40 - 10


def test_a_trace_without_steps_is_refused() -> None:
    """There is nothing to divide by."""
    with pytest.raises(ValueError, match="fewer than two decode steps"):
        attribute([Operation("_lay_out", 0, 1), Operation("_gemv", 1, 2)])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attend", "attention"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("_route_experts", "experts"),
        ("_experts_product", "experts"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("aten::addmm", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("_choose", "sampling"),
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


async def test_a_real_step_is_explained(stories260k: Path) -> None:
    """On a CPU: the parts and the gaps are about the step, most of which is computing."""
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
