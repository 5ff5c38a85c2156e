"""How much the answer depends on each assumption: one moved at a time by a fifth, the layout held."""

from dataclasses import dataclass, fields, replace

from parallel.cluster import ClusterConfig, Efficiencies
from parallel.planner import Plan

STEP = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """Device hours per trillion tokens with an assumption a fifth lower, and a fifth higher (at most 1)."""

    name: str
    value: float
    lower: float
    higher: float


def sensitivity(plan: Plan) -> list[Effect]:
    """Return the effect of each efficiency and of the share that exchanges take, the largest first."""
    cluster = plan.task.cluster
    effects = [
        _effect(plan, f"efficiency.{each.name}", getattr(cluster.efficiency, each.name))
        for each in fields(Efficiencies)
    ]
    effects.append(_effect(plan, "communication_share", cluster.communication_share))
    return sorted(effects, key=lambda effect: -abs(effect.lower - effect.higher))


def _effect(plan: Plan, name: str, value: float) -> Effect:
    lower, higher = (
        replanned(
            plan, _with(plan.task.cluster, name, min(1.0, value * factor))
        ).gpu_hours_per_trillion_tokens
        for factor in (1 - STEP, 1 + STEP)
    )
    return Effect(name=name, value=value, lower=lower, higher=higher)


def replanned(plan: Plan, cluster: ClusterConfig) -> Plan:
    """Return the same layout of the same task on another cluster."""
    return Plan(plan.task.on(cluster), plan.parallel)


def _with(cluster: ClusterConfig, name: str, value: float) -> ClusterConfig:
    section, _, field = name.rpartition(".")
    if section:
        return replace(cluster, efficiency=replace(cluster.efficiency, **{field: value}))
    return replace(cluster, **{field: value})
