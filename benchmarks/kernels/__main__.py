"""Every kernel of a step beside what the machine could do at best.

    python -m benchmarks.kernels configs/Meta-Llama-3.1-8B configs/Qwen3-30B-A3B --out results/kernels.json
    python -m benchmarks.kernels configs/Meta-Llama-3.1-8B --tune          # other tilings beside those that serve

A shape is a folder with a config.json; weights are noise, in bfloat16. Steps are decodes of `--batches` sequences that see `--context`
tokens each, and prompts of 2,048 tokens from an empty context, `--prefill` tokens together. The ops are called as the model calls
them, so that what is measured is what serves. `timing` says how it is measured.

Counted is what must move and be computed at least, from the shapes alone:

    product     the matrix, its inputs and outputs (and what is added to them) once; 2 FLOPs a number of the matrix and row
    attention   keys and values that are seen once for each sequence, queries, results; 4 FLOPs a head, feature, query and key.
                Its time is of prompts in 8 bits with the widening of their pages, a call after the other
    qkv         queries, keys and values in and out, keys and values as the cache keeps them
    experts     the matrices of the experts that are wanted by these random tokens, inputs and outputs; 2 FLOPs as in a product
    norm, gate, quantize    numbers in and out; a single row on a GPU is normed and gated where it is multiplied, and counts there
    sample      the logits, float32

The ceiling of a kernel is the longer of moving its bytes and computing its FLOPs at the rates measured in the same run: of a copy
or a read of a gigabyte, and of a product of two large matrices. A CPU widens fp8 weights, and so reads more than is counted.
`w8a8` is the format `int8`, `w4a16` is `int4-g128`, left out where a matrix does not fall into its groups.
Products have no bias here. Sums over a step leave out what comes once a step and is small: the embedding, angles, the lists of
attention's work.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.kernels.costs import Cost, Load
from benchmarks.kernels.shape import Kernel, Shape
from benchmarks.kernels.timing import Ceilings, compiled_ahead, measured_ceilings, seconds_a_call
from benchmarks.report import Cell, Report
from services.engine.models.spec import ModelSpec, read_config

SUMS = {
    "bf16": {"", "bf16", "auto", "likeliest"},
    "fp8, keys and values int8": {"", "fp8", "int8", "likeliest"},
    "w8a8, keys and values fp8": {"", "w8a8", "fp8_e4m3", "likeliest"},
    "w4a16, keys and values fp8": {"", "w4a16", "fp8_e4m3", "likeliest"},
}
"""Which forms make a whole step."""

COLUMNS = ["step", "kernel", "form", "µs", "MB", "GFLOP", "TB/s", "TFLOP/s", "% of the ceiling", "bound by"]


def row_of(load: Load, kernel: Kernel, cost: Cost, seconds: float, ceilings: Ceilings) -> list[Cell]:
    """One kernel in one step, as `COLUMNS` name it."""
    memory = ceilings.seconds(bytes_=cost.bytes_, flops=0.0, unit=cost.unit)
    least = ceilings.seconds(bytes_=cost.bytes_, flops=cost.flops, unit=cost.unit)
    return [
        str(load),
        kernel.name,
        kernel.form,
        seconds * 1e6,
        cost.bytes_ / 1e6,
        cost.flops / 1e9,
        cost.bytes_ / seconds / 1e12,
        cost.flops / seconds / 1e12,
        100 * least / seconds,
        "memory" if least == memory else "arithmetic",
    ]


def measure(shape: Shape, loads: Sequence[Load], ceilings: Ceilings, report: Report, name: str) -> None:
    """Adds the tables of one shape; every figure is printed as soon as it is there."""
    rows: list[tuple[Load, list[Cell]]] = []
    sums = {
        (load, form): [0.0, 0.0] for load in loads for form, forms in SUMS.items() if forms.intersection(shape.formats)
    }
    kernels = [kernel for kernel in shape.kernels() if kernel.among(loads)]
    if shape.device.type == "cuda":
        with compiled_ahead():
            for kernel in kernels:
                made = kernel.make()
                for load in kernel.among(loads):
                    made(load)[1][0]()
    for kernel in kernels:
        made = kernel.make()
        for load in kernel.among(loads):
            cost, calls = made(load)
            seconds = seconds_a_call(calls, shape.device)
            row = row_of(load, kernel, cost, seconds, ceilings)
            rows.append((load, row))
            micro, _, _, bandwidth, rate, share = row[3:9]
            print(
                f"{name} {load} {kernel.name} {kernel.form}: {micro:.2f} µs, {bandwidth:.2f} TB/s, {rate:.1f} TFLOP/s, {share:.0f} %",
                flush=True,
            )
            for form, forms in SUMS.items():
                if kernel.form in forms and (load, form) in sums:
                    sums[load, form][0] += kernel.times(load) * seconds
                    sums[load, form][1] += kernel.times(load) * seconds * float(row[8] or 0) / 100
            del calls
        del made
        if shape.device.type == "cuda":
            torch.cuda.empty_cache()
    report.table(name, COLUMNS, [row for load in loads for at, row in rows if at is load])
    report.table(
        f"{name}: all kernels of a step together",
        ["step", "form", "ms", "ms at the ceilings", "%"],
        [
            [str(load), form, took * 1e3, least * 1e3, 100 * least / took]
            for (load, form), (took, least) in sums.items()
        ],
    )


def numbers(text: str) -> list[int]:
    """Of a list with commas; empty of nothing."""
    return [int(each) for each in text.split(",") if each]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.kernels`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="with a config.json each")
    parser.add_argument("--batches", type=numbers, default="1,32,128,256", help="sequences that decode together")
    parser.add_argument("--context", type=int, default=1024, help="keys that each of them sees")
    parser.add_argument("--prefill", type=numbers, default="2048,8192", help="tokens of prompts in a step")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tune", action="store_true", help="try other tilings instead, on a GPU")
    parser.add_argument("--only", type=re.compile, default="", help="--tune the kernels whose names match, as `fp8$`")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of --tune for a shape")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if options.tune and not on_gpu:
        parser.error("--tune compares a GPU's kernels, and PyTorch is to use none here")
    device = torch.device("cuda" if on_gpu else "cpu")
    loads = [Load.decode(batch, options.context) for batch in options.batches] + list(
        map(Load.prefill, options.prefill)
    )
    named = {name: value for name, value in vars(options).items() if name not in ("folders", "out")}
    named["only"] = options.only.pattern
    report = Report("kernels", settings={**named, "shapes": [folder.name for folder in options.folders]})
    ceilings = measured_ceilings(device)
    rows: list[list[Cell]] = [["memory, TB/s", ceilings.bandwidth / 1e12]]
    rows += [[f"{unit}, TFLOP/s", rate / 1e12] for unit, rate in ceilings.flops.items()]
    report.table("Ceilings, measured in this run", ["", ""], rows)
    for folder in options.folders:
        shape = Shape(ModelSpec.from_config(read_config(folder)), device)
        if options.tune:
            from benchmarks.kernels.tuning import tune

            tune(shape, loads, report, folder.name, limit=options.limit, only=options.only)
        else:
            measure(shape, loads, ceilings, report, folder.name)
        if options.out is not None:
            report.save(options.out)


if __name__ == "__main__":
    main()
