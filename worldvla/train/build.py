"""Config -> what a run is made of: text tokenizer, statistics, vocabulary, sample builder, loader, model."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldvla.config import Config
from worldvla.data.loader import Loader, dataset_statistics, prompted
from worldvla.data.sample import SampleBuilder, prompt_texts
from worldvla.data.store import TokenStore
from worldvla.files import MANIFEST, check_digests, read_json
from worldvla.machine import available_memory, num_processes
from worldvla.model.action_head import ActionHead
from worldvla.model.lora import add_updates, refuse_updates
from worldvla.model.transformer import Transformer
from worldvla.model.weights import (
    assign,
    check_fit,
    empty_model,
    header,
    origins,
    read_tensor,
    weights_digest,
)
from worldvla.tokenizers.action import DatasetStatistics, Statistics, dequantize, load_statistics, normalize
from worldvla.tokenizers.image import ImageTokenizer, folder_of
from worldvla.tokenizers.text import TextTokenizer
from worldvla.train.metrics import ActionScale
from worldvla.vocab import NUM_BIN_CODES, Vocab, chameleon, compact

MAX_TABLE = 2**20
"""Image codes that a model without code_levels may have: each is a row of its embedding and of its head."""


@dataclass(frozen=True)
class Pieces:
    config: Config
    image: ImageTokenizer
    text: TextTokenizer
    statistics: Statistics | DatasetStatistics
    vocab: Vocab
    builder: SampleBuilder
    loader: Loader
    base: str = ""
    """Of low-rank updates: digest of the weights that they belong to."""

    def features(self) -> dict[str, Any]:
        """Return what the numbers and pictures of a checkpoint are on the robot, as its first store tells; of
        a mixture {"datasets": {name: as the first store of that name tells}}."""
        told = [_features(store) for store in self.loader.stores]
        if not (names := self.config.data.datasets):
            return told[0]
        return {"datasets": {name: told[names.index(name)] for name in dict.fromkeys(names)}}

    def digests(self) -> dict[str, str]:
        """Return what a checkpoint's ids and numbers mean, as short hashes; equal digests, equal meaning."""
        base = {"base": self.base} if self.base else {}
        return base | {
            "image_tokenizer": self.image.digest(),
            "text": self.text.digest(),
            "statistics": self.statistics.digest(),
            "vocab": self.vocab.digest(),
        }

    def stores(self) -> list[str]:
        """Return a short hash of what each store holds, wherever it stands and whoever wrote it."""
        files = ({k: v for k, v in s.manifest["sha256"].items() if k != MANIFEST} for s in self.loader.stores)
        return [hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16] for of in files]


def fit(config: Config) -> Config:
    """Return the config with what a layout without views leaves open as its stores have it: cameras, grids,
    numbers of action and state dims, and a sequence length that every sample fits in."""
    if not config.data.stores:
        raise ValueError("data.stores is empty: name the token stores that `worldvla tokenize` wrote")
    if config.layout.views:
        return config
    found = {}
    for path in config.data.stores:
        manifest = TokenStore.open(Path(path)).manifest
        found[path] = (
            manifest["action_dims"],
            manifest["state_dims"],
            tuple((view, tuple(grid)) for view, grid in manifest["grids"].items()),
        )
    if len(set(found.values())) > 1:
        raise ValueError(
            f"data.stores differ in action dims, state dims or grids: {found}; train on one kind"
        )
    action_dims, state_dims, grids = next(iter(found.values()))
    layout = replace(
        config.layout,
        views=tuple(view for view, _ in grids),
        grids=tuple(grid for _, grid in grids),
        num_action_dims=action_dims,
        num_state_dims=state_dims,
    )
    length = max(config.data.sequence_length, layout.longest)
    return replace(config, layout=layout, data=replace(config.data, sequence_length=length))


def build(config: Config) -> Pieces:
    """Open the stores and make the rest from them; the same config and stores give the same pieces.

    With train.init_from, text tokenizer and statistics are those of that checkpoint: the ids whose embeddings
    it brings keep their meaning (published code let two normalisations share the same action ids). Only a
    dataset whose name it does not know has statistics of its own.
    """
    config = fit(config)
    lora, source = config.lora, Path(config.train.init_from)
    if lora.rank and not config.train.init_from:
        raise ValueError("lora.rank updates a checkpoint that is there: name it by train.init_from")
    if lora.rank and lora.base == "bfloat16" != config.train.dtype:
        raise ValueError(f"lora.base bfloat16 needs train.dtype bfloat16, got {config.train.dtype}")
    if config.train.init_from:
        if not (source / "manifest.json").is_file():
            raise FileNotFoundError(
                f"train.init_from: {source} is no checkpoint (no manifest.json): name one that `worldvla "
                "train` wrote (DIR/ckpt/step_N), or `export`, or, of a released folder or hub id, `convert`"
            )
        refuse_updates(source)
        check_digests(source, ("model.safetensors", "text.json", "statistics.json", "vocab.json"))
    image = ImageTokenizer.load(config.tokenizer)
    if config.train.init_from:
        _check_codes(image, config.tokenizer, source)
    stores = [TokenStore.open(Path(path), image.digest()) for path in config.data.stores]
    if config.train.init_from:
        text = TextTokenizer.load(source / "text.json")
        statistics = _init_statistics(source, stores, config)
    else:
        text = _text(config, stores)
        statistics = dataset_statistics(stores, config.data, {})
    levels = config.model.code_levels
    if levels and levels != image.config.fsq_levels:
        raise ValueError(
            f"model.code_levels {levels} are not the fsq_levels {image.config.fsq_levels} of "
            f"{config.tokenizer}"
        )
    if not levels and image.num_codes > MAX_TABLE:
        raise ValueError(
            f"{config.tokenizer} has {image.num_codes:,} codes, too many for a table of them: predict them "
            f"level by level (the recipe finetune_world, or model.code_levels {image.config.fsq_levels})"
        )
    compact_vocab = partial(compact, image.num_codes, text.size, image_last=bool(levels))
    vocab = chameleon() if config.vocab == "chameleon" else compact_vocab()
    builder = SampleBuilder(config.layout, vocab, text, statistics)
    _check_features(stores, config.data.datasets)
    loader = Loader(stores, builder, config.data, config.train.batch_size, config.train.seed)
    base = weights_digest(source) if lora.rank else ""
    return Pieces(config, image, text, statistics, vocab, builder, loader, base)


def build_model(pieces: Pieces) -> Transformer:
    """Return the model with its initial weights: drawn, on the CPU, or read, on train.device.

    One that ranks will share is on the CPU; where its weights are those of a plain checkpoint, on the meta
    device: each rank reads its own rows.
    """
    config, vocab = pieces.config, pieces.vocab
    sizes = vocab.size, *config.layout.sizes
    _check_memory(trainable(empty_model(config.model, *sizes), config, None), config)
    if config.train.init_from:
        path, empty = Path(config.train.init_from) / "model.safetensors", empty_model(config.model, *sizes)
        sources = origins(path, empty.state_dict(), config.model.num_layers)
        is_deeper = any(source != name for name, (source, _) in sources.items())
        if is_deeper and config.lora.rank:
            raise ValueError(
                f"low-rank updates belong to the layers of {path.parent}, which has fewer than "
                f"model.num_layers {config.model.num_layers}: use its number, or lora.rank 0"
            )
        if config.train.shard == 1:
            return trainable(empty, config, path)
        if is_deeper or config.lora.rank or config.model.head.num_layers:
            return trainable(empty, replace(config, train=replace(config.train, device="cpu")), path)
        check_fit(path, empty.state_dict())
        return trainable(empty, config, None)
    model = Transformer(config.model, *sizes)
    model.init_weights(config.train.seed)
    if config.model.codebook_init:
        codebook = None if config.model.code_levels else pieces.image.codebook()
        model.init_codebook(codebook, vocab.image, [vocab.action, vocab.state], config.train.seed)
    model.checkpoint_layers = config.train.checkpoint_layers
    return model


def trainable(model: Transformer, config: Config, weights: Path | None) -> Transformer:
    """Give `model`, on the meta device, the tensors of `weights`, as config.lora says (None: it stays there).

    What is not a frozen matrix of a block is float32, as the residual stream that it makes. An action head
    that the file has nothing of is drawn: a trained model can be given one.
    """
    own, new = model.state_dict(), {}
    if weights is not None:
        if config.model.head.num_layers and not any(n.startswith("action_head.") for n in header(weights)[0]):
            head = ActionHead(config.model.head, config.model.width, *config.layout.action_shape)
            head.init_weights(config.train.seed)
            new = {f"action_head.{name}": tensor for name, tensor in head.state_dict().items()}
        source = origins(weights, own, config.model.num_layers)
        check_fit(weights, {source[name][0]: tensor for name, tensor in own.items() if name not in new})
        tensors = ((n, new[n] if n in new else _read(weights, *source[n])) for n in own)
    else:
        tensors = own.items()
    form = config.lora.base if config.lora.rank else None
    model = assign(model, tensors, config.train.device if weights else "meta", torch.float32, form)
    model.checkpoint_layers = config.train.checkpoint_layers
    if config.lora.rank:
        return add_updates(model, config.lora, config.train.seed).train()
    if model.action_head is not None and config.train.only_head:
        model.requires_grad_(False)
        model.action_head.requires_grad_(True)
        return model
    return model.requires_grad_(True).train()


def _read(path: Path, name: str, is_zero: bool) -> Tensor:
    tensor = read_tensor(path, name)
    return torch.zeros_like(tensor) if is_zero else tensor


def held(model: nn.Module, ema: float = 0.0) -> dict[str, int]:
    """Return the bytes of weights and their average, gradients and AdamW's moments of a model, on the meta
    device too."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + (trained if ema else 0)
    return {"weights": weights, "gradients": trained, "moments": 2 * trained}


def _check_memory(model: Transformer, config: Config) -> None:
    """Raise ValueError with the sum if training `model`, on the meta device, does not fit this process."""
    parts, device = held(model, config.optim.ema), config.train.device
    if config.train.shard != 1:
        shard = config.train.shard or num_processes() // max(1, config.train.replicate)
        parts = {name: size // max(1, shard) for name, size in parts.items()}
    if config.optim.method == "muon":  # one moment of most matrices; of them all, to be on the safe side
        parts["moments"] //= 2
    needed, free = sum(parts.values()), available_memory(device)
    if free is not None and needed > free:
        terms = " + ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
        raise ValueError(
            f"training {config.name} needs {needed / 1e9:.3g} GB on {device} ({terms}; activations on top), "
            f"{free / 1e9:.3g} GB are free: use a device with more, updates of low rank (lora.rank), or more "
            f"devices (train.shard); `worldvla plan {config.name} --gpus {num_processes()} --memory "
            f"{free / 1e6:.0f}MB` says what fits"
        )


def action_scale(pieces: Pieces) -> ActionScale:
    """Return how the action codes of this run read in normalised units."""
    centres_C = torch.from_numpy(dequantize(np.arange(NUM_BIN_CODES))).float()
    if isinstance(pieces.statistics, Statistics):
        low, high = pieces.statistics.action_low, pieces.statistics.action_high
        no_motion_A = torch.from_numpy(normalize(np.zeros(len(low)), low, high)).float()
    else:
        no_motion_A = torch.full((pieces.config.layout.num_action_dims,), torch.nan)
    return ActionScale(centres_C, no_motion_A, pieces.config.layout.chunk)


def _features(store: TokenStore) -> dict[str, Any]:
    names = ("fps", "action", "action_names", "state", "state_names", "delta", "cameras", "repo", "revision")
    return {name: store.manifest["source"][name] for name in names if name in store.manifest["source"]}


def _check_features(stores: Sequence[TokenStore], datasets: Sequence[str]) -> None:
    """Raise ValueError where the numbers of two stores of one dataset mean different things."""
    first: dict[str, TokenStore] = {}
    for store, dataset in zip(stores, datasets or [""] * len(stores), strict=True):
        other, told = first.setdefault(dataset, store), _features(store)
        rates = ("fps",) if told.get("fps") and _features(other).get("fps") else ()  # not known of all
        for name in ("action_names", "state_names", "delta", *rates):
            if (here := told.get(name)) != (there := _features(other).get(name)):
                raise ValueError(
                    f"{store.path} has {name} {here}, {other.path} {there}: tokenize them alike, or give "
                    "each a name of its own in data.datasets"
                )


def _init_statistics(
    source: Path, stores: list[TokenStore], config: Config
) -> Statistics | DatasetStatistics:
    """Return the statistics of a run that goes on from the checkpoint `source`."""
    known = load_statistics(source / "statistics.json")
    sets = known.sets if isinstance(known, DatasetStatistics) else {}
    if config.data.datasets:
        return dataset_statistics(stores, config.data, sets)
    if sets:
        raise ValueError(
            f"train.init_from: {source} was trained on the datasets {', '.join(map(repr, sets))}: give each "
            "store one of these names, or a new one, in data.datasets"
        )
    return known


def _check_codes(image: ImageTokenizer, tokenizer: str, source: Path) -> None:
    """Raise ValueError unless the codes mean, at least about, what they meant to the checkpoint `source`."""
    known, own = read_json(source / "manifest.json").get("image_tokenizer"), image.digest()
    if known != own and known not in image.ancestors:
        raise ValueError(
            f"train.init_from: {source} was trained on the codes of image tokenizer {known}, {tokenizer} is "
            f"{own}: use that one, or one trained on from it (worldvla train-tokenizer --init-from)"
        )


def _text(config: Config, stores: list[TokenStore]) -> TextTokenizer:
    if config.vocab == "chameleon":
        return TextTokenizer.load(folder_of(config.tokenizer) / "text_tokenizer.json")
    instructions = {prompted(e, config.data.scene_prefix) for store in stores for e in store.episodes}
    return TextTokenizer.train(prompt_texts(config.layout, instructions), config.num_text)
