"""One choice of an answer on its way from the log to the client: ids, then text, then events. Pure: no I/O, no clock.

    accepted by the rule        decoded                     taken by the client
    ───────────────────▶ [ ids ] ───────▶ [ ids with text ] ────────▶
          `accept`              `decoded`                    `take`

A token counts as shown once its text is known: an unfinished character keeps its tokens back, the beginning of a stop
string only its text. Token by token decoding where there are stop strings makes the choice end at the token that
completes one, however many came at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from holdfast.accept import End, Prefix, Verdict, judge
from holdfast.errors import HoldfastError, StreamFailed
from holdfast.events import Finished, FinishReason, TokenLogprobs, Tokens, Usage
from services.gateway.stops import StopStrings

CONTEXT = 5
"""How many ids before the new ones decide how these are spelled."""

MAX_IDS = 256
"""Most ids of one choice that are decoded at once."""


@dataclass(frozen=True, slots=True)
class Finish:
    """How an engine ended a choice."""

    reason: FinishReason | None
    """None where it failed."""
    usage: Usage
    error: HoldfastError | None = None

    @property
    def end(self) -> End:
        """Whether the last token ended it."""
        by_tokens = self.reason in (FinishReason.STOP, FinishReason.LENGTH)
        return End.BY_TOKENS if by_tokens else End.OUTRIGHT


@dataclass(frozen=True, slots=True)
class Part:
    """What one record of the log says about one choice."""

    choice: int
    first_index: int
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]
    prefix_hash: int
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Ids to decode: as `DecodeItem` of the tokenizer."""

    context: Sequence[int]
    ids: Sequence[int]
    last: bool
    show_special_tokens: bool


@dataclass(frozen=True, slots=True)
class Spelling:
    """The texts of the tokens that a `TokenLogprobs` names; "" for one that is no whole character."""

    token: str
    top: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpelledTokens(Tokens):
    """`Tokens` with the text of each token, and of its likeliest alternatives."""

    spellings: tuple[Spelling, ...] = ()


@dataclass(frozen=True, slots=True)
class Manner:
    """How the text and the tokens of an answer are shown."""

    stop: tuple[str, ...] = ()
    show_special_tokens: bool = False
    return_token_ids: bool = False
    spelled: bool = False
    """Say the text of each token beside its log-probability."""


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """How a choice ended towards the client."""

    reason: FinishReason
    usage: Usage
    stop: str = ""
    """The stop string that was found, if that ended it."""


class Mark(NamedTuple):
    """A record of the log, and the epoch that held of the source partition once it was read."""

    offset: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a client stands in one choice: with it, and the tokens to come, the rest is shown just as it would have been
    if the client had stayed."""

    prefix: Prefix = field(default_factory=Prefix)
    """The tokens it has."""
    context: tuple[int, ...] = ()
    """The last of them, of the prompt where there are fewer: they decide how the next ones are spelled."""
    held: str = ""
    """Text of theirs that was held back: a stop string may begin with it."""
    num_characters: int = 0
    """Of their spellings, where tokens are spelled."""
    end: ChoiceEnd | None = None
    end_taken: bool = False
    """Whether the client was told of the end."""

    @classmethod
    def at_start(cls, prompt_ids: Sequence[int]) -> Self:
        """Before the first token after this prompt."""
        return cls(context=tuple(prompt_ids[-CONTEXT:]))


class Choice:
    """One choice, from a place on. `on_stop` is told when a stop string ends it while its engine may still go on."""

    def __init__(
        self, index: int, *, start: Place, num_prompt: int, manner: Manner, on_stop: Callable[[int], None]
    ) -> None:
        self.index = index
        self._manner = manner
        self._on_stop = on_stop
        self._num_prompt = num_prompt

        # From the log.
        self._accepted = start.prefix
        self._ids: list[int] = []
        """Accepted, not yet shown; the first of them `_num_unfinished`."""
        self._logprobs: list[TokenLogprobs] = []
        self._records: deque[tuple[Mark, int]] = deque()
        """Each record that holds tokens not yet taken, and the accepted count after it."""
        self._finish: Finish | None = None
        self._finish_mark: Mark | None = None

        # Of decoding.
        self._context = list(start.context)
        self._stops = StopStrings(manner.stop, held=start.held)
        self._num_unfinished = 0
        """How many ids were decoded before and wait for the rest of their character."""
        self._asked: list[int] = []

        # For the client.
        self._taken = start
        self._text = ""
        self._shown_ids: list[int] = []
        self._shown_logprobs: list[TokenLogprobs] = []
        self._spellings: list[Spelling] = []
        self.end = start.end
        self._end_taken = start.end_taken

    @property
    def is_closed(self) -> bool:
        """Whether nothing more will be shown than what waits to be taken."""
        return self.end is not None

    @property
    def is_untouched(self) -> bool:
        """Whether it has not shown anything yet."""
        return self.num_shown == 0

    @property
    def num_shown(self) -> int:
        """Tokens that have their text, taken or not."""
        return self._taken.prefix.count + len(self._shown_ids)

    @property
    def num_pending(self) -> int:
        """Tokens that were accepted and not taken."""
        return 0 if self.is_closed else self._accepted.count - self._taken.prefix.count

    @property
    def awaits_text(self) -> bool:
        """Whether the tokenizer has still to say what some of its ids, or its end, look like."""
        is_whole = len(self._visible_ids()) == self._num_unfinished and self._finish is None
        return not (self.is_closed or is_whole)

    @property
    def num_waiting(self) -> int:
        """Tokens that wait to be taken."""
        return len(self._shown_ids)

    @property
    def has_news(self) -> bool:
        """Whether there is something to take."""
        return bool(self._shown_ids or self._text) or (self.is_closed and not self._end_taken)

    @property
    def end_taken(self) -> bool:
        """Whether the client was told of the end."""
        return self._end_taken

    @property
    def place(self) -> Place:
        """Where the client stands. The end is part of it once nothing stands before it."""
        if self.end is None or self._shown_ids or self._text:
            return self._taken
        if self._taken.end is None or self._taken.end_taken is not self._end_taken:
            self._taken = replace(self._taken, end=self.end, end_taken=self._end_taken)
        return self._taken

    @property
    def oldest(self) -> Mark | None:
        """The oldest record that `place` needs read again: with a token that was not taken, or with the end; None where
        there is none."""
        if self.place.end is not None:
            return None
        return self._records[0][0] if self._records else self._finish_mark

    def accept(self, part: Part, *, mark: Mark) -> None:
        """Takes what a record says, by rule R.

        Raises:
            HoldfastError: the choice cannot go on: the record contradicts what is accepted (StreamFailed), or is an
                engine's word that it failed.
        """
        if self.is_closed or self._finish is not None:
            return
        ruling = judge(
            self._accepted,
            first_index=part.first_index,
            token_ids=part.token_ids,
            prefix_hash=part.prefix_hash,
            end=End.OPEN if part.finish is None else part.finish.end,
        )
        if ruling.verdict is Verdict.ACCEPTED:
            self._ids += part.token_ids[ruling.num_known :]
            self._logprobs += part.logprobs[ruling.num_known :]
            self._records.append((mark, ruling.prefix.count))
            self._accepted = ruling.prefix
        if ruling.ends and part.finish is not None:
            self._finish_mark = mark
            self._ended(part.finish)
        elif ruling.verdict in (Verdict.GAP, Verdict.CONFLICT):
            raise StreamFailed(self._contradiction(ruling.verdict, part))

    def to_decode(self) -> list[Piece]:
        """What must be decoded next: the new ids, and then, where they are spelled, each token by itself. [] where
        there is nothing. May be asked again for the same, as long as `decoded` was not told."""
        ids = self._visible_ids()
        asked = ids[: self._num_unfinished + (1 if self._stops else MAX_IDS)]
        last = self._finish is not None and len(asked) == len(ids)
        if self.is_closed or not (len(asked) > self._num_unfinished or (asked and last)):
            return []
        self._asked = asked
        special = self._manner.show_special_tokens
        pieces = [Piece(self._context, asked, last, special)]
        if self._manner.spelled:
            named = [each for i, token_id in enumerate(asked) for each in self._named(i, token_id)]
            pieces += [Piece(self._context, [token_id], last=True, show_special_tokens=True) for token_id in named]
        return pieces

    def decoded(self, pieces: Sequence[Piece], texts: Sequence[str], num_consumed: int) -> None:
        """Takes the texts of the pieces of the last `to_decode`; `num_consumed` ids of the first have theirs."""
        if self.is_closed:
            return
        num_shown = len(self._asked) if pieces[0].last else num_consumed
        self._num_unfinished = len(self._asked) - num_shown
        self._context = (self._context + self._asked[:num_shown])[-CONTEXT:]
        self._show(num_shown, texts[1:])
        text, stop = self._stops.feed(texts[0])
        self._text += text
        if stop:
            self._close(FinishReason.STOP, stop=stop)
            if self._finish is None:
                self._on_stop(self.index)
        elif self._finish is not None and not self._visible_ids():
            self._close_as_told(self._finish)

    def cut(self, reason: FinishReason) -> None:
        """Ends the choice now, with what is decoded so far."""
        if not self.is_closed:
            self._text += self._stops.rest()
            self._close(reason)

    def take(self, cursor: Callable[[], str]) -> list[Tokens | Finished]:
        """All that the client has not got. `cursor` is asked after `taken` moved, for each event."""
        events: list[Tokens | Finished] = []
        if self._shown_ids or self._text:
            events.append(self._take_tokens(cursor))
        if self.end is not None and not self._end_taken:
            self._end_taken = True
            end = self.end
            events.append(Finished(self.index, reason=end.reason, usage=end.usage, stop=end.stop, cursor=cursor()))
        return events

    def _take_tokens(self, cursor: Callable[[], str]) -> Tokens:
        ids, logprobs, spellings, text = self._shown_ids, self._shown_logprobs, self._spellings, self._text
        self._shown_ids, self._shown_logprobs, self._spellings, self._text = [], [], [], ""
        first_index = self._taken.prefix.count
        self._taken = Place(
            prefix=self._taken.prefix.extended(ids),
            context=tuple(self._context),
            held=self._stops.held,
            num_characters=self._taken.num_characters + sum(len(each.token) for each in spellings),
        )
        while self._records and self._records[0][1] <= self._taken.prefix.count:
            self._records.popleft()
        return SpelledTokens(
            choice=self.index,
            first_index=first_index,
            num_tokens=len(ids),
            text=text,
            token_ids=tuple(ids) if self._manner.return_token_ids else (),
            logprobs=tuple(logprobs),
            cursor=cursor(),
            spellings=tuple(spellings),
        )

    def _visible_ids(self) -> list[int]:
        """The ids that are shown as text: all but the stop token, which is the last one where an engine says STOP."""
        hidden = self._finish is not None and self._finish.reason is FinishReason.STOP
        return self._ids[:-1] if hidden else self._ids

    def _named(self, index: int, token_id: int) -> list[int]:
        """The token and its alternatives, as `Spelling` has them; the ids wait from `_ids[0]` on."""
        if not self._logprobs:
            return []
        return [token_id, *(top.token_id for top in self._logprobs[index].top)]

    def _show(self, count: int, spelled: Sequence[str]) -> None:
        """Moves the first ids from those that wait for their text to those that wait for the client."""
        self._shown_ids += self._ids[:count]
        self._shown_logprobs += self._logprobs[:count]
        texts = iter(spelled)
        if spelled:
            for logprobs in self._logprobs[:count]:
                self._spellings.append(Spelling(next(texts), tuple(next(texts) for _ in logprobs.top)))
        del self._ids[:count], self._logprobs[:count]

    def _ended(self, finish: Finish) -> None:
        if finish.error is not None:
            raise finish.error
        self._finish = finish
        if not self._visible_ids():
            self._close_as_told(finish)

    def _close_as_told(self, finish: Finish) -> None:
        """The engine's end, once all visible ids are shown."""
        self._show(len(self._ids), ())
        self._text += self._stops.rest()
        assert finish.reason is not None
        self.end = ChoiceEnd(finish.reason, finish.usage)

    def _close(self, reason: FinishReason, *, stop: str = "") -> None:
        """An end of the gateway's own. Tokens that were not shown do not count; what was found in a cache is known
        only where the engine has ended, too."""
        cached = self._finish.usage.cached_tokens if self._finish is not None else 0
        usage = Usage(prompt_tokens=self._num_prompt, cached_tokens=cached, completion_tokens=self.num_shown)
        self.end = ChoiceEnd(reason, usage, stop)

    def _contradiction(self, verdict: Verdict, part: Part) -> str:
        where = f"choice {self.index} after {self._accepted.count} tokens: the log holds"
        if verdict is Verdict.GAP:
            return f"{where} those from {part.first_index} on; what lies between is missing"
        return f"{where} those of an engine that had written another text before them"
