"""A text on its way through a model, of which one layer is in memory at a time.

Shapes: W windows of the text, N tokens of a window, I features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Choice, Options
from services.engine.calibrate.layer import LayerWork
from services.engine.calibrate.observe import Held, See, one_layer
from services.engine.calibrate.parts import Sharing
from services.engine.calibrate.statistics import Magnitudes, Moments
from services.engine.kv_cache import KVCache, KVShape
from services.engine.layers.rotary import Rotary
from services.engine.models.decoder import Layer
from services.engine.models.spec import ModelSpec
from services.engine.ops import attention
from services.engine.quality.forced import BLOCK_SIZE, Chunk
from services.engine.quality.passages import Passage
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.weights import Weights


class Stream:
    """What stands before the next layer, for every token of a text."""

    def __init__(self, spec: ModelSpec, windows: Sequence[Passage], states_WNI: Tensor) -> None:
        """`windows`: all of one length. `states_WNI`: what they are before the next layer, in float32, on the device of layers."""
        self._spec = spec
        self.states_WNI = states_WNI
        length = len(windows[0].ids)
        shape = KVShape(1, spec.kv_heads, spec.head_dim, torch.float32)
        blocks = max(2, -(-length // BLOCK_SIZE))
        self._cache = KVCache(shape, num_blocks=blocks, block_size=BLOCK_SIZE, device=states_WNI.device)
        # The windows are alike but for their tokens, which layers do not see.
        batch = Chunk(windows[0], 0, length).batch(self._cache)
        self._angles = Rotary(spec.rotary, device=states_WNI.device)(batch.positions_N)
        self._batch = batch

    @classmethod
    def begun(
        cls, spec: ModelSpec, windows: Sequence[Passage], table_VI: Tensor, device: torch.device | str = "cpu"
    ) -> Stream:
        """Before the first layer; `table_VI`: the embedding."""
        ids_WN = torch.tensor([list(window.ids) for window in windows], device=table_VI.device)
        return cls(spec, windows, F.embedding(ids_WN, table_VI).float().to(device))

    def see(self, held: Held, index: int, seen_by: Mapping[str, See]) -> None:
        """Shows what the matrices of this layer are given, by the first name of those that share it."""
        self._run(held, index, seen_by, lambda window, x_NI: None)

    def advance(self, held: Held, index: int, seen_by: Mapping[str, See]) -> None:
        """Goes on behind this layer, as its tensors are now. Raises `ConfigurationError` where it gives what is not a number."""
        after_WNI = torch.empty_like(self.states_WNI)
        self._run(held, index, seen_by, lambda window, x_NI: after_WNI[window].copy_(x_NI))
        if not after_WNI.isfinite().all():
            raise ConfigurationError(
                f"model.layers.{index} gives values that are not finite numbers for the calibration text: its weights hold some that "
                "are not, or it overflows"
            )
        self.states_WNI = after_WNI

    def _run(self, held: Held, index: int, seen_by: Mapping[str, See], take: Callable[[int, Tensor], object]) -> None:
        held.seen_by = seen_by
        layer = Layer(held.under(f"model.layers.{index}"), one_layer(self._spec, index), layer=0)
        # Windows of attention differ between layers, so that each makes a plan of its own.
        plan = attention.plan(self._batch, self._cache)
        for window, x_NI in enumerate(self.states_WNI):
            take(window, layer(x_NI.clone(), self._angles, plan, self._cache))  # a layer may add to what it is given


def quantize_layer(
    stream: Stream | None,
    weights: Weights,
    spec: ModelSpec,
    index: int,
    choices: Sequence[Choice],
    *,
    options: Options,
    dtype: torch.dtype,
) -> tuple[Held, dict[str, QuantizedMatrix], dict[str, float]]:
    """One layer of the model in `weights`, which are in float32: its tensors as they are afterwards, the matrices that are in few bits, and
    static scales of activations, by name. The text goes on by the layer as it is then, but for the rounding of activations;
    None: none of the choices needs one. `dtype`: in what scales and norms are written. Raises `ConfigurationError` for what cannot be
    done."""
    prefix = f"model.layers.{index}"
    held = Held(weights)
    moments: dict[Sharing, Moments] = {}
    if any(choice.needs_moments for choice in choices):
        assert stream is not None
        wanted = [choice.sharing for choice in choices if choice.needs_moments]
        moments = {sharing: Moments(sharing.inputs, device=weights.device) for sharing in wanted}
        stream.see(held, index, {f"{prefix}.{sharing.names[0]}": each.add for sharing, each in moments.items()})
    else:
        Layer(held.under(prefix), one_layer(spec, index), layer=0)  # takes the tensors, and checks their shapes
    work = LayerWork(prefix, spec, held.tensors, choices, moments, options, dtype)
    matrices = work.quantized()
    scales: dict[str, float] = {}
    if stream is not None:
        ranges = {
            choice.sharing: Magnitudes(_squares(held, prefix, choice.sharing))
            for choice in choices
            if choice.needs_magnitudes
        }
        stream.advance(held, index, {f"{prefix}.{sharing.names[0]}": each.add for sharing, each in ranges.items()})
        for sharing, each in ranges.items():
            names = tuple(f"{prefix}.{name}" for name in sharing.names)
            scale = each.scale(options.activations, percentile=options.activation_percentile, names=names)
            scales |= dict.fromkeys(names, scale)
    return held, matrices, scales


def _squares(held: Held, prefix: str, sharing: Sharing) -> Tensor:
    """Of the weights that each input of these matrices meets, summed, [I]."""
    weights = [held.tensors[f"{prefix}.{name}.weight"] for name in sharing.names]
    return torch.stack([weight_OI.square().sum(0) for weight_OI in weights]).sum(0)
