"""What `make demo` runs: the shipped model on the four tabletop suites, what it imagines, one page of it.

    page = demo(Path("out/demo"))

Under five minutes on two cores. The same call again goes on where it stopped, or just writes the page.
"""

from pathlib import Path

from worldvla.data.collect import collect
from worldvla.eval.actors import RandomActor
from worldvla.eval.report import write_page
from worldvla.eval.rollout import evaluate, run
from worldvla.eval.world import evaluate_world
from worldvla.infer.load import load, weights_digest
from worldvla.recipes import TABLETOP_SUITES

SHIPPED = Path(__file__).parent / "assets/tabletop"
DEMONSTRATION_SEED = 9
"""Of the episodes that are imagined: not the one that any recipe collects with."""
EXECUTE = 3
"""Actions of each chunk of five before the next look, as in runs/tabletop.sh."""
IMAGINED_TASKS = (0, 3)
"""Of each suite."""


def demo(
    out_dir: Path, checkpoint: Path | None = None, episodes: int = 1, seed: int = 0, workers: int = 4
) -> Path:
    """Roll out `episodes` of each of the 40 tasks, imagine a few clips, and return the path of the page."""
    path = SHIPPED if checkpoint is None else checkpoint
    if not path.exists():
        fix = "train one by runs/tabletop.sh, or give yours: worldvla demo --checkpoint PATH"
        raise FileNotFoundError(f"no model at {path}: {fix}")
    model = load(path)
    parts = out_dir / f"{weights_digest(model.path)}_{seed}"  # results of another model are not mixed in
    arguments = {"seed": seed, "workers": workers, "page": False}
    for suite in TABLETOP_SUITES:
        evaluate(path, suite, episodes, out_dir=parts / suite, execute=EXECUTE, **arguments)
    baselines = [
        run(RandomActor(seed), suite, episodes, out_dir=parts / "random" / suite, videos=0, **arguments)
        for suite in TABLETOP_SUITES
    ]
    for suite in TABLETOP_SUITES:
        collect(
            suite,
            parts / "demos" / suite,
            episodes=1,
            views=model.view_sizes,
            seed=DEMONSTRATION_SEED,
            workers=workers,
            tasks=IMAGINED_TASKS,
        )
    files = sorted((parts / "demos").glob("*/*.hdf5"))
    evaluate_world(path, files, parts / "imagined", episodes=len(files), seed=seed, page=False)
    page = out_dir / "index.html"
    evaluations = [parts / suite for suite in TABLETOP_SUITES]
    return write_page(
        page,
        "WorldVLA on the tabletop",
        evaluations=evaluations,
        worlds=[parts / "imagined"],
        baselines=baselines,
    )
