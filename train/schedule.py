"""Learning rate, batch size and stepwise values as pure functions of progress within a stage.

All of them take the `tokens` the stage has consumed BEFORE the step in question, so a step's settings
are known before its batch is drawn and a resumed run finds the same ones. `step` is the number of the
step about to be taken, counted from 1. Importable without torch.
"""

import math
from bisect import bisect_right

from train.config import BatchConfig, Curve, LrConfig, LrPiece, StageConfig, StepsConfig


def lr_at(config: LrConfig, *, step: int, tokens: int, num_tokens: int) -> float:
    """Return the learning rate of one step: the pieces' value at `tokens`, times the warm-up's factor.

    Warm-up rises linearly from 0 at step 0 to 1 at step `warmup_steps` (arXiv 2412.19437, section 4.2);
    steps count from 1, so the first step trains at peak / warmup_steps, never at zero. The factor
    multiplies the pieces, which keeps the rate continuous where a decay begins during warm-up.

    Args:
        config: peak, warm-up and pieces.
        step: the step about to be taken, counted from 1 in this stage.
        tokens: tokens this stage consumed before the step.
        num_tokens: the stage's token budget; what `until_fraction` refers to and where open pieces end.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * _rate_of_pieces(config, tokens=tokens, num_tokens=num_tokens)


def piece_ends(config: LrConfig, *, num_tokens: int) -> list[int]:
    """Return the token count at which each piece of the schedule ends."""
    return [_end_of(piece, num_tokens) for piece in config.pieces]


def batch_size_at(config: BatchConfig, tokens: int) -> int:
    """Return the sequences of the step taken after `tokens` tokens of the stage.

    Linear from `start` to `end` over `ramp_tokens`, in exact integers, rounded down to `multiple_of`.
    """
    if tokens >= config.ramp_tokens:
        return config.end
    size = config.start + (config.end - config.start) * tokens // config.ramp_tokens
    return size // config.multiple_of * config.multiple_of


def steps_value(config: StepsConfig, tokens: int) -> float:
    """Return values[i] for the first boundary i above `tokens`, the last value beyond all of them."""
    return config.values[bisect_right(config.boundaries, tokens)]


def num_steps(stage: StageConfig) -> int:
    """Return how many steps the stage takes: it ends with the first step that reaches num_tokens.

    The last batch is not cut, so the stage may consume up to one batch more than its budget.
    """
    steps, tokens = 0, 0
    ramp_end = min(stage.batch.ramp_tokens, stage.num_tokens)
    while tokens < ramp_end:
        tokens += batch_size_at(stage.batch, tokens) * stage.seq_len
        steps += 1
    remaining = max(0, stage.num_tokens - tokens)
    return steps + -(-remaining // (stage.batch.end * stage.seq_len))


def _rate_of_pieces(config: LrConfig, *, tokens: int, num_tokens: int) -> float:
    begin, rate = 0, config.peak
    for piece in config.pieces:
        end = _end_of(piece, num_tokens)
        target = rate if piece.to is None else piece.to
        if tokens < end:
            return _on_curve(piece.curve, rate, target, (tokens - begin) / (end - begin))
        begin, rate = max(begin, end), target
    return rate


def _end_of(piece: LrPiece, num_tokens: int) -> int:
    if piece.until_tokens is not None:
        return piece.until_tokens
    if piece.until_fraction is not None:
        return round(piece.until_fraction * num_tokens)
    return num_tokens


def _on_curve(curve: Curve, start: float, target: float, fraction: float) -> float:
    """Return the rate at `fraction` in [0, 1) of a piece."""
    if curve is Curve.constant:
        return target
    kept = 1 - fraction if curve is Curve.linear else (1 + math.cos(math.pi * fraction)) / 2
    return start * kept + target * (1 - kept)
