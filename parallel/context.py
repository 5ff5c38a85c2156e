"""Context parallelism: which tokens of a sequence a rank holds, and attention over the gathered latents.

Causal attention gives late tokens more work than early ones. So a sequence is cut into 2 * cp chunks, and
part r of cp holds chunks r and 2 * cp - 1 - r, an early and a late one (arXiv 2407.21783, section 3.3.2):

    cp = 2, chunks 0 1 2 3:     part 0 holds 0 and 3,     part 1 holds 1 and 2

Each chunk of queries needs the keys and values of all tokens up to its end. What is gathered for that is
MLA's compressed memory, kv_lora_rank + rope numbers per token, whatever the number of heads; every rank
expands it to the keys and values of its own heads. `parallel/ulysses.py` exchanges heads instead.

Legend: B sequences, s own tokens, S tokens of this part of cp, M tokens of the whole sequence, H heads,
K query and key width, U value width, C latent width, P rotary width, X any width.
"""

import torch
from torch import Tensor

from model.attention import Memory
from model.kernels.attention import causal_attention
from parallel.collectives import gather_tokens
from parallel.groups import Group


def zigzag_chunks(parts: int, part: int) -> tuple[int, int]:
    """Return the two of 2 * parts equal chunks that a part holds: an early and a late one, of equal work."""
    return part, 2 * parts - 1 - part


def split_context(x: Tensor, *, dim: int, group: Group) -> Tensor:
    """Return this rank's tokens of x along `dim`, its two chunks one after the other.

    Labels and the tokens of multi-token prediction are shifted before. Raises ValueError unless the length is
    a multiple of 2 * cp.
    """
    if group.size == 1:
        return x
    if x.shape[dim] % (2 * group.size):
        raise ValueError(
            f"a sequence of {x.shape[dim]} tokens cannot be cut into {2 * group.size} equal chunks"
        )
    chunks = x.chunk(2 * group.size, dim)
    return torch.cat([chunks[i] for i in zigzag_chunks(group.size, group.rank)], dim)


def in_sequence_order(x_BMX: Tensor, parts: int) -> Tensor:
    """Return the tokens of all parts, which come part by part, by increasing position."""
    if parts == 1:
        return x_BMX
    held = [chunk for part in range(parts) for chunk in zigzag_chunks(parts, part)]
    by_chunk = dict(zip(held, x_BMX.chunk(2 * parts, 1), strict=True))
    return torch.cat([by_chunk[i] for i in range(2 * parts)], 1)


def in_part_order(x_BMX: Tensor, parts: int) -> Tensor:
    """Return the tokens, which come by increasing position, part by part; undoes `in_sequence_order`."""
    if parts == 1:
        return x_BMX
    chunks = x_BMX.chunk(2 * parts, 1)
    return torch.cat([chunks[i] for part in range(parts) for i in zigzag_chunks(parts, part)], 1)


def gather_memory(memory: Memory, group: Group) -> tuple[Tensor, Tensor]:
    """Return the latents and rotary key parts of the group's tokens, rank by rank, from one all-gather."""
    latent_BsC, k_rope_BsP = memory.latent_BMC, memory.k_rope_BMP
    joined_BSX = gather_tokens(torch.cat((latent_BsC, k_rope_BsP), dim=-1), group)
    latent_BSC, k_rope_BSP = joined_BSX.split((latent_BsC.shape[-1], k_rope_BsP.shape[-1]), dim=-1)
    return latent_BSC, k_rope_BSP


class GatheredAttention:
    """`model.attention.AttentionCore` for sequences spread over cp in zigzag, and in each part over tp.

    Inside a part the tokens lie on the tp ranks one after the other, and each tp rank has its own heads. The
    gradient of each latent is the sum over all ranks of cp and tp, because each has attended to it.

    Args:
        sequence: the ranks of cp and tp, tp varying fastest.
        cp: parts into which a sequence is cut.
        cp_rank: the part of this rank.
    """

    def __init__(self, sequence: Group, *, cp: int, cp_rank: int) -> None:
        self._sequence, self._cp, self._cp_rank = sequence, cp, cp_rank

    def gather(self, memory: Memory) -> Memory:
        """Return the memory of the whole sequence, [B, M, ...], at positions 0 .. M - 1."""
        if self._sequence.size == 1:
            return memory
        latent_BMC, k_rope_BMP = (
            in_sequence_order(x_BMX, self._cp) for x_BMX in gather_memory(memory, self._sequence)
        )
        positions_M = torch.arange(latent_BMC.shape[1], device=latent_BMC.device)
        return Memory(latent_BMC, k_rope_BMP, positions_M.expand(len(latent_BMC), -1))

    def attend(
        self,
        q_BSHK: Tensor,
        k_BMHK: Tensor,
        v_BMHU: Tensor,
        *,
        q_positions_BS: Tensor,
        k_positions_BM: Tensor,
        scale: float,
    ) -> Tensor:
        """Return the causal attention of this part's tokens, [B, S, H, U]: each chunk over its prefix.

        Positions follow from the order of tokens and are not looked at.
        """
        if self._cp == 1:
            return causal_attention(q_BSHK, k_BMHK, v_BMHU, scale=scale)
        outputs: list[Tensor] = []
        chunks = zip(zigzag_chunks(self._cp, self._cp_rank), q_BSHK.chunk(2, 1), strict=True)
        for index, q_BCHK in chunks:
            length = q_BCHK.shape[1]
            first, end = index * length, (index + 1) * length
            outputs.append(
                causal_attention(q_BCHK, k_BMHK[:, :end], v_BMHU[:, :end], scale=scale, first=first)
            )
        return torch.cat(outputs, 1)
