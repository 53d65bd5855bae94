"""Checkpoint directory <-> Model: everything that acting and imagining need, its digests checked.

A model turns frames into codes and back; `Policy` acts with it and `World` imagines with it.
Dims: B batch, N codes of a frame over all views, Y and X pixels.
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import torch
from torch import Tensor

from worldvla.config import Config, from_json, to_json
from worldvla.data.sample import SampleBuilder
from worldvla.files import (
    check_digests,
    check_shapes,
    read_json,
    save_tensors,
    whole_folder,
    write_digests,
    write_json,
    write_text,
)
from worldvla.infer.graphs import Runner
from worldvla.machine import available_memory
from worldvla.model.lora import merged
from worldvla.model.quantize import Form, num_bytes
from worldvla.model.transformer import Transformer
from worldvla.model.weights import (
    assign,
    empty_model,
    find_checkpoint,
    is_block_matrix,
    read_tensors,
    weights_digest,
)
from worldvla.published.hub import locate
from worldvla.tokenizers.action import DatasetStatistics, load_statistics
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import Vocab

Quantize = Literal["", "int8", "int4"]
WEIGHTS = "model.safetensors"
CARD = Path(__file__).parents[1] / "assets/report/card.md"
FILES = ("config.json", WEIGHTS, "vocab.json", "statistics.json", "text.json", "manifest.json")
IMAGE_FILES = ("image_tokenizer/config.json", "image_tokenizer/model.safetensors")
READER_FILES = ("reader.json", "reader.safetensors")
"""What reads the hand off its frames, if it has that (eval/reader.py)."""


@dataclass(frozen=True)
class Model:
    path: Path
    config: Config
    vocab: Vocab
    builder: SampleBuilder
    image: ImageTokenizer
    transformer: Transformer
    manifest: dict[str, Any]
    quantize: Quantize = ""
    unnorm_key: str = ""
    """The dataset whose statistics it was loaded with; empty: those of all its datasets."""

    def __repr__(self) -> str:
        return f"Model({self.config.name!r}, {self.transformer.num_parameters():,} parameters, {self.path})"

    @property
    def unnorm_keys(self) -> list[str]:
        """Return the names of the datasets whose statistics it has, if they have names."""
        statistics = self.builder.all_statistics
        return list(statistics.sets) if isinstance(statistics, DatasetStatistics) else []

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """View -> (rows, columns) in pixels of the images that the model reads."""
        factor, layout = self.image.config.factor, self.config.layout
        return {v: (r * factor, c * factor) for v, (r, c) in zip(layout.views, layout.grids, strict=True)}

    @cached_property
    def runner(self) -> Runner:
        """What decodes with the transformer, and keeps its caches and recordings."""
        return Runner(self.transformer)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    def check_world(self) -> None:
        """Raise ValueError unless the model was trained on world samples."""
        if not self.config.data.world_fraction:
            raise ValueError(
                f"{self.path} has no world model (data.world_fraction 0): train one on world samples too"
            )

    def check_views(self, sizes: Mapping[str, Sequence[int]], where: object) -> None:
        """Raise ValueError unless `sizes`, rows and columns of the pictures in `where`, are those it sees."""
        for view, size in self.view_sizes.items():
            if (given := tuple(sizes.get(view, ()))) != size:
                raise ValueError(
                    f"{where}: view {view} is {given or 'missing'}, the model sees {size}: collect it so"
                )

    def identity(self) -> dict[str, Any]:
        """Return what a record names as its model."""
        return {
            "name": self.config.name,
            "path": str(self.path),
            "step": self.manifest.get("step"),
            "digest": weights_digest(self.path),
            "parameters": self.transformer.num_parameters(),
            **({"quantize": self.quantize} if self.quantize else {}),
            **({"unnorm_key": self.unnorm_key} if self.unnorm_key else {}),
        }

    def encode_frames(self, frames: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return codes of all views in a row, int64 (B, N).

        A frame is a dict of views, uint8 (Y, X, 3); another size or type raises ValueError.
        """
        columns = []
        for view, size in self.view_sizes.items():
            images = np.stack([_image(frame, view, size) for frame in frames])
            codes = self.image.encode(torch.from_numpy(images).to(self.device))
            columns.append(codes.flatten(1).cpu().numpy())
        return np.concatenate(columns, 1)

    def decode_frames(
        self, codes_BN: np.ndarray, context: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Return view -> images uint8 (B, Y, X, 3) of codes of all views in a row.

        `context`: view -> real frames (B, Y, X, 3) of the same clips, which a decoder may copy from.
        """
        frames = {}
        for view, codes in self.grids(codes_BN).items():
            seen = None if context is None else torch.from_numpy(context[view]).to(self.device)
            images = self.image.decode(torch.from_numpy(codes).to(self.device), seen)
            frames[view] = images.cpu().numpy()
        return frames

    def grids(self, codes_BN: np.ndarray) -> dict[str, np.ndarray]:
        """Return view -> codes (B, R, Q), rows and columns."""
        layout = self.config.layout
        parts = np.split(codes_BN, np.cumsum(layout.codes_per_view)[:-1], axis=1)
        grids = zip(layout.views, layout.grids, parts, strict=True)
        return {view: part.reshape(-1, *grid) for view, grid, part in grids}


def load(
    path: Path | str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantize = "",
    unnorm_key: str = "",
) -> Model:
    """Read a checkpoint, the newest one of a run directory, or one on the hub (published/hub.py).

    What does not belong together raises ValueError. `dtype` of the transformer: by default float32, and of a
    converted release the type that it is stored in (bfloat16), as published code evaluates it. `quantize`:
    hold the linear layers of the blocks in 8 or 4 bits (model/quantize.py). Low-rank updates are merged into
    their base, which their manifest names. `unnorm_key`: use the model for this dataset of a mixture; without
    it a policy wants one in each observation.
    """
    path = find_checkpoint(locate(path))
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise ValueError(f"{path} is no complete checkpoint: {', '.join(missing)} missing; copy it again")
    check_digests(path, {*FILES, *IMAGE_FILES})
    config = from_json(Config, read_json(path / "config.json"), str(path / "config.json"))
    vocab = from_json(Vocab, read_json(path / "vocab.json"), f"{path}/vocab.json")
    statistics = load_statistics(path / "statistics.json")
    text = TextTokenizer.load(path / "text.json")
    image = ImageTokenizer.load(path / "image_tokenizer")
    manifest = read_json(path / "manifest.json")
    pieces = {"image_tokenizer": image, "text": text, "statistics": statistics, "vocab": vocab}
    for name, piece in pieces.items():
        if manifest.get(name) != piece.digest():
            raise ValueError(
                f"{path}: {name} has digest {piece.digest()}, the model was trained with "
                f"{manifest.get(name)}: restore the file that was saved with it"
            )
    if image.num_codes != vocab.num_image_codes:
        raise ValueError(
            f"{path}: the image tokenizer has {image.num_codes} codes, the vocabulary "
            f"{vocab.num_image_codes}: use those of one run"
        )
    builder = SampleBuilder(config.layout, vocab, text, statistics)
    if unnorm_key:
        builder, manifest = builder.only(unnorm_key), _of_dataset(manifest, unnorm_key)
    transformer = empty_model(config.model, vocab.size, *config.layout.sizes)
    base, weights = _base(path, config, manifest), path / WEIGHTS
    stored: torch.dtype = getattr(torch, read_json((base or path) / "manifest.json").get("dtype", "float32"))
    shapes, tensors = merged(weights, base / WEIGHTS, config.lora) if base else read_tensors(weights)
    _load_weights(base or path, shapes, tensors, transformer, device, dtype or stored, quantize or None)
    return Model(path, config, vocab, builder, image.to(device), transformer, manifest, quantize, unnorm_key)


def _of_dataset(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the manifest with the features of one dataset in place of those of all."""
    features = manifest.get("features", {}).get("datasets", {}).get(key)
    rest = {name: value for name, value in manifest.items() if name != "features"}
    return rest | {"features": features} if features else rest


def _base(path: Path, config: Config, manifest: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that the low-rank updates in `path` belong to, None of a plain checkpoint.

    It is where the manifest says, seen from `path`; where it does not say, `train.init_from` is looked up in
    every folder above. Other weights raise ValueError.
    """
    if "base" not in manifest:
        return None
    places = [path / manifest["base_path"]] if "base_path" in manifest else []
    places += [folder / config.train.init_from for folder in path.absolute().parents]
    bases = [p.resolve() for p in places if (p / "manifest.json").is_file()]
    if not bases:
        raise FileNotFoundError(
            f"{path} holds low-rank updates of {config.train.init_from}, which is not there: restore it, or "
            "export where it is"
        )
    for base in bases:
        if weights_digest(base) == manifest["base"]:
            return base
    raise ValueError(
        f"{path} holds low-rank updates of weights {manifest['base']}, {bases[0]} has "
        f"{weights_digest(bases[0])}: restore that checkpoint"
    )


def export(
    source: Path | str,
    out_dir: Path,
    repo: str = "",
    results: Sequence[Mapping[str, Any]] = (),
    unnorm_key: str = "",
    license: str = "",
) -> Path:
    """Copy what acting and imagining need, the transformer's weights in bfloat16, and write a model card for
    the hub; atomic. About a sixth of a checkpoint's size. Low-rank updates are merged: it is a plain one.

    The config names stores and files alone, not where they are on this machine. `repo`: its name on the hub,
    for the card. `results`: records of evaluations, for the card; those of another model raise ValueError.
    `unnorm_key`: keep the statistics of this dataset of a mixture alone, so that nobody need choose.
    `license`: the card's; empty: apache-2.0, of weights that go back to a release "other".
    """
    if license and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"--license {license!r}: expected a name of the hub's: apache-2.0, mit, cc-by-nc-4.0, other"
        )
    model = load(source, dtype=torch.bfloat16, unnorm_key=unnorm_key)  # whole and consistent, or an error
    source = model.path
    with whole_folder(out_dir, WEIGHTS) as scratch:
        (scratch / "image_tokenizer").mkdir()
        has_reader = all((source / name).is_file() for name in READER_FILES)
        for name in (*FILES, *IMAGE_FILES, *(READER_FILES if has_reader else ())):
            shutil.copyfile(source / name, scratch / name)
        save_tensors(scratch / WEIGHTS, model.transformer.state_dict())
        manifest = dict(model.manifest)
        if unnorm_key:
            write_json(scratch / "statistics.json", model.builder.all_statistics.to_json())
            manifest["statistics"] = model.builder.all_statistics.digest()
        if base := _base(source, model.config, model.manifest):
            manifest = {k: v for k, v in manifest.items() if not k.startswith("base")}
            dtype = read_json(base / "manifest.json").get("dtype", "float32")
            manifest |= {"dtype": dtype, "merged_base": model.manifest["base"]}
        write_json(scratch / "config.json", to_json(_portable(model.config)))
        if not manifest.get("source", "hf:").startswith("hf:"):  # of a converted release: a folder here
            manifest["source"] = Path(manifest["source"]).name
        write_json(scratch / "manifest.json", manifest)
        write_digests(scratch)
        weights, own = weights_digest(scratch), weights_digest(source)
        for record in results:
            if (digest := record["checkpoint"].get("digest")) not in (weights, own):
                raise ValueError(
                    f"the record of {record['suite']} is of weights {digest}, these are {own}, exported "
                    f"{weights}: evaluate this checkpoint"
                )
        card = _card(replace(model, manifest=manifest), weights, repo or "DIR", results, license)
        write_text(scratch / "README.md", card)
    return out_dir


def _portable(config: Config) -> Config:
    """Return the config with names in place of paths."""
    data = replace(config.data, stores=tuple(Path(store).name for store in config.data.stores))
    train = replace(config.train, init_from=Path(config.train.init_from).name)
    return replace(config, tokenizer=Path(config.tokenizer).name, data=data, train=train)


def _image(frame: Mapping[str, Any], view: str, size: tuple[int, int]) -> np.ndarray:
    if view not in frame:
        raise ValueError(f"a frame needs the view {view!r}, got the keys {sorted(frame)}: render that camera")
    image = frame[view]
    expected = (*size, 3)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(
            f"view {view} must be a uint8 array of shape {expected}, got {got}: render it at that size"
        )
    return image


def _card(model: Model, weights: str, name: str, results: Sequence[Mapping[str, Any]], license: str) -> str:
    """Return a model card in the hub's form, of what the checkpoint itself knows and records of evaluations;
    `weights`: their digest."""
    config, statistics, ranges = model.config, model.builder.all_statistics, []
    sets = statistics.sets if isinstance(statistics, DatasetStatistics) else {"": statistics}
    for dataset, own in sets.items():
        where = f"{own.kind}, {dataset}" if dataset else own.kind
        ranges.append((f"action ({where})", own.action_low, own.action_high))
        if config.layout.state:
            ranges.append((f"state ({where})", own.state_low, own.state_high))
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    facts = {"layout": config.layout, "manifest": model.manifest, "share": config.data.world_fraction}
    facts["stores"] = list(dict.fromkeys(Path(store).name for store in config.data.stores))
    facts["origin"] = Path(config.train.init_from).name
    return template.render(
        model=model,
        config=config,
        ranges=ranges,
        weights=weights,
        name=name,
        results=results,
        license=license,
        **facts,
    )


def _load_weights(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
    model: Transformer,
    device: str,
    dtype: torch.dtype,
    form: Form | None,
) -> None:
    """Put `tensors` in place of `model`'s meta tensors, one at a time.

    Other names or `shapes` than the model's, and too little memory, raise ValueError before anything is read.
    """
    fix = "take config.json, vocab.json and weights of one checkpoint"
    check_shapes(path / WEIGHTS, shapes, model.state_dict(), fix)
    plain: Form = "float32" if dtype == torch.float32 else "bfloat16"
    sizes = [
        num_bytes(tuple(s), form if form and is_block_matrix(n, s) else plain) for n, s in shapes.items()
    ]
    needed, free = sum(sizes) + (max(sizes) if device == "cpu" else 0), available_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e9:.2f} GB on {device} ({model.num_parameters():,} parameters in "
            f"{form or plain} and one tensor), {free / 1e9:.2f} GB are free: use a device with more"
            + ("" if form == "int4" else ", or fewer bits (dtype, quantize)")
        )
    assign(model, tensors, device, dtype, form)
