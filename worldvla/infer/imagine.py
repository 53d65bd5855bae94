"""A frame and actions -> the frames that the model expects: a world model with the interface of an
environment.

Frames are dicts of views, uint8 (Y, X, 3), or (B, Y, X, 3) for B worlds side by side; a model of one view
takes and gives the array itself. The codes that it generates are fed back as they are, never decoded and
encoded again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from worldvla.infer.decode import decode_frame
from worldvla.infer.draft import FrameStats, Window
from worldvla.infer.load import Model
from worldvla.infer.policy import encode_frames

Frame = np.ndarray | dict[str, np.ndarray]


class World:
    """`drafts`: guess the next frame from this one and check it in a few passes; off: one code a pass. The
    codes are the same, up to what docs/DECODING.md says of rounding.
    """

    def __init__(self, model: Model, drafts: bool = True) -> None:
        self.model, self.drafts = model, drafts
        self.stats: list[FrameStats] = []
        """What each step since the last reset took."""
        self._window = Window(model.device)
        self._tail = model.builder.world_tail()
        self._codes_BN: np.ndarray | None = None
        self._is_batch = self._is_dict = False

    @property
    def codes(self) -> dict[str, np.ndarray]:
        """View -> codes (B, R, Q) of the current frames."""
        if self._codes_BN is None:
            raise ValueError("the world has no frame yet: call reset(frame) first")
        layout = self.model.config.layout
        parts = np.split(self._codes_BN, np.cumsum(layout.codes_per_view)[:-1], axis=1)
        grids = zip(layout.views, layout.grids, parts, strict=True)
        return {view: part.reshape(-1, *grid) for view, grid, part in grids}

    def reset(self, frame: np.ndarray | Mapping[str, Any]) -> Frame:
        """Start from `frame` (an observation will do); return it as its codes show it."""
        views = list(self.model.config.layout.views)
        self._is_dict = isinstance(frame, Mapping)
        if not isinstance(frame, Mapping):
            if len(views) > 1:
                raise ValueError(f"the model imagines the views {views}: pass a dict of them, not one array")
            frame = {views[0]: frame}
        self._is_batch = np.ndim(frame.get(views[0], 0)) == 4
        names = [view for view in views if view in frame]
        if self._is_batch:
            counts = {view: len(frame[view]) for view in names}
            if len(set(counts.values())) != 1:
                raise ValueError(f"every view needs the same number of frames, got {counts}")
            if not counts[views[0]]:
                raise ValueError("a batch of worlds needs at least one frame, got none")
            frames = [{view: frame[view][i] for view in names} for i in range(counts[views[0]])]
        else:
            frames = [frame]
        self.stats, self._window = [], Window(self.model.device)
        self._codes_BN = np.stack([np.concatenate(codes) for codes in encode_frames(self.model, frames)])
        return self.frame()

    def step(self, action: np.ndarray) -> Frame:
        """Return the next frame after `action`, (7,) or (B, 7) in physical units; values outside the
        statistics' range are clipped.
        """
        codes_BN = self._codes_BN
        if codes_BN is None:
            raise ValueError("the world has no frame yet: call reset(frame) first")
        num_dims = self.model.config.layout.num_action_dims
        expected = (len(codes_BN), num_dims) if self._is_batch else (num_dims,)
        if np.shape(action) != expected:
            raise ValueError(f"the action must have shape {expected}, got {np.shape(action)}")
        actions_BA = np.asarray(action, dtype=np.float32).reshape(-1, num_dims)
        builder = self.model.builder
        prompts = [
            builder.world_prompt([builder.split_views(codes)], action)
            for codes, action in zip(codes_BN, actions_BA, strict=True)
        ]
        draft_BN = codes_BN if self.drafts else None
        self._codes_BN, stats = decode_frame(
            self.model.transformer, self.model.vocab, prompts, self._tail, draft_BN, self._window
        )
        self.stats.append(stats)
        return self.frame()

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these of the worlds alone: indices, or bool (B,)."""
        if self._codes_BN is None or not self._is_batch:
            raise ValueError("only a batch of worlds can be thinned: call reset with stacked frames first")
        self._codes_BN = self._codes_BN[rows]

    def frame(self) -> Frame:
        """Return the current frame, decoded."""
        frames = {}
        for view, codes in self.codes.items():
            images = self.model.image.decode(torch.from_numpy(codes).to(self.model.device)).cpu().numpy()
            frames[view] = images if self._is_batch else images[0]
        return frames if self._is_dict else frames[self.model.config.layout.views[0]]
