"""What the mesh costs: the same requests to the engine alone, to the mesh in one process, and to the mesh on Kafka.

    python -m benchmarks.tax                    # `make bench`; some minutes
    python -m benchmarks.tax --no-kafka         # where there is no Java

All of them run at the same time and are asked in turns, so that what else the machine does meets them alike. The time to
the first token is measured one request at a time with a tiny random model, the throughput at a fixed number of open
requests with a real one. README.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvloop
from tokenizers import Tokenizer

from benchmarks.alone import EngineAlone, engine_alone
from benchmarks.mesh import MeshError, embedded, on_kafka
from benchmarks.options import at_least, clear_errors
from benchmarks.report import Cell, Report, percentile
from holdfast import models
from holdfast.client import Client
from holdfast.events import Tokens

ALONE, EMBEDDED, KAFKA = "engine alone", "mesh, one process", "mesh, Kafka"

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 32}
"""Changes that make a model of a known family tiny; its vocabulary stays."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt for the mesh, which is asked with text, and for the engine, which is asked with ids."""

    text: str
    token_ids: list[int]
    output_tokens: int
    """Of the answer that is asked for."""


class Subject(Protocol):
    """What is measured."""

    async def first_and_last(self, prompt: Prompt) -> tuple[float, float]:
        """Asks for the answer, and returns when the first and the last of its tokens came, in seconds."""
        ...


class Alone:
    """The engine alone."""

    def __init__(self, engine: EngineAlone) -> None:
        self._engine = engine

    async def first_and_last(self, prompt: Prompt) -> tuple[float, float]:
        return await self._engine.first_and_last(prompt.token_ids, prompt.output_tokens)


class Mesh:
    """A mesh, through its gateway."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def first_and_last(self, prompt: Prompt) -> tuple[float, float]:
        start = time.perf_counter()
        first = last = 0.0
        count = 0
        asked = self._client.generate(prompt.text, max_tokens=prompt.output_tokens, ignore_eos=True, temperature=0.0)
        async with asked as answer:
            async for event in answer:
                if isinstance(event, Tokens):
                    last = time.perf_counter() - start
                    first = first or last
                    count += event.num_tokens
        assert count == prompt.output_tokens
        return first, last


@asynccontextmanager
async def subjects(model: Path, engine: Mapping[str, object], *, with_kafka: bool) -> AsyncIterator[dict[str, Subject]]:
    """Everything that is measured, on one model, running."""
    async with AsyncExitStack() as parts:
        enter = parts.enter_async_context
        print(f"starting {ALONE}, {EMBEDDED}{', ' + KAFKA if with_kafka else ''} with {model.name}", flush=True)
        found: dict[str, Subject] = {ALONE: Alone(await enter(engine_alone(model, engine)))}
        found[EMBEDDED] = Mesh(await enter(Client(await enter(embedded(model, engine)))))
        if with_kafka:
            found[KAFKA] = Mesh(await enter(Client(await enter(on_kafka(model, engine)))))
        yield found


async def first_tokens(found: Mapping[str, Subject], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
    """Seconds to the first token of every prompt, each subject asked in turn."""
    times = defaultdict(list)
    for prompt in prompts:
        for name, subject in found.items():
            first, _ = await subject.first_and_last(prompt)
            times[name].append(first)
    return times


async def throughputs(
    found: Mapping[str, Subject], prompts: Sequence[Prompt], *, rounds: int, open_requests: int
) -> dict[str, list[float]]:
    """Output tokens a second in every round, each subject given the prompts of the round in turn."""
    rates = defaultdict(list)
    for number in range(rounds):
        share = prompts[number::rounds]
        for name, subject in found.items():
            start = time.perf_counter()
            await keep_open(subject, share, open_requests=open_requests)
            rates[name].append(sum(each.output_tokens for each in share) / (time.perf_counter() - start))
    return rates


async def keep_open(subject: Subject, prompts: Sequence[Prompt], *, open_requests: int) -> None:
    """Asks all prompts, so many at a time."""
    waiting = iter(prompts)

    async def ask_on() -> None:
        for prompt in waiting:
            await subject.first_and_last(prompt)

    async with asyncio.TaskGroup() as group:
        for _ in range(open_requests):
            group.create_task(ask_on())


def describe_first_tokens(report: Report, times: Mapping[str, list[float]]) -> None:
    rows: list[list[Cell]] = []
    for name, seconds in times.items():
        added = [1000 * (mine - alone) for mine, alone in zip(seconds, times[ALONE], strict=True)]
        row: list[Cell] = [name, *(1000 * percentile(seconds, share) for share in (0.5, 0.9, 0.99))]
        row += [percentile(added, share) for share in (0.5, 0.9, 0.99)] if name != ALONE else [None, None, None]
        rows.append(row)
    columns = ["", "p50", "p90", "p99", "added p50", "added p90", "added p99"]
    report.table("Time to the first token, ms, one request at a time; added: over the engine alone's for the same prompt",
                 columns, rows)  # fmt: skip


def describe_throughputs(report: Report, rates: Mapping[str, list[float]]) -> None:
    rows: list[list[Cell]] = []
    for name, each in rates.items():
        shares = [100 * mine / alone for mine, alone in zip(each, rates[ALONE], strict=True)]
        rows.append([name, percentile(each, 0.5), percentile(shares, 0.5), min(shares), max(shares)])
    columns = ["", "tokens/s", "share %", "lowest %", "highest %"]
    report.table("Output tokens a second; share: of the engine alone's, median of the rounds", columns, rows)


def prompts_for(model: Path, count: int, *, words: int, seed: int, output: tuple[int, int]) -> list[Prompt]:
    """Texts that share no prefix, with the ids that the tokenizer service makes of them, and answers of lengths between
    the two of `output`: were they all alike, the engine alone would go through them in step, and nothing else can."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    vocabulary = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 3)
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(vocabulary, k=words)) for _ in range(count)]
    return [Prompt(text, tokenizer.encode(text).ids, draw.randint(*output)) for text in texts]


def tiny_model(like: Path, folder: Path) -> Path:
    """A folder with a tiny model's config and the other one's tokenizer. It has no weights: load it as `dummy`."""
    made = folder / "tiny"
    made.mkdir()
    for file in like.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (made / file.name).symlink_to(file)
    config = json.loads((like / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | TINY))
    return made


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tax", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="for the throughput (%(default)s)")
    parser.add_argument("--no-kafka", action="store_true", help="leave the mesh on Kafka out")
    parser.add_argument("--threads", type=at_least(1), default=max(1, cores - 1), help="of each engine (%(default)s)")
    parser.add_argument(
        "--requests", type=at_least(1), default=200, help="for the time to the first token (%(default)s)"
    )
    parser.add_argument(
        "--warm", type=int, default=300, help="before them: a broker compiles what it runs often (%(default)s)"
    )
    parser.add_argument("--words", type=at_least(1), default=16, help="words of a prompt (%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="of the throughput (%(default)s)")
    parser.add_argument(
        "--open", type=at_least(1), default=8, help="requests open at all times, for the throughput (%(default)s)"
    )
    parser.add_argument(
        "--output", type=at_least(2), default=48, help="mean tokens of an answer, for the throughput (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    return parser.parse_args(argv)


async def measure(options: argparse.Namespace) -> Report:
    report = Report("tax", settings={key: str(value) for key, value in vars(options).items() if key != "out"})
    model = models.resolve(options.model, progress=print)
    engine = {"threads": options.threads, "cache_bytes": 256 << 20}
    with tempfile.TemporaryDirectory(prefix="holdfast-tax-") as folder:
        tiny = tiny_model(model, Path(folder))
        num_prompts = options.warm + options.requests
        prompts = prompts_for(tiny, num_prompts, words=options.words, seed=options.seed, output=(4, 4))
        async with subjects(tiny, engine | {"load_format": "dummy"}, with_kafka=not options.no_kafka) as found:
            await first_tokens(found, prompts[: options.warm])
            describe_first_tokens(report, await first_tokens(found, prompts[options.warm :]))
    lengths = (options.output // 2, options.output * 3 // 2)
    num_prompts = 2 * options.open * (options.rounds + 1)
    prompts = prompts_for(model, num_prompts, words=options.words, seed=options.seed + 1, output=lengths)
    warm, prompts = prompts[: 2 * options.open], prompts[2 * options.open :]
    async with subjects(model, engine, with_kafka=not options.no_kafka) as found:
        await throughputs(found, warm, rounds=1, open_requests=options.open)
        rates = await throughputs(found, prompts, rounds=options.rounds, open_requests=options.open)
        describe_throughputs(report, rates)
    return report


def main() -> None:
    options = arguments()
    with clear_errors("tax", MeshError):
        report = uvloop.run(measure(options))
    if options.out:
        report.save(options.out)


if __name__ == "__main__":
    main()
