"""Formats of weights on one machine: the time of a decode step, and the memory of the weights.

    python -m benchmarks.formats --with '*=int8' --with '*=int4-g64' --batches 1,16 --out results/formats.json

One process has the model in every format, the reference first. A turn computes some decode steps of a batch, forward and the
likeliest tokens as the sampler finds them, in each of them, one right after the other, and who is first goes round: what else the
machine does meets all alike.
A ratio is reference / format of one turn, and the median of the turns is what counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.options import at_least, batches, run
from benchmarks.report import Report
from holdfast import models
from services.engine.kv_cache import KVCache
from services.engine.models import Model, load
from services.engine.ops.sampling import argmax
from services.engine.quality.sizes import bytes_of
from services.engine.state import Batch, Selection

_BLOCK = 32


def decode_batch(tokens_S: Tensor, *, context: int) -> Batch:
    """One more token of each sequence, behind so many of its own."""
    num, each = len(tokens_S), -(-(context + 1) // _BLOCK)
    blocks = torch.arange(num * each, dtype=torch.int32).view(num, each)
    nobody = torch.zeros(num, dtype=torch.int64)
    return Batch(
        token_ids_N=tokens_S,
        positions_N=torch.full((num,), context),
        write_slots_N=blocks[:, context // _BLOCK].long() * _BLOCK + context % _BLOCK,
        block_tables=blocks,
        table_rows_S=torch.arange(num),
        query_starts=torch.arange(num + 1, dtype=torch.int32),
        kv_lengths_S=torch.full((num,), context + 1, dtype=torch.int32),
        sample_rows_R=None,
        num_decodes=num,
        query_lens=[1] * num,
        kv_lens=[context + 1] * num,
        selection=Selection([0] * num, [0] * num, nobody, nobody),
    )


def seconds_of(model: Model, cache: KVCache, *, batch: int, context: int, steps: int) -> float:
    """Of a step."""
    tokens_S = torch.arange(batch) + 100
    start = time.perf_counter()
    for _ in range(steps):
        tokens_S, _ = argmax(model.forward(decode_batch(tokens_S, context=context), cache))
    return (time.perf_counter() - start) / steps


@torch.inference_mode()
def measure(arguments: argparse.Namespace) -> Report:
    """All formats, each batch size in turn."""
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    folder = models.resolve(arguments.model)
    names = [arguments.reference, *arguments.formats]
    dtype = getattr(torch, arguments.dtype)
    subjects = {name: load(folder, dtype=dtype, quantization=name) for name in names}
    report = Report("formats", settings={**vars(arguments), "out": None, "threads": torch.get_num_threads()})
    for batch in arguments.batches:
        blocks = batch * -(-(arguments.context + 1) // _BLOCK)
        cache = KVCache(subjects[names[0]].kv_shape, num_blocks=blocks, block_size=_BLOCK)
        turns: list[dict[str, float]] = []
        for number in range(arguments.turns + 1):
            order = names[number % len(names) :] + names[: number % len(names)]
            options = {"batch": batch, "context": arguments.context, "steps": arguments.steps}
            turns.append({name: seconds_of(subjects[name], cache, **options) for name in order})
        rows = []
        for name in names:
            ratios = sorted(turn[names[0]] / turn[name] for turn in turns[1:])  # the first one warms up
            size = bytes_of(subjects[name])
            milliseconds = statistics.median(turn[name] for turn in turns[1:]) * 1e3
            rows.append([name, milliseconds, statistics.median(ratios), ratios[0], ratios[-1], size / 1e6])
        columns = ["weights", "ms a step", "times as fast", "least", "most", "MB"]
        report.table(f"Decode, batch {batch}, {arguments.context} tokens of context", columns, rows)
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m benchmarks.formats`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a known name")
    parser.add_argument("--reference", default="none", help="rules for weights that the others are compared with")
    parser.add_argument("--with", dest="formats", action="append", default=[], help="other rules; repeat it")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=batches, default=[1, 16])
    parser.add_argument("--context", type=at_least(1), default=128)
    parser.add_argument("--steps", type=at_least(1), default=8, help="of a turn")
    parser.add_argument("--turns", type=at_least(1), default=9)
    parser.add_argument("--threads", type=at_least(1), help="by default one for each core")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args(argv)
    run("formats", lambda: measure(arguments), out=arguments.out)


if __name__ == "__main__":
    main()
