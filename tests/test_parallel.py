"""Any number of ranks, sharded, replicated or accumulated, gives the losses of one; checkpoints are the same
files and are read by any number; what does not fit is refused in one line.

pytest tests/test_parallel.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import launch
from safetensors.torch import load_file
from tiny_run import tiny_config, write_tiny
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from worldvla import machine
from worldvla.config import Config, HeadConfig, LoraConfig, TrainConfig
from worldvla.files import check_digests
from worldvla.infer.model import export, load
from worldvla.train import loop, parallel
from worldvla.train.build import build, build_model
from worldvla.train.loop import Trainer, train

STEPS, HALF = 50, 25


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["event"] == "train"]


def parts(run_dir: Path, kind: str) -> list[float | None]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line.get(kind) for line in lines if line["event"] == "train"]


def fifty(root: Path, **settings: object) -> Config:
    """Fifty steps at a constant rate, so that a run of fewer is their beginning; weights are averaged."""
    config = tiny_config(
        root, **{"steps": STEPS, "log_every": 1, "save_every": HALF, "eval_every": HALF, **settings}
    )
    optim = replace(config.optim, learning_rate=1e-3, min_learning_rate=1e-3, ema=0.9)
    return replace(config, optim=optim, model=replace(config.model, dropout=0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process's fifty steps in `one`, those of several ranks beside it."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    train(fifty(path), path / "one")
    train(fifty(path, steps=HALF), path / "half")
    begun = fifty(path, steps=HALF, shard=2)
    launch(
        2, (fifty(path), path / "two"), (fifty(path, shard=2), path / "two_sharded"), (begun, path / "begun")
    )
    for name, start in {"two_then_one": "begun", "two_one_four": "begun", "one_then_four": "half"}.items():
        shutil.copytree(path / start, path / name)
    train(fifty(path), path / "two_then_one")
    train(fifty(path, steps=HALF + 10), path / "two_one_four")
    parts = {"batch_size": 2, "accumulation": 2}
    launch(
        4,
        (fifty(path, shard=0), path / "four_sharded"),
        (fifty(path, shard=2, replicate=2, **parts), path / "four_both"),
        (fifty(path, **parts), path / "four_accumulated"),
        (fifty(path, shard=4), path / "two_one_four"),
        (fifty(path, shard=4), path / "one_then_four"),
    )
    return path


RUNS = ("two", "two_sharded", "four_sharded", "four_both", "four_accumulated")
RESUMED = ("two_then_one", "two_one_four", "one_then_four")


@pytest.mark.parametrize("name", [*RUNS, *RESUMED])
def test_fifty_steps_are_those_of_one_process(root: Path, name: str) -> None:
    expected, found = losses(root / "one"), losses(root / name)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, abs=1e-5)
    kinds = ("action_loss", "image_loss")
    assert [parts(root / name, kind) for kind in kinds] == [
        pytest.approx(parts(root / "one", kind), abs=1e-4) for kind in kinds
    ]
    left, right = (root / n / f"ckpt/step_{STEPS}" for n in ("one", name))
    for file in ("model.safetensors", "trainer.safetensors"):
        one, many = load_file(left / file), load_file(right / file)
        assert one.keys() == many.keys()
        assert max(float((many[key] - one[key]).abs().max()) for key in one) < 1e-3


@pytest.mark.parametrize(("run", "ended"), [("one", "half"), ("two_sharded", "begun")])
def test_what_is_written_while_training_goes_on_is_what_it_was_then(root: Path, run: str, ended: str) -> None:
    for file in ("model.safetensors", "trainer.safetensors"):
        left, right = (load_file(root / name / f"ckpt/step_{HALF}" / file) for name in (run, ended))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_sharded_checkpoint_has_the_files_and_digests_of_any(root: Path) -> None:
    one, many = ({str(f.relative_to(p)) for f in p.rglob("*")} for p in (root / "one", root / "four_sharded"))
    assert {name for name in one if "tfevents" not in name} == {
        name for name in many if "tfevents" not in name
    }
    path = root / f"four_sharded/ckpt/step_{STEPS}"
    check_digests(path)
    assert load(export(path, root / "exported")).transformer.num_parameters() > 0


def test_ranks_read_their_rows_of_a_checkpoint_and_never_the_whole(root: Path, tmp_path: Path) -> None:
    path = root / f"half/ckpt/step_{HALF}"
    config = tiny_config(root, steps=2, log_every=1, init_from=str(path))
    sharded = replace(config, train=replace(config.train, shard=2))
    assert all(p.is_meta for p in build_model(build(sharded)).parameters())
    launch(2, (config, tmp_path / "whole"), (sharded, tmp_path / "sharded"))
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


RARE = [
    pytest.param(form, marks=pytest.mark.slow) for form in ("lora int8", "action head", "again", "bfloat16")
]


@pytest.mark.parametrize("form", ["muon", "lora", *RARE])
def test_what_else_a_model_can_be_trains_sharded(root: Path, tmp_path: Path, form: str) -> None:
    """On three ranks, of which one has more batches than the others; `whole` is replicated, as before."""
    config = tiny_config(root, steps=4, log_every=1, eval_every=0)
    if form == "muon":
        config = replace(config, optim=replace(config.optim, method="muon"))
    elif form.startswith("lora"):
        base = "int8" if form == "lora int8" else "float32"
        config = replace(config, lora=LoraConfig(rank=4, base=base, full=("head",)))
        config = replace(config, train=replace(config.train, init_from=str(root / f"half/ckpt/step_{HALF}")))
    elif form == "action head":
        head = HeadConfig(num_layers=1, width=16, num_heads=2, hidden=16)
        config = replace(config, model=replace(config.model, head=head))
    else:
        changed = {"checkpoint_layers": True} if form == "again" else {"dtype": "bfloat16"}
        config = replace(config, train=replace(config.train, **changed))
    sharded = replace(config, train=replace(config.train, shard=0))
    launch(3, (config, tmp_path / "whole"), (sharded, tmp_path / "sharded"))
    tolerance = 2e-4 if form == "muon" else 1e-5  # its products of sharded matrices are sums of bfloat16
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "whole"), abs=tolerance)
    left, right = (load_file(tmp_path / n / "ckpt/step_4/model.safetensors") for n in ("whole", "sharded"))
    assert left.keys() == right.keys()


def test_a_rank_of_four_shards_holds_at_most_three_tenths(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, gradients and moments, allocated as a rank of four does; nothing is sent."""

    def allocated(config: Config) -> int:
        trainer = Trainer(build(config), tmp_path / "run")
        total = 0
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            total += sum(_local(t).nbytes for t in (parameter.data, parameter.grad))
        for optimizer in trainer.optimizers:
            optimizer.step()
            total += sum(_local(v).nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
        return total

    one = allocated(fifty(root))
    monkeypatch.setenv("WORLD_SIZE", "4")
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        assert allocated(fifty(root, shard=4)) <= 0.3 * one
    finally:
        torch.distributed.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("settings", "num", "line"),
    [
        ({"shard": 3}, 4, "train.shard 3 and train.replicate 0 do not fit 4 processes"),
        ({"shard": 2, "replicate": 3}, 4, "expected a product of 4"),
        ({"shard": 8}, 1, "do not fit 1 processes: .* or start torchrun with as many"),
        ({"replicate": 2}, 4, "train.shard 1 and train.replicate 2 do not fit 4"),
        ({"shard": 2, "compile": True}, 2, "train.compile does not work on a model that train.shard 2"),
        ({"shard": 0, "only_head": True}, 2, "train.only_head does not work"),
        ({"device": "cuda:0"}, 2, "cuda:0 is one GPU for 2 processes: say cuda"),
        (
            {"device": "cuda"},
            4,
            "4 processes on a machine with 2 GPUs, expected one each: --nproc-per-node 2",
        ),
    ],
)
def test_what_does_not_fit_the_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], num: int, line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", str(num))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num))
    config = TrainConfig(steps=1, batch_size=8, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=line):
        parallel.start(config)


def test_a_node_with_other_versions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.installation()
    for other, said in (
        ({"torch": "1.0"}, r"torch 1.0 there, \S+ here"),
        ({"commit": "a"}, "commit a there"),
    ):
        monkeypatch.setattr(parallel, "from_first", lambda _, other=other: json.dumps(here | other))
        with pytest.raises(ValueError, match=f"differs from that of the first process .{said}"):
            parallel._check_versions(torch.device("cpu"))
    monkeypatch.setattr(parallel, "from_first", lambda text: text)
    parallel._check_versions(torch.device("cpu"))
    assert not machine.differences(here, {name: v for name, v in here.items() if name != "commit"})


def test_restarts_that_would_meet_dead_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"):
        parallel.start(TrainConfig(steps=1, batch_size=8))


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert str(parallel.start(TrainConfig(steps=1, batch_size=8, device="cuda"))) == "cuda:5"
    assert taken == [5]


def test_dtype_auto_takes_the_faster_type_and_keeps_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"float32": 2e9, "bfloat16": 3e9}
    monkeypatch.setattr(machine, "matmul_rate", lambda _device, dtype, *_: rates[dtype])
    monkeypatch.setattr(loop, "matmul_rate", machine.matmul_rate)
    first = train(tiny_config(root, dtype="auto", steps=1), tmp_path / "run")
    assert "train.dtype auto is bfloat16: float32 2 GFLOP/s, bfloat16 3 GFLOP/s" in capsys.readouterr().err
    assert json.loads((first.checkpoint / "config.json").read_text())["train"]["dtype"] == "bfloat16"
    rates["bfloat16"] = 1e9  # another machine
    assert loop.with_dtype(tiny_config(root, dtype="auto"), tmp_path / "run")[0].train.dtype == "bfloat16"
    assert loop.with_dtype(tiny_config(root, dtype="auto"), tmp_path / "new")[0].train.dtype == "float32"
