"""What matrices cost in each format, measured: the KL divergence from the unquantized model when they alone are kept so.

Matrices of a layer that share their inputs are rounded by the method by which they will be, put into the unquantized model, and a text's
predictions are compared with those it had. The method goes by what the unquantized model gives these matrices, so the text that is shown
passes through it once, however many formats there are, and layers are measured on the way. In memory are one model and a layer more, in float32,
and the predictions for the tokens that are judged.

Weights that multiply activations as they are, are multiplied unpacked: that gives the same, and in float32 a CPU's kernel of four bits is
60 times as slow with many rows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Choice, Options
from services.engine.calibrate.layer import LayerWork
from services.engine.calibrate.observe import Held
from services.engine.calibrate.parts import Sharing, sharings
from services.engine.calibrate.statistics import Moments
from services.engine.calibrate.stream import Stream
from services.engine.models import load
from services.engine.models.decoder import Decoder, Layer
from services.engine.models.spec import ModelSpec
from services.engine.quality.forced import Chunk, Forced, checked
from services.engine.quality.passages import Passage
from services.engine.quality.sensitivity import Run
from services.engine.quant import Format, Weight
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.quant.rules import FORMATS
from services.engine.quant.unquantized import Unquantized
from services.engine.quantize.budget import Item, Option, bits_of
from services.engine.quantize.plan import require_sense
from services.engine.shard import Part
from services.engine.unfinished import read_object, whole
from services.engine.weight_format import EMBEDDING, Method, WeightFormat
from services.engine.weights import Checkpoint, Weights, open_checkpoint

Costs = Mapping[str, float]
"""KL in nats, of a layer's matrices in a format."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured."""

    model: Path
    spec: ModelSpec
    formats: Sequence[WeightFormat]
    method: Method
    options: Options
    dtype: torch.dtype
    """Of scales, and of what is not quantized, as they will be written."""

    def choices(self, layer: int) -> list[Choice]:
        """All that is tried in this layer."""
        return [
            Choice(FORMATS[format], self.method, sharing)
            for sharing in sharings(self.spec, layer)
            for format in self.formats
            if format is not WeightFormat.NONE and _fits(format, sharing)
        ]

    def items(self, costs: Sequence[Costs]) -> list[Item]:
        """With the costs of every layer, what can be chosen."""
        return [
            Item(layer, sharing.names, sum(sharing.outputs) * sharing.inputs, tuple(self._options(sharing, each)))
            for layer, each in enumerate(costs)
            for sharing in sharings(self.spec, layer)
        ]

    def _options(self, sharing: Sharing, costs: Costs) -> Iterator[Option]:
        for format in self.formats:
            if _fits(format, sharing):
                cost = 0.0 if format is WeightFormat.NONE else costs[_key(sharing, format)]
                yield Option(format, bits_of(format, sharing, self.dtype), cost)

    def check(self) -> None:
        """Raises `ConfigurationError` for what cannot be measured, or could not be done afterwards."""
        for layer in range(self.spec.layers):
            for sharing in sharings(self.spec, layer):
                if not any(_fits(format, sharing) for format in self.formats):
                    raise ConfigurationError(
                        f"model.layers.{layer}.{sharing.names[0]}: none of {', '.join(self.formats)} fits its {sharing.inputs} inputs; name "
                        "one that does, or none"
                    )
            for choice in self.choices(layer):
                require_sense(choice, *(f"model.layers.{layer}.{name}" for name in choice.sharing.names))


@torch.inference_mode()
def measured_costs(
    asked: Asked, shown: Sequence[Passage], judged: Sequence[Passage], *, kept: Path, say: Callable[[str], None]
) -> list[Item]:
    """What every matrix costs in every format that fits it. `shown`: what the method goes by, if it goes by a text; `judged`: by what costs are
    taken, passages of one length. `kept`: a file for the costs of finished layers, which are not measured again. Raises
    `ConfigurationError` for what cannot be."""
    asked.check()
    known: dict[str, Costs] = read_object(kept) if kept.is_file() else {}
    count = asked.spec.layers
    missing = [index for index in range(count) if str(index) not in known]
    if missing:
        with open_checkpoint(asked.model, dtype=torch.float32, device=torch.device("cpu")) as checkpoint:
            measuring, begun = _Measuring(asked, checkpoint, shown, judged), time.monotonic()
            for index in range(count):
                if index not in missing:
                    measuring.pass_by(index)
                    continue
                known[str(index)] = measuring.costs(index)
                with whole(kept) as aside:
                    aside.write_text(json.dumps(known))
                done = missing.index(index) + 1
                left = (time.monotonic() - begun) / done * (len(missing) - done)
                say(f"what matrices cost: layer {index + 1} of {count}; about {left:,.0f} s left")
    return asked.items([known[str(index)] for index in range(count)])


class _Measuring:
    """The unquantized model, and the texts on their way through it."""

    def __init__(
        self, asked: Asked, checkpoint: Checkpoint, shown: Sequence[Passage], judged: Sequence[Passage]
    ) -> None:
        self._asked, self._checkpoint = asked, checkpoint
        spec = asked.spec
        plain = load(asked.model, dtype=torch.float32)
        assert isinstance(plain, Decoder), "a model that has a spec is computed natively"
        reference = Forced.of("the model", plain, longest=max(len(passage.ids) for passage in judged))
        reference.check(judged)
        self._runs = [Run(plain, Chunk(passage, 0, len(passage.ids)), reference) for passage in judged]
        self._stream = None
        if any(choice.needs_moments for layer in range(spec.layers) for choice in asked.choices(layer)):
            table_VI = checkpoint.take(f"{EMBEDDING}.weight", spec.vocab_size, spec.hidden)
            self._stream = Stream.begun(spec, shown, table_VI)

    def pass_by(self, index: int) -> None:
        """This layer is known."""
        if self._stream is not None:
            self._stream.advance(Held(self._checkpoint), index, {})

    def costs(self, index: int) -> dict[str, float]:
        """Of the matrices of this layer."""
        held, prefix, choices = Held(self._checkpoint), f"model.layers.{index}", self._asked.choices(index)
        moments = {choice.sharing: Moments(choice.sharing.inputs) for choice in choices if choice.needs_moments}
        if self._stream is not None:
            seen_by = {f"{prefix}.{sharing.names[0]}": each.add for sharing, each in moments.items()}
            self._stream.advance(held, index, seen_by)
        else:
            Layer(held.under(prefix), self._asked.spec, layer=index)  # takes the tensors, and checks their shapes
        return {
            _key(choice.sharing, choice.format.name): self._cost(index, held, choice, moments) for choice in choices
        }

    def _cost(self, index: int, held: Held, choice: Choice, moments: Mapping[Sharing, Moments]) -> float:
        """Of these matrices, all others as they are."""
        asked, prefix = self._asked, f"model.layers.{index}"
        own = {choice.sharing: deepcopy(moments[choice.sharing])} if choice.needs_moments else {}
        work = LayerWork(prefix, asked.spec, dict(held.tensors), [choice], own, asked.options, asked.dtype)
        matrices = work.quantized()
        changed = _Changed(self._checkpoint, work.tensors, matrices, choice.format)
        layer = Layer(changed.under(prefix), asked.spec, layer=index)
        name = f"{choice.format.name}, only in {', '.join(matrices)}"
        return sum(_divergence(run, layer, index, name=name) for run in self._runs) / len(self._runs)


class _Changed(Held):
    """A layer's tensors as a method left them; its matrices in few bits multiply what they will."""

    def __init__(
        self, weights: Weights, tensors: dict[str, Tensor], matrices: Mapping[str, QuantizedMatrix], format: Format
    ) -> None:
        super().__init__(weights)
        self.tensors = tensors
        self._matrices, self._format = matrices, format

    def matrix(self, name: str, outputs: int | Part, inputs: int | Part) -> Weight:
        return self._matrices[name] if name in self._matrices else super().matrix(name, outputs, inputs)

    def format(self, *names: str) -> Format:
        changes = names[0] in self._matrices and self._format.rounds_activations
        return self._format if changes else Unquantized()


def _divergence(run: Run, layer: Layer, index: int, *, name: str) -> float:
    """The mean KL of the predictions with this layer, in nats."""
    logits_RV = run.logits(run.through(layer, index), index + 1)
    log_probs_RV = checked(logits_RV.log_softmax(-1), run.chunk, name=name)
    return float(F.kl_div(log_probs_RV, run.reference_RV, reduction="none", log_target=True).sum(-1).double().mean())


def _key(sharing: Sharing, format: str) -> str:
    return f"{','.join(sharing.names)}={format}"


def _fits(format: WeightFormat, sharing: Sharing) -> bool:
    scheme = FORMATS[format].scheme
    return scheme is None or scheme.fits(sharing.inputs)
