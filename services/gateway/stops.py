"""Stop strings: what may be shown of a text that grows, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for strings in a text that comes in pieces. What it shows, and which string it finds, does not depend on
    how the text is cut: the string that is complete first ends the text; of several that are complete with the same
    character, the longest. Without strings it shows everything at once."""

    def __init__(self, strings: Sequence[str] = (), *, held: str = "") -> None:
        """`held`: what another one of these held back of the text so far."""
        self._strings = tuple(strings)
        self._held = held

    def __bool__(self) -> bool:
        return bool(self._strings)

    @property
    def held(self) -> str:
        """What is held back of the text so far."""
        return self._held

    def feed(self, text: str) -> tuple[str, str]:
        """Takes the next piece; returns the text to show now and the string that was found, or "".

        Text that may be the beginning of a stop string is held back. After a string was found there is nothing more to
        feed: it and all behind it are not shown.
        """
        text = self._held + text
        found = [(text.find(each) + len(each), -len(each), each) for each in self._strings if each in text]
        if found:
            end, _, stop = min(found)
            self._held = ""
            return text[: end - len(stop)], stop
        num_shown = len(text) - self._num_held(text)
        self._held = text[num_shown:]
        return text[:num_shown], ""

    def rest(self) -> str:
        """What was held back, once no more text will come."""
        text, self._held = self._held, ""
        return text

    def _num_held(self, text: str) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max((len(each) - 1 for each in self._strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(each.startswith(text[-length:]) for each in self._strings):
                return length
        return 0
