"""What a checkpoint in few bits weighs and costs, beside the model that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from services.engine.models import load
from services.engine.quality.forced import Forced
from services.engine.quality.passages import Passage
from services.engine.quality.scores import Figures, compare
from services.engine.quantize.budget import Assignment

JSON_FILE, TABLE_FILE = "quantization_report.json", "quantization_report.md"

_CHUNK = 256  # tokens of a step


@dataclass(frozen=True, slots=True)
class Quality:
    """Both models on the same tokens."""

    text: str
    """What they are of."""
    before: Figures
    after: Figures


@dataclass(frozen=True, slots=True)
class Report:
    """All that is told."""

    command: Mapping[str, Any]
    matrices: Mapping[str, int]
    """How many are kept how."""
    read_by: str
    """Which other systems read the checkpoint, and why others do not."""
    num_weights: int
    bytes_before: int
    bytes_after: int
    quality: Quality | None
    """None where there was no text to judge by."""
    assignment: Assignment | None = None
    """Where a budget was given."""

    def write(self, folder: Path) -> None:
        """As JSON and as a table."""
        content = asdict(self) | {"bits_per_weight": self.bits}
        (folder / JSON_FILE).write_text(json.dumps(content, indent=2, default=str))
        (folder / TABLE_FILE).write_text(self.table())

    @property
    def bits(self) -> float:
        """Of a weight, scales and all that is not quantized included."""
        return 8 * self.bytes_after / self.num_weights

    def table(self) -> str:
        """In Markdown."""
        lines = [
            "| matrices | kept as |",
            "|---|---|",
            *(f"| {count:,} | {how} |" for how, count in self.matrices.items()),
        ]
        lines += ["", "| | before | after |", "|---|---|---|"]
        lines += [
            f"| bytes of weights | {self.bytes_before:,} | {self.bytes_after:,} |",
            f"| bits a weight of the file | {8 * self.bytes_before / self.num_weights:.2f} | {self.bits:.2f} |",
        ]
        if self.assignment is not None:
            lines.insert(
                0,
                f"Rules that keep the budget, with {self.assignment.bits:.3f} bits a weight of layers: `{self.assignment.rules}`\n",
            )
        if self.quality is None:
            return self._ended(lines, "Quality was not measured: there was no text for it.")
        before, after = self.quality.before, self.quality.after
        change = 100 * (after.perplexity / before.perplexity - 1)
        lines += [
            f"| perplexity | {before.perplexity:.4f} | {after.perplexity:.4f} ({change:+.2f} %) |",
            f"| mean KL, nats | | {after.mean_kl:.4f} |",
            f"| 99 % KL, nats | | {after.p99_kl:.4f} |",
            f"| same top token | | {100 * after.agreement:.2f} % |",
        ]
        return self._ended(lines, f"Over {after.num_tokens:,} tokens of {self.quality.text}.")

    def _ended(self, lines: Sequence[str], note: str) -> str:
        return "\n".join([*lines, "", note, "", f"Other systems: {self.read_by}.", ""])


def measured_quality(
    model: Path,
    quantized: Path,
    windows: Sequence[Passage],
    text: str,
    *,
    unpacking: str,
    progress: Callable[[int], None] | None = None,
) -> Quality:
    """Both models in memory, in float32, teacher-forced as the engine computes prompts. `unpacking`: rules for weights that multiply
    activations as they are. Unpacked they give the same, and long prompts in a 60th of the time: in float32 four bits have a kernel for
    single rows only. Raises `ConfigurationError` where either cannot be loaded."""
    longest = max(len(window.ids) for window in windows)
    models = [
        Forced.of(name, load(folder, dtype=torch.float32, quantization=rules), longest=longest)
        for name, folder, rules in (("the model", model, "none"), ("the quantized model", quantized, unpacking))
    ]
    before, after = compare(models[0], models[1:], windows, chunk=_CHUNK, progress=progress)
    return Quality(text, before.figures(), after.figures())
