"""The engine beside vLLM on one GPU, in one sitting: both compute the same workloads of `offline` on the same shapes.

    python -m benchmarks.h200 configs/Meta-Llama-3.1-8B configs/Qwen3-0.6B --vllm vllm_bench.py --out results/h200.json
    python -m benchmarks.h200 configs/Meta-Llama-3.1-8B --schemes fp8,int8,int4 --vllm vllm_bench.py --out results/h200-few-bits.json

A shape is a folder with a config.json; weights are random. `--vllm` is a script that runs vLLM on a folder and prints its
figures; without it only ours are measured. Each engine has the GPU to itself, in a process of its own, one after the
other. The floor of a time per token is what reading weights and keys and values once takes at `--bandwidth`; of a mixture of experts, what tokens that choose evenly want in the mean.
`--profile` adds where the time of our decode steps goes, in a run of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline import CONTEXT, OUTPUT
from benchmarks.options import above_zero, batches, file, workloads
from benchmarks.report import Cell, Report
from services.engine.models.spec import ModelSpec, MoESpec, read_config


@dataclass(frozen=True, slots=True)
class Scheme:
    """In what matrices and keys and values are kept, and how each engine is told so."""

    name: str
    ours: tuple[str, ...] = ()
    """Settings."""
    theirs: tuple[str, ...] | None = ()
    """Options of the script; None if it has none for this."""
    attention_bytes: float = 2
    """Of a value of the matrices of attention."""
    mlp_bytes: float = 2
    """Of those of an MLP. Experts and the head have 2."""
    kv_bytes: float = 2
    """Of a value, scales apart."""


_KV = "kv_cache_dtype=fp8_e4m3"
_FOUR_BITS = 0.5 + 2 / 128
"""Bytes of a value, with a scale for each group of 128."""

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16"),
        Scheme("fp8", ("quantization=fp8", _KV), ("--quant", "fp8", "--kv", "fp8"), 1, 1, 1),
        Scheme("fp8-weights", ("quantization=fp8",), ("--quant", "fp8"), 1, 1),
        Scheme("int8", ("quantization=int8", _KV), ("--quant", "w8a8", "--kv", "fp8"), 1, 1, 1),
        Scheme("int4", ("quantization=int4-g128", _KV), ("--quant", "w4a16", "--kv", "fp8"), _FOUR_BITS, _FOUR_BITS, 1),
        Scheme("int8-int4", ("quantization=*.self_attn.*=int8,*.mlp.*=int4-g128", _KV), None, 1, _FOUR_BITS, 1),
    )
}

Figures = dict[str, float]
"""By measure: `batch N` in milliseconds a token, `prefill` and `mixed` in tokens a second."""

ROOT = Path(__file__).parents[1]
THEIRS = {
    "batch": re.compile(r"B batch (\d+) tpot ([\d.]+) ms"),
    "prefill": re.compile(r"C prefill ([\d.]+) tok/s"),
    "mixed": re.compile(r"A mixed ([\d.]+) out tok/s"),
}


def ours(folder: Path, scheme: Scheme, *, work: str, batches: str) -> Figures:
    """Of our engine."""
    tables = {
        table["title"][0]: table["rows"]
        for table in _tables("offline", folder, scheme, "--work", work, "--batches", batches)
    }
    figures = {f"batch {batch}": milliseconds for batch, milliseconds, _ in tables.get("B", [])}
    return figures | {
        name: rows[0][1] for name, rows in (("prefill", tables.get("C")), ("mixed", tables.get("A"))) if rows
    }


def _tables(benchmark: str, folder: Path, scheme: Scheme, *options: str) -> list[dict[str, Any]]:
    """What another benchmark reports of a shape, in a process that has the GPU to itself."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report.json"
        shape = [str(folder), "--load-format", "dummy", "--device", "cuda", "--dtype", "bfloat16"]
        told = [word for setting in scheme.ours for word in ("--set", setting)]
        command = ["-m", f"benchmarks.{benchmark}", *shape, *told, *options, "--out", str(out)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        tables: list[dict[str, Any]] = json.loads(out.read_text())["tables"]
        return tables


def attribution(folder: Path, scheme: Scheme, *, batches: str) -> list[dict[str, Any]]:
    """The tables of `benchmarks.attribution`, of our engine."""
    return _tables("attribution", folder, scheme, "--batches", batches)


def theirs(script: Path, folder: Path, scheme: Scheme, *, work: str, batches: str) -> Figures:
    """Of vLLM. What it does not print is not there. Raises CalledProcessError where the script fails."""
    assert scheme.theirs is not None
    command = [sys.executable, str(script), str(folder), *scheme.theirs, "--work", work, "--batches", batches]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        figures: Figures = {}
        for line in process.stdout:
            figures |= read_line(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return figures


def read_line(line: str) -> Figures:
    """The figure in a line that vLLM's script prints, if there is one."""
    if found := THEIRS["batch"].search(line):
        return {f"batch {found[1]}": float(found[2])}
    return {name: float(found[1]) for name in ("prefill", "mixed") if (found := THEIRS[name].search(line))}


def floor(folder: Path, batch: int, scheme: Scheme = SCHEMES["bf16"], *, bandwidth: float) -> float:
    """Milliseconds that the bytes of one decode step take at so many bytes a second: all weights but the embedding once,
    of experts those that are expected to be wanted; keys and values of the mean context."""
    spec = ModelSpec.from_config(read_config(folder))
    attention = spec.layers * spec.hidden * spec.head_dim * (2 * spec.heads + 2 * spec.kv_heads)
    mixtures = len(spec.moe.layers) if spec.moe is not None else 0
    mlps = (spec.layers - mixtures) * 3 * spec.hidden * spec.intermediate
    others: float = spec.vocab_size * spec.hidden
    if (moe := spec.moe) is not None:
        others += mixtures * spec.hidden * (moe.num_experts + 3 * moe.intermediate * wanted_experts(moe, batch))
    cached = batch * (CONTEXT + OUTPUT // 2) * spec.layers * 2 * spec.kv_heads * spec.head_dim
    matrices = scheme.attention_bytes * attention + scheme.mlp_bytes * mlps
    return (matrices + 2 * others + scheme.kv_bytes * cached) / bandwidth * 1e3


def wanted_experts(moe: MoESpec, batch: int) -> float:
    """How many different experts so many tokens go to in the mean, if each of them goes to any with the same chance: the
    most that there can be on average. A router that has favourites wants fewer."""
    return moe.num_experts * (1 - (1 - moe.top_k / moe.num_experts) ** batch)


def compare(report: Report, folder: Path, scheme: Scheme, mine: Figures, other: Figures, *, bandwidth: float) -> None:
    """Adds the table of one shape."""
    rows: list[list[Cell]] = []
    for measure, figure in mine.items():
        is_time = measure.startswith("batch")
        lowest = floor(folder, int(measure.split()[1]), scheme, bandwidth=bandwidth) if is_time else None
        against = other.get(measure)
        ratio = None if against is None else against / figure if is_time else figure / against
        share = None if lowest is None else 100 * lowest / figure
        rows.append([measure + (", ms a token" if is_time else ", tok/s"), figure, against, ratio, lowest, share])
    columns = ["", "Holdfast", "vLLM", "times as fast", "floor", "% of the floor's speed"]
    report.table(f"{folder.name}, {scheme.name}", columns, rows)


def measure(report: Report, folder: Path, scheme: Scheme, options: argparse.Namespace) -> None:
    """Adds what both are on one shape. Raises CalledProcessError where a process fails; what was found before is added."""
    sizes = ",".join(map(str, options.batches))
    mine = ours(folder, scheme, work=options.work, batches=sizes)
    other: Figures = {}
    try:
        if options.vllm is not None and scheme.theirs is not None:
            other = theirs(options.vllm, folder, scheme, work=options.work, batches=sizes)
    finally:
        compare(report, folder, scheme, mine, other, bandwidth=options.bandwidth)
    if options.profile:
        for table in attribution(folder, scheme, batches=sizes):
            report.table(f"{folder.name}, {scheme.name}: {table['title']}", table["columns"], table["rows"])


def _schemes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCHEMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} is none of {', '.join(SCHEMES)}")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.h200`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="with a config.json each")
    parser.add_argument("--vllm", type=file, help="the script that measures vLLM")
    parser.add_argument(
        "--schemes",
        type=_schemes,
        default=["bf16"],
        help=f"one or more of {','.join(SCHEMES)}; each engine in the same",
    )
    parser.add_argument("--work", type=workloads, default="CBA", help="which workloads of `offline`")
    parser.add_argument("--batches", type=batches, default="1,32,128,256", help="of B")
    parser.add_argument("--profile", action="store_true", help="add where the time of our decode steps goes")
    parser.add_argument("--bandwidth", type=above_zero, default=4.26e12, help="bytes a second (an H200 copies 4.26e12)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("h200: PyTorch sees no GPU here")
    report = Report(
        "h200",
        settings={
            "work": options.work,
            "batches": options.batches,
            "schemes": options.schemes,
            "vllm": options.vllm is not None,
        },
    )
    for folder, scheme in product(options.folders, [SCHEMES[name] for name in options.schemes]):
        try:
            measure(report, folder, scheme, options)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"h200: `{shlex.join(error.cmd)}` failed with {error.returncode}; what it says of that stands above"
            )
        finally:
            if options.out is not None:
                report.save(options.out)


if __name__ == "__main__":
    main()
