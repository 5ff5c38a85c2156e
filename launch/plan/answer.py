"""The answer to a question: the best layouts of each stage beside its own, hours, days and cost."""

from dataclasses import dataclass
from math import ceil

from launch.plan.question import Question, broken_rules
from parallel.config import ParallelConfig
from parallel.pipeline.rules import INTERLEAVED
from parallel.planner import HOUR, Plan
from parallel.rates import GIGA
from parallel.search import Found, search
from train.errors import RunError

SHOWN = (
    "pp",
    "ep",
    "tp",
    "cp",
    "context",
    "schedule",
    "chunks",
    "dispatcher",
    "recompute",
    "microbatch_size",
    "layers_per_stage",
)
"""Fields that tell layouts apart."""


@dataclass(frozen=True, kw_only=True)
class StageAnswer:
    """One stage: the best layouts, and its own where that can run at all.

    own: the configured layout, for the largest batch; None where it cannot run even that. own_problems: what
    keeps it from running, of the rules or of memory.
    """

    question: Question
    found: Found
    own: Plan | None
    own_problems: list[str]

    @property
    def plans(self) -> list[Plan]:
        """Return the best layouts and the configured one, also where that cannot run; fastest first."""
        plans = list(self.found.plans)
        if self.own is not None:
            plans = [plan for plan in plans if not self.is_own(plan)] + [self.own]
        return sorted(plans, key=lambda plan: plan.full_step.seconds)

    @property
    def best(self) -> Plan:
        """Return the fastest layout that is legal and fits."""
        return next(plan for plan in self.plans if not (self.own_problems and self.is_own(plan)))

    @property
    def chosen(self) -> Plan:
        """Return what the stage would run with: its own layout, or the best where that cannot run."""
        return self.best if self.own is None or self.own_problems else self.own

    def is_own(self, plan: Plan) -> bool:
        """Return whether a plan is the configured layout."""
        return self.own is not None and _same(plan, self.own)

    def overrides(self, plan: Plan) -> list[str]:
        """Return what to add to the command line for the stage to have this layout."""
        return differences(plan, self.question.own, path=f"stages.{self.question.name}.parallel")

    def seconds(self, plan: Plan) -> float:
        """Return the time of all steps of the stage, those of a ramp included."""
        return sum(count * plan.step(size).seconds for size, count in self.question.steps.items() if count)

    def gpu_hours(self, plan: Plan) -> float:
        """Return the device hours of the stage."""
        return self.seconds(plan) * self.question.task.world_size / HOUR


def answer(question: Question, *, count: int) -> StageAnswer:
    """Search the layouts of one stage. Raises RunError if none is legal, or none fits."""
    found = search(question.task, base=question.own, fixed=question.fixed, count=count)
    own, problems = _own(question)
    if not found.plans and (own is None or problems):
        raise RunError(_nothing(question, found, problems))
    return StageAnswer(question=question, found=found, own=own, own_problems=problems)


def differences(plan: Plan, present: ParallelConfig, *, path: str = "parallel") -> list[str]:
    """Return the overrides that turn the layout at `path` of a configuration into this one."""
    found = {name: value for name in SHOWN if (value := _value(plan.parallel, name)) != _value(present, name)}
    if present.dp not in (None, plan.layout.dp):
        found["dp"] = "null"
    if present.node_size != plan.parallel.node_size:
        found["node_size"] = plan.parallel.node_size
    return [f"{path}.{name}={_written(value)}" for name, value in found.items() if value is not None]


def described(plan: Plan) -> str:
    """Return a layout in the words of its configuration, without what does nothing."""
    values = {name: _value(plan.parallel, name) for name in SHOWN}
    return " ".join(f"parallel.{name}={_written(value)}" for name, value in values.items() if value)


def _own(question: Question) -> tuple[Plan | None, list[str]]:
    """Return the configured layout, for the batches that it can run, and what keeps it from running all."""
    if not question.problems:
        plan = Plan(question.task, question.own)
        return plan, [] if plan.fits else [f"stages.{question.name}.parallel {too_large(plan)}"]
    task = question.task.with_batches(max(question.task.batch_sizes))
    broken = broken_rules(task, question.own, path="parallel")
    return (None if broken else Plan(task, question.own)), question.problems


def too_large(plan: Plan) -> str:
    """Return how much a layout needs of a device, and how much there is."""
    cluster = plan.task.cluster
    return (
        f"needs {plan.peak_memory / GIGA:.1f} GB on its fullest device; {cluster.name} has "
        f"memory_gb={cluster.memory_gb:g}, of which memory_reserve_gb={cluster.memory_reserve_gb:g} stay free"
    )


def _nothing(question: Question, found: Found, problems: list[str]) -> str:
    """Return why a stage has no plan, with the nearest choices."""
    lines = [f"  {line}" for line in problems]
    if found.smallest is None:
        return "\n".join(
            [f"stage {question.name}: no layout of {question.task.world_size} devices is legal:", *lines]
        )
    smallest = found.smallest
    needed = ceil(smallest.peak_memory / GIGA + question.task.cluster.memory_reserve_gb)
    lines.append(
        f"  the layout that needs least, {described(smallest)}, {too_large(smallest)}; use "
        f"a card with at least {needed} GB, more devices, or fewer fixed keys"
    )
    return "\n".join([f"stage {question.name}: no layout fits {question.task.cluster.name}:", *lines])


def _value(p: ParallelConfig, name: str) -> object:
    """Return a field of a layout; None where it does nothing."""
    idle = {
        "schedule": p.pp == 1,
        "chunks": p.pp == 1 or p.schedule not in INTERLEAVED,
        "dispatcher": p.ep <= p.node_size,
        "context": p.cp == 1,
    }
    return None if idle.get(name, False) else getattr(p, name)


def _written(value: object) -> str:
    """Return a value as Hydra reads it, in one word of a command line."""
    return str(value).replace(" ", "")


def _same(one: Plan, other: Plan) -> bool:
    """Return whether two plans are one layout; a cut by hand that is the balanced one makes no difference."""
    names = [name for name in SHOWN if name != "layers_per_stage"]
    alike = all(_value(one.parallel, name) == _value(other.parallel, name) for name in names)
    return alike and one.layers == other.layers
