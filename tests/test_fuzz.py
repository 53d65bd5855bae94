"""A damaged file is refused in one line or reads as the original: no other data, no traceback, no crash.

pytest tests/test_fuzz.py; 100,000 mutations of each reader: pytest -m nightly tests/test_fuzz.py
"""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from token_stubs import random_episode

from worldvla.data.episode import read_episodes, write_episodes
from worldvla.data.sources import open_source
from worldvla.data.store import TokenStore
from worldvla.eval.record import Journal
from worldvla.files import read_json, write_json
from worldvla.infer.model import load
from worldvla.serve.protocol import pack, unpack


def _store(path: Path) -> object:
    store = TokenStore.open(path / "data")
    arrays = [*store.codes.values(), store.actions, store.states, store.is_expert]
    return store.episodes, [hashlib.sha256(a.tobytes()).hexdigest() for a in arrays]


def _checkpoint(path: Path) -> object:
    model = load(path / "data")
    weights = {n: t.numpy().tobytes() for n, t in model.transformer.state_dict().items()}
    pieces = model.image, model.builder.text, model.builder.statistics, model.vocab
    return weights, model.config, [piece.digest() for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]


def _demonstrations(path: Path) -> object:
    rows = []
    for e in read_episodes(path / "data/a_demo.hdf5"):
        arrays = [e.actions, e.states, e.sim_states, e.is_expert, *e.images.values()]
        texts = e.instruction, e.suite, e.task, e.init, e.seed, e.success
        rows.append((texts, [a.tobytes() for a in arrays]))
    return rows


def _lerobot(path: Path) -> object:
    """Parquet, JSON and video."""
    return [(e.instruction, e.actions.tobytes()) for e in open_source(path / "data").episodes()]


def _message(path: Path) -> object:
    """msgpack"""
    return repr(unpack((path / "data/message").read_bytes()))


def _journal(path: Path) -> object:
    with Journal(path / "data/episodes.jsonl", {"suite": "tabletop_object"}) as journal:
        return journal.outcomes


PROTECTED: dict[str, Callable[[Path], object]] = {
    "store": _store,
    "checkpoint": _checkpoint,
    "demonstrations": _demonstrations,
}
"""Readers of what has digests."""
READERS = PROTECTED | {"lerobot": _lerobot, "message": _message, "journal": _journal}


@pytest.fixture(scope="module")
def whole(root: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what each reader reads, whole, under its name."""
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(root / "store", whole / "store/data")
    shutil.copytree(checkpoint, whole / "checkpoint/data")
    write_episodes(whole / "demonstrations/data/a_demo.hdf5", [random_episode(i) for i in range(3)], {})
    shutil.copytree(Path(__file__).parent / "lerobot_v3", whole / "lerobot/data")
    request = {"prompt": "go", "observation/image": np.zeros((4, 4, 3), np.uint8), "size": np.float32(3)}
    (whole / "message/data").mkdir(parents=True)
    (whole / "message/data/message").write_bytes(pack(request))
    (whole / "journal/data").mkdir(parents=True)
    with Journal(whole / "journal/data/episodes.jsonl", {"suite": "tabletop_object"}) as journal:
        for init in range(3):
            journal.add({"task": 0, "init": init, "status": "success"})
    return whole


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Return `content` with a bit flipped, bytes overwritten, left out, put in or repeated, or cut."""
    at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 65))
    if rng.random() < 0.3:  # headers are short and matter most
        at = int(rng.integers(min(2048, len(content) + 1)))
    head, middle, tail = content[:at], content[at : at + length], content[at + length :]
    match rng.integers(6):
        case 0:
            flipped = bytes(byte ^ 1 << int(rng.integers(8)) for byte in middle[:1])
            return head + flipped + content[at + 1 :]
        case 1:
            return head + rng.bytes(len(middle)) + tail
        case 2:
            return head + tail
        case 3:
            return head + rng.bytes(length) + middle + tail
        case 4:
            return head + 2 * middle + tail
        case _:
            return head


def fuzz(name: str, whole: Path, tmp_path: Path, number: int, is_protected: bool) -> Counter[str]:
    """Mutate one file a time; return how many mutations were refused, read alike, and read otherwise."""
    read, rng, counts = READERS[name], np.random.default_rng(number), Counter[str]()
    folder = shutil.copytree(whole / name, tmp_path / name)
    if not is_protected and (folder / "data/manifest.json").exists():
        manifest = read_json(folder / "data/manifest.json")
        write_json(folder / "data/manifest.json", {k: v for k, v in manifest.items() if k != "sha256"})
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("trainer"))
    expected = read(folder)
    for i in range(number):
        path = files[int(rng.integers(len(files)))]
        content = path.read_bytes()
        path.write_bytes(mutated(content, rng))
        try:
            counts["alike" if read(folder) == expected else "other"] += 1
        except (ValueError, OSError) as error:
            counts["refused"] += 1
            line = str(error)
            assert line, f"mutation {i} of {path.name}"
            assert "\n" not in line, f"mutation {i} of {path.name}: {line}"
            assert len(line) < 2000, f"mutation {i} of {path.name}: {len(line)} letters"
        except BaseException as error:
            raise AssertionError(f"mutation {i} of {path.name}: {error!r}") from error
        finally:
            path.write_bytes(content)
    return counts


@pytest.mark.parametrize("name", PROTECTED)
def test_nothing_third_comes_of_a_mutation(name: str, whole: Path, tmp_path: Path):
    counts = fuzz(name, whole, tmp_path, 200, is_protected=True)
    assert counts["refused"] > 100
    assert not counts["other"], counts


@pytest.mark.parametrize("name", ["store", "checkpoint", "lerobot", "message", "journal"])
def test_what_has_no_digests_is_refused_in_one_line_or_read(name: str, whole: Path, tmp_path: Path):
    number = 25 if name == "lerobot" else 100  # which is slow to read
    assert fuzz(name, whole, tmp_path, number, is_protected=False)["refused"] > number // 5


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_nothing_third_comes_of_a_hundred_thousand(name: str, whole: Path, tmp_path: Path):
    counts = fuzz(name, whole, tmp_path, 100_000, is_protected=True)
    assert name not in PROTECTED or not counts["other"]
