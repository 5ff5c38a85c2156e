import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import UnitReader
from data.errors import DataError
from data.sources import Unit, UnitKind, plan_digest, plan_units

TEXTS = [f"document {i} " + "é" * (i % 7) for i in range(50)]


def read(source: str | Path, *, text_key: str = "text", extensions: tuple[str, ...] = ()) -> list[str]:
    units = plan_units([str(source)], extensions=extensions)
    return [text for unit in units for text in UnitReader(unit, text_key)]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert read(tmp_path / "a.txt") == ["one\r\ntwo\n"]


def test_lines_plain_and_compressed(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert read(tmp_path / "a.jsonl") == TEXTS
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read(tmp_path / "b.jsonl.gz") == TEXTS
    assert read(f"file://{tmp_path}/a.jsonl") == TEXTS


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_file_of_lines_gives_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    write_lines(path, TEXTS[:9])
    size = path.stat().st_size
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, size - 1), max_size=8))), size]
    texts: list[str] = []
    for start, stop in pairwise(cuts):
        unit = Unit(kind=UnitKind.LINES, paths=(str(path),), start=start, stop=stop)
        texts += UnitReader(unit, "text")
    assert texts == TEXTS[:9]


def test_parquet_row_groups_and_both_arrow_formats(tmp_path: Path) -> None:
    table = pa.table({"n": range(50), "body": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    assert read(tmp_path / "a.parquet", text_key="body") == TEXTS
    unit = Unit(kind=UnitKind.ROW_GROUPS, paths=(str(tmp_path / "a.parquet"),), start=1, stop=3)
    assert list(UnitReader(unit, "body")) == TEXTS[7:21]
    for name, opener in [("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)]:
        with opener(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
        assert read(tmp_path / name, text_key="body") == TEXTS


def test_folder_takes_text_and_records_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.py").write_text("hidden")
    (tmp_path / "sub" / "b.py").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    write_lines(tmp_path / "r.jsonl", ["r"])
    units = plan_units([str(tmp_path)])
    readers = [UnitReader(unit, "text") for unit in units]
    assert [text for reader in readers for text in reader] == ["r", "a", "b"]
    assert [path for reader in readers for path in reader.skipped] == [str(tmp_path / "latin.py")]
    assert read(tmp_path, extensions=("md",)) == ["r", "a"]


def test_the_standard_library_is_tens_of_megabytes_in_a_fixed_order() -> None:
    units = plan_units(["python-stdlib"])
    assert sum(unit.num_bytes for unit in units) > 10e6
    assert len(units) > 2
    paths = [path for unit in units for path in unit.paths]
    assert paths == sorted(paths)
    assert not any("site-packages" in path for path in paths)
    assert plan_digest(units) == plan_digest(plan_units(["python-stdlib"]))


def test_hugging_face_dataset_is_streamed_by_file(tmp_path: Path) -> None:
    for i in range(2):
        parquet.write_table(pa.table({"text": TEXTS[25 * i : 25 * i + 25]}), tmp_path / f"train-{i}.parquet")
    units = plan_units([f"hf:{tmp_path}:train"])
    assert [(unit.start, unit.stop) for unit in units] == [(0, 2), (1, 2)]
    assert read(f"hf:{tmp_path}:train") == TEXTS
    assert read(f"hf:{tmp_path}") == TEXTS


def expect(message: str, source: str | Path, **options: str) -> None:
    with pytest.raises(DataError, match=message):
        read(source, **options)


def test_every_mistake_is_named(tmp_path: Path) -> None:
    expect("none does not exist; give a file, a folder, a URL, hf:NAME", tmp_path / "none")
    expect("holds no text: no .jsonl", tmp_path)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": \n')
    expect("a.jsonl, byte 15: a line is not JSON", path)
    path.write_text('{"text": "ok"}\n[1]\n')
    expect("a.jsonl, byte 15: a line holds a list; every line must be one object", path)
    path.write_text('{"body": "x", "id": 1}\n')
    expect("no field 'text'; the record has body, id; name it with --text-key", path)
    expect("field 'id' holds int, not text; use another --text-key", path, text_key="id")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    expect("a.parquet: no column 'text'; it has body; use --text-key", tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no")
    expect("b.parquet is not a readable parquet file", tmp_path / "b.parquet")
    (tmp_path / "b.arrow").write_bytes(b"garbage garbage")
    expect("b.arrow is not a readable Arrow file", tmp_path / "b.arrow")
    expect("source hf:/nowhere/at/all cannot be opened", "hf:/nowhere/at/all")
