"""How far predictions are from a reference's, and from what came.

* Perplexity: e to the mean of -log p(token), over the tokens that are judged.
* KL: of the model's distribution over the vocabulary from the reference's, sum p_ref (log p_ref - log p), in nats, at each
  token; its mean, and what 99 % of the tokens do not exceed.
* Agreement: the share of tokens at which both hold the same token for the likeliest.
* Agreed length of a passage: how many of its judged tokens come before the first that the model, greedy, would not have said.
  Up to there its own greedy answer and the passage are the same text, so no answer needs to be computed.

Shapes: R tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from services.engine.quality.forced import Forced, chunks_of, require_one_vocabulary
from services.engine.quality.passages import Passage

Progress = Callable[[int], None]
"""Is told how many passages are done."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Over all tokens of some passages."""

    num_tokens: int
    perplexity: float
    mean_kl: float
    """In nats."""
    p99_kl: float
    agreement: float
    """0 to 1."""


@dataclass(slots=True)
class Scores:
    """Of one model, token by token."""

    _nats: list[Tensor] = field(default_factory=list)
    _divergences: list[Tensor] = field(default_factory=list)
    _agrees: list[Tensor] = field(default_factory=list)
    _foreseen: list[Tensor] = field(default_factory=list)
    """Whether what came was the likeliest."""
    _lengths: list[int] = field(default_factory=list)
    """Of passages: how many of their tokens are judged."""

    def add(self, log_probs_RV: Tensor, reference_RV: Tensor, next_R: Tensor) -> None:
        """Both predictions of some tokens, and what came."""
        if not len(next_R):
            return
        best_R = log_probs_RV.argmax(-1)
        divergences_R = F.kl_div(log_probs_RV, reference_RV, reduction="none", log_target=True).sum(-1)
        self._nats.append(F.nll_loss(log_probs_RV, next_R, reduction="none").cpu())
        self._divergences.append(divergences_R.cpu())
        self._agrees.append((best_R == reference_RV.argmax(-1)).cpu())
        self._foreseen.append((best_R == next_R).cpu())

    def end(self, passage: Passage) -> None:
        """All tokens of the passage are there."""
        self._lengths.append(passage.num_judged)

    def figures(self) -> Figures:
        """There must be a token."""
        divergences = torch.cat(self._divergences).double()
        return Figures(
            num_tokens=len(divergences),
            perplexity=float(torch.cat(self._nats).double().mean().exp()),
            mean_kl=float(divergences.mean()),
            p99_kl=float(divergences.quantile(0.99)),
            agreement=float(torch.cat(self._agrees).double().mean()),
        )

    def agreed_lengths(self) -> list[int]:
        """Of each passage; all its judged tokens where there is no difference."""
        foreseen = torch.split(torch.cat(self._foreseen), self._lengths)
        return [int(each.long().cumprod(0).sum()) for each in foreseen]

    def num_exact(self) -> int:
        """Passages of which the model, greedy, would have said every judged token."""
        return sum(agreed == length for agreed, length in zip(self.agreed_lengths(), self._lengths, strict=True))


@torch.inference_mode()
def compare(
    reference: Forced,
    others: Sequence[Forced],
    passages: Sequence[Passage],
    *,
    chunk: int,
    progress: Progress | None = None,
) -> list[Scores]:
    """The reference's scores and then the others', computed side by side in chunks of so many tokens: of each a chunk's
    predictions are there at a time. Raises `ConfigurationError` for what cannot be computed or compared."""
    models = [reference, *others]
    require_one_vocabulary(models)
    for model in models:
        model.check(passages)
    found = [Scores() for _ in models]
    for done, passage in enumerate(passages, 1):
        for part in chunks_of(passage, chunk):
            reference_RV = reference.log_probs(part)
            next_R = part.next_ids().to(reference_RV.device)
            found[0].add(reference_RV, reference_RV, next_R)
            for other, scores in zip(others, found[1:], strict=True):
                scores.add(other.log_probs(part), reference_RV, next_R)
        for scores in found:
            scores.end(passage)
        if progress is not None:
            progress(done)
    return found
