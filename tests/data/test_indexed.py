import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.indexed import IndexedReader, IndexedWriter, token_dtype


def hand_made(prefix: Path) -> None:
    """Three sequences, two documents: [[5, 6, 7], [8]] and [[9, 10]], as Megatron-Core lays them out."""
    Path(f"{prefix}.bin").write_bytes(struct.pack("<6H", 5, 6, 7, 8, 9, 10))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", 8)
        + struct.pack("<Q", 3)
        + struct.pack("<Q", 3)
        + struct.pack("<3i", 3, 1, 2)
        + struct.pack("<3q", 0, 6, 8)
        + struct.pack("<3q", 0, 2, 3)
    )


def test_reads_a_hand_made_file_with_several_sequences_per_document(tmp_path: Path) -> None:
    hand_made(tmp_path / "x")
    reader = IndexedReader(tmp_path / "x")
    assert reader.num_documents == 2
    assert reader.num_tokens == 6
    assert reader.document(0).tolist() == [5, 6, 7, 8]
    assert reader.document(1).tolist() == [9, 10]


def test_writes_the_layout_byte_for_byte(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", dtype=np.int32) as writer:
        writer.add(np.array([70000, 1]))
        writer.add(np.array([], np.int64))
        writer.add(np.array([3]))
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3i", 70000, 1, 3)
    assert (tmp_path / "x.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, 3, 4)
        + struct.pack("<3i", 2, 0, 1)
        + struct.pack("<3q", 0, 8, 8)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
    assert not list(tmp_path.glob("*.tmp"))


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 65000), max_size=20), min_size=1, max_size=20))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]) -> None:
    if not any(documents):
        documents[0] = [1]
    prefix = tmp_path_factory.mktemp("round") / "x"
    with IndexedWriter(prefix, dtype=token_dtype(65001)) as writer:
        for document in documents:
            writer.add(np.array(document))
    reader = IndexedReader(prefix)
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == documents


def test_vocabulary_decides_the_stored_type() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_an_interrupted_writer_leaves_no_shard(tmp_path: Path) -> None:
    def stop_halfway() -> None:
        with IndexedWriter(tmp_path / "x", dtype=np.uint16) as writer:
            writer.add(np.array([1]))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_halfway()
    assert not list(tmp_path.iterdir())


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    match kind:
        case "truncated":
            path.write_bytes(content[:-2])
        case "longer":
            path.write_bytes(content + b"\0\0")
        case "empty":
            path.write_bytes(b"")
        case "magic":
            path.write_bytes(b"PARQUET!!" + content[9:])
        case "version":
            content[9] = 2
            path.write_bytes(content)
        case "code":
            content[17] = 99
            path.write_bytes(content)
        case "lengths":
            content[34] = 7  # the first sequence has 7 tokens instead of 3
            path.write_bytes(content)
        case "negative":
            content[34:38] = struct.pack("<i", -3)
            path.write_bytes(content)
        case "boundaries":
            content[-8:] = struct.pack("<q", 2)
            path.write_bytes(content)
        case "missing":
            path.unlink()


@pytest.mark.parametrize(
    ("suffix", "kind", "message"),
    [
        ("bin", "truncated", "x.bin is truncated: 10 bytes.*6 tokens of 2 bytes = 12 bytes; copy"),
        ("bin", "longer", "x.bin is longer than its index says: 14 bytes"),
        ("bin", "empty", "x.bin is empty; copy"),
        ("bin", "missing", "x.bin does not exist"),
        ("idx", "missing", "x.idx does not exist"),
        ("idx", "empty", "x.idx is empty"),
        ("idx", "truncated", "x.idx has 92 bytes, but its header announces 3 sequences and 3 .* = 94 bytes"),
        ("idx", "magic", "x.idx begins with b'PARQUET!!'.*not a Megatron index"),
        ("idx", "version", "version 2; only version 1"),
        ("idx", "code", "type code 99; known codes: 1 uint8"),
        ("idx", "lengths", "do not follow one another in x.bin"),
        ("idx", "negative", "a sequence has -3 tokens"),
        ("idx", "boundaries", "document boundaries must rise from 0 to 3"),
    ],
)
def test_every_damage_is_named(tmp_path: Path, suffix: str, kind: str, message: str) -> None:
    hand_made(tmp_path / "x")
    damage(tmp_path / f"x.{suffix}", kind)
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / "x")


def test_index_of_another_corpus_is_refused(tmp_path: Path) -> None:
    hand_made(tmp_path / "x")
    with IndexedWriter(tmp_path / "y", dtype=np.uint16) as writer:
        writer.add(np.arange(9))
    (tmp_path / "y.idx").replace(tmp_path / "x.idx")
    with pytest.raises(DataError, match=r"x.bin is truncated: 12 bytes, but x.idx describes 9 tokens"):
        IndexedReader(tmp_path / "x")


def test_header_shorter_than_a_header(tmp_path: Path) -> None:
    hand_made(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(b"MMIDIDX\x00\x00")
    with pytest.raises(DataError, match="9 bytes, less than the header of 34"):
        IndexedReader(tmp_path / "x")


def test_types_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokens of type float32 cannot be stored; use uint16 or int32"):
        IndexedWriter(tmp_path / "x", dtype=np.float32)
