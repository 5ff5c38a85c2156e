"""Random splitting of tokens that fuse punctuation and line breaks (arXiv 2412.19437, section 4.1).

A vocabulary that holds `;\\n` as one token never sees `;` before the end of a prompt, which biases the
model on prompts without a closing line break. A share of such tokens is therefore stored as two, the part
up to the line break and the line breaks; the text stays the same.
"""

import unicodedata

import numpy as np
from numpy.typing import NDArray

from data.hashing import uniform
from data.tokenizer import Tokenizer


class FusedTokenSplitter:
    """Splits a share `rate` of the fused tokens of a document, chosen by hash of (document, place)."""

    def __init__(self, tokenizer: Tokenizer, *, rate: float) -> None:
        self._rate = rate
        self.parts: dict[int, NDArray[np.int64]] = {}
        for token, text in tokenizer.base_tokens().items():
            at = _line_break(text)
            if at > 0 and any(_is_punctuation(character) for character in text[:at]):
                pair = tokenizer.encode_batch([text[:at], text[at:]])
                self.parts[token] = np.array(pair[0] + pair[1])
        self._is_fused_V = np.zeros(tokenizer.vocab_size, np.bool_)
        self._is_fused_V[list(self.parts)] = True

    def split(self, tokens: NDArray[np.int64], *, key: int) -> NDArray[np.int64]:
        """Return the tokens of a document with some fused tokens split; `key` identifies the document."""
        drawn = uniform(key, np.arange(len(tokens))) < self._rate
        places = np.flatnonzero(self._is_fused_V[tokens] & drawn)
        if len(places) == 0:
            return tokens
        pieces: list[NDArray[np.int64]] = []
        done = 0
        for place in places.tolist():
            pieces += [tokens[done:place], self.parts[int(tokens[place])]]
            done = place + 1
        return np.concatenate([*pieces, tokens[done:]])


def _line_break(text: str) -> int:
    """Return where the first line break of a text stands, -1 if it has none."""
    return next((i for i, character in enumerate(text) if character in "\r\n"), -1)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"
