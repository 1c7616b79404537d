"""What a benchmark sends: requests with their lengths, and when each is due.

The lengths and the arrivals of a real trace, or Poisson arrivals with one length. All of it is drawn from a seed, so that
two runs send the same.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a load."""

    due: float
    """Seconds after the start of the run."""
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """How the lengths of a trace become those of a load: multiplied, then cut. A trace of a data centre's models is too
    long for a small model on a CPU."""

    scale: float = 1.0
    max_prompt: int | None = None
    max_output: int | None = None

    def prompt(self, tokens: int) -> int:
        return _scaled(tokens, self.scale, self.max_prompt)

    def output(self, tokens: int) -> int:
        return _scaled(tokens, self.scale, self.max_output)


def _scaled(tokens: int, scale: float, most: int | None) -> int:
    scaled = max(1, round(tokens * scale))
    return scaled if most is None else min(scaled, most)


def poisson(count: int, *, rate: float, prompt_tokens: int, output_tokens: int, seed: int) -> list[Request]:
    """`count` requests of one length, `rate` a second on average, independent of one another."""
    draw = random.Random(seed)
    requests = []
    due = 0.0
    for _ in range(count):
        due += draw.expovariate(rate)
        requests.append(Request(due, prompt_tokens, output_tokens))
    return requests


def trace(file: Path, count: int, *, skip: int, speed: float, lengths: Lengths) -> list[Request]:
    """`count` requests of a trace in the form of the Azure LLM inference dataset (github.com/Azure/AzurePublicDataset: CSV
    with the columns TIMESTAMP, ContextTokens, GeneratedTokens; plain or gzipped), the first `skip` of it left out. They
    come `speed` times as fast as they were recorded.

    Raises:
        ValueError: the file is not of this form, or has too few requests.
    """
    rows = list(islice(_rows(file), skip, skip + count))
    if len(rows) < count:
        raise ValueError(f"{file} has {len(rows)} requests after the first {skip}, and {count} were asked for")
    start = rows[0][0]
    return [
        Request((at - start).total_seconds() / speed, lengths.prompt(context), lengths.output(generated))
        for at, context, generated in rows
    ]


def _rows(file: Path) -> Iterator[tuple[datetime, int, int]]:
    with gzip.open(file, "rt", newline="") if file.suffix == ".gz" else file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
        if not wanted <= set(reader.fieldnames or ()):
            raise ValueError(f"{file} has no columns {', '.join(sorted(wanted))}: not a trace of the Azure dataset")
        for row in reader:
            # Seven digits of fractional seconds, of which Python reads six.
            yield datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"])


def token_ids(request: Request, *, vocab_size: int, draw: random.Random) -> list[int]:
    """A prompt that shares no prefix with any other. The lowest ids are left out: special tokens and single bytes lie
    there in the vocabularies we know."""
    return [draw.randrange(min(512, vocab_size // 2), vocab_size) for _ in range(request.prompt_tokens)]
