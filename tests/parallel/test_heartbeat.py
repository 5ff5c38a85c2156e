"""Records pass through the store unchanged; one process gets the word; silence is counted in looks."""

import multiprocessing
import os
from dataclasses import replace

import torch.distributed as dist

from parallel.heartbeat import DONE, Board, Heartbeat, Standstill, this_machine

BEAT = Heartbeat(
    rank=3,
    beat=7,
    step=12,
    operation="all_reduce",
    group="dp",
    waiting=True,
    since_s=1.25,
    ended="",
    machine=this_machine(),
    pid=os.getpid(),
)


def test_records_are_read_as_they_were_written_and_only_where_there_are_any():
    board = Board(dist.HashStore())
    board.write(BEAT)
    board.write(replace(BEAT, rank=4, ended="ValueError: ×"))
    assert board.read(range(6)) == {3: BEAT, 4: replace(BEAT, rank=4, ended="ValueError: ×")}
    assert board.read([0]) == {}


def test_one_process_has_the_word_until_it_gives_it_back():
    board = Board(dist.HashStore())
    assert [board.claim() for _ in range(3)] == [True, False, False]
    board.release()
    assert [board.claim() for _ in range(2)] == [True, False]
    assert board.verdict() is None
    board.publish("rank 3 is lost")
    assert board.verdict() == "rank 3 is lost"


def test_a_process_is_gone_only_where_its_number_means_something():
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    dead = replace(BEAT, pid=child.pid or 0)
    assert dead.gone
    assert not BEAT.gone
    assert not replace(dead, machine="another").gone
    assert not replace(dead, machine="").gone


def test_what_a_process_does_reads_well():
    assert BEAT.doing == "waiting in all_reduce over dp for 1.2 s"
    assert replace(BEAT, waiting=False).doing == "computing, 1.2 s after all_reduce over dp"
    assert replace(BEAT, waiting=False, operation="").doing == "computing, before its first collective"
    assert [replace(BEAT, ended=ended).failed for ended in ("", DONE, "ValueError: x")] == [
        False,
        False,
        True,
    ]


def test_silence_is_counted_in_looks():
    silence = Standstill(0.5)
    assert [silence.look(value) for value in (1, 1, 1, 2, 2)] == [0, 0.5, 1.0, 0, 0.5]
