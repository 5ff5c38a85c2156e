"""How far a preparation is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """Counts finished units and tokens; use as a context manager."""

    def __init__(self, *, units: int, done: int) -> None:
        self._units = units
        self._done = done
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("tokenising"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("", total=units, completed=done, rate="")
        elif done:
            print(f"{done} of {units} units are done already", file=sys.stderr, flush=True)

    def advance(self, tokens: int) -> None:
        """Count one more finished unit."""
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        rate = f"{self._tokens / (now - self._started) / 1e6:.2f} M tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or self._done == self._units:
            self._last_line = now
            print(f"tokenised {self._done} of {self._units} units, {rate}", file=sys.stderr, flush=True)

    def __enter__(self) -> "PrepareProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
