"""Hugging Face's Chameleon with our random weights, and what to ask of it, where it is installed."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldvla.batch import Batch, Sample
from worldvla.config import LayoutConfig, ModelConfig
from worldvla.data.sample import SampleBuilder
from worldvla.data.show import CountedWords
from worldvla.model.transformer import Transformer
from worldvla.published.names import published_names
from worldvla.tokenizers.action import RYNNVLA, WORLDVLA
from worldvla.vocab import chameleon

VOCAB = replace(chameleon(), size=16_384, num_text=16_384)
"""The published ids without the text above them: a quarter of the arithmetic."""
CONFIG = ModelConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=4, hidden=96)
ONE_VIEW = LayoutConfig(grids=((4, 4),), chunk=3)
TWO_VIEWS = LayoutConfig(views=("agentview", "wrist"), grids=((4, 4), (2, 4)), chunk=3, state=True)


def build_ours(seed: int = 0, config: ModelConfig = CONFIG) -> Transformer:
    """Return a model whose norms and logits are far from trivial."""
    model = Transformer(config, VOCAB.size)
    model.init_weights(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        model.head.weight.mul_(6.0)
    return model.eval()


def published_state(model: Transformer) -> dict[str, Tensor]:
    """Return its state dict under the published keys, QK-norms one row a head as transformers has them."""
    heads = {"q_norm": model.config.num_heads, "k_norm": model.config.num_kv_heads}
    names, state = published_names(model.config), {}
    for name, tensor in model.state_dict().items():
        rows = heads.get(name.split(".")[-2])
        state[names[name]] = tensor.expand(rows, -1).clone() if rows else tensor.clone()
    return state


def hub_config(config: ModelConfig, **changes: Any) -> Any:
    from transformers import ChameleonConfig

    image = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 4}
    settings: dict[str, Any] = {
        "vocab_size": VOCAB.size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vq_config": {**image, "embed_dim": 4, "num_embeddings": 8},
        # No IMGIMG... names: with them, transformers sets the scores of all image ids to the lowest number.
        "vocabulary_map": {"<image>": VOCAB.sep + 1},
    }
    settings |= {"attn_implementation": "eager", **changes}
    return ChameleonConfig(**settings)


def build_theirs(model: Transformer) -> Any:
    """Return ChameleonForConditionalGeneration with `model`'s weights; its image tokenizer stays random."""
    from transformers import ChameleonForConditionalGeneration

    theirs = ChameleonForConditionalGeneration(hub_config(model.config)).eval()
    missing, unexpected = theirs.load_state_dict(published_state(model), strict=False)
    assert not unexpected
    assert all(key.startswith("model.vqmodel.") for key in missing)
    return theirs


def builder(layout: LayoutConfig) -> SampleBuilder:
    statistics = RYNNVLA if layout.state else WORLDVLA
    return SampleBuilder(layout, VOCAB, CountedWords(first=16_100), statistics)


def frame(layout: LayoutConfig, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, 8192, n) for n in layout.codes_per_view]


def samples(layout: LayoutConfig, seed: int = 0) -> list[Sample]:
    """Return two policy samples (one and two frames) and two world samples of random content."""
    rng, make = np.random.default_rng(seed), builder(layout)
    state = rng.uniform(-0.2, 0.2, 8) if layout.state else None
    found = [
        make.policy(
            "open it", state, [frame(layout, rng) for _ in range(n)], rng.uniform(-1, 1, (layout.chunk, 7))
        )
        for n in (1, 2)
    ]
    for _ in range(2):
        action = rng.uniform(-1, 1, 7)
        found.append(make.world([frame(layout, rng)], action, frame(layout, rng)))
    return found


def published_mask(ids_BT: Tensor) -> Tensor:
    """Return who may attend to whom, bool (B, 1, T, T), from ids alone by loops (generate_att_mask_3).

    WorldVLA model/modeling_xllmx_chameleon_ck.py:216-299: causal; the rows of an action block after the
    last image do not see the columns of earlier action blocks. A block without an end is closed at the last
    position.
    """
    batch, length = ids_BT.shape
    mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1)
    for sample, ids in enumerate(ids_BT.tolist()):
        last_image = max((i for i, id_ in enumerate(ids) if id_ == VOCAB.eoi), default=-1)
        blocks, start = [], None
        for i, id_ in enumerate(ids):
            if id_ == VOCAB.boa:
                start = i
            if start is not None and (id_ == VOCAB.eoa or i == length - 1):
                blocks.append((start, i))
                start = None
        for index, (first, last) in enumerate(blocks):
            for before, end in blocks[:index]:
                if first > last_image:
                    mask[sample, first : last + 1, before : end + 1] = False
    return mask[:, None]


def additive(mask: Tensor) -> Tensor:
    """Return the 4-D mask that transformers adds to its scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@torch.no_grad()
def theirs_logits(theirs: Any, ids_BT: Tensor) -> Tensor:
    """Return transformers' scores (B, T, V) under the published mask, given as an additive 4-D mask."""
    mask = additive(published_mask(ids_BT))
    return theirs(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits


def batch(layout: LayoutConfig) -> Batch:
    return Batch.stack(samples(layout), VOCAB.pad)
