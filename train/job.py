"""The main job: every stage that remains, each from the checkpoint before it, then evaluation and report.

A stage always starts the same way, whether the process just trained the stage before it or resumes after
a crash: build for this stage's length and layout, load the newest checkpoint, go on at the next sample.
"""

from pathlib import Path

from rich.console import Console

from data.dataset import TrainingData
from data.heldout import HeldOut
from data.loader import Batches
from parallel.checks import layout_of
from parallel.mesh import build_mesh
from train.build import StageParts, build_stage, check_multipliers
from train.checkpoints.durable import replace_durably
from train.checkpoints.manager import CheckpointManager, newest_intact
from train.checkpoints.manifest import SavedCheckpoint
from train.config import CarryOver, RunConfig
from train.errors import EXIT_STOPPED, RunError, writing
from train.evaluation.stages import evaluate_stage, forget_later
from train.init_from import load_initial_weights
from train.load import find_checkpoint
from train.logs.sinks import Sinks, open_sinks
from train.resume import check_resumable, continuation, fingerprint
from train.signals import StopRequest
from train.stages import previous, remaining, source_weights
from train.state import TrainState
from train.stored_config import config_text
from train.team import Team
from train.trainer import Trainer


class Job:
    """Trains the remaining stages of one run; all its processes together.

    Opening a job checks everything that can be refused: device, data of every remaining stage, and that
    the newest checkpoint belongs to this model and these data. RunError or DataError then, nothing changed.
    """

    def __init__(self, config: RunConfig, run_dir: Path, team: Team) -> None:
        self.config = config
        self.run_dir = run_dir
        self.team = team
        check_multipliers(config)
        saved = self.newest = newest_intact(run_dir / "checkpoints", group=team.world)
        self.state = TrainState.from_dict(saved.progress) if saved else TrainState()
        self.todo = remaining(config, self.state)
        for stage in self.todo:
            self.open_data(stage, start={})
            self.check_held_out(stage)
        if self.state.stage:
            # a finished run may have lost its corpus: there is nothing to read from it any more
            data = (
                self.data_fingerprint(self.state.stage)
                if self.todo
                else self.state.fingerprint.get("data", "")
            )
            now = fingerprint(config, stage=self.state.stage, data=data)
            check_resumable(saved=self.state.fingerprint, now=now, run_dir=str(run_dir))
        if config.init_from and not saved:
            find_checkpoint(Path(config.init_from))
        self.checkpoints = CheckpointManager(
            run_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
            group=team.world,
        )

    def open_data(self, stage: str, *, start: dict[str, int], seed: int | None = None) -> TrainingData:
        """Open the training data of `stage`, whose sources begin at the tokens `start`."""
        config = self.config
        return TrainingData(
            config.data,
            seed=config.seed if seed is None else seed,
            seq_len=config.stages[stage].seq_len,
            extra_tokens=1 + config.model.num_mtp_layers,
            weights=source_weights(config, config.stages[stage]),
            start=start,
            vocab_size=config.model.vocab_size,
        )

    def check_held_out(self, stage: str) -> None:
        """Refuse now what would end the evaluation of `stage` after hours of training."""
        config = self.config
        if config.evaluation.enabled and config.data.validation is not None:
            HeldOut(
                config.data, seq_len=config.stages[stage].seq_len, extra=1, vocab_size=config.model.vocab_size
            )

    def data_fingerprint(self, stage: str) -> str:
        """Return what identifies the corpus and its order, under the seed that the run was started with."""
        return self.open_data(stage, start={}, seed=self.state.fingerprint.get("seed")).fingerprint()

    def train(self, stop: StopRequest, console: Console) -> None:
        """Train every remaining stage to its end and measure it; RunError when stopped or unstable."""
        if self.newest and not self.newest.permanent and self.state.stage not in self.todo:
            self.checkpoints.keep(self.newest)  # a budget lowered below what was trained ends the stage here
        if not self.todo:
            return
        self.team.lead(lambda: self.open_run_dir(console))
        with self.sinks() as sinks:
            for stage in self.todo:
                self.train_stage(stage, sinks, stop)
                self.team.lead(lambda done=stage: self.evaluate(done, sinks, console))
                asked = stop.agreed(self.team.world)
                if asked and stage != self.todo[-1]:
                    raise RunError(
                        f"stopped by {asked} at the end of stage {stage}, which is saved; "
                        "the same command continues with the next stage",
                        exit_code=EXIT_STOPPED,
                    )

    def open_run_dir(self, console: Console) -> None:
        """Say and write down what is about to run, and drop the results of steps that will be repeated."""
        if self.newest:
            line = continuation(self.newest, self.config)
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        path = self.run_dir / "config.yaml"
        with writing(path):
            replace_durably(path, config_text(self.config))
        forget_later(self.run_dir, step=self.state.step)

    def sinks(self) -> Sinks:
        """Open what receives the records of steps: on the leader alone."""
        if not self.team.leads:
            return Sinks([])
        total = sum(stage.num_tokens for stage in self.config.stages.values())
        return open_sinks(self.config, self.run_dir, resume_step=self.state.step, total_tokens=total)

    def evaluate(self, stage: str, sinks: Sinks, console: Console) -> None:
        """Measure a finished stage."""
        for result in evaluate_stage(self.config, self.run_dir, stage, console):
            sinks.evaluation(result)

    def train_stage(self, stage: str, sinks: Sinks, stop: StopRequest) -> None:
        """Train one stage from the newest checkpoint, or from its initialisation."""
        config, team = self.config.stages[stage], self.team
        layout = layout_of(config.parallel or self.config.parallel, team.world.size)
        mesh = build_mesh(layout, rank=team.processes.rank, trace=team.trace)
        parts = build_stage(self.config, config, device=team.device, mesh=mesh)
        team.watchdog.groups = mesh.members()
        saved = self.checkpoints.latest()
        if (saved.progress["step"] if saved else 0) != self.state.step:
            raise RunError(
                f"{self.run_dir}: the checkpoint of step {self.state.step} was damaged or replaced before "
                f"{stage} could start from it; the same command goes on from the newest intact one"
            )
        if saved:
            self.restore(parts, saved)
        elif self.config.init_from:
            load_initial_weights(parts, Path(self.config.init_from))
        if self.state.stage != stage:
            self.enter(stage, parts)
        data = self.open_data(stage, start=self.state.data_start)
        first = self.state.stage_samples
        with Batches(data, first, part=mesh.dp_rank, parts=layout.dp) as batches:
            Trainer(
                config=self.config,
                state=self.state,
                parts=parts,
                batches=batches,
                checkpoints=self.checkpoints,
                sinks=sinks,
                stop=stop,
                device=team.device,
                watchdog=team.watchdog,
            ).fit()
        self.checkpoints.wait()

    def restore(self, parts: StageParts, saved: SavedCheckpoint) -> None:
        """Load a checkpoint into the freshly built parts."""
        self.checkpoints.load(saved, parts.tensors())
        self.state = TrainState.from_dict(saved.progress)
        parts.engine.use_loaded(num_updates=self.state.num_updates)
        parts.loss_scale.load_state_dict(self.state.loss_scale)

    def enter(self, stage: str, parts: StageParts) -> None:
        """Begin `stage`: its data go on where the stage before it ended, source by source."""
        before = previous(self.config, stage)
        start = {}
        if before and self.state.stage:
            start = self.open_data(before, start=self.state.data_start).position(self.state.stage_samples)
        self.state.enter(stage, data_start=start)
        self.state.fingerprint = fingerprint(self.config, stage=stage, data=self.data_fingerprint(stage))
        if self.config.stages[stage].optimizer_state is CarryOver.reset:
            parts.engine.reset()
