"""`python -m launch calibrate`: rates are those of the work done, and what it prints is a cluster's card."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from launch.calibrate.card import as_overrides, as_yaml, beyond_peak, efficiencies, measured_card
from launch.calibrate.command import main
from launch.calibrate.compute import attention_rates, product_rate
from launch.calibrate.links import MESSAGE_BYTES, link_rates, spread
from launch.calibrate.rate import Rate, merged
from parallel.cluster import ClusterConfig
from parallel.layout import axis_groups
from tests.distributed import run_ranks
from tests.launch.preflight_job import site_of
from tests.parallel.started import started
from train.config_store import compose_run
from train.errors import RunError, exit_cleanly

CPU = torch.device("cpu")


def rate(name: str, speed: float, *more_seconds: float, unit: str = "FLOP") -> Rate:
    return Rate(name=name, what="", unit=unit, work=speed, seconds=[1.0, *more_seconds])


def cluster_of(text: str) -> ClusterConfig:
    """Load a card as Hydra would, checked against the schema."""
    loaded = OmegaConf.create(text)
    loaded.pop("defaults", None)
    config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), loaded))
    return config


def test_rates_are_medians_over_the_runs_of_all_ranks() -> None:
    ranks = [[rate("memory", 8.0, 2.0, 4.0)], [rate("memory", 8.0), rate("gemm_bf16", 4.0)]]
    found = merged(ranks)
    assert found["memory"].seconds == [1.0, 2.0, 4.0, 1.0]
    assert (found["memory"].median, found["memory"].best) == (8 / 1.5, 8.0)
    assert found["gemm_bf16"].median == 4.0


def test_flops_are_those_that_torch_counts() -> None:
    with FlopCounterMode(display=False) as counter:
        product = product_rate("gemm_fp32", torch.float32, CPU)
    assert counter.get_total_flops() == 7 * product.work
    forward, backward = attention_rates(CPU)
    with FlopCounterMode(display=False) as counter:  # of all scores, of which the causal ones are half
        q_NSD, k_NSD, v_NSU = (torch.empty(16, 512, width, device="meta") for width in (192, 192, 128))
        torch.bmm(torch.bmm(q_NSD, k_NSD.transpose(1, 2)), v_NSU)
    assert forward.work == counter.get_total_flops() / 2
    assert backward.work == 2.5 * forward.work


def test_shares_of_a_known_card() -> None:
    cluster = compose_run(["cluster=h800"]).cluster
    rates = {each.name: each for each in (rate("gemm_bf16", 494.5e12), rate("memory", 3e15, unit="B"))}
    shares = efficiencies(rates, cluster)
    assert shares == {"gemm_bf16": 0.5, "memory": 896.0}
    (problem,) = beyond_peak(shares, cluster)
    assert problem.startswith("memory reaches 896 of cluster.memory_gb_s=3350.0")
    card = {"efficiency": {"gemm_bf16": 0.5}}
    text = as_yaml(card, comment="Measured.", inherits="h800")
    assert OmegaConf.create(text)["defaults"] == ["h800", "_self_"]
    assert cluster_of(text).efficiency.gemm_bf16 == 0.5
    assert as_overrides(card) == ["cluster.efficiency.gemm_bf16=0.5"]


def test_a_measured_card_gives_back_what_was_measured() -> None:
    rates = {
        "gemm_bf16": rate("gemm_bf16", 2e12, 2.0),
        "gemm_fp32": rate("gemm_fp32", 5e11),
        "attention_forward": rate("attention_forward", 4e12, 4.0, 4.0),
        "memory": rate("memory", 2.00499e10, unit="B"),
    }
    card = measured_card(rates, name="mine", memory_gb=16.0)
    cluster = cluster_of(as_yaml(card, comment="Measured."))
    assert (cluster.name, cluster.memory_gb, cluster.memory_reserve_gb) == ("mine", 16.0, 1.6)
    assert (cluster.peak_tflops, cluster.peak_fp32_tflops, cluster.memory_gb_s) == (4.0, 0.5, 20.0)
    assert (cluster.peak_fp8_tflops, cluster.intra_node_gb_s) == (None, None)
    assert cluster.efficiency.memory == 1.0  # never above the peak, however that was rounded
    for name in ("gemm_bf16", "attention_forward"):
        assert cluster.peak_tflops is not None
        reached = cluster.peak_tflops * getattr(cluster.efficiency, name)
        assert reached == pytest.approx(rates[name].median / 1e12, rel=0.01)
    assert cluster.problems() + cluster.efficiency.problems() == []
    assert compose_run(as_overrides(card)).cluster == cluster


def test_hosts_become_the_nodes_of_one_set_of_experts() -> None:
    layout = spread(["a", "a", "b", "b"])
    axes = layout.expert_axes
    assert axis_groups(axes, ("ep_local",)) == [[0, 1], [2, 3]]
    assert axis_groups(axes, ("ep_node",)) == [[0, 2], [1, 3]]
    for hosts in (["a", "a", "b"], ["a", "b", "a", "b"], ["a", "a", "a", "b"]):
        with pytest.raises(RunError, match="start as many processes on every host"):
            spread(hosts)


def links(rank: int) -> list[Rate]:
    return list(link_rates(site_of(rank, 4, ["recipe=smoke"]).team, ["a", "a", "b", "b"]))


def test_only_bytes_that_leave_a_rank_count() -> None:
    """Of two ranks each keeps half of its buffer."""
    for rates in run_ranks(4, links):
        assert [(rate.name, rate.work) for rate in rates] == [
            ("intra_node", MESSAGE_BYTES["cpu"] / 2),
            ("inter_node", MESSAGE_BYTES["cpu"] / 2),
        ]


def test_two_hosts_of_two_processes_measure_every_link(tmp_path: Path) -> None:
    def run() -> None:
        os.environ["SLURMD_NODENAME"] = f"node{int(os.environ['RANK']) // 2}"
        with exit_cleanly():
            main(["cluster=h800", "device=cpu", "--json"])

    with started(tmp_path, 4, run) as job:
        assert job.exit_codes(ranks=[0, 1, 2, 3], within_s=150) == [0, 0, 0, 0]
        answer = json.loads(job.printed(0))
        assert [job.printed(rank) for rank in (1, 2, 3)] == ["", "", ""]
    names = {"gemm_bf16", "gemm_fp32", "attention_forward", "attention_backward", "memory"}
    assert set(answer["rates"]) == names | {"intra_node", "inter_node"}
    for each in answer["rates"].values():
        assert 0 < each["median"] <= each["best"]
        assert math.isfinite(each["best"])
    cluster = cluster_of(answer["yaml"])
    assert cluster.name == "this_cpu"
    assert cluster.inter_node_gb_s
    assert cluster.problems() + cluster.efficiency.problems() == []
    assert compose_run(answer["overrides"]).cluster == cluster


def test_one_process_prints_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    main(["device=cpu"])
    printed = capsys.readouterr().out
    head, _, rest = printed.partition("configs/cluster/this_cpu.yaml:\n\n")
    text, _, overrides = rest.partition("\n\nor as overrides:\n\n")
    assert "gemm_bf16" in head
    cluster = cluster_of(text)
    assert cluster.intra_node_gb_s is None
    assert cluster.efficiency.problems() == []
    assert compose_run(overrides.split()).cluster == cluster
