"""Instruction, state, image codes, actions -> Sample: the only place that knows the order of a sequence.

policy  bos text [STATE] IMG.. sep | ACT x U sep
world   bos text [IMG..] FRAME ([ACT] sep FRAME) x C sep   C = layout.clip, published: 1; the first is given,
                                                        and with layout.anchor an earlier one before it
FRAME   [STATE] IMG..                                   STATE with layout.world_state
IMG     boi [h w] (a row of codes [newline]) x R eoi     h, w and newlines only where the vocabulary has them
ACT     boa a1..aA eoa        STATE  bostate s1..sS eostate

Sources: WorldVLA data/{action,world}_model_conv_generation.py; with state and two views RynnVLA-002.
Everything up to and with the first `sep` is the prompt; training and inference build it by the same lines.
Frames go oldest first; the views of a frame stand next to each other. U actions of a chunk, A dims, S state
dims, N codes of a view.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, KIND_STATE, Sample
from worldvla.config import LayoutConfig
from worldvla.tokenizers.action import DatasetStatistics, Statistics, choose
from worldvla.vocab import Vocab, to_ids

ROWS = tuple(f.name for f in fields(Sample))
"""Rows of a template's table, in the order of Sample's fields: ids first."""
DTYPES = {"ids": np.int64, "chunk": np.int16, "kind": np.uint8, "row": np.int16, "col": np.int16}
MAX_TEMPLATES = 1024
"""Templates that a builder keeps, the last written: a server reads texts without end."""
CODES_PER_GRID_PATCH = 2
"""A grid count is in patches of 32 pixels, a code covers 16 (WorldVLA data/item_processor.py:260-300)."""


class Text(Protocol):
    """What a builder needs of a text tokenizer."""

    @property
    def size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Template:
    """A whole sequence whose state, image and action codes are still open (they hold code 0)."""

    table: np.ndarray
    """(5, T) int64: ids, chunk, kind, row, col."""
    prompt: int
    """Tokens before what decoding writes: the chunk, or the last frame."""
    states: np.ndarray
    """Positions of the state codes: (1, S) in a policy template, (C + 1, S) in a world template with states;
    else (0, S)."""
    images: tuple[tuple[np.ndarray, ...], ...]
    """Positions of the image codes, (N,) a frame and view; of a world template the first frame is given, and
    with layout.anchor the second."""
    actions: np.ndarray
    """Positions of the action dims: (U, A); in a world template (C, A), or (0, A) without conditioning."""
    lead: int = 0
    """Of a world template: tokens before the first frame and its state, which stay the same in a rollout."""

    def __len__(self) -> int:
        return self.table.shape[1]

    def fill(
        self,
        ids: np.ndarray,
        frames: Iterable[Sequence[np.ndarray]],
        actions: np.ndarray | None,
        states: np.ndarray | None = None,
    ) -> None:
        """Write what is open into `ids` (T,), a copy of the table's first row. All are ids of the vocabulary:
        `frames`, oldest first, (N,) a view; `actions` (U, A) or (C, A); `states` (F, S), oldest first. What
        is None and frames and states that are missing stay open."""
        for positions, frame in zip(self.images, frames, strict=False):
            for places, codes in zip(positions, frame, strict=True):
                ids[places] = codes
        if actions is not None:
            ids[self.actions] = actions
        if states is not None:
            ids[self.states[: len(states)]] = states


class SampleBuilder:
    """Builds samples from physical values and image codes; caches one template per instruction and length."""

    def __init__(
        self, layout: LayoutConfig, vocab: Vocab, text: Text, statistics: Statistics | DatasetStatistics
    ) -> None:
        self.layout, self.vocab, self.text, self.all_statistics = layout, vocab, text, statistics
        if text.size > len(vocab.text):
            raise ValueError(
                f"the text tokenizer has {text.size} tokens, "
                f"vocabulary {vocab.name} has room for {len(vocab.text)}: raise num_text"
            )
        for own in statistics.sets.values() if isinstance(statistics, DatasetStatistics) else (statistics,):
            self._check_dims(own)
        if vocab.grid_start is not None and any(
            side % CODES_PER_GRID_PATCH for grid in layout.grids for side in grid
        ):
            raise ValueError(
                f"vocabulary {vocab.name} counts codes in pairs, got grids {layout.grids}: use even sides"
            )
        self._templates: dict[tuple[str | None, int], Template] = {}

    @property
    def statistics(self) -> Statistics:
        """Those of the only dataset; of several, ValueError says how to choose one."""
        return choose(self.all_statistics, "")

    def only(self, key: str) -> "SampleBuilder":
        """Return a builder that knows the statistics of the dataset `key` alone."""
        own = choose(self.all_statistics, key)
        statistics = DatasetStatistics({key: own}) if key else own
        return SampleBuilder(self.layout, self.vocab, self.text, statistics)

    def _check_dims(self, statistics: Statistics) -> None:
        dims = [("action", len(statistics.action_low), self.layout.num_action_dims)]
        has_states = self.layout.state or self.layout.world_state
        dims += [("state", len(statistics.state_low), self.layout.num_state_dims)] if has_states else []
        for name, got, expected in dims:
            if got != expected:
                raise ValueError(f"statistics have {got} {name} dims, the layout {expected}: use its own")

    def policy_prompt(
        self,
        instruction: str,
        state: np.ndarray | None,
        frames: Sequence[Sequence[np.ndarray]],
        unnorm_key: str = "",
    ) -> Sample:
        """Return everything before the first action.

        `frames`: 1..O frames, oldest first, each the codes (N,) of every view. `unnorm_key`: the dataset
        whose statistics the state is read by.
        """
        template = self.policy_template(instruction, len(frames))
        state = self._policy_state(state, unnorm_key)
        return self._fill(template, frames, None, state, template.prompt)

    def policy(
        self,
        instruction: str,
        state: np.ndarray | None,
        frames: Sequence[Sequence[np.ndarray]],
        actions_UA: np.ndarray,
    ) -> Sample:
        """Return a policy sample; `state` (S,) and `actions_UA` (U, A) in physical units."""
        template = self.policy_template(instruction, len(frames))
        if np.shape(actions_UA) != template.actions.shape:
            raise ValueError(
                f"a policy sample needs actions of shape {template.actions.shape}, got {np.shape(actions_UA)}"
            )
        actions = to_ids(self.statistics.encode_actions(actions_UA), self.vocab.action)
        return self._fill(template, frames, actions, self._policy_state(state))

    def world_prompt(
        self,
        frames: Sequence[Sequence[np.ndarray]],
        actions: np.ndarray | None,
        states: np.ndarray | None = None,
        anchor: Sequence[np.ndarray] | None = None,
    ) -> Sample:
        """Return everything before the next frame: C frames, oldest first, and the action after each, (C, A)
        or (A,) of one; unused without conditioning. `states`: the codes (C, S) of each frame's, with
        layout.world_state; `anchor`: an earlier frame, with layout.anchor."""
        number, template = len(frames), self.world_template(len(frames))
        codes, actions = self._world_states(states, number), self._action_ids(actions, number)
        return self._fill(template, self._anchored(frames, anchor), actions, codes, template.prompt)

    def world(
        self,
        frames: Sequence[Sequence[np.ndarray]],
        actions: np.ndarray | None,
        next_frame: Sequence[np.ndarray],
        states: np.ndarray | None = None,
        anchor: Sequence[np.ndarray] | None = None,
    ) -> Sample:
        """Return a world sample: C frames, the action (C, A) after each, and the frame after the last;
        `states`: the codes (C + 1, S) of all, with layout.world_state; `anchor`: an earlier frame, with
        layout.anchor."""
        number, template = len(frames), self.world_template(len(frames))
        codes, every = self._world_states(states, number + 1), self._anchored([*frames, next_frame], anchor)
        return self._fill(template, every, self._action_ids(actions, number), codes)

    def action_block_positions(self, prompt: int) -> np.ndarray:
        """Return the positions (U, A + 2) of each action's begin, dims and end after `prompt` tokens."""
        block = self.layout.num_action_dims + 2
        return prompt + np.arange(self.layout.chunk * block).reshape(self.layout.chunk, block)

    def policy_tail(self) -> Sample:
        """Return what follows a policy prompt: U blocks and the closing separator, code 0 in every dim."""
        template = self.policy_template("", 1)
        return as_sample(template.table[:, template.prompt :])

    def world_tail(self) -> Sample:
        """Return what follows a world prompt, code 0 where the kind is KIND_STATE or KIND_IMAGE; the rest is
        forced."""
        template = self.world_template()
        return as_sample(template.table[:, template.prompt :])

    def world_clip(self) -> tuple[Sample, np.ndarray, int]:
        """Return what follows a world prompt of one frame up to the last frame of a clip; where in it the
        actions after each frame but the first stand, (C - 1, A) or (C - 1, 0); and how many tokens stand
        before the first frame."""
        whole, prompt = self.world_template(self.layout.clip), self.world_template().prompt
        num_dims = self.layout.num_action_dims * self.layout.action_conditioning
        actions = whole.actions[1:].reshape(self.layout.clip - 1, num_dims) - prompt
        return as_sample(whole.table[:, prompt:]), actions, whole.lead

    def split_views(self, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the codes (N,) of every view from those of a whole frame, in order of generation."""
        return tuple(np.split(np.asarray(codes), np.cumsum(self.layout.codes_per_view)[:-1]))

    def policy_template(self, instruction: str, num_frames: int) -> Template:
        """Return the template of a policy sample with 1..O frames."""
        if not 1 <= num_frames <= self.layout.history:
            raise ValueError(
                f"a policy sample holds 1..{self.layout.history} frames (layout.history), got {num_frames}"
            )
        key = (instruction, num_frames)
        if key not in self._templates:
            self._templates[key] = self._write_policy(instruction, num_frames)
            while len(self._templates) > MAX_TEMPLATES:
                del self._templates[next(iter(self._templates))]
        return self._templates[key]

    def world_template(self, num_frames: int = 1) -> Template:
        """Return the template of a world sample with 1..C frames before the last one."""
        if not 1 <= num_frames <= self.layout.clip:
            raise ValueError(
                f"a world sample holds 1..{self.layout.clip} frames before the last (layout.clip), "
                f"got {num_frames}"
            )
        key = (None, num_frames)
        if key not in self._templates:
            self._templates[key] = self._write_world(num_frames)
        return self._templates[key]

    def _write_policy(self, instruction: str, num_frames: int) -> Template:
        layout, vocab, draft = self.layout, self.vocab, _Draft()
        self._write_text(draft, layout.policy_prompt.format(task=instruction))
        states = [self._write_state(draft)] if layout.state else []
        images = tuple(self._write_frame(draft) for _ in range(num_frames))
        draft.add(vocab.sep)
        prompt, draft.kind = len(draft), KIND_ACTION
        actions = [
            self._write_action(draft, k if layout.selective_mask else 0) for k in range(1, layout.chunk + 1)
        ]
        draft.add(vocab.sep)
        return Template(draft.table(), prompt, self._places(states), images, np.array(actions))

    def _write_world(self, num_frames: int) -> Template:
        layout, vocab, draft = self.layout, self.vocab, _Draft()
        self._write_text(draft, layout.world_prompt)
        images, actions, prompt = [self._write_frame(draft)] if layout.anchor else [], [], 0
        lead = len(draft)
        states = [self._write_state(draft)] if layout.world_state else []
        images.append(self._write_frame(draft))
        for t in range(1, num_frames + 1):
            draft.kind = KIND_PROMPT
            if layout.action_conditioning:
                actions.append(self._write_action(draft, 0))
            draft.add(vocab.sep)
            prompt, draft.kind = len(draft), KIND_LAYOUT
            states += [self._write_state(draft, KIND_STATE)] if layout.world_state else []
            images.append(self._write_frame(draft, KIND_IMAGE))
            if layout.frame_at_once:
                draft.join(images[-1][0][0] - 1, images[-1][-1][-1], -t)
        draft.add(vocab.sep)
        positions = np.array(actions, dtype=np.int64).reshape(-1, layout.num_action_dims)
        return Template(draft.table(), prompt, self._places(states), tuple(images), positions, lead)

    def _write_text(self, draft: "_Draft", text: str) -> None:
        draft.add(self.vocab.bos)
        for id_ in to_ids(np.array(self.text.encode(text), dtype=np.int64), self.vocab.text).tolist():
            draft.add(id_)

    def _write_state(self, draft: "_Draft", kind: int = KIND_PROMPT) -> list[int]:
        draft.add(self.vocab.bostate)
        positions = [draft.add(self.vocab.state.start, kind) for _ in range(self.layout.num_state_dims)]
        draft.add(self.vocab.eostate)
        return positions

    def _places(self, states: list[list[int]]) -> np.ndarray:
        return np.array(states, dtype=np.int64).reshape(-1, self.layout.num_state_dims)

    def _write_frame(self, draft: "_Draft", kind: int = KIND_PROMPT) -> tuple[np.ndarray, ...]:
        """Write one image block a view; the places of a view start after those of the views before it."""
        vocab, above, left, views = self.vocab, 0, 0, []
        for rows, cols in self.layout.grids:
            draft.add(vocab.boi)
            if vocab.grid_start is not None:
                draft.add(vocab.grid_start + rows // CODES_PER_GRID_PATCH)
                draft.add(vocab.grid_start + cols // CODES_PER_GRID_PATCH)
            positions = []
            for row in range(above + 1, above + rows + 1):
                positions += [
                    draft.add(vocab.image.start, kind, row=row, col=left + c + 1) for c in range(cols)
                ]
                if vocab.newline is not None:
                    draft.add(vocab.newline)
            draft.add(vocab.eoi)
            views.append(np.array(positions))
            above, left = above + rows, left + cols
        return tuple(views)

    def _write_action(self, draft: "_Draft", chunk: int) -> list[int]:
        draft.add(self.vocab.boa, chunk=chunk)
        positions = [
            draft.add(self.vocab.action.start, chunk=chunk) for _ in range(self.layout.num_action_dims)
        ]
        draft.add(self.vocab.eoa, chunk=chunk)
        return positions

    def _fill(
        self,
        template: Template,
        frames: Sequence[Sequence[np.ndarray]],
        actions: np.ndarray | None,
        states: np.ndarray | None = None,
        stop: int | None = None,
    ) -> Sample:
        """Return the first `stop` tokens of the template, filled; `frames` in codes, the rest in ids."""
        table = template.table.copy()
        template.fill(table[0], map(self._frame_ids, frames), actions, states)
        return as_sample(table[:, :stop])

    def _policy_state(self, state: np.ndarray | None, key: str = "") -> np.ndarray | None:
        if not self.layout.state:
            return None
        if state is None:
            raise ValueError(
                f"the layout has state tokens, got no state: pass {self.layout.num_state_dims} values"
            )
        return to_ids(choose(self.all_statistics, key).encode_states(state), self.vocab.state)[None]

    def _anchored(
        self, frames: Sequence[Sequence[np.ndarray]], anchor: Sequence[np.ndarray] | None
    ) -> list[Sequence[np.ndarray]]:
        if not self.layout.anchor:
            return list(frames)
        if anchor is None:
            raise ValueError("world samples begin with an earlier frame here (layout.anchor), got none")
        return [anchor, *frames]

    def _world_states(self, codes: np.ndarray | None, number: int) -> np.ndarray | None:
        if not self.layout.world_state:
            return None
        expected = (number, self.layout.num_state_dims)
        if codes is None or np.shape(codes) != expected:
            shape = "none" if codes is None else f"shape {np.shape(codes)}"
            raise ValueError(
                f"world samples hold states here: expected codes of shape {expected}, got {shape}"
            )
        return to_ids(codes, self.vocab.state)

    def _action_ids(self, actions: np.ndarray | None, number: int) -> np.ndarray | None:
        if not self.layout.action_conditioning:
            return None
        expected = (number, self.layout.num_action_dims)
        if actions is None or np.shape(actions := np.atleast_2d(actions)) != expected:
            shape = "none" if actions is None else f"shape {np.shape(actions)}"
            raise ValueError(
                f"a world sample of {number} frames needs actions of shape {expected}, got {shape}"
            )
        return to_ids(self.statistics.encode_world_actions(actions), self.vocab.action)

    def _frame_ids(self, frame: Sequence[np.ndarray]) -> list[np.ndarray]:
        views, sizes = self.layout.views, self.layout.codes_per_view
        if len(frame) != len(views):
            raise ValueError(f"a frame needs the codes of {len(views)} views {views}, got {len(frame)}")
        codes = [np.asarray(view).reshape(-1) for view in frame]
        for view, size, own in zip(views, sizes, codes, strict=True):
            if own.size != size:
                raise ValueError(f"view {view} needs {size} codes, got {own.size}: check image size")
        return [to_ids(own, self.vocab.image) for own in codes]


class _Draft:
    """A sequence being written token by token; `kind` is given to tokens that bring none of their own."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int, int, int, int]] = []
        self.kind = KIND_PROMPT

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, id_: int, kind: int = KIND_PROMPT, *, chunk: int = 0, row: int = 0, col: int = 0) -> int:
        """Append one token and return its position."""
        self.tokens.append((id_, chunk, kind or self.kind, row, col))
        return len(self.tokens) - 1

    def join(self, start: int, stop: int, chunk: int) -> None:
        """Give the tokens start .. stop - 1 this chunk."""
        for at in range(start, stop):
            id_, _, kind, row, col = self.tokens[at]
            self.tokens[at] = id_, chunk, kind, row, col

    def table(self) -> np.ndarray:
        return np.ascontiguousarray(np.array(self.tokens, dtype=np.int64).T)


def as_sample(table: np.ndarray) -> Sample:
    """Return a table (5, T) of a template as a sample."""
    return Sample(**{name: table[i].astype(DTYPES[name]) for i, name in enumerate(ROWS)})


def prompt_texts(layout: LayoutConfig, instructions: Iterable[str]) -> list[str]:
    """Return every text that a model of this layout reads: what a compact text tokenizer is trained on."""
    return [layout.policy_prompt.format(task=task) for task in sorted(set(instructions))] + [
        layout.world_prompt
    ]
