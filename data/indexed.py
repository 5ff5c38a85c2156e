"""Token shards on disk: Megatron-Core's indexed format, read and written byte for byte.

PREFIX.bin holds the tokens of all sequences, one after another. PREFIX.idx says where they are, all
values little-endian:

    9 bytes   b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     token type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats)
    uint64    number of sequences s
    uint64    number of document boundaries d, one more than there are documents
    int32[s]  tokens of each sequence
    int64[s]  byte offset of each sequence in PREFIX.bin
    int64[d]  first sequence of each document, and s at the end
    int8[s]   mode of each sequence, only in multimodal corpora; ignored here

A corpus made by Megatron's tools works unchanged, and theirs read ours.
"""

import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_SMALL_VOCABULARY = 65500  # below this Megatron stores uint16


def bin_path(prefix: Path) -> Path:
    """Return the file of tokens of a shard."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the index file of a shard."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that Megatron stores tokens of such a vocabulary in: uint16 or int32."""
    return np.dtype("<u2") if vocab_size < _SMALL_VOCABULARY else np.dtype("<i4")


class IndexedReader:
    """One shard, memory-mapped. A document is the run of sequences between two document boundaries.

    tokens: all tokens of the shard in their stored type; starts and lengths: int64 [num_documents],
    in tokens. Raises DataError for a shard that is missing, truncated or not of this format.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        index = _map(idx_path(self.prefix))
        num_sequences, num_boundaries, self.dtype = _read_header(index, idx_path(self.prefix))
        at = _HEADER.size
        sequence_lengths = _section(index, at, np.dtype("<i4"), num_sequences)
        pointers = _section(index, at + 4 * num_sequences, np.dtype("<i8"), num_sequences)
        boundaries = _section(index, at + 12 * num_sequences, np.dtype("<i8"), num_boundaries)

        ends = np.zeros(num_sequences + 1, np.int64)
        np.cumsum(sequence_lengths, out=ends[1:])
        self._check_index(sequence_lengths, pointers, boundaries, ends)
        self.starts: NDArray[np.int64] = ends[boundaries[:-1]]
        self.lengths: NDArray[np.int64] = ends[boundaries[1:]] - self.starts
        self.tokens: NDArray[Any] = self._map_tokens(int(ends[-1]))

    @property
    def num_documents(self) -> int:
        """Number of documents in the shard."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the shard."""
        return len(self.tokens)

    def document(self, i: int) -> NDArray[Any]:
        """Return the tokens of document i, a view of the file."""
        return self.tokens[self.starts[i] : self.starts[i] + self.lengths[i]]

    def _check_index(
        self,
        lengths: NDArray[np.int32],
        pointers: NDArray[np.int64],
        boundaries: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        path = idx_path(self.prefix)
        if len(lengths) and int(lengths.min()) < 0:
            raise DataError(
                f"{path}: a sequence has {lengths.min()} tokens; the index is damaged, prepare it again"
            )
        if not np.array_equal(pointers, ends[:-1] * self.dtype.itemsize):
            raise DataError(
                f"{path}: the sequences do not follow one another in {bin_path(self.prefix).name}; "
                "the index is damaged or belongs to another file, prepare it again"
            )
        ordered = len(boundaries) > 0 and boundaries[0] == 0 and boundaries[-1] == len(lengths)
        if not ordered or np.any(np.diff(boundaries) < 0):
            raise DataError(
                f"{path}: the document boundaries must rise from 0 to {len(lengths)} sequences; "
                "the index is damaged, prepare it again"
            )

    def _map_tokens(self, num_tokens: int) -> NDArray[Any]:
        path = bin_path(self.prefix)
        data = _map(path)
        expected = num_tokens * self.dtype.itemsize
        if len(data) != expected:
            what = "truncated" if len(data) < expected else "longer than its index says"
            raise DataError(
                f"{path} is {what}: {len(data)} bytes, but {idx_path(self.prefix).name} describes "
                f"{num_tokens} tokens of {self.dtype.itemsize} bytes = {expected} bytes; "
                "copy both files again or prepare them again"
            )
        return data.view(self.dtype)


class IndexedWriter:
    """Writes one shard; `close` puts both files in their place under their final names.

    Until then the data lie in PREFIX.bin.tmp: an interrupted writer leaves no shard behind.
    """

    def __init__(self, prefix: Path, *, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise DataError(
                f"{self.prefix}: tokens of type {self.dtype} cannot be stored; use uint16 or int32"
            )
        self._temporary = Path(f"{self.prefix}.bin.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close() or abort()
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, tokens: NDArray[Any]) -> None:
        """Append one document."""
        self.extend(tokens, np.array([len(tokens)]))

    def extend(self, tokens: NDArray[Any], lengths: NDArray[np.integer]) -> None:
        """Append several documents: their tokens joined, and the number of tokens of each."""
        if len(lengths) and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError(
                f"{self.prefix}: a document of {lengths.max()} tokens is longer than the format allows "
                f"({np.iinfo(np.int32).max}); split it"
            )
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self._lengths.append(lengths.astype(np.int32))

    def close(self) -> None:
        """Write the index and rename both files to their final names, the index last."""
        self._file.close()
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths]).astype("<i4")
        pointers = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], out=pointers[1:])
        pointers *= self.dtype.itemsize
        temporary_index = Path(f"{self.prefix}.idx.tmp")
        with open(temporary_index, "wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, _CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(pointers.data)
            file.write(np.arange(len(lengths) + 1, dtype="<i8").data)
        self._temporary.replace(bin_path(self.prefix))
        temporary_index.replace(idx_path(self.prefix))

    def abort(self) -> None:
        """Drop what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _map(path: Path) -> NDArray[np.uint8]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; a shard is a pair of files PREFIX.bin and PREFIX.idx")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; copy it again or prepare the corpus again")
    # a plain array over the map: slices of np.memmap cost several times more
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


def _read_header(index: NDArray[np.uint8], path: Path) -> tuple[int, int, np.dtype[Any]]:
    if len(index) < _HEADER.size:
        raise DataError(
            f"{path} has {len(index)} bytes, less than the header of {_HEADER.size}; it is truncated"
        )
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
    if magic != MAGIC:
        raise DataError(
            f"{path} begins with {magic!r}, not {MAGIC!r}; it is not a Megatron index, use data.prepare"
        )
    if version != 1:
        raise DataError(f"{path} has format version {version}; only version 1 is known, prepare it again")
    if code not in _DTYPES:
        known = ", ".join(f"{c} {d.name}" for c, d in _DTYPES.items())
        raise DataError(f"{path} stores tokens of type code {code}; known codes: {known}; prepare it again")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if len(index) not in (expected, expected + num_sequences):
        raise DataError(
            f"{path} has {len(index)} bytes, but its header announces {num_sequences} sequences and "
            f"{num_boundaries} document boundaries = {expected} bytes; copy it again or prepare it again"
        )
    return num_sequences, num_boundaries, _DTYPES[code]


def _section(index: NDArray[np.uint8], at: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    # numpy reads unaligned data, but a copy through bytes keeps the arithmetic on aligned arrays
    return np.frombuffer(index, dtype, count=count, offset=at)
