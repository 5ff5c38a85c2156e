"""Text from a checkpoint: `python -m train.generate CKPT --prompt "def main("`.

Text goes to stdout and nothing else does; counts, speed and the acceptance rate of `--mtp` go to stderr.
On a terminal a single text appears token by token.

    python -m train.generate runs/smoke --prompt "import os" --mtp
    python -m train.generate runs/smoke@pretrain_4k --file prompts.txt --temperature 0.8 --count 4
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import Tokenizer
from model.generate import generate
from model.sampling import SamplingRule
from model.speculate import generate_with_mtp
from train.build import pick_device
from train.config import RunConfig
from train.errors import RunError, exit_cleanly
from train.load import LoadedModel, load_model
from train.text_stream import TextStream
from train.validate import seed_problems

SEQUENCES_PER_BATCH = 16
"""Texts that are generated together; a text does not depend on it, up to rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One text to write."""

    prompt: str
    tokens: list[int]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One text written, its prompt not included, and what speculation did for it (zeros without)."""

    tokens: list[int]
    num_guessed: int = 0
    num_accepted: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m train.generate`."""
    options = _parser().parse_args(arguments)
    with exit_cleanly():
        rule = SamplingRule(temperature=options.temperature, top_p=options.top_p)
        _check_options(options, rule)
        prompts = [options.prompt] if options.file is None else _read_prompts(options.file)
        loaded = load_model(options.path, device=pick_device(RunConfig(device=options.device)))
        if options.mtp and loaded.config.model.num_mtp_layers == 0:
            raise RunError(
                "--mtp drafts with the model's MTP layers, but this one has model.num_mtp_layers=0; "
                "leave --mtp out"
            )
        requests = make_requests(loaded, prompts, count=options.count, seed=options.seed)
        room = _room(loaded, requests, options.max_new_tokens)
        start = time.perf_counter()
        answers = (_with_mtp if options.mtp else _plain)(loaded, requests, rule, room)
        _print_statistics(answers, seconds=time.perf_counter() - start)


def make_requests(loaded: LoadedModel, prompts: Sequence[str], *, count: int, seed: int) -> list[Request]:
    """Return `count` requests per prompt, seeded seed, seed + 1, …; RunError for a prompt that is too long.

    An empty prompt becomes the end-of-document token, after which a new document begins.
    """
    seq_len = loaded.config.stages[loaded.stage_name].seq_len
    requests: list[Request] = []
    for prompt in prompts:
        tokens = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.eos_id]
        if len(tokens) >= seq_len:
            raise RunError(
                f"the prompt {prompt[:40]!r}… has {len(tokens)} tokens, but stage {loaded.stage_name} "
                f"trained on sequences of {seq_len}; give fewer, or a checkpoint of a longer stage"
            )
        requests += [Request(prompt=prompt, tokens=tokens, seed=seed + i) for i in range(count)]
    return requests


def _room(loaded: LoadedModel, requests: Sequence[Request], wanted: int) -> int:
    """Return how many tokens every request may get without leaving the stage's length; says so if fewer."""
    seq_len = loaded.config.stages[loaded.stage_name].seq_len
    room = min(wanted, seq_len - max(len(request.tokens) for request in requests))
    if room < wanted:
        print(
            f"note: {room} new tokens instead of {wanted}, as stage {loaded.stage_name} trained on sequences "
            f"of {seq_len} tokens",
            file=sys.stderr,
        )
    return room


def _plain(loaded: LoadedModel, requests: Sequence[Request], rule: SamplingRule, room: int) -> list[Answer]:
    answers: list[Answer] = []
    for first in range(0, len(requests), SEQUENCES_PER_BATCH):
        batch = requests[first : first + SEQUENCES_PER_BATCH]
        writer = _Writer(loaded.tokenizer, batch, first=first, total=len(requests))
        texts = generate(
            loaded.model,
            [request.tokens for request in batch],
            rule=rule,
            max_new_tokens=room,
            stop_token=loaded.tokenizer.eos_id,
            seeds=[request.seed for request in batch],
            on_token=writer.on_token,
        )
        writer.finish(texts)
        answers += [Answer(tokens=tokens) for tokens in texts]
    return answers


def _with_mtp(
    loaded: LoadedModel, requests: Sequence[Request], rule: SamplingRule, room: int
) -> list[Answer]:
    answers: list[Answer] = []
    for index, request in enumerate(requests):
        writer = _Writer(loaded.tokenizer, [request], first=index, total=len(requests))
        result = generate_with_mtp(
            loaded.model,
            request.tokens,
            rule=rule,
            max_new_tokens=room,
            stop_token=loaded.tokenizer.eos_id,
            seed=request.seed,
            on_token=writer.on_token,
        )
        writer.finish([result.tokens])
        answers.append(
            Answer(tokens=result.tokens, num_guessed=result.num_guessed, num_accepted=result.num_accepted)
        )
    return answers


class _Writer:
    """Writes the texts of one batch to stdout; a batch of one is written as it comes."""

    def __init__(self, tokenizer: Tokenizer, batch: Sequence[Request], *, first: int, total: int) -> None:
        self._tokenizer = tokenizer
        self._batch = batch
        self._first = first
        self._total = total
        self._stream = TextStream(tokenizer) if len(batch) == 1 else None
        if self._stream is not None:
            self._head(0)

    def on_token(self, sequence: int, token: int) -> None:
        """Take one new token of a sequence of the batch."""
        if self._stream is not None and token != self._tokenizer.eos_id:
            print(self._stream.push(token), end="", flush=True)

    def finish(self, texts: Sequence[Sequence[int]]) -> None:
        """Write what has not been written yet."""
        if self._stream is not None:
            print(self._stream.finish())
            return
        for row, tokens in enumerate(texts):
            self._head(row)
            print(self._tokenizer.decode([token for token in tokens if token != self._tokenizer.eos_id]))

    def _head(self, row: int) -> None:
        request = self._batch[row]
        if self._total > 1:
            print(f"--- {self._first + row + 1} of {self._total}, seed {request.seed}")
        print(request.prompt, end="", flush=True)


def _print_statistics(answers: Sequence[Answer], *, seconds: float) -> None:
    num_tokens = sum(len(answer.tokens) for answer in answers)
    line = f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:.1f} tokens/s"
    if guessed := sum(answer.num_guessed for answer in answers):
        accepted = sum(answer.num_accepted for answer in answers)
        line += f"; {accepted} of {guessed} guesses accepted, acceptance rate {accepted / guessed:.1%}"
    print(line, file=sys.stderr)


def _check_options(options: argparse.Namespace, rule: SamplingRule) -> None:
    problems = [f"--{problem.replace('top_p', 'top-p')}" for problem in rule.problems()]
    for name, value in (("--max-new-tokens", options.max_new_tokens), ("--count", options.count)):
        if value < 1:
            problems.append(f"{name}={value} must be at least 1; use {name}=1")
    problems += seed_problems("--seed", options.seed)
    if problems:
        raise RunError("; ".join(problems))


def _read_prompts(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"--file={path} cannot be read: {error}; give a UTF-8 text with one prompt a line"
        ) from error
    if not prompts:
        raise RunError(f"--file={path} holds no prompt; write one a line")
    return prompts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate", description="Write text with a trained model."
    )
    parser.add_argument("path", type=Path, metavar="CKPT", help="run, RUN@STAGE, or checkpoint folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--file", type=Path, help="a text file with one prompt a line")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy decoding")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep the most likely tokens up to this mass"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--count", type=int, default=1, help="texts per prompt, with seeds counted up from --seed"
    )
    parser.add_argument(
        "--mtp", action="store_true", help="draft with the MTP layers; same text, fewer forwards"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


if __name__ == "__main__":
    main()
