"""Where text comes from: the kinds of source, and how each is cut into units of work.

A unit is a part of a source that one process can read by itself: some small files, a range of lines, a
range of row groups. The cut depends on the sources alone, never on the number of workers, so that a
preparation gives the same shards on any machine and can go on from the units that are done.
"""

import hashlib
import json
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow.parquet as parquet

from data.errors import DataError
from data.hub import HUB, open_hub

STDLIB = "python-stdlib"
_MIN_UNIT_BYTES = 4 << 20
_MAX_UNIT_BYTES = 256 << 20
_TARGET_UNITS = 1024
_SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "node_modules")
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".parquet", ".arrow")
# files of a folder that are taken as documents when --extensions does not say otherwise
_TEXT_EXTENSIONS = frozenset(
    {
        *("txt", "md", "rst", "tex", "org", "html", "css", "xml", "yaml", "yml", "toml", "ini", "cfg"),
        *("py", "pyi", "c", "h", "cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh", "java", "kt", "scala", "go"),
        *("rs", "swift", "js", "mjs", "ts", "tsx", "jsx", "rb", "php", "pl", "lua", "r", "jl", "m", "sh"),
        *("bash", "sql", "cmake", "proto", "hs", "ml", "ex", "exs", "erl", "clj", "el", "scm", "dart"),
        *("zig", "f90", "v", "sv"),
    }
)


class UnitKind(StrEnum):
    """How a unit is read."""

    FILES = "files"  # each file is one document
    LINES = "lines"  # JSON lines that begin in bytes [start, stop) of an uncompressed file
    COMPRESSED_LINES = "compressed_lines"  # a whole compressed file of JSON lines
    ROW_GROUPS = "row_groups"  # row groups [start, stop) of a parquet file
    ARROW = "arrow"  # a whole Arrow file or stream
    HUB = "hub"  # file shard `start` of `stop` of a Hugging Face dataset


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of work; `paths` has one entry except for FILES; num_bytes is its size in the source."""

    kind: UnitKind
    paths: tuple[str, ...]
    start: int = 0
    stop: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class _File:
    path: str
    num_bytes: int


def plan_units(sources: Sequence[str], *, extensions: Sequence[str] = ()) -> list[Unit]:
    """Return the units of all sources in a fixed order. Raises DataError for a source that is not there."""
    listed = [(source, _list_files(source, extensions or _TEXT_EXTENSIONS)) for source in sources]
    total = sum(file.num_bytes for _, files in listed for file in files)
    unit_bytes = min(max(total // _TARGET_UNITS, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    units: list[Unit] = []
    for source, files in listed:
        found = _hub_units(source) if source.startswith(HUB) else _file_units(files, unit_bytes)
        if not found:
            raise DataError(
                f"source {source} holds no text: no .jsonl, .parquet, .arrow or text files; "
                "check the path, or name the endings with --extensions"
            )
        units += found
    return units


def plan_digest(units: Sequence[Unit]) -> str:
    """Return a digest of the units; it changes when a file of the sources is added, removed or resized."""
    text = json.dumps([asdict(unit) for unit in units], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _list_files(source: str, extensions: Collection[str]) -> list[_File]:
    if source.startswith(HUB):
        return []
    path = sysconfig.get_path("stdlib") if source == STDLIB else source
    file_system, root = fsspec.core.url_to_fs(path)
    if file_system.isfile(root):
        return [_File(_url(file_system, root), file_system.size(root))]
    if not file_system.isdir(root):
        raise DataError(
            f"source {source} does not exist; give a file, a folder, a URL, {HUB}NAME[:SPLIT] or {STDLIB}"
        )
    wanted = {"py"} if source == STDLIB else extensions
    found: list[_File] = []
    for _, folders, files in file_system.walk(root, detail=True):
        for name in [name for name in folders if name.startswith(".") or name in _SKIPPED_FOLDERS]:
            del folders[name]  # the walk does not enter what is taken out here
        for name, details in files.items():
            is_records = source != STDLIB and name.endswith(_SUFFIXES)
            is_text = PurePosixPath(name).suffix[1:].lower() in wanted
            if (is_records or is_text) and not name.startswith("."):
                found.append(_File(_url(file_system, details["name"]), details["size"]))
    return sorted(found, key=lambda file: file.path)


def _url(file_system: Any, name: str) -> str:
    # local paths stay plain, others get their protocol back
    return name if "file" in file_system.protocol else file_system.unstrip_protocol(name)


def _file_units(files: Sequence[_File], unit_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    texts: list[_File] = []
    for file in files:
        if file.path.endswith(".jsonl"):
            units += _ranges(UnitKind.LINES, file, file.num_bytes, unit_bytes)
        elif file.path.endswith((".jsonl.gz", ".jsonl.zst", ".json.gz")):
            units.append(Unit(kind=UnitKind.COMPRESSED_LINES, paths=(file.path,), num_bytes=file.num_bytes))
        elif file.path.endswith(".parquet"):
            groups = _num_row_groups(file.path)
            step = max(1, groups * unit_bytes // max(file.num_bytes, 1))
            units += _ranges(UnitKind.ROW_GROUPS, file, groups, step)
        elif file.path.endswith(".arrow"):
            units.append(Unit(kind=UnitKind.ARROW, paths=(file.path,), num_bytes=file.num_bytes))
        elif file.num_bytes:
            texts.append(file)
    return units + _groups(texts, unit_bytes)


def _ranges(kind: UnitKind, file: _File, end: int, step: int) -> list[Unit]:
    return [
        Unit(
            kind=kind,
            paths=(file.path,),
            start=start,
            stop=min(start + step, end),
            num_bytes=file.num_bytes * (min(start + step, end) - start) // end,
        )
        for start in range(0, end, step)
    ]


def _groups(files: Sequence[_File], unit_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    paths: list[str] = []
    size = 0
    for i, file in enumerate(files):
        paths.append(file.path)
        size += file.num_bytes
        if size >= unit_bytes or i == len(files) - 1:
            units.append(Unit(kind=UnitKind.FILES, paths=tuple(paths), num_bytes=size))
            paths, size = [], 0
    return units


def _num_row_groups(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        try:
            return parquet.ParquetFile(file).num_row_groups
        except Exception as error:  # pyarrow raises several unrelated classes for a damaged file
            raise DataError(f"{path} is not a readable parquet file: {error}; copy it again") from error


def _hub_units(source: str) -> list[Unit]:
    num_shards = open_hub(source).num_shards
    return [
        Unit(kind=UnitKind.HUB, paths=(source,), start=i, stop=num_shards, num_bytes=0)
        for i in range(num_shards)
    ]
