"""What benchmarks refuse on the command line, and in which words."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import attribution, offline, options
from benchmarks.quality import __main__ as quality
from holdfast.errors import ConfigurationError, InternalError

TEXT = ["--text", __file__]


@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (offline.main, ["--batches", "x"], "'x' are no batch sizes, such as 1,32,128"),
        (offline.main, ["--batches", "1,0"], "'1,0' are no batch sizes"),
        (offline.main, ["--work", "Z"], "'Z' are no workloads: name one or more of A, B and C"),
        (offline.main, ["--requests", "0"], "'0' is no whole number from 1 on"),
        (offline.main, ["--scale", "-1"], "'-1' is no number above 0"),
        (offline.main, ["--scale", "nan"], "'nan' is no number above 0"),
        (offline.main, ["--set", "nosuch=3"], "'nosuch=3' is no setting of an engine as name=value"),
        (attribution.main, ["--output", "4"], "'4' is no whole number from 8 on"),
        (quality.main, [*TEXT, "--chunk", "0"], "'0' is no whole number from 1 on"),
        (quality.main, [*TEXT, "--sensitivity", "nosuch"], "'nosuch' is no rule; it must be one of none"),
        (quality.main, ["--text", "/nosuch"], "there is no file /nosuch"),
        (quality.main, [*TEXT, "--with", "dtype=float32 nosuch=3"], "'nosuch=3' is no setting of an engine"),
        (
            quality.main,
            [*TEXT, "--with", "kv_cache_dtype"],
            "'kv_cache_dtype' is no setting of an engine as name=value",
        ),
    ],
)
def test_what_is_no_option_is_refused(
    main: Callable[[Sequence[str]], None], argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything runs, in one line beside the usage, with 2."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max_sequences=abc", "max_sequences: Input should be a valid integer, .*, not 'abc'"),
        ("kv_cache_dtype=int3", "kv_cache_dtype: .*'int3' is no KV format"),
        ("quantization=int4", "quantization: .*'int4' is no rule"),
        ("tensor_parallel=2", "tensor_parallel is 2, but this benchmark's engine computes in one process"),
    ],
)
def test_values_that_settings_cannot_have_end_a_benchmark(
    given: str, says: str, stories260k: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one line and 2, no traceback."""
    with pytest.raises(SystemExit) as ended:
        offline.main([str(stories260k), "--device", "cpu", "--set", given])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    with pytest.raises(ConfigurationError, match=says):
        options.engine_here(stories260k, dict([options.setting(given)]))


def test_settings_of_whole_numbers_are_numbers(stories260k: Path) -> None:
    """Also where only some of them are allowed."""
    settings = options.engine_here(stories260k, dict(map(options.setting, ["block_size=16", "dtype=float32"])))
    assert (settings.block_size, settings.dtype) == (16, "float32")


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigurationError("no"), 2), (InternalError("no"), 1), (OSError("no"), 1)]
)
@pytest.mark.parametrize("in_tasks", [False, True])
def test_errors_end_a_benchmark_with_one_line(
    error: Exception, code: int, in_tasks: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether they come alone or out of tasks."""

    async def fail() -> None:
        raise error

    async def fail_in_tasks() -> None:
        async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
            inner.create_task(fail())
            outer.create_task(asyncio.sleep(0))

    with pytest.raises(SystemExit) as ended, options.clear_errors("bench", OSError):
        asyncio.run(fail_in_tasks() if in_tasks else fail())
    assert ended.value.code == code
    assert capsys.readouterr().err == "bench: no\n"


def test_other_errors_are_not_hidden() -> None:
    """A fault of the benchmark keeps its traceback."""
    with pytest.raises(ExceptionGroup), options.clear_errors("bench"):
        raise ExceptionGroup("tasks", [KeyError("x")])
