"""A command that is killed at any moment loses the item that it was at, and leaves no process and no scratch.

pytest tests/test_kill.py; a hundred kills of each: pytest -m nightly tests/test_kill.py
"""

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Set
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from tiny_run import _episode, tiny_config, write_tiny
from torch import Tensor

from worldvla.cli import main
from worldvla.data.collect import FIRST_INIT
from worldvla.data.episode import read_episodes, write_episodes
from worldvla.files import read_json, save_tensors
from worldvla.train import checkpoint
from worldvla.train.checkpoint import latest
from worldvla.train.loop import train

HERE = "worldvla.cli", "worldvla.train.loop", "worldvla.data.tokenize", "worldvla.eval.rollout"
SLOW = pytest.mark.slow
SERVER = multiprocessing.get_context("forkserver")  # imports once, so that a kill meets the work
SERVER.set_forkserver_preload([*HERE, "worldvla.data.collect", "worldvla.infer.model", "pytest"])
TABLE = ["tabletop_goal", "--tasks", "0", "1", "--workers", "1", "--out"]


def _commands(verb: str, root: Path, out: Path) -> None:
    """Run a verb in a session of its own, silently."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    match verb:
        case "collect":
            sizes = ["--views", "agentview=16x16", "--episodes", "2"]
            sys.exit(main(["collect", *TABLE, str(out), *sizes]))
        case "tokenize":
            sys.exit(main(f"tokenize {root}/demos --tokenizer {root}/image_tokenizer --out {out}".split()))
        case "train":
            train(tiny_config(root, steps=30, save_every=3), out)
        case "eval":
            sys.exit(main(["eval", "random", "--suite", *TABLE, str(out), "--videos", "0"]))


def _collected(out: Path) -> Set[object]:
    files = {(p.name, e.init) for p in out.glob("*.hdf5") for e in read_episodes(p, images=False)}
    parts = out.glob(".*.parts/*.hdf5")
    return files | {(f"{p.parent.name[1:-6]}_demo.hdf5", FIRST_INIT + int(p.stem)) for p in parts}


def _trained(out: Path) -> Set[object]:
    newest = latest(out)
    return set(range(int(newest.name.removeprefix("step_")))) if newest else set()


def _evaluated(out: Path) -> Set[object]:
    journal = out / "episodes.jsonl"
    return set(journal.read_text().splitlines(keepends=True)[:-1]) if journal.exists() else set()


KEPT: dict[str, Callable[[Path], Set[object]]] = {
    "collect": _collected,
    "tokenize": lambda out: {_digests(out, "*.npy")},
    "train": _trained,
    "eval": _evaluated,
}
"""What is done, and stays so."""


def _digests(out: Path, *patterns: str) -> tuple[str, ...]:
    paths = sorted(path for pattern in patterns for path in out.glob(pattern))
    return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


def _episodes(out: Path) -> list[object]:
    return [
        (path.name, e.init, *(a.tobytes() for a in (e.actions, e.states, *e.images.values())))
        for path in sorted(out.glob("*.hdf5"))
        for e in read_episodes(path)
    ]


def _outcomes(out: Path) -> list[object]:
    timed = ("seconds", "simulation_seconds", "policy_seconds", "elapsed")
    rows = read_json(out / "record.json")["outcomes"]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


RESULT: dict[str, Callable[[Path], object]] = {
    "collect": _episodes,
    "tokenize": lambda out: _digests(out, "*.npy"),
    "train": lambda out: _digests(out, "ckpt/*/model.safetensors", "ckpt/*/trainer.safetensors"),
    "eval": _outcomes,
}


def _session(leader: int) -> list[str]:
    """Return the processes of a session that still run."""
    running = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:  # it ended meanwhile
            continue
        state, _parent, _group, session = rest.split()[:4]
        if int(session) == leader and state != "Z":
            running.append(name)
    return running


def _begin(verb: str, root: Path, out: Path) -> ForkServerProcess:
    process = SERVER.Process(target=_commands, args=(verb, root, out))
    process.start()
    return process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny store, its image tokenizer and demonstrations of other frames."""
    root = tmp_path_factory.mktemp("kill")
    write_tiny(root)
    rng = np.random.default_rng(1)
    write_episodes(root / "demos/a_demo.hdf5", [_episode(rng, i) for i in range(40)], {})
    return root


@pytest.mark.timeout(0)
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "verb", ["tokenize", *(pytest.param(v, marks=SLOW) for v in ("train", "eval", "collect"))]
)
def test_a_kill_at_any_moment_loses_one_item(verb: str, kills: int, root: Path, tmp_path: Path) -> None:
    def prepare(name: str) -> Path:
        """Return the folder of an output; a store is already there, to be replaced."""
        if verb == "tokenize":
            shutil.copytree(root / "store", tmp_path / name)
        return tmp_path / name

    begun = SERVER.Process(target=os.getpid)  # the server has imported what it should
    begun.start()
    begun.join()
    started, whole = time.monotonic(), prepare("whole")
    process = _begin(verb, root, whole)
    process.join()
    assert process.exitcode == 0
    seconds, killed, rounds, rng = time.monotonic() - started, 0, 0, random.Random(verb)
    out = prepare("0")
    while killed < kills or process.exitcode != 0:
        before = KEPT[verb](out)
        process = _begin(verb, root, out)
        process.join(rng.uniform(0, seconds) if killed < kills else None)
        process.kill()
        process.join()
        killed += process.exitcode != 0
        assert process.exitcode in (0, -9)
        end = time.monotonic() + 30
        while (running := _session(process.pid or 0)) and time.monotonic() < end:
            time.sleep(0.01)
        assert not running
        now = KEPT[verb](out)
        if verb == "tokenize":
            # nothing: between two renames; the next writer brings the old store back
            assert now <= {(), *KEPT[verb](root / "store"), *KEPT[verb](whole)}, "a store that is neither"
        else:
            assert before <= now
        if process.exitcode == 0:
            assert RESULT[verb](out) == RESULT[verb](whole)
            rounds += 1
            out = prepare(str(rounds))
    shutil.rmtree(out, ignore_errors=True)
    assert not list(tmp_path.rglob(".*")), "scratch files or locks are left"


def _killed_amid_a_checkpoint(root: Path, out: Path) -> None:
    """Train until half of the checkpoint of step 6 is written and step 8 is done; then end by SIGKILL."""

    def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if ".step_6." in str(path) and path.stem == "trainer":
            while '"step": 8' not in (out / "metrics.jsonl").read_text():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        save_tensors(path, tensors)

    checkpoint.save_tensors = write
    train(tiny_config(root, steps=12, save_every=3, log_every=1), out)


def test_a_kill_amid_a_checkpoint_costs_the_steps_since_the_one_before(root: Path, tmp_path: Path) -> None:
    train(tiny_config(root, steps=12, save_every=3), tmp_path / "whole")
    process = SERVER.Process(target=_killed_amid_a_checkpoint, args=(root, tmp_path / "run"))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == -signal.SIGKILL
    assert latest(tmp_path / "run") == tmp_path / "run/ckpt/step_3"
    assert list((tmp_path / "run/ckpt").glob(".step_6.*.tmp/model.safetensors"))
    train(tiny_config(root, steps=12, save_every=3), tmp_path / "run")
    assert RESULT["train"](tmp_path / "run") == RESULT["train"](tmp_path / "whole")
    assert not list(tmp_path.rglob(".*")), "scratch files or locks are left"
