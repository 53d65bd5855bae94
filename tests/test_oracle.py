"""Hugging Face's Chameleon and ours are one function: logits, cache, mask, greedy tokens, loss, gradients.

pytest tests/test_oracle.py   (skipped where `transformers` is not installed)
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    CONFIG,
    ONE_VIEW,
    TWO_VIEWS,
    VOCAB,
    additive,
    batch,
    build_ours,
    build_theirs,
    builder,
    frame,
    published_mask,
    samples,
    theirs_logits,
)
from torch import Tensor

from worldvla.batch import KIND_IMAGE, KIND_PROMPT
from worldvla.config import LayoutConfig, LossConfig
from worldvla.infer.cache import Cache
from worldvla.infer.decode import decode_chunk, decode_frame
from worldvla.infer.graphs import Runner
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.published.names import open_release, published_names, published_tensors
from worldvla.train.loss import Loss, Targets

pytest.importorskip("transformers")
LAYOUTS = pytest.mark.parametrize("layout", [ONE_VIEW, TWO_VIEWS], ids=["one_view", "two_views_state"])


@pytest.fixture(scope="module")
def ours() -> Transformer:
    torch.manual_seed(0)
    return build_ours()


@pytest.fixture(scope="module")
def theirs(ours: Transformer) -> Any:
    return build_theirs(ours)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Both have scores of several units, so that the bound means six digits."""
    assert a.std() > 0.5
    return float((a - b).abs().max()) <= tolerance


@LAYOUTS
def test_logits_are_equal_under_the_selective_mask(
    ours: Transformer, theirs: Any, layout: LayoutConfig
) -> None:
    data = batch(layout)
    mask = dense_mask(data.chunk_BT)
    is_real = torch.zeros_like(mask)
    for i, end in enumerate((data.ids_BT != VOCAB.pad).sum(1)):
        is_real[i, :, :end, :end] = True
    assert torch.equal(mask & is_real, published_mask(data.ids_BT) & is_real)
    assert mask.sum() < dense_mask(torch.zeros_like(data.chunk_BT)).sum()
    with torch.no_grad():
        logits = ours.logits(ours(data.ids_BT, mask))
    keep = data.ids_BT != VOCAB.pad
    assert close(logits[keep], theirs_logits(theirs, data.ids_BT)[keep])


@LAYOUTS
def test_logits_are_equal_with_caches(ours: Transformer, theirs: Any, layout: LayoutConfig) -> None:
    """A prompt, one token, the rest: through our cache and through theirs, both equal their whole pass."""
    ids_BT = batch(layout).ids_BT[2:]  # world samples: plain causal
    with torch.no_grad():
        whole = theirs(input_ids=ids_BT, use_cache=False).logits
        cache = Cache(CONFIG, len(ids_BT), ids_BT.shape[1], ours.embed.weight)
        kept, mine, other = None, [], []
        for start, stop in ((0, 20), (20, 21), (21, ids_BT.shape[1])):
            part, positions = ids_BT[:, start:stop], torch.arange(start, stop)[None]
            mask = dense_mask(torch.zeros(1, ids_BT.shape[1], dtype=torch.int64))[:, :, start:stop, :stop]
            cache.place(slice(start, stop), stop)
            mine.append(ours.logits(ours(part, mask, positions_BT=positions, cache=cache.layers)))
            out = theirs(input_ids=part, cache=kept, use_cache=True)
            kept = out.cache
            other.append(out.logits)
    assert close(torch.cat(mine, 1), whole)
    assert close(torch.cat(other, 1), whole)


@LAYOUTS
@pytest.mark.parametrize("split", [0, 12], ids=["chunk_at_once", "chunk_in_two"])
def test_logits_of_a_chunk_are_equal_with_caches(
    ours: Transformer, theirs: Any, layout: LayoutConfig, split: int
) -> None:
    """A prompt, then the chunk under the selective mask, at once or cut inside its second action, so that the
    first is in the cache and hidden: through our cache and through theirs, both equal their whole pass."""
    for sample in samples(layout)[:2]:  # policy samples of one frame and of two
        ids_BT, chunk_BT = (torch.from_numpy(v).long()[None] for v in (sample.ids, sample.chunk))
        prompt, length = int((sample.kind == KIND_PROMPT).sum()), len(sample)
        rows = published_mask(ids_BT)
        assert rows[:, :, prompt:].sum() < torch.ones_like(rows).tril()[:, :, prompt:].sum()
        whole = theirs_logits(theirs, ids_BT)
        cache = Cache(CONFIG, 1, length, ours.embed.weight)
        kept, mine, other = None, [], []
        cuts = sorted({0, prompt, prompt + split, length})
        with torch.no_grad():
            for start, stop in pairwise(cuts):
                part, positions = ids_BT[:, start:stop], torch.arange(start, stop)[None]
                mask = dense_mask(chunk_BT[:, start:stop], chunk_BT[:, :stop], positions)
                cache.place(slice(start, stop), stop)
                mine.append(ours.logits(ours(part, mask, positions_BT=positions, cache=cache.layers)))
                mask = additive(rows[:, :, start:stop, :stop])
                out = theirs(input_ids=part, attention_mask=mask, cache=kept, use_cache=True)
                kept = out.cache
                other.append(out.logits)
        assert close(torch.cat(mine, 1), whole)
        assert close(torch.cat(other, 1), whole)


def one_by_one(
    theirs: Any, prompt: np.ndarray, tail: np.ndarray, is_open: np.ndarray, span: range
) -> list[int]:
    """Return the codes that their whole forward pass finds, token by token; structure comes from `tail`."""
    ids, codes = prompt.tolist(), []
    for id_, is_free in zip(tail.tolist(), is_open, strict=True):
        if is_free:
            scores = (
                theirs_logits(theirs, torch.tensor([ids]))[0, -1, span.start : span.stop].double().softmax(0)
            )
            if span == VOCAB.action:  # the last two bins mean the same number
                scores = torch.cat([scores[:-2], scores[-2:].sum(0, keepdim=True)])
            codes.append(int(scores.argmax()))
            id_ = span.start + codes[-1]
        ids.append(id_)
    return codes


@LAYOUTS
def test_a_chunk_decodes_to_the_same_actions(ours: Transformer, theirs: Any, layout: LayoutConfig) -> None:
    rng, make = np.random.default_rng(1), builder(layout)
    prompt = make.policy_prompt("open it", np.zeros(8), [frame(layout, rng), frame(layout, rng)])
    tail, blocks = make.policy_tail(), make.action_block_positions(0)
    is_open = np.zeros(len(tail), dtype=bool)
    is_open[blocks[:, 1:-1]] = True
    expected = one_by_one(theirs, prompt.ids, tail.ids, is_open, VOCAB.action)
    got = decode_chunk(Runner(ours), VOCAB, [prompt], tail, blocks).codes_BUA
    assert got.reshape(-1).tolist() == expected
    assert len(set(expected)) > 5


@LAYOUTS
def test_an_image_decodes_to_the_same_codes(ours: Transformer, theirs: Any, layout: LayoutConfig) -> None:
    rng, make = np.random.default_rng(2), builder(layout)
    prompt, tail = make.world_prompt([frame(layout, rng)], np.full(7, 0.1)), make.world_tail()
    expected = one_by_one(theirs, prompt.ids, tail.ids, tail.kind == KIND_IMAGE, VOCAB.image)
    assert decode_frame(Runner(ours), VOCAB, [prompt], tail)[0][0].tolist() == expected
    assert len(set(expected)) > 5


@LAYOUTS
@pytest.mark.parametrize("reduction", ["published", "paper"])
def test_loss_and_gradients_are_equal(
    ours: Transformer, theirs: Any, layout: LayoutConfig, reduction: Any
) -> None:
    """Cross-entropy and z-loss of their logits by plain torch, and autograd's gradient of every weight."""
    data, z_weight = batch(layout), 1e-2  # the published 1e-5 would hide in the tolerance
    mask = additive(published_mask(data.ids_BT))
    theirs.zero_grad()
    logits = theirs(input_ids=data.ids_BT, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
    kind, ids = data.kind_BT[:, 1:].flatten(), data.ids_BT[:, 1:].flatten()
    is_target = kind > 0
    if reduction == "published":
        weight = torch.ones(VOCAB.size)
        weight[3:8195] = 0.04  # pretrain_ck.py:931-932
        expected = F.cross_entropy(logits[is_target], ids[is_target], weight=weight)
    else:
        action, world = kind == 1, kind > 1
        expected = F.cross_entropy(logits[action], ids[action]) + 0.04 * F.cross_entropy(
            logits[world], ids[world]
        )
    expected = expected + z_weight * logits[is_target].logsumexp(-1).square().mean()
    expected.backward()

    loss, targets = Loss(LossConfig(reduction=reduction, z_weight=z_weight), VOCAB), Targets.of(data)
    ours.zero_grad()
    hidden = ours(data.ids_BT, dense_mask(data.chunk_BT), keep_P=targets.positions_P)
    value, _ = loss(hidden, ours.head.weight, targets, loss.totals([targets]))
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    for name, key in published_names(CONFIG).items():
        mine, other = ours.get_parameter(name).grad, gradients[key]
        assert mine is not None
        other = other.sum(0) if other.dim() > mine.dim() else other  # one QK-norm stands for every head's
        assert float((mine - other).norm() / other.norm()) < 1e-4, name


@pytest.mark.parametrize("shard", ["50GB", "2MB"], ids=["one_file", "shards"])
def test_what_transformers_saves_is_read_and_written_back(
    ours: Transformer, theirs: Any, shard: str, tmp_path: Path
) -> None:
    """Their save_pretrained -> our reader, and the way back: all keys of their state dict, the same bits."""
    theirs.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    released = open_release(tmp_path / "saved", VOCAB)
    assert (len(set(released.files.values())) > 1) == (shard == "2MB")
    assert set(released.norm_rows.values()) == {CONFIG.num_heads}
    assert released.config == replace(CONFIG, dropout=0.05)
    read = dict(released.tensors())
    assert read.keys() == dict(ours.named_parameters()).keys()
    assert all(torch.equal(tensor, ours.get_parameter(name)) for name, tensor in read.items())
    back = dict(published_tensors(read.items(), released.norm_rows, released.dtypes))
    expected = {k: v for k, v in theirs.state_dict().items() if not k.startswith("model.vqmodel.")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in back.items())
