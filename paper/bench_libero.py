"""Speed of a LIBERO evaluation beside the plain loop that most evaluations use, in the same run; ends with
one JSON line.

Run: python -m paper.bench_libero --task 0 --episodes 10 --workers 2 [--checkpoint out/libero/run]
Plain loop: LIBERO's own OffScreenRenderEnv, one environment, reset anew and both cameras drawn at every step.
Both execute the same actions (the expert's, found before and not timed) at the default picture, a replan
interval of five; with a checkpoint both also query it once an interval, and pay for it.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from worldvla.eval.actors import Actor, ModelActor, Query
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.machine import provenance
from worldvla.sim import suites as sim
from worldvla.sim.protocol import SETTLE_ACTION, Task

VIEWS = {"agentview": (256, 256), "wrist": (256, 256)}
EXECUTE = 5


class Replay(Actor):
    """Answers with stored actions; asks the model too, if there is one, and forgets what it said."""

    name, execute = "replay of the expert", EXECUTE

    def __init__(self, actions: dict[int, np.ndarray], model: ModelActor | None) -> None:
        self.actions, self.model = actions, model
        self.views = VIEWS if model is None else model.views

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        if self.model is not None:
            self.model.act(queries)
        return [self.actions[q.init][q.step : q.step + EXECUTE] for q in queries]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name} | ({} if self.model is None else {"model": self.model.identity()})


def expert_actions(task: Task, inits: range) -> dict[int, np.ndarray]:
    """Return the expert's actions (T, 7) from each initial state; one that fails is an error."""
    env: Any = sim.make(task, {})
    found = {}
    for init in inits:
        env.reset(options={"init": init})
        expert, actions, success = sim.expert(env), [], False
        while not success:
            if len(actions) == env.horizon:
                raise ValueError(
                    f"the expert fails {task.name} from initial state {init}: choose another task"
                )
            actions.append(expert.act())
            success = env.step(actions[-1])[2]
        found[init] = np.array(actions)
    env.close()
    return found


def plain_loop(task: Task, actions: dict[int, np.ndarray], model: ModelActor | None) -> dict[str, float]:
    """Run the episodes as peers do; return seconds and successes."""
    from worldvla.sim.libero import env as libero
    from worldvla.sim.libero.render import CAMERAS

    start, successes = time.monotonic(), 0
    env: Any = libero._load("libero.libero.envs.env_wrapper").OffScreenRenderEnv(
        bddl_file_name=str(libero._libero_path("bddl_files") / task.suite / f"{task.name}.bddl"),
        camera_heights=VIEWS["agentview"][0],
        camera_widths=VIEWS["agentview"][1],
    )
    inits = libero._initial_states(task)
    for init, todo in actions.items():
        env.seed(libero.EVALUATION_SEED)
        env.reset()
        env.set_init_state(inits[init])
        seen, done = {}, False
        for _ in range(libero.SETTLE_STEPS):
            seen = env.step(list(SETTLE_ACTION))[0]
        for step, action in enumerate(todo):
            if model is not None and step % EXECUTE == 0:
                images = {
                    view: np.ascontiguousarray(seen[f"{camera}_image"][::-1, ::-1])
                    for view, camera in CAMERAS.items()
                }
                model.act([Query(task, init, step, {**_shrunk(images, model), "state": _state(seen)})])
            seen, _, done, _ = env.step(action)
        successes += bool(done)
    env.close()
    return {"seconds": time.monotonic() - start, "successes": successes}


def _shrunk(images: dict[str, np.ndarray], model: ModelActor) -> dict[str, Any]:
    small = {v: images[v][:: 256 // rows, :: 256 // cols] for v, (rows, cols) in model.views.items()}
    return {**{view: np.ascontiguousarray(image) for view, image in small.items()}, "instruction": "x"}


def _state(seen: dict[str, Any]) -> np.ndarray:
    return np.concatenate([seen["robot0_eef_pos"], np.zeros(3), seen["robot0_gripper_qpos"]]).astype(
        np.float32
    )


def main(
    suite: str = "libero_object",
    task: int = 0,
    episodes: int = 10,
    workers: int = 2,
    checkpoint: Path | None = None,
) -> None:
    """Measure both, with the expert's actions; a checkpoint is asked too."""
    model = None if checkpoint is None else ModelActor(checkpoint, EXECUTE)
    actions = expert_actions(sim.tasks(suite)[task], range(episodes))
    with tempfile.TemporaryDirectory() as directory:
        protocol = Protocol(suite, (task,), episodes, videos=0)
        record = evaluate(Replay(actions, model), protocol, Path(directory), workers)
    plain = plain_loop(sim.tasks(suite)[task], actions, model)
    hours = {"ours": record["seconds"] / 3600, "plain loop": plain["seconds"] / 3600}
    numbers = {
        "episodes_hour": episodes / hours["ours"],
        "episodes_hour_plain": episodes / hours["plain loop"],
        "ratio": hours["plain loop"] / hours["ours"],
        # What the episodes need on these cores: the workers' own seconds, spread over them.
        "wall_over_simulation": record["seconds"] / (record["simulation_seconds"] / workers),
        "successes": record["successes"],
        "successes_plain": plain["successes"],
        "steps": float(sum(map(len, actions.values()))),
    }
    table = Table("what", "value")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.2f}")
    Console(stderr=True).print(table)
    what = {"suite": suite, "task": task, "episodes": episodes, "workers": workers}
    print(json.dumps({"bench_eval": numbers, **what, "model": model and model.identity(), **provenance()}))


if __name__ == "__main__":
    tyro.cli(main)
