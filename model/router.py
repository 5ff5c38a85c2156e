"""The gate: which experts a token goes to (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664).

Affinity = sigmoid(x . centroid), in FP32. A bias per expert steers the choice only and is moved after every
optimizer step towards equal load; the weights are the unbiased affinities of the chosen experts. A weak
sequence-wise loss (equations 17 to 20) keeps single sequences from collapsing onto few experts.

Legend: B sequences, S length, T = B * S tokens, D hidden, E experts, A experts per token, G expert groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.config import MoEConfig
from model.split import SequenceSplit, WholeSequences


@dataclass(frozen=True)
class Routing:
    """Where tokens go. indices_TA int64; weights_TA FP32; load_E int64 exact counts of this microbatch.

    balance_loss: FP32 scalar, alpha * sum over the B sequences of sum_i f_i P_i, with gradient.
    """

    indices_TA: Tensor
    weights_TA: Tensor
    load_E: Tensor
    balance_loss: Tensor


class _Fp32Gate(torch.autograd.Function):
    """x W^T in FP32 for x of any type, keeping x as it came: an FP32 copy of it would outweigh the rest."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_BSD, weight_ED)
        return x_BSD.float() @ weight_ED.T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x_BSD, weight_ED = ctx.saved_tensors
        (grad_BSE,) = grad_outputs
        grad_weight_ED = grad_BSE.flatten(0, 1).T @ x_BSD.flatten(0, 1).float()
        return (grad_BSE @ weight_ED).to(x_BSD.dtype), grad_weight_ED


class Router(nn.Module):
    """Node-limited top-k choice by biased sigmoid affinity. `bias` [E] is FP32 state, not a parameter."""

    bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.split: SequenceSplit = WholeSequences()

    def forward(self, x_BSD: Tensor) -> Routing:
        """Choose top_k experts for every token of x; see `Routing`."""
        affinity_BSE = _apply_gate(x_BSD, self.weight).sigmoid()
        affinity_TE = affinity_BSE.flatten(0, 1)
        indices_TA = choose_experts(affinity_TE.detach() + self.bias, self.config)
        weights_TA = affinity_TE.gather(1, indices_TA)
        if self.config.normalize_weights:
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
        load_BE = count_choices(indices_TA.view(x_BSD.shape[0], -1), self.config.num_experts)
        return Routing(
            indices_TA=indices_TA,
            weights_TA=weights_TA * self.config.route_scale,
            load_E=load_BE.sum(0),
            balance_loss=sequence_balance_loss(
                affinity_BSE,
                self.split.sum_counts(load_BE),
                self.config,
                seq_len=x_BSD.shape[1] * self.split.num_parts,
            ),
        )


def _apply_gate(x_BSD: Tensor, weight_ED: Tensor) -> Tensor:
    logits_BSE: Any = _Fp32Gate.apply(x_BSD, weight_ED)
    return logits_BSE


def choose_experts(biased_TE: Tensor, config: MoEConfig) -> Tensor:
    """Return the top_k experts per token inside the best top_k_groups groups, int64 [T, A].

    A group is scored by the sum of its two highest biased affinities; one group means no limit.
    """
    if config.num_groups > 1:
        grouped_TGE = biased_TE.unflatten(-1, (config.num_groups, -1))
        scores_TG = grouped_TGE.topk(2, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(scores_TG, dtype=torch.bool)
        kept_TG.scatter_(1, scores_TG.topk(config.top_k_groups, dim=-1, sorted=False).indices, True)
        biased_TE = grouped_TGE.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
    return biased_TE.topk(config.top_k, dim=-1, sorted=False).indices


def count_choices(indices_BX: Tensor, num_experts: int) -> Tensor:
    """Return how often each expert was chosen in each row, exact int64 [B, E]."""
    counts_BE = torch.zeros(indices_BX.shape[0], num_experts, dtype=torch.int64, device=indices_BX.device)
    return counts_BE.scatter_add_(1, indices_BX, torch.ones_like(indices_BX))


def sequence_balance_loss(
    affinity_BSE: Tensor, load_BE: Tensor, config: MoEConfig, *, seq_len: int
) -> Tensor:
    """Return alpha * sum over sequences of sum_i f_i P_i, FP32 scalar (equations 17 to 20).

    f_i = E / (A seq_len) * choices of expert i, a constant; P_i = mean over the sequence of the affinity
    normalised over all experts, through which alone the gradient flows. load_BE counts whole sequences of
    seq_len tokens; where affinity_BSE holds only some of them, the results of all parts add up to the loss.
    """
    fraction_BE = load_BE.float() * (config.num_experts / (config.top_k * seq_len))
    share_BE = (affinity_BSE / (affinity_BSE.sum(-1, keepdim=True) + 1e-20)).sum(1) / seq_len
    return config.balance_loss_weight * (fraction_BE * share_BE).sum()


@torch.no_grad()
def update_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """Move the bias in place: + speed where the load is under the mean, - speed where it is over it.

    load_E: exact int64 counts of the whole global batch. The comparison E * load_i with the sum stays in
    integers, so an expert at the mean keeps its bias.
    """
    direction_E = torch.sign(load_E.sum() - load_E * load_E.numel())
    bias_E.add_(direction_E.to(bias_E.dtype), alpha=speed)
