"""Every piece of memory that a step takes: when it came, in which module, when it went, and what it was.

`Memory` observes the operations of a `DryMode` (launch/dryrun/fake.py). A storage that an operation returns
for the first time is a block; it goes when torch frees the storage. What a block is shows in what becomes of
it, so it is said afterwards:

    weights, gradients, optimizer    said by `name` once they are built; also what the passes make and keep to
                                     their end, such as the FP8 codes of weights
    communication                    read or written by a collective, and gone before the pass was over
    activations                      alive when a forward pass ended: the backward pass is to have it
    temporaries                      all else

Bytes are those that the tensors ask for. An allocator rounds up and leaves gaps, a device's context and the
communication libraries take memory of their own: none of that is here.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Kind(StrEnum):
    """What memory is for."""

    WEIGHTS = "weights"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATIONS = "activations"
    TEMPORARIES = "temporaries"
    COMMUNICATION = "communication"


class Moment(NamedTuple):
    """Something that is being done.

    forward: whether a forward pass is part of it; saves: whether it leaves something for a later moment, as
    the gradients of inputs do where those of weights are put off.
    """

    name: str
    forward: bool = False
    saves: bool = False


@dataclass(slots=True, eq=False)
class Block:
    """Memory of one storage; born and died count the changes of memory, died is None while it lives."""

    num_bytes: int
    born: int
    module: str
    died: int | None = None
    carried: bool = False
    kind: Kind | None = None


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most memory is in use."""

    by_kind: dict[Kind, int]
    moment: str
    module: str

    @property
    def total(self) -> int:
        """Return the bytes of all kinds."""
        return sum(self.by_kind.values())


class Memory:
    """The blocks of one process.

    where: returns the name of the module that works now.
    """

    def __init__(self, where: Any) -> None:
        self._where = where
        self._clock = 0
        self._bytes = self._most = self._at_most = self._measured_from = 0
        self._live: dict[int, tuple[Block, Any]] = {}
        self._blocks: list[Block] = []
        self._moments: list[tuple[int, Moment]] = [(0, Moment("building"))]

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Observe an operation: note new storages, and those that a collective reads or writes."""
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor):
                self._note(x)
        if func.namespace == "c10d":
            for x in tree_leaves(args):
                if isinstance(x, Tensor):
                    self._block(x).carried = True

    def enter(self, moment: Moment) -> None:
        """Say that something else is being done from now on."""
        self._moments.append((self._clock, moment))

    def name(self, kind: Kind, tensors: Iterable[Tensor]) -> None:
        """Say what the memory of tensors is for; what was named before keeps its name."""
        for tensor in tensors:
            block = self._block(tensor)
            block.kind = block.kind or kind

    def bytes_of(self, kind: Kind) -> int:
        """Return the bytes in use that were named so."""
        return sum(block.num_bytes for block, _ in self._live.values() if block.kind is kind)

    def start_measuring(self) -> None:
        """Forget what is over: the peak is that of what follows."""
        self._blocks = [block for block, _ in self._live.values()]
        self._most = self._bytes
        self._at_most = self._measured_from = self._clock

    def end_passes(self) -> None:
        """Say that forward and backward passes are over: what they made and left stays, like the weights."""
        for block, _ in self._live.values():
            if block.born > self._measured_from and block.kind is None and not block.carried:
                block.kind = Kind.WEIGHTS

    def peak(self) -> Peak:
        """Return the moment of most memory; in the end, when it is known what became of each block."""
        by_kind: Counter[Kind] = Counter()
        at, ends = self._at_most, self._ends()
        last = ""
        for block in self._blocks:
            if block.born <= at and (block.died is None or at < block.died):
                by_kind[self._kind(block, ends)] += block.num_bytes
                last = block.module if block.born == at else last
        index = bisect_left(self._moments, at, key=lambda pair: pair[0])
        moment = self._moments[max(0, index - 1)][1]
        return Peak(by_kind={kind: by_kind[kind] for kind in Kind}, moment=moment.name, module=last)

    def most_saved(self) -> int:
        """Return the most bytes of activations that were in use when a forward pass ended."""
        saving, ends = self._ends(), self._ends(forward=True)
        changes = [0] * (len(ends) + 1)
        for block in self._blocks:
            if self._kind(block, saving) is Kind.ACTIVATIONS:
                changes[bisect_left(ends, block.born)] += block.num_bytes
                if block.died is not None:
                    changes[bisect_left(ends, block.died)] -= block.num_bytes
        return max(accumulate(changes[:-1]), default=0)

    def _kind(self, block: Block, ends: list[int]) -> Kind:
        if block.kind is not None:
            return block.kind
        index = bisect_left(ends, block.born)
        if index < len(ends) and (block.died is None or ends[index] < block.died):
            return Kind.ACTIVATIONS
        return Kind.COMMUNICATION if block.carried else Kind.TEMPORARIES

    def _ends(self, *, forward: bool = False) -> list[int]:
        """Return when moments that leave something ended, or only those with a forward pass."""
        pairs = pairwise(self._moments)
        return [after for (_, m), (after, _) in pairs if m.forward or (m.saves and not forward)]

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._clock += 1
        block = Block(storage.nbytes(), self._clock, self._where())
        # torch keeps one Python object for a storage as long as it lives, so that its end can be heard
        self._live[key] = block, ref(storage, partial(self._free, key))
        self._blocks.append(block)
        self._bytes += block.num_bytes
        if self._bytes > self._most:
            self._most, self._at_most = self._bytes, self._clock

    def _block(self, x: Tensor) -> Block:
        self._note(x)
        return self._live[x.untyped_storage()._cdata][0]

    def _free(self, key: int, _: Any) -> None:
        block, _ = self._live.pop(key)
        self._clock += 1
        block.died = self._clock
        self._bytes -= block.num_bytes
