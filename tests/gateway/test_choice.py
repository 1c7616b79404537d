"""One choice on its way from the log to the client: ids are bytes here, 256 is the stop token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.accept import extend_hash
from holdfast.errors import HoldfastError, InvalidRequest, StreamFailed
from holdfast.events import Finished, FinishReason, TokenLogprobs, Tokens, TopLogprob, Usage
from services.gateway.choice import Choice, Finish, Manner, Mark, Part, Piece, Place, SpelledTokens, Spelling

EOS = 256
USAGE = Usage(prompt_tokens=2, cached_tokens=1, completion_tokens=99)


def decode(piece: Piece) -> tuple[str, int]:
    """Text, and how many ids it covers."""
    text, count, decoder = "", 0, codecs.getincrementaldecoder("utf-8")("replace")
    for index, token in enumerate(piece.ids):
        text += decoder.decode(bytes([token]))
        if not decoder.getstate()[0]:
            count = index + 1
    return text, len(piece.ids) if piece.last else count


@dataclass
class Line:
    """A choice, with what an engine wrote of it and what it told the client."""

    manner: Manner = field(default_factory=Manner)
    written: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    messages: list[list[Piece]] = field(default_factory=list)
    log: list[tuple[Part, Mark]] = field(default_factory=list)
    offset: int = 100

    def __post_init__(self) -> None:
        self.choice = self.at(Place.at_start(b"prompt"))

    def at(self, place: Place) -> Choice:
        """The choice, from a place on."""
        return Choice(0, start=place, num_prompt=6, manner=self.manner, on_stop=self.stopped.append)

    def write(
        self,
        new: str | bytes | Sequence[int],
        finish: FinishReason | HoldfastError | None = None,
        *,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        """A record of the log."""
        ids = list(new.encode() if isinstance(new, str) else new)
        first, before = len(self.written), list(self.written)
        self.written += ids
        end = Finish(None, USAGE, finish) if isinstance(finish, HoldfastError) else finish and Finish(finish, USAGE)
        part = Part(0, first, ids, logprobs, extend_hash(0, before), end)
        self.offset += 1
        self.log.append((part, Mark(self.offset, 1)))
        self.choice.accept(part, mark=Mark(self.offset, 1))

    def decode(self) -> None:
        """Has all decoded that there is."""
        while pieces := self.choice.to_decode():
            self.messages.append(pieces)
            texts = [decode(piece)[0] for piece in pieces]
            self.choice.decoded(pieces, texts, decode(pieces[0])[1])

    def reopen(self) -> None:
        """Has the client go on with another choice at the place where it stands: all that this one knows besides is lost,
        and the log is read again from where the place says."""
        place, oldest = self.choice.place, self.choice.oldest
        self.choice = self.at(place)
        for part, mark in self.log:
            if oldest is not None and mark >= oldest:
                self.choice.accept(part, mark=mark)

    def take(self) -> list[Tokens | Finished]:
        return self.choice.take(lambda: f"after {self.choice.place.prefix.count}")

    def text(self) -> str:
        """What is there to take, as text."""
        return "".join(event.text for event in self.take() if isinstance(event, Tokens))


def test_tokens_are_taken_with_their_text() -> None:
    """What came is taken in one event, with the cursor after it, and nothing twice."""
    line = Line(Manner(return_token_ids=True))
    line.write("He")
    line.write("y")
    line.decode()
    (tokens,) = line.take()
    assert tokens == SpelledTokens(
        choice=0, first_index=0, num_tokens=3, text="Hey", token_ids=(72, 101, 121), logprobs=(), cursor="after 3"
    )
    assert line.take() == []


def test_token_ids_are_not_told_unasked() -> None:
    """Without return_token_ids an event has text and a count."""
    line = Line()
    line.write("Hey")
    line.decode()
    (tokens,) = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.num_tokens, tokens.token_ids) == (3, ())


def test_an_unfinished_character_keeps_its_tokens_back() -> None:
    """The ids of an unfinished character are neither shown nor counted until its rest comes."""
    line = Line()
    line.write(b"a\xe2\x82")
    line.decode()
    (tokens,) = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.text, tokens.num_tokens) == ("a", 1)
    line.decode()
    assert line.take() == []
    line.write(b"\xac!")
    line.decode()
    (tokens,) = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.first_index, tokens.num_tokens, tokens.text) == (1, 4, "€!")


def test_the_context_is_what_was_shown_last() -> None:
    """New ids are decoded after the last five whose text was shown, at first the prompt's."""
    line = Line()
    line.write("abc")
    line.decode()
    line.write("d")
    line.decode()
    assert [bytes(pieces[0].context) for pieces in line.messages] == [b"rompt", b"ptabc"]


def test_the_stop_token_is_counted_and_not_shown() -> None:
    """Where an engine says STOP the last token is among the ids, without text."""
    line = Line(Manner(return_token_ids=True))
    line.write([*b"ok", EOS], FinishReason.STOP)
    line.decode()
    tokens, finished = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.text, tokens.num_tokens, tokens.token_ids) == ("ok", 3, (111, 107, EOS))
    assert finished == Finished(0, FinishReason.STOP, USAGE, stop="", cursor="after 3")


def test_the_last_token_is_shown_where_the_length_ended_it() -> None:
    """With LENGTH all tokens have text, and a character that stays unfinished is given up."""
    line = Line()
    line.write(b"ok\xe2\x82", FinishReason.LENGTH)
    line.decode()
    tokens, finished = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.text, tokens.num_tokens) == ("ok", 4)
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.LENGTH


def test_an_end_that_comes_while_ids_are_decoded_is_not_missed() -> None:
    """An end without tokens, written while the last ids are with the tokenizer, ends the choice when they come back."""
    line = Line()
    line.write("ok")
    pieces = line.choice.to_decode()
    line.write([], FinishReason.CANCELLED)
    assert not line.choice.is_closed
    line.choice.decoded(pieces, ["ok"], 2)
    assert [type(event) for event in line.take()] == [SpelledTokens, Finished]


def test_an_end_without_tokens_needs_no_decoding() -> None:
    """A choice that ends before its first token is closed at once."""
    line = Line()
    line.write([], FinishReason.DEADLINE)
    assert line.choice.to_decode() == []
    (finished,) = line.take()
    assert isinstance(finished, Finished)
    assert finished.reason is FinishReason.DEADLINE


def test_a_stop_string_ends_the_choice_at_the_token_that_completes_it() -> None:
    """However many tokens came at once, those after the one that completes the stop string do not count."""
    line = Line(Manner(stop=("END", "xyz")))
    line.write("one two END three")
    line.decode()
    tokens, finished = line.take()
    assert isinstance(tokens, Tokens)
    assert (tokens.text, tokens.num_tokens) == ("one two ", 11)
    assert finished == Finished(
        0, FinishReason.STOP, Usage(prompt_tokens=6, cached_tokens=0, completion_tokens=11), "END", "after 11"
    )
    assert line.stopped == [0], "its engine is told, which may still go on"
    line.write(" four")
    line.decode()
    assert line.take() == []


def test_a_stop_string_in_the_last_tokens_stops_nobody() -> None:
    """Where the engine has ended, too, nobody needs to be told, and what it found in its cache is known."""
    line = Line(Manner(stop=("END",)))
    line.write("END.", FinishReason.LENGTH)
    line.decode()
    finished = line.take()[-1]
    assert isinstance(finished, Finished)
    assert (finished.stop, finished.usage.cached_tokens, line.stopped) == ("END", 1, [])


def test_text_that_may_begin_a_stop_string_is_held_and_its_tokens_are_not() -> None:
    """The tokens of held text are counted at once, their text comes later."""
    line = Line(Manner(stop=("END",)))
    line.write("theE")
    line.decode()
    assert line.text() == "the"
    assert line.choice.place.prefix.count == 4
    line.write("N")
    line.decode()
    assert line.text() == ""
    line.write("", FinishReason.LENGTH)
    line.decode()
    assert line.text() == "EN"


def test_a_cut_shows_what_is_decoded() -> None:
    """A choice that is cut ends with what has its text, held text too, and its usage counts that."""
    line = Line(Manner(stop=("END",)))
    line.write("the E")
    line.decode()
    line.write("ND")
    line.choice.cut(FinishReason.DEADLINE)
    tokens, finished = line.take()
    assert isinstance(tokens, Tokens)
    assert tokens.text == "the E"
    assert isinstance(finished, Finished)
    assert (finished.reason, finished.usage.completion_tokens) == (FinishReason.DEADLINE, 5)


def test_a_record_that_contradicts_what_is_accepted_fails_the_choice() -> None:
    """Another text, or a gap, is an error that says so, not text."""
    line = Line()
    line.write("abc")
    with pytest.raises(StreamFailed, match="another text"):
        line.choice.accept(Part(0, 3, [1], (), prefix_hash=1), mark=Mark(200, 1))
    with pytest.raises(StreamFailed, match="missing"):
        line.choice.accept(Part(0, 4, [1], (), prefix_hash=1), mark=Mark(200, 1))


def test_what_is_known_is_accepted_once() -> None:
    """A second owner that starts at 0 adds only what is new."""
    line = Line()
    line.write("abc")
    line.choice.accept(Part(0, 0, list(b"abcd"), (), prefix_hash=0), mark=Mark(300, 1))
    line.decode()
    assert line.text() == "abcd"


def test_an_engines_error_is_raised() -> None:
    """Where the engine says that it failed the choice raises what it said."""
    line = Line()
    with pytest.raises(InvalidRequest, match="too long"):
        line.write("a", InvalidRequest("too long"))


def test_the_oldest_offset_is_that_of_the_first_token_not_taken() -> None:
    """No token that the client lacks lies before the oldest offset."""
    line = Line()
    line.write("a")
    line.write(b"b\xe2")
    line.write(b"\x82")
    line.decode()
    assert line.choice.oldest == Mark(101, 1)
    line.take()
    assert line.choice.oldest == Mark(102, 1), "a part of its tokens waits for the rest of a character"
    line.write(b"\xac")
    line.decode()
    line.take()
    assert line.choice.oldest is None


def test_log_probabilities_come_with_their_tokens_and_their_spelling() -> None:
    """Each token has its log-probabilities; where they are spelled, with the text of each token named."""
    line = Line(Manner(spelled=True))
    named = [TokenLogprobs(-1.0, (TopLogprob(65, -0.5), TopLogprob(66, -2.0))), TokenLogprobs(-3.0, ())]
    line.write("bc", logprobs=named)
    line.decode()
    (tokens,) = line.take()
    assert isinstance(tokens, SpelledTokens)
    assert tokens.logprobs == tuple(named)
    assert tokens.spellings == (Spelling("b", ("A", "B")), Spelling("c", ()))


def expected(text: str, stop: list[str]) -> tuple[str, str]:
    """What is shown of a text, and the stop string that ends it: looked for character by character."""
    for end in range(1, len(text) + 1):
        if found := [each for each in stop if text[:end].endswith(each)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@given(
    text=st.text("aé€\U0001f600b", max_size=12),
    stop=st.lists(st.text("aé€b", min_size=1, max_size=3), max_size=2),
    data=st.data(),
)
def test_how_records_cut_the_tokens_makes_no_difference(text: str, stop: list[str], data: st.DataObject) -> None:
    """Text, counts and end are the same however the tokens are cut into records, whenever they are decoded, and wherever
    the client has gone on with another reader: in the middle of a character, and of a stop string too."""
    tokens = list(text.encode())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    records = [tokens[start:end] for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    line = Line(Manner(stop=tuple(stop), return_token_ids=True))
    shown, ids, ends = "", list[int](), list[Finished]()
    for index, record in enumerate(records):
        is_last = index == len(records) - 1
        line.write(record, FinishReason.LENGTH if is_last else None)
        if is_last or data.draw(st.booleans()):
            line.decode()
        if data.draw(st.booleans()):
            line.reopen()
            line.decode()
        for event in line.take():
            if isinstance(event, Finished):
                ends.append(event)
            else:
                assert event.first_index == len(ids)
                shown += event.text
                ids += event.token_ids
        if data.draw(st.booleans()):
            line.reopen()
            line.decode()
    text_shown, found = expected(text, stop)
    (end,) = ends
    assert (shown, end.stop) == (text_shown, found)
    assert ids == list((text_shown + found).encode()) if found else ids == tokens
    assert end.usage.completion_tokens == (len(ids) if found else USAGE.completion_tokens)
