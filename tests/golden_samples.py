"""The golden samples: known frames, states and actions in every layout, as JSON that a person can read.

python tests/golden_samples.py   rewrites tests/golden/sample_*.json (part of `make golden`)

Layouts, K and ranges of the published systems are those of `worldvla.published.names.RELEASES`.

Text ids are not real: word i of a text is code FIRST_WORD + i (`CountedWords`), 0 + i in the compact table.
Frame f of view v holds the codes 1000 f + 500 v, +1, +2, ... in the published table, 20 f + 10 v in ours.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_PROMPT, Sample
from worldvla.config import LayoutConfig
from worldvla.data.sample import SampleBuilder
from worldvla.data.show import CountedWords
from worldvla.published.names import RELEASES
from worldvla.tokenizers.action import RYNNVLA, WORLDVLA, Statistics
from worldvla.vocab import Vocab, chameleon, compact

GOLDEN = Path(__file__).parent / "golden"
KINDS = {KIND_PROMPT: "prompt", KIND_ACTION: "action", KIND_IMAGE: "image", KIND_LAYOUT: "layout"}
FIRST_WORD = 20000
TASK = "open the middle drawer of the cabinet"
ACTIONS = np.array([[0, 0.1 * k, -0.1 * k, 0.05 * k, 0, -0.3, (-1) ** k] for k in range(5)])
STATE = np.array([0.0, 0.1, 0.9, 3.1, 0.0, 0.0, 0.02, -0.02])

WORLDVLA_256 = RELEASES["worldvla_256"].layout
RYNNVLA_256 = RELEASES["rynnvla_256"].layout
TINY = LayoutConfig(
    views=("agentview", "wrist"), grids=((2, 3), (1, 2)), history=2, chunk=2, num_action_dims=2, state=True,
    num_state_dims=3, policy_prompt="{task}", world_prompt="imagine",
)  # fmt: skip
TINY_STATISTICS = Statistics((-1.0, -1.0), (1.0, 1.0), (0.0,) * 3, (1.0,) * 3, "minmax")


def published(layout: LayoutConfig, statistics: Statistics) -> SampleBuilder:
    return SampleBuilder(layout, chameleon(), CountedWords(first=FIRST_WORD), statistics)


def release_builder(name: str, suite: str = "libero_goal") -> SampleBuilder:
    """Return the builder of a converted release: its layout, its suite's K, its ranges."""
    facts = RELEASES[name]
    layout = replace(facts.layout, chunk=facts.chunks[suite]) if facts.chunks else facts.layout
    statistics = {"worldvla": WORLDVLA, "rynnvla": RYNNVLA}[facts.actions]
    if layout.state:
        statistics = replace(statistics, state_low=RYNNVLA.state_low, state_high=RYNNVLA.state_high)
    return published(layout, statistics)


def tiny(**changes: object) -> SampleBuilder:
    """Return a builder over the compact table of 40 image codes and 5 words."""
    layout = replace(TINY, **changes)  # pyright: ignore[reportArgumentType]
    return SampleBuilder(layout, compact(40, 5), CountedWords(size=5), TINY_STATISTICS)


def frames(builder: SampleBuilder, count: int, first: int = 0) -> list[list[np.ndarray]]:
    """Return `count` frames with numbered codes."""
    step = 1000 if builder.vocab.name == "chameleon" else 20
    codes = builder.layout.codes_per_view
    return [
        [f * step + v * step // 2 + np.arange(n) for v, n in enumerate(codes)]
        for f in range(first, first + count)
    ]


def cases() -> Iterator[tuple[str, str, Vocab, Sample]]:
    """Yield every golden sample: name, what it is, its vocabulary, the sample."""
    first = "WorldVLA 256 px at an episode's first frame: one image"
    both = "RynnVLA-002 Action_World_model_512: state, two views, M=2, K=5"
    for name, release, suite, count, about in (
        ("worldvla_policy", "worldvla_256", "goal", 2, "WorldVLA 256 px, M=2, K=5"),
        ("worldvla_policy_first", "worldvla_256", "goal", 1, first),
        ("worldvla_10_policy", "worldvla_256", "10", 2, "WorldVLA 256 px on LIBERO-10, M=2, K=10"),
        ("worldvla_512_policy", "worldvla_512", "goal", 2, "WorldVLA 512 px, M=2, K=5"),
        ("worldvla_512_10_policy", "worldvla_512", "10", 2, "WorldVLA 512 px on LIBERO-10, M=2, K=10"),
        ("rynnvla_policy", "rynnvla_256", "goal", 2, "RynnVLA-002 256 px: state, two views, M=2, K=5"),
        ("rynnvla_spatial_policy", "rynnvla_256", "spatial", 2, "RynnVLA-002 256 px on spatial, M=2, K=10"),
        ("rynnvla_512_policy", "rynnvla_action_world_512", "goal", 2, both),
    ):
        make = release_builder(release, f"libero_{suite}")
        actions = np.concatenate([ACTIONS, -ACTIONS])[: make.layout.chunk]
        yield name, about, make.vocab, make.policy(TASK, STATE, frames(make, count), actions)
    for name, release, about in (
        ("worldvla_world", "worldvla_256", "WorldVLA 256 px world sample"),
        ("worldvla_512_world", "worldvla_512", "WorldVLA 512 px world sample"),
        ("rynnvla_world", "rynnvla_256", "RynnVLA-002 256 px world sample, two views"),
        ("rynnvla_512_world", "rynnvla_world_512", "RynnVLA-002 World_model_512: two views"),
    ):
        make = release_builder(release)
        world = make.world(frames(make, 1), ACTIONS[1], frames(make, 1, 1)[0])
        yield name, about, make.vocab, world

    state, actions = np.array([0.0, 0.5, 1.0]), np.array([[0.0, -1.0], [0.5, 1.0]])
    for name, builder, about in (
        ("tiny_policy", tiny(), "compact table: state, two views, K=2"),
        ("tiny_policy_causal", tiny(selective_mask=False), "the same without the selective mask"),
    ):
        yield name, about, builder.vocab, builder.policy("press it", state, frames(builder, 1), actions)
    for name, builder, about in (
        ("tiny_world", tiny(), "compact table: world sample"),
        ("tiny_video", tiny(action_conditioning=False), "the same without action conditioning"),
    ):
        world = builder.world(frames(builder, 1), actions[1], frames(builder, 1, 1)[0])
        yield name, about, builder.vocab, world


def describe(about: str, vocab: Vocab, sample: Sample) -> dict[str, object]:
    """Return a sample as JSON values: ids cut into lines at structure, the other arrays as runs."""
    prompt = int(np.argmax(sample.kind != KIND_PROMPT))
    return {
        "about": about,
        "vocab": vocab.name,
        "length": len(sample),
        "prompt": prompt,
        "tokens": list(_lines(sample, vocab)),
        "kind": " ".join(f"{KINDS[k]}x{len(list(g))}" for k, g in groupby(sample.kind.tolist())),
        "chunk": " ".join(_runs(sample.chunk)),
    }


def _lines(sample: Sample, vocab: Vocab) -> Iterator[str]:
    """Yield 'position: ids | rows, cols of image codes', cut after newlines, blocks and separators."""
    ends = [vocab.newline, vocab.eoi, vocab.eoa, vocab.eostate, vocab.sep]
    begins = [vocab.boi, vocab.boa, vocab.bostate]
    ids = sample.ids.tolist()
    cuts = [i for i in range(1, len(ids)) if ids[i - 1] in ends or ids[i] in begins]
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        text = f"{start}: {' '.join(_runs(ids[start:stop]))}"
        placed = [i for i in range(start, stop) if sample.row[i] or sample.col[i]]
        if placed:
            text += f" | row {' '.join(_runs(sample.row[placed]))}, col {' '.join(_runs(sample.col[placed]))}"
        yield text


def _runs(values: Iterable[int]) -> Iterator[str]:
    """Yield '4..19' for counting runs and '1x16' for constant ones, of three or more; the rest plain."""
    values = [int(value) for value in values]
    start = 0
    while start < len(values):
        for step in (1, 0):
            stop = start + 1
            while stop < len(values) and values[stop] == values[stop - 1] + step:
                stop += 1
            if stop - start > 2:
                yield f"{values[start]}..{values[stop - 1]}" if step else f"{values[start]}x{stop - start}"
                break
        else:
            stop = start + 1
            yield str(values[start])
        start = stop


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, about, vocab, sample in cases():
        text = json.dumps(describe(about, vocab, sample), indent=1)
        (GOLDEN / f"sample_{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
