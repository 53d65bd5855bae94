"""Print one training sample in colour: ids by kind, with chunk, row and column; look before every run.

python tools/show_sample.py tabletop --frame 100             policy sample at a frame of the recipe's stores
python tools/show_sample.py out/train/tabletop --mode world  a run's or checkpoint's config.json works too
python tools/show_sample.py libero_256_goal --fake              random codes in its layout; needs no files
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, Sample
from worldvla.config import Config, from_json
from worldvla.data.sample import SampleBuilder, prompt_texts
from worldvla.recipes import recipe
from worldvla.tokenizers.action import Statistics
from worldvla.tokenizers.text import TextTokenizer
from worldvla.train.build import build
from worldvla.vocab import chameleon, compact, to_codes

NAMES = {KIND_PROMPT: "prompt", KIND_ACTION: "action", KIND_IMAGE: "image", KIND_LAYOUT: "layout"}
COLORS = {
    KIND_PROMPT: "bright_black",
    KIND_ACTION: "dark_orange",
    KIND_IMAGE: "deep_sky_blue1",
    KIND_LAYOUT: "green",
}
FAKE_CODES = 1024


@dataclass(frozen=True)
class CountedWords:
    """Stands in for the published text tokenizer, which is not ours to ship: word i gets code `first` + i."""

    first: int = 20000
    size: int = 65536

    def encode(self, text: str) -> list[int]:
        return [self.first + i for i, _ in enumerate(text.split())]


def fake(config: Config, mode: str, seed: int) -> tuple[SampleBuilder, Sample]:
    """Return a builder of the recipe's layout and a sample of random codes, states and actions."""
    layout, rng, task = config.layout, np.random.default_rng(seed), "open the drawer"
    is_published = config.vocab == "chameleon"
    text = (
        CountedWords() if is_published else TextTokenizer.train(prompt_texts(layout, [task]), config.num_text)
    )
    vocab = chameleon() if is_published else compact(FAKE_CODES, text.size)
    action, state = (1.0,) * layout.num_action_dims, (1.0,) * layout.num_state_dims
    ranges = (tuple(-x for x in action), action, tuple(-x for x in state), state)
    builder = SampleBuilder(layout, vocab, text, Statistics(*ranges, kind="minmax"))
    frames = [
        [rng.integers(0, len(vocab.image), n) for n in layout.codes_per_view]
        for _ in range(layout.history + 1)
    ]
    actions = rng.uniform(-1, 1, (layout.chunk, layout.num_action_dims))
    if mode == "world":
        return builder, builder.world(frames[:1], actions[0], frames[1])
    return builder, builder.policy(task, rng.uniform(-1, 1, layout.num_state_dims), frames[1:], actions)


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
    """Return the sample as a table, one line of `lines` each."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a recipe, or a directory with config.json")
    parser.add_argument("--mode", choices=("policy", "world"), default="policy")
    parser.add_argument("--frame", type=int, default=0, help="frame of the stores at which the sample starts")
    parser.add_argument("--store", action="append", help="store directories instead of the recipe's")
    parser.add_argument("--tokenizer", help="image tokenizer directory instead of the recipe's")
    parser.add_argument("--fake", action="store_true", help="random values; --frame is the seed")
    parser.add_argument("--width", type=int, help="columns of the output; default: the terminal's")
    options = parser.parse_args(arguments)

    path = Path(options.config) / "config.json"
    config = from_json(Config, json.loads(path.read_text())) if path.exists() else recipe(options.config)
    stores, tokenizer = options.store or config.data.stores, options.tokenizer or config.tokenizer
    config = replace(config, tokenizer=tokenizer, data=replace(config.data, stores=tuple(stores)))
    if options.fake:
        builder, sample = fake(config, options.mode, options.frame)
    else:
        pieces = build(config)
        builder, sample = pieces.builder, pieces.loader.sample(options.frame, options.mode)
    targets = int((sample.kind != KIND_PROMPT).sum())
    counts = f"{len(sample)} tokens, {targets} of them targets"
    title = f"{config.name} {options.mode}: {counts}, vocabulary {builder.vocab.name}"
    Console(width=options.width).print(show(sample, builder, title))


if __name__ == "__main__":
    main()
