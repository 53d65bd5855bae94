"""One observation as the model reads it: frames, their code grids in colour, reconstructions, the actions it
answers.

`tokens.npz` of a result directory, for the report: <view>_frame, <view>_codes, <view>_colors,
<view>_reconstruction, the instruction, and the sequence as segments (names and numbers of tokens).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldvla.files import reading, whole_file
from worldvla.infer.model import Model
from worldvla.infer.policy import Policy

FILE = "tokens.npz"


def write_example(
    directory: Path, model: Model, observation: Mapping[str, Any], head: str = "discrete"
) -> None:
    """Write `directory`/tokens.npz atomically."""
    layout, arrays = model.config.layout, {}
    vectors: list[np.ndarray] = []
    for view in layout.views:
        frame = np.array(observation[view])  # what comes from another process may be read-only
        codes = model.image.encode(torch.from_numpy(frame[None]).to(model.device))
        arrays[f"{view}_frame"] = frame
        arrays[f"{view}_codes"] = codes[0].cpu().numpy()
        arrays[f"{view}_reconstruction"] = model.image.decode(codes)[0].cpu().numpy()
        vectors.append(model.image.quantize.vectors(codes)[0].flatten(0, 1).detach().cpu().numpy())
    colors = np.split(code_colors(np.concatenate(vectors)), np.cumsum([len(v) for v in vectors])[:-1])
    for view, of_view in zip(layout.views, colors, strict=True):
        arrays[f"{view}_colors"] = of_view.reshape(*arrays[f"{view}_codes"].shape, 3)
    policy = Policy(model, head)
    observation = {**observation, "previous": []}
    arrays["actions"] = policy.act(observation)
    arrays["action_low"] = np.array(model.builder.statistics.action_low)
    arrays["action_high"] = np.array(model.builder.statistics.action_high)
    names, sizes = zip(*segments(model, observation), strict=True)
    arrays |= {"views": np.array(layout.views), "instruction": np.array(observation["instruction"])}
    arrays |= {"segments": np.array(names), "sizes": np.array(sizes)}
    with whole_file(directory / FILE) as scratch, scratch.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def read_example(directory: Path) -> dict[str, np.ndarray] | None:
    path = directory / FILE
    if not path.exists():
        return None
    with (
        reading(path, "file of arrays", "evaluate again"),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as data,
    ):
        return {name: data[name] for name in data.files}


def segments(model: Model, observation: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return (name, tokens) of the parts of a policy sequence of one frame, in order."""
    layout, builder, vocab = model.config.layout, model.builder, model.vocab
    ids = Policy(model).prompts([observation])[0].ids
    begins = np.flatnonzero(ids == vocab.boi)
    ends = np.flatnonzero(ids == vocab.eoi) + 1
    text = int(begins[0])
    state = layout.num_state_dims + 2 if layout.state else 0
    parts = [("text", text - state)] + ([("state", state)] if state else [])
    parts += [(view, int(b - a)) for view, a, b in zip(layout.views, begins, ends, strict=True)]
    block = builder.action_block_positions(0).shape[1]
    return [*parts, ("sep", 1), *[(f"action {k + 1}", block) for k in range(layout.chunk)], ("sep", 1)]


def code_colors(vectors_NE: np.ndarray) -> np.ndarray:
    """Return a colour (N, 3) uint8 for every vector of a code: the three main directions of them all, so
    that like codes look alike.
    """
    different, rows_N = np.unique(vectors_NE, axis=0, return_inverse=True)
    centred = different - different.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(different), 3))
    main = centred @ directions[:3].T
    scores[:, : main.shape[1]] = main
    ranks = scores.argsort(0).argsort(0) / max(1, len(scores) - 1)  # evenly used, whatever the distribution
    return (70 + 175 * ranks).astype(np.uint8)[rows_N.reshape(-1)]
