"""A process that dies or hangs ends the job soon; one message says which, at which step, and who waits.

Every process writes a heartbeat (parallel/heartbeat.py) into the shared store at each interval, and watches
that of one other, rank + 1: the work does not grow with the job. The job ends with EXIT_LOST when

- the process watched is gone, or its heartbeat stands still for timeout_s (killed, stopped, machine lost);
- it left with an error, and this process waits in a collective;
- this process waits in one collective for timeout_s though all hearts beat: then, and only then, all records
  are read, and those who are not where the others wait are named;
- a collective fails because its peer died (`Watchdog.guard`);
- the store itself is gone, or does not answer for timeout_s.

A silence is found within timeout_s and two intervals, a hang within timeout_s and ten, a death on the
watcher's machine within three. Whoever finds it prints the message and publishes it as the verdict;
the others leave in silence within an interval. A process that is stopped cannot leave: the launcher kills it
(torchrun after 30 s). On an accelerator a collective is over for the host as soon as it is queued, so that
NCCL's own time limit, BACKEND_SLACK_S later, ends the wait for a peer that hangs.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType

import torch.distributed as dist

from parallel import diagnosis
from parallel.errors import EXIT_LOST, LostRankError
from parallel.groups import CollectiveCall, Trace
from parallel.heartbeat import DONE, Board, Heartbeat, Standstill, this_machine
from parallel.process import Processes

STDERR = 2
GONE_LOOKS = 2  # a dead process may have said why it left just before
FAILED_LOOKS = 5  # one mistake made by all ends all of them a moment apart, each by itself
SILENT_LOOKS = 4  # after a collective has failed, a heart that misses so many beats has stopped
PATIENCE_LOOKS = 15  # how long a failed collective may look for its cause
UNWIND_LOOKS = 15  # how long a process whose collective failed may take to close its files
LINGER_LOOKS = 3  # the launcher ends everybody when one has left: let all see the verdict before


class Watchdog:
    """Context manager, for the main thread, in which this process is watched by another and watches a third.

    processes: as `join` gave them; with one process nothing is done. trace: of this process's collectives.
    timeout_s: how long a silence or a collective may last; interval_s: between two heartbeats.

    The trainer sets `step` at each step, and `groups` (name to global ranks) to have members in messages.
    """

    def __init__(
        self, processes: Processes, *, trace: Trace, timeout_s: float, interval_s: float = 1.0
    ) -> None:
        self.step = 0
        self.groups: Mapping[str, Sequence[int]] = {}
        self._me = processes
        self._board = Board(processes.store) if processes.store else None
        self._trace = trace
        self._timeout_s = timeout_s
        self._interval_s = min(interval_s, timeout_s / 8)
        self._neighbour = (processes.rank + 1) % processes.world_size
        self._started = time.monotonic()
        self._last_call: CollectiveCall | None = None
        self._machine = this_machine()
        self._beat = 0
        self._silence = Standstill(self._interval_s)
        self._wait = Standstill(self._interval_s)
        self._failed = False  # a collective of the main thread has; it is leaving
        self._store_lost = threading.Lock()
        self._decided = threading.Event()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._board:
            self._trace.listeners.append(self._note)
            self._board.write(self._record())
            self._heart = threading.Thread(target=self._live, args=(self._board,), daemon=True)
            self._heart.start()
            threading.Thread(target=self._watch_store, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is None or self._heart is None:
            return
        self._stop.set()
        self._heart.join(timeout=2 * self._interval_s)
        self._trace.listeners.remove(self._note)
        if not self._heart.is_alive():  # otherwise the store does not answer, and writing would not return
            with suppress(dist.DistError):
                ended = DONE if error is None else diagnosis.first_line(error)
                self._board.write(self._record(ended=ended))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raise LostRankError for a RuntimeError of the body that a lost process explains; others pass.

        Backends report a peer that died as a RuntimeError, also in the collectives of libraries that the
        trace does not see. To find which one takes up to PATIENCE_LOOKS intervals.
        """
        try:
            yield
        except RuntimeError as error:
            reason = self._reason_of(error)
            if reason is None:
                raise
            raise LostRankError(reason) from error

    def _reason_of(self, error: RuntimeError) -> str | None:
        """Return the verdict, printed by then, if a process is lost; None when nothing says so."""
        if self._board is None:
            return None
        self._failed = True
        # a launcher sends SIGTERM to all as soon as one has died: the message is worth a few seconds
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            for _ in range(PATIENCE_LOOKS):
                if verdict := self._board.verdict():
                    return verdict
                if self._board.claim():
                    return self._explain(self._board, error)
                time.sleep(self._interval_s)
        except dist.DistError as gone:
            return self._tell_store_lost(f"is gone ({diagnosis.first_line(gone)})")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        return None

    def _explain(self, board: Board, error: RuntimeError) -> str | None:
        """Look among all for who is lost, holding the claim; publish that, or release the claim."""
        lost = self._lost_among_all(board)
        if not lost:
            board.release()
            return None
        here = f"{self._own_view()}: {diagnosis.first_line(error)}"
        return self._announce(board, f"{diagnosis.listed(lost)}; {here}")

    def _lost_among_all(self, board: Board) -> list[str]:
        """Describe every process that left, or whose heart does not beat for SILENT_LOOKS intervals."""
        others = [rank for rank in range(self._me.world_size) if rank != self._me.rank]
        early = board.read(others)
        if gone := diagnosis.left_behind(early.values()):
            return [diagnosis.describe(beat) for beat in gone]
        silent_s = SILENT_LOOKS * self._interval_s
        time.sleep(silent_s)
        late = board.read(others)
        lost = diagnosis.left_behind(late.values()) or diagnosis.silent(early, late)
        return [diagnosis.describe(beat, silent_s=silent_s) for beat in lost]

    def _live(self, board: Board) -> None:
        """Body of the first thread: beat and look at every interval, until told to stop or the job ends."""
        while not self._stop.wait(self._interval_s):
            try:
                over = self._look(board)
            except dist.DistError as error:
                self._tell_store_lost(f"is gone ({diagnosis.first_line(error)})")
                over = True
            if over:
                self._decided.set()
                self._leave()

    def _look(self, board: Board) -> bool:
        """Beat once, and return whether the job is to end."""
        self._beat += 1
        board.write(self._record())
        if board.verdict() is not None:
            return True
        call = self._waiting()
        waited_s = self._wait.look(call.started if call else self._beat)  # the beat is new at each look
        lost = self._lost_neighbour(board, waited_s)
        # if a heart has stopped, whoever watches it is to say so first
        stuck = waited_s >= self._timeout_s + SILENT_LOOKS * self._interval_s
        if not (lost or stuck) or not board.claim():
            return False
        self._announce(board, f"{lost}; {self._own_view()}" if lost else self._standstill(board))
        # a launcher ends all processes when one has left: let them know before
        time.sleep(LINGER_LOOKS * self._interval_s)
        return True

    def _lost_neighbour(self, board: Board, waited_s: float) -> str | None:
        """Return what became of the process watched, None while it is well or has done its work."""
        beat = board.read([self._neighbour]).get(self._neighbour)
        silent_s = self._silence.look(beat.beat if beat else None)
        if beat is None:
            never = f"rank {self._neighbour} has not begun after {silent_s:.1f} s"
            return never if silent_s >= self._timeout_s else None
        if beat.ended == DONE:
            return None
        if beat.failed:
            lost = waited_s >= FAILED_LOOKS * self._interval_s
        else:
            lost = silent_s >= self._timeout_s or (beat.gone and silent_s >= GONE_LOOKS * self._interval_s)
        return diagnosis.describe(beat, silent_s=silent_s) if lost else None

    def _standstill(self, board: Board) -> str:
        """Return for whom this process waits, though the heart that it watches beats."""
        if lost := self._lost_among_all(board):
            return f"{diagnosis.listed(lost)}; {self._own_view()}"
        late = diagnosis.late(board.read(range(self._me.world_size)).values(), self._record())
        missing = diagnosis.listed(diagnosis.describe(beat) for beat in late)
        return f"{self._own_view()}, longer than timeout_s={self._timeout_s:g} allows; it waits for {missing}"

    def _watch_store(self) -> None:
        """Body of the second thread: see that the first does not wait for the store for ever."""
        answers = Standstill(self._interval_s)
        while not self._stop.wait(self._interval_s) and not self._decided.is_set():
            if answers.look(self._beat) >= self._timeout_s:
                self._tell_store_lost(f"has not answered for {self._timeout_s:g} s")
                os._exit(EXIT_LOST)

    def _leave(self) -> None:
        """End the process; if its main thread is leaving by itself, only after a time to close files."""
        if not (self._failed and self._stop.wait(UNWIND_LOOKS * self._interval_s)):
            os._exit(EXIT_LOST)

    def _announce(self, board: Board, message: str) -> str:
        """Print the one message of the job, and let every process know it."""
        _print(message)
        board.publish(message)
        return message

    def _tell_store_lost(self, what: str) -> str:
        """Print, once per machine where possible, that nobody can be asked; return the message."""
        message = f"the store of the job {what}: whoever keeps it, the launcher or rank 0, is lost; "
        message += self._own_view()
        speaks = (
            self._me.local_rank == 0 or self._me.rank == 1
        )  # rank 1, since rank 0 may be the one that died
        if speaks and self._store_lost.acquire(blocking=False):  # all three threads find out
            _print(message)
        return message

    def _own_view(self) -> str:
        own = self._record()
        members = self.groups.get(own.group)
        ranks = f" (ranks {', '.join(map(str, members))})" if members and own.waiting else ""
        return f"rank {own.rank} is at step {own.step}, {own.doing}{ranks}"

    def _note(self, call: CollectiveCall) -> None:
        self._last_call = call

    def _waiting(self) -> CollectiveCall | None:
        """Return the oldest collective under way."""
        calls = tuple(
            self._trace.under_way
        )  # one step of the interpreter: the main thread cannot come between
        return min(calls, key=lambda call: call.started, default=None)

    def _record(self, *, ended: str = "") -> Heartbeat:
        waiting = self._waiting()
        call = waiting or self._last_call
        since = self._started if call is None else call.ended or call.started
        return Heartbeat(
            rank=self._me.rank,
            beat=self._beat,
            step=self.step,
            operation=call.operation if call else "",
            group=call.group if call else "",
            waiting=waiting is not None,
            since_s=round(time.monotonic() - since, 3),
            ended=ended,
            machine=self._machine,
            pid=os.getpid(),
        )


def _print(message: str) -> None:
    # not print(): the main thread may hang in the middle of one, holding its lock
    os.write(STDERR, f"error: {message}\n".encode())
