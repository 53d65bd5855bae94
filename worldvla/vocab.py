"""The id table: which ids are text, image codes, actions, state, and structure. Nobody else knows a number.

Three kinds of integer are kept apart: an `id` indexes the joint vocabulary (and the embedding table), a
`code` counts from 0 inside one modality. Source of the published table: WorldVLA
data/item_processor.py:60-63, 202-208, 253-316.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np

NUM_BIN_CODES = 256
"""Codes of one action or state dimension: digit - 1 of `np.digitize` over 256 edges (WorldVLA
item_processor.py:303-316)."""


@dataclass(frozen=True)
class Vocab:
    """Ranges are half-open (start, stop) pairs; `image`, `action` and `state` are exposed as `range` objects.

    `newline` and `grid_start` are None in compact tables, whose image blocks carry no row ends and no grid
    sizes.
    """

    name: str
    size: int
    bos: int
    eos: int
    pad: int
    sep: int
    boi: int
    eoi: int
    boa: int
    eoa: int
    bostate: int
    eostate: int
    image_start: int
    num_image_codes: int
    action_start: int
    state_start: int
    text_start: int
    num_text: int
    """Ids text_start .. text_start + num_text - 1 are the text tokenizer's (its index 0 is text_start)."""
    newline: int | None = None
    grid_start: int | None = None
    """Id of grid count 0; a side of n patches of 32 pixels is grid_start + n."""

    def __post_init__(self) -> None:
        spans = {"image": self.image, "action": self.action, "state": self.state}
        for name, span in spans.items():
            if span.start < 0 or span.stop > self.size:
                raise ValueError(f"vocabulary {self.name}: {name} ids {span} leave [0, {self.size})")
        for name in ("bos", "eos", "pad", "sep", "boi", "eoi", "boa", "eoa", "bostate", "eostate"):
            id_ = getattr(self, name)
            inside = [other for other, span in spans.items() if id_ in span]
            if inside or not 0 <= id_ < self.size:
                raise ValueError(
                    f"vocabulary {self.name}: {name}={id_} collides with {inside} or leaves [0, {self.size})"
                )

    @property
    def image(self) -> range:
        return range(self.image_start, self.image_start + self.num_image_codes)

    @property
    def action(self) -> range:
        return range(self.action_start, self.action_start + NUM_BIN_CODES)

    @property
    def state(self) -> range:
        return range(self.state_start, self.state_start + NUM_BIN_CODES)

    @property
    def text(self) -> range:
        return range(self.text_start, self.text_start + self.num_text)

    def digest(self) -> str:
        """Sixteen hex digits that change whenever any id of the table does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def chameleon() -> Vocab:
    """Return the published 65,536-id table of Chameleon, WorldVLA and RynnVLA-002."""
    return Vocab(
        name="chameleon",
        size=65536,
        bos=0,
        pad=1,
        eos=2,
        sep=8710,
        boi=8197,
        eoi=8196,
        boa=10004,
        eoa=15004,
        bostate=15504,
        eostate=16004,
        image_start=4,
        num_image_codes=8192,
        action_start=10006,
        state_start=15506,
        text_start=0,  # the published BPE file already speaks joint ids
        num_text=65536,
        newline=8803,
        grid_start=8804,
    )


def compact(num_image_codes: int, num_text: int, image_last: bool = False) -> Vocab:
    """Return a table for small models: specials, then text, image codes, action bins, state bins.

    `image_last`: image codes after all others, for models that read them by their levels and keep no row of a
    table for each (ModelConfig.code_levels).
    """
    names = ("bos", "pad", "eos", "sep", "boi", "eoi", "boa", "eoa", "bostate", "eostate")
    specials = {name: index for index, name in enumerate(names)}
    text_start = len(names)
    after_text = text_start + num_text
    action_start = after_text + (0 if image_last else num_image_codes)
    state_start = action_start + NUM_BIN_CODES
    image_start = state_start + NUM_BIN_CODES if image_last else after_text
    return Vocab(
        name="compact",
        size=after_text + num_image_codes + 2 * NUM_BIN_CODES,
        **specials,
        text_start=text_start,
        num_text=num_text,
        image_start=image_start,
        num_image_codes=num_image_codes,
        action_start=action_start,
        state_start=state_start,
    )


def to_ids(codes: np.ndarray, span: range) -> np.ndarray:
    """Return ids of `codes` in `span`; a code outside raises ValueError."""
    codes = np.asarray(codes, dtype=np.int64)
    if codes.size and (codes.min() < 0 or codes.max() >= len(span)):
        raise ValueError(f"codes must be in [0, {len(span)}), got {codes.min()}..{codes.max()}")
    return codes + span.start


def to_codes(ids: np.ndarray, span: range) -> np.ndarray:
    """Return codes of `ids` in `span`; an id outside raises ValueError (published code clips it silently)."""
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and (ids.min() < span.start or ids.max() >= span.stop):
        raise ValueError(f"ids must be in [{span.start}, {span.stop}), got {ids.min()}..{ids.max()}")
    return ids - span.start
