"""The file format: what is written is read back, published LIBERO files are understood, bad files are named.

Run: pytest tests/test_episode.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from worldvla.cli import main
from worldvla.data.episode import (
    Episode,
    control_rate,
    demonstration_files,
    read_episodes,
    unused_pictures,
    write_episodes,
)
from worldvla.data.sources import open_source


def _episode(length: int = 5, seed: int = 0) -> Episode:
    rng = np.random.default_rng(seed)
    pictures = {"agentview": (8, 6, 3), "wrist": (4, 4, 3)}
    return Episode(
        instruction="put the red cube in the basket",
        suite="tabletop_object",
        task="put_the_red_cube_in_the_basket",
        actions=rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        states=rng.normal(size=(length, 8)).astype(np.float32),
        images={view: rng.integers(0, 256, (length, *shape), np.uint8) for view, shape in pictures.items()},
        sim_states=rng.normal(size=(length, 11)),
        is_expert=rng.random(length) < 0.7,
        init=50 + seed,
        seed=seed,
    )


def _assert_same(a: Episode, b: Episode) -> None:
    for name, value in vars(a).items():
        if name != "images":
            np.testing.assert_array_equal(value, getattr(b, name))
    assert a.images.keys() == b.images.keys()
    for view, images in a.images.items():
        np.testing.assert_array_equal(images, b.images[view])


def _foreign(path: Path, episode: Episode, *, made_by: str) -> None:
    """Write `episode` as LIBERO's create_dataset.py ("libero") or WorldVLA's regenerate_*.py ("replay")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_episodes(path, [episode], {})
    with h5py.File(path, "r+") as file:
        data = file["data"]
        assert isinstance(data, h5py.Group)
        demo = data["demo_0"]
        del data.attrs["sha256"]
        assert isinstance(demo, h5py.Group)
        for name in ("init", "seed", "suite", "task", "instruction", "sha256"):
            del demo.attrs[name]
        del demo["is_expert"]
        demo["obs/joint_states"] = np.zeros((len(episode), 7))
        for key in ("obs/agentview_rgb", "obs/eye_in_hand_rgb"):
            images = demo[key][()]  # pyright: ignore[reportIndexIssue]
            demo[key][...] = images[:, ::-1, ::-1]  # pyright: ignore
        if made_by == "libero":
            data.attrs["problem_info"] = json.dumps({"language_instruction": ['"', "put ", "it", '"']})
            data.attrs["bddl_file_name"] = "x/bddl_files/libero_object/put_it_in_the_basket.bddl"
        else:
            for name in ("problem_info", "env_args", "num_demos", "total"):
                del data.attrs[name]
            for name in ("num_samples", "init_state"):
                del demo.attrs[name]


def test_what_is_written_is_read_back(tmp_path):
    episodes = [
        _episode(length, seed) for seed, length in enumerate((5, 1, 40, *[2] * 9))
    ]  # demo_10 follows demo_9
    write_episodes(tmp_path / "a_demo.hdf5", episodes, {"env_name": "tabletop"})
    found = list(read_episodes(tmp_path / "a_demo.hdf5"))
    assert len(found) == len(episodes)
    for a, b in zip(episodes, found, strict=True):
        _assert_same(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["a_demo.hdf5"]


def test_layout_is_liberos(tmp_path):
    episode = _episode()
    write_episodes(tmp_path / "a.hdf5", [episode, episode], {"env_name": "tabletop"})
    with h5py.File(tmp_path / "a.hdf5") as file:
        data = file["data"]
        assert isinstance(data, h5py.Group)
        assert (data.attrs["num_demos"], data.attrs["total"]) == (2, 10)
        assert json.loads(str(data.attrs["problem_info"]))["language_instruction"] == episode.instruction
        assert json.loads(str(data.attrs["env_args"])) == {"env_name": "tabletop"}
        demo = data["demo_1"]
        assert isinstance(demo, h5py.Group)
        assert set(demo) == {"actions", "states", "robot_states", "rewards", "dones", "is_expert", "obs"}
        rgb = {"agentview_rgb", "eye_in_hand_rgb"}
        assert set(demo["obs"]) == rgb | {"ee_pos", "ee_ori", "ee_states", "gripper_states"}  # pyright: ignore
        assert demo.attrs["num_samples"] == 5
        np.testing.assert_array_equal(demo.attrs["init_state"], episode.sim_states[0])
        np.testing.assert_array_equal(demo["dones"], [0, 0, 0, 0, 1])
        np.testing.assert_array_equal(demo["rewards"], [0, 0, 0, 0, 1])


def test_reading_without_images(tmp_path):
    write_episodes(tmp_path / "a.hdf5", [_episode()], {})
    (found,) = read_episodes(tmp_path / "a.hdf5", images=False)
    assert found.images == {}
    np.testing.assert_array_equal(found.actions, _episode().actions)


def test_liberos_own_file_is_turned_and_shifted(tmp_path):
    """create_dataset.py records the observation after the action: observation t belongs to action t + 1."""
    episode, path = _episode(), tmp_path / "downloads" / "x_demo.hdf5"
    _foreign(path, episode, made_by="libero")
    (found,) = read_episodes(path)
    assert (found.instruction, found.suite, found.task) == ("put it", "libero_object", "put_it_in_the_basket")
    assert (found.init, found.seed, len(found)) == (-1, -1, 4)
    assert found.is_expert.all()
    np.testing.assert_array_equal(found.actions, episode.actions[1:])
    np.testing.assert_array_equal(found.sim_states, episode.sim_states[1:])
    np.testing.assert_array_equal(found.states, episode.states[:-1])
    for view, images in episode.images.items():
        np.testing.assert_array_equal(found.images[view], images[:-1])


def test_replayed_file_without_attributes_is_turned_and_named_after_itself(tmp_path):
    path = tmp_path / "libero_10_no_noops" / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"
    _foreign(path, _episode(), made_by="replay")
    (found,) = read_episodes(path)
    told = {"instruction": "turn on the stove", "suite": "libero_10", "task": path.stem.removesuffix("_demo")}
    expected = replace(_episode(), **told, init=-1, seed=-1, is_expert=np.ones(5, dtype=np.bool_))
    _assert_same(found, expected)


def test_every_camera_is_read_and_other_pictures_are_named(tmp_path, capsys):
    """Also in LIBERO's own files, which are turned; a camera whose name is taken keeps its whole one."""
    episode, path = _episode(), tmp_path / "set" / "x_demo.hdf5"
    more = {view: episode.images["agentview"] ^ i for i, view in enumerate(("front", "wrist_rgb"), 1)}
    episode = replace(episode, images=episode.images | more)
    write_episodes(path, [episode], {})
    (found,) = read_episodes(path)
    _assert_same(found, episode)
    _foreign(path, episode, made_by="libero")
    with h5py.File(path, "r+") as file:
        for view in more:
            key = f"data/demo_0/obs/{view.removesuffix('_rgb')}_rgb"
            file[key][...] = file[key][()][:, ::-1, ::-1]  # pyright: ignore
        file["data/demo_0/obs/front_depth"] = np.zeros((5, 8, 6, 1), np.float32)
    (found,) = read_episodes(path)
    assert list(found.images) == ["agentview", "wrist", "front", "wrist_rgb"]
    for view, images in episode.images.items():
        np.testing.assert_array_equal(found.images[view], images[:-1])
    assert list(open_source(path).cameras) == list(found.images)
    store = ["--tokenizer", f"{tmp_path}/none", "--out", f"{tmp_path}/store"]
    for words in (["inspect", str(path)], ["tokenize", str(path), *store]):
        main(words)
        assert "not used: obs/front_depth\n" in capsys.readouterr().out


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*gone\.hdf5"):
        next(read_episodes(tmp_path / "gone.hdf5"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change(name: str, value: np.ndarray | None):
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values() if name.count("/") > 1 else ():  # pyright: ignore
                del demo.attrs["sha256"]
                file["data"].attrs.pop("sha256", None)
            del file[name]
            if value is not None:
                file[name] = value

    return edit


def _retell(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data"].attrs["problem_info"] = "{"


def _elsewhere(path: Path) -> None:
    write_episodes(path.with_name("other.hdf5"), [_episode()], {})
    _change("data/demo_0/actions", None)(path)
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"] = h5py.ExternalLink("other.hdf5", "data/demo_0/actions")


def _outside(path: Path) -> None:
    _change("data/demo_0/actions", None)(path)
    with h5py.File(path, "r+") as file:
        file.create_dataset("data/demo_0/actions", (5, 7), "f8", external=[(path.name, 0, 280)])


def _huge(path: Path) -> None:
    _change("data/demo_0/obs/agentview_rgb", None)(path)
    shape, chunks = (14, 150_000, 150_000, 3), (1, 100, 100, 3)
    with h5py.File(path, "r+") as file:
        file.create_dataset("data/demo_0/obs/agentview_rgb", shape, "u1", chunks=chunks)


def _flip(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_0/actions"][3, 1] += 1e-3  # pyright: ignore[reportIndexIssue, reportOperatorIssue]


def _endless(path: Path) -> None:
    _change("data/demo_0/obs", None)(path)
    with h5py.File(path, "r+") as file:
        file["data/demo_0/obs"] = h5py.SoftLink("/data/demo_0/obs")


def _tell(name: str, value: object):
    def edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file["data/demo_0"].attrs[name] = value

    return edit


NAN = np.zeros((5, 7))
NAN[3, 2] = np.nan


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_truncate, "no HDF5 file; is it truncated"),
        (lambda path: path.write_text("hello"), "no HDF5 file; is it truncated"),
        (_change("data", None), "no group 'data', only"),
        (_change("data", np.zeros(3)), "no group 'data', only"),
        (_change("data/demo_0", None), "holds no demonstrations"),
        (_change("data/demo_0/actions", None), r"demo_0 is damaged.*missing \['actions'\]"),
        (_change("data/demo_0/obs", None), "demo_0 is damaged.*missing .*obs/ee_pos"),
        (
            _change("data/demo_0/actions", np.zeros((5, 6))),
            "actions must be float32 5 x 7, got float32 5 x 6",
        ),
        (_change("data/demo_0/actions", np.zeros((4, 7))), "different lengths.*'actions': 4, 'states': 5"),
        (_change("data/demo_0/actions", NAN), "actions is not finite at step 3"),
        (_elsewhere, "actions is a link to another file"),
        (_outside, "actions is no dataset of this file"),
        (_huge, r"\(14, 150000, 150000, 3\) takes 945 GB, 0 bytes are stored"),
        (_flip, r"demo_0 is damaged.*actions not as they were written \(SHA-256\)"),
        (
            _change("data/demo_0/obs/agentview_rgb", np.zeros((5, 8, 6, 3))),
            "uint8 5 x any x any x 3, got float64",
        ),
        (_change("data/demo_0/obs/agentview_rgb", np.zeros(5, np.uint8)), "must be uint8 5 x any x any x 3"),
        (
            _change("data/demo_0/obs/ee_pos", np.zeros((5, 4))),
            "states must be float32 5 x 8, got float32 5 x 9",
        ),
        (_change("data/demo_0/is_expert", np.zeros(4, np.bool_)), "different lengths.*.is_expert.: 4"),
        (_retell, "problem_info of data is damaged or no JSON"),
        (_endless, "obs is a link to links without end"),
        (_change("data/demo_0/actions", np.ones((5, 7), complex)), "actions holds complex128, expected real"),
        (_change("data/demo_0/actions", np.full((5, 7), b"1")), r"actions holds \|S1, expected real numbers"),
        (
            _change("data/demo_0/obs/agentview_rgb", np.zeros((5, 0, 8, 3), np.uint8)),
            "uint8 5 x any x any x 3, got uint8 5 x 0 x 8 x 3",
        ),
        (_tell("instruction", 3), "attribute instruction is int64, expected a text"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, break_it, message):
    path = tmp_path / "a.hdf5"
    write_episodes(path, [_episode()], {})
    break_it(path)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_episodes(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(unused_pictures([path]), list)  # what it cannot read is said by who reads it


def test_a_text_may_be_stored_as_its_bytes(tmp_path):
    write_episodes(tmp_path / "a.hdf5", [_episode()], {})
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        words = str(file["data/demo_0"].attrs["instruction"])
        file["data/demo_0"].attrs["instruction"] = np.bytes_(words)
        file["data"].attrs["problem_info"] = np.bytes_(str(file["data"].attrs["problem_info"]))
    assert [episode.instruction for episode in read_episodes(tmp_path / "a.hdf5")] == [words]


@pytest.mark.parametrize("rate", ["[]", "{", '{"env_kwargs": 3}', '{"env_kwargs": {"control_freq": NaN}}'])
def test_a_rate_that_is_none_is_not_told(rate, tmp_path):
    write_episodes(tmp_path / "a.hdf5", [replace(_episode(), suite="home")], {})
    with h5py.File(tmp_path / "a.hdf5", "r+") as file:
        file["data"].attrs["env_args"] = rate
    assert control_rate(tmp_path / "a.hdf5") is None


def test_a_file_is_given_once(tmp_path):
    write_episodes(tmp_path / "a.hdf5", [_episode()], {})
    with pytest.raises(ValueError, match=r"a\.hdf5 is given 2 times: give every file once"):
        demonstration_files([tmp_path, tmp_path / "a.hdf5"])


def test_files_without_pictures_are_refused_unless_none_are_wanted(tmp_path):
    write_episodes(tmp_path / "a.hdf5", [replace(_episode(), images={})], {})
    with pytest.raises(ValueError, match="no pictures"):
        list(read_episodes(tmp_path / "a.hdf5"))
    assert len(list(read_episodes(tmp_path / "a.hdf5", images=False))) == 1


def test_episodes_without_steps_are_refused():
    with pytest.raises(ValueError, match="no steps"):
        _episode(length=0)


def test_failed_writing_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.hdf5"
    write_episodes(path, [_episode()], {})
    before = path.read_bytes()

    def broken():
        yield _episode()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(path, broken(), {})
    with pytest.raises(ValueError, match="no episodes to write"):
        write_episodes(path, [], {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_episode import _episode, write_episodes
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    write_episodes(Path(sys.argv[1]), [_episode(400)], {})
except OSError as error:
    sys.exit(f"one line: {error}")
"""


def test_full_disk_is_one_clear_line(tmp_path):
    path = tmp_path / "a.hdf5"
    command = [sys.executable, "-c", FULL_DISK, str(path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        f"one line: cannot write {path}: File too large: free some space, then repeat the command\n"
    )
    assert list(tmp_path.iterdir()) == []
