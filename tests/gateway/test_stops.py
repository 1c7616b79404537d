"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stops import StopStrings


def show(strings: list[str], pieces: list[str]) -> tuple[str, str]:
    """All that is shown of a text that comes in these pieces, and the string found."""
    stops, shown = StopStrings(strings), ""
    for piece in pieces:
        text, found = stops.feed(piece)
        shown += text
        if found:
            return shown, found
    return shown + stops.rest(), ""


def test_the_text_before_a_stop_string_is_shown() -> None:
    """The text ends before the stop string."""
    assert show(["END"], ["one two END three"]) == ("one two ", "END")


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    """Text that a stop string begins with waits for what follows, across pieces."""
    stops = StopStrings(["</s>", "\n\n"])
    assert stops.feed("a<") == ("a", "")
    assert stops.feed("/") == ("", "")
    assert stops.feed("b>") == ("</b>", "")
    assert stops.feed("c\n") == ("c", "")
    assert stops.feed("\nd") == ("", "\n\n")


def test_text_held_back_is_shown_at_the_end() -> None:
    """Where the stop string never comes, what was held back is shown with the end."""
    assert show(["END"], ["the E", "N"]) == ("the EN", "")


def test_the_string_that_is_complete_first_is_found() -> None:
    """Of several strings the first to be complete ends the text, of those complete together the longest."""
    assert show(["abcd", "bc"], ["xabcd"]) == ("xa", "bc")
    assert show(["bc", "abc"], ["xabc"]) == ("x", "abc")


def test_without_strings_everything_is_shown_at_once() -> None:
    """No stop strings, nothing is held."""
    stops = StopStrings()
    assert not stops
    assert stops.feed("text") == ("text", "")


@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    text=st.text("abc", max_size=20),
    data=st.data(),
)
def test_how_the_text_is_cut_makes_no_difference(strings: list[str], text: str, data: st.DataObject) -> None:
    """Whatever the pieces, the same text is shown and the same string found, and none is shown."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, found = show(strings, pieces)
    assert (shown, found) == show(strings, [text]) == show(strings, list(text))
    assert text.startswith(shown + found)
    assert not any(each in shown for each in strings)
    assert bool(found) == any(each in text for each in strings)
