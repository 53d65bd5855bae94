"""Policies act in the simulator and in imagination; a judge reads success off frames; ranks are compared.

Run: pytest tests/test_judge.py
"""

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worldvla
from worldvla import rank
from worldvla.data.collect import collect
from worldvla.data.episode import read_episodes, write_episodes
from worldvla.eval import judge
from worldvla.eval.actors import Query
from worldvla.eval.page import write_ranking
from worldvla.eval.planning import PlanningActor
from worldvla.eval.rollout import open_actor
from worldvla.eval.stats import DRAWS, agreement, rank_agreement, rank_violation
from worldvla.infer.model import Model, load
from worldvla.infer.world import World
from worldvla.machine import provenance
from worldvla.rank import rank_policies
from worldvla.sim import suites as sim
from worldvla.sim.protocol import NUM_INITS, Suite, Task

MODEL = Path(worldvla.__file__).parent / "assets/tabletop"
SUITE = "tabletop_object"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Scripted:
    """A body whose episodes the judge and the simulator speak of as written, and which says who asked it."""

    def __init__(self, said: list[str], success: list[str]) -> None:
        self.said, self.success, self.rows, self.t = said, success, np.arange(len(said)), 0

    def keep(self, rows: np.ndarray) -> None:
        self.rows = self.rows[rows]

    def step(self, actions: np.ndarray, look: bool) -> judge.Seen:
        assert np.array_equal(actions[:, 0], 100 * self.rows + self.t)  # what the policy meant for this step
        said, success = (
            np.array([self.t < len(w[n]) and w[n][self.t] == "x" for n in self.rows])
            for w in (self.said, self.success)
        )
        self.t += 1
        shown = np.broadcast_to(self.rows[:, None, None, None], (len(self.rows), 2, 2, 3))
        frame = {"agentview": shown} if look else {}
        return judge.Seen(frame, np.full((len(self.rows), 8), self.t, np.float32), said, success)


class Counting:
    """A policy that tells its steps apart: 100 times the episode it sees, plus the step it feels."""

    def act(self, observations: list[dict]) -> np.ndarray:
        first = [100 * int(o["agentview"][0, 0, 0]) + int(o["state"][0]) for o in observations]
        return np.add.outer(first, np.arange(2))[..., None] * np.ones(7)


def test_episodes_end_when_both_say_so_or_at_their_own_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    horizons = {"short": 5, "long": 9}
    monkeypatch.setattr(sim, "suite", lambda name: Suite(name, "tabletop", horizons[name]))
    tasks = [Task(suite, 0, "a", "do it") for suite in ("long", "long", "short", "long")]
    # twice in a row; never twice; only after the short horizon; the simulator later than the judge
    said = ["..xx", "x.x.x.x.x", "....xx", "xx"]
    body = Scripted(said, ["...x", ".........", ".....x", ".....x"])
    first = [{"agentview": np.full((2, 2, 3), n), "state": np.zeros(8, np.float32)} for n in range(4)]
    success, judged = judge.drive(Counting().act, 2, body, tasks, first)  # pyright: ignore
    assert judged.tolist() == [True, False, False, True]
    assert success.tolist() == [True, False, False, True]
    assert (body.t, body.rows.tolist()) == (9, [1])


def test_worlds_that_are_kept_go_on_as_they_would_have(rng: np.random.Generator) -> None:
    model = load(MODEL)
    frames = {v: rng.integers(0, 256, (3, *s, 3), dtype=np.uint8) for v, s in model.view_sizes.items()}
    actions, worlds = rng.uniform(-1, 1, (3, 7)), [World(model), World(model)]
    for world in worlds:
        world.reset({**frames, "state": np.zeros((3, 8))})
    worlds[1].keep(np.array([True, False, True]))
    whole, part = worlds[0].step(actions), worlds[1].step(actions[[0, 2]])
    assert all(np.array_equal(whole[view][[0, 2]], part[view]) for view in frames)


def test_the_same_outcomes_agree_and_opposite_ones_do_not(rng: np.random.Generator) -> None:
    outcomes_MN = (rng.random((5, 40)) < np.linspace(0.1, 0.9, 5)[:, None]).astype(int)
    of = [0, 1, 2, 3, 3]
    same, opposite = (agreement(outcomes_MN, b_MN, of) for b_MN in (outcomes_MN, 1 - outcomes_MN))
    assert same["spearman"] == {"value": 1.0, "interval_95": [1.0, 1.0]}
    assert same["same_episodes"] == [200, 200]
    assert 1900 < same["draws"] < DRAWS  # one checkpoint four times: nothing differs
    assert opposite["pearson"]["value"] == -1.0
    assert (same["rank_violation"], same["bias_points"]) == (0.0, 0.0)
    assert opposite["bias_points"] == pytest.approx(100 * (1 - 2 * outcomes_MN.mean()), abs=0.1)
    # The second and third change places: each is 0.3 from the other, the first and last are right.
    assert rank_violation(np.array([0.1, 0.4, 0.7, 0.9]), np.array([0, 0.6, 0.5, 1])) == pytest.approx(0.15)
    nothing = agreement(np.ones((3, 4)), np.ones((3, 4)), range(3))
    assert (nothing["spearman"], nothing["draws"]) == ({"value": None, "interval_95": None}, 0)


def test_policies_that_look_equally_often_are_compared_with_each_other() -> None:
    rates = np.linspace(0.4, 0.8, 5)
    looks = {1: rates + 0.1, 5: rates}  # who looks more succeeds more, and is imagined to succeed less
    rows = []
    for n, real in looks.items():
        for i, rate in enumerate(real):
            shares = rate, rate, rate - 0.3 * (n == 1)
            outcomes = [(np.arange(100) < round(100 * share)).astype(int).tolist() for share in shares]
            rows.append({"checkpoint": i, "execute": n, "outcomes": outcomes})
    found = rank_agreement(rows)
    assert found["judge_on_real_frames"]["spearman"]["value"] == 1.0
    assert found["imagined"]["spearman"]["value"] < 0.8
    assert {n: of["imagined"]["spearman"]["value"] for n, of in found["by_execute"].items()} == {
        "1": 1,
        "5": 1,
    }


def test_a_policy_acts_in_both_and_a_second_call_asks_nobody_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = sim.tasks(SUITE)[:1]
    collect(SUITE, tmp_path / "demos", episodes=3, tasks=(0,), workers=1)
    short = replace(sim.suite(SUITE), horizon=25)
    monkeypatch.setattr(sim, "tasks", lambda _: tasks)
    monkeypatch.setattr(sim, "suite", lambda _: short)
    demos = sorted((tmp_path / "demos").glob("*.hdf5"))
    options = {"episodes": 2, "first": 10, "execute": (3, 9, 5), "judge_steps": 30, "held_out": demos}
    run = functools.partial(rank_policies, [MODEL], MODEL, demos, [SUITE], tmp_path / "out", **options)
    record = run()
    assert [row["execute"] for row in record["policies"]] == [3, 5]  # no more than the chunk, each once
    assert all(np.shape(row["outcomes"]) == (3, 2) for row in record["policies"])
    assert sum(sum(row["outcomes"][0]) for row in record["policies"]) >= 3  # the shipped model can do this
    assert json.loads((tmp_path / "out/record.json").read_text())["judge"] == record["judge"]
    assert next(rank.doubts(record)).startswith("2 policies on 2 initial states say little")
    again = record["replays"]
    assert (again["episodes"], again["successes"]) == (3, 3)
    for name in ("judge_on_real_frames", "imagined"):
        assert again[name]["table"][0] == [0, 0]  # all three are successes
        assert again[name]["agree"] == again[name]["table"][1][1] == 3 - again[name]["table"][1][0]
    assert len(again["films"]) == 3 - again["imagined"]["agree"]
    page = write_ranking(tmp_path / "out").read_text()
    assert page.count("<video") == len(again["films"]) == len(list((tmp_path / "out/films").glob("*.mp4")))
    assert f"{again['imagined']['agree']} end in imagination" in page
    monkeypatch.setattr(rank, "drive", None)
    assert run()["policies"] == record["policies"]
    assert run(execute=(5,))["policies"] == record["policies"][1:]
    judged = (tmp_path / "out/judge.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds another evaluation"):
        run(judge_steps=31)
    assert (tmp_path / "out/judge.safetensors").read_bytes() == judged
    monkeypatch.setattr(rank, "provenance", lambda: provenance() | {"commit": "another"})
    with pytest.raises(ValueError, match=r"holds another evaluation .*commit"):
        run()


def test_the_judge_learns_what_pictures_show_of_each_task(tmp_path: Path, rng: np.random.Generator) -> None:
    """Brightness is the state; task 0 is done when it is brighter than at first, task 1 when it is darker."""
    model = load(MODEL)
    bright, tasks = rng.integers(40, 216, 600), rng.integers(0, 2, 600)
    first = np.repeat(rng.integers(100, 156, 60), 10)
    codes, before = (
        judge.encoded(
            model,
            {
                v: np.broadcast_to(grey[:, None, None, None], (600, *size, 3)).astype(np.uint8)
                for v, size in model.view_sizes.items()
            },
        )
        for grey in (bright, first)
    )
    states = np.repeat(bright[:, None] / 1000, 8, 1).astype(np.float32)
    success = np.where(tasks == 0, bright > first, bright < first)
    value = success.astype(np.float32) / 2
    pictures = judge.Pictures(codes, before, states, tasks, success, value, np.arange(600) // 10)
    known = [Task("x", n, "a", "do it") for n in (0, 1)]
    net, errors = judge.train_judge(model, known, pictures, 150)
    (seen, successes), (alarms, failures) = errors["successes_seen"], errors["false_alarms"]
    assert successes + failures == 60
    assert seen > 0.9 * successes
    assert alarms < 0.2 * failures
    assert errors["episodes_agree"][1] == 6
    assert errors["position_error_mm"] < 10  # of 175
    felt, _ = net.read(codes[:5], before[:5], tasks[:5])
    assert np.abs(felt - states[:5]).max() < 0.03
    assert np.abs(net.value(codes, before, tasks) - value).mean() < 0.1
    assert abs(seen + alarms - successes) <= 1  # as many as there are
    net.save(tmp_path / "judge.safetensors", {"made_of": {"tokenizer": model.image.digest()}})
    again, _ = judge.Judge.load(tmp_path / "judge.safetensors", model)
    for old, new in zip(net.read(codes, before, tasks), again.read(codes, before, tasks), strict=True):
        np.testing.assert_array_equal(old, new)


def test_what_makes_a_ranking_doubtful_is_said() -> None:
    sound = {
        "policies": [{"outcomes": [[1] * 60] * 3}] * 8,
        "judge": {"episodes_agree": [90, 100]},
        "replays": {name: {"table": [[9, 1], [0, 10]]} for name in ("judge_on_real_frames", "imagined")},
    }
    assert list(rank.doubts(sound)) == []
    few = {**sound, "policies": [{"outcomes": [[1] * 59] * 3}] * 8}
    weak = {**sound, "judge": {"episodes_agree": [89, 100]}}
    tables = {"judge_on_real_frames": {"table": [[8, 1], [0, 1]]}, "imagined": {"table": [[0, 3], [0, 1]]}}
    records = few, weak, {**sound, "replays": tables}
    assert [line for record in records for line in rank.doubts(record)] == [
        "8 policies on 59 initial states say little about ranks: give 8 or more, and 60 states in all "
        "(--episodes)",
        "the judge is wrong about 11 of 100 held-out episodes: give more --demos",
        "the judge calls 1 of 9 failures a success: give --demos more that fail",
        "imagination makes successes of 3 of 3 failures: train the world model on failures "
        "(`worldvla collect --kind world`)",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"execute": (0,)}, "execute at least 1"),
        ({"first": 49}, r"0\.\.49 are for evaluation: got 2 from 49 on"),
        ({"episodes": 0}, "got 0 from 0 on"),
        ({"checkpoints": []}, "at least one"),
        ({"checkpoints": ["a", "a"]}, "every policy once"),
        ({"suites": [SUITE, SUITE]}, "every suite once"),
    ],
)
def test_bad_input_is_said_before_anything_is_loaded(tmp_path: Path, options: dict, words: str) -> None:
    given = {"checkpoints": ["nowhere"], "world": "nowhere", "demos": [], "suites": [SUITE], **options}
    with pytest.raises(ValueError, match=words):
        rank_policies(out=tmp_path, **given)


def test_success_is_confirmed_by_pictures_in_a_row() -> None:
    words = {"..xx.": True, "x.x.x": False, "xx": True, "x": False, "": False}
    assert all(judge._confirmed(np.array([c == "x" for c in said])) == is_it for said, is_it in words.items())


def test_what_the_judge_cannot_learn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(SUITE, tmp_path / "demos", episodes=1, tasks=(0,), workers=1)
    demos, model = sorted((tmp_path / "demos").glob("*.hdf5")), load(MODEL)
    with pytest.raises(ValueError, match=f"no demonstration of {SUITE}/"):
        judge.gather(demos, [SUITE], model, 5)
    monkeypatch.setattr(Model, "view_sizes", model.view_sizes | {"wrist": (16, 16)})
    with pytest.raises(
        ValueError, match=r"view wrist is \(32, 32\), the model sees \(16, 16\): collect it so"
    ):
        judge.gather(demos, [SUITE], model, 5)


def test_the_judge_sees_successes_and_the_same_actions_elsewhere(tmp_path: Path) -> None:
    """The value counts the steps up to the next success; an episode that fails is not mimed."""
    collect(SUITE, tmp_path / "demos", episodes=2, tasks=(0,), workers=1)
    (path,) = (tmp_path / "demos").glob("*.hdf5")
    good, other = read_episodes(path)
    write_episodes(path, [good, replace(other, success=False)], {"kind": "world"})
    task, model = sim.tasks(SUITE)[0], load(MODEL)
    shown = list(judge._shown([path], [task], model, 5, 1, ""))
    assert [np.unique(pictures.episodes).tolist() for _, pictures in shown] == [[0], [1], [2]]
    own, mimed, _ = (pictures for _, pictures in shown)
    done = len(good)  # the first picture after the last action
    assert own.success.tolist() == [False] * done + [True] * judge.AFTER
    np.testing.assert_allclose(own.value[:done], judge.DISCOUNT ** (done - np.arange(done)), rtol=1e-6)
    assert (own.value[done:] == 1).all()
    env = sim.make(task, model.view_sizes)
    observation, _ = env.reset(options={"init": NUM_INITS + 1})
    actions = [*good.actions[:-1], *judge.last_actions(good)]
    for t, action in enumerate([*actions, np.zeros(7)]):
        frame = {view: observation[view][None] for view in model.view_sizes}
        np.testing.assert_array_equal(mimed.codes[t], judge.encoded(model, frame)[0])
        np.testing.assert_allclose(mimed.states[t], observation["state"], atol=1e-6)
        observation = env.step(action)[0]
    env.close()
    assert len(mimed.codes) == len(actions) + 1 == done + judge.AFTER
    assert not mimed.success.any()
    assert all((pictures.first == pictures.codes[0]).all() for _, pictures in shown)


def test_a_plan_is_the_chunk_whose_imagined_end_is_worth_most(tmp_path: Path) -> None:
    """Of one task, with a judge whose value is how far to the left the hand is imagined to be."""
    collect(SUITE, tmp_path / "demos", episodes=3, tasks=(0,), workers=1)
    task, model = sim.tasks(SUITE)[0], load(MODEL)
    untaught = judge.Judge(model, [task], np.zeros(8, np.float32), np.ones(8, np.float32))
    untaught.save(
        tmp_path / "judge.safetensors", {"made_of": {"tokenizer": model.image.digest()}, "errors": {}}
    )
    actor = PlanningActor(MODEL, MODEL, tmp_path / "judge.safetensors", 4, execute=3)
    env = sim.make(task, model.view_sizes)
    observation, _ = env.reset(options={"init": 0})
    seen = {**observation, "instruction": task.instruction}
    env.close()
    asked: list[np.ndarray] = []

    def value(codes: np.ndarray, first: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        assert (first == judge.encoded(model, {v: observation[v][None] for v in model.view_sizes})).all()
        assert (len(codes), tasks.tolist()) == (8, [0] * 8)
        asked.append(codes)
        return np.array([0, 3, 1, 2, 5, 4, 3, 2])

    actor.judge.value = value  # pyright: ignore
    queries = [Query(task, init, 0, seen) for init in (0, 1)]
    chosen = np.array(actor.act(queries))
    greedy = actor._policy.act(seen)[:3]
    assert np.shape(chosen) == (2, 3, 7)
    np.testing.assert_allclose(chosen[1], greedy, atol=1e-6)  # of the second the likeliest is worth most
    assert np.abs(chosen[0] - greedy).max() > 0.01
    world = World(model)
    world.reset(observation)
    for action in greedy:
        world.step(action)
    dreamt = world.image_codes[0]
    np.testing.assert_array_equal(asked[0][4], dreamt)
    assert actor.timing()["ms_a_decision"] > 0
    asked.clear()
    last_drawn: Any = lambda codes, *_: np.arange(len(codes))  # noqa: E731
    actor.judge.value = last_drawn
    alone, together = actor.act(queries[1:]), actor.act(queries)
    np.testing.assert_array_equal(alone[0], together[1])  # whoever else waits
    actor.judge.value = value  # pyright: ignore
    actor.act(queries)
    actor.ahead = 2
    actor.act(queries)
    then: Any = {**world.frame(), "state": world.state, "instruction": task.instruction}
    for action in actor._policy.act(then)[:3]:
        world.step(action)
    dreamt = world.image_codes[0]
    np.testing.assert_array_equal(asked[1][4], dreamt)
    actor.ahead, actor.temperature, actor.spread = 1, 0, 0.2
    shift = np.array(actor.act(queries)[0]) - greedy
    np.testing.assert_allclose(shift[:, :3], shift[:1, :3] * np.ones((3, 1)), atol=1e-6)  # all alike
    assert np.abs(shift[0, :3]).min() > 1e-3
    assert (shift[:, 3:] == 0).all()
    with pytest.raises(ValueError, match="the judge knows no tabletop_goal"):
        actor.act([Query(sim.tasks("tabletop_goal")[0], 0, 0, seen)])
    with pytest.raises(ValueError, match="at least 2 chunks, got 1"):
        PlanningActor(MODEL, MODEL, tmp_path / "judge.safetensors", 1)
    with pytest.raises(ValueError, match="would be the same"):
        PlanningActor(MODEL, MODEL, tmp_path / "judge.safetensors", 4, temperature=0)
    with pytest.raises(ValueError, match="from 0 on, got 1, 0 and -1"):
        PlanningActor(MODEL, MODEL, tmp_path / "judge.safetensors", 4, temperature=0, spread=-1)
    with pytest.raises(ValueError, match="give all three"):
        open_actor(str(MODEL), SUITE, spread=0.5)
    with pytest.raises(ValueError, match="give all three"):
        open_actor(str(MODEL), SUITE, temperature=0.5)
    planning = {"plan": 4, "world": str(MODEL), "judge": tmp_path / "judge.safetensors"}
    with pytest.raises(ValueError, match="imagines on the CPU, got --device cuda"):
        open_actor(str(MODEL), SUITE, device="cuda", **planning)
    with pytest.raises(ValueError, match="give all three"):
        open_actor(str(MODEL), SUITE, plan=4)
