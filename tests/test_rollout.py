"""Episodes end as success, fail or error and nothing else; a crash, a dead or a silent worker costs one
episode; the record is a function of the arguments, and a stopped evaluation goes on where it was.

Run: pytest tests/test_rollout.py
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_env import CRASH, DIE, HANG, SLOW_S, TABLE, make, make_slow

from worldvla.cli import main
from worldvla.data.episode import Episode, read_episodes
from worldvla.data.sources import open_source
from worldvla.eval import rollout, workers
from worldvla.eval.actors import (
    Actor,
    ExpertActor,
    ModelActor,
    OpenLoopActor,
    Query,
    RandomActor,
    mean_trajectory,
)
from worldvla.eval.record import Journal, merge
from worldvla.eval.rollout import Protocol, evaluate, open_actor
from worldvla.files import write_json
from worldvla.sim import suites as sim
from worldvla.sim.protocol import Task


class Forward(Actor):
    """Moves right at a pace that depends on the task; notes what it was asked."""

    name, execute = "forward", 3

    def __init__(self, history: int = 1, views: dict[str, tuple[int, int]] | None = None) -> None:
        self.history, self.views = history, {"agentview": (4, 4)} if views is None else views
        self.asked: list[list[Query]] = []

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        self.asked.append(list(queries))
        return [np.full((self.execute, 7), 0.05 if q.task.index == 2 else 0.2) for q in queries]

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "path": "somewhere"}


def roll(
    actor: Any, out: Path, episodes: int = 2, suite: str = "tabletop_object", videos: int = 0, **options: Any
) -> dict[str, Any]:
    names = ("tasks", "first", "seed", "scene_prefix", "shard")
    own = {name: options.pop(name) for name in names if name in options}
    settings = {"workers": 2, "make": make, "table": TABLE, **options}
    return evaluate(actor, Protocol(suite, episodes=episodes, videos=videos, **own), out, **settings)


def test_workers_need_no_torch() -> None:
    code = "import sys, worldvla.eval.rollout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_episodes_are_saved_as_demonstrations(tmp_path: Path) -> None:
    """Every step has its picture, the seed of an episode and its end stand in it, the record stays the same,
    and LeRobot's format is a command away."""
    actor = Forward(views={"agentview": (8, 8)})
    record = roll(actor, tmp_path / "out", tasks=(0, 2), seed=5, save=tmp_path / "demos")
    plain = roll(Forward(views={"agentview": (8, 8)}), tmp_path / "plain", tasks=(0, 2), seed=5)
    assert [o["steps"] for o in record["outcomes"]] == [o["steps"] for o in plain["outcomes"]]
    files = sorted((tmp_path / "demos").glob("*.hdf5"))
    assert [f.name for f in files] == [f"move_{t}_{i:02d}_demo.hdf5" for t in (0, 2) for i in (0, 1)]
    (episode,) = read_episodes(files[1])
    assert (episode.task, episode.init, episode.seed, episode.success) == ("move_0", 1, 5, True)
    assert episode.instruction == "move dot 0"
    assert len(episode) == 5
    assert (episode.actions == np.float32(0.2)).all()
    assert episode.images["agentview"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]  # the dot's steps so far
    np.testing.assert_allclose(episode.states[:, 0], 0.2 * np.arange(5), atol=1e-6)
    np.testing.assert_allclose(episode.sim_states[:, 0], 0.2 * np.arange(5), atol=1e-6)
    assert not episode.is_expert.any()
    assert not next(read_episodes(files[3])).success
    out = tmp_path / "lerobot"
    assert main(["export-dataset", str(tmp_path / "demos"), "--out", str(out), "--pictures", "png"]) == 0
    read = [e for _, e in open_source(out).attempts(True) if isinstance(e, Episode)]
    assert [e.instruction for e in read] == ["move dot 0"] * 2 + ["move dot 2"] * 2
    np.testing.assert_array_equal(read[1].actions, episode.actions)
    np.testing.assert_array_equal(read[1].images["agentview"], episode.images["agentview"])


def test_the_command_line_saves_what_the_simulator_showed(tmp_path: Path) -> None:
    """Actions are the actor's, and executed again they lead through the frames and states that were saved."""
    data, actor = tmp_path / "data", RandomActor(7)
    words = "eval random --suite tabletop_object --tasks 0 3 --episodes 1 --first 50 --seed 7 --workers 1"
    options = ["--videos", "0", "--out", str(tmp_path / "out"), "--save-dataset", str(data)]
    assert main([*words.split(), *options]) == 0
    episodes = list(open_source(data).episodes())
    record = json.loads((tmp_path / "out/record.json").read_text())
    assert [len(e) for e in episodes] == [o["steps"] for o in record["outcomes"]]
    for index, episode in zip((0, 3), episodes, strict=True):
        task = sim.tasks("tabletop_object")[index]
        sizes = {view: frames.shape[1:3] for view, frames in episode.images.items()}
        env = sim.make(task, sizes)
        observation, _ = env.reset(options={"init": 50})
        assert episode.instruction == task.instruction
        for step, action in enumerate(episode.actions):
            (chunk,) = actor.act([Query(task, 50, step - step % actor.execute, {})])
            assert chunk is not None
            np.testing.assert_array_equal(action, chunk[step % actor.execute])
            np.testing.assert_array_equal(episode.states[step], observation["state"])
            for view, frames in episode.images.items():
                np.testing.assert_array_equal(frames[step], observation[view])
            observation = env.step(action)[0]


def test_saved_episodes_are_all_of_one_evaluation(tmp_path: Path) -> None:
    """The same call again adds what is missing; what was not saved, and another policy's, is refused."""
    views = {"agentview": (8, 8)}
    roll(Forward(views=views), tmp_path / "out", tasks=(0,), episodes=1, save=tmp_path / "demos")
    roll(Forward(views=views), tmp_path / "out", tasks=(0,), episodes=2, save=tmp_path / "demos")
    assert len(list((tmp_path / "demos").glob("*.hdf5"))) == 2
    with pytest.raises(ValueError, match=r"holds episodes that are not in .*other: give another --out"):
        roll(Forward(views=views), tmp_path / "out", tasks=(0,), episodes=2, save=tmp_path / "other")
    with pytest.raises(ValueError, match="choose another directory"):
        roll(RandomActor(0), tmp_path / "random", tasks=(0,), save=tmp_path / "demos")


def test_success_and_failure_are_told_apart(tmp_path: Path) -> None:
    record = roll(Forward(), tmp_path, tasks=(0, 2))
    assert [t["successes"] for t in record["tasks"]] == [2, 0]
    assert (record["episodes"], record["successes"], record["failures"], record["errors"]) == (4, 2, 2, 0)
    assert record["grasped"] == 4
    assert [o["steps"] for o in record["outcomes"]] == [5, 5, 12, 12]
    keys = (
        "suite checkpoint episodes successes failures errors grasped wilson_95 tasks seed protocol versions"
    )
    assert {*keys.split(), "hardware", "seconds", "commit", "doctor"} <= set(record)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert record["protocol"]["executed"] == 3


def test_the_scene_stands_before_the_instruction_and_in_the_record(tmp_path: Path) -> None:
    class Listener(Forward):
        def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
            heard.update(query.observation["instruction"] for query in queries)
            return super().act(queries)

    heard: set[str] = set()
    table = (Task("tabletop_object", 0, "STUDY_SCENE1_move_0", "move dot 0"),)
    record = roll(Listener(), tmp_path, tasks=(0,), table=table, scene_prefix=True)
    assert heard == {"STUDY SCENE1 move dot 0"} == {t["instruction"] for t in record["tasks"]}
    assert record["protocol"]["scene_prefix"] is True
    with pytest.raises(ValueError, match="scene_prefix"):
        roll(Listener(), tmp_path, tasks=(0,), table=table)


def test_a_crash_a_death_and_a_silence_are_one_error_each(tmp_path: Path) -> None:
    record = roll(Forward(), tmp_path, 5, tasks=(0, 1), patience_s=8.0)
    ends = {(o["task"], o["init"]): o for o in record["outcomes"]}
    errors = {key for key, o in ends.items() if o["status"] == "error"}
    assert errors == {(1, CRASH), (1, DIE), (1, HANG)}
    assert record["successes"] == 7
    assert ends[1, CRASH]["reason"].startswith("RuntimeError: the dot fell off (fake_env.py:")
    assert "in _misbehave" in (tmp_path / ends[1, CRASH]["trace"]).read_text()
    assert "exit code 9" in ends[1, DIE]["reason"]
    assert "no answer for 8 s" in ends[1, HANG]["reason"]


def test_history_brings_the_frames_just_before(tmp_path: Path) -> None:
    actor = Forward(history=3)
    roll(actor, tmp_path, 1, tasks=(2,))
    seen = [
        [int(f["agentview"][0, 0, 0]) for f in [*q.observation["previous"], q.observation]]
        for (q,) in actor.asked
    ]
    assert seen == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert actor.asked[0][0].observation["instruction"] == "move dot 2"


def test_only_what_the_policy_sees_is_rendered(tmp_path: Path) -> None:
    actor = Forward(history=1)
    roll(actor, tmp_path, 1, tasks=(2,))
    pixels = [q.observation["agentview"][0, 0] for (q,) in actor.asked]
    assert [(int(steps), int(renders)) for steps, renders, _ in pixels] == [(0, 0), (3, 1), (6, 2), (9, 3)]


def test_a_blind_actor_is_shown_nothing(tmp_path: Path) -> None:
    actor = Forward(views={})
    roll(actor, tmp_path, 1, tasks=(0,))
    assert set(actor.asked[0][0].observation) == {"state", "instruction", "previous"}


def test_batches_do_not_depend_on_chance(tmp_path: Path) -> None:
    first, second = Forward(), Forward()
    roll(first, tmp_path / "a", 3)
    roll(second, tmp_path / "b", 3)
    orders = [
        [[(q.task.index, q.init, q.step) for q in batch] for batch in actor.asked]
        for actor in (first, second)
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("suite", ["tabletop_object", "libero_object"])
def test_the_time_of_the_policy_is_told(tmp_path: Path, suite: str) -> None:
    class Thoughtful(Forward):
        def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
            time.sleep(0.1)
            return super().act(queries)

    actor = Thoughtful()
    record = roll(actor, tmp_path, 1, suite)
    assert 0.1 * len(actor.asked) - 0.05 <= record["policy_seconds"] <= record["seconds"] + 0.05


def test_nobody_waits_for_a_slow_reset(tmp_path: Path) -> None:
    actor = Forward()
    record = roll(actor, tmp_path, 1, "libero_object", make=make_slow)  # LIBERO is not run in lockstep
    assert {len(batch) for batch in actor.asked} == {1}
    assert [batch[0].task.index for batch in actor.asked] == [1, 1, 2, 2, 2, 2, 0, 0]
    assert record["simulation_seconds"] >= SLOW_S
    lockstep = Forward()
    roll(lockstep, tmp_path / "lockstep", 1, make=make_slow)
    assert [q.task.index for q in lockstep.asked[0]] == [0, 1]


def test_the_policy_leaves_cores_to_busy_simulators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lockstep they wait for it, so it may use all."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    before, threads = torch.get_num_threads(), []

    class Counting(Forward):
        def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
            threads.append(torch.get_num_threads())
            return super().act(queries)

    torch.set_num_threads(8)
    try:
        roll(Counting(), tmp_path / "libero", 1, "libero_object", table=TABLE[:2])
        apart, after = set(threads), torch.get_num_threads()
        threads.clear()
        roll(Counting(), tmp_path / "lockstep", 1)
    finally:
        torch.set_num_threads(before)
    assert (apart, after, set(threads)) == ({6}, 8, {8})


def test_there_is_a_worker_for_each_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    actor = Forward()
    record = roll(actor, tmp_path, workers=0)
    assert (record["protocol"]["workers"], len(actor.asked[0])) == (3, 3)


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    whole = roll(Forward(), tmp_path / "whole", 3, tasks=(0, 2))
    roll(Forward(), tmp_path / "part", 3, tasks=(0, 2))
    journal = tmp_path / "part" / "episodes.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote the third episode
    actor = Forward()
    resumed = roll(actor, tmp_path / "part", 3, tasks=(0, 2))
    assert len({(q.task.index, q.init) for batch in actor.asked for q in batch}) == 4
    for record in (whole, resumed):
        for outcome in record["outcomes"]:
            del outcome["seconds"], outcome["simulation_seconds"], outcome["policy_seconds"]
    assert resumed["outcomes"] == whole["outcomes"]
    with pytest.raises(ValueError, match="holds another evaluation"):
        roll(Forward(), tmp_path / "part", 3, seed=1)


def test_a_journal_gives_back_what_was_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, identity = tmp_path / "episodes.jsonl", {"suite": "a"}

    def read(text: str) -> list[dict[str, Any]]:
        path.write_text(text)
        with Journal(path, identity) as journal:
            return journal.outcomes

    with Journal(path, identity) as journal:
        for init in range(3):
            journal.add({"init": init, "status": "success"})
    first, a, b, c = path.read_text().splitlines(keepends=True)
    assert read(first + a + a + b.replace("success", "failure") + c) == [journal.outcomes[i] for i in (0, 2)]
    assert "dropped 1 lines" in caplog.text
    with pytest.raises(ValueError, match="damaged in its first line"):
        read(first[9:] + a + b + c)
    assert path.read_text() == first[9:] + a + b + c


def test_errors_are_tried_again(tmp_path: Path) -> None:
    assert roll(Forward(), tmp_path, 2, tasks=(1,))["errors"] == 1
    actor = Forward()
    assert roll(actor, tmp_path, 2, tasks=(1,))["errors"] == 1
    assert [(q.task.index, q.init) for batch in actor.asked for q in batch] == [(1, CRASH)]


@pytest.mark.parametrize("first", [40, 60])
def test_other_initial_states_can_be_chosen(tmp_path: Path, first: int) -> None:
    record = roll(Forward(), tmp_path, 2, first=first, tasks=(0,), videos=1)
    assert [o["init"] for o in record["outcomes"]] == [first, first + 1]
    assert record["protocol"]["initial_states"] == f"{first}..{first + 1} of each task"
    assert [bool(o["video"]) for o in record["outcomes"]] == [True, False]


def test_films_hold_every_step(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    record = roll(Forward(), tmp_path, 2, tasks=(0,), videos=1)
    assert [bool(o["video"]) for o in record["outcomes"]] == [True, False]
    with av.open(str(tmp_path / record["outcomes"][0]["video"])) as video:
        frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    assert len(frames) >= 6
    assert frames[0].shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "at least one"),
        ({"first": 45, "episodes": 6}, "got 6 from 45 on"),
        ({"workers": -1}, "worker"),
        ({"tasks": (7,)}, "0 to 2"),
        ({"scene_prefix": True}, "tabletop_object name no scene"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        roll(Forward(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_random_actions_are_a_function_of_the_place_in_the_run() -> None:
    query = Query(TABLE[0], 3, 5, {})
    (first,), (again,) = RandomActor(1).act([query]), RandomActor(1).act([query])
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first, again)
    assert np.abs(first).max() <= 1.0
    assert (first != RandomActor(2).act([query])[0]).all()


def test_the_mean_trajectory_averages_the_experts_own_steps() -> None:
    actions = [np.full((3, 7), 1.0, np.float32), np.full((5, 7), 3.0, np.float32)]
    own = [np.array([True, False, True]), np.array([True, False, True, True, False])]
    mean = mean_trajectory(actions, own)
    np.testing.assert_allclose(mean[:, 0], [2.0, 2.0, 2.0, 3.0, 3.0])
    actor = OpenLoopActor({"move_0": mean})
    (chunk,) = actor.act([Query(TABLE[0], 0, 3, {})])
    assert chunk is not None
    np.testing.assert_allclose(chunk[:, 0], 3.0)
    with pytest.raises(ValueError, match="no demonstrations of task 'move_1'"):
        actor.act([Query(TABLE[1], 0, 0, {})])


def test_the_expert_succeeds_in_the_real_world_where_chance_does_not(tmp_path: Path) -> None:
    protocol = Protocol("tabletop_object", (0,), episodes=2, videos=0)
    assert evaluate(ExpertActor(), protocol, tmp_path / "expert", 1)["successes"] == 2
    assert evaluate(RandomActor(), replace(protocol, episodes=1), tmp_path / "random", 1)["successes"] == 0


def test_a_resumed_evaluation_is_of_one_version_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes of two simulator versions or two commits must not be counted under one record."""
    roll(Forward(), tmp_path, 1, tasks=(0,))
    origin = rollout.provenance()
    newer = origin | {"versions": origin["versions"] | {"mujoco": "9.9"}}
    monkeypatch.setattr(rollout, "provenance", lambda: newer)
    with pytest.raises(
        ValueError, match=r"versions\.mujoco: '[\d.]+' there, '9\.9' now\): give another --out"
    ):
        roll(Forward(), tmp_path, 2, tasks=(0,))
    monkeypatch.setattr(rollout, "provenance", lambda: origin | {"commit": "another"})
    with pytest.raises(ValueError, match=r"commit: .* there, 'another' now"):
        roll(Forward(), tmp_path, 2, tasks=(0,))


class Orders:
    """A worker's end of the pipe: gives it orders, keeps its reports."""

    def __init__(self, *orders: Any) -> None:
        self.orders, self.reports = list(orders), []

    def recv(self) -> Any:
        return self.orders.pop(0)

    def send(self, report: Any) -> None:
        self.reports.append(getattr(report, "status", report))  # the next order changes the report


def test_an_environment_that_raised_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold gigabytes and an OpenGL context; the next episode gets a fresh one."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    envs: list[Any] = []

    def make_closing(task: Task, views: Any) -> Any:
        envs.append(make(task, views))
        monkeypatch.setattr(envs[-1], "close", lambda: closed.append(len(envs)))
        return envs[-1]

    closed: list[int] = []
    job, again = (workers.Job(TABLE[1], init, False) for init in (CRASH, 0))
    pipe = Orders(job, np.zeros((1, 7)), again, None)
    settings = workers.Settings(make_closing, {}, False, 1, False, 0)
    workers._work(pipe, settings)  # pyright: ignore[reportArgumentType]
    assert pipe.reports == ["ready", "running", "error", "running"]
    assert (len(envs), closed) == (2, [1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"execute": 3}, "--execute is for a policy server or a checkpoint, not for random"),
        ("expert", {"device": "cuda"}, "--device is for a checkpoint, not for expert: leave it out"),
        (
            "open-loop",
            {"demos": Path("x"), "quantize": "int8"},
            "--quantize is for a checkpoint, not for open-loop",
        ),
        ("random", {"head": "discrete"}, "not for random"),
        ("ws://host", {"device": "cuda"}, "not for a policy server: give it to `worldvla serve` as --device"),
        ("ws://host", {"spread": 0.2}, "--spread is for a checkpoint, not for a policy server: leave it out"),
        (
            "expert",
            {"unnorm_key": "home"},
            "--unnorm-key is for a policy server or a checkpoint, not for expert",
        ),
        ("some/where", {"demos": Path("x")}, "--demos is for open-loop, not for a checkpoint"),
        ("open-loop", {}, "needs --demos"),
    ],
)
def test_options_that_the_actor_would_ignore_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message) if "needs" not in message else message):
        open_actor(name, "tabletop_object", **options)


def test_merged_shards_are_the_whole_evaluation(tmp_path: Path) -> None:
    whole = roll(Forward(), tmp_path / "whole", 4, tasks=(0, 2), videos=1)
    for i in range(4):
        roll(Forward(), tmp_path / f"{i}", 4, tasks=(0, 2), videos=1, shard=(i, 4))
    folders = [tmp_path / f"{i}" for i in (2, 0, 3, 1)]
    merged = merge(folders, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/record.json").read_text()) == merged

    def timeless(record: dict[str, Any]) -> str:
        left = {k: v for k, v in record.items() if "seconds" not in k}
        rows = [{k: v for k, v in o.items() if "seconds" not in k} for o in record["outcomes"]]
        return json.dumps(left | {"outcomes": rows})

    assert timeless(merged) == timeless(whole)
    assert merged["successes"] == 4
    videos = [sorted(p.name for p in (tmp_path / d / "videos").iterdir()) for d in ("whole", "merged")]
    assert videos[0] == videos[1] == ["00_00.mp4", "02_00.mp4"]
    for path in folders:
        shutil.rmtree(path / "videos", ignore_errors=True)
        (path / "tokens.npz").touch()
    assert merge(folders, tmp_path / "without_videos") == merged
    with pytest.raises(ValueError, match=r"shards 2/4, 0/4: expected each of 0/4 to 3/4 once"):
        merge(folders[:2], tmp_path / "none")
    with pytest.raises(ValueError, match="give the directories of the shards, got none"):
        merge([], tmp_path / "none")
    for changes in ({"seconds": None}, {"tasks": [{}]}, {"outcomes": [{}]}, {"protocol": {"shard": 3}}):
        write_json(tmp_path / "bad/record.json", {**whole, **changes})
        with pytest.raises(ValueError, match=r"bad/record.json is not an eval|shards \[3\]: exp"):
            merge([tmp_path / "bad"], tmp_path / "none")
    roll(Forward(), tmp_path / "1", 4, tasks=(0, 2), videos=1, shard=(1, 4), first=4)
    with pytest.raises(ValueError, match=r"another evaluation than .*initial_states: '4\.\.7 ") as error:
        merge(folders, tmp_path / "none")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"seed": 2**32}, {"videos": -1}])
def test_a_wrong_seed_or_number_of_films_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected a seed from 0 to 2\^32 - 1 and videos >= 0, got "):
        Protocol("tabletop_object", **wrong)


@pytest.mark.parametrize("shard", [(0, 3), (4, 4), (0, 0)])
def test_shards_that_do_not_divide_are_refused(tmp_path: Path, shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"tabletop_object has 8 episodes here; expected i/n"):
        roll(Forward(), tmp_path / "out", 4, tasks=(0, 2), shard=shard)
    assert not (tmp_path / "out").exists()


def test_a_model_is_warned_of_a_suite_that_it_was_not_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    actor = ModelActor("tabletop")
    image = np.zeros((64, 64, 3), np.uint8)
    observation = {"agentview": image, "wrist": image[:32, :32], "state": np.zeros(8, np.float32)}
    observation |= {"instruction": "pick it up", "previous": []}
    for name, expected in (("tabletop_goal", ""), ("libero_goal", "not on libero_goal; PSNR of its first")):
        actor.example = None
        actor.act([Query(Task(name, 0, "a_task", "pick it up"), 0, 0, observation)])
        err = capsys.readouterr().err
        assert expected in err
        assert bool(err) == bool(expected)
