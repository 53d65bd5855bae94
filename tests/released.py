"""Synthetic released folders: the published file names, keys and forms, at small widths, random weights."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from worldvla.config import ImageTokenizerConfig, ModelConfig
from worldvla.model.transformer import Transformer
from worldvla.published.names import published_names
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.vocab import chameleon

MODEL = ModelConfig(num_layers=2, width=32, num_heads=2, num_kv_heads=2, hidden=48)
# The smallest with 32 groups a norm, 16 pixels a code and 8192 codes.
IMAGE = ImageTokenizerConfig(channel_mult=(1,) * 5, num_res_blocks=1, z_channels=4, embed_dim=4)
HEAD_WIDTH, HEAD_HIDDEN = 16, 24


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class _Model(nn.Module):
    """OpenVLA-OFT's MLPResNet, its two blocks written out."""

    def __init__(self, num_in: int, width: int, num_out: int) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(num_in), nn.Linear(num_in, width)
        self.mlp_resnet_blocks = nn.ModuleList([_Residual(width), _Residual(width)])
        self.layer_norm2, self.fc2 = nn.LayerNorm(width), nn.Linear(width, num_out)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.mlp_resnet_blocks
        return self.fc2(self.layer_norm2(second(first(self.fc1(self.layer_norm1(x)).relu()))))


class RynnHead(nn.Module):
    """RynnVLA-002's continuous head restated with torch's own encoder (reference: `docs/MODELS.md`)."""

    def __init__(self, num_actions: int, num_dims: int = 7) -> None:
        super().__init__()
        self.num_actions, num_queries = num_actions, num_actions * num_dims
        self.action_token_embeddings = nn.Embedding(1, num_queries * MODEL.width)
        self.hidden_projection = nn.Linear(MODEL.width, HEAD_WIDTH)
        layer = nn.TransformerEncoderLayer(HEAD_WIDTH, 4, HEAD_HIDDEN, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(HEAD_WIDTH))
        self.output_projection = nn.ModuleDict({"model": _Model(num_dims * HEAD_WIDTH, HEAD_WIDTH, num_dims)})

    def forward(self, x_SD: Tensor) -> Tensor:
        queries_QD = self.action_token_embeddings.weight.view(-1, x_SD.shape[1])
        x_NW = self.transformer_encoder(self.hidden_projection(torch.cat((x_SD, queries_QD)))[None])[0]
        return self.output_projection["model"](x_NW[len(x_SD) :].reshape(self.num_actions, -1))


@cache
def head_state(num_actions: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = RynnHead(num_actions)
    return {f"action_head.{k}": v.bfloat16() for k, v in head.state_dict().items()}


def transformer_state(config: ModelConfig = MODEL, norm_rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Return random bfloat16 weights under the published keys, QK-norms of `norm_rows` equal rows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(config, chameleon().size)
    names, state = published_names(config), {}
    for name, like in model.state_dict().items():
        values = 0.2 * torch.randn(like.shape, generator=generator) + ("norm.weight" in name)
        rows = norm_rows if "q_norm" in name or "k_norm" in name else None
        state[names[name]] = (values.expand(rows, -1).contiguous() if rows else values).bfloat16()
    return state


@cache
def _image_weights() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageTokenizer(IMAGE).state_dict()


def image_state(decoder: bool = True) -> dict[str, Tensor]:
    return {k: v for k, v in _image_weights().items() if decoder or not k.startswith("decoder.")}


def write_release(
    directory: Path,
    *,
    config: ModelConfig = MODEL,
    norm_rows: int = 1,
    shards: int = 3,
    image: bool = False,
    head: int = 0,
    state: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Write config.json and shards with an index (one shard: none); return all tensors. `head`: its K."""
    directory.mkdir(parents=True, exist_ok=True)
    state = transformer_state(config, norm_rows) if state is None else state
    if image:
        state |= {f"model.vqmodel.{k}": v.bfloat16() for k, v in image_state(decoder=False).items()}
    state |= head_state(head) if head else {}
    settings: dict[str, Any] = {
        "architectures": ["ChameleonForConditionalGeneration"],
        "vocab_size": chameleon().size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "swin_norm": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(settings))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    where = {key: names[i * shards // len(state)] for i, key in enumerate(state)}
    for name in names:
        save_file({k: v for k, v in state.items() if where[k] == name}, directory / name, {"format": "pt"})
    if shards > 1:
        size = sum(v.numel() * v.element_size() for v in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def names_of_ids() -> dict[str, int]:
    """Return a vocabulary with the published names (specials, image codes, reserved ids) and 256 bytes."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197}
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names |= {f"IMGIMG{str(code).translate(letters)}Z": code + 4 for code in range(8192)}
    names |= {f"<reserved{n:05d}>": n + 4 for n in range(8194, 16380)}
    return names | {byte: 16384 + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def write_tokenizer(
    directory: Path,
    *,
    decoder: bool = True,
    text: str = "text_tokenizer.json",
    names: dict[str, int] | None = None,
) -> None:
    """Write text_tokenizer.json and vqgan.ckpt, whose state dict also has the keys of a training loss."""
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / text, names_of_ids() if names is None else names)
    state = image_state(decoder) | {"loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "global_step": 7}, directory / "vqgan.ckpt")


def write_text(path: Path, names: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = words  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(path))
