"""Ours against transformers' `generate` on the same CPU, model, prompts and threads, in one process.

    python -m benchmarks.cpu_parity
    python -m benchmarks.cpu_parity --dtypes bfloat16 --batches 1,16 --pairs 9 --out results/cpu_parity.json

Each pair computes the same prompts with both, one right after the other, and who is first alternates: what else the
machine does meets both alike. A ratio is theirs / ours of one pair; the median of the pairs is what counts. Greedy, a
fixed number of tokens. Goals in bfloat16: 1.4 at batch 1, 1.8 at batch 16; never below 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import uvloop

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.report import Report
from holdfast import models

GOALS = {("bfloat16", 1): 1.4, ("bfloat16", 16): 1.8}


class Theirs:
    """transformers, as its documentation says to use it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def answers(self, prompts: Sequence[list[int]], output_tokens: int) -> list[list[int]]:
        """The continuations of prompts of one length."""
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": output_tokens, "min_new_tokens": output_tokens}
        with torch.inference_mode():
            found = self._model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        answers: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return answers


@dataclass(slots=True)
class Pairs:
    """Seconds of both, pair by pair."""

    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    num_equal: int = 0
    num_tokens: int = 0

    @property
    def ratios(self) -> list[float]:
        """Theirs / ours, lowest first."""
        return sorted(theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True))

    def compare(self, ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> None:
        """Counts the tokens up to the first difference of each answer."""
        for our, their in zip(ours, theirs, strict=True):
            same = [a == b for a, b in zip(our, their, strict=True)]
            self.num_equal += same.index(False) if False in same else len(same)
            self.num_tokens += len(same)


async def measure(engine: EngineAlone, theirs: Theirs, arguments: argparse.Namespace, *, batch: int) -> Pairs:
    """All pairs of one batch size; the first of them is thrown away."""
    draw, pairs = random.Random(0), Pairs()
    for number in range(arguments.pairs + 1):
        prompts = [[draw.randrange(10, engine.vocab_size - 10) for _ in range(arguments.prompt)] for _ in range(batch)]
        seconds, answers = {}, {}
        for who in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            start = time.perf_counter()
            if who == "ours":
                answers[who] = await engine.answers(prompts, [arguments.output] * batch)
            else:
                answers[who] = await asyncio.to_thread(theirs.answers, prompts, arguments.output)
            seconds[who] = time.perf_counter() - start
        if number:
            pairs.ours.append(seconds["ours"])
            pairs.theirs.append(seconds["theirs"])
            pairs.compare(answers["ours"], answers["theirs"])
    return pairs


def row(dtype: str, batch: int, pairs: Pairs, output: int) -> list[str | float]:
    """What one dtype and batch size came to."""
    ratios, tokens = pairs.ratios, batch * output
    goal = GOALS.get((dtype, batch), 1.0)
    ratio = statistics.median(ratios)
    return [
        dtype,
        str(batch),
        tokens / statistics.median(pairs.ours),
        tokens / statistics.median(pairs.theirs),
        ratio,
        ratios[0],
        ratios[-1],
        f"≥ {goal}{'' if ratio >= goal else '  MISSED'}",
        f"{pairs.num_equal / pairs.num_tokens:.0%}",
    ]


async def compare(arguments: argparse.Namespace) -> Report:
    """The whole comparison."""
    folder = models.resolve(arguments.model)
    report = Report("cpu_parity", settings={**vars(arguments), "out": None, "model": folder.name})
    batches = [int(batch) for batch in arguments.batches.split(",")]
    rows = []
    for dtype in arguments.dtypes.split(","):
        theirs = Theirs(folder, getattr(torch, dtype))
        settings = {
            "device": "cpu",
            "dtype": dtype,
            "threads": arguments.threads,
            "max_sequences": max(batches),
            "prefix_cache": False,
            "itl_target_ms": 1e6,
        }
        async with engine_alone(folder, settings) as engine:
            for batch in batches:
                rows.append(row(dtype, batch, await measure(engine, theirs, arguments, batch=batch), arguments.output))
                print(rows[-1], flush=True)
    columns = ["dtype", "batch", "ours tok/s", "theirs tok/s", "ratio", "lowest", "highest", "goal", "same tokens"]
    title = (
        f"{folder.name}: {arguments.prompt} tokens in, {arguments.output} out, output tokens a second, prefill included"
    )
    report.table(title, columns, rows)
    return report


def main() -> None:
    """`python -m benchmarks.cpu_parity`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a name that `holdfast pull` knows"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--pairs", type=int, default=5, help="repetitions that count")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--threads", type=int, help="of both; by default one for each core")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args()
    report = uvloop.run(compare(arguments))
    if arguments.out is not None:
        report.save(arguments.out)


if __name__ == "__main__":
    main()
