"""Hidden states of a prompt -> the next U actions as numbers, all at once: RynnVLA-002's continuous head.

Dims: B batch, S prompt positions, Q = U * A queries, N = S + Q, D width of the transformer, W width of the
head, U actions of a chunk, A action dims.

One learned query an action dim joins the prompt's hidden states; a small bidirectional encoder without
positions mixes them, and an MLP reads each action off its A queries (RynnVLA-002
modeling_xllmx_chameleon_ck_action_head.py:19-295). Parameters have the published names. Padding is hidden
exactly (theirs is attended to), and the last layer computes the queries alone: nothing else is read.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from worldvla.config import HeadConfig

SMALL_STD = 0.02
"""Of the queries (as published) and of the last matrix, so that answers start near 0."""


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` (post-norm, ReLU) with its names; may compute the last positions alone."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.self_attn = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BNW: Tensor, is_hidden_BN: Tensor, num_last: int) -> Tensor:
        x = x_BNW[:, -num_last:]
        mixed, _ = self.self_attn(x, x_BNW, x_BNW, key_padding_mask=is_hidden_BN, need_weights=False)
        x = self.norm1(x + self.dropout(mixed))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Encoder(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x_BNW: Tensor, is_hidden_BN: Tensor, num_queries: int) -> Tensor:
        """Return the queries, the last `num_queries` positions, (B, Q, W)."""
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            x_BNW = layer(x_BNW, is_hidden_BN, num_queries if is_last else x_BNW.shape[1])
        return self.norm(x_BNW)


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """OpenVLA-OFT's action head (prismatic/models/action_heads.py)."""

    def __init__(self, num_in: int, width: int, num_out: int) -> None:
        super().__init__()
        self.layer_norm1, self.fc1 = nn.LayerNorm(num_in), nn.Linear(num_in, width)
        self.mlp_resnet_blocks = nn.ModuleList(MLPBlock(width) for _ in range(2))
        self.layer_norm2, self.fc2 = nn.LayerNorm(width), nn.Linear(width, num_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 always: bfloat16 has steps of half a bin near 1."""
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        x = self.layer_norm2(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.fc2.weight.float(), self.fc2.bias.float())


class ActionHead(nn.Module):
    def __init__(self, config: HeadConfig, width: int, num_actions: int, num_dims: int) -> None:
        super().__init__()
        self.num_actions, self.num_queries = num_actions, num_actions * num_dims
        self.action_token_embeddings = nn.Embedding(1, self.num_queries * width)
        self.hidden_projection = nn.Linear(width, config.width)
        self.transformer_encoder = Encoder(config)
        self.output_projection = nn.ModuleDict(
            {"model": MLPResNet(num_dims * config.width, config.width, num_dims)}
        )

    def forward(self, x_BSD: Float[Tensor, "B S D"], lengths_B: Int[Tensor, " B"]) -> Float[Tensor, "B U A"]:
        """Return normalised actions; they aim at [-1, 1] but are not clipped.

        `x_BSD`: hidden states after the final norm, of which those from `lengths_B` on do not count.
        """
        batch, length, width = x_BSD.shape
        queries_QD = self.action_token_embeddings.weight.view(self.num_queries, width).to(x_BSD.dtype)
        x_BND = torch.cat((x_BSD, queries_QD.expand(batch, -1, -1)), 1)
        is_hidden_BS = torch.arange(length, device=x_BSD.device) >= lengths_B[:, None]
        is_hidden_BN = F.pad(is_hidden_BS, (0, self.num_queries))
        x_BQW = self.transformer_encoder(self.hidden_projection(x_BND), is_hidden_BN, self.num_queries)
        return self.output_projection["model"](x_BQW.reshape(batch, self.num_actions, -1))

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw from a generator of its own: the transformer starts alike with and without a head.

        Norms 1 and 0, biases 0; queries and fc2 normal, SMALL_STD; other matrices normal, fan_in ** -0.5.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                std = SMALL_STD if "embed" in name or "fc2" in name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
