"""Finds the first of several stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Searches a stream of characters for the stop string that ends first, in constant time a character.

    One Knuth-Morris-Pratt automaton a string: its state is how much of the string the text so far ends with, so the
    largest state is also how many characters must be held back. Matching single characters, not pieces, makes
    the result independent of where the text was cut. Of strings that end at the same character the longest counts.

    Args:
        stop: non-empty strings; may be empty itself, then everything passes at once.
        include: let the stop string itself through.
    """

    def __init__(self, stop: Sequence[str], *, include: bool) -> None:
        # Longest first, so that the first full match at a character is the longest.
        self._stop = sorted(stop, key=len, reverse=True)
        self._fallback = [_fallback_table(s) for s in self._stop]
        self._matched = [0] * len(self._stop)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string if one was completed: then nothing more may be fed."""
        if not self._stop:
            return text, None
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            stop = self._advance(char)
            if stop is not None:
                self._held = ""
                return pending[: end if self._include else end - len(stop)], stop
        shown = len(pending) - max(self._matched)
        self._held = pending[shown:]
        return pending[:shown], None

    def flush(self) -> str:
        """What was held back: the text ended before a stop string was complete."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        completed: str | None = None
        for i, stop in enumerate(self._stop):
            matched, fallback = self._matched[i], self._fallback[i]
            while matched and stop[matched] != char:
                matched = fallback[matched]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                completed = stop
                break
        return completed


def _fallback_table(stop: str) -> list[int]:
    """``table[k]``: length of the longest proper prefix of ``stop`` that ``stop[:k]`` ends with."""
    table = [0, 0]
    for end, char in enumerate(stop[1:], start=1):
        matched = table[end]
        while matched and stop[matched] != char:
            matched = table[matched]
        table.append(matched + (stop[matched] == char))
    return table
