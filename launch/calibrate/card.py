"""From measured rates to configuration: a file for configs/cluster/, and the same as overrides.

Where the peaks of a card are known, the file inherits that card and sets its efficiencies: rate over peak.
Where they are not, as for a CPU, the card is made of the measurements themselves: a peak is the best run,
an efficiency the median over the best, so that peak times efficiency is what was measured.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from launch.calibrate.rate import Rate
from parallel.cluster import ClusterConfig

TERA, GIGA = 1e12, 1e9

PEAKS = {
    "gemm_bf16": ("peak_tflops", TERA),
    "gemm_fp8": ("peak_fp8_tflops", TERA),
    "attention_forward": ("peak_tflops", TERA),
    "attention_backward": ("peak_tflops", TERA),
    "memory": ("memory_gb_s", GIGA),
    "intra_node": ("intra_node_gb_s", GIGA),
    "inter_node": ("inter_node_gb_s", GIGA),
}
"""Field of `Efficiencies` → the peak it is a share of, and that field's unit."""

RESERVE = 0.1
"""Share of the memory that a measured card keeps from plans."""

Card = dict[str, Any]


def efficiencies(rates: Mapping[str, Rate], cluster: ClusterConfig) -> dict[str, float]:
    """Return the share of its peak that each rate reaches, where the peak is known; three digits."""
    found: dict[str, float] = {}
    for name, (peak, unit) in PEAKS.items():
        known = getattr(cluster, peak)
        if name in rates and known is not None:
            found[name] = _rounded(rates[name].median / (known * unit))
    return found


def beyond_peak(shares: Mapping[str, float], cluster: ClusterConfig) -> list[str]:
    """Return a problem for each rate that is faster than the card's peak: the device is another one."""
    return [
        f"{name} reaches {share:g} of cluster.{PEAKS[name][0]}={getattr(cluster, PEAKS[name][0])}, more than "
        f"there is; this device is no {cluster.name}: choose another cluster="
        for name, share in shares.items()
        if share > 1
    ]


def measured_card(rates: Mapping[str, Rate], *, name: str, memory_gb: float) -> Card:
    """Return a card made of measurements alone. memory_gb: of one device, in 10^9 bytes."""
    peaks: dict[str, Any] = {}
    unknown = {peak: None for peak, _ in PEAKS.values()}
    for rate_name, (peak, unit) in PEAKS.items():
        if rate_name in rates:
            peaks[peak] = max(peaks.get(peak, 0.0), rates[rate_name].best / unit)
    if "gemm_fp32" in rates:
        peaks["peak_fp32_tflops"] = rates["gemm_fp32"].best / TERA
    peaks = {peak: _rounded(value) for peak, value in peaks.items()}
    memory: dict[str, Any] = {
        "memory_gb": _rounded(memory_gb),
        "memory_reserve_gb": _rounded(RESERVE * memory_gb),
    }
    # rounding must not lift a rate above its peak
    shares = {
        each: min(1.0, share)
        for each, share in efficiencies(rates, ClusterConfig(name=name, **memory, **peaks)).items()
    }
    # what was not measured is said as well: overrides start from a card that may know it
    assumed = ClusterConfig().efficiency
    others = {each.name: getattr(assumed, each.name) for each in fields(assumed) if each.name not in shares}
    return {"name": name, **memory, **unknown, **peaks, "efficiency": shares | others}


def as_yaml(card: Card, *, comment: str, inherits: str | None = None) -> str:
    """Return the text of a file for configs/cluster/. inherits: name of the file beside it to start from."""
    lines = [f"# {comment}"]
    if inherits:
        lines += ["defaults:", f"  - {inherits}", "  - _self_"]
    for key, value in card.items():
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {name}: {each}" for name, each in value.items())]
        else:
            lines.append(f"{key}: {_text(value)}")
    return "\n".join(lines)


def as_overrides(card: Card) -> list[str]:
    """Return the card as overrides of `python -m train`."""
    flat = {key: value for key, value in card.items() if not isinstance(value, dict)}
    for key, value in card.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": each for name, each in value.items()}
    return [f"cluster.{key}={_text(value)}" for key, value in flat.items()]


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
