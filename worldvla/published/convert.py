"""A released folder -> one of our checkpoints, and back; keys and shapes in published/names.py.

`published.json` in the result holds what the way back needs: their config.json, the shard and the form of
every key; `published.safetensors` their tensors beside the transformer's (`model.vqmodel.*`, action head).
Weights are written from the shards' memory maps: no copy is made, whatever their size.
"""

from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from worldvla.config import Config, LayoutConfig, from_json, to_json
from worldvla.files import read_json, save_tensors, whole_folder, write_digests, write_json
from worldvla.model.lora import refuse_updates
from worldvla.model.weights import INDEX, find_checkpoint, header, read_tensor
from worldvla.published.hub import locate
from worldvla.published.names import (
    HEAD_PREFIX,
    RELEASES,
    VQ_PREFIX,
    Release,
    ReleasedFiles,
    open_release,
    published_names,
    published_tensors,
)
from worldvla.published.tokenizers import (
    IMAGE_FILES,
    TEXT_FILES,
    check_text,
    find,
    image_tokenizer,
    load_image_tokenizer,
    unlike_published,
    verify_checksums,
)
from worldvla.tokenizers.action import RYNNVLA, WORLDVLA
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import Vocab, chameleon

FACTS, ASIDE = "published.json", "published.safetensors"


def convert(
    source: Path | str,
    out_dir: Path,
    release: str,
    base: Config,
    suite: str = "",
    tokenizer: Path | str = "",
    without_action_head: bool = False,
) -> list[str]:
    """Write our checkpoint of a released folder or hub id, atomic; return lines worth knowing about it.

    `base`: the config for training on from it; layout, model and tokenizer are set here. `tokenizer`: folder
    or hub id of text_tokenizer.json and vqgan.ckpt; by default `source` itself.
    """
    if release not in RELEASES:
        raise ValueError(f"unknown release {release!r}: choose one of {', '.join(RELEASES)}")
    facts = RELEASES[release]
    layout, vocab = _layout(facts, release, suite), chameleon()
    directory = locate(source)
    pieces = locate(tokenizer) if tokenizer else directory
    lines = [line for folder in {directory, pieces} for line in _check_folder(folder)]
    actions = (layout.chunk, layout.num_action_dims) if facts.may_have_head else (0, 0)
    released = open_release(directory, vocab, actions, without_action_head)
    image = _image(released, pieces, vocab)
    text = _text(pieces, vocab)
    statistics = WORLDVLA if facts.actions == "worldvla" else RYNNVLA
    if layout.state:
        statistics = replace(statistics, state_low=RYNNVLA.state_low, state_high=RYNNVLA.state_high)
    config = replace(
        base,
        name="_".join(filter(None, (release, suite.removeprefix("libero_")))),
        layout=layout,
        model=released.config,
        tokenizer=str(out_dir / "image_tokenizer"),
        data=replace(base.data, sequence_length=layout.longest),
    )
    digests = {"image_tokenizer": image.digest(), "text": text.digest(), "statistics": statistics.digest()}
    manifest = {**digests, "vocab": vocab.digest(), "step": 0, "release": release}
    manifest |= {"dtype": released.dtypes["embed.weight"], "source": str(source)}
    aside = {key: released.read(key) for key in released.aside}
    way_back = {"norm_rows": released.norm_rows, "dtypes": released.dtypes}
    way_back |= {"files": released.files, "config": released.hub_config}
    with whole_folder(out_dir, FACTS) as scratch:
        write_json(scratch / "config.json", to_json(config))
        write_json(scratch / "vocab.json", asdict(vocab))
        write_json(scratch / "statistics.json", statistics.to_json())
        write_json(scratch / "manifest.json", manifest)
        write_json(scratch / FACTS, way_back)
        text.save(scratch / "text.json")
        image.save(scratch / "image_tokenizer")
        save_tensors(scratch / "model.safetensors", dict(released.tensors()))
        if aside:
            save_tensors(scratch / ASIDE, aside)
        write_digests(scratch)
    return [*lines, *_remarks(released, image, facts)]


def convert_back(source: Path, out_dir: Path, like: Path | None = None) -> None:
    """Write the released layout of a converted checkpoint, or of one trained from it (`like`: the former).

    Same weights, same bits. What is no part of the transformer is the release's own.
    """
    path = find_checkpoint(source)
    refuse_updates(path)
    template = path if like is None else find_checkpoint(like)
    if not (template / FACTS).is_file():
        raise FileNotFoundError(
            f"{template} has no {FACTS}: it was not converted from a release; name one that was by --like"
        )
    facts = read_json(template / FACTS)
    config = from_json(Config, read_json(path / "config.json"), str(path / "config.json")).model
    files: dict[str, str] = facts["files"]
    names = published_names(config)
    ours, weights = {key: name for name, key in names.items()}, path / "model.safetensors"
    stored = set(header(weights)[0])
    if stored != set(names) or not set(ours) <= set(files):
        raise ValueError(f"{path} has other tensors than {template}: --like must name its origin")
    shards: dict[str, list[str]] = defaultdict(list)
    for key, shard in sorted(files.items()):
        shards[shard].append(key)
    total = 0
    with whole_folder(out_dir, "") as scratch:
        for shard, keys in shards.items():
            mine = ((ours[k], read_tensor(weights, ours[k])) for k in keys if k in ours)
            tensors: dict[str, Tensor] = dict(published_tensors(mine, facts["norm_rows"], facts["dtypes"]))
            tensors |= {k: read_tensor(template / ASIDE, k) for k in keys if k not in ours}
            total += sum(t.nbytes for t in tensors.values())
            save_tensors(scratch / shard, tensors)
        write_json(scratch / "config.json", facts["config"])
        if len(shards) > 1:
            write_json(scratch / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _check_folder(folder: Path) -> list[str]:
    """Check a release's own checksums; return a line for each file that is not as published."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected a released checkpoint or its tokenizer")
    verify_checksums(folder)
    return unlike_published(folder)


def _layout(facts: Release, release: str, suite: str) -> LayoutConfig:
    if not facts.chunks:
        return facts.layout
    if suite not in facts.chunks:
        raise ValueError(
            f"release {release} has one checkpoint a suite, with chunks of its own, got --suite {suite!r}: "
            f"choose one of {', '.join(facts.chunks)}"
        )
    return replace(facts.layout, chunk=facts.chunks[suite])


def _image(released: ReleasedFiles, pieces: Path, vocab: Vocab) -> ImageTokenizer:
    """Return the image tokenizer of a file beside the text, else of the `model.vqmodel.*` keys."""
    keys = [key for key in released.aside if key.startswith(VQ_PREFIX)]
    is_apart = pieces != released.directory
    path = find(pieces, IMAGE_FILES if is_apart else IMAGE_FILES[:2])
    if path is None and not keys:
        raise FileNotFoundError(
            f"{pieces} has no {IMAGE_FILES[0]} and the checkpoint no {VQ_PREFIX}* keys: pass --tokenizer "
            "FOLDER with vqgan.ckpt and text_tokenizer.json"
        )
    own = image_tokenizer({k: released.read(k) for k in keys}, str(released.directory)) if keys else None
    tokenizer = load_image_tokenizer(path) if path is not None else own
    assert tokenizer is not None
    if own is not None and path is not None:
        theirs, dtype = tokenizer.state_dict(), released.read(keys[0]).dtype
        if wrong := [
            k for k, v in own.state_dict().items() if not torch.equal(theirs[k].to(dtype).float(), v)
        ]:
            raise ValueError(
                f"{path} is not the image tokenizer of the checkpoint ({wrong[0]} differs): use its own"
            )
    if tokenizer.num_codes != vocab.num_image_codes:
        raise ValueError(
            f"the image tokenizer has {tokenizer.num_codes} codes, vocabulary {vocab.name} "
            f"{vocab.num_image_codes}: take the one that the checkpoint was trained with"
        )
    return tokenizer


def _text(pieces: Path, vocab: Vocab) -> TextTokenizer:
    path = find(pieces, TEXT_FILES)
    if path is None:
        raise FileNotFoundError(f"{pieces} has no {' or '.join(TEXT_FILES)}: pass --tokenizer FOLDER with it")
    text = TextTokenizer.load(path)
    check_text(text, vocab, str(path))
    return text


def _remarks(released: ReleasedFiles, image: ImageTokenizer, facts: Release) -> list[str]:
    lines = []
    if image.decoder is None:
        lines.append("the image tokenizer has no decoder: the policy acts, imagined frames cannot be shown")
    if head := [key for key in released.aside if key.startswith(HEAD_PREFIX)]:
        lines.append(f"the continuous action head ({len(head)} tensors) is kept in {ASIDE}, not used")
    if released.config.head.num_layers:
        lines.append("with a continuous action head: --head continuous acts by it, discrete by the bins")
    elif facts.may_have_head and not head:
        lines.append(f"no {HEAD_PREFIX}* keys, which RynnVLA-002's training adds: the bins alone act")
    if not facts.chunks:
        lines.append("no policy: a world model, or weights to start training from")
    return lines
