"""What benchmarks are told on the command line: checked before anything runs, and what cannot be is refused in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from benchmarks.report import Report
from holdfast.errors import ConfigurationError, HoldfastError
from services.engine.settings import EngineSettings
from services.engine.weight_format import rules_of


def at_least(least: int) -> Callable[[str], int]:
    """A type of options: a whole number from there on."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return whole_number


def above_zero(text: str) -> float:
    """A type of options: a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def batches(text: str) -> list[int]:
    """A type of options: batch sizes."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} are no batch sizes, such as 1,32,128")
    return [int(part) for part in text.split(",")]


def workloads(text: str) -> str:
    """A type of options: some of the workloads of `offline`."""
    if not text or set(text) - set("ABC"):
        raise argparse.ArgumentTypeError(f"{text!r} are no workloads: name one or more of A, B and C, such as AB")
    return text


def file(text: str) -> Path:
    """A type of options: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def setting(text: str) -> tuple[str, object]:
    """A type of options: a setting of the engine as `name=value`."""
    name, is_there, value = text.partition("=")
    if not is_there or name not in EngineSettings.model_fields:
        raise argparse.ArgumentTypeError(f"{text!r} is no setting of an engine as name=value, such as max_sequences=8")
    return name, int(value) if value.isdecimal() else value  # 16 is a block_size, and "16" is none


def several_settings(text: str) -> str:
    """A type of options: several of them, separated by spaces. As they are given, which is what a report calls them."""
    for each in text.split():
        setting(each)
    return text


def rules(text: str) -> str:
    """A type of options: rules of quantization, as they are given."""
    try:
        rules_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def engine_here(folder: Path, given: Mapping[str, object]) -> EngineSettings:
    """The settings of an engine for the model in a folder, in this process. Raises ConfigurationError for values that
    cannot be."""
    try:
        checked = EngineSettings.model_validate({"model": str(folder), **given})
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise ConfigurationError(
            "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}, not {each['input']!r}" for each in problems)
        ) from error
    if checked.tensor_parallel != 1:
        raise ConfigurationError(
            f"tensor_parallel is {checked.tensor_parallel}, but this benchmark's engine computes in one process: leave it at 1"
        )
    return checked


def run(name: str, measure: Callable[[], Report], *, out: Path | None) -> None:
    """Measures, and keeps the report in a file where there is one."""
    with clear_errors(name):
        report = measure()
        if out is not None:
            report.save(out)


@contextmanager
def clear_errors(name: str, *others: type[Exception]) -> Iterator[None]:
    """The block is a benchmark. Where it cannot run as it was told the program ends with one line that says why, and 2;
    after any other error of Holdfast, and after the `others`, with such a line and 1."""
    kinds: tuple[type[Exception], ...] = (HoldfastError, *others)
    failed: BaseException | None = None
    try:
        yield
    except* kinds as group:
        failed = group
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    if failed is not None:
        print(f"{name}: {failed}", file=sys.stderr)
        sys.exit(2 if isinstance(failed, ConfigurationError) else 1)
