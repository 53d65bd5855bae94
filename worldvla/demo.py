"""What `make demo` runs: a shipped model on its suites, what it imagines, one page of it.

    page = demo(Path("out/demo"))                             # the four tabletop suites
    page = demo(Path("out/demo_libero"), "libero_object")     # needs the libero extra

Under five minutes on two cores. The same call again goes on where it stopped, or just writes the page.
"""

import hashlib
import json
from pathlib import Path

from worldvla.data.collect import collect
from worldvla.eval.actors import ModelActor, RandomActor
from worldvla.eval.page import write_page
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.eval.world import evaluate_world
from worldvla.files import ASSETS
from worldvla.sim.suites import TABLETOP

WORKERS = 4
EXECUTE = 3
"""Replan interval, of chunks of five, as in runs/tabletop.sh."""
DEMONSTRATION_SEED = 9
"""Of the episodes that are imagined: not the one that any recipe collects with."""
IMAGINED_TASKS = (0, 3)
"""Of each suite."""
SHIPPED = {"libero_goal": "libero_four", "libero_10": "libero_four"}
"""Suite -> the shipped model for it; of others the one of their simulator's name."""


def demo(out: Path, suite: str = "tabletop", checkpoint: Path | None = None) -> Path:
    """Roll out one episode of each task, imagine a few clips, and return the path of the page.

    `suite`: tabletop (all four suites of it) or a suite of LIBERO that a shipped model was trained on.
    """
    suites = TABLETOP if suite == "tabletop" else (suite,)
    path = checkpoint or ASSETS / SHIPPED.get(suite, suite.split("_")[0])
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}: give yours by worldvla demo --checkpoint PATH")
    actor = ModelActor(path, EXECUTE)
    # Results of another model, commit or version are not mixed in.
    identity = json.dumps([Protocol(name).identity(actor) for name in suites], sort_keys=True)
    parts = out / hashlib.sha256(identity.encode()).hexdigest()[:12]
    baselines = []
    for name in suites:
        evaluate(actor, Protocol(name, episodes=1), parts / name, WORKERS)
        random = Protocol(name, episodes=1, videos=0)
        baselines.append(evaluate(RandomActor(), random, parts / "random" / name, WORKERS))
        collect(
            name,
            parts / "demos" / name,
            episodes=1,
            views=actor.model.view_sizes,
            seed=DEMONSTRATION_SEED,
            workers=WORKERS,
            tasks=IMAGINED_TASKS,
        )
    files = sorted((parts / "demos").glob("*/*.hdf5"))
    evaluate_world(
        path, files, parts / "imagined", clips=len(files), horizons=(30,), shorter=True, videos=len(files)
    )
    return write_page(
        out / "index.html",
        f"WorldVLA on {suite}",
        evaluations=[parts / name for name in suites],
        worlds=[parts / "imagined"],
        baselines=baselines,
    )
