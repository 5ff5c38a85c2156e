"""Tables that are printed alike by plans and dry runs: in colour on a terminal, plain text elsewhere."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 120


def console() -> Console:
    """Return where tables are printed: at most 120 columns, and as many where output is no terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal and plain.width <= WIDTH else Console(highlight=False, width=WIDTH)


def new_table(title: str | None = None, *, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return a table without rows: columns of words, then columns of figures, which are never broken."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
