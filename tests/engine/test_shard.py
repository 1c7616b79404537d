"""What of a model is whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from holdfast.errors import ConfigurationError
from services.engine.shard import ALONE, Part, Shard
from services.engine.weights import Dummy, Weights, open_checkpoint

CPU = torch.device("cpu")


def shards(count: int) -> list[Shard]:
    return [Shard(rank, count) for rank in range(count)]


@pytest.mark.parametrize(("of", "count"), [(8, 1), (8, 2), (8, 8), (5, 2), (97, 4)])
def test_parts_cover_everything_once(of: int, count: int) -> None:
    """In the order of the ranks, all but the last equally large."""
    parts = [shard.part(of, "places") for shard in shards(count)]
    assert [place for part in parts for place in range(part.start, part.start + part.count)] == list(range(of))
    assert len({part.count for part in parts[:-1]}) <= 1
    for part in parts:
        assert sorted([*part.others, *range(part.start, part.start + part.count)]) == list(range(of))


def test_fewer_than_ranks_are_shared_by_neighbours() -> None:
    """Key-value heads: the queries of a rank all belong to its one."""
    assert [shard.shared_part(2, "heads") for shard in shards(4)] == [Part(0, 1, 2)] * 2 + [Part(1, 1, 2)] * 2
    assert [shard.shared_part(4, "heads") for shard in shards(2)] == [Part(0, 2, 4), Part(2, 2, 4)]


def test_what_does_not_divide_is_refused() -> None:
    """Heads, key-value heads, and fewer places than ranks; with the numbers of ranks that would do."""
    with pytest.raises(
        ConfigurationError,
        match="tensor_parallel is 2, but the model's 9 heads cannot be shared evenly by so many, only by 1 or 3$",
    ):
        Shard(0, 2).even_part(9, "heads")
    with pytest.raises(
        ConfigurationError,
        match="tensor_parallel is 4, but the model's 3 heads cannot be shared evenly by so many, only by 1, 3 or 6$",
    ):
        Shard(0, 4).shared_part(3, "heads")
    with pytest.raises(
        ConfigurationError,
        match="tensor_parallel is 3: too many for the model's 4 experts, which can be shared by 1, 2 or 4$",
    ):
        Shard(2, 3).part(4, "experts")


def test_the_only_rank_asks_nobody() -> None:
    """It needs no process group, and gets back what it gave."""
    x = torch.ones(2, 3)
    assert ALONE.all_reduce(x) is x
    assert ALONE.all_gather(x, Part(0, 3, 3)) is x
    assert (ALONE.least(7, CPU), ALONE.once(x) is x, Shard(1, 2).once(x)) == (7, True, None)


@pytest.mark.parametrize("kind", ["checkpoint", "dummy"])
def test_a_part_of_a_matrix_is_read_as_of_the_whole(kind: str, tmp_path: Path) -> None:
    """Of rows and of columns, from a file and of noise; what another rank has is not missed."""
    save_file({"a.weight": torch.randn(6, 8), "b.weight": torch.randn(2)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path, dtype=torch.float32, device=CPU) as checkpoint:
        weights: Weights = checkpoint if kind == "checkpoint" else Dummy(dtype=torch.float32, device=CPU)
        whole = weights.take("a.weight", 6, 8)
        assert torch.equal(weights.take("a.weight", Part(2, 3, 6), 8), whole[2:5])
        assert torch.equal(weights.take("a.weight", 6, Part(4, 4, 8)), whole[:, 4:])
        checkpoint.take("a.weight", 6, 8)
        with pytest.raises(ConfigurationError, match="no place for: b.weight"):
            checkpoint.finish()
        checkpoint.leave("b")
        checkpoint.finish()
        with pytest.raises(ConfigurationError, match=r"has shape \[6, 8\], but the config makes it \[6, 10\]"):
            checkpoint.take("a.weight", 6, Part(5, 5, 10))
