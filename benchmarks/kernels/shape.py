"""The kernels of a step of one model, each with inputs of its own: weights, keys and values of noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.costs import (
    DTYPE,
    Cost,
    Load,
    attention_cost,
    experts_cost,
    prepare_cost,
    product_cost,
    rows_bytes,
)
from benchmarks.kernels.timing import Call, copies
from services.engine.batch import Admission, Step
from services.engine.kv_cache import KVCache, KVShape
from services.engine.kv_format import KVFormat
from services.engine.layers.head import Head
from services.engine.layers.linear import Linear
from services.engine.models.spec import ModelSpec, MoESpec
from services.engine.ops import activation, attention, moe, norm, qkv, quantize
from services.engine.ops.forms import Activations, Form, RowScaled, Unnormed, rounds
from services.engine.ops.rotary import angles
from services.engine.quant import Format
from services.engine.quant.fp8 import Fp8
from services.engine.quant.int4 import Int4
from services.engine.quant.int8 import Int8
from services.engine.quant.unquantized import Unquantized
from services.engine.sampler import sampler_for
from services.engine.sequence import SamplingParams, StopRules
from services.engine.shard import ALONE
from services.engine.state import Batch, DeviceState, Selection

LONGEST = 4096
"""Tokens that block tables have room for, as in `offline`."""
BLOCK = 64
KNOWN = 1024
"""Tokens of a sequence that is sampled for, half of them its prompt."""
WISHES = {
    "likeliest": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(),
    "top-k": SamplingParams(top_k=50),
    "top-p": SamplingParams(top_p=0.9),
    "penalties": SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.1),
    "log-probabilities": SamplingParams(temperature=0.0, logprobs=5),
}
FORMATS: dict[str, Format] = {"bf16": Unquantized(), "fp8": Fp8(), "w8a8": Int8(), "w4a16": Int4(128)}

Timed = tuple[Cost, list[Call]]
Made = Callable[[Load], Timed]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One op in one form."""

    name: str
    form: str
    """Of the weights, or of keys and values; empty where there is but one."""
    times: Callable[[Load], int]
    """How often a step has it."""
    make: Callable[[], Made]
    """Makes what all loads share."""

    def among(self, loads: Sequence[Load]) -> list[Load]:
        """Those that have it."""
        return [load for load in loads if self.times(load)]


def always(made: Made) -> Callable[[], Made]:
    """For loads that share nothing."""
    return lambda: made


class Shape:
    """The kernels of one model on one device."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device

    @property
    def formats(self) -> dict[str, Format]:
        """Those that can keep all matrices."""
        inputs = {inputs for _, _, inputs in self.matrices()}
        return {
            name: format
            for name, format in FORMATS.items()
            if format.scheme is None or all(map(format.scheme.fits, inputs))
        }

    def kernels(self) -> Iterator[Kernel]:
        """What a step is made of, in its order."""
        spec = self.spec
        mixtures = 0 if spec.moe is None else len(spec.moe.layers)
        dense = spec.layers - mixtures

        def norms(form: str, load: Load) -> int:
            return 1 + mixtures if self.fuses(load) else 1 + 2 * spec.layers

        def gates(form: str, load: Load) -> int:
            return 0 if self.fuses(load) else dense

        def roundings(form: str, load: Load) -> int:
            return 0 if self.fuses(load) else spec.layers

        def every(layers: int) -> Callable[[Load], int]:
            return lambda _: layers

        def once(load: Load) -> int:
            return int(load.is_decode)

        for form in self.formats:
            yield Kernel("norm", form, partial(norms, form), always(partial(self._norm, form)))
        for name, outputs, inputs in self.matrices():
            times = dense if name in ("gate_up", "down") else spec.layers
            for form in self.formats:
                yield Kernel(name, form, every(times), partial(self._product, name, outputs, inputs, form))
        for format in KVFormat:
            yield Kernel("qkv prepare", format, every(spec.layers), always(partial(self._prepare, format)))
            yield Kernel("attention", format, every(spec.layers), always(partial(self._attention, format)))
        for form in self.formats:
            if form in ("fp8", "w8a8"):
                yield Kernel("quantize", form, partial(roundings, form), always(partial(self._quantize, form)))
        for form in self.formats:
            yield Kernel("gate", form, partial(gates, form), always(partial(self._gate, form)))
        if (moe := spec.moe) is not None:
            router = partial(self._product, "router", moe.num_experts, spec.hidden, "bf16")
            yield Kernel("router", "", every(mixtures), router)
            yield Kernel("experts", "", every(mixtures), partial(self._experts, moe))
        yield Kernel("head", "", once, self._head)
        for name, wish in WISHES.items():
            yield Kernel("sample", name, once, always(partial(self._sample, wish)))

    def fuses(self, load: Load) -> bool:
        """Whether the products of a layer norm and gate what they multiply: a single row on a GPU."""
        return load.tokens == 1 and self.device.type == "cuda"

    def matrices(self) -> list[tuple[str, int, int]]:
        """Name, outputs, inputs of the products of a layer."""
        spec = self.spec
        queries, both = spec.heads * spec.head_dim, 2 * spec.kv_heads * spec.head_dim
        return [
            ("qkv", queries + both, spec.hidden),
            ("o", spec.hidden, queries),
            ("gate_up", 2 * spec.intermediate, spec.hidden),
            ("down", spec.hidden, spec.intermediate),
        ]

    def noise(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device=self.device).normal_(std=size)

    def linears(self, outputs: int, inputs: int, form: str) -> list[Linear]:
        """As many as no cache holds."""
        count = copies(product_cost(0, outputs, inputs, form=form).bytes_, self.device)
        return [Linear(self.noise(outputs, inputs, size=0.02), format=FORMATS[form]) for _ in range(count)]

    def _product(self, name: str, outputs: int, inputs: int, form: str) -> Made:
        """What leads back to the residual is added to it."""
        linears, adds = self.linears(outputs, inputs, form), name in ("o", "down")

        def timed(load: Load) -> Timed:
            fuses = self.fuses(load)
            gates = fuses and name == "gate_up"
            x: Activations = (rows := self.noise(load.tokens, inputs))
            if fuses and name in ("qkv", "gate_up"):
                x = Unnormed(rows, self.noise(inputs), self.spec.norm_eps)
            elif not fuses and rounds(takes := linears[0].takes, load.tokens):
                x = quantize.quantize(rows, takes)
            add = self.noise(load.tokens, outputs) if adds else None
            # Gated, half as many come out.
            cost = product_cost(load.tokens, outputs, inputs, form=form, adds=adds, out=1 if gates else 2)
            return cost, [partial(each.gated, x, None) if gates else partial(each, x, add=add) for each in linears]

        return timed

    def _head(self) -> Made:
        spec = self.spec
        weights = [self.noise(spec.vocab_size, spec.hidden, size=0.02)]
        weights += [weights[0].clone() for _ in range(copies(weights[0].nbytes, self.device) - 1)]
        part = ALONE.part(spec.vocab_size, "tokens")
        heads = [Head(Linear(each, format=FORMATS["bf16"]), each, part=part, shard=ALONE) for each in weights]

        def timed(load: Load) -> Timed:
            x = self.noise(load.tokens, spec.hidden)
            cost = product_cost(load.tokens, spec.vocab_size, spec.hidden, form="bf16", out=4)
            return cost, [partial(head, x) for head in heads]

        return timed

    def takes(self, form: str, inputs: int) -> Form:
        """In what matrices with so many inputs take activations."""
        return Linear(self.noise(64, inputs), format=FORMATS[form]).takes

    def _norm(self, form: str, load: Load) -> Timed:
        hidden, eps, takes = self.spec.hidden, self.spec.norm_eps, self.takes(form, self.spec.hidden)
        x, weight = self.noise(load.tokens, hidden), self.noise(hidden)
        cost = Cost(2 * load.tokens * hidden + 2 * hidden + rows_bytes(load.tokens, hidden, form))
        return cost, [lambda: norm.rms_norm_as(x, weight, eps, takes)]

    def _gate(self, form: str, load: Load) -> Timed:
        size, takes = self.spec.intermediate, self.takes(form, self.spec.intermediate)
        gate_up = self.noise(load.tokens, 2 * size)
        cost = Cost(4 * load.tokens * size + rows_bytes(load.tokens, size, form))
        return cost, [lambda: activation.silu_mul_as(gate_up, takes)]

    def _quantize(self, form: str, load: Load) -> Timed:
        """What attention gives, for the product behind it."""
        width = self.spec.heads * self.spec.head_dim
        x, takes = self.noise(load.tokens, width), self.takes(form, width)
        assert isinstance(takes, RowScaled)
        cost = Cost(2 * load.tokens * width + rows_bytes(load.tokens, width, form))
        return cost, [lambda: quantize.quantize(x, takes)]

    def _prepare(self, format: KVFormat, load: Load) -> Timed:
        spec = self.spec
        cache, batch = self.paged(format, load)
        plan = attention.plan(batch, cache)
        x = self.noise(load.tokens, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        turns = angles(batch.positions_N, torch.rand(spec.head_dim // 2, device=self.device), 1.0)
        weights = (self.noise(spec.head_dim), self.noise(spec.head_dim)) if spec.qk_norm else None
        prepare = partial(qkv.prepare, x, turns, cache, heads=spec.heads, norm_weights=weights, eps=spec.norm_eps)
        calls: list[Call] = [partial(prepare, layer=layer, plan=plan) for layer in range(cache.shape.layers)]
        return prepare_cost(spec, load, format), calls

    def _attention(self, format: KVFormat, load: Load) -> Timed:
        spec = self.spec
        cache, batch = self.paged(format, load)
        plan, q = attention.plan(batch, cache), self.noise(load.tokens, spec.heads, spec.head_dim)
        attend = partial(attention.paged_attention, q, cache, scale=spec.head_dim**-0.5, window=spec.windows[0])
        calls: list[Call] = [partial(attend, layer=layer, plan=plan) for layer in range(cache.shape.layers)]
        return attention_cost(spec, load, format), calls

    def paged(self, format: KVFormat, load: Load) -> tuple[KVCache, Batch]:
        """A cache of noise, with as many layers as it takes copies, and the step."""
        spec, blocks = self.spec, -(-load.context // BLOCK)
        count = copies(attention_cost(spec, load, format).bytes_, self.device)
        shape = KVShape(count, spec.kv_heads, spec.head_dim, DTYPE)
        cache = KVCache(
            shape, num_blocks=load.sequences * blocks, block_size=BLOCK, device=self.device, formats=[format] * count
        )
        for layer in cache.layers:
            layer.kv.copy_(self.noise(*layer.kv.shape, size=1.0 if layer.scales is None else 32.0))
            if layer.scales is not None:
                layer.scales.fill_(1 / 32)
        return cache, self._batch(load, blocks)

    def _batch(self, load: Load, blocks: int) -> Batch:
        count, device = load.sequences, self.device
        tables = torch.zeros(count, max(LONGEST // BLOCK, blocks), dtype=torch.int32, device=device)
        tables[:, :blocks] = torch.randperm(count * blocks, device=device).view(count, blocks)
        positions = torch.arange(load.context - load.queries, load.context, device=device).repeat(count)
        sequences = torch.arange(count, device=device).repeat_interleave(load.queries)
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        return Batch(
            token_ids_N=torch.zeros_like(positions),
            positions_N=positions,
            write_slots_N=tables[sequences, positions // BLOCK] * BLOCK + positions % BLOCK,
            block_tables=tables,
            table_rows_S=torch.arange(count, device=device),
            query_starts=torch.arange(count + 1, dtype=torch.int32, device=device) * load.queries,
            kv_lengths_S=torch.full((count,), load.context, dtype=torch.int32, device=device),
            sample_rows_R=nobody,
            num_decodes=count if load.is_decode else 0,
            query_lens=[load.queries] * count,
            kv_lens=[load.context] * count,
            selection=Selection([], [], nobody, nobody),
        )

    def _experts(self, spec: MoESpec) -> Made:
        hidden, stacks = self.spec.hidden, list[moe.Experts]()

        def timed(load: Load) -> Timed:
            x, logits = self.noise(load.tokens, hidden), self.noise(load.tokens, spec.num_experts)
            cost = experts_cost(spec, hidden, load.tokens, wanted=wanted_experts(logits, spec))
            while len(stacks) < copies(cost.bytes_, self.device):
                stacks.append(moe.Experts.of(*self.stacks(spec)))
            mix = partial(moe.mixture, x, logits, top_k=spec.top_k, normalize=spec.normalize, add=x.clone())
            return cost, [partial(mix, experts=experts) for experts in stacks]

        return timed

    def stacks(self, spec: MoESpec) -> tuple[Tensor, Tensor]:
        """The matrices of a layer's experts: gate and up, and down."""
        gate_up = self.noise(spec.num_experts, 2 * spec.intermediate, self.spec.hidden, size=0.02)
        return gate_up, self.noise(spec.num_experts, self.spec.hidden, spec.intermediate, size=0.02)

    def _sample(self, wish: SamplingParams, load: Load) -> Timed:
        rows, vocab = load.tokens, self.spec.vocab_size
        logits = torch.randn(rows, vocab, device=self.device)
        return Cost(4 * rows * vocab), [sampling_call(logits, wish)]


def sampling_call(logits_RV: Tensor, wish: SamplingParams) -> Call:
    """The tokens of rows that all ask for the same."""
    rows, device = len(logits_RV), logits_RV.device
    state = DeviceState(num_slots=rows, max_len=KNOWN + 1, block_size=BLOCK, device=device)
    prompt = [7 * each % logits_RV.shape[1] for each in range(KNOWN)]
    admission = Admission(0, prompt, num_prompt=KNOWN // 2, choice=0, sampling=wish, stop=StopRules(1))
    state.update(Step(0, (), admitted=tuple(replace(admission, slot=slot) for slot in range(rows))))
    slots = torch.arange(rows, device=device)
    positions = torch.full_like(slots, KNOWN)
    selection = Selection(slots.tolist(), positions.tolist(), slots, positions)
    sampler = sampler_for(state)
    return lambda: sampler(logits_RV, selection)


def wanted_experts(logits_NE: Tensor, spec: MoESpec) -> int:
    """How many different experts these tokens go to."""
    _, experts_NA = moe.route(logits_NE, top_k=spec.top_k, normalize=spec.normalize)
    return int(torch.bincount(experts_NA.flatten(), minlength=spec.num_experts).count_nonzero())
