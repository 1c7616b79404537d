"""How much of a GPU's memory is left for keys and values.

What steps need beside weights and cache is found by running the largest one there can be, with a cache just large enough
for it, before the real one is made: as many tokens as a step may have, as many rows to sample as there are sequences, all
of which ask for everything that the sampler can do.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from services.engine.batch import Admission, Growth, Step, Work
from services.engine.kv_cache import KVCache
from services.engine.kv_format import KVFormat
from services.engine.model_runner import Eager
from services.engine.models import Model
from services.engine.sampler import sampler_for
from services.engine.sequence import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams, StopRules
from services.engine.state import DeviceState

FORM_BYTES = 8 << 20
"""What a captured form of a step takes beside what it computes in; not measured yet."""

_EVERYTHING = SamplingParams(
    temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, presence_penalty=0.1, frequency_penalty=0.1,
    repetition_penalty=1.1, logit_bias=((0, 1.0),), logprobs=20,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest step of an engine."""

    num_tokens: int
    num_slots: int
    block_size: int

    @property
    def num_works(self) -> int:
        return min(self.num_slots, self.num_tokens)

    @property
    def longest(self) -> int:
        """Tokens of its longest work."""
        return -(-self.num_tokens // self.num_works)

    @property
    def blocks_each(self) -> int:
        return -(-self.longest // self.block_size)

    @property
    def num_blocks(self) -> int:
        return self.num_works * self.blocks_each

    def step(self) -> Step:
        """Prompts of nearly one length, each of which samples."""
        few, more = divmod(self.num_tokens, self.num_works)
        counts = [few + (slot < more) for slot in range(self.num_works)]
        order = sorted(range(self.num_works), key=lambda slot: counts[slot] != 1)  # decodes before the rest
        blocks = [range(slot * self.blocks_each, (slot + 1) * self.blocks_each) for slot in range(self.num_works)]
        rules = StopRules(2, min_tokens=2, stop_token_ids=frozenset({0}))
        return Step(
            0,
            tuple(Work(slot, 0, counts[slot], True) for slot in order),
            admitted=tuple(
                Admission(slot, [0] * counts[slot], num_prompt=counts[slot], choice=0, sampling=_EVERYTHING, stop=rules)
                for slot in order
            ),
            grown=tuple(Growth(slot, 0, tuple(blocks[slot])) for slot in order),
        )


@torch.inference_mode()
def run_largest(model: Model, largest: Largest, *, formats: Seq[KVFormat], device: torch.device) -> int:
    """Computes the largest step, and forgets it. Returns the bytes that its keys and values took."""
    cache = KVCache(
        model.kv_shape,
        num_blocks=largest.num_blocks,
        block_size=largest.block_size,
        device=device,
        formats=formats,
    )
    # A place more, for what is sampled.
    state = DeviceState(
        num_slots=largest.num_works, max_len=largest.longest + 1, block_size=largest.block_size, device=device
    )
    Eager(model, cache, state, sampler_for(state)).run(largest.step())
    return cache.data.nbytes


def step_bytes(model: Model, largest: Largest, *, formats: Seq[KVFormat], device: torch.device) -> int:
    """Bytes of a GPU that the largest step takes beside weights, keys and values."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    keys_and_values = run_largest(model, largest, formats=formats, device=device)
    torch.cuda.synchronize(device)
    taken = torch.cuda.max_memory_reserved(device) - before - keys_and_values
    torch.cuda.empty_cache()
    return taken


def room_for_cache(*, free: int, total: int, share: float, step: int, captured: int, slots: int) -> int:
    """Bytes for keys and values, 0 where there are none: of what is free, all but the part of the whole that is not the
    engine's, what a step takes, what captured steps take, and what is known of the sequences in the slots."""
    return max(0, free - round(total * (1 - share)) - step - captured - slots)


def captured_bytes(*, step: int, forms: int, logits_rows: int, vocab_size: int) -> int:
    """Bytes that captured steps take: memory that all compute in, `logits_rows` of logits in all, and what each of the
    forms takes by itself. The largest step is captured too, and its memory stays with the graphs: they hold a `step` beside that of
    the steps that are not replayed."""
    return step + 4 * logits_rows * vocab_size + forms * FORM_BYTES


def slot_bytes(*, num_slots: int, max_len: int, block_size: int) -> int:
    """Bytes of the `DeviceState`: tokens, block tables, and what may be added to logits."""
    additions = 2 * (MAX_LOGIT_BIAS + MAX_STOP_TOKENS)
    return 4 * (num_slots + 1) * (max_len + -(-max_len // block_size) + additions)
