"""What the links reach: an all-to-all inside every node, and one between nodes among ranks of equal place.

These are the two groups of experts spread over all ranks of the job, so the mesh of such a layout has them.
Bytes are those that leave a rank for other ranks, as `cluster.intra_node_gb_s` and `inter_node_gb_s` count.
"""

from collections.abc import Iterator, Sequence

from launch.calibrate.rate import Rate
from parallel.layout import Layout
from parallel.mesh import build_mesh
from parallel.preflight.exercise import exercise
from parallel.preflight.operations import OPERATIONS
from train.errors import RunError
from train.team import Team

MESSAGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
RUNS = 3
OPERATION = "all_to_all"


def link_rates(team: Team, hosts: Sequence[str]) -> Iterator[Rate]:
    """Measure the links between the ranks of the job, as far as there are several; all ranks call this.

    hosts: of every rank. RunError where hosts do not hold as many ranks each, one host after the other.
    """
    layout = spread(hosts)
    mesh = build_mesh(layout, rank=team.processes.rank, trace=team.trace)
    for name, group in (("intra_node", mesh.ep_intra), ("inter_node", mesh.ep_inter)):
        team.world.barrier()
        if group.size == 1:
            continue
        size = MESSAGE_BYTES[team.device.type]
        runs = [exercise(OPERATION, group, device=team.device, num_bytes=size) for _ in range(RUNS)]
        if broken := next((run for run in runs if run.error or run.wrong), None):
            what = broken.error or f"{broken.wrong} wrong values"
            raise RunError(f"{OPERATION} over {name} fails ({what}); run python -m launch preflight first")
        sent = runs[0].num_bytes * OPERATIONS[OPERATION].share(group.size)
        what = f"{OPERATION} of {runs[0].num_bytes / 1e6:.0f} MB among {group.size} ranks"
        yield Rate(name=name, what=what, unit="B", work=sent, seconds=[run.seconds for run in runs])


def spread(hosts: Sequence[str]) -> Layout:
    """Return the layout in which all ranks of these hosts share one set of experts."""
    world_size, nodes = len(hosts), len(set(hosts))
    size = world_size // nodes
    regular = all(len(set(hosts[first : first + size])) == 1 for first in range(0, world_size, size))
    if world_size % nodes or not regular:
        raise RunError(
            f"hosts of the ranks: {', '.join(hosts)}; each must hold as many as the others, one host after "
            "the other: start as many processes on every host"
        )
    return Layout(dp_shard=world_size, ep=world_size, ep_nodes=nodes)
