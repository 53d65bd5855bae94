"""Data sets of others: genuine LeRobotDatasets v3.0 and v2.1 (tests/lerobot_v3/make.py) are read as they were
written, and whatever is wrong is one line with episode and frame.

Run: pytest tests/test_sources.py
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import check_fault
from scipy.spatial.transform import Rotation
from token_stubs import PixelSums

from worldvla.cli import main
from worldvla.config import ImageTokenizerConfig
from worldvla.data.collect import collect
from worldvla.data.episode import Episode, read_episodes, write_episodes
from worldvla.data.export import export_lerobot
from worldvla.data.sources import lerobot, open_source
from worldvla.data.sources.hdf5 import open_files
from worldvla.data.sources.source import Names
from worldvla.data.sources.summary import consistency, summary
from worldvla.data.store import TokenStore, write_store
from worldvla.data.tokenize import tokenize_source
from worldvla.image import resize_with_pad
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.image_tokenizer import load_frames

GENUINE = Path(__file__).parent / "lerobot_v3"
GENUINE_V21 = Path(__file__).parent / "lerobot_v21"
"""Its first 50 steps, as the writer of lerobot 0.3.3 has them: episodes of 30 and 20."""
DATA = "data/chunk-000/file-000.parquet"
CAMERAS = {"agentview": "observation.images.image", "wrist": "observation.images.wrist_image"}


def video(camera: str, root: Path = GENUINE) -> Path:
    return root / f"videos/{camera}/chunk-000/file-000.mp4"


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GENUINE, tmp_path / "set"))


def edit(root: Path, **changes: Any) -> None:
    """Change entries of meta/info.json."""
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(root: Path, name: str, row: int, value: Any) -> None:
    """Change one cell of the parquet file."""
    table = pq.read_table(root / DATA)
    cells = table.column(name).to_pylist()
    cells[row] = value
    kind = table.schema.field(name).type
    kind = pa.list_(kind.value_type) if pa.types.is_fixed_size_list(kind) else kind
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, pa.array(cells, kind)), root / DATA)


def write_video(path: Path, frames: np.ndarray, rate: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def check_episodes(episodes: list[Episode], lengths: list[int]) -> None:
    """Check numbers and instructions of the first episodes against the genuine parquet file."""
    table = pq.read_table(GENUINE / DATA)
    texts = ["pick up the milk", "pick up the butter", "pick up the milk"]
    assert [len(e) for e in episodes] == lengths
    assert [e.instruction for e in episodes] == texts[: len(lengths)]
    for name, column in {"actions": "action", "states": "observation.state"}.items():
        read = np.concatenate([getattr(e, name) for e in episodes])
        written = np.array(table.column(column).to_pylist(), np.float32)
        assert np.array_equal(read, written[: sum(lengths)])


def check_frames(episodes: list[Episode], videos: Callable[[str], list[Path]]) -> None:
    """Check pictures against the files of each camera, and against what the writer was handed (make.py)."""
    for view, camera in CAMERAS.items():
        frames = np.concatenate([e.images[view] for e in episodes])
        assert np.array_equal(frames, np.concatenate([decoded(path) for path in videos(camera)]))
    # Equal but for the loss of the video: no other frame is clearly closer.
    base = np.random.default_rng(0).integers(40, 200, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    handed = np.stack([base] * 30)
    for frame in range(30):
        handed[frame, 20:30, 5 + frame : 15 + frame] = (220, 30, 30)
    for episode in episodes:
        for frame in (0, len(episode) - 1):
            distance = np.abs(episode.images["agentview"][frame] - handed).mean((1, 2, 3))
            assert distance[frame] < min(5, distance.min() + 0.1)  # every other frame copies the last


def test_a_genuine_set_is_read_as_it_was_written():
    source = open_source(GENUINE)
    assert (source.kind, source.num_episodes, source.fps) == ("LeRobotDataset v3.0", 3, 20.0)
    assert {view: camera.feature for view, camera in source.cameras.items()} == CAMERAS
    assert source.action.names == ("x", "y", "z", "rx", "ry", "rz", "gripper")
    assert source.guesses == ("--camera " + " ".join(f"{view}={name}" for view, name in CAMERAS.items()),)
    episodes = list(source.episodes())
    check_episodes(episodes, [30, 30, 30])
    check_frames(episodes, lambda camera: [video(camera)])
    assert all(not e.images for e in source.episodes(images=False))


def test_a_genuine_v2_set_is_read_like_a_v3_one():
    source = open_source(GENUINE_V21)
    assert (source.kind, source.num_episodes, source.fps) == ("LeRobotDataset v2.1", 2, 20.0)
    assert (source.cameras, source.action) == (open_source(GENUINE).cameras, open_source(GENUINE).action)
    episodes = list(source.episodes())
    check_episodes(episodes, [30, 20])
    folder = GENUINE_V21 / "videos/chunk-000"
    check_frames(episodes, lambda camera: [folder / camera / f"episode_{i:06d}.mp4" for i in range(2)])
    chosen = open_source(GENUINE_V21, Names({"agentview": CAMERAS["wrist"]}))
    assert chosen.guesses == ()
    for plain, episode in zip(episodes, chosen.episodes(), strict=True):
        assert np.array_equal(episode.images["agentview"], plain.images["wrist"])


def test_cameras_that_no_view_shows_are_named(root: Path, capsys: pytest.CaptureFixture[str]):
    features = json.loads((root / "meta/info.json").read_text())["features"]
    depth = {"dtype": "video", "shape": [64, 64, 1], "names": ["height", "width", "channels"]}
    edit(root, features=features | {"observation.images.depth": depth})
    assert open_source(root).unused == ("observation.images.depth",)
    assert main(["inspect", str(root), "--camera", f"agentview={CAMERAS['agentview']}"]) == 0
    assert f"not used: {CAMERAS['wrist']}, observation.images.depth\n" in capsys.readouterr().out


def test_pictures_in_the_parquet_file_are_read(root: Path):
    """As lerobot writes a feature of type image: PNG bytes in a struct."""
    import io

    from PIL import Image

    info = json.loads((root / "meta/info.json").read_text())
    pictures = decoded(video(CAMERAS["wrist"]))
    cells = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "png")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    info["features"][CAMERAS["wrist"]]["dtype"] = "image"
    edit(root, features=info["features"])
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pq.read_table(root / DATA).append_column(CAMERAS["wrist"], pa.array(cells, kind))
    pq.write_table(table, root / DATA)
    episodes = list(open_source(root).episodes())
    assert np.array_equal(np.concatenate([e.images["wrist"] for e in episodes]), pictures)


def cut_video(root: Path, frames: int, rate: int = 20) -> None:
    path = video(CAMERAS["wrist"], root)
    pictures = decoded(path)
    write_video(path, np.concatenate([pictures, pictures[:5]])[:frames], rate)


def shorten(root: Path, **_: Any) -> None:
    """Leave one step of the last episode."""
    pq.write_table(pq.read_table(root / DATA).slice(0, 61), root / DATA)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("length")
    pq.write_table(table.set_column(at, "length", pa.array([30, 30, 1])), path)
    edit(root, total_frames=61)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing video": (
        lambda r: video(CAMERAS["wrist"], r).unlink(),
        r"episode 0: frame 0: no .*file-000.mp4",
    ),
    "short video": (partial(cut_video, frames=85), r"episode 2: frame 25: wrist has 25 frames, expected 30"),
    "long video": (partial(cut_video, frames=92), r"episode 2: frame 30: .*goes on after"),
    "fast video": (partial(cut_video, frames=90, rate=30), r"episode 0: frame 0: .*30 frames a second"),
    "order": (
        lambda r: put(r, "timestamp", 35, 0.1),
        r"episode 1: frame 5: timestamp 0.1000 s follows 0.2000",
    ),
    "rate": (lambda r: edit(r, fps=10), r"episode 0: frame 1: .*20 frames a second.*declares 10"),
    "nan": (lambda r: put(r, "action", 63, [0.0] * 6 + [float("nan")]), r"episode 2: frame 3: action is not"),
    "one step": (shorten, r"episode 2: it has one step \(frame 0\)"),
    "sizes": (
        lambda r: put(r, "action", 31, [0.0] * 6),
        r"episode 1: frame 1: action has 6 numbers, expected 7",
    ),
    "count": (lambda r: edit(r, total_frames=91), r"total_frames 91, its episodes have 90"),
    "version": (lambda r: edit(r, codebase_version="v1.6"), r"LeRobotDataset v1.6, v3.0 and v2.x are read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(root: Path, name: str):
    spoil, expected = BAD[name]
    spoil(root)
    check_fault(root, expected)


def test_sound_episodes_are_read_beside_a_broken_one(root: Path):
    put(root, "action", 31, [0.0] * 6)
    found = dict(open_source(root).attempts(False))
    assert [name for name, e in found.items() if isinstance(e, ValueError)] == ["episode 1"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            Names({"agentview": "observation.images.top"}),
            "no camera for --camera agentview=observation.images.top",
        ),
        (Names(action="actions"), "no feature 'actions' for --action: the data set has"),
    ],
)
def test_a_mapping_to_what_is_not_there_names_what_is(names: Names, expected: str):
    with pytest.raises(ValueError, match=expected):
        open_source(GENUINE, names)


def test_tokenize_takes_a_lerobot_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shape = ImageTokenizerConfig(
        channels=4, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, embed_dim=4, num_codes=16
    )
    ImageTokenizer(shape).save(tmp_path / "image")
    words = ["tokenize", str(GENUINE), "--tokenizer", f"{tmp_path}/image", "--out", f"{tmp_path}/store"]
    assert main(words) == 0
    assert "guess: --camera agentview=observation.images.image wrist=" in capsys.readouterr().out
    store = TokenStore.open(tmp_path / "store")
    facts = store.manifest["source"]
    assert (len(store), len(store.episodes), facts["fps"]) == (90, 3, 20.0)
    assert facts["cameras"]["wrist"] == {
        "feature": CAMERAS["wrist"],
        "rows": 64,
        "cols": 64,
        "stored": [0, 0],
    }
    assert facts["action_names"][-1] == "gripper"
    assert main([*words, "--camera", "agentview=observation.images.top"]) == 2
    assert "observation.images.image, observation.images.wrist_image" in capsys.readouterr().err


def test_inspect_prints_what_a_set_holds(root: Path, capsys: pytest.CaptureFixture[str]):
    put(root, "action", 31, [0.0] * 6)
    assert main(["inspect", str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "LeRobotDataset v3.0: 3 episodes, 60 steps, 20.0 steps a second" in lines
    assert "camera wrist = observation.images.wrist_image, 64 x 64 pixels" in lines
    assert any(line.startswith("instruction 'pick up the milk': 2 episodes") for line in lines)
    assert lines[-1].startswith("broken: ")
    assert "episode 1: frame 1" in lines[-1]
    assert not any("absolute" in line for line in lines)


def test_absolute_actions_and_idle_steps_are_suspected():
    episode = next(open_source(GENUINE).episodes(images=False))
    states = np.repeat(episode.states[::2], 2, axis=0)  # every second step stands still
    actions = np.concatenate([np.roll(states, -1, axis=0)[:, :3], episode.actions[:, 3:]], axis=1)
    told = replace(episode, states=states, actions=actions)
    source = replace(open_source(GENUINE), attempts=lambda _: iter([("episode 0", told)]))
    lines = list(summary(source))
    suspects = [line.split()[1] for line in lines if "absolute" in line]
    assert suspects == ["x", "y", "z"]
    assert any(line.startswith("idle: 51.7%") for line in lines)


def test_the_verdict_on_a_gripper_is_that_of_its_fingers(root: Path):
    """Two hands: one command is 0 closed, 1 open; the other a target that a state of its name follows."""
    features = json.loads((root / "meta/info.json").read_text())["features"]
    features["action"] |= {"names": ["a", "b", "c", "d", "e", "left_gripper", "right_gripper"], "unit": "rad"}
    features["observation.state"]["names"] = [*"abcdef", "left_gripper", "right_gripper_closed"]
    edit(root, features=features)
    source = open_source(root)
    assert source.action.units == "rad"
    episode = next(source.episodes(images=False))
    command, states, actions = np.arange(30) // 5 % 2, episode.states.copy(), episode.actions.copy()
    states[:, 6:] = 0
    actions[:, 5], actions[:, 6] = command, 90 * command

    def lines(**changes: Any) -> list[str]:
        handed = replace(episode, actions=actions, states=states)
        told = replace(source, attempts=lambda _: iter([("episode 0", handed)]), **changes)
        return [line for line in summary(told) if line.startswith("gripper")]

    libero = "LIBERO's is -1 open, 1 closed"
    nameless = replace(source.action, names=tuple("abcdefg"))
    unknown = "0 to 90, no state shows which is open"
    assert lines(action=nameless) == [f"gripper = g (a guess: the last action): {unknown}; {libero}"]
    states[1:, 6] = 0.04 * command[:-1]
    assert lines()[0] == f"gripper = left_gripper: 0 closed, 1 open; {libero}"
    states[:, 6], states[1:, 7] = 0, 0.8 * command[:-1]
    assert lines()[1] == f"gripper = right_gripper: 0 open, 90 closed; {libero}"


def test_inspect_writes_a_page_with_a_film_strip_an_episode(root: Path, tmp_path: Path):
    put(root, "action", 31, [0.0] * 6)
    page = tmp_path / "set.html"
    assert main(["inspect", str(root), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<figure") == text.count("data:image/jpeg;base64,") == 2  # one of three is broken
    assert "pick up the milk (30 steps; frames 0, 4, 8, 12, 17, 21, 25, 29)" in text
    assert "episode 1: frame 1: action has 6 numbers" in text


def test_a_data_set_of_the_hub_is_read_at_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The hub's own cache, offline: refs name a commit, whose folder is the data set."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "datasets--some--robot", "0123456789abcdef0123456789abcdef01234567"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/v3.0").write_text(commit)
    shutil.copytree(GENUINE, cache / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = open_source(Path("some/robot@v3.0"))
    assert (source.repo, source.revision, source.num_episodes) == ("some/robot", commit, 3)
    assert source.facts()["repo"] == "some/robot"
    assert next(source.episodes(images=False)).suite == "robot"
    assert main(["inspect", "some/robot@v9"]) == 2
    error = capsys.readouterr().err
    assert "does not give some/robot at revision v9" in error
    assert error.count("\n") == 1
    assert main(["inspect", "some/robot@"]) == 2
    error = capsys.readouterr().err
    assert "some/robot@ has no revision" in error
    assert error.count("\n") == 1


def test_delta_takes_absolute_actions_relative_to_the_state():
    plain, source = open_source(GENUINE), open_source(GENUINE, Names(delta=True))
    assert source.delta == ("x", "y", "z", "rx", "ry", "rz")  # the gripper stays
    assert "--delta: the state is subtracted from x, y, z, rx, ry, rz" in source.guesses
    assert source.facts()["delta"] == list(source.delta)
    for absolute, episode in zip(plain.episodes(images=False), source.episodes(images=False), strict=True):
        assert np.array_equal(episode.actions[:, :6], absolute.actions[:, :6] - absolute.states[:, :6])
        assert np.array_equal(episode.actions[:, 6], absolute.actions[:, 6])


def test_frames_are_resized_as_the_server_does_it():
    sizes = {"agentview": (32, 48)}
    source = open_source(GENUINE, Names(sizes=sizes))
    camera = source.cameras["agentview"]
    assert (camera.rows, camera.cols, camera.stored) == (32, 48, (64, 64))
    small, plain = next(source.episodes()), next(open_source(GENUINE).episodes())
    expected = [resize_with_pad(image, 32, 48) for image in plain.images["agentview"]]
    assert np.array_equal(small.images["agentview"], expected)
    assert np.array_equal(small.images["wrist"], plain.images["wrist"])
    with pytest.raises(ValueError, match="no view 'top' to resize: the views are agentview, wrist"):
        open_source(GENUINE, Names(sizes={"top": (32, 32)}))


def episode_statistics(root: Path) -> set[tuple[str, ...]]:
    """Return (feature, statistic) of the columns that meta/episodes has of each episode."""
    names = pq.read_schema(root / "meta/episodes/chunk-000/file-000.parquet").names
    return {tuple(name.split("/")[1:]) for name in names if name.startswith("stats/")}


@pytest.mark.parametrize("pictures", ["png", "video"])
def test_an_exported_set_is_read_again_as_it_was(tmp_path: Path, pictures: str):
    out = tmp_path / "out"
    assert main(["export-dataset", str(GENUINE), "--out", str(out), "--pictures", pictures]) == 0
    before, after = open_source(GENUINE), open_source(out)
    assert (after.fps, after.action.names, after.state.names) == (
        20.0,
        before.action.names,
        before.state.names,
    )
    for old, new in zip(before.episodes(), after.episodes(), strict=True):
        assert new.instruction == old.instruction
        assert np.array_equal(new.actions, old.actions)
        assert np.array_equal(new.states, old.states)
        for view, frames in old.images.items():
            distance = np.abs(new.images[view].astype(int) - frames).mean()
            assert distance == 0 if pictures == "png" else distance < 3
    stats = json.loads((out / "meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in before.episodes(images=False)])
    assert np.allclose(stats["action"]["q99"], np.quantile(actions.astype(np.float64), 0.99, axis=0))
    pixels = np.concatenate([e.images["wrist"][::10] for e in before.episodes()]) / 255
    found = stats["observation.images.wrist"]
    assert np.allclose(np.ravel(found["mean"]), pixels.mean((0, 1, 2)), atol=1e-9)
    assert np.allclose(
        np.ravel(found["q90"]), np.quantile(pixels, 0.9, axis=(0, 1, 2), method="inverted_cdf")
    )
    assert episode_statistics(out) == {
        (name, key) for name in stats for _, key in episode_statistics(GENUINE)
    }  # else lerobot cannot read what it appends
    assert main(["export-dataset", str(GENUINE), "--out", str(out)]) == 2


def test_pictures_of_two_sizes_are_exported_apart(tmp_path: Path):
    collect("tabletop_object", tmp_path / "demos", episodes=1, tasks=(0, 1), workers=1)
    first, second = sorted((tmp_path / "demos").glob("*.hdf5"))
    (episode,) = read_episodes(second)
    small = {view: frames[:, ::2, ::2].copy() for view, frames in episode.images.items()}
    second.unlink()
    write_episodes(second, [replace(episode, images=small)], {})
    source = open_files(tmp_path / "demos", [first, second])
    assert source is not None
    with pytest.raises(ValueError, match=r"episode 1 .* has pictures .*: export them apart"):
        export_lerobot(source, tmp_path / "out")


@pytest.mark.parametrize("frame", [0, 10, 29])
def test_a_damaged_video_names_the_frame(tmp_path: Path, frame: int):
    """Bytes that are lost, which an H.264 decoder would paint over. Later episodes are read."""
    export_lerobot(open_source(GENUINE), tmp_path / "out")
    path = video("observation.images.wrist", tmp_path / "out")
    with av.open(str(path)) as container:
        packets: Any = [p for p in container.demux(video=0) if p.size]
        places = {round(20 * p.pts * p.time_base): (p.pos, p.size) for p in packets}
    (start, size), data = places[30 + frame], bytearray(path.read_bytes())
    data[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(data)
    faults = {n: e for n, e in open_source(tmp_path / "out").attempts(True) if isinstance(e, ValueError)}
    assert re.search(rf"episode 1: frame {frame}: .*file-000.mp4 is damaged", str(faults["episode 1"]))
    assert list(faults) == (
        ["episode 1"] if frame else ["episode 0", "episode 1"]
    )  # a decoder is a frame behind


def test_hdf5_files_of_a_simulator_of_12_5_hz_are_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["collect", "tabletop_object", "--out", f"{tmp_path}/demos", "--episodes", "1", "--tasks", "0"]
    assert main([*words, "--workers", "1"]) == 0
    assert main(["export-dataset", f"{tmp_path}/demos", "--out", f"{tmp_path}/out"]) == 0
    assert "warning: 12.5 steps per second: lerobot 0.6.1 reads" in capsys.readouterr().err
    old = next(open_source(tmp_path / "demos").episodes(images=False))
    source = open_source(tmp_path / "out")
    new = next(source.episodes())
    assert main(["inspect", f"{tmp_path}/demos"]) == 0
    text = capsys.readouterr().out
    assert "gripper = gripper: -1 open, 1 closed; as LIBERO's\n" in text
    assert "action = actions, 7 numbers, units: 1 is 0.05 m or 0.5 rad in a step\n" in text
    assert "state = robot_states, 8 numbers, units: m, rad (axis-angle), m\n" in text
    assert (source.fps, new.instruction) == (12.5, old.instruction)
    assert np.array_equal(new.actions, old.actions)


def test_two_ways_of_one_grasp_are_seen():
    """Half of the demonstrations grasp a quarter turn from the others, and half go by a detour of 10 cm."""

    def episode(yaw: float, detour: float) -> Episode:
        states = np.zeros((21, 8), np.float32)
        states[:, 0] = np.linspace(0, 0.3, 21)
        states[:, 1] = detour * np.sin(np.linspace(0, np.pi, 21))
        states[:, 3:6] = Rotation.from_euler("XZ", [np.pi, yaw]).as_rotvec()  # the hand points down
        actions = np.full((21, 7), -1, np.float32)
        actions[15:, 6] = 1
        return Episode(
            instruction="open the drawer",
            suite="home",
            task="drawer",
            actions=actions,
            states=states,
            images={},
            sim_states=np.zeros((21, 0)),
            is_expert=np.ones(21, np.bool_),
            init=-1,
            seed=-1,
        )

    alike = consistency([episode(0.3, 0.0), episode(0.3 + np.pi, 0.0)])  # fingers have no sign
    assert alike == "yaw at the first grasp +-0 degrees, way there +-0.0 cm"
    words = consistency([episode(yaw, way) for yaw in (0.0, np.pi / 3) for way in (0.0, 0.1)]).split()
    yaw, way = (float(word.removeprefix("+-")) for word in words if word.startswith("+-"))
    assert 25 < yaw < 45
    assert 1 < way < 3  # half of the detour, as far as it bends


def test_tokenising_again_encodes_only_what_changed(root: Path, tmp_path: Path):
    tokenizer, out = PixelSums(), tmp_path / "store"
    for _ in range(2):
        tokenize_source(open_source(root), tokenizer, out)
        assert tokenizer.seen == 2 * 90
    tokenize_source(open_source(root, Names({"agentview": CAMERAS["wrist"]})), tokenizer, out)
    assert tokenizer.seen == 3 * 90
    put(root, "action", 31, [0.0] * 6)
    put(root, "action", 62, [math.nan] * 7)
    several = "2 faults: .* episode 1: frame 1: action has 6.*episode 2: frame 2: action is not finite"
    with pytest.raises(ValueError, match=several):
        tokenize_source(open_source(root), tokenizer, out)
    assert tokenizer.seen == 3 * 90  # nothing is encoded before all is checked
    assert len(TokenStore.open(out)) == 90
    store = tokenize_source(open_source(root), tokenizer, out, skip_bad=True)
    assert (len(store), store.manifest["source"]["skipped"]["count"]) == (30, 2)


def test_other_words_make_another_store(root: Path, tmp_path: Path):
    store = tokenize_source(open_source(root), PixelSums(), tmp_path / "store")
    tasks = pq.read_table(root / "meta/tasks.parquet")
    at = tasks.column_names.index("__index_level_0__")
    words = pa.array([f"gently {word}" for word in tasks.column(at).to_pylist()])
    changed = tasks.set_column(at, tasks.column_names[at], words)
    pq.write_table(changed.replace_schema_metadata(tasks.schema.metadata), root / "meta/tasks.parquet")
    again = tokenize_source(open_source(root), PixelSums(), tmp_path / "store")
    assert [e.instruction for e in again.episodes] == [f"gently {e.instruction}" for e in store.episodes]


@pytest.mark.parametrize("shape", [[96, 128, 3], [3, 96, 128]])
def test_channels_may_come_first(shape: list[int]):
    assert lerobot._size({"shape": shape, "names": None}) == (96, 128, 3)


def test_a_set_without_its_tasks_says_so(root: Path):
    (root / "meta/tasks.parquet").unlink()
    with pytest.raises(ValueError, match=r"^no .*tasks\.parquet: download the data set again$"):
        open_source(root)


def test_broken_episodes_are_left_out_where_one_asks_for_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    put(root, "action", 62, [math.nan] * 7)
    with pytest.raises(ValueError, match="episode 2: frame 2: action is not finite"):
        load_frames([open_source(root)])
    sound = open_source(root).sound()
    assert sum(len(view.train) + len(view.val) for view in load_frames([sound])) == 2 * 60
    assert export_lerobot(sound, tmp_path / "copy") == 2
    assert capsys.readouterr().err.count("left out: ") == 1
    assert open_source(tmp_path / "copy").num_episodes == 2


def test_a_store_holds_any_number_of_dims(tmp_path: Path):
    def episode(dims: int) -> Episode:
        return Episode(
            instruction="fold the towel",
            suite="home",
            task="fold",
            actions=np.zeros((4, dims), np.float32),
            states=np.ones((4, 14), np.float32),
            images={
                view: np.zeros((4, 4, size, 3), np.uint8) for view, size in (("a", 4), ("b", 6), ("c", 8))
            },
            sim_states=np.zeros((4, 0)),
            is_expert=np.ones(4, dtype=np.bool_),
            init=-1,
            seed=-1,
        )

    store = TokenStore.open(write_store(tmp_path / "store", [episode(14)] * 2, PixelSums()))
    assert (store.actions.shape, store.states.shape) == ((8, 14), (8, 14))
    assert store.grids == {"a": (2, 2), "b": (2, 3), "c": (2, 4)}
    with pytest.raises(ValueError, match="actions must be"):
        write_store(tmp_path / "mixed", [episode(14), episode(7)], PixelSums())
