"""A trained model -> one with another image tokenizer and more layers, to train on from.

What it knows of acting stays about as it is.

    python -m paper.grow --old OLD --config-file NEW.json --demos out/world/demos --out out/tabletop/grown

New layers stand between the old ones, with branches that end in zeros. With demonstrations the embedding of
the new codes is fitted to that of the old codes of the same cells, which both tokenizers must share. Without,
the new model is of another world: words and ranges are those of its own stores, and what words and codes
mean is left to learn; acting, copying and attending come along.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro

import worldvla
from worldvla.config import Config, from_json
from worldvla.data.episode import demonstration_files, read_episodes
from worldvla.data.sample import SampleBuilder
from worldvla.infer.model import Model
from worldvla.model.transformer import Block, Transformer
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train import checkpoint
from worldvla.train.build import Pieces, build, build_model
from worldvla.vocab import compact


def grow(
    old: Path,
    config_file: Path,
    out: Path,
    demos: Path | None = None,
    episodes: int = 400,
    steps: int = 3000,
) -> None:
    """Write the checkpoint `out`; `config_file` is the new model's whole config (`worldvla config NAME`)."""
    source = worldvla.load(str(old)).model
    config = from_json(Config, json.loads(config_file.read_text()), str(config_file))
    config = replace(config, train=replace(config.train, init_from=""))
    if demos is None:
        pieces, model, remark = _of_another_world(source, config)
    else:
        pieces, model, remark = _of_the_same_world(source, config, demos, episodes, steps)
    checkpoint.save(out, pieces, model, [], {"step": 0})
    print(f"{out}: {model.num_parameters():,} parameters{remark}")


def _of_another_world(source: Model, config: Config) -> tuple[Pieces, Transformer, str]:
    pieces = build(config)
    model = build_model(pieces)
    _copy(source.transformer, model, source.vocab, pieces.vocab, words=False)
    return pieces, model, ""


def _of_the_same_world(
    source: Model, config: Config, demos: Path, episodes: int, steps: int
) -> tuple[Pieces, Transformer, str]:
    image = ImageTokenizer.load(config.tokenizer)
    text = source.builder.text
    vocab = compact(image.num_codes, text.size, image_last=True)
    model = Transformer(config.model, vocab.size, *config.layout.sizes)
    model.init_weights(config.train.seed)
    _copy(source.transformer, model, source.vocab, vocab)
    pairs = _pairs(source, image, demos, episodes)
    error = _fit(model, source.transformer.embed.weight[source.vocab.image.start :], pairs, steps)
    builder = SampleBuilder(config.layout, vocab, text, source.builder.statistics)
    pieces = Pieces(config, image, text, source.builder.statistics, vocab, builder, None)  # pyright: ignore
    return pieces, model, f"; embeddings fitted to {error:.3f} of their variance"


@torch.no_grad()
def _copy(old: Transformer, new: Transformer, old_vocab, vocab, words: bool = True) -> None:
    spots = np.linspace(0, len(new.layers) - 1, len(old.layers)).round().astype(int).tolist()
    for index, layer in enumerate(new.layers):
        assert isinstance(layer, Block)
        if index in spots:
            layer.load_state_dict(old.layers[spots.index(index)].state_dict())
        else:
            layer.attention.o.weight.zero_()
            layer.mlp.down.weight.zero_()
    for name in ("bos", "pad", "eos", "sep", "boi", "eoi", "boa", "eoa", "bostate", "eostate"):
        assert getattr(vocab, name) == getattr(old_vocab, name)
    for span in ("text", "action", "state"):
        there, here = getattr(old_vocab, span), getattr(vocab, span)
        is_text = span == "text"  # and what stands before it
        first = slice(0 if is_text else here.start, here.stop if words or not is_text else here.start)
        origin = slice(0 if is_text else there.start, there.stop if words or not is_text else there.start)
        for table in ("embed", "head"):
            getattr(new, table).weight[first] = getattr(old, table).weight[origin]
    for own, theirs in ((new.row_embed, old.row_embed), (new.col_embed, old.col_embed)):
        assert own is not None
        assert theirs is not None
        own.weight.copy_(theirs.weight)
    new.norm.weight.copy_(old.norm.weight)
    pairs = (
        (new.code_embed, old.code_embed),
        (new.code_head, old.code_head),
        (new.previous_in, old.previous_in),
    )
    for own, theirs in pairs:
        if own is not None and theirs is not None and _shapes(own) == _shapes(theirs):
            own.load_state_dict(theirs.state_dict())


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


@torch.no_grad()
def _pairs(source, image: ImageTokenizer, demos: Path, episodes: int) -> torch.Tensor:
    """Return (P, 2): the old and the new code of the same cell, each pair once."""
    files = demonstration_files([demos])
    random.Random(0).shuffle(files)
    pairs, count = [], 0
    for file in files:
        for episode in read_episodes(file):
            for images in episode.images.values():
                some = torch.from_numpy(np.ascontiguousarray(images[::3]))
                pairs.append(
                    torch.stack([source.image.encode(some).flatten(), image.encode(some).flatten()], 1)
                )
            count += 1
            if count % 10 == 0:
                break
        if count >= episodes:
            break
    return torch.cat(pairs).unique(dim=0)


def _fit(model: Transformer, targets_ND: torch.Tensor, pairs_P2: torch.Tensor, steps: int) -> float:
    """Fit the code embedding; return the error's share of the variance on the last pairs."""
    embed, error = model.code_embed, torch.zeros(())
    assert embed is not None
    optimizer = torch.optim.AdamW(embed.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    targets_ND = targets_ND.detach()
    for step in range(steps):
        rows = torch.randint(len(pairs_P2), (2048,), generator=generator)
        error = (embed(pairs_P2[rows, 1]) - targets_ND[pairs_P2[rows, 0]]).square().mean()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps) + 1e-5
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float(error.detach() / targets_ND[pairs_P2[:, 0]].var(0).mean())


if __name__ == "__main__":
    tyro.cli(grow)
