"""What each part of a model costs in quality when it alone is quantized.

The unquantized model computes a passage once, and what stands between its layers is kept. A part of the quantized model then takes
the place of its like: it is given what stood before it, and the unquantized model goes on from what it gives. So the parts
before it are not computed again, half of the work, and no model is loaded for each part.

Shapes: N tokens of a passage, I features, R tokens that are judged, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.models import Model
from services.engine.models.decoder import Decoder, Layer
from services.engine.quality.forced import Chunk, Forced, checked, require_one_vocabulary
from services.engine.quality.passages import Passage
from services.engine.quality.scores import Figures, Progress, Scores
from services.engine.quality.sizes import bytes_of


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One part of a model, the others as they were."""

    part: str
    """Its name in the checkpoint: the embedding, a layer, the head."""
    figures: Figures
    plain_bytes: int
    """What it takes unquantized,"""
    quantized_bytes: int
    """and quantized: of the buffers that are there."""


@torch.inference_mode()
def sensitivities(
    plain: Model,
    quantized: Model,
    passages: Sequence[Passage],
    *,
    name: str,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """Of each part, in the model's order. `quantized` may have as many or few quantized matrices as rules can say: what
    of a part is not costs nothing. A passage is computed at once, so its length decides about the memory: a layer's input for
    each layer, and two rows of the vocabulary for each token. `name` is what errors call the quantized model. Raises
    `ConfigurationError` for what cannot be computed or compared."""
    if not isinstance(plain, Decoder) or not isinstance(quantized, Decoder):
        raise ConfigurationError(
            f"{name}: transformers computes this model, whose layers cannot be exchanged; only native ones can"
        )
    longest = max(len(passage.ids) for passage in passages)
    reference = Forced.of("unquantized", plain, longest=longest, device=device)
    require_one_vocabulary([reference, Forced(name, quantized, reference.cache)])
    reference.check(passages)
    parts = list(plain.parts())
    scores = {part: Scores() for part in parts}
    for done, passage in enumerate(passages, 1):
        run = Run(plain, Chunk(passage, 0, len(passage.ids)), reference)
        for index, part in enumerate(parts):
            log_probs_RV = checked(
                _exchanged(run, quantized, index).log_softmax(-1), run.chunk, name=f"{name}, only in {part}"
            )
            scores[part].add(log_probs_RV, run.reference_RV, run.next_R)
        if progress is not None:
            progress(done)
    return [
        Sensitivity(part, scores[part].figures(), bytes_of(before), bytes_of(after))
        for part, before, after in zip(parts, plain.parts().values(), quantized.parts().values(), strict=True)
    ]


class Run:
    """A passage through the unquantized model, which goes on from wherever something is exchanged."""

    def __init__(self, plain: Decoder, chunk: Chunk, reference: Forced) -> None:
        """Of a whole passage. Raises `ConfigurationError` where its predictions are not numbers."""
        self.chunk = chunk
        self.batch = chunk.batch(reference.cache)
        self._plain = plain
        self._shared = plain.prepare(self.batch, reference.cache)
        self._inputs = [plain.embed(self.batch)]
        """Of each layer, and of the head."""
        for index, layer in enumerate(plain.layers):
            self._inputs.append(self.through(layer, index))
        logits_RV = plain.logits(self._inputs[-1], self.batch)
        self.reference_RV = checked(logits_RV.log_softmax(-1), chunk, name=reference.name)
        self.next_R = chunk.next_ids().to(logits_RV.device)

    @property
    def last_NI(self) -> Tensor:
        """What the last layer gives."""
        return self._inputs[-1]

    def through(self, layer: Layer, index: int, x_NI: Tensor | None = None) -> Tensor:
        """What this layer gives in the place of that index, for x or else for what stands before that; its keys and values, which it
        alone reads, take the place of those before."""
        x_NI = self._inputs[index] if x_NI is None else x_NI
        return layer(x_NI.clone(), *self._shared)  # a layer may add to what it is given

    def logits(self, x_NI: Tensor, index: int) -> Tensor:
        """[R, V], with this before the layer of that index."""
        if torch.equal(x_NI, self._inputs[index]):
            x_NI, index = self.last_NI, len(self._plain.layers)
        for other in range(index, len(self._plain.layers)):
            x_NI = self.through(self._plain.layers[other], other, x_NI)
        return self._plain.logits(x_NI, self.batch)


def _exchanged(run: Run, quantized: Decoder, part: int) -> Tensor:
    """Logits with this part of the quantized model, counted from the embedding on, [R, V]."""
    if part > len(quantized.layers):
        return quantized.logits(run.last_NI, run.batch)
    if part == 0:
        return run.logits(quantized.embed(run.batch), 0)
    return run.logits(run.through(quantized.layers[part - 1], part - 1), part)
