"""What a backend needs is named before anything starts, all of it, with what runs instead."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.config import Fp8Scales, Gemm, PrecisionConfig
from tests.golden.compose import compose_run
from train.config import AdamKernel, OptimizerConfig
from train.errors import RunError
from train.machine import Machine, find_machine
from train.requirements import kernel_problems, machine_problems
from train.validate import check, problems

NOTHING = Machine(capability=None, cuda=None, triton=False, interprets=False, transformer_engine=None)
HOPPER = Machine(
    capability=(9, 0), cuda=(12, 9), triton=True, interprets=False, transformer_engine="2.20.2+abc"
)
TRITON = PrecisionConfig(gemm=Gemm.fp8_triton)
TE = PrecisionConfig(gemm=Gemm.fp8_te)


def test_what_there_is_suffices() -> None:
    assert machine_problems(TRITON, HOPPER) == machine_problems(TE, HOPPER) == []
    for gemm in (Gemm.compute, Gemm.fp8_reference):
        assert machine_problems(PrecisionConfig(gemm=gemm), NOTHING) == []
    blackwell = replace(HOPPER, capability=(10, 0), cuda=(13, 0))
    assert machine_problems(TRITON, blackwell) == []
    assert (
        machine_problems(PrecisionConfig(gemm=Gemm.fp8_te, fp8_scales=Fp8Scales.power_of_two), blackwell)
        == []
    )
    interpreter = replace(NOTHING, triton=True, interprets=True)
    assert machine_problems(TRITON, interpreter) == []
    assert machine_problems(TE, interpreter) != []


@pytest.mark.parametrize(
    ("precision", "machine", "missing"),
    [
        (TRITON, replace(HOPPER, capability=(8, 0)), "a GPU of compute capability 9.0 or more, not 8.0"),
        (TRITON, replace(HOPPER, triton=False), "the package triton, which is not installed"),
        (TRITON, replace(HOPPER, capability=None), "a CUDA GPU, with device=cuda or device=auto"),
        (TE, replace(HOPPER, cuda=(12, 8)), "torch built for CUDA 12.9 or later, not 12.8"),
        (TE, replace(HOPPER, cuda=None), "torch built for CUDA 12.9 or later, not for the CPU"),
        (TE, replace(HOPPER, transformer_engine=None), "transformer-engine 2.20, which is not installed"),
        (TE, replace(HOPPER, transformer_engine="2.5.0"), "transformer-engine 2.20, not 2.5.0"),
        (TE, replace(HOPPER, transformer_engine="2.21.0"), "transformer-engine 2.20, not 2.21.0"),
        (TE, replace(HOPPER, import_error="OSError: libcudnn"), "but it says: OSError: libcudnn"),
        (TE, replace(HOPPER, capability=(10, 0)), "precision.fp8_scales=power_of_two on this GPU"),
    ],
)
def test_what_is_missing_is_named(precision: PrecisionConfig, machine: Machine, missing: str) -> None:
    (line,) = machine_problems(precision, machine)
    assert line.startswith(f"precision.gemm={precision.gemm} needs ")
    assert missing in line
    assert line.endswith("use precision=fp8_reference (emulated: slow) or precision=bf16")


def test_everything_that_is_missing_is_named_at_once() -> None:
    assert len(machine_problems(TE, NOTHING)) == 3
    assert len(machine_problems(TRITON, NOTHING)) == 2
    config = compose_run(
        "recipe=smoke", "precision=fp8_te", "precision.compute=fp32", "model.moe.num_groups=3"
    )
    with pytest.raises(RunError) as caught:
        check(config, machine=NOTHING)
    assert caught.value.exit_code == 2
    for part in (
        "gemm=fp8_te needs compute=bf16",
        "num_groups=3 must divide",
        "needs a CUDA GPU",
        "12.9",
        "2.20",
    ):
        assert part in str(caught.value)


TE_KERNEL = OptimizerConfig(kernel=AdamKernel.transformer_engine)


def test_an_update_by_transformer_engine_runs_on_any_gpu_that_has_it() -> None:
    assert kernel_problems(OptimizerConfig(), NOTHING) == []
    assert kernel_problems(TE_KERNEL, replace(HOPPER, capability=(8, 0), cuda=(12, 8))) == []
    without = kernel_problems(TE_KERNEL, NOTHING)
    assert "needs a CUDA GPU" in without[0]
    assert "needs transformer-engine 2.20, which is not installed" in without[1]
    assert all(line.endswith("use optimizer.kernel=torch, which computes the same") for line in without)
    config = compose_run("recipe=smoke", "optimizer.kernel=transformer_engine")
    with pytest.raises(RunError, match=r"2 problems in the configuration:\n  optimizer\.kernel="):
        check(config, machine=NOTHING)


def test_a_configuration_is_checked_without_the_machine() -> None:
    """As `python -m launch` does where the job will not run."""
    for precision in ("fp8_triton", "fp8_te"):
        assert problems(compose_run("recipe=deepseek_v3", f"precision={precision}"), world_size=2048) == []


def test_widths_are_those_that_the_gpu_takes() -> None:
    """The keys and values of the smoke model have 48 latent columns: enough for Hopper, not for Blackwell."""
    config = compose_run("recipe=smoke", "precision=fp8_te")
    check(config, machine=HOPPER)
    with pytest.raises(
        RunError, match=r"qk_rope_head_dim=48 .* no multiple of 32, as precision\.gemm=fp8_te"
    ):
        check(config, machine=replace(HOPPER, capability=(10, 0), cuda=(13, 0)))


def test_a_machine_is_looked_at_for_the_backend_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_machine(Gemm.compute, device="auto") == NOTHING
    for found in (
        find_machine(Gemm.fp8_triton, device="cpu"),
        find_machine(Gemm.compute, AdamKernel.transformer_engine, device="cpu"),
    ):
        assert found.capability is None
        assert found.triton  # it did look
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert find_machine(Gemm.fp8_triton, device="cpu").interprets


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU, with the package installed but not what it links to; device=cpu does not look at the GPU."""
    package, info = tmp_path / "transformer_engine", tmp_path / "transformer_engine-2.20.2.dist-info"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text('raise OSError("libcudnn.so.9")')
    info.mkdir()
    (info / "METADATA").write_text("Name: transformer-engine\nVersion: 2.20.2\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = find_machine(Gemm.fp8_te, device="auto")
    sys.modules.pop("transformer_engine", None)
    assert (found.capability, found.transformer_engine) == ((9, 0), "2.20.2")
    assert found.import_error == "OSError: libcudnn.so.9"
    assert find_machine(Gemm.fp8_te, device="cpu").capability is None


@pytest.mark.parametrize("precision", ["fp8_triton", "fp8_te"])
def test_a_run_is_refused(precision: str, tmp_path) -> None:
    command = [
        sys.executable,
        "-m",
        "train",
        "recipe=smoke",
        f"precision={precision}",
        "device=cpu",
        f"root={tmp_path}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f"precision.gemm={precision} needs a CUDA GPU" in result.stderr
    assert "use precision=fp8_reference (emulated: slow) or precision=bf16" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
