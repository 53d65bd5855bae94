"""RLDS: data sets that tensorflow-datasets wrote (tests/rlds, by its make.py) are read as TFDS reads them,
without TensorFlow, and whatever is wrong is one line with episode and frame.

Run: pytest tests/test_rlds.py
"""

import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import check_fault
from PIL import Image

from worldvla.cli import main
from worldvla.config import ImageTokenizerConfig
from worldvla.data.sources import open_source, rlds
from worldvla.data.sources.source import Names
from worldvla.data.store import TokenStore
from worldvla.tokenizers.image import ImageTokenizer

SHAPE = ImageTokenizerConfig(
    channels=4, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, embed_dim=4, num_codes=16
)
GENUINE = Path(__file__).parent / "rlds"
EXPECTED = np.load(GENUINE / "expected.npz")
CAMERAS = {"agentview": "observation/image", "wrist": "observation/wrist_image"}
OPEN_X = Names(state="observation/base_pose_tool_reached,observation/gripper_closed")


def expected(name: str, episode: int) -> np.ndarray:
    """Return what TFDS read of a feature."""
    data, _, feature = name.partition("/")
    return EXPECTED[f"{data}/{episode}/{feature}"]


def test_openvlas_libero_layout_is_read_as_tfds_reads_it():
    source = open_source(GENUINE / "tiny_libero")  # the folder above the version
    assert (source.kind, source.num_episodes) == ("RLDS tiny_libero 1.0.0: train 2, val 1", 3)
    assert {view: camera.feature for view, camera in source.cameras.items()} == CAMERAS
    assert source.guesses == ("--camera " + " ".join(f"{view}={name}" for view, name in CAMERAS.items()),)
    episodes = list(source.episodes())
    assert sorted(map(len, episodes)) == [7, 9, 12]
    for i, episode in enumerate(episodes):
        assert np.array_equal(episode.actions, expected("tiny_libero/action", i))
        assert np.array_equal(episode.states, expected("tiny_libero/observation/state", i))
        assert {episode.instruction} == set(expected("tiny_libero/language_instruction", i))
        for view, name in CAMERAS.items():  # TensorFlow's JPEG decoder rounds otherwise than Pillow's
            frames = expected(f"tiny_libero/{name}", i).astype(int)
            for frame, image in enumerate(episode.images[view]):
                distance = np.abs(image.astype(int) - frames).mean((1, 2, 3))
                assert distance.argmin() == frame
                assert distance[frame] < 1.2


def test_open_x_keys_are_read_with_a_dict_of_actions():
    with pytest.raises(
        ValueError, match=r"choose one of .*observation/base_pose_tool_reached.* --state NAME"
    ):
        open_source(GENUINE / "tiny_rt1")
    source = open_source(GENUINE / "tiny_rt1", OPEN_X)
    parts = [f"action/{name}" for name in ("world_vector", "rotation_delta", "gripper_closedness_action")]
    assert f"--action {','.join(parts)}" in source.guesses
    assert source.action.names[-2:] == ("rotation_delta 2", "gripper_closedness_action")
    assert source.state.names[-1] == "gripper_closed"
    for i, episode in enumerate(source.episodes()):
        whole = np.concatenate([expected(f"tiny_rt1/{name}", i) for name in parts], 1)
        assert np.array_equal(episode.actions, whole)
        assert np.array_equal(episode.images["agentview"], expected("tiny_rt1/observation/image", i))  # PNG


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GENUINE / "tiny_libero/1.0.0", tmp_path / "set"))


def shard(root: Path) -> Path:
    return root / "tiny_libero-train.tfrecord-00000-of-00001"


def change(feature: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    """Return what changes a feature of the second episode, checksums included."""

    def spoil(root: Path) -> None:
        found = list(rlds.records(rlds.Shard(shard(root), 2)))
        assert isinstance(found[1], bytes)
        example = rlds._example().FromString(found[1])
        edit(next(entry.value for entry in example.features.entry if entry.key == feature))
        found[1] = example.SerializeToString()
        framed = []
        for data in found:
            assert isinstance(data, bytes)
            length = struct.pack("<Q", len(data))
            framed += [length, rlds._masked_crc(length), data, rlds._masked_crc(data)]
        packed = (struct.pack("<I", part) if isinstance(part, int) else part for part in framed)
        shard(root).write_bytes(b"".join(packed))

    return spoil


def flip(at: int) -> Callable[[Path], None]:
    """Return what changes a byte of the first shard."""

    def spoil(root: Path) -> None:
        data = bytearray(shard(root).read_bytes())
        data[at] ^= 1
        shard(root).write_bytes(data)

    return spoil


def cut(root: Path) -> None:
    shard(root).write_bytes(shard(root).read_bytes()[:-100])


def broken_png() -> bytes:
    """Return a PNG with a chunk said to be 256 bytes shorter than it is: Pillow raises SyntaxError."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") - 2] -= 1
    return bytes(data)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda r: shard(r).unlink(), r"episode 0: no .*00000-of-00001: download"),
    "flipped byte": (flip(500), r"episode 0: .*record 0 is damaged \(CRC-32C\)"),
    "damaged length": (flip(3), r"episode 0: .*is damaged or goes on after 0 of 2"),
    "cut": (cut, r"episode 1: .*record 1 is damaged"),
    "nan": (
        change("steps/action", lambda v: v.floats.value.__setitem__(7 * 4 + 2, float("nan"))),
        r"episode 1: frame 4: action is not finite",
    ),
    "sizes": (
        change("steps/action", lambda v: v.floats.value.pop()),
        r"episode 1: frame \d+: action has \d+ numbers in \d+ steps, expected 7 a step",
    ),
    "frames": (
        change("steps/observation/image", lambda v: v.bytes.value.pop()),
        r"episode 1: frame (8|11): agentview has (8|11) frames, expected (9|12)",
    ),
    "picture": (
        change("steps/observation/image", lambda v: v.bytes.value.__setitem__(2, b"no picture")),
        r"episode 1: frame 2: observation/image is no picture",
    ),
    "png": (
        change("steps/observation/image", lambda v: v.bytes.value.__setitem__(3, broken_png())),
        r"episode 1: frame 3: observation/image is no picture \(broken PNG",
    ),
    "instruction": (
        change("steps/language_instruction", lambda v: v.bytes.value.__setitem__(5, b"stop")),
        r"episode 1: frame 5: the instruction changes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(root: Path, name: str):
    spoil, expected = BAD[name]
    spoil(root)
    check_fault(root, expected)


def test_the_other_episodes_of_a_damaged_shard_are_read(root: Path):
    flip(500)(root)
    found = dict(open_source(root).attempts(False))
    assert [name for name, episode in found.items() if isinstance(episode, ValueError)] == ["episode 0"]
    flip(3)(root)
    found = dict(open_source(root).attempts(False))
    broken = [name for name, episode in found.items() if isinstance(episode, ValueError)]
    assert (len(found), broken) == (3, ["episode 0", "episode 1"])


def test_inspect_says_what_the_set_says_of_its_numbers(root: Path, capsys: pytest.CaptureFixture[str]):
    features = json.loads((root / "features.json").read_text())
    step = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    step["action"]["description"] = "3x position (m),\n gripper"
    (root / "features.json").write_text(json.dumps(features))
    assert main(["inspect", str(root)]) == 0
    assert "action = action, 7 numbers, units: 3x position (m), gripper\n" in capsys.readouterr().out


def test_inspect_names_splits_and_several_sets(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(GENUINE / "tiny_libero")]) == 0
    assert "RLDS tiny_libero 1.0.0: train 2, val 1: 3 episodes, 28 steps" in capsys.readouterr().out
    assert main(["inspect", str(GENUINE)]) == 2
    assert "holds 2 data sets, name one" in capsys.readouterr().err


def test_a_store_knows_rate_and_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """RLDS says no rate, so the user does; the hub's cache says repository and commit."""
    snapshot = tmp_path / "datasets--some--libero/snapshots/0123abc"
    shutil.copytree(GENUINE / "tiny_libero/1.0.0", snapshot / "tiny_libero/1.0.0")
    source = open_source(snapshot / "tiny_libero")
    assert (source.repo, source.revision, source.fps) == ("some/libero", "0123abc", None)
    ImageTokenizer(SHAPE).save(tmp_path / "image")
    words = ["tokenize", str(snapshot), "--tokenizer", f"{tmp_path}/image", "--out", f"{tmp_path}/store"]
    assert main(words) == 0
    assert "steps per second: unknown; --fps N" in capsys.readouterr().out
    assert main([*words, "--fps", "5"]) == 0
    facts = TokenStore.open(tmp_path / "store").manifest["source"]
    assert [facts[name] for name in ("fps", "repo", "revision")] == [5, "some/libero", "0123abc"]
    assert main([*words, "--fps", "-5"]) == 2
    assert "--fps -5: expected steps per second, above 0" in capsys.readouterr().err


def test_a_size_that_varies_is_that_of_the_first_sound_picture(monkeypatch: pytest.MonkeyPatch):
    picture, feature = io.BytesIO(), {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}}}
    Image.new("RGB", (6, 4)).save(picture, "PNG")
    shard, cells = rlds.Shard(Path("x.tfrecord"), 3), {b"0": [b"no picture"], b"1": [picture.getvalue()]}
    monkeypatch.setattr(
        rlds, "parse", lambda record: {"steps/image": cells[record]} if record in cells else {}
    )
    for contents, size in (([ValueError("damaged"), b"0", b"2", b"1"], (4, 6)), ([b"0"], None)):
        monkeypatch.setattr(rlds, "records", lambda _, contents=contents: iter(contents))
        if size is not None:
            assert rlds._size("image", feature, [shard]) == size
            continue
        with pytest.raises(ValueError, match=r"x\.tfrecord: no episode has a sound picture of image"):
            rlds._size("image", feature, [shard])
