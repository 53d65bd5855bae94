"""A sample -> a table in colour: ids by kind, with chunk, row and column. Look at one before every run."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, KIND_STATE, Sample
from worldvla.config import Config
from worldvla.data.sample import SampleBuilder, prompt_texts
from worldvla.tokenizers.action import Statistics
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import NUM_BIN_CODES, chameleon, compact, to_codes

NAMES = {
    KIND_PROMPT: "prompt",
    KIND_ACTION: "action",
    KIND_IMAGE: "image",
    KIND_LAYOUT: "layout",
    KIND_STATE: "state",
}
COLORS = {
    KIND_PROMPT: "bright_black",
    KIND_ACTION: "dark_orange",
    KIND_IMAGE: "deep_sky_blue1",
    KIND_LAYOUT: "green",
    KIND_STATE: "magenta",
}
FAKE_CODES = 1024


@dataclass(frozen=True)
class CountedWords:
    """Stands in for the published text tokenizer, which is not ours to ship: word i gets code `first` + i."""

    first: int = 0
    size: int = 300

    def encode(self, text: str) -> list[int]:
        return [self.first + i for i, _ in enumerate(text.split())]


def fake(config: Config, mode: str, seed: int) -> tuple[SampleBuilder, Sample]:
    """Return a builder of the recipe's layout and a sample of random codes, states and actions."""
    layout, rng, task = config.layout, np.random.default_rng(seed), "open the drawer"
    is_published = config.vocab == "chameleon"
    text = (
        CountedWords(20_000)
        if is_published
        else TextTokenizer.train(prompt_texts(layout, [task]), config.num_text)
    )
    levels = config.model.code_levels
    codes = math.prod(levels) if levels else FAKE_CODES
    vocab = chameleon() if is_published else compact(codes, text.size, image_last=bool(levels))
    action, state = (1.0,) * layout.num_action_dims, (1.0,) * layout.num_state_dims
    ranges = (tuple(-x for x in action), action, tuple(-x for x in state), state)
    builder = SampleBuilder(layout, vocab, text, Statistics(*ranges, kind="minmax"))
    num_frames = layout.clip + 1 if mode == "world" else layout.history
    frames = [
        [rng.integers(0, len(vocab.image), n) for n in layout.codes_per_view] for _ in range(num_frames)
    ]
    num_actions = layout.clip if mode == "world" else layout.chunk
    actions = rng.uniform(-1, 1, (num_actions, layout.num_action_dims))
    if mode == "world":
        states = rng.integers(0, NUM_BIN_CODES, (num_frames, layout.num_state_dims))
        return builder, builder.world(frames[:-1], actions, frames[-1], states, frames[0])
    return builder, builder.policy(task, rng.uniform(-1, 1, layout.num_state_dims), frames, actions)


def lines(sample: Sample, builder: SampleBuilder) -> Iterator[slice]:
    """Yield the stretches to print on one line: a text, a row of an image, a block, a separator."""
    vocab, ids = builder.vocab, sample.ids.tolist()
    ends = {vocab.newline, vocab.eoi, vocab.eoa, vocab.eostate, vocab.sep}
    begins = {vocab.boi, vocab.boa, vocab.bostate}
    start = 0
    for i in range(1, len(ids) + 1):
        next_row = i < len(ids) and sample.row[i] != sample.row[i - 1] and sample.row[i] and sample.row[i - 1]
        if i == len(ids) or ids[i - 1] in ends or ids[i] in begins or next_row:
            yield slice(start, i)
            start = i


def meaning(ids: np.ndarray, builder: SampleBuilder) -> str:
    """Return what a line says: the text, or the physical values of an action or a state."""
    vocab, statistics = builder.vocab, builder.statistics
    for begin, span, decode in (
        (vocab.boa, vocab.action, statistics.decode_actions),
        (vocab.bostate, vocab.state, statistics.decode_states),
    ):
        if ids[0] == begin:
            return " ".join(f"{value:+.3f}" for value in decode(to_codes(ids[1:-1], span)))
    if ids[0] == vocab.bos and isinstance(builder.text, TextTokenizer):
        return builder.text.decode(to_codes(ids[1:], vocab.text).tolist())
    names = {vocab.sep: "sep", vocab.boi: "image", vocab.bos: "text"}
    return names.get(int(ids[0]), "")


def show(sample: Sample, builder: SampleBuilder, title: str) -> Table:
    """Return the sample as a table, one line of `lines` each, its size and number of targets in the title."""
    title += f": {len(sample)} tokens, {int((sample.kind != KIND_PROMPT).sum())} of them targets"
    table = Table(
        title=f"{title}, vocabulary {builder.vocab.name}",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    for name in ("at", "ids", "kind", "chunk", "row", "col", "meaning"):
        table.add_column(name, justify="right" if name == "at" else "left", overflow="fold")
    for part in lines(sample, builder):
        kinds = sample.kind[part].tolist()
        ids = Text(" ").join(
            Text(str(i), COLORS[k]) for i, k in zip(sample.ids[part].tolist(), kinds, strict=True)
        )
        kind = Text(" ").join(Text(NAMES[k], COLORS[k]) for k in dict.fromkeys(kinds))
        runs = (span(getattr(sample, name)[part]) for name in ("chunk", "row", "col"))
        table.add_row(str(part.start), ids, kind, *runs, meaning(sample.ids[part], builder))
    return table


def span(values: np.ndarray) -> str:
    """Return '3' or '1..16' for the non-zero values, nothing for zeros alone."""
    values = values[values > 0]
    if not values.size:
        return ""
    return str(values[0]) if values.min() == values.max() else f"{values.min()}..{values.max()}"
