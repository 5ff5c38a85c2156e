"""The latent cache: its size, what it returns, and that forgetting needs no clearing."""

import pytest
import torch

from model.cache import LatentCache
from model.config import AttentionConfig

ATTENTION = AttentionConfig(num_heads=16, kv_lora_rank=24, qk_rope_head_dim=8)


def make_cache(**sizes: int) -> LatentCache:
    defaults = {"num_layers": 3, "num_sequences": 2, "max_length": 10}
    return LatentCache(ATTENTION, **(defaults | sizes), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_costs_latent_plus_rope_numbers_per_layer(dtype: torch.dtype) -> None:
    cache = LatentCache(ATTENTION, num_layers=5, num_sequences=3, max_length=7, dtype=dtype)
    assert cache.num_bytes == 3 * 7 * 5 * (24 + 8) * dtype.itemsize
    held = sum(value.nbytes for value in vars(cache)["_memory_BMX"])
    assert held == cache.num_bytes


def test_deepseek_v3_needs_70_kb_a_token() -> None:
    # 61 layers x (512 + 64) numbers x 2 bytes = 70272 bytes, whatever the 128 heads
    cache = LatentCache(AttentionConfig(), num_layers=61, num_sequences=1, max_length=1, dtype=torch.bfloat16)
    assert cache.num_bytes == 70_272


def test_reads_return_what_was_written_at_the_positions() -> None:
    cache = make_cache()
    cache.truncate([1, 4])
    positions = cache.next_positions(2)
    assert positions.tolist() == [[1, 2], [4, 5]]
    latent, rope = torch.randn(2, 2, 24), torch.randn(2, 2, 8)
    cache.write(1, latent, rope, positions)
    cache.extend(2)
    memory = cache.read(1, 6)
    assert memory.shape == (2, 6, 32)
    for row, start in enumerate((1, 4)):
        assert torch.equal(memory[row, start : start + 2], torch.cat((latent[row], rope[row]), -1))
    assert cache.read(0, 6).count_nonzero() == 0
    assert cache.lengths == [3, 6]


def test_truncated_entries_are_replaced() -> None:
    cache = make_cache(num_sequences=1)
    for value in (1.0, 2.0):
        cache.truncate([3])
        cache.write(0, torch.full((1, 2, 24), value), torch.full((1, 2, 8), value), cache.next_positions(2))
        cache.extend([1])
        assert cache.lengths == [4]
        assert (cache.read(0, 5)[0, 3:] == value).all()


def test_too_many_tokens_and_bad_lengths_are_refused() -> None:
    cache = make_cache()
    cache.truncate([1, 9])
    with pytest.raises(ValueError, match="max_length=10; build it for at least 11"):
        cache.next_positions(2)
    with pytest.raises(ValueError, match="must lie in"):
        cache.truncate([0, 11])
    with pytest.raises(ValueError, match="1 lengths for 2 sequences"):
        cache.truncate([1])
    assert cache.lengths == [1, 9]
