"""Multi-token prediction against transformers' MTP layers, gradients of the shared parts included."""

import pytest
import torch

from model.config import YarnConfig
from model.transformer import Transformer
from tests.model.oracle import oracle_of, randomize, to_theirs
from tests.model.small import relative, small

S = 18


@pytest.mark.parametrize("depths", [1, 3])
@pytest.mark.parametrize("yarn", [None, YarnConfig(factor=40, original_length=16)])
@pytest.mark.parametrize("num_dense_layers", [1, 2])
def test_every_depth_and_gradient_equal_transformers(
    depths: int, yarn: YarnConfig | None, num_dense_layers: int
) -> None:
    config = small(num_mtp_layers=depths, num_layers=2, num_dense_layers=num_dense_layers)
    model = Transformer(config, yarn=yarn)
    randomize(model, seed=1)
    theirs, mtp = oracle_of(model, yarn)
    assert mtp is not None
    stream = torch.randint(config.vocab_size, (2, S + depths), generator=torch.Generator().manual_seed(2))
    tokens_BKS = torch.stack([stream[:, k : k + S] for k in range(1 + depths)], dim=1)
    positions_BS = torch.arange(S).expand(2, -1)
    output = model(tokens_BKS, positions_BS)
    logits = [model.head(hidden_BSD) for hidden_BSD in output.hidden_KBSD]

    hidden = theirs.model(tokens_BKS[:, 0], use_cache=False).last_hidden_state
    expected = [theirs.lm_head(hidden)]
    mask = torch.full((S, S), float("-inf")).triu(1)[None, None]
    for k, layer in enumerate(mtp.layers):
        hidden = layer(
            mtp.embed_tokens(tokens_BKS[:, k + 1]),
            hidden,
            position_embeddings=mtp.rotary_emb(hidden, position_ids=positions_BS),
            attention_mask=mask,
            position_ids=positions_BS,
            past_key_values=None,
        )
        expected.append(mtp.shared_head(hidden))
    assert len(logits) == len(expected) == 1 + depths
    for got, want in zip(logits, expected, strict=True):
        assert relative(got, want) < 1e-5

    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(want.shape, generator=generator) for want in expected]
    torch.stack([(a * b).sum() for a, b in zip(logits, directions, strict=True)]).sum().backward()
    torch.stack([(a * b).sum() for a, b in zip(expected, directions, strict=True)]).sum().backward()
    ours = to_theirs({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model)
    wanted = dict(theirs.named_parameters())
    wanted |= {f"mtp.{name}": parameter for name, parameter in mtp.layers.named_parameters()}
    assert ours.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert parameter.grad is not None, name
        assert relative(ours[name], parameter.grad) < 1e-5, name


def test_depth_k_sees_tokens_up_to_i_plus_k_and_no_further() -> None:
    config = small(num_mtp_layers=2)
    model = Transformer(config)
    randomize(model, seed=4)
    stream = torch.randint(config.vocab_size, (1, S + 2), generator=torch.Generator().manual_seed(5))

    def hidden(stream_BX: torch.Tensor) -> list[torch.Tensor]:
        tokens_BKS = torch.stack([stream_BX[:, k : k + S] for k in range(3)], dim=1)
        return model(tokens_BKS, torch.arange(S)[None]).hidden_KBSD

    place = 9
    changed = stream.clone()
    changed[0, place] = (changed[0, place] + 1) % config.vocab_size
    for depth, (before, after) in enumerate(zip(hidden(stream), hidden(changed), strict=True)):
        first = place - depth  # the first position whose depth-k state has read the changed token
        assert relative(after[:, :first], before[:, :first]) < 1e-6
        assert relative(after[:, first], before[:, first]) > 1e-3


def test_depths_without_tokens_are_left_out() -> None:
    config = small(num_mtp_layers=2)
    model = Transformer(config)
    randomize(model, seed=4)
    tokens_BKS = torch.randint(config.vocab_size, (1, 3, S), generator=torch.Generator().manual_seed(5))
    positions_BS = torch.arange(S)[None]
    whole, main = model(tokens_BKS, positions_BS), model(tokens_BKS[:, :1], positions_BS)
    assert len(main.hidden_KBSD) == 1
    assert torch.equal(main.hidden_KBSD[0], whole.hidden_KBSD[0])
    assert torch.equal(main.load_LE, whole.load_LE[:2])
    with pytest.raises(ValueError, match="num_mtp_layers=2"):
        model(tokens_BKS[:, [0, 1, 2, 2]], positions_BS)
