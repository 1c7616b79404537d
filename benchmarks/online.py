"""How a running mesh feels to those who use it: time to the first token, time between tokens, goodput, under open load.

    python -m benchmarks.online --address 127.0.0.1:50051 --rate 2 --requests 100 --prompt 128 --output 64
    python -m benchmarks.online --trace azure2023_conv.csv.gz --requests 100 --scale 0.1 --max-prompt 256 --max-output 64

Requests are sent when they are due, however many are still open, and every time is counted from when the request was due:
a mesh that falls behind cannot hide it by being asked later. Prompts are token ids drawn at random, so that no prefix is
found twice; end-of-sequence tokens are passed over, so that the lengths are those asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.load import Lengths, Request, poisson, token_ids, trace
from benchmarks.report import Cell, Report, percentile
from holdfast.client import DEFAULT_ADDRESS, Client
from holdfast.errors import HoldfastError
from holdfast.events import Model, Tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are in seconds."""

    request: Request
    first_token: float
    """From when the request was due."""
    last_token: float
    """From when the request was due."""
    tokens: int
    error: str = ""
    """The kind of error that ended it; the times then mean nothing."""

    @property
    def per_token(self) -> float:
        """The mean time between two tokens; 0 for an answer of one token."""
        return (self.last_token - self.first_token) / (self.tokens - 1) if self.tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must keep to count as good. Times are in seconds."""

    first_token: float
    per_token: float

    def met(self, outcome: Outcome) -> bool:
        return not outcome.error and outcome.first_token <= self.first_token and outcome.per_token <= self.per_token


async def run(client: Client, model: Model, requests: Sequence[Request], *, timeout: float, seed: int) -> list[Outcome]:
    """Sends every request when it is due and waits for all answers."""
    draw = random.Random(seed)
    prompts = [token_ids(request, vocab_size=model.vocab_size, draw=draw) for request in requests]
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(send(client, model, request, prompt, start=start, timeout=timeout))
            for request, prompt in zip(requests, prompts, strict=True)
        ]
    return [task.result() for task in tasks]


async def send(
    client: Client, model: Model, request: Request, prompt: list[int], *, start: float, timeout: float
) -> Outcome:
    """Waits until the request is due, sends it and reads its answer to the end."""
    due = start + request.due
    await asyncio.sleep(due - time.perf_counter())
    first = last = 0.0
    tokens = 0
    try:
        async with client.generate(
            token_ids=prompt,
            model=model.name,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=0.0,
            timeout=timeout,
        ) as answer:
            async for event in answer:
                if isinstance(event, Tokens):
                    last = time.perf_counter() - due
                    first = first or last
                    tokens += event.num_tokens
    except HoldfastError as error:
        return Outcome(request, first_token=first, last_token=last, tokens=tokens, error=type(error).__name__)
    ended_early = tokens < request.output_tokens
    return Outcome(
        request, first_token=first, last_token=last, tokens=tokens, error="EndedEarly" if ended_early else ""
    )


def describe(report: Report, outcomes: Sequence[Outcome], objectives: Objectives) -> None:
    """Adds the run's tables to the report."""
    good = [outcome for outcome in outcomes if not outcome.error]
    if good:
        # From the first arrival to the last token of all.
        seconds = max(outcome.request.due + outcome.last_token for outcome in good) - outcomes[0].request.due
        met = sum(objectives.met(outcome) for outcome in good)
        report.table(
            "Throughput",
            ["", "value"],
            [
                [
                    "requests sent a second",
                    len(outcomes) / max(outcomes[-1].request.due - outcomes[0].request.due, 1e-9),
                ],
                ["requests answered a second", len(good) / seconds],
                ["prompt tokens a second", sum(outcome.request.prompt_tokens for outcome in good) / seconds],
                ["output tokens a second", sum(outcome.tokens for outcome in good) / seconds],
                [f"goodput, requests a second ({describe_objectives(objectives)})", met / seconds],
                ["requests that met both objectives, %", 100 * met / len(outcomes)],
            ],
        )
        report.table(
            "Latency, ms",
            ["", "p50", "p90", "p99", "max"],
            [
                latency("time to first token", [outcome.first_token for outcome in good]),
                latency("time per output token", [outcome.per_token for outcome in good if outcome.tokens > 1]),
                latency("end to end", [outcome.last_token for outcome in good]),
            ],
        )
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    rows: list[list[Cell]] = [["complete", len(good)]]
    rows += [[kind, count] for kind, count in sorted(errors.items())]
    report.table("Answers", ["", "requests"], rows)


def describe_objectives(objectives: Objectives) -> str:
    return f"first token ≤ {objectives.first_token * 1000:g} ms, per token ≤ {objectives.per_token * 1000:g} ms"


def latency(name: str, seconds: Sequence[float]) -> list[Cell]:
    return [name, *(1000 * percentile(seconds, share) for share in (0.5, 0.9, 0.99, 1.0))]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="the gateway, host:port (%(default)s)")
    parser.add_argument("--model", default="", help="the model's name; by default the only one there is")
    parser.add_argument("--requests", type=int, default=50, help="how many (%(default)s)")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="Poisson arrivals a second, without --trace (%(default)s)"
    )
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens, without --trace (%(default)s)")
    parser.add_argument("--output", type=int, default=32, help="output tokens, without --trace (%(default)s)")
    parser.add_argument("--trace", type=Path, help="a CSV of the Azure LLM inference dataset, plain or gzipped")
    parser.add_argument("--skip", type=int, default=0, help="requests of the trace to leave out first")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times as fast as the trace (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the trace's lengths (%(default)s)")
    parser.add_argument("--max-prompt", type=int, help="longest prompt of the trace, after --scale")
    parser.add_argument("--max-output", type=int, help="longest output of the trace, after --scale")
    parser.add_argument("--slo-ttft", type=float, default=1000.0, help="objective: ms to the first token (%(default)s)")
    parser.add_argument("--slo-tpot", type=float, default=200.0, help="objective: ms per output token (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take (%(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=2, help="requests sent before, one by one, uncounted (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and prompts (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    return parser.parse_args(argv)


def load(options: argparse.Namespace) -> list[Request]:
    if options.trace is not None:
        lengths = Lengths(options.scale, max_prompt=options.max_prompt, max_output=options.max_output)
        return trace(options.trace, options.requests, skip=options.skip, speed=options.speed, lengths=lengths)
    return poisson(
        options.requests,
        rate=options.rate,
        prompt_tokens=options.prompt,
        output_tokens=options.output,
        seed=options.seed,
    )


async def measure(options: argparse.Namespace) -> Report:
    requests = load(options)
    async with Client(options.address) as client:
        models = {model.name: model for model in await client.models()}
        name = options.model or next(iter(models), "")
        if name not in models:
            raise ValueError(f"the mesh serves {', '.join(models) or 'no model'}, not {name or 'any'}")
        model = models[name]
        longest = max(request.prompt_tokens + request.output_tokens for request in requests)
        if longest > model.context_length:
            raise ValueError(
                f"a request has {longest} tokens and {model.name} takes {model.context_length}: "
                "lower --scale, or give --max-prompt and --max-output"
            )
        for index in range(options.warmup):
            await run(client, model, [Request(0.0, 16, 4)], timeout=options.timeout, seed=options.seed - 1 - index)
        report = Report("online", settings={key: str(value) for key, value in vars(options).items() if key != "out"})
        print(f"{len(requests)} requests in {requests[-1].due:.0f} s to {model.name} at {options.address}")
        outcomes = await run(client, model, requests, timeout=options.timeout, seed=options.seed)
    describe(report, outcomes, Objectives(options.slo_ttft / 1000, options.slo_tpot / 1000))
    return report


def main() -> None:
    options = arguments()
    try:
        report = uvloop.run(measure(options))
    except (HoldfastError, ValueError, OSError) as error:
        sys.exit(f"online: {error}")
    if options.out:
        report.save(options.out)


if __name__ == "__main__":
    main()
