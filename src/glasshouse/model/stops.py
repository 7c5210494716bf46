"""Where a continuation ends in text: stop strings, which may span tokens, and what may be shown before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from glasshouse.base.errors import UsageError

Decode = Callable[[list[int]], str]


class StopText:
    """Finds the first stop string in the text of a growing list of token ids.

    ``decode`` turns ids into text; it must be that of the model's tokenizer. Raises UsageError for an
    empty stop string, or stop strings without a way to decode.
    """

    def __init__(self, strings: Sequence[str], decode: Decode | None):
        if isinstance(strings, str):
            strings = [strings]
        if strings and decode is None:
            raise UsageError("stop strings need decode=: the tokenizer's function from ids to text")
        if any(not s for s in strings):
            raise UsageError("a stop string is empty; it would stop before the first token")
        self.strings, self._decode = tuple(strings), decode
        # A token gives at least one byte of text, special tokens aside, so this many hold the longest string.
        self._window = 32 + max((len(s.encode("utf-8")) for s in strings), default=0)

    def text(self, ids: list[int]) -> str | None:
        """The text of ``ids``; None without ``decode``."""
        return None if self._decode is None else self._decode(ids)

    def find(self, ids: list[int]) -> tuple[str, int, str] | None:
        """(stop string, number of ids wholly before it, text before it) once the newest id completes one.

        Of several that are there it is the one that begins first, the longest on ties.
        """
        if not self.strings or self._decode is None:
            return None
        tail = self._decode(ids[-self._window :])
        if not any(s in tail for s in self.strings):
            return None
        text = self._decode(ids)
        found = [(text.find(s), -len(s), s) for s in self.strings if s in text]
        if not found:  # the tail began inside a character, or was stripped differently
            return None
        at, _, string = min(found)
        kept = len(ids)
        while kept and len(self._decode(ids[:kept])) > at:
            kept -= 1
        return string, kept, text[:at]

    def showable(self, text: str) -> str:
        """The part of ``text`` that no later token can take back.

        Not yet showable are an unfinished character (decoded as U+FFFD) and what may begin a stop string.
        """
        text = text.rstrip("\ufffd")
        held = 0
        for s in self.strings:
            for n in range(min(len(s) - 1, len(text)), held, -1):
                if text.endswith(s[:n]):
                    held = n
                    break
        return text[: len(text) - held]
