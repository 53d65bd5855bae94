"""Every setting, as frozen dataclasses; `recipes.py` holds complete named configs. Imports nothing of ours.

A config is written as `config.json` beside every checkpoint. Types, choices and bounds are those of the
annotations, and hold wherever a value comes from: a file, an option or a recipe.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Annotated, Any, Literal, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Range:
    """Bounds of a number; both belong to it, unless `is_open` leaves `low` out."""

    low: float
    high: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.is_open and value == self.low)

    def __str__(self) -> str:
        lower = f"{'above' if self.is_open else 'from'} {self.low:,}"
        return lower if self.high == math.inf else f"{lower} to {self.high:,}"


Count = Annotated[int, Range(1, 10**9)]
Whole = Annotated[int, Range(0, 10**9)]
Size = Annotated[int, Range(1, 2**16)]
"""Of what takes memory: a width, a side, a length, rows of a batch."""
Few = Annotated[int, Range(1, 1024)]
"""Layers, heads, threads, frames of a sequence."""
FewOrNone = Annotated[int, Range(0, 1024)]
Share = Annotated[float, Range(0, 1)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, is_open=True)]


class CheckedConfig:
    """A dataclass whose values must fit their annotations; ValueError names the first that does not."""

    def __post_init__(self) -> None:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        check_values(type(self), vars(self), name.removesuffix("_config"))


@dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig(CheckedConfig):
    """Shape of the VQGAN (published values: WorldVLA model/chameleon_vae_ori/vqgan.yaml)."""

    channels: Size = 128
    """Width at full resolution."""
    channel_mult: tuple[Few, ...] = (1, 1, 2, 2, 4)
    """Width of each level over `channels`; each level but the last halves the sides."""
    encoder: Literal["vqgan", "cell"] = "vqgan"
    """cell: every code is a function of its own factor x factor pixels alone, so that what stands still keeps
    its codes, as a world model needs it. vqgan: as published; its norms and attention see the whole frame."""
    patch: Size = 1
    """Side of the pixel blocks folded into channels before the first level (published: 1). More makes small
    tokenizers fast."""
    num_res_blocks: FewOrNone = 2
    z_channels: Size = 256
    embed_dim: Size = 256
    """Dimension of a codebook vector (for FSQ: the number of levels)."""
    quantizer: Literal["vq", "fsq"] = "vq"
    num_codes: Annotated[int, Range(2, 2**48)] = 8192
    """A codebook of "vq" holds 2^24 at most; FSQ has none."""
    fsq_levels: tuple[Annotated[int, Range(2, 256)], ...] = ()
    """Levels of each FSQ dimension; their product is num_codes. Empty for VQ."""
    context_widths: tuple[Size, ...] = ()
    """Widths at 1/2, 1/4, ... of a frame's side, down to the grid of codes, of a decoder that also reads a
    real frame of the same clip and copies from it what stands still. Empty, as published: the VQGAN's, which
    reads codes alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channel_mult:
            raise ValueError("channel_mult is empty: expected a width of each level, such as 1 2")
        if self.quantizer == "fsq":
            product = math.prod(self.fsq_levels)
            if product != self.num_codes or len(self.fsq_levels) != self.embed_dim:
                raise ValueError(
                    f"fsq_levels {self.fsq_levels} give {product} codes of {len(self.fsq_levels)} dims, "
                    f"num_codes is {self.num_codes} and embed_dim {self.embed_dim}: make them agree"
                )
        if self.quantizer == "vq" and self.num_codes > 2**24:
            raise ValueError(f"num_codes {self.num_codes} with quantizer 'vq': expected at most {2**24}")
        if (widths := self.context_widths) and 2 ** len(widths) != self.factor:
            raise ValueError(
                f"context_widths {widths} are for codes of {2 ** len(widths)} pixels a side, got "
                f"{self.factor}: give one width for each time that the side is halved"
            )
        if self.quantizer != "fsq" and self.fsq_levels:
            raise ValueError(f"fsq_levels {self.fsq_levels} with quantizer 'vq': empty them or use 'fsq'")

    @property
    def factor(self) -> int:
        """Pixels of one code along a side."""
        return self.patch * 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(CheckedConfig):
    """How an image tokenizer is trained (train/image_tokenizer.py)."""

    minutes: Positive = 12.0
    """Budget."""
    steps: Whole = 0
    """Budget instead of minutes, if not 0; the result is then a function of the seed, on any machine."""
    batch_size: Size = 32
    """Frames of every view in a step."""
    learning_rate: Positive = 2e-3
    """At its highest; a fifth of it or less to train on from another tokenizer."""
    foreground_weight: Amount = 4.0
    """How much more a foreground pixel counts than the table; and, where the decoder reads a context frame, a
    pixel that differs from it."""
    nested: Share = 0.0
    """Share of frames that are decoded from their first dims alone, any number of them: what matters most
    then stands in the first dims, which a model of levels decides first."""
    crop: Whole = 0
    """Side of the square, in pixels, that larger frames are cut to, mostly around what moves; 0: none. Only
    for codes that see their own cell alone (encoder "cell")."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    num_threads: Few = 2
    max_frames: Count = 60_000
    """Frames of a view that are read, about; drawn from all episodes."""


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(CheckedConfig):
    """What a sequence holds, in which order. The ablations of the paper are fields of this class."""

    views: tuple[str, ...] = ("agentview",)
    """Cameras, in the order in which they stand in a sequence; none: cameras, grids and numbers of dims are
    those of the stores (train/build.py, fit)."""
    grids: tuple[tuple[Few, Few], ...] = ((16, 16),)
    """Code rows and columns of each view."""
    history: Few = 2
    """O (the paper's M), frames of a policy sample; the first frame of an episode stands alone (WorldVLA: no
    padding)."""
    clip: Few = 1
    """C, frames that a world sample asks for one after the other, each after its action (published: 1). With
    more, nearly every token is a target and a frame has up to C before it, in imagination too."""
    anchor: bool = False
    """A world sample begins with an earlier frame of its episode, which in imagination is the real one that
    it began from: what has been hidden or lost since is still to be seen. Off, as published: none."""
    frame_at_once: bool = False
    """All codes of a frame that is asked for are predicted at once, none from another one of it: what
    layout.selective_mask is for actions. Needs model.previous_code, which reads the frame before. Off, as
    published: each from those before it."""
    chunk: Few = 5
    """U, actions of a chunk (the paper's K)."""
    state: bool = False
    """State tokens after the text of a policy sample (RynnVLA-002)."""
    world_state: bool = False
    """State tokens before each frame of a world sample: the model says where the hand will be, then shows
    it, and imagination has a state for the policy. Off, as published: frames alone."""
    num_action_dims: Few = 7
    num_state_dims: FewOrNone = 8
    selective_mask: bool = True
    """Hide the other actions of a chunk from each action (the paper's key finding). Off: plain causal."""
    action_conditioning: bool = True
    """World samples carry the action. Off: the paper's action-free video baseline."""
    world_prompt: str = (
        "Generate the next image based on the provided sequence of historical images "
        "and corresponding actions."
    )
    """Prompt of world samples (WorldVLA data/world_model_conv_generation.py:123)."""
    policy_prompt: str = "What action should the robot take to {task}?"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.views) != len(self.grids):
            raise ValueError(
                f"layout has {len(self.views)} views and {len(self.grids)} grids: give one grid a view"
            )
        try:
            fields = {field[1:] for field in Formatter().parse(self.policy_prompt) if field[1] is not None}
        except ValueError:  # braces without a partner
            fields = set()
        if fields != {("task", "", None)}:
            raise ValueError(
                f"layout.policy_prompt {self.policy_prompt!r:.80}: expected a text with {{task}}, for which "
                "the instruction is put, and no other braces"
            )

    @property
    def codes_per_view(self) -> tuple[int, ...]:
        return tuple(rows * cols for rows, cols in self.grids)

    @property
    def num_rows(self) -> int:
        """Rows of the place table: 0 (no place) and the rows of all views stacked."""
        return 1 + sum(rows for rows, _ in self.grids)

    @property
    def num_cols(self) -> int:
        return 1 + sum(cols for _, cols in self.grids)

    @property
    def longest(self) -> int:
        """Return a sequence length that every sample of a published layout fits in, a multiple of 64.

        64 tokens are allowed for the text of a prompt; rows of image codes end in a token of their own.
        """
        frame = sum(rows * (cols + 1) + 4 for rows, cols in self.grids)
        block, state = self.num_action_dims + 2, self.num_state_dims + 2
        policy = self.state * state + self.history * frame + self.chunk * block
        world = (1 + self.anchor + self.clip) * frame + self.clip * block
        world += (1 + self.clip) * self.world_state * state
        return -(-(64 + 3 + max(policy, world)) // 64) * 64

    @property
    def action_shape(self) -> tuple[int, int]:
        """(U, A): what an action head answers."""
        return self.chunk, self.num_action_dims

    @property
    def sizes(self) -> tuple[int, int, tuple[int, int]]:
        """What the shapes of a `Transformer` depend on besides its own settings and the vocabulary."""
        return self.num_rows, self.num_cols, self.action_shape


@dataclass(frozen=True, kw_only=True)
class HeadConfig(CheckedConfig):
    """Shape of the continuous action head (published: 2 layers, width 1024, 4 heads, hidden 4096)."""

    num_layers: FewOrNone = 0
    """0: no head; the policy has its bins alone."""
    width: Size = 1024
    num_heads: Size = 4
    hidden: Size = 4096
    dropout: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"head width {self.width} must divide by its num_heads {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckedConfig):
    """Shape of the transformer (published 7B: 32 layers, width 4096, 32 heads, hidden 11008)."""

    num_layers: Few
    width: Size
    num_heads: Size
    num_kv_heads: Size
    hidden: Size
    """Inner width of the SwiGLU block."""
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5
    dropout: Share = 0.0
    """On attention and MLP outputs before the residual add (published: 0.05)."""
    place_embedding: bool = False
    """Learned row and column embeddings on image codes (compact models)."""
    code_levels: tuple[Size, ...] = ()
    """Levels of the image tokenizer's FSQ dims, where image codes are embedded and predicted level by level
    (model/codes.py). Empty, as published: a row of the embedding and of the head for each code."""
    previous_code: bool = False
    """A position that predicts an image code also reads the code at that place one frame before, so that what
    stands still need not be searched for by attention."""
    codebook_init: bool = False
    """Start the embeddings of image codes from the tokenizer's codebook, those of bins from a curve."""
    head: HeadConfig = field(default_factory=HeadConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"width {self.width} must divide by num_heads {self.num_heads}, "
                f"and that by num_kv_heads {self.num_kv_heads}"
            )
        if (size := self.width // self.num_heads) % 2:
            raise ValueError(
                f"width {self.width} / num_heads {self.num_heads} is {size}: rotary positions turn pairs of "
                "dims, make it even"
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig(CheckedConfig):
    image_weight: Amount = 0.04
    """alpha (WorldVLA pretrain_ck.py:932; paper)."""
    state_weight: Amount = 0.2
    """Of the world model's state dims, with layout.world_state; only where `reduction` is "paper"."""
    z_weight: Amount = 1e-5
    """Weight of mean logsumexp^2 (published value)."""
    reduction: Literal["paper", "published"] = "paper"
    """paper: mean CE over action targets + alpha * mean CE over world targets. published: one class-weighted
    mean over both, ids 3..8194 (off by one) at alpha, in which alpha cancels on image-only batches
    (docs/DETAILS.md)."""
    supervise: Literal["all", "decoded"] = "all"
    """decoded: only what decoding chooses, action dims and image codes, each against the ids that it is
    chosen from. all (as published): begin and end tokens too, and against the whole vocabulary, which costs
    most of a small model's step."""
    action_smoothing: Amount = 0.0
    """Standard deviation, in bins, of the Gaussian that replaces the one-hot target of an action dim, and of
    a state dim that the world model says (0: one-hot, as published)."""
    head_weight: Amount = 10.0
    """Of the continuous head's mean absolute error, where there is a head (RynnVLA-002
    pretrain_ck_action_head.py:274)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(CheckedConfig):
    method: Literal["adamw", "muon"] = "adamw"
    """muon: for the linear layers inside the transformer, AdamW for the rest. A small model that starts from
    nothing learns in half the steps (paper/LOG.md); published weights go on with AdamW, as trained."""
    learning_rate: Amount = 5e-6
    min_learning_rate: Amount = 5e-6
    """Reached at the last step by a cosine; equal to learning_rate: constant."""
    warmup_steps: Whole = 100
    weight_decay: Amount = 0.1
    betas: tuple[Share, Share] = (0.9, 0.95)
    clip: Positive = 4.0
    """Largest gradient norm."""
    ema: Share = 0.0
    """Decay of the exponential moving average of trained weights, such as 0.999: checkpoints then hold it as
    their model, and validation sees it. 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if 1 in self.betas:
            raise ValueError(f"optim.betas {self.betas}: expected less than 1, such as (0.9, 0.95)")
        if self.ema == 1:
            raise ValueError("optim.ema 1 averages nothing: expected less, such as 0.999, or 0 for off")


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedConfig):
    stores: tuple[str, ...]
    """TokenStore directories."""
    weights: tuple[Positive, ...] = ()
    """Of each store: its share of the policy samples, and of the world samples, beside the other stores that
    have such samples. Empty: every sample counts the same."""
    datasets: tuple[str, ...] = ()
    """Name of each store's dataset: stores of one name share the statistics of actions and states, and a
    request says which to use (`unnorm_key`). Empty: all stores are one dataset, without a name."""
    world_fraction: Share = 0.5
    """Share of world samples in the stream; 0 trains the policy alone, 1 the world model alone."""
    val_fraction: Share = 0.02
    """Share of episodes held out, by a hash of what an episode is; never trained on."""
    corrupt: Share = 0.0
    """Share of the image codes that a world sample reads wrong; the right ones stay its targets."""
    imagined: Share = 0.0
    """Of the world samples whose frames a world model imagined in one piece (`worldvla imagine`), the share
    that reads them so; the real ones stay their targets."""
    statistics: Literal["minmax", "quantile"] = "minmax"
    """Normalisation range of actions and states: minimum, maximum (published) or 1st, 99th percentile."""
    sequence_length: Size = 256
    """Tokens of the longest sample; a longer one raises. Batches are padded to their own longest."""
    truncate: bool = False
    """Cut longer samples instead, as published for pairs of 512 px views (docs/DETAILS.md, 26)."""
    scene_prefix: bool = False
    """Start LIBERO-10's instructions by their scene, as published (docs/DETAILS.md, 4)."""
    pad_chunks: bool = False
    """Chunks that pass the end of an episode repeat its last action; off: there are none (as published)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", "datasets"):
            if (given := getattr(self, name)) and len(given) != len(self.stores):
                raise ValueError(
                    f"data.{name} has {len(given)} values, data.stores {len(self.stores)}: give one a store"
                )
        if not all(self.datasets or ("one",)):
            raise ValueError(f"data.datasets {self.datasets}: a name must not be empty")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CheckedConfig):
    steps: Count
    batch_size: Size
    accumulation: Few = 1
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """bfloat16 is autocast over float32 weights. auto: the faster one, measured when a run begins."""
    device: str = "cpu"
    num_threads: Few = 2
    shard: Whole = 1
    """Processes that share one copy of weights, gradients and moments (FSDP2); 1: each holds all of it, 0: as
    many as there are for a copy."""
    replicate: Whole = 0
    """Copies of the model, shard processes each; 0: as many as torchrun's processes make."""
    compile: bool = False
    scheduled_sampling: Share = 0.0
    """Share of the image codes of frames to predict that a world sample reads as the model itself chose them
    (arXiv 1906.07651), which takes one more forward pass; the right ones stay its targets."""
    checkpoint_layers: bool = False
    """Keep the input of each layer alone and compute the rest again in the backward pass: the same gradients,
    a third more compute, a fraction of the activations (published: on)."""
    log_every: Whole = 20
    """Steps between records; 0, here and in the two fields below: only at the end."""
    eval_every: Whole = 500
    """Steps between validations."""
    num_eval_batches: Count = 8
    save_every: Whole = 500
    """Steps between checkpoints."""
    init_from: str = ""
    """Checkpoint to take weights from before step 0; empty: from scratch. One of fewer layers starts a deeper
    model, as the same function."""
    only_head: bool = False
    """Train the continuous head alone, beside the weights of init_from, which stay as they are: the bins
    answer as before, and a step costs half."""
    overfit: bool = False
    """See batch 0 at every step: a sound model learns it by heart."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(CheckedConfig):
    """Train low-rank updates W + alpha / rank * B A of a frozen checkpoint (LoRA, arXiv 2106.09685)."""

    rank: Annotated[int, Range(0, 2**16)] = 0
    """Rows of A; 0: off, every weight is trained. Else train.init_from names the checkpoint."""
    alpha: Positive = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = (
        *("q", "k", "v", "o", "gate", "up", "down"),
    )
    """Linear layers, in every block, that get an update."""
    full: tuple[Literal["embed", "head"], ...] = ()
    """Trained whole besides. For a checkpoint that has not seen action ids (Chameleon): both."""
    base: Literal["float32", "bfloat16", "int8", "int4"] = "bfloat16"
    """How the frozen linear layers of the blocks are held (int4: QLoRA); bfloat16 needs that train.dtype."""


@dataclass(frozen=True, kw_only=True)
class Config(CheckedConfig):
    """Everything that a training run needs, complete."""

    name: str
    vocab: Literal["compact", "chameleon"]
    num_text: Annotated[int, Range(1, 2**20)]
    """Size of the BPE of a compact vocabulary."""
    tokenizer: str
    """Directory of the image tokenizer."""
    layout: LayoutConfig
    model: ModelConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or "/" in self.name or "\\" in self.name or self.name.startswith("."):
            raise ValueError(
                "name is part of a path: expected one that is not empty, without / and leading dots, got "
                f"{self.name!r}"
            )
        if self.model.code_levels and (self.vocab != "compact" or self.loss.supervise != "decoded"):
            raise ValueError(
                "model.code_levels needs vocab 'compact' and loss.supervise 'decoded', got "
                f"{self.vocab!r} and {self.loss.supervise!r}"
            )
        if self.train.scheduled_sampling and self.train.shard != 1:
            raise ValueError("train.scheduled_sampling needs whole models: set train.shard 1")
        if self.lora.rank and self.optim.method == "muon":
            raise ValueError("muon trains whole matrices: with lora.rank set optim.method adamw")
        if self.model.previous_code and not self.model.code_levels:
            raise ValueError("model.previous_code needs model.code_levels, got none")
        if self.layout.frame_at_once and not self.model.previous_code:
            raise ValueError(
                "layout.frame_at_once predicts no code from another one of its frame: set "
                "model.previous_code, which reads the frame before"
            )
        if self.model.head.num_layers and self.data.world_fraction == 1:
            raise ValueError(
                "world_fraction 1 never trains the action head: lower it, or set model.head.num_layers 0"
            )
        if self.train.only_head and (
            not self.model.head.num_layers
            or not self.train.init_from
            or self.data.world_fraction
            or self.lora.rank
        ):
            raise ValueError(
                "train.only_head needs model.head.num_layers > 0, train.init_from, data.world_fraction 0 and "
                f"lora.rank 0, got {self.model.head.num_layers}, {self.train.init_from!r}, "
                f"{self.data.world_fraction} and {self.lora.rank}"
            )


def to_json(config: Any) -> dict[str, Any]:
    """Return a nested dict of plain values."""
    return dataclasses.asdict(config)


def from_json(cls: type[_T], data: dict[str, Any], where: str = "config") -> _T:
    """Build dataclass `cls` from `to_json`'s dict. Unknown keys, missing keys without a default and values
    that do not fit raise ValueError. A later field has the default that older files were made by.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {_shorten(data)}")
    hints, fields = _hints(cls), dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(data) - set(hints)):
        raise ValueError(f"{where}: unknown keys {unknown}; expected some of {sorted(hints)}")
    plain = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(plain - set(data)):
        raise ValueError(f"{where}: missing keys {missing}; expected {sorted(hints)}")
    values = {name: _coerce(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    check_values(cls, values, where)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_values(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, naming the first, unless every value fits the annotation of its field of `cls`."""
    for name, value in values.items():
        hint = _hints(cls)[name]
        if not _fits(hint, value):
            raise ValueError(f"{where}.{name} must be {_words(hint)}, got {_shorten(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Turn JSON's objects and lists into the dataclasses and tuples of `hint`."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(_coerce(typing.get_args(hint)[0], v, where) for v in value)
    return value


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(args[0], value) and value in args[1]
    if origin is Literal:
        return value in args
    if origin is types.UnionType:
        return any(_fits(arg, value) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        inner = args[:1] * len(value) if args[-1] is ... else args
        return len(inner) == len(value) and all(map(_fits, inner, value))
    if hint is float:  # what is finite in float32, in which models compute
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3.4e38
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _words(hint: Any) -> str:
    """Return what a value of `hint` is, for an error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{_words(args[0])} {args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is types.UnionType:
        return " or ".join(map(_words, args))
    if origin is tuple:
        return f"a list of {_words(args[0]) if args[-1] is ... else ', '.join(map(_words, args))}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(hint, "null" if hint is type(None) else f"a {hint.__name__}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
