"""What it costs in steady state that streams hold: the mesh with its protocol, and without.

    python -m benchmarks.protocol --model smollm2-135m-instruct

One embedded mesh, asked in turns with everything as it is, and with what takeovers need taken out: no hashes of prefixes, no
look at epochs, no markers, no claims, no announcements. Nothing else is different, and nobody dies meanwhile. What is compared is the processor time
of the whole process for each token, which other work on the machine does not change much. Where the difference is lost in
noise all the same, further rounds tell how long the process was inside of what is taken out, their timers included: no less than
what it costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar
from unittest import mock

import uvloop

from benchmarks.options import at_least, clear_errors
from benchmarks.report import Report, percentile
from benchmarks.tax import Mesh, Prompt, keep_open, prompts_for
from holdfast import accept, models
from holdfast.bus import TopicPartition
from holdfast.client import Client
from holdfast.ownership import Accepted, Choice, Standing
from holdfast.telemetry import configure_logs
from services.__main__ import serve
from services.engine.emit import Emitter
from services.engine.requests import Request
from services.engine.takeover import Takeover
from services.settings import MeshSettings

T = TypeVar("T")


@contextmanager
def without_protocol() -> Iterator[None]:
    """What an engine and a gateway would do if nobody ever died."""

    def begin(
        takeover: Takeover, partition: TopicPartition, request: Accepted, then: Callable[[Standing], None]
    ) -> str:
        then(Standing([Choice() for _ in range(request.num_choices)], is_new=True))
        return request.request_id

    def announce(emitter: Emitter, requests: Iterable[Request], *, confirmed: Callable[[], None]) -> None:
        confirmed()

    with (
        mock.patch("holdfast.accept.extend_hash", lambda prefix_hash, token_ids: 0),
        mock.patch("holdfast.accept.Epochs.admit", lambda epochs, source, epoch: True),
        mock.patch.object(Takeover, "ask", begin),
        mock.patch.object(Emitter, "announce", announce),
    ):
        yield


class Inside:
    """How long the process is inside of what takeovers need."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts while the block runs."""
        with (
            mock.patch("holdfast.accept.extend_hash", self._timed(accept.extend_hash)),
            mock.patch.object(accept.Epochs, "admit", self._timed(accept.Epochs.admit)),
            mock.patch.object(Takeover, "ask", self._timed(Takeover.ask)),
            mock.patch.object(Emitter, "announce", self._timed(Emitter.announce)),
        ):
            yield

    def _timed(self, function: Callable[..., T]) -> Callable[..., T]:
        def timed(*arguments: object, **named: object) -> T:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


async def measure(options: argparse.Namespace) -> Report:
    report = Report("protocol", settings={key: str(value) for key, value in vars(options).items() if key != "out"})
    model = models.resolve(options.model, progress=print)
    engine = {"threads": options.threads, "device": "cpu", "cache_bytes": 256 << 20}
    gateway = {"address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}
    settings = MeshSettings(model=str(model), engine=engine, gateway=gateway)  # type: ignore[arg-type] # read by pydantic
    prompts = prompts_for(
        model, 2 * options.open, words=16, seed=options.seed, output=(options.output // 2, options.output * 3 // 2)
    )
    costs: dict[bool, list[float]] = {True: [], False: []}
    inside = Inside()
    async with serve(settings) as mesh, Client(mesh.grpc) as client:
        await cost(client, prompts, options)
        for number in range(options.rounds):
            for with_it in (True, False) if number % 2 else (False, True):  # neither is always the first
                with nullcontext() if with_it else without_protocol():
                    costs[with_it].append(await cost(client, prompts, options))
        start = time.process_time()
        with inside.timed():
            for _ in range(options.rounds):
                await cost(client, prompts, options)
        share = inside.seconds / (time.process_time() - start)
    describe(report, costs[True], costs[False], share)
    return report


async def cost(client: Client, prompts: Sequence[Prompt], options: argparse.Namespace) -> float:
    """Microseconds of processor time for each token."""
    num_tokens = sum(prompt.output_tokens for prompt in prompts)
    start = time.process_time()
    await keep_open(Mesh(client), prompts, open_requests=options.open)
    return 1e6 * (time.process_time() - start) / num_tokens


def describe(report: Report, with_it: Sequence[float], without: Sequence[float], share: float) -> None:
    """Adds the table to the report."""
    added = [100 * (mine / other - 1) for mine, other in zip(with_it, without, strict=True)]
    error = statistics.stdev(added) / len(added) ** 0.5 if len(added) > 1 else float("nan")
    report.table(
        "Processor time of the whole mesh for each token, in pairs of rounds",
        ["", "value"],
        [
            ["with the protocol, µs: median", percentile(with_it, 0.5)],
            ["without, µs: median", percentile(without, 0.5)],
            ["added, %: median", statistics.median(added)],
            ["added, %: mean", statistics.mean(added)],
            ["added, %: standard error of the mean", error],
            ["inside of what was taken out, %, timers included", 100 * share],
            ["rounds of each", len(added)],
        ],
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.protocol", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a folder, or the name of a model (%(default)s)"
    )
    parser.add_argument("--threads", type=at_least(1), default=1, help="of the engine (%(default)s)")
    parser.add_argument("--rounds", type=at_least(1), default=20, help="of each (%(default)s)")
    parser.add_argument("--open", type=at_least(1), default=16, help="requests open at all times (%(default)s)")
    parser.add_argument("--output", type=at_least(2), default=64, help="mean tokens of an answer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (%(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    return parser.parse_args(argv)


def main() -> None:
    configure_logs("protocol", level="warning")
    options = arguments()
    with clear_errors("protocol"):
        report = uvloop.run(measure(options))
    if options.out:
        report.save(options.out)


if __name__ == "__main__":
    main()
