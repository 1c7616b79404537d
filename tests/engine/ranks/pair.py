"""Two ranks that compute what they are given, without an engine around them: each drives a scheduler of its own, and both
plan the same steps. Spawned once for many models, as a process takes seconds to import torch."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from services.engine.sequence import Sequence
from services.engine.shard import Shard, meeting_point
from tests.engine.test_model_runner import Engine

PATIENCE = 60.0


class Pair:
    """Both ranks, waiting for work."""

    def __init__(self, ranks: list[Connection]) -> None:
        self._ranks = ranks

    def run(self, folder: Path, *sequences: Sequence, **settings: Any) -> list[Sequence]:
        """These sequences, computed: as the first rank has them, and not otherwise the second."""
        for rank in self._ranks:
            rank.send((folder, sequences, settings))
        for rank in self._ranks:
            assert rank.poll(PATIENCE), "a rank does not answer"
        answers = [rank.recv() for rank in self._ranks]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        first, second = answers
        assert [each.output_ids for each in first] == [each.output_ids for each in second]
        assert [each.output_logprobs for each in first] == [each.output_logprobs for each in second]
        return list(first)


@contextmanager
def pair() -> Iterator[Pair]:
    """A pair of ranks on the CPU."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = zip(*(spawn.Pipe() for _ in range(2)), strict=True)
    with meeting_point() as port:
        processes = [spawn.Process(target=_rank, args=(rank, port, theirs[rank]), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        try:
            yield Pair(list(ours))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _rank(rank: int, port: int, front: Connection) -> None:
    torch.set_num_threads(1)
    shard = Shard(rank, 2)
    shard.join(port, torch.device("cpu"))
    while True:
        folder, sequences, settings = front.recv()
        try:
            Engine(folder, shard=shard, **settings).run(*sequences)
            front.send(sequences)
        except Exception as error:  # noqa: BLE001 - the test must hear of it
            traceback.print_exc()
            front.send(error)
