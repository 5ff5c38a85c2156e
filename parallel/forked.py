"""Run a function in several processes of this machine, in one gloo group, and collect what it returns.

Processes are forked after torch was imported, which is many times faster than starting interpreters. They
meet through a file, so no port can be taken, and each runs one thread.
"""

import gc
import io
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Return [function(rank, *args) for each rank], run at the same time.

    Results travel through pipes, tensors in them as copies on the CPU. The first rank that fails ends the
    others.

    Raises:
        RuntimeError: with the rank and the traceback of the first that failed, or the ranks that gave no
            answer within `timeout_s` of the answer before.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ends: list[Connection] = []
        processes = []
        with uncollected():
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                target = (theirs, f"{folder}/store", rank, world_size, timeout_s, function, args)
                processes.append(context.Process(target=_rank_main, args=target, daemon=True))
                processes[-1].start()
                theirs.close()
                ends.append(ours)
        try:
            return _collect(ends, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep what this process has thrown away from being collected by the processes that are forked inside.

    It may be something, such as a store, whose end waits for a thread; threads do not come along.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _rank_main(
    pipe: Connection,
    store: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        outcome = _pickled((True, function(rank, *args)))
    except BaseException:
        outcome = _pickled((False, traceback.format_exc()))
    pipe.send_bytes(outcome)
    pipe.close()
    os._exit(0)  # leave without tearing down: a peer may still be in a collective


def _collect(ends: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {end: rank for rank, end in enumerate(ends)}
    while waiting:
        ready = [end for end in wait(list(waiting), timeout=timeout_s) if isinstance(end, Connection)]
        if not ready:
            raise RuntimeError(f"ranks {sorted(waiting.values())} gave no answer in {timeout_s} s")
        for end in ready:
            rank = waiting.pop(end)
            try:
                fine, value = pickle.loads(end.recv_bytes())
            except EOFError:
                fine, value = False, "the process ended without an answer"
            if not fine:
                raise RuntimeError(f"rank {rank} of {len(ends)}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]


class _ByValue(pickle.Pickler):
    """Pickles a tensor as its bytes: through shared memory it would not outlive its sender."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a tensor; everything else as usual."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        tensor = value.detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        return _rebuild, (raw, tensor.dtype, tuple(tensor.shape))


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer).dump(value)
    return buffer.getvalue()


def _rebuild(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)
