"""Between runs and DeepSeek's open-weights format.

`python -m train.convert to-hf SRC DST`: a run or checkpoint to a folder that inference engines load.
`python -m train.convert from-hf SRC DST`: such a folder to a run that `init_from=DST` and every tool reads.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from model.config import Fp8Scales
from train.errors import RunError, exit_cleanly
from train.hf.encoding import ExportType
from train.hf.folder import MtpWeights
from train.hf.from_hf import import_weights
from train.hf.to_hf import ExportOptions, export_weights
from train.load import Weights

SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return the bytes of "5GB", "500MB", "2GiB" or a plain number; RunError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if (
        match
        and match[2].upper() in SIZE_UNITS
        and (size := int(float(match[1]) * SIZE_UNITS[match[2].upper()]))
    ):
        return size
    raise RunError(f"--shard-size={text} is not a size; use a number with KB, MB or GB, such as 5GB")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of this tool."""
    parser = argparse.ArgumentParser(
        prog="python -m train.convert", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="write a run's weights in DeepSeek's open-weights format")
    to_hf.add_argument(
        "source", type=Path, help="a run directory, RUN@STAGE for the end of a stage, or a checkpoint"
    )
    to_hf.add_argument("target", type=Path, help="the folder to write; it must not exist, or be empty")
    to_hf.add_argument(
        "--dtype",
        type=ExportType,
        choices=list(ExportType),
        help="type of the weights; by default the one the run computes in, BF16 or FP32. fp8 is E4M3 in "
        "128 x 128 blocks for the linear maps of the layers, BF16 for the rest, as DeepSeek releases them. "
        "Router biases are FP32 always",
    )
    to_hf.add_argument(
        "--fp8-scales",
        type=Fp8Scales,
        choices=list(Fp8Scales),
        help="with --dtype fp8, the scales of its 128 x 128 blocks: amax / 448 (deepseek), or that rounded "
        "up to a power of two; by default those of the run, precision.fp8_scales",
    )
    to_hf.add_argument("--shard-size", default="5GB", help="largest file, such as 5GB (default)")
    to_hf.add_argument(
        "--weights",
        type=Weights,
        choices=list(Weights),
        default=Weights.MODEL,
        help="the last weights (default), or their moving average where the run kept one",
    )
    to_hf.add_argument("--without-mtp", action="store_true", help="leave the MTP modules out")
    from_hf = commands.add_parser("from-hf", help="read DeepSeek's open-weights format")
    from_hf.add_argument(
        "source", type=Path, help="a folder with config.json and safetensors, BF16, FP32 or FP8"
    )
    from_hf.add_argument(
        "target", type=Path, help="the run directory to write; it must not exist, or be empty"
    )
    from_hf.add_argument(
        "--without-mtp",
        action="store_true",
        help="drop the MTP modules, or do without them where a file has none",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert as the command line says; a mistake is one message and exit code 2."""
    options = build_parser().parse_args(arguments)
    console = Console()
    with exit_cleanly():
        mtp = MtpWeights.DROP if options.without_mtp else MtpWeights.KEEP
        if options.command == "to-hf":
            wanted = ExportOptions(
                dtype=options.dtype,
                fp8_scales=options.fp8_scales,
                shard_bytes=parse_size(options.shard_size),
                mtp=mtp,
                weights=options.weights,
            )
            export_weights(options.source, options.target, options=wanted, console=console)
        else:
            import_weights(options.source, options.target, mtp=mtp, console=console)
        console.print(f"wrote {options.target}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
