"""The whole answer as one JSON object, for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launch.plan.answer import SHOWN, StageAnswer
from launch.plan.published import STAGE_COSTS, Comparison
from launch.plan.sensitivity import Effect
from launch.plan.tables import is_published
from parallel.links import Bytes
from parallel.planner import Plan


def answer_json(answers: Sequence[StageAnswer], main: StageAnswer, found: Sequence[Effect]) -> dict[str, Any]:
    """Return everything that the tables show; bytes, seconds and hours are plain numbers.

    The figures at the top are those of the best layout of `main`, the stage with most tokens.
    """
    return {
        "gpu_hours_per_trillion_tokens": main.best.gpu_hours_per_trillion_tokens,
        "tokens_per_second_per_gpu": main.best.tokens_per_second,
        "mfu": main.best.mfu,
        "stage": main.question.name,
        "gpu_hours": sum(each.gpu_hours(each.chosen) for each in answers),
        "stages": [_stage(each) for each in answers],
        "sensitivity": [asdict(effect) for effect in found],
        "published": [
            {"stages": list(stages), **asdict(cost)}
            for stages, cost in STAGE_COSTS.items()
            if is_published(main)
        ],
    }


def comparisons_json(found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the published speeds with what is predicted for them."""
    return [
        {
            **asdict(each.point),
            "predicted": each.predicted,
            "error": each.error,
            "plan": plan_json(each.plan),
        }
        for each in found
    ]


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return one layout and what it costs; times and traffic are those of a step of the largest batch."""
    step = plan.full_step
    return {
        "layout": {name: _plain(getattr(plan.parallel, name)) for name in SHOWN} | {"dp": plan.layout.dp},
        "layers_per_stage": [len(layers) for layers in plan.layers],
        "fits": plan.fits,
        "memory_bytes": [
            {
                "weights": use.state.parameters,
                "codes": use.state.codes,
                "gradients": use.state.gradients,
                "optimizer": use.state.optimizer,
                "buffers": use.state.buffers,
                "activations": round(use.activations),
                "recomputed": round(use.recomputed),
                "total": round(use.total),
            }
            for use in plan.memory
        ],
        "traffic_bytes": {
            name: _bytes(getattr(step, name))
            for name in ("experts", "collectives", "pipeline_transfers", "data_parallel", "traffic")
        },
        "step_seconds": step.seconds,
        "step_parts": {name: getattr(step, name) for name in ("pipeline", "reduce", "update", "gather")},
        "bubble": step.bubble,
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "mfu": plan.mfu,
        "gpu_hours_per_trillion_tokens": plan.gpu_hours_per_trillion_tokens,
    }


def _stage(answer: StageAnswer) -> dict[str, Any]:
    question = answer.question
    hours = answer.gpu_hours(answer.chosen)
    rent = question.task.cluster.dollars_per_hour
    return {
        "name": question.name,
        "tokens": question.num_tokens,
        "steps": sum(question.steps.values()),
        "seq_len": question.task.seq_len,
        "gpu_hours": hours,
        "days": hours / question.task.world_size / 24,
        "dollars": None if rent is None else hours * rent,
        "own": None if answer.own is None else plan_json(answer.own),
        "own_problems": answer.own_problems,
        "runs_as_configured": answer.own is not None and not answer.own_problems,
        "layouts": [
            plan_json(plan) | {"overrides": answer.overrides(plan), "own": answer.is_own(plan)}
            for plan in answer.plans
        ],
        "legal_layouts": answer.found.num_legal,
    }


def _bytes(sent: Bytes) -> dict[str, float]:
    return {"between_nodes": sent.inter, "inside_a_node": sent.intra}


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value
