"""Controls of planning: chunks tried in the simulator instead of in a world model, or chosen by chance.

    python -m paper.planning POLICY --judge out/rank/judge.safetensors --suite tabletop_goal --out out/planned
    python -m paper.planning POLICY ... --by-chance

As `worldvla eval --plan`, and the same judge, but each chunk's end is the simulator's own, and with `--ahead`
what the policy does after it: the most that planning can bring. Each episode has two more environments: one
executes what was chosen, the other tries the chunks from its state. With `--by-chance` the same chunks are
drawn and any of them is executed: what more variety alone brings.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional

from worldvla.eval.actors import Query
from worldvla.eval.judge import encoded
from worldvla.eval.planning import PlanningActor
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.sim import suites as sim

Place = tuple[str, str, int]


class Rehearsal(PlanningActor):
    """Plans whose ends are seen in the simulator. Of parallel episodes each must be another initial state."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._envs: dict[Place, Any] = {}

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        for query in queries:
            if query.step == 0:
                twins: Any = [sim.make(query.task, views) for views in ({}, self.world.view_sizes)]
                for env in twins:
                    env.reset(options={"init": query.init})
                self._envs[_place(query)] = twins
        chosen = super().act(queries)
        for query, actions in zip(queries, chosen, strict=True):
            env = self._envs[_place(query)][0]
            if actions is None or any(_is_over(env.step(action)) for action in actions):
                for twin in self._envs.pop(_place(query)):
                    twin.close()
        return chosen

    def _values(
        self, queries: Sequence[Query], plans: np.ndarray, first: np.ndarray, numbers: np.ndarray
    ) -> np.ndarray:
        tried: list[tuple[Any, np.ndarray]] = []
        """Of each chunk an environment, and the state from which it goes on there."""
        for query in queries:
            env, other = self._envs[_place(query)]
            if not np.allclose(env.proprioception(), query.observation["state"], atol=1e-6):
                raise ValueError(f"{query.task.name}, state {query.init}: the second environment went astray")
            tried += [(other, env.get_state())] * self.chunks
        texts = [query.observation["instruction"] for query in queries for _ in range(self.chunks)]
        actions, ends = plans.reshape(-1, *plans.shape[2:]), []
        for look in range(self.ahead):
            if look:
                seen = [{**end, "instruction": text} for end, text in zip(ends, texts, strict=True)]
                actions = self._policy.act(seen)[:, : plans.shape[2]]
            ends = [_end(env, state, chunk) for (env, state), chunk in zip(tried, actions, strict=True)]
            tried = [(env, end.pop("sim_state")) for (env, _), end in zip(tried, ends, strict=True)]
        frames = {view: np.stack([end[view] for end in ends]) for view in self.world.view_sizes}
        return self.judge.value(encoded(self.world, frames), first, numbers)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "tried_in": "simulator"}


class Chance(PlanningActor):
    """Plans of which nobody looks at the ends: any is executed."""

    def _values(
        self,
        queries: Sequence[Query],
        plans: np.ndarray,  # noqa: ARG002 - it is chance
        first: np.ndarray,  # noqa: ARG002
        numbers: np.ndarray,  # noqa: ARG002
    ) -> np.ndarray:
        values = [np.random.default_rng(self._seeds(query)).random(self.chunks) for query in queries]
        return np.concatenate(values)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "chosen_by": "chance"}


def _place(query: Query) -> Place:
    return query.task.suite, query.task.name, query.init


def _end(env: Any, state: np.ndarray, chunk: np.ndarray) -> dict[str, np.ndarray]:
    """Return what is seen after `chunk` (U, 7) from `state` on, and `sim_state`."""
    env.set_state(state)
    env.rendering = False  # the last frame is enough
    for action in chunk:
        env.step(action)
    env.rendering = True
    return {**env.observe(), "sim_state": env.get_state()}


def _is_over(step: tuple[Any, float, bool, bool, dict[str, Any]]) -> bool:
    return step[2] or step[3]


def main(
    policy: Positional[Path],
    judge: Path,
    suite: str,
    out: Path,
    world: Path = Path("tabletop"),
    plan: int = 8,
    temperature: float = 1.0,
    spread: float = 0.0,
    ahead: int = 1,
    execute: int = 5,
    first: int = 0,
    episodes: int = 10,
    seed: int = 0,
    by_chance: bool = False,
) -> None:
    """Write record.json as `worldvla eval` does, of tabletop suites."""
    kind = Chance if by_chance else Rehearsal
    actor = kind(policy, world, judge, plan, temperature, spread, ahead, seed=seed, execute=execute)
    protocol = Protocol(suite, episodes=episodes, first=first, seed=seed, videos=0)
    record = evaluate(actor, protocol, out)
    print(
        json.dumps({name: record.get(name) for name in ("suite", "successes", "episodes", "ms_a_decision")})
    )


if __name__ == "__main__":
    tyro.cli(main)
