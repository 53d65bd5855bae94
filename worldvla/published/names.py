"""Released checkpoints <-> our names: which there are, their keys and shapes, read one tensor at a time.

Chameleon's layout in Hugging Face's words (WorldVLA model/chameleon/modeling_chameleon.py) is what WorldVLA
and RynnVLA-002 release: safetensors shards of bfloat16 with an index, and a config.json. Every key of the
folder is placed, set aside (`vqmodel`, a head on request) or named in an error, before a weight is read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from worldvla.config import HeadConfig, LayoutConfig, ModelConfig
from worldvla.files import read_json
from worldvla.model.action_head import ActionHead
from worldvla.model.weights import DTYPES, INDEX, SINGLE, empty_model, header, read_tensor
from worldvla.vocab import Vocab

VQ_PREFIX, HEAD_PREFIX = "model.vqmodel.", "action_head."
NUM_HEAD_HEADS = 4
"""Of RynnVLA-002's continuous head (model/modeling_xllmx_chameleon_ck_action_head.py:19-295), whose other
sizes its tensors have."""


@dataclass(frozen=True)
class Release:
    """A family of published checkpoints: what its sequences hold. `chunks`: suite -> U; empty: no policy."""

    layout: LayoutConfig
    actions: Literal["worldvla", "rynnvla"]
    """Whose range of actions its bins mean (tokenizers/action.py)."""
    chunks: Mapping[str, int]
    may_have_head: bool = False
    """RynnVLA-002's continuous action head beside the transformer."""


def _two_views(side: int, state: bool) -> LayoutConfig:
    return LayoutConfig(views=("agentview", "wrist"), grids=((side, side),) * 2, state=state)


_WORLDVLA_K = {"libero_spatial": 5, "libero_object": 5, "libero_goal": 5, "libero_10": 10}
_RYNNVLA_K = {"libero_spatial": 10, "libero_object": 5, "libero_goal": 5, "libero_10": 10}
RELEASES: dict[str, Release] = {
    "chameleon": Release(LayoutConfig(), "worldvla", {}),  # weights to start from
    "worldvla_256": Release(LayoutConfig(), "worldvla", _WORLDVLA_K),
    "worldvla_512": Release(LayoutConfig(grids=((32, 32),)), "worldvla", _WORLDVLA_K),
    "rynnvla_256": Release(_two_views(16, True), "rynnvla", _RYNNVLA_K, may_have_head=True),
    "rynnvla_world_512": Release(_two_views(32, False), "worldvla", {}),
    "rynnvla_action_world_512": Release(_two_views(32, True), "rynnvla", _RYNNVLA_K, may_have_head=True),
}
"""WorldVLA model_256, model_512; RynnVLA-002 VLA_model_256, World_model_512, Action_World_model_512 (both
README.md); U by suite: WorldVLA exps_256_all/*.sh, RynnVLA-002's training scripts."""

_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {f"attention.{n}.weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}
_LAYER |= {
    f"attention.{n}.{p}": f"self_attn.{n}.{p}" for n in ("q_norm", "k_norm") for p in ("weight", "bias")
}
_LAYER |= {f"mlp.{n}.weight": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
_LAYER |= {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}


def published_names(config: ModelConfig) -> dict[str, str]:
    """Return our parameter name -> the published key, of all a Transformer has (7B: 419; a head: 45)."""
    names = _TOP | _layer_names(range(config.num_layers))
    if config.head.num_layers:
        with torch.device("meta"):
            head = ActionHead(config.head, width=1, num_actions=1, num_dims=1)
        names |= {name: name for name in (HEAD_PREFIX + inner for inner in head.state_dict())}
    return names


def _layer_names(layers: range) -> dict[str, str]:
    return {
        f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for i in layers for ours, theirs in _LAYER.items()
    }


def model_config(data: Mapping[str, Any], where: str, vocab: Vocab) -> ModelConfig:
    """Return the shape that a published config.json names; another architecture or vocabulary raises."""
    if (size := data.get("vocab_size")) != vocab.size:
        raise ValueError(
            f"{where}: vocab_size is {size}, vocabulary {vocab.name} has {vocab.size}: another vocabulary; "
            "take a checkpoint of Chameleon's"
        )
    plain: dict[str, Any] = dict.fromkeys(("swin_norm", "attention_bias", "mlp_bias"), False)
    plain |= {"tie_word_embeddings": False, "hidden_act": "silu"}
    if strange := {k: data[k] for k, v in plain.items() if k in data and data[k] != v}:
        raise ValueError(f"{where}: {strange}, expected {plain}: another architecture (the 34B?)")
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    if missing := [key for key in keys if not isinstance(data.get(key), int)]:
        raise ValueError(f"{where}: {missing} missing: expected the config.json of a Chameleon checkpoint")
    layers, width, heads, hidden = (data[key] for key in keys)
    rope = data.get("rope_parameters") or {}
    if scaling := data.get("rope_scaling") or (
        rope if rope.get("rope_type", "default") != "default" else None
    ):
        raise ValueError(f"{where}: rope_scaling is {scaling}, expected none: this model has plain positions")
    return ModelConfig(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        hidden=hidden,
        rope_theta=float(data.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        norm_eps=float(data.get("rms_norm_eps", 1e-5)),
        dropout=0.05,
    )


@dataclass(frozen=True)
class ReleasedFiles:
    """A released folder whose every key has been accounted for; no weight has been read."""

    directory: Path
    hub_config: dict[str, Any]
    config: ModelConfig
    files: dict[str, str]
    """Their key -> shard."""
    aside: tuple[str, ...]
    """Keys beside the transformer's: `model.vqmodel.*`, and `action_head.*` if it is not wanted."""
    norm_rows: dict[str, int]
    """Rows of a QK-norm's tensor as stored, by our parameter's name: 1, or one a head."""
    dtypes: dict[str, str]
    """Of every tensor as stored, by our parameter's name: bfloat16, as published."""

    def read(self, key: str) -> Tensor:
        return read_tensor(self.directory / self.files[key], key)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield our name and the tensor, shard after shard, one at a time, in its stored type."""
        names = published_names(self.config)
        for name, key in sorted(names.items(), key=lambda pair: self.files[pair[1]]):
            yield name, _one_row(self.read(key), key) if _is_qk_norm(name) else self.read(key)


def open_release(
    directory: Path, vocab: Vocab, action_shape: tuple[int, int] = (0, 0), without_head: bool = False
) -> ReleasedFiles:
    """Check a released folder by its headers; whatever is missing, too much or misshapen raises ValueError.

    `action_shape`: (U, A) of a release that may have a continuous action head, which is read, or its keys set
    aside (`without_head`); of others, (0, 0), such keys are unknown ones.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: expected a released folder, config.json beside the shards")
    hub_config = read_json(path)
    config = model_config(hub_config, str(path), vocab)
    files, shapes, dtypes = _headers(directory)
    head = sorted(k for k in shapes if k.startswith(HEAD_PREFIX)) if any(action_shape) else []
    if head and not without_head:
        config = replace(config, head=_head_config(shapes))
    else:
        action_shape = (0, 0)
    names, empty = published_names(config), empty_model(config, vocab.size, action_shape=action_shape)
    own = {names[n]: tuple(t.shape) for n, t in empty.state_dict().items()}
    heads = {"q_norm": config.num_heads, "k_norm": config.num_kv_heads}
    image = sorted(k for k in shapes if k.startswith(VQ_PREFIX))
    aside = (*image, *head) if without_head else tuple(image)
    unknown, other = sorted(set(shapes) - set(own) - set(aside)), "choose another --release"
    other += ", or --without-action-head" if config.head.num_layers else ""
    _named(directory, "lacks", sorted(set(own) - set(shapes)), f"download it again, or {other}")
    _named(directory, "has unknown", unknown, other)
    strange = sorted(key for key in own if dtypes[key] not in DTYPES.values())
    _named(directory, f"has other types than {', '.join(DTYPES.values())}:", strange, "dequantise it")
    wrong, rows = [], {}
    for name, key in names.items():
        shape, expected = shapes[key], own[key]
        if _is_qk_norm(name):
            rows[name] = shape[0] if len(shape) == 2 else 0
            count = heads[name.split(".")[-2]]
            expected = (rows[name] if rows[name] in (1, count) else count, *expected)
        if shape != expected:
            wrong.append(f"{key} {shape}, expected {expected}")
    says = "config.json and the suite say" if config.head.num_layers else "config.json says"
    _named(directory, f"has other shapes than {says}:", wrong, "use files of one checkpoint")
    types = {name: dtypes[key] for name, key in names.items()}
    return ReleasedFiles(directory, hub_config, config, files, aside, rows, types)


def _head_config(shapes: Mapping[str, tuple[int, ...]]) -> HeadConfig:
    """Return the shape of a released head, read off its tensors; where one is missing, the published size."""
    published, encoder = HeadConfig(), HEAD_PREFIX + "transformer_encoder.layers."
    width = shapes.get(HEAD_PREFIX + "hidden_projection.weight", (published.width,))[0]
    hidden = shapes.get(encoder + "0.linear1.weight", (published.hidden,))[0]
    layers = {key.removeprefix(encoder).split(".")[0] for key in shapes if key.startswith(encoder)}
    return HeadConfig(num_layers=len(layers) or 2, width=width, num_heads=NUM_HEAD_HEADS, hidden=hidden)


def published_tensors(
    ours: Iterable[tuple[str, Tensor]], norm_rows: Mapping[str, int], dtypes: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the published key and tensor of each of ours, in the stored form: the way back."""
    layers = range(sum(name.endswith("mlp_norm.weight") for name in dtypes))
    names = _TOP | _layer_names(layers)
    for name, tensor in ours:
        tensor = tensor.to(getattr(torch, dtypes[name]))
        key = names.get(name, name)  # a head's names are the published ones
        yield key, tensor.expand(norm_rows[name], -1).contiguous() if name in norm_rows else tensor


def _headers(directory: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, str]]:
    """Return their key -> shard, shape and type; index and shards must agree."""
    if (directory / INDEX).is_file():
        promised = read_json(directory / INDEX).get("weight_map")
        if not isinstance(promised, dict):
            raise ValueError(f"{directory / INDEX} has no weight_map: it is damaged; download it again")
    elif (directory / SINGLE).is_file():
        promised = dict.fromkeys(header(directory / SINGLE)[0], SINGLE)
    else:
        found = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        because = f"{', '.join(found)} may be pickles, which are not opened" if found else "none is there"
        raise ValueError(f"{directory} has no {SINGLE} and no {INDEX}: {because}; take the safetensors files")
    shards = sorted(set(promised.values()))
    _named(directory, "lacks shards,", [s for s in shards if not (directory / s).is_file()], "download them")
    files, shapes, dtypes = {}, {}, {}
    for shard in shards:
        shard_shapes, shard_dtypes = header(directory / shard)
        twice = sorted(files.keys() & shard_shapes.keys())
        _named(directory, f"has keys in {shard} that another shard has too:", twice, "download it again")
        files |= dict.fromkeys(shard_shapes, shard)
        shapes, dtypes = shapes | shard_shapes, dtypes | shard_dtypes
    differing = sorted(k for k in promised.keys() | files.keys() if promised.get(k) != files.get(k))
    _named(directory, f"has keys that are not where {INDEX} says:", differing, "download it again")
    return files, shapes, dtypes


def _named(directory: Path, what: str, keys: list[str], fix: str) -> None:
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise ValueError(f"{directory} {what} {', '.join(keys[:3])}{more}: {fix}")


def _is_qk_norm(name: str) -> bool:
    return "q_norm" in name or "k_norm" in name


def _one_row(norm_HK: Tensor, key: str) -> Tensor:
    """Return the row that all heads share, stored once or once a head; rows that differ raise ValueError."""
    if not torch.equal(norm_HK, norm_HK[:1].expand_as(norm_HK)):
        raise ValueError(f"{key} differs from head to head: this model shares one QK-norm (as the 7B does)")
    return norm_HK[0]
