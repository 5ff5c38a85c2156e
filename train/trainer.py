"""The training loop of one stage, on one screen.

Everything a step does is decided by `TrainState` and the configuration before it begins, and everything it
changes is in the checkpoint after it: so a run that was killed repeats its lost steps bit for bit.
"""

import time
from dataclasses import dataclass

import torch

from data.loader import Batches
from model.config import Compute, Gemm
from model.cost import flops_per_token
from parallel.schedule import Batch, StepOutput
from parallel.watchdog import Watchdog
from train.balance import update_router_biases
from train.batch import make_batch
from train.build import StageParts
from train.checkpoints.manager import CheckpointManager
from train.config import RunConfig
from train.engines.engine import Update
from train.errors import EXIT_STOPPED, EXIT_UNSTABLE, RunError
from train.fp8_numerics import measured
from train.logs.metrics import StepResult, step_record
from train.logs.sinks import Sinks
from train.schedule import batch_size_at, lr_at, steps_value
from train.signals import StopRequest
from train.state import TrainState
from train.stored_config import config_text


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What the schedules say about the step that is about to be taken."""

    batch_size: int
    lr: float
    mtp_weight: float
    bias_speed: float
    loss_scale: float


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains the stage in which `state` stands until its token budget is spent; all processes together."""

    config: RunConfig
    state: TrainState
    parts: StageParts
    batches: Batches
    checkpoints: CheckpointManager
    sinks: Sinks
    stop: StopRequest
    device: torch.device
    watchdog: Watchdog

    def fit(self) -> None:
        """Train to the end of the stage and save it; RunError when stopped by a signal or unstable."""
        stage = self.config.stages[self.state.stage]
        while self.state.stage_tokens < stage.num_tokens:
            started, plan = time.perf_counter(), self.plan()
            self.watchdog.step = self.state.step + 1
            batch = self.next_batch(plan.batch_size)
            self.parts.watch.start(active=self.measures_fp8())
            torch.manual_seed(self.config.seed + self.state.step)  # dropout: a function of (seed, step) alone
            output = self.parts.schedule.step(batch, mtp_weight=plan.mtp_weight, loss_scale=plan.loss_scale)
            update = self.update(output, plan)
            self.state.advance(num_samples=plan.batch_size, seq_len=stage.seq_len)
            self.record(plan, output, update, seconds=time.perf_counter() - started)
            finished = self.state.stage_tokens >= stage.num_tokens
            stop = self.stop.agreed(self.parts.mesh.world)
            if finished or stop or self.state.step % self.config.checkpoint.every_steps == 0:
                self.save(permanent=finished)
            self.leave_if_asked(stop, finished=finished)

    def plan(self) -> StepPlan:
        """Read the schedules at the tokens seen so far."""
        stage, tokens = self.config.stages[self.state.stage], self.state.stage_tokens
        return StepPlan(
            batch_size=batch_size_at(stage.batch, tokens),
            lr=lr_at(stage.lr, step=self.state.stage_step + 1, tokens=tokens, num_tokens=stage.num_tokens),
            mtp_weight=steps_value(stage.mtp_weight, tokens),
            bias_speed=steps_value(stage.bias_speed, tokens),
            loss_scale=self.parts.loss_scale.value,
        )

    def measures_fp8(self) -> bool:
        """Return whether the losses of FP8 are counted in the step that is about to be taken."""
        quantises = self.config.precision.gemm in (Gemm.fp8_reference, Gemm.fp8_triton)
        return quantises and (self.state.step + 1) % self.config.logging.fp8_every == 0

    def next_batch(self, batch_size: int) -> Batch:
        """Draw this process's part of the next `batch_size` samples of the stage."""
        rows, depths = self.batches.next(batch_size), self.config.model.num_mtp_layers
        return make_batch(rows, num_mtp_layers=depths, device=self.device, mesh=self.parts.mesh)

    def update(self, output: StepOutput, plan: StepPlan) -> Update:
        """Clip, update weights and router biases, clear gradients; do nothing if anything is not finite."""
        self.parts.engine.reduce()
        update = self.parts.engine.update(
            lr=plan.lr,
            max_norm=self.config.optimizer.max_grad_norm,
            loss_scale=plan.loss_scale,
            finite=bool(torch.isfinite(output.loss_sums_K).all()),
        )
        if not update.skipped:
            routers = self.parts.model.routers()
            update_router_biases(routers, output.loads_of(routers), speed=plan.bias_speed)
            if self.parts.ema:
                self.parts.ema.update(self.parts.engine.masters())
        self.parts.loss_scale.update(not update.skipped)
        self.count_skipped(not update.skipped)
        return update

    def count_skipped(self, finite: bool) -> None:
        """Count a skipped step; the check against the limit comes after the step is recorded."""
        self.state.skipped += not finite
        self.state.skipped_in_a_row = 0 if finite else self.state.skipped_in_a_row + 1

    def record(self, plan: StepPlan, output: StepOutput, update: Update, *, seconds: float) -> None:
        """Write one step's record to every sink."""
        state, (loss, *mtp_loss) = self.state, output.mean_loss_K.tolist()
        result = StepResult(
            step=state.step,
            stage=state.stage,
            tokens=state.tokens,
            stage_tokens=state.stage_tokens,
            seq_len=self.config.stages[state.stage].seq_len,
            batch_size=plan.batch_size,
            loss=loss,
            mtp_loss=mtp_loss,
            balance_loss=float(output.balance_loss),
            lr=plan.lr,
            mtp_weight=plan.mtp_weight,
            bias_speed=plan.bias_speed,
            grad_norm=update.grad_norm,
            skipped=update.skipped,
            loss_scale=plan.loss_scale if self.config.precision.compute is Compute.fp16 else None,
            load_LE=output.load_LE.cpu(),
            bias_LE=self.parts.all_biases(output.layers).cpu(),
            seconds=seconds,
            fp8=measured(self.parts.watch, self.parts.mesh.world, self.device),
        )
        record = step_record(
            result,
            layer_names=list(output.layers),
            flops_per_token=flops_per_token(self.config.model, self.config.stages[state.stage].seq_len),
            peak_tflops=self.config.cluster.peak_tflops,
            histogram=state.step % self.config.logging.histogram_every == 0,
        )
        self.sinks.write(record)

    def save(self, *, permanent: bool) -> None:
        """Write a checkpoint of this step, in the background where the configuration says so."""
        state = self.state
        state.num_updates = self.parts.engine.num_updates
        state.loss_scale = self.parts.loss_scale.state_dict()
        name = f"{state.stage}-{state.step:08d}"
        self.checkpoints.save(
            name,
            self.parts.tensors(),
            state.to_dict(),
            config_yaml=config_text(self.config),
            permanent=permanent,
        )
        self.sinks.message(f"saving checkpoint {name}")

    def leave_if_asked(self, stop: str | None, *, finished: bool) -> None:
        """End the run when too many steps in a row were skipped, or when a signal asks for it."""
        state, limit = self.state, self.config.optimizer.max_skipped_steps
        if state.skipped_in_a_row >= limit:
            self.checkpoints.wait()
            raise RunError(
                f"step {state.step}: loss or gradient was not finite {state.skipped_in_a_row} times in a row "
                f"(optimizer.max_skipped_steps={limit}); lower stages.{state.stage}.lr.peak, or look at the "
                "data of these steps. The last checkpoint is kept.",
                exit_code=EXIT_UNSTABLE,
            )
        if stop and not finished:
            self.checkpoints.wait()
            raise RunError(
                f"stopped by {stop} after step {state.step}, which is saved; "
                "the same command continues from it",
                exit_code=EXIT_STOPPED,
            )
