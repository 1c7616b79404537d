"""Ours against transformers' `generate` on the same CPU, model, prompts and number of threads.

    python -m benchmarks.cpu_parity
    python -m benchmarks.cpu_parity --dtypes bfloat16 --batches 1,16 --pairs 9 --out results/cpu_parity.json

Each pair computes the same prompts with both, one right after the other, and who is first alternates: what else the
machine does meets both alike. Both compute one token of each prompt (prefill), then as many as asked for; the difference is
decode. Each has a process of its own: the idle OpenMP workers of one would slow the other. A ratio is theirs / ours of one pair, and the median of the pairs is what counts. Greedy. Goals in bfloat16: decode
1.4 times as fast at batch 1, 1.8 at batch 16; nothing ever slower.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
import uvloop

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.options import at_least, batches, run
from benchmarks.report import Report
from holdfast import models

GOALS = {("bfloat16", 1): 1.4, ("bfloat16", 16): 1.8}

DECODE, PREFILL, WHOLE = attrgetter("decode"), attrgetter("prefill"), attrgetter("whole")


class Theirs:
    """transformers, as its documentation says to use it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        logging: Any = transformers.utils.logging
        logging.disable_progress_bar()
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        # No answer ends early. An end-of-sequence token is a token like any other, as it is for our engine here;
        # `min_new_tokens` would have it passed over, and the answers would part where it is the likeliest.
        self._model.generation_config.eos_token_id = None

    def answers(self, prompts: Sequence[list[int]], output_tokens: int) -> list[list[int]]:
        """The continuations of prompts of one length."""
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": output_tokens}
        with torch.inference_mode():
            found = self._model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        answers: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return answers


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds that one of the two took."""

    prefill: float
    """For one token of each prompt."""
    whole: float
    """For all tokens."""

    @property
    def decode(self) -> float:
        return self.whole - self.prefill


@dataclass(slots=True)
class Pairs:
    """The turns of both, pair by pair."""

    ours: list[Turn] = field(default_factory=list)
    theirs: list[Turn] = field(default_factory=list)
    num_equal: int = 0
    num_tokens: int = 0

    def ratios(self, part: Callable[[Turn], float]) -> list[float]:
        """Theirs / ours, lowest first."""
        return sorted(part(theirs) / part(ours) for ours, theirs in zip(self.ours, self.theirs, strict=True))

    def compare(self, ours: Sequence[list[int]], theirs: Sequence[list[int]]) -> None:
        """Counts the tokens up to the first difference of each answer."""
        for our, their in zip(ours, theirs, strict=True):
            same = [a == b for a, b in zip(our, their, strict=True)]
            self.num_equal += same.index(False) if False in same else len(same)
            self.num_tokens += len(same)


@contextmanager
def apart(folder: Path, dtype: torch.dtype, threads: int | None) -> Iterator[Callable[..., list[list[int]]]]:
    """`Theirs.answers` in a process of its own, for one caller at a time."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, folder, dtype, threads), daemon=True)
    process.start()

    def answers(prompts: Sequence[list[int]], output_tokens: int) -> list[list[int]]:
        here.send((prompts, output_tokens))
        found: list[list[int]] = here.recv()
        return found

    try:
        there.close()
        yield answers
    finally:
        process.kill()
        process.join()


def _serve(connection: Connection, folder: Path, dtype: torch.dtype, threads: int | None) -> None:
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    theirs = Theirs(folder, dtype)
    while True:
        connection.send(theirs.answers(*connection.recv()))


Answers = Callable[[Sequence[list[int]], int], Awaitable[list[list[int]]]]


async def turn(answers: Answers, prompts: Sequence[list[int]], output_tokens: int) -> tuple[Turn, list[list[int]]]:
    """One turn, and what was answered."""
    start = time.perf_counter()
    await answers(prompts, 1)
    between = time.perf_counter()
    answered = await answers(prompts, output_tokens)
    return Turn(between - start, time.perf_counter() - between), answered


async def measure(
    engine: EngineAlone, theirs: Callable[..., list[list[int]]], arguments: argparse.Namespace, *, batch: int
) -> Pairs:
    """All pairs of one batch size; the first of them is thrown away."""
    both: dict[str, Answers] = {
        "ours": lambda prompts, output_tokens: engine.answers(prompts, [output_tokens] * batch),
        "theirs": lambda prompts, output_tokens: asyncio.to_thread(theirs, prompts, output_tokens),
    }
    draw, pairs = random.Random(0), Pairs()
    for number in range(arguments.pairs + 1):
        prompts = [[draw.randrange(10, engine.vocab_size - 10) for _ in range(arguments.prompt)] for _ in range(batch)]
        order = ("ours", "theirs") if number % 2 else ("theirs", "ours")
        turns = {who: await turn(both[who], prompts, arguments.output) for who in order}
        if number:
            pairs.ours.append(turns["ours"][0])
            pairs.theirs.append(turns["theirs"][0])
            pairs.compare(turns["ours"][1], turns["theirs"][1])
    return pairs


def row(dtype: str, batch: int, pairs: Pairs, output: int) -> list[str | float]:
    """What one dtype and batch size came to."""
    decode, prefill, whole = (pairs.ratios(part) for part in (DECODE, PREFILL, WHOLE))
    tokens = batch * (output - 1)
    goal = GOALS.get((dtype, batch), 1.0)
    reached = statistics.median(decode) >= goal and min(map(statistics.median, (prefill, whole))) >= 1
    return [
        dtype,
        str(batch),
        tokens / statistics.median(map(DECODE, pairs.ours)),
        tokens / statistics.median(map(DECODE, pairs.theirs)),
        statistics.median(decode),
        f"{decode[0]:.2f} to {decode[-1]:.2f}",
        f"≥ {goal}{'' if reached else ', MISSED'}",
        statistics.median(prefill),
        statistics.median(whole),
        f"{pairs.num_equal / pairs.num_tokens:.0%}",
    ]


async def compare(arguments: argparse.Namespace) -> Report:
    """The whole comparison."""
    folder = models.resolve(arguments.model)
    report = Report("cpu_parity", settings={**vars(arguments), "out": None, "model": folder.name})
    rows = []
    for dtype in arguments.dtypes.split(","):
        settings = {
            "device": "cpu",
            "dtype": dtype,
            "threads": arguments.threads,
            "max_sequences": max(arguments.batches),
            "prefix_cache": False,
            "itl_target_ms": 1e6,
        }
        with apart(folder, getattr(torch, dtype), arguments.threads) as theirs:
            async with engine_alone(folder, settings) as engine:
                found = {batch: await measure(engine, theirs, arguments, batch=batch) for batch in arguments.batches}
        rows += [row(dtype, batch, pairs, arguments.output) for batch, pairs in found.items()]
    columns = ["dtype", "batch", "ours tok/s", "theirs tok/s", "ratio", "of the pairs", "goal", "prefill ratio"]
    columns += ["whole ratio", "same tokens"]
    title = f"{folder.name}: {arguments.prompt} tokens in, {arguments.output} out; tokens a second and ratio of decode"
    report.table(title, columns, rows)
    return report


def main() -> None:
    """`python -m benchmarks.cpu_parity`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="smollm2-135m-instruct", help="a folder, or a name that `holdfast pull` knows"
    )
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", type=batches, default="1,16")
    parser.add_argument("--pairs", type=at_least(1), default=5, help="repetitions that count")
    parser.add_argument("--prompt", type=at_least(1), default=64, help="tokens of each prompt")
    parser.add_argument("--output", type=at_least(2), default=64, help="tokens of each answer")
    parser.add_argument("--threads", type=at_least(1), help="of both; by default one for each core")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    arguments = parser.parse_args()
    run("cpu_parity", lambda: uvloop.run(compare(arguments)), out=arguments.out)


if __name__ == "__main__":
    main()
