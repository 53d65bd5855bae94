"""Which OpenGL draws LIBERO here: decided by what works, not by which library lies on the disk.

    choose(rendering=True)      # sets MUJOCO_GL, which robosuite reads when it is imported

A library without a driver, or CUDA_VISIBLE_DEVICES that names no EGL device, shows only when a context is
made, and a context that hangs would hang us: so it is tried in another process, once, with a time limit.
"""

import atexit
import ctypes.util
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

BACKENDS = {"egl": ("EGL", "EGLGLContext"), "osmesa": ("OSMesa", "OSMesaGLContext")}
"""Value of MUJOCO_GL -> its library, robosuite's class. The first is the faster one."""
AT_HOME = ("MPLCONFIGDIR", "MESA_SHADER_CACHE_DIR", "LIBERO_CONFIG_PATH")
"""What writes below the home directory, or reads there where LIBERO's files are, unless it is set."""
PATIENCE_S = 60.0
# robosuite's own context, without the seconds that importing robosuite takes. It ends without clean-up, which
# complains when the interpreter is half gone.
_PROBE = """
import os, runpy, sys
path, name = sys.argv[1:]
try:
    context = runpy.run_path(path)[name](max_width=64, max_height=64, device_id=-1)
    context.make_current()
    from OpenGL import GL
    print("draws", GL.glGetString(GL.GL_RENDERER).decode(), flush=True)
except BaseException as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
os._exit(0)
"""


def keep_out_of_home() -> None:
    """Set each of AT_HOME that is not set to one temporary directory, which goes when this process ends.

    Workers inherit it.
    """
    if unset := [name for name in AT_HOME if name not in os.environ]:
        directory = tempfile.mkdtemp(prefix="worldvla_")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        os.environ.update(dict.fromkeys(unset, directory))


@functools.cache
def probe(backend: str) -> tuple[bool, str]:
    """Return whether `backend` makes a context here, and its renderer's name or the reason. Half a second."""
    keep_out_of_home()
    library, kind = BACKENDS[backend]
    if not ctypes.util.find_library(library):
        return False, f"no lib{library}"
    robosuite = importlib.util.find_spec("robosuite")
    if robosuite is None or not robosuite.submodule_search_locations:
        return False, "robosuite is not installed"
    path = f"{robosuite.submodule_search_locations[0]}/renderers/context/{backend}_context.py"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, path, kind],
            env={**os.environ, "MUJOCO_GL": backend},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PATIENCE_S:.0f} s"
    said = (done.stdout.strip().splitlines() or [f"died with code {done.returncode}"])[-1]
    return said.startswith("draws "), said.removeprefix("draws ")


def find() -> tuple[str, str]:
    """Return the first backend that draws here and its renderer's name, or "" and why none does.

    MUJOCO_GL, if it is set, is the only candidate.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if not sys.platform.startswith("linux") or (asked and asked not in BACKENDS):
        return asked or sys.platform, "not tried"
    reasons = []
    for backend in [asked] if asked else BACKENDS:
        works, said = probe(backend)
        if works:
            return backend, said
        reasons.append(f"{backend}: {said}")
    return "", "; ".join(reasons)


def fix() -> str:
    """Return what to try where nothing draws."""
    if os.environ.get("MUJOCO_GL"):
        return "unset MUJOCO_GL"
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # robosuite takes it for the number of an EGL device
        return "unset CUDA_VISIBLE_DEVICES or, if it is to be empty, set MUJOCO_EGL_DEVICE_ID=0"
    return "run `apt install libegl1 libgl1-mesa-dri`"


def choose(rendering: bool = True) -> None:
    """Set MUJOCO_GL to what draws here; ValueError with the fix if nothing does.

    Without `rendering` nothing is tried: robosuite needs a library to import, not a context.
    """
    asked = os.environ.get("MUJOCO_GL", "")
    if not sys.platform.startswith("linux") or (asked and not rendering):
        return
    if rendering:
        found, said = find()
    else:
        found = next((b for b, (library, _) in BACKENDS.items() if ctypes.util.find_library(library)), "")
        said = "no libEGL, no libOSMesa"
    if not found:
        wrong = f"MUJOCO_GL={asked} does not draw here" if asked else "LIBERO finds no OpenGL that works"
        raise ValueError(f"{wrong} ({said}); {fix()}")
    os.environ["MUJOCO_GL"] = found
