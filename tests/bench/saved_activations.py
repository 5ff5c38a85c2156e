"""Bytes of activations that a token leaves in the decoder layers, BF16 and FP8: measured, and DeepSeek-V3's.

    python -m tests.bench.saved_activations

Measured: DeepSeek-V3 with every width, the number of heads and that of experts divided by eight (heads as
wide as V3's), one dense and two mixture-of-experts layers; the storages that the graph keeps alive after the
forward pass are counted, in BF16 with the rows that fill those of experts up to a multiple of 64, which the
prediction has no part of. V3: the closed form of model/activations.py for all 61 layers, on one device, and
with 64-way expert parallelism, where rows are kept as they arrived (FP8: as codes). One JSON line for each
mode of recomputation.
"""

import argparse
import json

import torch
from torch import Tensor

from model.activations import ONE_DEVICE, Spread, saved_bytes_per_token
from model.config import AttentionConfig, Compute, Gemm, ModelConfig, MoEConfig, PrecisionConfig, Recompute
from model.fp8 import Fp8Policy, install_fp8
from model.transformer import Transformer
from tests.model.live_bytes import LiveBytes
from tests.model.oracle import randomize

V3 = ModelConfig()
EIGHTH = ModelConfig(
    vocab_size=256,
    hidden_size=896,
    num_layers=3,
    num_dense_layers=1,
    dense_intermediate_size=2304,
    num_mtp_layers=0,
    attention=AttentionConfig(num_heads=16, q_lora_rank=192, kv_lora_rank=64),
    moe=MoEConfig(num_experts=32, intermediate_size=256),
)
GEMMS = (Gemm.compute, Gemm.fp8_reference)


def measure(recompute: Recompute, gemm: Gemm, tokens: int) -> float:
    """Return the bytes per token that the graph of the layers holds, its weights' codes not counted."""
    model = Transformer(EIGHTH, recompute=recompute, compute=Compute.bf16)
    randomize(model, seed=0)
    layers, norm = model.layers.values(), model.norm
    tokens_BKS, positions_BS = torch.arange(tokens).view(1, 1, -1) % 256, torch.arange(tokens)[None]
    made_before: list[Tensor] = []
    if gemm is not Gemm.compute:
        policy = Fp8Policy(PrecisionConfig(gemm=gemm))
        install_fp8(model, policy)
        weights = [p for name, p in model.named_parameters() if "attn.w" in name or "ffn." in name]
        for weight in weights:
            if weight.dtype is torch.bfloat16:
                codes = policy.weights.codes(weight, power_of_two=False)
                made_before += [codes.codes, codes.scales]
    table_BS2F = model.rope(positions_BS)
    embedded_BSD = model.embed(tokens_BKS[:, 0]).detach().requires_grad_()
    with LiveBytes() as live:
        x_BSD = embedded_BSD * 1  # so that the first layer's input is counted, as those of the others are
        for layer in layers:
            x_BSD = layer(x_BSD, table_BS2F, positions_BS).x_BSD
        normed_BSD = norm(x_BSD)
    live.forget(x_BSD, normed_BSD, table_BS2F, positions_BS, embedded_BSD, *made_before)
    live.forget(*model.parameters(), *model.buffers())
    return live.num_bytes / tokens


def predict(config: ModelConfig, recompute: Recompute, gemm: Gemm, spread: Spread) -> float:
    """Return the closed form of all layers."""
    how = {"recompute": recompute, "compute": Compute.bf16, "gemm": gemm, "spread": spread}
    return sum(saved_bytes_per_token(config, layer=layer, **how) for layer in range(config.num_layers))


def spread(gemm: Gemm) -> Spread:
    """Return expert parallelism over 64 devices with balanced routing."""
    rows = float(V3.moe.top_k)
    return Spread(routed_rows=rows, arrived_rows=rows, experts=4, coded_rows=gemm is not Gemm.compute)


def report(bf16: float, fp8: float) -> dict[str, object]:
    """Return both figures and what FP8 saves."""
    return {"bf16": round(bf16), "fp8": round(fp8), "saved": round(1 - fp8 / bf16, 3)}


def main() -> None:
    """Measure and predict every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    args = parser.parse_args()
    for recompute in Recompute:
        record = {
            "bench": "saved_activations",
            "recompute": recompute,
            "measured": report(*(measure(recompute, gemm, args.tokens) for gemm in GEMMS)),
            "predicted": report(*(predict(EIGHTH, recompute, gemm, ONE_DEVICE) for gemm in GEMMS)),
            "v3": report(*(predict(V3, recompute, gemm, ONE_DEVICE) for gemm in GEMMS)),
            "v3_ep64": report(*(predict(V3, recompute, gemm, spread(gemm)) for gemm in GEMMS)),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
