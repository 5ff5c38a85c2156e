"""Text from tokens that arrive one at a time."""

from collections.abc import Sequence
from typing import Protocol

UNFINISHED = "\ufffd"
"""What a decoder puts for bytes that are not (yet) a whole character."""


class TextDecoder(Protocol):
    """What the stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Return the text of the ids."""
        ...


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the text of all tokens.

    A byte-level token may end in the middle of a character; it is held back until the character is whole.
    """

    def __init__(self, tokenizer: TextDecoder) -> None:
        self._tokenizer = tokenizer
        self._shown: list[
            int
        ] = []  # the last tokens whose text is out; they give the next ones their context
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that `token` completes, "" when it only begins a character."""
        self._waiting.append(token)
        text = self._new_text()
        return "" if text.endswith(UNFINISHED) else self._release(text)

    def finish(self) -> str:
        """Return what was still held back."""
        return self._release(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._waiting)[len(before) :]

    def _release(self, text: str) -> str:
        if self._waiting:
            self._shown, self._waiting = self._waiting, []
        return text
