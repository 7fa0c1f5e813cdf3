"""Text as it grows token by token: what of it is certain, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

from neox_native.data.tokenizers import Tokenizer

INCOMPLETE = "\ufffd"
"""What decoding makes of a character whose last bytes are still to come."""


class GrowingText:
    """The text of a row's new tokens.

    Args:
        stops: strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.text, self.stopped, self._shown = "", False, 0

    def update(self, tokens: list[int]) -> None:
        """Read all of the row's new tokens again; sets `stopped` where a stop string has come."""
        self.text = self.tokenizer.decode(tokens)
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def news(self, finished: bool) -> str:
        """The text since the last call that can no longer change."""
        end = len(self.text) if finished or self.stopped else self._certain()
        piece, self._shown = self.text[self._shown : end], max(end, self._shown)
        return piece

    def _certain(self) -> int:
        """Length of the text without a character still incomplete or the possible beginning of a stop string."""
        text = self.text.rstrip(INCOMPLETE)
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:size]):
                    text = text[:-size]
                    break
        return len(text)
