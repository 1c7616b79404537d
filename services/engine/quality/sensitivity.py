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
from services.engine.models.decoder import Decoder
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
        run = _Run(plain, quantized, Chunk(passage, 0, len(passage.ids)), reference)
        for index, part in enumerate(parts):
            log_probs_RV = checked(run.logits(index).log_softmax(-1), run.chunk, name=f"{name}, only in {part}")
            scores[part].add(log_probs_RV, run.reference_RV, run.next_R)
        if progress is not None:
            progress(done)
    return [
        Sensitivity(part, scores[part].figures(), bytes_of(before), bytes_of(after))
        for part, before, after in zip(parts, plain.parts().values(), quantized.parts().values(), strict=True)
    ]


class _Run:
    """A passage through the unquantized model, and through it with one part exchanged."""

    def __init__(self, plain: Decoder, quantized: Decoder, chunk: Chunk, reference: Forced) -> None:
        self.chunk = chunk
        self._plain, self._quantized = plain, quantized
        self._batch = chunk.batch(reference.cache)
        self._shared = plain.prepare(self._batch, reference.cache)
        self._inputs = [plain.embed(self._batch)]
        """Of each layer, and of the head."""
        for index in range(len(plain.layers)):
            self._inputs.append(self._layer(plain, index, self._inputs[-1]))
        logits_RV = plain.logits(self._inputs[-1], self._batch)
        self.reference_RV = checked(logits_RV.log_softmax(-1), chunk, name=reference.name)
        self.next_R = chunk.next_ids().to(logits_RV.device)

    def logits(self, part: int) -> Tensor:
        """With this part of the quantized model, counted from the embedding on, [R, V]."""
        if part > len(self._plain.layers):
            return self._quantized.logits(self._inputs[-1], self._batch)
        if part == 0:
            x_NI = self._quantized.embed(self._batch)
        else:
            x_NI = self._layer(self._quantized, part - 1, self._inputs[part - 1])
        if torch.equal(x_NI, self._inputs[part]):  # nothing of this part is quantized
            x_NI = self._inputs[-1]
        else:
            for index in range(part, len(self._plain.layers)):
                x_NI = self._layer(self._plain, index, x_NI)
        return self._plain.logits(x_NI, self._batch)

    def _layer(self, model: Decoder, index: int, x_NI: Tensor) -> Tensor:
        """What a layer gives; its keys and values, which it alone reads, take the place of those before."""
        return model.layers[index](x_NI.clone(), *self._shared)  # a layer may add to what it is given
