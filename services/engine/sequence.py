"""A request's one choice inside the engine: its tokens, where it stands, and when it ends."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 1024 + 128
"""Those that a request may name, and the model's own."""


class Phase(enum.Enum):
    """Where a sequence stands."""

    LOADING = "loading"
    """Holds nothing yet: blocks of its prefix are on their way from the KV store."""
    WAITING = "waiting"
    """Holds no slot: not begun, or preempted (then its output so far is part of what must be computed again)."""
    RUNNING = "running"
    """Holds a slot and blocks."""
    FINISHED = "finished"
    """Holds nothing; `finish` says why it ended."""


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled."""
    LENGTH = "length"
    """`max_tokens`, or the model's context, was reached."""
    CANCELLED = "cancelled"
    """Somebody cancelled it."""
    DEADLINE = "deadline"
    """Its deadline passed."""
    ERROR = "error"
    """It cannot be served; `Sequence.error` says why."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the defaults leave the model's distribution as it is. Ranges are checked where the
    request enters."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set whose probabilities reach p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time a token was generated."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in the prompt or the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    seed: int = 0
    """Key of the counter-based generator, 64 bits."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the chosen one's log-probability; None reports nothing."""


@dataclass(frozen=True, slots=True)
class StopRules:
    """When a sequence ends."""

    max_tokens: int
    """Most tokens to generate; the model's context is already taken into account."""
    min_tokens: int = 0
    """Do not stop at a stop token before this many."""
    stop_token_ids: frozenset[int] = frozenset()
    """End-of-sequence tokens (unless they are to be ignored) and the request's own stop tokens."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution."""

    logprob: float
    """Of the chosen token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), likeliest first."""


@dataclass(frozen=True, slots=True)
class News:
    """What a sequence has to tell after a step: a copy, so that another thread may read it."""

    sequence: Sequence
    """Whose: its request id, choice and prompt never change, and after the end nothing else does."""
    first_index: int
    """Index of the first of `token_ids` among the output."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """One for each of `token_ids` where the sequence asked for them, else empty."""
    finish: FinishReason | None
    """Set iff this is the last there is to tell."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request. Known tokens are the prompt and the output; the first `num_computed` of them have
    their keys and values in blocks.

    With lookahead, steps are planned before the results of earlier ones are known:

        num_computed <= num_planned < num_known + num_pending

    `num_planned` counts the tokens in flight too, `num_pending` the output tokens that steps in flight will sample.
    """

    request_id: str
    choice: int
    prompt_ids: Seq[int]
    sampling: SamplingParams
    stop: StopRules
    interactive: bool = True
    """Interactive sequences are admitted before the others."""
    arrival: float = 0.0
    """When the request was accepted, seconds since the epoch: the order within a class."""
    deadline: float | None = None
    """Seconds since the epoch after which nobody wants the answer."""
    shares_prompt_with: Sequence | None = None
    """The choice 0 of the same request, whose prompt is computed first so that this one finds it in the cache."""

    # The scheduler fills these.
    phase: Phase = Phase.WAITING
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    """Block ids, in the order of the tokens they hold."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained hash of each full block of known tokens, as far as they were needed."""
    newly_full: list[int] = field(default_factory=list)
    """Which of its blocks became known by their hash since it last sampled a token."""
    order: tuple[bool, float, int] = (False, 0.0, 0)
    """Place in the line: interactive first, then by arrival, then by the order of `Scheduler.add`."""
    num_computed: int = 0
    num_planned: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    """Steps in flight that compute something of it."""
    last_step: int = 0
    """Number of the newest step that does; its blocks are in use until that one is committed."""
    was_economical: bool = False
    """Whether any of its keys and values come from the smaller copy of the weights: nobody else may have them."""
    num_cached: int = 0
    """How many prompt tokens were found in the prefix cache or the store at the first admission."""
    output_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str = ""
    started_at: float | None = None
    """When it was first admitted, seconds since the epoch as the scheduler was told."""
    first_token_at: float | None = None
    ended_at: float | None = None

    # The loop fills this.
    num_told: int = 0
    """How many of the output tokens it handed over."""

    @property
    def num_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled, those in flight apart: 1 where it decodes."""
        return self.num_known + self.num_pending - self.num_planned

    @property
    def num_stored_at_most(self) -> int:
        """Tokens whose keys and values may come to be stored: all but the last one sampled."""
        return len(self.prompt_ids) + self.stop.max_tokens - 1

    @property
    def has_all_planned(self) -> bool:
        """Whether the steps so far, those in flight included, sample all that it may generate."""
        return len(self.output_ids) + self.num_pending >= self.stop.max_tokens

    @property
    def is_finished(self) -> bool:
        return self.phase is Phase.FINISHED

    def go_on_after(self, token_ids: Seq[int]) -> None:
        """Another engine has told these already: they are part of the output, and this one's begins behind them."""
        assert not self.output_ids
        self.output_ids = list(token_ids)
        self.num_told = len(token_ids)

    def tell(self) -> News:
        """What was not told yet."""
        first, self.num_told = self.num_told, len(self.output_ids)
        num_foreign = len(self.output_ids) - len(self.output_logprobs) if self.output_logprobs else 0
        return News(
            sequence=self,
            first_index=first,
            token_ids=tuple(self.output_ids[first:]),
            logprobs=tuple(self.output_logprobs[max(0, first - num_foreign) :]),
            finish=self.finish,
        )

    def token_ids(self, start: int, end: int) -> list[int]:
        """The known tokens in [start, end)."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return list(self.prompt_ids[start:end])
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return [*self.prompt_ids[start:], *self.output_ids[: end - num_prompt]]

    @property
    def is_full(self) -> bool:
        """Whether it may get no token more."""
        return len(self.output_ids) >= self.stop.max_tokens

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> FinishReason | None:
        """Adds a sampled token and says whether, and why, the sequence ends with it."""
        self.output_ids.append(token_id)
        if logprobs is not None:
            self.output_logprobs.append(logprobs)
        if token_id in self.stop.stop_token_ids and len(self.output_ids) >= self.stop.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.is_full else None
