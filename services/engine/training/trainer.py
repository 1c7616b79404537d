"""The loop.

Shapes: B windows, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from holdfast.errors import HoldfastError
from services.engine.training.loss import Loss, loss_of
from services.engine.training.plan import Plan
from services.engine.training.progress import Point, Progress
from services.engine.training.ranks import Ranks
from services.engine.training.text import Text

HELD_OUT_WINDOWS = 128
"""By which a model is judged while it is trained, or fewer where there are no more."""


class Trainer:
    """Trains a model of transformers on text, beside a teacher or alone."""

    def __init__(
        self,
        model: nn.Module,
        *,
        teacher: nn.Module | None,
        text: Text,
        held_out: Text,
        plan: Plan,
        ranks: Ranks,
        progress: Progress,
        tell: Callable[[Point], None],
    ) -> None:
        """`model`: in float32, on the device of `ranks`. `tell` is called on the first rank with each point of the curve."""
        self._model = model.train()
        self._teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self._text = text
        self._held_out = held_out
        self._plan = plan
        self._ranks = ranks
        self._progress = progress
        self._tell = tell
        self._optimizer = _optimizer(model, plan)
        self._shared = ranks.wrapped(model, plan.gradients)
        self._share = ranks.share(plan.batch)

    def run(self) -> None:
        """Takes the steps that are not done yet. Raises `HoldfastError` where a loss is not finite: what was saved before it stays."""
        self._progress.load(self._model, self._optimizer, self._ranks.device)
        begun, counted = time.monotonic(), self._progress.step
        while self._progress.step < self._plan.steps:
            loss = self._take_step(self._progress.step)
            self._progress.step += 1
            if self._is_due(self._plan.evaluate_every):
                speed = (
                    (self._progress.step - counted) * self._plan.batch * self._plan.length / (time.monotonic() - begun)
                )
                self._look(loss, speed)
                begun, counted = time.monotonic(), self._progress.step
            if self._is_due(self._plan.save_every) and self._ranks.is_first:
                self._progress.save(self._model, self._optimizer)
        self._ranks.wait()

    def judge(self, model: nn.Module | None = None) -> Loss:
        """The means over the held-out text; of the trained model, or of another one beside the same teacher."""
        judged, was_training = model or self._model, (model or self._model).training
        judged.eval()
        count = min(HELD_OUT_WINDOWS, self._held_out.num_windows)
        own = range(self._ranks.rank, count, self._ranks.count)
        total = torch.zeros(2, device=self._ranks.device)
        with torch.no_grad():
            for number in own:
                loss = self._compute(judged, self._held_out.window(number)[None])
                total += torch.stack([loss.cross_entropy, loss.kl])
        judged.train(was_training)
        cross_entropy, kl = self._ranks.mean(total) * self._ranks.count / count
        return Loss(cross_entropy, kl)

    def _take_step(self, step: int) -> Loss:
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.learning_rate * self._plan.rate(step)
        windows = self._text.batch(step, self._plan.batch, seed=self._plan.seed, share=self._share)
        loss = self._gradients(windows)
        if not (loss.cross_entropy + loss.kl).isfinite():
            raise HoldfastError(
                f"the loss of step {step + 1} is not finite; a lower learning rate than {self._plan.learning_rate:g} or a longer warm-up "
                f"than {self._plan.warmup} steps would help; {self._progress.folder} keeps the last steps that were saved"
            )
        clip_grad_norm_(self._model.parameters(), self._plan.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, windows: Tensor) -> Loss:
        """Of these windows, a few at a time; ranks exchange them once."""
        pieces = torch.split(windows, self._plan.micro_batch or len(windows))
        total = torch.zeros(2, device=self._ranks.device)
        for number, piece in enumerate(pieces):
            share = len(piece) / len(windows)
            with self._alone() if number + 1 < len(pieces) else nullcontext():
                loss = self._compute(self._shared, piece)
                weights = {"cross_entropy": self._plan.cross_entropy, "kl": self._plan.kl}
                (loss.weighted(**weights) * share).backward()  # type: ignore[no-untyped-call]
            total += torch.stack([loss.cross_entropy, loss.kl]).detach() * share
        cross_entropy, kl = self._ranks.mean(total)
        return Loss(cross_entropy, kl)

    def _alone(self) -> Any:
        """While gradients are only added up."""
        return self._shared.no_sync() if self._shared is not self._model else nullcontext()  # type: ignore[operator]

    def _compute(self, model: nn.Module, windows: Tensor) -> Loss:
        windows = windows.to(self._ranks.device, non_blocking=True)
        ids_BL, targets_BL = windows[:, :-1], windows[:, 1:]
        device, dtype = self._ranks.device.type, getattr(torch, self._plan.dtype)
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            logits = model(input_ids=ids_BL, use_cache=False).logits
            with torch.no_grad():
                teacher = None if self._teacher is None else self._teacher(input_ids=ids_BL, use_cache=False).logits
        return loss_of(logits, teacher, targets_BL)

    def _look(self, loss: Loss, speed: float) -> None:
        judged = self.judge()
        point = Point(
            self._progress.step,
            loss.cross_entropy.item(),
            loss.kl.item(),
            judged.cross_entropy.item(),
            judged.kl.item(),
            self._optimizer.param_groups[0]["lr"],
            speed,
        )
        self._progress.curve.append(point)
        if self._ranks.is_first:
            self._tell(point)

    def _is_due(self, every: int) -> bool:
        return self._progress.step % every == 0 or self._progress.step == self._plan.steps


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; betas of Touvron et al. 2023, "LLaMA"."""
    return torch.optim.AdamW(list(_decayed(model, plan)), lr=plan.learning_rate, betas=(0.9, 0.95))


def _decayed(model: nn.Module, plan: Plan) -> Iterator[dict[str, Any]]:
    """Matrices, which decay, and vectors, which do not."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    yield {"params": [each for each in parameters if each.dim() > 1], "weight_decay": plan.weight_decay}
    yield {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0}
