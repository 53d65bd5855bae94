"""Observation -> the next K actions in physical units.

An observation is `{"<view>": uint8 (Y, X, 3), ..., "state": float32 (8,), "instruction": str}` as in
sim/env.py, and for models with a history `"previous"`: the image dicts of the steps just before, oldest first
(fewer at an episode's start; more are ignored).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldvla.batch import Sample
from worldvla.infer.decode import decode_actions
from worldvla.infer.load import Model

Observation = Mapping[str, Any]


class Policy:
    """Holds no state between calls: the same observation gives the same actions."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._tail = model.builder.policy_tail()
        self._blocks_KA = model.builder.action_block_positions(0)

    def act(self, observation: Observation | Sequence[Observation]) -> np.ndarray:
        """Return actions (K, 7) float32 of one observation, (B, K, 7) of a list of them."""
        if isinstance(observation, Mapping):
            return self.act([observation])[0]
        layout, statistics = self.model.config.layout, self.model.builder.statistics
        if not observation:
            return np.zeros((0, layout.chunk, layout.num_action_dims), dtype=np.float32)
        prompts = self.prompts(observation)
        codes = decode_actions(self.model.transformer, self.model.vocab, prompts, self._tail, self._blocks_KA)
        low, high = (np.asarray(v, dtype=np.float32) for v in (statistics.action_low, statistics.action_high))
        return np.clip(statistics.decode_actions(codes), low, high)

    def prompts(self, observations: Sequence[Observation]) -> list[Sample]:
        """Return the sequences that the model reads; bad input raises ValueError."""
        layout = self.model.config.layout
        frames = [[*_previous(o, layout.history), o] for o in observations]
        flat = [frame for sequence in frames for frame in sequence]
        codes = iter(encode_frames(self.model, flat))
        prompts = []
        for observation, sequence in zip(observations, frames, strict=True):
            instruction = observation.get("instruction")
            if not isinstance(instruction, str) or not instruction:
                raise ValueError(
                    f"an observation needs an instruction, a text that is not empty, got {instruction!r}"
                )
            state = self._state(observation) if layout.state else None
            prompts.append(
                self.model.builder.policy_prompt(instruction, state, [next(codes) for _ in sequence])
            )
        return prompts

    def _state(self, observation: Observation) -> np.ndarray:
        num_dims = self.model.config.layout.num_state_dims
        if "state" not in observation:
            raise ValueError(
                f"an observation needs a state ({num_dims},), got the keys {sorted(observation)}"
            )
        state = np.asarray(observation["state"])
        if state.shape != (num_dims,) or state.dtype.kind != "f":
            raise ValueError(
                f"state must be float ({num_dims},), got {state.dtype} {state.shape}: see docs/CONVENTIONS.md"
            )
        return state


def encode_frames(model: Model, frames: Sequence[Mapping[str, Any]]) -> list[tuple[np.ndarray, ...]]:
    """Return each frame's codes (N,) of every view; images of another size or type raise ValueError."""
    columns = []
    for view, size in model.view_sizes.items():
        images = np.stack([_image(frame, view, size) for frame in frames])
        codes = model.image.encode(torch.from_numpy(images).to(model.device))
        columns.append(codes.flatten(1).cpu().numpy())
    return list(zip(*columns, strict=True))


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


def _previous(observation: Observation, history: int) -> list[Mapping[str, Any]]:
    previous = list(observation.get("previous", ()))
    return previous[max(0, len(previous) - (history - 1)) :]
