"""The transformer against an independent one; cache, padding, batching change nothing; counts; init values.

pytest tests/test_model.py
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_run import MODEL
from torch import Tensor

from worldvla.config import ModelConfig
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import EMBED_STD, Transformer

PLAIN = replace(MODEL, place_embedding=False)
V = 50


def build(config: ModelConfig = PLAIN, vocab_size: int = V) -> Transformer:
    model = Transformer(config, vocab_size, num_rows=5, num_cols=6)
    model.init_weights(0)
    return model.eval()


def causal(ids_BT: Tensor) -> Tensor:
    return dense_mask(torch.zeros_like(ids_BT))


class ListCache:
    """The smallest cache of a layer: concatenation."""

    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.kept, (k_BGTK, v_BGTK), strict=True) if self.kept else ((k_BGTK,), (v_BGTK,))
        k_BGSK, v_BGSK = (torch.cat(pair, 2) for pair in pairs)
        self.kept = k_BGSK, v_BGSK
        return self.kept


def reference_logits(model: Transformer, ids_T: Tensor) -> Tensor:
    """Chameleon's forward pass of one causal sequence, one head and one position at a time."""
    config, p = model.config, dict(model.named_parameters())
    num_dims = config.width // config.num_heads
    half = num_dims // 2
    angle = torch.tensor([config.rope_theta ** (-2 * i / num_dims) for i in range(half)])

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    def head(x_TD: Tensor, kind: str, layer: str, h: int) -> Tensor:
        x = x_TD @ p[f"{layer}.attention.{kind}.weight"].T[:, h * num_dims : (h + 1) * num_dims]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x * p[f"{layer}.attention.{kind}_norm.weight"] + p[f"{layer}.attention.{kind}_norm.bias"]
        out = torch.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                c, s = torch.cos(t * angle[i]), torch.sin(t * angle[i])
                out[t, i] = x[t, i] * c - x[t, i + half] * s
                out[t, i + half] = x[t, i + half] * c + x[t, i] * s
        return out

    x_TD = p["embed.weight"][ids_T]
    for index in range(config.num_layers):
        layer = f"layers.{index}"
        y_TD = rms(x_TD, p[f"{layer}.attention_norm.weight"])
        outs = []
        for h in range(config.num_heads):
            g = h * config.num_kv_heads // config.num_heads
            q, k = head(y_TD, "q", layer, h), head(y_TD, "k", layer, g)
            v = y_TD @ p[f"{layer}.attention.v.weight"].T[:, g * num_dims : (g + 1) * num_dims]
            scores = (q @ k.T / num_dims**0.5).masked_fill(torch.ones(len(q), len(q)).triu(1) > 0, -torch.inf)
            outs.append(scores.softmax(-1) @ v)
        x_TD = x_TD + torch.cat(outs, -1) @ p[f"{layer}.attention.o.weight"].T
        y_TD = rms(x_TD, p[f"{layer}.mlp_norm.weight"])
        inner = F.silu(y_TD @ p[f"{layer}.mlp.gate.weight"].T) * (y_TD @ p[f"{layer}.mlp.up.weight"].T)
        x_TD = x_TD + inner @ p[f"{layer}.mlp.down.weight"].T
    return rms(x_TD, p["norm.weight"]) @ p["head.weight"].T


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_equals_an_independent_implementation(num_kv_heads: int) -> None:
    model = build(replace(PLAIN, num_kv_heads=num_kv_heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        ids_BT = torch.randint(0, V, (2, 9))
        logits_BTV = model.logits(model(ids_BT, causal(ids_BT)))
        for ids_T, logits_TV in zip(ids_BT, logits_BTV, strict=True):
            assert torch.allclose(logits_TV, reference_logits(model, ids_T), atol=1e-4)


def test_cached_decoding_equals_the_whole_pass() -> None:
    model = build(MODEL)
    ids_BT, row_BT = torch.randint(0, V, (3, 12)), torch.randint(0, 5, (3, 12))
    whole = model(ids_BT, causal(ids_BT), row_BT, row_BT)
    cache, parts = [ListCache() for _ in model.layers], []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        part, positions = slice(start, stop), torch.arange(start, stop)[None]
        mask = causal(ids_BT)[:1, :, part, :stop]
        parts.append(model(ids_BT[:, part], mask, row_BT[:, part], row_BT[:, part], positions, cache=cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_parallel_actions_equal_one_after_another() -> None:
    """The U actions of a chunk are independent: columns over the cached prompt give the same states."""
    model = build()
    chunk_BT = torch.tensor([[0] * 6 + [1] * 4 + [2] * 4 + [3] * 4])
    ids_BT = torch.randint(0, V, chunk_BT.shape)
    whole = model(ids_BT, dense_mask(chunk_BT))
    cache = [ListCache() for _ in model.layers]
    model(ids_BT[:, :6], causal(ids_BT[:, :6]), cache=cache)
    seen = torch.arange(6)
    for column in range(4):
        positions = torch.tensor([6 + column, 10 + column, 14 + column])
        seen = torch.cat([seen, positions])
        mask = dense_mask(chunk_BT[:, positions], chunk_BT[:, seen], positions[None], seen[None])
        x_BTD = model(ids_BT[:, positions], mask, positions_BT=positions[None], cache=cache)
        assert torch.allclose(x_BTD, whole[:, positions], atol=1e-5)


def test_padding_and_batching_change_nothing() -> None:
    model = build()
    ids_BT = torch.randint(0, V, (4, 10))
    whole = model(ids_BT, causal(ids_BT))
    alone = model(ids_BT[2:3, :7], causal(ids_BT[2:3, :7]))
    assert torch.allclose(whole[2:3, :7], alone, atol=1e-5)


def test_kept_positions_equal_a_gather() -> None:
    model = build(replace(MODEL, dropout=0.0))
    ids_BT, row_BT = torch.randint(0, V, (2, 8)), torch.zeros(2, 8, dtype=torch.int64)
    keep_P = torch.tensor([1, 3, 8, 15])
    whole = model(ids_BT, causal(ids_BT), row_BT, row_BT)
    kept = model(ids_BT, causal(ids_BT), row_BT, row_BT, keep_P=keep_P)
    assert torch.allclose(kept, whole.flatten(0, 1)[keep_P], atol=1e-6)


def test_place_zero_is_nothing_and_stays_so() -> None:
    model = build(MODEL)
    ids_BT, none_BT = torch.randint(0, V, (2, 8)), torch.zeros(2, 8, dtype=torch.int64)
    bare = build(PLAIN)
    bare.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n.split(".")[0] not in ("row_embed", "col_embed")}
    )
    x_BTD = model(ids_BT, causal(ids_BT), none_BT, none_BT)
    assert torch.equal(x_BTD, bare(ids_BT, causal(ids_BT)))
    assert not torch.equal(x_BTD, model(ids_BT, causal(ids_BT), none_BT + 1, none_BT))
    x_BTD.sum().backward()
    assert model.row_embed is not None
    assert model.row_embed.weight.grad is not None
    assert model.row_embed.weight.grad.abs().sum() == 0
    with pytest.raises(ValueError, match="row_BT and col_BT"):
        model(ids_BT, causal(ids_BT))


def test_logits_over_a_range_are_a_slice() -> None:
    model = build()
    x_PD = torch.randn(3, PLAIN.width)
    assert torch.allclose(model.logits(x_PD, range(10, 20)), model.logits(x_PD)[:, 10:20], atol=1e-6)


def test_autocast_stays_close() -> None:
    model = build()
    ids_BT = torch.randint(0, V, (2, 16))
    full = model(ids_BT, causal(ids_BT))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(ids_BT, causal(ids_BT))
    assert (low.float() - full).abs().max() < 0.1


@pytest.mark.parametrize("config", [PLAIN, MODEL])
def test_number_of_parameters(config: ModelConfig) -> None:
    d, k = config.width, config.width // config.num_heads
    attention = 2 * d * d + 2 * d * config.num_kv_heads * k + 4 * k
    layer = attention + 3 * d * config.hidden + 2 * d
    places = (5 + 6) * d if config.place_embedding else 0
    assert build(config).num_parameters() == 2 * V * d + config.num_layers * layer + d + places


def test_published_size_has_7_billion_parameters() -> None:
    config = ModelConfig(num_layers=32, width=4096, num_heads=32, num_kv_heads=32, hidden=11008)
    with torch.device("meta"):
        model = Transformer(config, vocab_size=65536)
    assert model.num_parameters() == 7_013_158_912
    assert len(model.state_dict()) == 419  # as in the released checkpoints


def test_flops_are_two_per_weight_and_position() -> None:
    model = build()
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    attention = 2 * 2 * PLAIN.num_layers * PLAIN.width * 10
    assert model.flops(10, num_logits=3) == 10 * (2 * matrices + attention) + 3 * 2 * V * PLAIN.width


def test_initial_weights_depend_on_the_seed_alone() -> None:
    a, b, c = build(MODEL), build(MODEL), Transformer(MODEL, V, 5, 6)
    c.init_weights(1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)
    assert a.embed.weight.std().item() == pytest.approx(EMBED_STD, rel=0.1)
    logits = a.logits(a(torch.arange(V)[None], None, torch.zeros(1, V).long(), torch.zeros(1, V).long()))
    assert logits.std() < 0.5  # the loss starts near ln V


def test_codebook_init_makes_like_codes_alike() -> None:
    model = build(MODEL, vocab_size=400)
    image, bins = range(10, 26), range(100, 356)
    codebook = torch.randn(16, 8)
    codebook[1] = codebook[0]
    before = model.embed.weight.detach().clone()
    model.init_codebook(codebook, image, [bins])
    for table, std in ((model.embed.weight.detach(), EMBED_STD), (model.head.weight.detach(), 0.02)):
        assert torch.equal(table[image.start], table[image.start + 1])
        assert table[image.start : image.stop].std().item() == pytest.approx(std, rel=0.05)
        assert table[bins.start : bins.stop].std().item() == pytest.approx(std, rel=0.05)
        likeness = F.cosine_similarity(table[bins.start : bins.start + 1], table[bins.start : bins.stop])
        assert likeness[1] > 0.95
        assert likeness[60:].abs().mean() < 0.4
    assert torch.equal(model.embed.weight[:10], before[:10])
    with pytest.raises(ValueError, match="the codebook has 16 codes, the vocabulary 20"):
        model.init_codebook(codebook, range(20), [])
