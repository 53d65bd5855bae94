"""A run writes self-contained checkpoints, resumes bit for bit, stops on SIGTERM, refuses what is wrong.

pytest tests/test_train.py
"""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import joined, tiny_config, train_in_parts

from worldvla.batch import Batch
from worldvla.config import Config, LoraConfig, OptimConfig, from_json
from worldvla.files import read_json, save_tensors, write_digests, write_json
from worldvla.machine import find_device
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train import checkpoint, loop, parallel
from worldvla.train.build import build
from worldvla.train.loop import Trainer, train
from worldvla.train.optim import build_optimizers, learning_rate

GOLDEN = Path(__file__).parent / "golden" / "loss.txt"


def records(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = {"train_seconds", "tokens_s", "wait_share", "mfu", "memory_gb"}
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def assert_same_state(a: Path, b: Path) -> None:
    for name in ("model", "trainer"):
        left, right = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_stop_and_resume_is_bit_identical(root: Path, tmp_path: Path, method: Any) -> None:
    config = tiny_config(root, accumulation=2)
    config = replace(config, model=replace(config.model, dropout=0.1))
    config = replace(config, optim=replace(config.optim, method=method, ema=0.9 if method == "muon" else 0.0))
    whole = train(config, tmp_path / "whole")
    assert whole.is_finished
    assert whole.step == 8
    parts = train_in_parts(config, tmp_path / "parts", killed_at=7)
    assert_same_state(whole.checkpoint, parts)
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(root)
    whole = train(config, tmp_path / "whole")
    step = Trainer.step

    def interrupted(self: Trainer, batches: list[Batch]) -> dict[str, float]:
        if self.state.step == 2:
            os.kill(os.getpid(), number)
        return step(self, batches)

    monkeypatch.setattr(Trainer, "step", interrupted)
    stopped = train(config, tmp_path / "run")
    assert (stopped.step, stopped.is_finished) == (3, False)
    monkeypatch.undo()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"event": "tra')
    finished = train(config, tmp_path / "run")
    assert finished.is_finished
    assert "dropped its last line" in caplog.text
    assert_same_state(whole.checkpoint, finished.checkpoint)
    again = train(config, tmp_path / "run")  # nothing is left to do
    assert again == finished


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Whatever pytest was started by, such as nohup, the signals are not ignored; afterwards as before."""
    old = {number: signal.signal(number, signal.SIG_DFL) for number in loop.SIGNALS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", loop.SIGNALS)
def test_every_signal_is_heard_once_and_given_back(number: signal.Signals) -> None:
    with loop._stop_requests() as is_asked:
        assert not is_asked()
        signal.raise_signal(number)
        assert is_asked()
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.usefixtures("default_signals")
def test_an_ignored_signal_stays_ignored() -> None:
    """Under nohup a run outlives its terminal; a background job of a shell does not hear Ctrl-C."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with loop._stop_requests() as is_asked:
        signal.raise_signal(signal.SIGHUP)
        assert not is_asked()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_process_whose_agent_is_gone_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with loop._stop_requests() as is_asked:  # not torchrun's: its parent may go
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert not is_asked()
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with loop._stop_requests() as is_asked:
        assert not is_asked()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert is_asked()


def test_checkpoint_is_self_contained(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    path = train(config, tmp_path / "run").checkpoint
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    names = "ancestors.json", "config.json", "model.safetensors"
    tokenizer = {f"image_tokenizer/{name}" for name in names}
    documents = {f"{name}.json" for name in ("config", "vocab", "statistics", "text", "manifest", "trainer")}
    assert files == documents | tokenizer | {"model.safetensors", "trainer.safetensors"}
    assert from_json(Config, json.loads((path / "config.json").read_text())) == config
    manifest = json.loads((path / "manifest.json").read_text())
    assert {
        "image_tokenizer",
        "text",
        "statistics",
        "vocab",
        "commit",
        "versions",
        "step",
    } <= manifest.keys()
    assert sorted(p.name for p in (tmp_path / "run/ckpt").iterdir()) == ["step_4", "step_8"]
    values = next(r for r in records(tmp_path / "run") if r["event"] == "val")
    expected = {
        "action_loss",
        "image_loss",
        "layout_loss",
        "action_accuracy",
        "first_xyz_l1",
        "still_xyz_l1",
        "gripper_accuracy",
    }
    assert expected <= values.keys()


def test_what_a_kill_left_of_pruning_is_removed(root: Path, tmp_path: Path) -> None:
    newest = train(tiny_config(root), tmp_path / "run").checkpoint
    shutil.copytree(newest, newest.with_name("step_2"))  # killed before it was pruned, or amid that
    shutil.copytree(newest, newest.with_name(".step_1.0123abcd.tmp"))
    train(tiny_config(root), tmp_path / "run")
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step_4", "step_8"]


def test_nothing_is_left_of_a_save_that_failed_and_training_ends(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if ".step_4." in str(path):  # while training goes on; the last one would succeed
            raise OSError(28, "No space left on device")
        save_tensors(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match=r"cannot save .*step_4: .*No space left.*free some space"):
        train(tiny_config(root), tmp_path / "run")
    assert list((tmp_path / "run/ckpt").iterdir()) == []
    monkeypatch.undo()
    assert train(tiny_config(root), tmp_path / "run").is_finished


@pytest.mark.parametrize("free", [10**12, 0])
def test_training_goes_on_while_a_checkpoint_is_written_if_its_copy_fits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    step, happened, may_end = Trainer.step, [], threading.Event()

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        save_tensors(path, tensors)
        if path.stem == "trainer":
            if free and ".step_4." in str(path):
                assert may_end.wait(60)
            happened.append(path.parent.name.split(".")[1])

    def taken(self: Trainer, batches: list[Batch]) -> dict[str, float]:
        happened.append(self.state.step)
        if self.state.step == 7:
            may_end.set()
        return step(self, batches)

    monkeypatch.setattr(checkpoint, "save_tensors", write)
    monkeypatch.setattr(checkpoint, "available_memory", lambda _: free)
    monkeypatch.setattr(Trainer, "step", taken)
    train(tiny_config(root, steps=10), tmp_path / "run")
    order = [happened.index(what) for what in ("step_4", "step_8", "step_10")]
    assert order == sorted(order)
    assert (happened.index("step_4") > happened.index(7)) == bool(free)
    assert free or happened.index("step_4") < happened.index(4)


def test_another_config_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    train(config, tmp_path / "run")
    other = replace(config, loss=replace(config.loss, image_weight=0.5))
    with pytest.raises(ValueError, match=r"loss\.image_weight: 0\.04 there, 0\.5 now"):
        train(other, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.steps: 8 there, 6 now"):
        train(replace(config, train=replace(config.train, steps=6)), tmp_path / "run")
    train(
        replace(config, train=replace(config.train, log_every=1)), tmp_path / "run"
    )  # does not change the weights


def test_more_steps_go_on_with_the_optimiser_and_say_what_the_rate_does(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_config(root), tmp_path / "run")
    longer = tiny_config(root, steps=12)
    outcome = train(longer, tmp_path / "run")
    assert (outcome.step, outcome.is_finished) == (12, True)
    told = "train.steps 12, was 8: the run goes on at step 8 with its optimiser and a learning rate of"
    rate = learning_rate(8, 12, longer.optim)
    assert f"{told} {rate:.3g}, which was 0.0003, and ends at 0.0003" in caplog.text
    moments = load_file(outcome.checkpoint / "trainer.safetensors")
    assert {float(value) for name, value in moments.items() if name.startswith("step.")} == {12.0}
    assert records(tmp_path / "run")[-2]["step"] == 12
    caplog.clear()
    train(longer, tmp_path / "run")
    assert not caplog.text


def test_a_damaged_checkpoint_names_the_one_before(root: Path, tmp_path: Path) -> None:
    newest = train(tiny_config(root), tmp_path / "run").checkpoint
    weights, state = newest / "trainer.safetensors", read_json(newest / "trainer.json")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"?")
    line = (
        rf"trainer.safetensors is not as it was written .*; or type `rm -r {newest}`, and the same command "
    )
    with pytest.raises(ValueError, match=f"{line}goes on from step_4$"):
        train(tiny_config(root), tmp_path / "run")
    weights.write_bytes(content)
    write_json(newest / "trainer.json", state | {"stop": 8})
    write_digests(newest)
    with pytest.raises(ValueError, match=r"trainer\.json is damaged or no state of a training .*'stop'"):
        train(tiny_config(root), tmp_path / "run")
    shutil.rmtree(newest.with_name("step_4"))
    with pytest.raises(ValueError, match=r"and the same command begins anew$"):
        train(tiny_config(root), tmp_path / "run")
    shutil.rmtree(newest)
    assert train(tiny_config(root), tmp_path / "run").checkpoint == newest


def test_changed_data_is_refused_on_resume(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    config = tiny_config(tmp_path / "data", steps=4)
    train(config, tmp_path / "run")
    actions = np.load(tmp_path / "data/store/actions.npy")
    np.save(tmp_path / "data/store/actions.npy", actions * 0.5)
    write_digests(tmp_path / "data/store")
    with pytest.raises(ValueError, match=r"its statistics is .* restore them"):
        train(config, tmp_path / "run")


def test_a_store_that_changed_is_refused_where_ranges_come_from_elsewhere(root: Path, tmp_path: Path) -> None:
    first = train(tiny_config(root), tmp_path / "first").checkpoint
    shutil.copytree(root, tmp_path / "data")
    config = tiny_config(tmp_path / "data", steps=4, init_from=str(first))
    train(config, tmp_path / "run")
    (path,) = (tmp_path / "data/store").glob("*agentview*.npy")
    np.save(path, np.load(path)[::-1])
    write_digests(tmp_path / "data/store")
    with pytest.raises(ValueError, match=r"the store .*/data/store has changed since; restore it"):
        train(config, tmp_path / "run")


def test_the_best_checkpoint_is_one_that_is_kept(root: Path, tmp_path: Path) -> None:
    path = train(tiny_config(root, steps=8, eval_every=1, save_every=2), tmp_path / "run").checkpoint
    best = read_json(path / "trainer.json")["best_step"]
    assert best % 2 == 0
    assert (tmp_path / f"run/ckpt/step_{best}").is_dir()


def test_a_stop_before_the_first_step_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_stop_requests", lambda: nullcontext(lambda: True))
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(root), tmp_path / "run")
    assert not list((tmp_path / "run").glob("ckpt/*"))
    assert train(tiny_config(root), tmp_path / "run").is_finished


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device cuda:9: this machine has 1"):
        find_device("cuda:9")
    assert find_device("cuda").type == "cuda"


def test_init_from_takes_weights_and_what_the_ids_mean(root: Path, tmp_path: Path) -> None:
    first = train(tiny_config(root), tmp_path / "first").checkpoint
    config = tiny_config(root, init_from=str(first))
    trainer = Trainer(build(config), tmp_path / "second")
    weights = load_file(first / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.state.step == 0
    deep = replace(config, model=replace(config.model, num_layers=2 * config.model.num_layers))
    deeper = Trainer(build(deep), tmp_path / "deep").model
    assert len(deeper.layers) == 2 * len(trainer.model.layers)
    ids_BT = torch.arange(12).view(2, 6)
    places = None, torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    assert torch.equal(deeper(ids_BT, *places), trainer.model(ids_BT, *places))
    own = deeper.state_dict()
    assert own["layers.1.attention.q.weight"].equal(own["layers.0.attention.q.weight"])
    shallow = replace(config, model=replace(config.model, num_layers=config.model.num_layers - 1))
    with pytest.raises(ValueError, match="does not fit"):
        Trainer(build(shallow), tmp_path / "shallow")
    wide = replace(config, model=replace(config.model, width=64))
    with pytest.raises(ValueError, match="does not fit"):
        Trainer(build(wide), tmp_path / "third")


def test_init_from_wants_the_codes_that_the_weights_know(root: Path, tmp_path: Path) -> None:
    first = train(tiny_config(root, steps=1), tmp_path / "first").checkpoint
    known = json.loads((first / "manifest.json").read_text())["image_tokenizer"]
    shutil.copytree(root, tmp_path / "data")
    config = tiny_config(tmp_path / "data", init_from=str(first))
    tokenizer = ImageTokenizer.load(config.tokenizer)
    with torch.no_grad():
        next(tokenizer.parameters()).mul_(1.01)
    tokenizer.save(config.tokenizer)
    manifest = tmp_path / "data/store/manifest.json"
    manifest.write_text(manifest.read_text().replace(known, tokenizer.digest()))
    write_digests(tmp_path / "data/store")
    with pytest.raises(ValueError, match=rf"codes of image tokenizer {known}, .*train-tokenizer --init-from"):
        build(config)
    tokenizer.ancestors = (known,)
    tokenizer.save(config.tokenizer)
    assert build(config).image.digest() == tokenizer.digest()


def test_what_is_no_checkpoint_is_no_start(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.init_from: .* is no checkpoint .*`convert`"):
        build(tiny_config(root, init_from=str(tmp_path)))


def test_a_run_that_failed_at_once_takes_other_settings(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="is no checkpoint"):
        train(tiny_config(root, steps=1, init_from=str(tmp_path)), run)
    assert train(tiny_config(root, steps=1), run).is_finished
    with pytest.raises(ValueError, match=r"another config .*train\.seed: 0 there, 1 now"):
        train(tiny_config(root, steps=1, seed=1), run)


@pytest.mark.parametrize("rank", [0, 2])
def test_too_little_memory_is_said_with_the_sum_before_a_weight_is_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    first = train(tiny_config(root, steps=1), tmp_path / "first").checkpoint
    tiny = tiny_config(root, init_from=str(first), dtype="bfloat16")
    config = replace(tiny, lora=LoraConfig(rank=rank))
    monkeypatch.setattr("worldvla.train.build.available_memory", lambda _: 1_000)
    monkeypatch.setattr("worldvla.train.build.read_tensor", lambda *_: pytest.fail("read"))
    said = r"training tiny needs \S+ GB on cpu .*1e-06 GB are free.*`worldvla plan tiny --gpus 1 --memory"
    with pytest.raises(ValueError, match=said) as caught:
        Trainer(build(config), tmp_path / "run")
    found = re.search(r"weights (\S+) \+ gradients (\S+) \+ moments (\S+);", str(caught.value))
    weights, gradients, moments = map(float, found.groups() if found else ())
    assert moments == pytest.approx(2 * gradients, rel=0.01)
    assert gradients == pytest.approx(weights, rel=0.01) if rank == 0 else gradients < weights / 2


def test_a_loss_that_is_not_finite_raises(root: Path, tmp_path: Path) -> None:
    trainer = Trainer(build(tiny_config(root)), tmp_path / "run")
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"loss nan .* at step 0, learning rate 0\.0015"):
        trainer.run()


def test_accumulation_equals_one_big_batch(root: Path, tmp_path: Path) -> None:
    trainer = Trainer(build(tiny_config(root)), tmp_path / "run")
    parts = trainer.pieces.loader.batch(0)
    whole = joined(parts, trainer.pieces.vocab.pad)
    uneven = [whole.map(lambda tensor, rows=rows: tensor[rows]) for rows in (slice(0, 1), slice(1, 4))]
    results = []
    for batches in ([whole], uneven, parts):
        values = trainer.backward(batches)
        results.append(
            (values, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        )
        trainer.optimizers[0].zero_grad()
    expected_values, expected = results[0]
    for values, gradients in results[1:]:
        assert values == pytest.approx(expected_values, rel=1e-5)
        assert all(torch.allclose(gradients[name], expected[name], atol=1e-6, rtol=1e-4) for name in expected)


def test_a_checkpoint_holds_the_average_of_weights(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    trainer = Trainer(build(replace(config, optim=replace(config.optim, ema=0.5))), tmp_path / "run")
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    expected = {name: tensor.clone() for name, tensor in weights.items()}
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 4 / 13)):  # on their way to 0.5
        trainer.step(trainer.pieces.loader.batch(step))
        trainer.state.step += 1
        expected = {name: decay * mean + (1 - decay) * weights[name] for name, mean in expected.items()}
    path = trainer.save()
    saved, training = load_file(path / "model.safetensors"), load_file(path / "trainer.safetensors")
    torch.testing.assert_close(saved, expected)
    assert all(torch.equal(training[f"raw.{name}"], tensor) for name, tensor in weights.items())
    assert not any(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    again = Trainer(trainer.pieces, tmp_path / "run")
    assert all(torch.equal(p, weights[name]) for name, p in again.model.named_parameters())


def test_dropout_is_a_function_of_the_step(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    config = replace(config, model=replace(config.model, dropout=0.5))
    losses = []
    for step in (3, 3, 4):
        trainer = Trainer(build(config), tmp_path / "run")
        trainer.state.step = step
        torch.manual_seed(len(losses))  # whatever the process drew before
        losses.append(trainer.step(trainer.pieces.loader.batch(0))["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_rows_are_dealt_to_all_ranks_in_turn(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(build(tiny_config(root)), tmp_path / "run")
    batches = trainer.pieces.loader.batch(0)
    rows = [row.tolist() for batch in batches for row in batch.ids_BT]
    assert [len(batch.ids_BT) for batch in batches] == [2, 2]
    monkeypatch.setattr(parallel, "num_ranks", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        dealt.append([row.tolist() for batch in parallel.own_rows(batches) for row in batch.ids_BT])
    assert dealt == [rows[0::3], rows[1::3], rows[2::3]]


def test_a_process_without_a_row_is_refused_before_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"3 processes share the 2 samples of a step .*start fewer"):
        Trainer(build(tiny_config(root, batch_size=1, accumulation=2)), tmp_path / "run")


def test_a_checkpoint_holds_the_tokenizer_that_was_trained_on(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    config = tiny_config(tmp_path / "data", steps=1)
    trainer = Trainer(build(config), tmp_path / "run")
    other = ImageTokenizer.load(config.tokenizer)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    other.save(config.tokenizer)  # trained anew in place while the run goes on
    path = trainer.run().checkpoint
    known = json.loads((path / "manifest.json").read_text())["image_tokenizer"]
    assert ImageTokenizer.load(path / "image_tokenizer").digest() == known != other.digest()


def test_a_run_of_an_older_version_goes_on(root: Path, tmp_path: Path) -> None:
    config = tiny_config(root)
    train(config, tmp_path / "run")
    path = tmp_path / "run/config.json"
    data = json.loads(path.read_text())
    del data["lora"], data["loss"]["head_weight"]  # fields that it did not have
    path.write_text(json.dumps(data))
    assert train(config, tmp_path / "run").is_finished


@pytest.mark.parametrize("name", ["store", "image_tokenizer", "run/ckpt/step_7"])
def test_what_is_there_is_not_spoilt(name: str, root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / name, tmp_path / "there")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"^{folder} holds something else \(m.+\): choose another folder$"):
        train(tiny_config(root), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_lost_its_number_type_is_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "faster_dtype", lambda _: ("float32", "as ever"))
    config = tiny_config(root, steps=1, dtype="auto")
    path = train(config, tmp_path / "run").checkpoint / "config.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "train"})
    with pytest.raises(ValueError, match=rf"^{path}: missing keys \['train'\]"):
        train(config, tmp_path / "run")


def test_every_zero_means_only_at_the_end(root: Path, tmp_path: Path) -> None:
    train(tiny_config(root, steps=4, log_every=0, eval_every=0, save_every=0), tmp_path / "run")
    assert [(r["event"], r["step"]) for r in records(tmp_path / "run")] == [("train", 4), ("val", 4)]
    assert [path.name for path in (tmp_path / "run/ckpt").iterdir()] == ["step_4"]


def test_bfloat16_trains(root: Path, tmp_path: Path) -> None:
    train(tiny_config(root, dtype="bfloat16", steps=4), tmp_path / "run")
    losses = [r["loss"] for r in records(tmp_path / "run") if r["event"] == "train"]
    assert losses[-1] < losses[0]


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    config = OptimConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 12, config) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    constant = replace(config, min_learning_rate=1.0)
    assert {learning_rate(step, 12, constant) for step in range(4, 12)} == {1.0}


def test_embeddings_and_norms_do_not_decay(root: Path, tmp_path: Path) -> None:
    model = Trainer(build(tiny_config(root)), tmp_path / "run").model
    (adamw,) = build_optimizers(model, OptimConfig(weight_decay=0.1))
    decayed, others = adamw.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in others["params"]} == {
        n for n in names.values() if "norm" in n or "embed" in n
    }
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_muon_takes_the_linear_layers_of_the_blocks_and_adamw_the_rest(root: Path, tmp_path: Path) -> None:
    model = Trainer(build(tiny_config(root)), tmp_path / "run").model
    adamw, muon = build_optimizers(model, OptimConfig(method="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    found = [
        {names[id(p)] for group in optimizer.param_groups for p in group["params"]}
        for optimizer in (adamw, muon)
    ]
    assert found[1] == {n for n in names.values() if n.startswith("layers.") and "norm" not in n}
    assert found[0] == set(names.values()) - found[1]


def test_losses_of_twenty_steps_are_golden(root: Path, tmp_path: Path) -> None:
    """Regenerate with `make golden`; a change needs a sentence in the commit."""
    losses = golden_losses(root, tmp_path)
    expected = [float(line.split()[1]) for line in GOLDEN.read_text().splitlines()]
    assert losses == pytest.approx(expected, rel=2e-6)


def golden_losses(root: Path, run_dir: Path) -> list[float]:
    train(tiny_config(root, steps=20, log_every=1, eval_every=100, save_every=100), run_dir)
    return [r["loss"] for r in records(run_dir) if r["event"] == "train"]
