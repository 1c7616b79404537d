"""From a model's folder to one in few bits, layer by layer."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from services.engine.calibrate.choice import Options
from services.engine.calibrate.scales import Search
from services.engine.calibrate.stream import Stream, quantize_layer
from services.engine.layers.linear import named
from services.engine.models import dtype_of
from services.engine.models.spec import ModelSpec, read_config
from services.engine.quality.passages import Passage, text_of, tokenizer_of, windows_of
from services.engine.quant.matrix import QuantizedMatrix
from services.engine.quant.readers.source import FLOATS
from services.engine.quant.rules import Rules
from services.engine.quantize.budget import Assignment, best
from services.engine.quantize.compressed_tensors import config_of, tensors_of
from services.engine.quantize.costs import Asked, measured_costs
from services.engine.quantize.plan import Plan, Table, plan_of
from services.engine.quantize.shards import MOST_BYTES, copy_others, gather
from services.engine.quantize.work import WorkFolder
from services.engine.weight_format import EMBEDDING, GROUP_FILES, HEAD, Method, WeightFormat
from services.engine.weights import INDEX_FILE, INV_FREQ, Checkpoint, gguf_file, open_checkpoint

Say = Callable[[str], None]
"""Is told in short lines what is going on."""

NORM = "model.norm"

_DECIDING = ("config.json", "tokenizer.json", INDEX_FILE)
"""Files beside weights by which the same weights become another checkpoint."""

_CHARACTERS_PER_TOKEN = 16
"""More than any text has: so much of a file is looked at."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a model is shown."""

    windows: Sequence[Passage]
    rest: Sequence[Passage]
    """What follows them in the file, for judging."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Rules are to be found."""

    bits: float
    """Of a weight of layers' matrices."""
    formats: tuple[WeightFormat, ...]
    """Among which is chosen."""
    num_tokens: int
    """By how many of the text."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked for."""

    model: Path
    rules: str
    """As `weight_format` has them, or the name of a file of groups; empty as long as they are to be found."""
    budget: Budget | None = None
    method: Method = Method.ABSMAX
    """Where rules do not say it."""
    options: Options = field(default_factory=Options)
    text: Path | None = None
    num_tokens: int = 32768
    window: int | None = None
    """Tokens of a context; None: 1,024, or as many as the model takes."""

    def plan(self) -> Plan:
        """For each matrix. Raises `ConfigurationError` for what cannot be done to this model."""
        plan = plan_of(self.spec(), Rules(self.rules, methods=tuple(Method)), self.method)
        if plan.needs_text and self.text is None:
            raise ConfigurationError(
                "the model must be shown a text for this (smoothquant, awq, gptq and int8-static need one): give one with --calibrate"
            )
        return plan

    def spec(self) -> ModelSpec:
        """Of the model. Raises `ConfigurationError` if it is not computed natively, or in few bits already."""
        config = read_config(self.model)
        if method := (config.get("quantization_config") or {}).get("quant_method"):
            raise ConfigurationError(
                f"{self.model} is quantized already ({method}); give the model that it was made of"
            )
        if (path := gguf_file(self.model)) is not None:
            raise ConfigurationError(f"{path} is a GGUF file; give a model whose weights are safetensors")
        return ModelSpec.from_config(config)

    def within_budget(self, work: WorkFolder, text: Text, *, say: Say) -> Assignment:
        """The best rules that keep the budget. Raises `ConfigurationError` if none does."""
        assert self.budget is not None
        count, length = self.budget.num_tokens, len(text.windows[0].ids)
        few = [Passage(window.ids[:count]) for window in text.windows[: max(1, count // length)]]
        dtype = dtype_of(read_config(self.model))
        asked = Asked(self.model, self.spec(), self.budget.formats, self.method, self.options, dtype)
        return best(measured_costs(asked, text.windows, few, kept=work.costs, say=say), self.budget.bits)

    def windows(self, spec: ModelSpec, *, more: int = 0) -> Text:
        """The text, and so many tokens more, in windows. Raises `ConfigurationError` where it is no text, or too short."""
        assert self.text is not None
        window = min(1024, spec.max_positions) if self.window is None else self.window
        if window > spec.max_positions:
            raise ConfigurationError(f"a window of {window:,} tokens: the model takes {spec.max_positions:,}")
        wanted, content = self.num_tokens + more, text_of(self.text)
        content = content[: _CHARACTERS_PER_TOKEN * wanted]
        found = windows_of(content, tokenizer_of(self.model), length=window, most_tokens=wanted, name=self.text)
        count = max(1, self.num_tokens // window)
        if len(found) < count:
            raise ConfigurationError(
                f"{self.text} is too short: it fills {len(found):,} windows of {window:,} tokens, and {count:,} are asked for; give more "
                "text, or ask for fewer tokens"
            )
        largest = max(max(passage.ids) for passage in found)
        if largest >= spec.vocab_size:
            raise ConfigurationError(
                f"{self.model}: its tokenizer gives the token {largest:,}, and the model has only {spec.vocab_size:,}"
            )
        return Text(found[:count], found[count:])

    def command(self) -> dict[str, Any]:
        """All that work depends on, so that it can be gone on with. The bits of a budget do not belong to it: they only choose by what has
        been measured."""
        files = sorted(self.model.glob("*.safetensors"))
        rules = Path(self.rules).read_text() if self.rules.endswith(GROUP_FILES) else self.rules
        return {
            "model": str(self.model.resolve()),
            "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
            **{name: _digest(self.model / name) for name in _DECIDING},
            "rules": rules,
            "budget": self.budget and {"formats": self.budget.formats, "tokens": self.budget.num_tokens},
            "method": self.method,
            "options": asdict(self.options),
            "text": None if self.text is None else _digest(self.text),
            "tokens": self.num_tokens,
            "window": self.window,
        }


@torch.inference_mode()
def quantize_model(job: Job, plan: Plan, work: WorkFolder, text: Text | None, *, say: Say) -> Path:
    """The checkpoint, whole, in the work folder; what is done there already is taken as it is. Raises `ConfigurationError` for what
    cannot be done, and leaves finished layers."""
    config = read_config(job.model)
    with open_checkpoint(job.model, dtype=torch.float32, device=torch.device("cpu")) as checkpoint:
        maker = _Maker(job, plan, work, checkpoint, dtype_of(config))
        maker.layers(text, say)
        maker.rest()
    folder = work.path / "checkpoint"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    gather([work.path / "rest.safetensors", *work.layers(plan.spec.layers)], folder, most_bytes=MOST_BYTES)
    described = config_of(plan.names(), others=_mixtures(plan.spec))
    content = {**config, "quantization_config": described}
    if plan.unties:
        content["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(content, indent=2))
    copy_others(job.model, folder)
    return folder


class _Maker:
    """Reads, changes, writes."""

    def __init__(self, job: Job, plan: Plan, work: WorkFolder, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._job, self._plan, self._work, self._checkpoint, self._dtype = job, plan, work, checkpoint, dtype

    def layers(self, text: Text | None, say: Say) -> None:
        """Those that are not finished yet."""
        count, done = self._plan.spec.layers, self._work.num_done
        if done == count:
            return
        if done:
            say(f"{done} of {count} layers are there already")
        stream = None if text is None else self._stream(text, done)
        begun = time.monotonic()
        for index in range(done, count):
            self._layer(stream, index)
            took = time.monotonic() - begun
            left = took / (index + 1 - done) * (count - index - 1)
            say(f"layer {index + 1} of {count}; about {left:,.0f} s left")

    def rest(self) -> None:
        """Embedding, head and the norm between."""
        plan = self._plan
        tensors = {f"{NORM}.weight": self._original(f"{NORM}.weight")}
        tensors |= self._table(EMBEDDING, EMBEDDING, plan.embedding)
        if plan.unties or not plan.spec.tied:
            tensors |= self._table(EMBEDDING if plan.spec.tied else HEAD, HEAD, plan.head)
        self._work.save(self._work.path / "rest.safetensors", tensors)

    def _stream(self, text: Text, done: int) -> Stream:
        if done:
            return Stream(self._plan.spec, text.windows, self._work.states(done))
        stream = Stream.begun(self._plan.spec, text.windows, self._embedded())
        self._work.keep_states(0, stream.states_WNI)
        return stream

    def _layer(self, stream: Stream | None, index: int) -> None:
        choices = self._plan.layers[index]
        held, matrices, scales = quantize_layer(
            stream,
            self._checkpoint,
            self._plan.spec,
            index,
            choices,
            options=self._job.options,
            dtype=self._dtype,
        )
        formats = {f"model.layers.{index}.{name}": choice.format for choice in choices for name in choice.sharing.names}
        tensors: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            tensors |= tensors_of(name, matrix, formats[name], dtype=self._dtype, input_scale=scales.get(name))
        tensors |= self._others(index, held.tensors, frozenset(f"{name}.weight" for name in matrices))
        self._work.keep(index, tensors, None if stream is None else stream.states_WNI)

    def _others(self, index: int, tensors: Mapping[str, Tensor], done: frozenset[str]) -> dict[str, Tensor]:
        """What of a layer is not in few bits, in the dtypes of the file."""
        prefix = f"model.layers.{index}."
        found = {}
        for name in sorted(self._checkpoint.names):
            if not name.startswith(prefix) or name in done or name.endswith(INV_FREQ):
                continue
            original = self._original(name)
            found[name] = tensors[name].to(original.dtype) if name in tensors else original
        return found

    def _embedded(self) -> Tensor:
        """The embedding as it will be."""
        table = self._plan.embedding
        return self._rounded(EMBEDDING, EMBEDDING, table).dequant() if table.quantizes else self._whole(EMBEDDING)

    def _table(self, source: str, name: str, table: Table) -> dict[str, Tensor]:
        """The matrix that the checkpoint calls `source`, under a name."""
        if not table.quantizes:
            return {f"{name}.weight": self._original(f"{source}.weight")}
        matrix = self._rounded(source, name, table)
        return tensors_of(name, matrix, table.format, dtype=self._dtype, is_table=name == EMBEDDING)

    def _rounded(self, source: str, name: str, table: Table) -> QuantizedMatrix:
        search = Search(table.method, table.scheme, self._dtype, self._job.options.percentile)
        with named(name):
            return search.rounded(self._whole(source))

    def _original(self, name: str) -> Tensor:
        """The tensor of this name in the dtype of its file."""
        return self._checkpoint.raw(name, *self._checkpoint.shape(name), dtypes=FLOATS)

    def _whole(self, name: str) -> Tensor:
        spec = self._plan.spec
        return self._checkpoint.take(f"{name}.weight", spec.vocab_size, spec.hidden)


def _digest(path: Path) -> str | None:
    """Of a file's content; None if there is no such file."""
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _mixtures(spec: ModelSpec) -> list[str]:
    """Experts and their routers, as readers that have a matrix for each would name them."""
    return [] if spec.moe is None else [rf"re:.*\.{spec.moe.name}\.experts\..*", rf"re:.*\.{spec.moe.name}\.gate$"]
