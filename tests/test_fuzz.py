"""A damaged file is refused in one line or reads as the original: no other data, no traceback, no crash.

pytest tests/test_fuzz.py; 1,000 mutations of each reader: pytest -m nightly tests/test_fuzz.py -k thousand,
without "hundred"; 100,000: -k hundred. Each prints what became of them with -s.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import h5py
import numpy as np
import pytest
import released
from token_stubs import random_episode

from worldvla.data.episode import Episode, read_episodes, write_episodes
from worldvla.data.sources import open_source
from worldvla.data.store import TokenStore
from worldvla.eval.compare import compare
from worldvla.eval.reader import Reader
from worldvla.eval.record import Journal, read_record
from worldvla.eval.tokens import FILE as EXAMPLE
from worldvla.eval.tokens import read_example
from worldvla.files import read_json, write_json
from worldvla.infer.model import load
from worldvla.published.names import open_release
from worldvla.published.tokenizers import load_image_tokenizer
from worldvla.serve.protocol import pack
from worldvla.serve.server import ServedPolicy, read_request
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.metrics import Recorder
from worldvla.vocab import chameleon

HERE = Path(__file__).parent
SUITE = {"suite": "tabletop_object"}
SERVED = ServedPolicy(act=lambda _: np.zeros(0), views={"agentview": (4, 4)})


def _store(path: Path) -> object:
    store = TokenStore.open(path)
    arrays = [*store.codes.values(), store.actions, store.states, store.is_expert]
    return store.episodes, [hashlib.sha256(a.tobytes()).hexdigest() for a in arrays]


def _checkpoint(path: Path) -> object:
    model = load(path)
    weights = {n: t.numpy().tobytes() for n, t in model.transformer.state_dict().items()}
    pieces = model.image, model.builder.text, model.builder.statistics, model.vocab
    return weights, model.config, [piece.digest() for piece in pieces]  # pyright: ignore[reportAttributeAccessIssue]


def _content(e: Episode) -> object:
    arrays = [e.actions, e.states, e.sim_states, e.is_expert, *e.images.values()]
    return (e.instruction, e.suite, e.task, e.init, e.seed, e.success), [a.tobytes() for a in arrays]


def _demonstrations(path: Path) -> object:
    return [_content(e) for e in read_episodes(path / "a_demo.hdf5")]


def _foreign(path: Path) -> object:
    return [_content(e) for e in open_source(path).episodes()]


def _message(path: Path) -> object:
    return repr(read_request((path / "message").read_bytes(), SERVED))


def _journal(path: Path) -> object:
    """Return what is read that was not written; a line that is dropped is refused, with a remark."""
    with Journal(path / "episodes.jsonl", SUITE) as journal:
        written = read_json(path.parent / "written.json")["outcomes"]
        return [outcome for outcome in journal.outcomes if outcome not in written]


def _tokenizer(path: Path) -> object:
    tokenizer = ImageTokenizer.load(path)
    return tokenizer.digest(), tokenizer.ancestors


def _metrics(path: Path) -> object:
    with Recorder(path, 3, 5):
        return (path / "metrics.jsonl").read_bytes()


def _example(path: Path) -> object:
    return {name: array.tobytes() for name, array in (read_example(path) or {}).items()}


def _reader(path: Path) -> object:
    return {n: t.numpy().tobytes() for n, t in Reader.load(path / "reader.safetensors").state_dict().items()}


def _release(path: Path) -> object:
    return [(n, t.float().numpy().tobytes()) for n, t in open_release(path, chameleon()).tensors()]


def _unchecked(read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return `read` for somebody who has written the digests of damaged files again."""

    def read_on(path: Path) -> object:
        with patch("worldvla.data.store.check_digests"), patch("worldvla.infer.model.check_digests"):
            return read(path)

    return read_on


PROTECTED: dict[str, Callable[[Path], object]] = {
    "store": _store,
    "checkpoint": _checkpoint,
    "demonstrations": _demonstrations,
    "image_tokenizer": _tokenizer,
    "journal": _journal,
    "tfrecord": _foreign,
    "reader": _reader,
}
"""Readers of what has digests."""
PLAIN: dict[str, Callable[[Path], object]] = {
    "bare_store": _unchecked(_store),
    "bare_checkpoint": _unchecked(_checkpoint),
    "libero": _demonstrations,
    "rlds": _foreign,
    "lerobot": _foreign,
    "message": _message,
    "metrics": _metrics,
    "record": lambda path: compare(record := read_record(path), record),
    "example": _example,
}
"""Readers of what has none by its format, or whose digests are not compared."""
SLOW: dict[str, Callable[[Path], object]] = {
    "lerobot_v2": _foreign,
    "release": _release,
    "vqgan": lambda path: load_image_tokenizer(path / "vqgan.ckpt").digest(),
}
READERS = PROTECTED | PLAIN | SLOW
SOME = {"image_tokenizer": 100, "tfrecord": 100, "bare_checkpoint": 50, "lerobot": 25}
"""Mutations in the fast suite of what is slow to read."""


@pytest.fixture
def whole(root: Path, checkpoint: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes what the reader of a name reads and returns its folder."""

    def write(name: str) -> Path:
        data = tmp_path / "data"
        match name:
            case "store" | "bare_store":
                shutil.copytree(root / "store", data)
            case "checkpoint" | "bare_checkpoint":
                shutil.copytree(checkpoint, data, ignore=shutil.ignore_patterns("trainer*"))
            case "image_tokenizer":
                shutil.copytree(root / "image_tokenizer", data)
            case "tfrecord" | "rlds":
                shutil.copytree(HERE / "rlds/tiny_libero/1.0.0", data)
            case "lerobot" | "lerobot_v2":
                unread = shutil.ignore_patterns("*.py", "*stats.json*")
                version = {"lerobot": "v3", "lerobot_v2": "v21"}[name]
                shutil.copytree(HERE / f"lerobot_{version}", data, ignore=unread)
            case _:
                data.mkdir()
        _fill(name, data)
        return data

    return write


def _fill(name: str, data: Path) -> None:
    match name:
        case "demonstrations" | "libero":
            write_episodes(data / "a_demo.hdf5", [random_episode(i) for i in range(2)], {})
            with h5py.File(data / "a_demo.hdf5", "a") as file:
                for group in (file["data"], *file["data"].values()) if name == "libero" else ():  # pyright: ignore[reportAttributeAccessIssue]
                    del group.attrs["sha256"]
        case "message":
            request = {"prompt": "go", "agentview": np.zeros((4, 4, 3), np.uint8), "state": np.zeros(8)}
            (data / "message").write_bytes(pack(request))
        case "journal":
            with Journal(data / "episodes.jsonl", SUITE) as journal:
                for init in range(3):
                    journal.add({"task": 0, "init": init, "status": "success"})
                write_json(data.parent / "written.json", {"outcomes": journal.outcomes})
        case "metrics":
            rows = [{"event": "train", "step": step, "loss": 1 / (1 + step)} for step in range(4)]
            (data / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "record":
            rows = {
                "outcomes": [{"task": 0, "init": 0, "status": "fail"}],
                "tasks": [{"index": 0, "name": "t"}],
            }
            write_json(data / "record.json", {"suite": "s", "protocol": {}, "checkpoint": {}, **rows})
        case "example":
            np.savez(data / EXAMPLE, ids=np.arange(30), instruction=np.array("go"), low=np.zeros(7))
        case "reader":
            Reader({"agentview": (64, 64)}).save(data / "reader.safetensors", {"tokenizer": "x"})
        case "release":
            released.write_release(data)
        case "vqgan":
            released.write_tokenizer(data)
            (data / "text_tokenizer.json").unlink()


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


def fuzz(name: str, data: Path, number: int) -> Counter[str]:
    """Mutate one file a time; return how many mutations were refused, read alike, and read otherwise."""
    read, rng, counts = partial(READERS[name], data), np.random.default_rng(number), Counter[str]()
    files = sorted(p for p in data.rglob("*.tfrecord*" if name == "tfrecord" else "*") if p.is_file())
    expected = read()
    for i in range(number):
        path = files[int(rng.integers(len(files)))]
        content = path.read_bytes()
        path.write_bytes(mutated(content, rng))
        try:
            counts["alike" if read() == expected else "other"] += 1
        except (ValueError, OSError) as error:
            counts["refused"] += 1
            line = str(error)
            assert line, f"mutation {i} of {path.name}"
            assert "\n" not in line, f"mutation {i} of {path.name}: {line}"
            assert len(line) < 2000, f"mutation {i} of {path.name}: {len(line)} letters"
            assert name in ("message", "record") or str(data) in line, f"mutation {i} of {path.name}: {line}"
        except BaseException as error:
            raise AssertionError(f"mutation {i} of {path.name}: {error!r}") from error
        finally:
            path.write_bytes(content)
    sys.stdout.write(f"\n{name}, {number} mutations: {dict(counts)}\n")
    return counts


@pytest.mark.parametrize("name", PROTECTED)
def test_nothing_third_comes_of_a_mutation(name: str, whole: Callable[[str], Path]) -> None:
    number = SOME.get(name, 200)
    counts = fuzz(name, whole(name), number)
    assert counts["refused"] > number // 2 or name == "journal"
    assert not counts["other"], counts


@pytest.mark.parametrize("name", PLAIN)
def test_what_has_no_digests_is_refused_in_one_line_or_read(name: str, whole: Callable[[str], Path]) -> None:
    number = SOME.get(name, 100)
    assert fuzz(name, whole(name), number)["refused"] > number // 5


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", [1_000, 100_000], ids=["thousand", "hundred_thousand"])
@pytest.mark.parametrize("name", READERS)
def test_nothing_third_comes_of_a(name: str, number: int, whole: Callable[[str], Path]) -> None:
    counts = fuzz(name, whole(name), number)
    assert name not in PROTECTED or not counts["other"]
