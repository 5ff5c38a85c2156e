"""The documents of a unit of work, read as a stream: nothing is ever loaded whole but a single document."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet

from data.errors import DataError
from data.hub import open_hub
from data.sources import Unit, UnitKind

_ROWS_AT_ONCE = 1024


@dataclass
class UnitReader:
    """Iterates over the texts of a unit; `skipped` names the files that are not UTF-8 text."""

    unit: Unit
    text_key: str
    skipped: list[str] = field(default_factory=list[str])

    def __iter__(self) -> Iterator[str]:
        """Yield every non-empty text of the unit in the order of the source."""
        match self.unit.kind:
            case UnitKind.FILES:
                texts = self._files()
            case UnitKind.LINES | UnitKind.COMPRESSED_LINES:
                texts = self._lines()
            case UnitKind.ROW_GROUPS:
                texts = self._row_groups()
            case UnitKind.ARROW:
                texts = self._arrow()
            case UnitKind.HUB:
                texts = self._hub()
        return (text for text in texts if text)

    def _files(self) -> Iterator[str]:
        for path in self.unit.paths:
            with _open(path) as file:
                content = file.read()
            try:
                yield content.decode("utf-8")
            except UnicodeDecodeError:
                self.skipped.append(path)  # the summary names it; the other files are used

    def _lines(self) -> Iterator[str]:
        path = self.unit.paths[0]
        whole = self.unit.kind == UnitKind.COMPRESSED_LINES
        with _open(path, compression="infer" if whole else None) as file:
            at = 0
            if self.unit.start:
                # the line that crosses the boundary belongs to the unit in which it begins
                file.seek(self.unit.start - 1)
                at = self.unit.start - 1 + len(file.readline())
            for line in file:
                if not whole and at >= self.unit.stop:
                    return
                if line.strip():
                    yield self._text_of_line(line, f"{path}, byte {at}")
                at += len(line)

    def _text_of_line(self, line: bytes, where: str) -> str:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{where}: a line is not JSON ({error}); every line must be one object"
            ) from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{where}: a line holds a {kind}; every line must be one object")
        return self._text_of(record, where)

    def _text_of(self, record: dict[str, Any], where: str) -> str:
        if self.text_key not in record:
            raise DataError(
                f"{where}: no field {self.text_key!r}; the record has {', '.join(record)}; "
                "name it with --text-key"
            )
        value = record[self.text_key]
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{where}: field {self.text_key!r} holds {type(value).__name__}, not text; "
                "use another --text-key"
            )
        return value or ""

    def _row_groups(self) -> Iterator[str]:
        path = self.unit.paths[0]
        with _open(path) as file:
            table = parquet.ParquetFile(file)
            self._need_column(table.schema_arrow.names, path)
            groups = list(range(self.unit.start, self.unit.stop))
            for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=[self.text_key]):
                yield from self._column(batch.column(0), path)

    def _arrow(self) -> Iterator[str]:
        path = self.unit.paths[0]
        with _open(path) as file:
            try:
                batches = _record_batches(file)
                for batch in batches:
                    self._need_column(batch.schema.names, path)
                    yield from self._column(batch.column(self.text_key), path)
            except pa.ArrowInvalid as error:
                raise DataError(f"{path} is not a readable Arrow file: {error}; copy it again") from error

    def _need_column(self, names: list[str], path: str) -> None:
        if self.text_key not in names:
            raise DataError(f"{path}: no column {self.text_key!r}; it has {', '.join(names)}; use --text-key")

    def _column(self, column: Any, path: str) -> Iterator[str]:
        for value in column.to_pylist():
            yield self._text_of({self.text_key: value}, path)

    def _hub(self) -> Iterator[str]:
        source = self.unit.paths[0]
        dataset = open_hub(source).shard(num_shards=self.unit.stop, index=self.unit.start)
        for record in dataset:
            yield self._text_of(record, source)


def _open(path: str, *, compression: str | None = None) -> Any:
    """Return a context manager that gives the file, local or remote, for reading bytes."""
    return fsspec.open(path, "rb", compression=compression)


def _record_batches(file: Any) -> Iterator[Any]:
    is_file_format = file.read(6) == b"ARROW1"
    file.seek(0)
    if is_file_format:
        reader = pa.ipc.open_file(file)
        return (reader.get_batch(i) for i in range(reader.num_record_batches))
    return iter(pa.ipc.open_stream(file))
