"""Weights on disk and in memory: safetensors read one tensor at a time, a model that is empty until then.

Headers alone are checked; then a tensor is copied out of its file's map in place of a meta tensor, so the
host holds the model and one tensor (docs/MODELS.md has the numbers).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from worldvla.config import ModelConfig
from worldvla.files import check_finite, check_shapes, read_json, reading, sha256
from worldvla.model.quantize import Form, QuantizedLinear
from worldvla.model.transformer import Transformer

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LAST_MATRICES = ("attention.o.weight", "mlp.down.weight")
"""Of the two branches of a block."""
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that weights may have: as safetensors and as torch call them."""


def find_checkpoint(path: Path) -> Path:
    """Return `path` if it is a checkpoint, the newest complete one if it is a run directory."""
    if not path.is_dir():
        raise FileNotFoundError(f"no directory {path}: expected a checkpoint or a run of `worldvla train`")
    if (path / "manifest.json").is_file():
        return path
    has_weights = (path / INDEX).is_file() or (path / SINGLE).is_file()
    if has_weights and (path / "config.json").is_file() and "vocab_size" in read_json(path / "config.json"):
        raise ValueError(
            f"{path} is a released checkpoint, not one of ours: `worldvla convert {path} --release NAME "
            "--out DIR` makes one of it (docs/MODELS.md)"
        )
    if not (found := checkpoints(path)):
        raise FileNotFoundError(
            f"{path} holds no checkpoint (manifest.json or ckpt/step_N): expected one of `worldvla train`"
        )
    return found[max(found)]


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return step -> folder of the complete checkpoints of a run."""
    folders = [file.parent for file in (run_dir / "ckpt").glob("step_*/manifest.json")]
    return {int(f.name[5:]): f for f in folders if re.fullmatch(r"step_\d+", f.name)}


class _Undrawn(TorchFunctionMode):
    """Initial weights are not drawn: on the meta device that is a second of imports, for nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(
    config: ModelConfig,
    vocab_size: int,
    num_rows: int = 1,
    num_cols: int = 1,
    action_shape: tuple[int, int] = (0, 0),
) -> Transformer:
    """Return the model on the meta device: names and shapes without memory, for `assign`."""
    with torch.device("meta"), _Undrawn():
        return Transformer(config, vocab_size, num_rows, num_cols, action_shape)


def assign(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    form: Form | None = None,
) -> Transformer:
    """Put each tensor in place of a parameter of `model`, which is on the meta device; one copy at a time.

    `form`: how the linear layers of the blocks are held instead of in `dtype`.
    """
    for name, tensor in tensors:
        owner, _, leaf = name.rpartition(".")
        if form and is_block_matrix(name, tensor.shape):
            if form in ("int8", "int4"):
                model.set_submodule(owner, QuantizedLinear(tensor.to(device), form))
                continue
            placed = tensor.to(device, getattr(torch, form), copy=True)
        else:
            placed = tensor.to(device, dtype or tensor.dtype, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(placed, requires_grad=False))
        del tensor
    return model.eval()


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Return whether a parameter is the weight of a linear layer of a block: what `form` applies to."""
    return name.startswith("layers.") and len(shape) == 2


def read_tensor(path: Path, key: str) -> Tensor:
    """Return one tensor, a view of the file's map, which is released with it (so opened anew each time)."""
    with reading(path, "safetensors file", "download it again"), safe_open(path, "pt") as file:
        tensor = file.get_tensor(key)
    check_finite(path, key, tensor)
    return tensor


def read_tensors(path: Path) -> tuple[dict[str, tuple[int, ...]], Iterator[tuple[str, Tensor]]]:
    """Return the shapes in a file by name, and names with tensors, which are read one at a time."""
    shapes = header(path)[0]
    return shapes, ((name, read_tensor(path, name)) for name in shapes)


def header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return shapes and torch names of types of a safetensors file, by key; a damaged file raises."""
    with reading(path, "safetensors file", "download it again"), safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        return shapes, {key: DTYPES.get(str(s.get_dtype()), "") for key, s in slices.items()}


def check_fit(path: Path, own: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the keys and shapes in a file's header are not those of `own`, naming the first."""
    check_shapes(path, header(path)[0], own, "use the model and layout of its config.json")


def origins(path: Path, names: Iterable[str], num_layers: int) -> dict[str, tuple[str, bool]]:
    """Return where each of a model's tensors is in a file, and whether it starts as zeros all the same.

    A file of fewer layers, M of N, makes a deeper model that starts as the same function: layer j is layer
    j * M // N of the file, and a second copy of one adds nothing yet, as its last matrices are zero (block
    expansion, arXiv 2401.02415).
    """
    stored = [int(name.split(".")[1]) for name in header(path)[0] if name.startswith("layers.")]
    number = max(stored, default=-1) + 1
    found = {name: (name, False) for name in names}
    if not 0 < number < num_layers:
        return found
    for name in [name for name in found if name.startswith("layers.")]:
        _, index, rest = name.split(".", 2)
        source, before = (j * number // num_layers for j in (int(index), int(index) - 1))
        found[name] = f"layers.{source}.{rest}", source == before and rest in LAST_MATRICES
    return found


def weights_digest(path: Path) -> str:
    """Return 16 hex digits of the checkpoint's weights file: which model a record speaks of."""
    return sha256(path / "model.safetensors")[:16]
