"""A run directory with a checkpoint of random weights and a small real corpus, made in a second or two."""

from pathlib import Path

import numpy as np

from data.config import DataConfig, SourceConfig
from data.indexed import IndexedWriter, token_dtype
from data.tokenizer import Tokenizer, train_bpe
from model.config import Compute, ModelConfig, PrecisionConfig, YarnConfig
from model.init import initialize
from model.transformer import Transformer
from tests.model.small import small
from train.checkpoints.manager import CheckpointManager
from train.config import EvaluationConfig, RunConfig, StageConfig
from train.state import TrainState
from train.stored_config import config_text

VOCAB_SIZE = 320
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "mu",
    "nu",
    "xi",
]


def make_corpus(folder: Path) -> Tokenizer:
    """Write folder/{tokenizer.json,train,validation} and return the tokenizer."""
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, size=120)) + f" {rng.integers(10**5)}\n" for _ in range(80)]
    tokenizer = train_bpe(documents, vocab_size=VOCAB_SIZE)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.json")
    for split, texts in (("train", documents[:60]), ("validation", documents[60:])):
        (folder / split).mkdir()
        with IndexedWriter(folder / split / "shard", dtype=token_dtype(VOCAB_SIZE)) as writer:
            for ids in tokenizer.encode_batch(texts):
                writer.add(np.array(ids))
    return tokenizer


def make_config(root: Path, model: ModelConfig) -> RunConfig:
    """Return the configuration of a two-stage run under `root`, whose corpus is root/corpus."""
    corpus = str(root / "corpus")
    return RunConfig(
        name="tiny",
        root=str(root),
        device="cpu",
        model=model,
        precision=PrecisionConfig(compute=Compute.fp32),
        data=DataConfig(
            sources={"words": SourceConfig(path=corpus)},
            validation=corpus,
            tokenizer=corpus,
        ),
        evaluation=EvaluationConfig(num_tokens=1024, needle_depths=2, needle_lengths=2, needle_trials=2),
        stages={
            "short": StageConfig(seq_len=48, num_tokens=4800),
            "long": StageConfig(seq_len=256, num_tokens=2560, yarn=YarnConfig(factor=8, original_length=48)),
        },
    )


def make_run(root: Path, *, num_mtp_layers: int = 1, stage: str = "long") -> Path:
    """Make corpus and run directory under `root`; return the run directory root/tiny."""
    make_corpus(root / "corpus")
    config = make_config(
        root, small(vocab_size=VOCAB_SIZE, num_mtp_layers=num_mtp_layers, num_layers=2, init_std=0.1)
    )
    model = Transformer(config.model)
    initialize(model, seed=1)
    run_dir = root / "tiny"
    manager = CheckpointManager(run_dir / "checkpoints", keep_last=1, asynchronous=False)
    state = TrainState(step=7, tokens=7360, stage=stage)
    manager.save(
        f"{stage}-00000007",
        {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()},
        state.to_dict(),
        config_yaml=config_text(config),
        permanent=True,
    )
    (run_dir / "config.yaml").write_text(config_text(config), encoding="utf-8")
    return run_dir
