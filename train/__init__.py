"""The training job: configuration, stages, the loop, checkpoints, metrics, evaluation, reports."""
