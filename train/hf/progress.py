"""How far a conversion is: a bar on a terminal, a line per file elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from train.logs.console import quantity

Advance = Callable[[str, int], None]
"""Called with the file at hand and the bytes that are done since the last call."""


@contextmanager
def byte_progress(console: Console, *, verb: str, total_bytes: int) -> Iterator[Advance]:
    """Show the progress of `verb` over `total_bytes`; yields what to call as bytes are done."""
    if console.is_terminal:
        with _bar(console, verb=verb, total_bytes=total_bytes) as advance:
            yield advance
        return
    by_file: dict[str, int] = {}

    def tell() -> None:
        share = f"{quantity(sum(by_file.values()))}B of {quantity(total_bytes)}B"
        console.print(f"{verb} {list(by_file)[-1]} · {share}", markup=False, highlight=False, soft_wrap=True)

    def advance_plain(file: str, num_bytes: int) -> None:
        if by_file and file not in by_file:
            tell()
        by_file[file] = by_file.get(file, 0) + num_bytes

    yield advance_plain
    if by_file:
        tell()


@contextmanager
def _bar(console: Console, *, verb: str, total_bytes: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(verb, total=total_bytes)

        def advance(file: str, num_bytes: int) -> None:
            progress.update(task, advance=num_bytes, description=f"{verb} {file}")

        yield advance
