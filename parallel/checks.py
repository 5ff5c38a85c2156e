"""Refuse a layout that cannot run, before anything starts: every broken rule, each with the nearest remedy.

`ParallelConfig.problems` knows single fields; the rules here also need the model, the number of processes,
the batch sizes and the length of the sequences. Imports no torch, so that plans can be checked anywhere. Each
problem reads `path.field=value rule; remedy`. A rule that another broken one already explains stays silent:
where the degrees do not make up the processes, nothing is said about what follows from data parallelism.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import gcd, lcm

from model.config import ModelConfig
from parallel.config import Context, Dispatcher, Engine, Offload, ParallelConfig
from parallel.layout import Layout
from parallel.nearest import divisors, nearest, nearest_multiple
from parallel.pipeline.rules import schedule_problems
from parallel.placement import count_stages, is_legal


def layout_of(config: ParallelConfig, world_size: int) -> Layout:
    """Return the layout of `world_size` processes, data parallelism derived where it is null.

    Raises:
        ValueError: if the degrees do not fit; `layout_problems` says why.
    """
    dp = data_parallel(config, world_size)
    ep_nodes = config.ep // config.node_size if _spans_nodes(config) else 1
    if (
        dp is None
        or dp % config.dp_replicate
        or (dp * config.cp * config.tp) % config.ep
        or config.ep % ep_nodes
    ):
        raise ValueError(f"{config} does not fit {world_size} processes")
    return Layout(
        pp=config.pp,
        dp_replicate=config.dp_replicate,
        dp_shard=dp // config.dp_replicate,
        cp=config.cp,
        tp=config.tp,
        ep=config.ep,
        ep_nodes=ep_nodes,
    )


def _spans_nodes(config: ParallelConfig) -> bool:
    """Return whether tokens travel in two hops, between nodes and inside them."""
    return config.dispatcher is Dispatcher.two_hop and config.ep > config.node_size


def data_parallel(config: ParallelConfig, world_size: int) -> int | None:
    """Return the number of data-parallel ranks, or None where the degrees do not make up `world_size`."""
    others = config.pp * config.cp * config.tp
    fits = world_size % others == 0 and config.dp in (None, world_size // others)
    return world_size // others if fits else None


def layout_problems(
    parallel: ParallelConfig,
    *,
    model: ModelConfig,
    world_size: int,
    batch_sizes: Iterable[int],
    seq_len: int,
    path: str,
) -> list[str]:
    """Return every broken rule of a layout; only those of its single fields where there are any.

    Args:
        parallel: the layout as configured.
        model: the model it is to train.
        world_size: the number of processes.
        batch_sizes: every number of sequences that a step may have.
        seq_len: tokens of a sequence.
        path: where `parallel` lies in the configuration.
    """
    if single := parallel.problems():
        return [f"{path}.{line}" for line in single]
    dp = data_parallel(parallel, world_size)
    asked = _Asked(parallel, model, world_size, dp, sorted(set(batch_sizes)), seq_len)
    rules = (_processes, _experts, _tensors, _sequences, _layers, _batches, _microbatches, _engine)
    found = [f"{path}.{line}" for rule in rules for line in rule(asked)]
    if model.dropout > 0 and world_size > 1:
        found.append(f"model.dropout={model.dropout} would depend on the layout; use 0, or one process")
    return found


@dataclass(frozen=True)
class _Asked:
    """What is checked together; `dp` is None where the processes do not fit."""

    config: ParallelConfig
    model: ModelConfig
    world_size: int
    dp: int | None
    batch_sizes: list[int]
    seq_len: int


def _processes(asked: _Asked) -> Iterator[str]:
    """World size = pp * cp * tp * dp, and dp_replicate divides dp."""
    c, world = asked.config, asked.world_size
    others = c.pp * c.cp * c.tp
    if asked.dp is not None:
        if asked.dp % c.dp_replicate:
            remedy = nearest(c.dp_replicate, divisors(asked.dp))
            yield f"dp_replicate={c.dp_replicate} must divide dp={asked.dp}; use {remedy}"
    elif c.dp is not None:
        fitting = "" if world % others else f"dp={world // others} or null, or "
        yield (
            f"dp={c.dp} times pp*cp*tp={c.pp}*{c.cp}*{c.tp}={others} is {c.dp * others} processes, "
            f"not {world}; use {fitting}{c.dp * others} processes"
        )
    else:
        name, degree = max((("pp", c.pp), ("cp", c.cp), ("tp", c.tp)), key=lambda pair: pair[1])
        fits = [
            n
            for n in divisors(world)
            if world % _process_unit(replace(c, **{name: n})) == 0 and _fits_model(asked, name, n)
        ]
        smaller = f", or {name}={nearest(degree, fits)}" if fits else ""
        unit = _process_unit(c)
        yield (
            f"{name}={degree} needs a multiple of {unit} processes, pp * lcm(cp * tp * dp_replicate, ep), "
            f"not {world}; use {nearest_multiple(world, unit)} processes{smaller}"
        )


def _process_unit(c: ParallelConfig) -> int:
    """Return the number whose multiples are the legal numbers of processes where dp is null."""
    return c.pp * lcm(c.cp * c.tp * c.dp_replicate, c.ep)


def _experts(asked: _Asked) -> Iterator[str]:
    """Expert parallelism divides the experts and the processes of a pipeline rank; two hops, whole nodes."""
    c, experts = asked.config, asked.model.moe.num_experts
    peers = experts if asked.dp is None else asked.dp * c.cp * c.tp
    remedy = nearest(c.ep, divisors(gcd(peers, experts)))
    if asked.dp is not None and peers % c.ep:
        processes = nearest_multiple(asked.world_size, _process_unit(c))
        more = "" if c.dp is not None or experts % c.ep else f", or {processes} processes"
        made = f"dp*cp*tp={asked.dp}*{c.cp}*{c.tp}={peers}"
        yield f"ep={c.ep} must divide the {made} processes of a pipeline rank; use {remedy}{more}"
    if experts % c.ep:
        yield f"ep={c.ep} must divide model.moe.num_experts={experts}; use {remedy}"
    if _spans_nodes(c) and c.ep % c.node_size:
        yield (
            f"node_size={c.node_size} must divide ep={c.ep}, or not be less, for dispatcher=two_hop; "
            f"use {nearest(c.node_size, divisors(c.ep))}, or dispatcher=alltoall"
        )


def _tensors(asked: _Asked) -> Iterator[str]:
    """Tensor parallelism divides whatever is split over it."""
    tp, split = asked.config.tp, split_over_tp(asked.model)
    for name, width in split.items():
        if width % tp:
            yield f"tp={tp} must divide {name}={width}; use {nearest(tp, divisors(gcd(*split.values())))}"
    node = asked.config.node_size
    if asked.world_size > node and node % tp:
        yield f"tp={tp} reaches beyond a node of node_size={node}; use {nearest(tp, divisors(node))}"


def split_over_tp(model: ModelConfig) -> dict[str, int]:
    """Return the widths that tensor parallelism splits, by name."""
    split = {
        "model.attention.num_heads": model.attention.num_heads,
        "model.vocab_size": model.vocab_size,
    }
    if model.num_dense_layers:
        split["model.dense_intermediate_size"] = model.dense_intermediate_size
    if model.num_layers + model.num_mtp_layers > model.num_dense_layers:
        width = (
            model.moe.num_shared_experts * model.moe.intermediate_size
        )  # 0 where there is nothing to split
        split["model.moe.num_shared_experts*intermediate_size"] = width
    return split


def _fits_model(asked: _Asked, name: str, degree: int) -> bool:
    """Return whether a degree may be proposed for this model."""
    return name != "tp" or gcd(*split_over_tp(asked.model).values()) % degree == 0


def _sequences(asked: _Asked) -> Iterator[str]:
    """Every rank has as many tokens of a sequence, and with cp one chunk from each half of it (zigzag)."""
    c, heads, length = asked.config, asked.model.attention.num_heads, asked.seq_len
    name, degree = ("cp", c.cp) if c.cp > 1 else ("tp", c.tp)
    if length % _pieces(c):
        fits = [
            n
            for n in divisors(length)
            if length % _pieces(replace(c, **{name: n})) == 0 and _fits_model(asked, name, n)
        ]
        smaller = f"{name}={nearest(degree, fits)}, or " if fits else ""
        formula = f"2*cp*tp={_pieces(c)}" if c.cp > 1 else f"tp={c.tp}"
        yield (
            f"{name}={degree} needs seq_len={length} to be a multiple of {formula}; "
            f"use {smaller}seq_len={nearest_multiple(length, _pieces(c))}"
        )
    heads_here = heads // c.tp
    if c.context is Context.ulysses and c.cp > 1 and heads % c.tp == 0 and heads_here % c.cp:
        yield (
            f"cp={c.cp} must divide the {heads_here} heads of a tp rank for context=ulysses; "
            f"use {nearest(c.cp, divisors(heads_here))}, or context=gather"
        )


def _pieces(c: ParallelConfig) -> int:
    """Return the number of equal pieces into which a sequence is cut."""
    return 2 * c.cp * c.tp if c.cp > 1 else c.tp


def _layers(asked: _Asked) -> Iterator[str]:
    """There is a layer for every stage but the ends, and a placement by hand covers the model."""
    c, num_layers = asked.config, asked.model.num_layers
    stages = count_stages(c)
    if num_layers < stages - 2:
        legal = [n for n in range(1, c.pp) if count_stages(replace(c, pp=n)) - 2 <= num_layers]
        yield (
            f"pp={c.pp} makes {stages} stages, for which model.num_layers={num_layers} are too few: only the "
            f"first and the last may do without; use {nearest(c.pp, legal)}"
        )
    by_hand = list(c.layers_per_stage)
    if by_hand and not is_legal(by_hand, num_layers=num_layers, num_stages=stages):
        yield (
            f"layers_per_stage={by_hand} must give each of {stages} stages its layers, at least 1 except for "
            f"the first and the last, {num_layers} in all, not {sum(by_hand)} on {len(by_hand)} stages; "
            f"use [] to balance by cost"
        )


def _batches(asked: _Asked) -> Iterator[str]:
    """Every batch is whole microbatches on every data-parallel rank."""
    c, dp = asked.config, asked.dp
    if dp is None:
        return
    unit = dp * c.microbatch_size
    bad = [size for size in asked.batch_sizes if size % unit]
    if not bad:
        return
    common = gcd(*asked.batch_sizes)
    remedies = [f"a batch of {nearest_multiple(bad[0], unit)}"]
    if common % dp == 0:
        remedies.insert(0, f"microbatch_size={nearest(c.microbatch_size, divisors(common // dp))}")
    fewer = gcd(common // c.microbatch_size, dp)
    longer = replace(c, cp=c.cp * dp // fewer)
    if fewer < dp and common % c.microbatch_size == 0 and asked.seq_len % _pieces(longer) == 0:
        remedies.append(f"cp={longer.cp}, which leaves dp={fewer}")
    few = ", ".join(map(str, bad[:3])) + (", …" if len(bad) > 3 else "")
    yield (
        f"microbatch_size={c.microbatch_size} on dp={dp} ranks needs batches, those of a ramp too, that are "
        f"multiples of {unit}, not {few}; use {', or '.join(remedies)}"
    )


def _microbatches(asked: _Asked) -> Iterator[str]:
    """The schedule's own rules for every batch size, each rule with the smallest batch that breaks it."""
    c, dp = asked.config, asked.dp
    if dp is None or c.pp == 1:
        return
    seen: set[str] = set()
    for size in asked.batch_sizes:
        if size % (dp * c.microbatch_size):
            continue
        for line in _of_schedule(c, size // dp // c.microbatch_size):
            rule = re.sub(r"\d+", "", line)  # the sentence without its figures
            if rule in seen:
                continue
            seen.add(rule)
            if line[0].isdigit():  # it is about the number of microbatches, which is no field of ours
                fits = [m for m in divisors(size // dp) if not _of_schedule(c, size // dp // m)]
                remedy = f", as with microbatch_size={nearest(c.microbatch_size, fits)}" if fits else ""
                line = f"schedule={c.schedule} with dp={dp}: a batch of {size} is {line}{remedy}"
            yield line


def _of_schedule(c: ParallelConfig, num_microbatches: int) -> list[str]:
    return schedule_problems(c.schedule, pp=c.pp, chunks=c.chunks, num_microbatches=num_microbatches)


def _engine(asked: _Asked) -> Iterator[str]:
    """What the two optimizer engines can do."""
    c = asked.config
    if c.engine is Engine.zero1:
        if c.zero_stage != 1:
            yield f"zero_stage={c.zero_stage} needs engine=deepspeed; use 1, or engine=deepspeed"
        if c.offload is not Offload.none:
            yield f"offload={c.offload} needs engine=deepspeed; use none, or engine=deepspeed"
        return
    if c.zero_stage > 1 and c.pp > 1:
        yield f"zero_stage={c.zero_stage} cannot be pipelined; use 1, or pp=1"
