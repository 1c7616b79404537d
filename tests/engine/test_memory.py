"""What is left of a GPU's memory for keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine import models
from services.engine.kv_format import formats_of
from services.engine.memory import Largest, captured_bytes, room_for_cache, run_largest, slot_bytes
from services.engine.models import Model
from services.engine.state import Batch


@pytest.mark.parametrize(("num_tokens", "num_slots"), [(100, 7), (5, 8), (64, 1), (12, 8)])
def test_the_largest_step_has_every_token_and_every_sequence_that_there_may_be(num_tokens: int, num_slots: int) -> None:
    """Decodes, works of one token, stand before the rest; each work has blocks of its own."""
    largest = Largest(num_tokens, num_slots, block_size=16)
    step = largest.step()
    assert step.num_tokens == num_tokens
    assert len(step.works) == min(num_tokens, num_slots) == len(step.admitted)
    assert all(work.samples for work in step.works)
    assert step.num_decodes == sum(work.count == 1 for work in step.works)
    blocks = [block for growth in step.grown for block in growth.blocks]
    assert len(blocks) == len(set(blocks)) == largest.num_blocks
    assert all(len(growth.blocks) * 16 >= work.count for growth, work in zip(step.grown, step.works, strict=True))


def test_the_largest_step_is_computed(stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real model, in a cache of 8 bits too; the model is given all of it, and the sampler everything to do. Its keys and
    values are told, for they have room of their own."""
    model = models.load(stories260k)
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def watched(batch: Batch, *rest: object) -> torch.Tensor:
        seen.append((len(batch.token_ids_N), len(batch.selection)))
        return forward(batch, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "forward", watched)
    shape, num_tokens = model.kv_shape, (7 + 1) * 32  # a block for each sequence, and the spare one
    for format, head_bytes in (("auto", 4 * shape.head_dim), ("int8", shape.head_dim + 4)):
        formats = formats_of(format, num_layers=shape.layers)
        kept = run_largest(model, Largest(100, 7, block_size=32), formats=formats, device=torch.device("cpu"))
        assert kept == num_tokens * shape.layers * 2 * shape.kv_heads * head_bytes
    assert seen == [(100, 7), (100, 7)]


def test_what_is_free_is_shared_between_the_cache_and_everything_else() -> None:
    """Nothing is counted twice, and a cache is never promised less than nothing."""
    parts = {"step": 10, "captured": 5, "slots": 1}
    assert room_for_cache(free=80, total=100, share=0.9, **parts) == 80 - 10 - 10 - 5 - 1
    assert room_for_cache(free=20, total=100, share=0.9, **parts) == 0
    captured = captured_bytes(step=8 << 30, forms=40, logits_rows=300, vocab_size=1000)
    assert captured == (8 << 30) + 4 * 300 * 1000 + (40 * 8 << 20)
    assert slot_bytes(num_slots=3, max_len=100, block_size=64) == 4 * 4 * (100 + 2 + 2 * (1024 + 1152))


def test_a_model_is_all_that_is_needed(stories260k: Path) -> None:
    """Whoever computes it: the largest step is the engine's own."""
    model: Model = models.load(stories260k, implementation="transformers")
    formats = formats_of("auto", num_layers=model.kv_shape.layers)
    run_largest(model, Largest(20, 3, block_size=16), formats=formats, device=torch.device("cpu"))


def test_what_decodes_leave_is_counted_for_the_longest_context() -> None:
    """256 sequences of 131,072 tokens leave 32 chunks each, of 32 heads; few sequences are cut into more."""
    pytest.importorskip("triton")
    from services.engine.graphs import logits_rows, num_forms, scratch_bytes

    assert (
        scratch_bytes(num_slots=256, max_len=131072, heads=32, kv_heads=8, head_dim=128) == 2 * 256 * 32 * 32 * 129 * 4
    )
    assert scratch_bytes(num_slots=1, max_len=131072, heads=32, kv_heads=8, head_dim=128) == 2 * 256 * 32 * 129 * 4
    assert num_forms(num_slots=4, most_tokens=100) == 3 + 4
    assert logits_rows(num_slots=4, most_tokens=100) == 2 * 4 + (1 + 2 + 4) + 4 * 4
    assert num_forms(num_slots=4, most_tokens=2048) == 3 + 21
    assert num_forms(num_slots=4, most_tokens=8192) == 3 + 22  # and the full step
    assert logits_rows(num_slots=4, most_tokens=8192) == 2 * 4 + (1 + 2 + 4) + 22 * 4


@pytest.mark.parametrize("itemsize", [1, 2])
def test_what_decodes_leave_is_never_more_than_was_counted(itemsize: int) -> None:
    """Whatever keys are kept in decides how sequences are cut."""
    pytest.importorskip("triton")
    from services.engine.ops.kernels.decode_attention import chunk_size, most_items, scratch_bytes
    from services.engine.packets import decode_sizes

    for num_sequences in decode_sizes(256):
        for max_len in (500, 8192, 131072):
            chunk = chunk_size(num_sequences, 8, max_len, itemsize=itemsize)
            kept = most_items(num_sequences, max_len, chunk=chunk) * 8 * 4 * (128 + 1) * 4
            counted = scratch_bytes(num_sequences, max_len=max_len, heads=32, kv_heads=8, head_dim=128)
            assert kept <= counted
