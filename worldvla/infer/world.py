"""A frame and actions -> the frames that the model expects: a world model with the interface of an
environment.

Frames are dicts of views, uint8 (Y, X, 3), or (B, Y, X, 3) for B worlds at once. The codes that it generates
are fed back as they are, never decoded and encoded again. A model of clips (layout.clip) reads its last
frames: after as many, a new clip begins with the current one, and until then nothing is computed twice. The
first frame stays the context of a decoder that copies what stands still. A model that says states
(layout.world_state) begins from the frame's and keeps `state` beside the frames.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from worldvla.batch import Sample
from worldvla.infer.decode import ClipDecoder
from worldvla.infer.draft import FrameStats, Window
from worldvla.infer.model import Model
from worldvla.vocab import to_ids

Frame = dict[str, np.ndarray]
STILL = 8
"""Steps for which a cell of the frame keeps its code before the next clip finds it in its anchor: what was
put down stays where it is."""


class World:
    """`speculative`: take this frame as a guess of the next one and verify it in a few passes; off: one
    code a pass. Of a model that predicts a frame at once, that goes for its state. The codes are the same,
    up to what docs/DECODING.md says of rounding. `temperature`: 0 takes the likeliest codes (of codes by
    levels, each level's median), more draws them, by a generator of `seed`.
    """

    def __init__(
        self, model: Model, speculative: bool = True, temperature: float = 0.0, seed: int = 0
    ) -> None:
        model.check_world()
        self.model, self.speculative = model, speculative
        self.temperature, self.seed = temperature, seed
        self.stats: list[FrameStats] = []
        """What each step since the last reset took."""
        self._num_drawn = 0
        """Frames that were given a seed."""
        self._window = Window(model.device)
        self._clip = self._new_clip()
        self._codes: np.ndarray | None = None
        """Of the current frames, (B, S + N): their states', if the model says them, and views'."""
        self._anchor = np.zeros((0, 0), dtype=np.int64)
        """Image codes of the frames that they began from, (B, N), and of what has stood still since."""
        self._still = np.zeros((0, 0), dtype=np.int64)
        """For how many steps each of them has not changed, (B, N)."""
        self._context: dict[str, np.ndarray] = {}
        self._is_batch = False
        layout = model.config.layout
        self._num_states = layout.num_state_dims if layout.world_state else 0

    @property
    def image_codes(self) -> np.ndarray:
        """Codes of the current frames, all views in a row, (B, N)."""
        return self.current()[:, self._num_states :]

    @property
    def codes(self) -> dict[str, np.ndarray]:
        """View -> codes (B, R, Q) of the current frames."""
        return self.model.grids(self.image_codes)

    @property
    def state(self) -> np.ndarray | None:
        """The robot's state in the current frames, (S,) or (B, S) float32 in its units; None of a model that
        says none."""
        if not self._num_states:
            return None
        states_BS = self.model.builder.statistics.decode_states(self.current()[:, : self._num_states])
        return states_BS.astype(np.float32) if self._is_batch else states_BS[0].astype(np.float32)

    def reset(self, frame: Mapping[str, Any]) -> Frame:
        """Start from `frame` (an observation will do); return it as its codes show it."""
        views = list(self.model.config.layout.views)
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
        codes_BN = self.model.encode_frames(frames)
        context = {view: np.stack([np.asarray(f[view]) for f in frames]) for view in views}
        self.begin(codes_BN, self._encode_states(frame, len(codes_BN)), context)
        return self.frame()

    def begin(
        self, codes_BN: np.ndarray, states_BS: np.ndarray, context: dict[str, np.ndarray] | None = None
    ) -> None:
        """Start B worlds from codes: of all views, and of the states, (B, 0) of a model that says none.
        Without `context`, the frames themselves, they can `advance`, but are not drawn."""
        self.stats, self._window = [], Window(self.model.device)
        self._codes = np.concatenate((states_BS, codes_BN), 1).astype(np.int64)
        self._clip, self._anchor, self._context = self._new_clip(), codes_BN, context or {}
        self._still = np.zeros_like(codes_BN)
        if context is None:
            self._is_batch = True

    def step(self, action: np.ndarray) -> Frame:
        """Return the next frame after `action`, (7,) or (B, 7) in physical units; values outside the
        statistics' range are clipped.
        """
        self.advance(action)
        return self.frame()

    def advance(self, action: np.ndarray) -> None:
        """Take a step without drawing the frame, whose codes and state are there."""
        batch = len(self.current())
        num_dims = self.model.config.layout.num_action_dims
        expected = (batch, num_dims) if self._is_batch else (num_dims,)
        if np.shape(action) != expected:
            raise ValueError(f"the action must have shape {expected}, got {np.shape(action)}")
        actions_BA, current_BN = np.asarray(action, dtype=np.float32).reshape(-1, num_dims), self.current()
        if self._clip.num_done == self._clip.num_frames:
            self._anchor = np.where(self._still >= STILL, self.image_codes, self._anchor)
            self._clip.begin(self.prompts(actions_BA))
        else:
            actions_BA = self.model.builder.statistics.encode_world_actions(actions_BA)
            self._clip.act(to_ids(actions_BA, self.model.vocab.action))
        seeds = [self.seed + 1_000_003 * (self._num_drawn + row) for row in range(batch)]
        self._num_drawn += batch
        guess_BN = current_BN if self.speculative else None
        self._codes, stats = self._clip.decode(guess_BN, self._window, self.temperature, seeds)
        is_same_BN = (self._codes == current_BN)[:, self._num_states :]
        self._still = np.where(is_same_BN, self._still + 1, 0)
        self.stats.append(stats)

    def prompts(self, actions_BA: np.ndarray) -> list[Sample]:
        """Return what the model reads before the frames after these actions, in physical units, where a clip
        begins with the current frames."""
        builder = self.model.builder
        states, images = np.split(self.current(), [self._num_states], axis=1)
        return [
            builder.world_prompt(
                [builder.split_views(images[row])],
                actions_BA[row],
                states[row][None],
                builder.split_views(self._anchor[row]),
            )
            for row in range(len(actions_BA))
        ]

    def current(self) -> np.ndarray:
        """Return all codes of the current frames, (B, S + N): what decoding takes as its guess."""
        if self._codes is None:
            raise ValueError("the world has no frame yet: call reset(frame) first")
        return self._codes

    def keep(self, rows: np.ndarray) -> None:
        """Go on with these of the worlds alone: bool (B,), or indices, any of them several times."""
        if self._codes is None or not self._is_batch:
            raise ValueError("only a batch of worlds can be thinned: call reset with stacked frames first")
        self._codes, self._anchor = self._codes[rows], self._anchor[rows]
        self._still = self._still[rows]
        self._clip.keep(rows)
        self._context = {view: images[rows] for view, images in self._context.items()}

    def frame(self) -> Frame:
        """Return the current frame, decoded."""
        frames = self.model.decode_frames(self.image_codes, self._context)
        return frames if self._is_batch else {view: images[0] for view, images in frames.items()}

    def _new_clip(self) -> ClipDecoder:
        model = self.model
        return ClipDecoder(model.runner, model.vocab, *model.builder.world_clip())

    def _encode_states(self, frame: Mapping[str, Any], number: int) -> np.ndarray:
        """Return the codes (B, S) of the states of a first frame."""
        if not self._num_states:
            return np.zeros((number, 0), dtype=np.int64)
        if frame.get("state") is None:
            raise ValueError(
                f"the model begins from frames and a state, got the keys {sorted(frame)}: add 'state'"
            )
        states = np.asarray(frame["state"], dtype=np.float64)
        expected = (number, self._num_states) if self._is_batch else (self._num_states,)
        if states.shape != expected or not np.isfinite(states).all():
            raise ValueError(f"the state must be finite and have shape {expected}, got {states.shape}")
        return self.model.builder.statistics.encode_states(states.reshape(number, -1)).astype(np.int64)
