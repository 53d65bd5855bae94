"""What `make demo` runs: a shipped model on its suites, what it imagines, one page of it.

    page = demo(Path("out/demo"))                             # the four tabletop suites
    page = demo(Path("out/demo_libero"), "libero_object")     # needs `pip install worldvla[libero]`

Under five minutes on two cores. The same call again goes on where it stopped, or just writes the page.
"""

from pathlib import Path

from worldvla.data.collect import collect
from worldvla.eval.actors import ModelActor, RandomActor
from worldvla.eval.report import write_page
from worldvla.eval.rollout import run
from worldvla.eval.world import evaluate_world
from worldvla.infer.model import weights_digest
from worldvla.recipes import TABLETOP_SUITES

ASSETS = Path(__file__).parent / "assets"
SUITES = {
    "tabletop": ("tabletop", TABLETOP_SUITES),
    "libero_object": ("libero", ("libero_object",)),
    "libero_spatial": ("libero", ("libero_spatial",)),
}
"""What can be shown -> the shipped model, by its directory in ASSETS, and the suites."""
RECIPES = {"tabletop": "runs/tabletop.sh", "libero": "MODEL=_drawer runs/libero_object_spatial.sh"}
"""Shipped model -> what makes it."""
DEMONSTRATION_SEED = 9
"""Of the episodes that are imagined: not the one that any recipe collects with."""
EXECUTE = 3
"""Actions of each chunk of five before the next look, as in runs/tabletop.sh."""
IMAGINED_TASKS = (0, 3)
"""Of each suite."""


def demo(
    out_dir: Path,
    suite: str = "tabletop",
    checkpoint: Path | None = None,
    episodes: int = 1,
    seed: int = 0,
    workers: int = 4,
) -> Path:
    """Roll out `episodes` of each task, imagine a few clips, and return the path of the page."""
    if suite not in SUITES:
        raise ValueError(f"a model is shipped for {', '.join(SUITES)}, got {suite!r}: see `worldvla eval`")
    shipped, suites = SUITES[suite]
    path = ASSETS / shipped if checkpoint is None else checkpoint
    if not path.exists():
        fix = f"train one by {RECIPES[shipped]}, or give yours: worldvla demo --checkpoint PATH"
        raise FileNotFoundError(f"no model at {path}: {fix}")
    actor = ModelActor(path, EXECUTE)
    model = actor.model
    parts = out_dir / f"{weights_digest(model.path)}_{seed}"  # results of another model are not mixed in
    arguments = {"seed": seed, "workers": workers, "page": False}
    for name in suites:
        run(actor, name, episodes, out_dir=parts / name, **arguments)
    baselines = [
        run(RandomActor(seed), name, episodes, out_dir=parts / "random" / name, videos=0, **arguments)
        for name in suites
    ]
    for name in suites:
        collect(
            name,
            parts / "demos" / name,
            episodes=1,
            views=model.view_sizes,
            seed=DEMONSTRATION_SEED,
            workers=workers,
            tasks=IMAGINED_TASKS,
        )
    files = sorted((parts / "demos").glob("*/*.hdf5"))
    arguments = {"clips": len(files), "horizons": (30,), "seed": seed, "shorter": True, "videos": len(files)}
    evaluate_world([path], files, parts / "imagined", page=False, swaps=False, **arguments)
    page = out_dir / "index.html"
    evaluations = [parts / name for name in suites]
    return write_page(
        page,
        f"WorldVLA on {suite}",
        evaluations=evaluations,
        worlds=[parts / "imagined"],
        baselines=baselines,
    )
