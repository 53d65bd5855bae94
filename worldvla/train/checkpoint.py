"""Training state <-> a directory that needs nothing else: weights, tokenizers, statistics, config, optimiser.

    run_dir/ckpt/step_N/{config,vocab,statistics,text,manifest,trainer}.json {model,trainer}.safetensors
    image_tokenizer/

With `lora.rank`, model.safetensors holds what is trained alone, and the manifest the digest of its base.
With `optim.ema`, it holds the average of the weights, and trainer.safetensors the weights themselves.
A directory appears under its name only when complete (written beside it, then renamed). `Background` writes
it while training goes on.
"""

import copy
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from worldvla.config import Config, from_json, to_json
from worldvla.files import (
    MANIFEST,
    DamagedFileError,
    check_digests,
    check_finite,
    differing,
    load_tensors,
    one_line,
    read_json,
    refuse_others,
    save_tensors,
    whole_folder,
    write_digests,
    write_json,
)
from worldvla.machine import available_memory, provenance
from worldvla.model.lora import stored
from worldvla.model.weights import check_fit, checkpoints, read_tensor
from worldvla.train import parallel
from worldvla.train.build import Pieces
from worldvla.train.optim import Average, learning_rate

_ADAMW = ("exp_avg", "exp_avg_sq", "step")
_FREE = (
    *("num_threads", "log_every", "eval_every", "num_eval_batches", "save_every", "compile", "device"),
    *("shard", "replicate"),
)
"""Fields of TrainConfig that may change between the parts of a run."""
NUM_KEPT = 2
"""Newest checkpoints that stay; the best one by validation loss stays too."""
Optimizers = Sequence[torch.optim.Optimizer]
Files = Mapping[str, Mapping[str, Tensor]]
"""The safetensors files of a checkpoint: name -> what it holds."""


def save(
    path: Path,
    pieces: Pieces,
    model: nn.Module,
    optimizers: Optimizers,
    trainer: Mapping[str, Any],
    average: Average | None = None,
) -> None:
    """Write the checkpoint directory `path`; on any failure nothing of it is left and OSError says why.

    `trainer` is the loop's own state (JSON values, "step" among them).
    """
    with average.in_place() if average else nullcontext():
        _write(path, pieces, _files(model, optimizers, average), trainer)


class Background:
    """Writes checkpoints while training goes on, one after the other, from copies in the machine's memory.
    Where a copy would take more than half of what is free, training waits instead.

    Ranks that share a model save together, over a group of their own: the thread that writes sends beside the
    one that trains. An error of the writer is raised by the next call, whichever it is, or after the block.
    """

    def __init__(self, is_spread: bool) -> None:
        self._group = parallel.second_group() if is_spread else None
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def save(
        self,
        path: Path,
        pieces: Pieces,
        model: nn.Module,
        optimizers: Optimizers,
        trainer: Mapping[str, Any],
        average: Average,
    ) -> None:
        """Wait for the checkpoint before and copy this one; then it is written, and old ones are pruned."""
        self.wait()
        with average.in_place():
            files = _files(model, optimizers, average)
            size = sum(parallel.local(t).nbytes for tensors in files.values() for t in tensors.values())
            free = available_memory("cpu")
            fits = free is None or 2 * size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free
            if fits:
                files = {f: {n: t.to("cpu", copy=True) for n, t in ts.items()} for f, ts in files.items()}
            state = copy.deepcopy(dict(trainer))
            self._last = self._pool.submit(self._save, path, pieces, files, state)
            if not fits:
                self.wait()

    def _save(self, path: Path, pieces: Pieces, files: Files, trainer: dict[str, Any]) -> None:
        _write(path, pieces, files, trainer, self._group)
        if parallel.rank() == 0:
            prune(path.parents[1], trainer["best_step"])

    def check(self) -> None:
        """Raise what went wrong, if anything has."""
        if self._last is not None and self._last.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise what went wrong."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def _files(model: nn.Module, optimizers: Optimizers, average: Average | None) -> Files:
    """Return the tensors of a checkpoint, not copied; the model is the average, where there is one."""
    trainer = _optimizer_tensors(model, optimizers) | _raw(average)
    return {"model.safetensors": stored(model), "trainer.safetensors": trainer}


def _write(
    path: Path,
    pieces: Pieces,
    files: Files,
    trainer: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    together = any(isinstance(t, DTensor) for tensors in files.values() for t in tensors.values())
    try:
        with _scratch(path, together, group) as scratch:
            for name, tensors in files.items():
                _write_tensors(scratch / name, tensors, group)
            if parallel.rank() > 0:
                return
            write_json(scratch / "config.json", to_json(pieces.config))
            write_json(scratch / "vocab.json", asdict(pieces.vocab))
            write_json(scratch / "statistics.json", pieces.statistics.to_json())
            pieces.text.save(scratch / "text.json")
            pieces.image.save(scratch / "image_tokenizer")
            write_json(scratch / "trainer.json", dict(trainer))
            manifest = {**pieces.digests(), **provenance(), "step": trainer["step"]}
            manifest["stores"] = pieces.stores()
            if features := pieces.features():
                manifest["features"] = features
            if pieces.base:  # where the weights are that low-rank updates belong to, seen from here
                manifest["base_path"] = os.path.relpath(
                    Path(pieces.config.train.init_from).resolve(), path.resolve()
                )
            write_json(scratch / "manifest.json", manifest)
            write_digests(scratch)
            for file in filter(Path.is_file, scratch.rglob("*")):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
    except OSError as error:
        raise OSError(
            f"cannot save checkpoint {path.name}: {error}; nothing is left of it, earlier ones are whole"
        ) from error


@contextmanager
def _scratch(path: Path, together: bool, group: dist.ProcessGroup | None) -> Iterator[Path]:
    """Give the scratch folder that becomes `path`, the first rank's to all that save a model together."""
    if together and parallel.rank() > 0:
        yield Path(parallel.from_first("", group))
        return
    with whole_folder(path, "manifest.json") as scratch:
        yield Path(parallel.from_first(str(scratch), group)) if together else scratch


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write a safetensors file; of a sharded model each rank writes its rows, and the first joins them.

    No rank holds more than its rows and one tensor. A failure of one raises OSError in all.
    """
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        save_tensors(path, tensors)
        return
    for name, tensor in tensors.items():
        check_finite(path, name, parallel.local(tensor))
    parts = path.with_suffix("")
    writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
    try:
        # A tensor without dims would be joined as 0.
        joined = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}
        state_dict_saver.save(joined, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reasons = {f"rank {rank}: {reason[0]}" for rank, reason in error.failures.items()}
        raise OSError(one_line("; ".join(sorted(reasons)))) from None
    if parallel.rank() == 0:
        next(parts.glob("*.safetensors")).rename(path)
        shutil.rmtree(parts)


def _raw(average: Average | None) -> dict[str, Tensor]:
    """Return the weights that are in training, while the model is their average."""
    return {f"raw.{name}": tensor for name, tensor in average.tensors.items()} if average else {}


def resume(
    path: Path, pieces: Pieces, model: nn.Module, optimizers: Optimizers, average: Average
) -> dict[str, Any]:
    """Load weights and optimiser; return the loop's own state. Other data raises ValueError."""
    check_digests(path)
    manifest = read_json(path / "manifest.json")
    for name, digest in pieces.digests().items():
        if manifest.get(name) != digest:
            raise ValueError(
                f"cannot resume {path}: its {name} is {manifest.get(name)}, the stores and tokenizer on disk "
                f"give {digest}; restore them or start a new run directory"
            )
    before = manifest.get("stores", pieces.stores())  # an older version's says nothing
    for name, old, new in zip(pieces.config.data.stores, before, pieces.stores(), strict=True):
        if old != new:
            raise ValueError(
                f"cannot resume {path}: the store {name} has changed since; restore it, or start a new run "
                "directory from this checkpoint by train.init_from"
            )
    if parallel.is_spread(model):
        _resume_rows(path, model, optimizers, _raw(average))
        average.swap()
        return read_json(path / "trainer.json")
    load_weights(path, model)
    tensors = load_tensors(path / "trainer.safetensors")
    for name, parameter, optimizer in _in_training(model, optimizers):
        stored = {key: tensors[f"{key}.{name}"] for key in _state_keys(optimizer)}
        state = {key: value.to(parameter.device) for key, value in stored.items()}
        optimizer.state[parameter] = {k: v.reshape(()) if k == "step" else v for k, v in state.items()}
    for name, tensor in _raw(average).items():
        tensor.copy_(tensors[name])
    average.swap()
    return read_json(path / "trainer.json")


@contextmanager
def or_earlier(run_dir: Path, path: Path) -> Iterator[None]:
    """Say of a damaged checkpoint which one is before it and what to type."""
    try:
        yield
    except DamagedFileError as error:
        before = max((step for step, other in checkpoints(run_dir).items() if other != path), default=None)
        then = "begins anew" if before is None else f"goes on from step_{before}"
        raise DamagedFileError(f"{error}; or type `rm -r {path}`, and the same command {then}") from None


def load_weights(path: Path, model: nn.Module) -> None:
    """Load what a checkpoint holds from model.safetensors; another shape or vocabulary raises ValueError."""
    own = stored(model)
    check_fit(path / "model.safetensors", own)
    for name, tensor in load_tensors(path / "model.safetensors").items():
        own[name].copy_(tensor)


def _resume_rows(path: Path, model: nn.Module, optimizers: Optimizers, raw: Mapping[str, Tensor]) -> None:
    """Read each rank's rows of weights and moments, whatever the number of ranks that wrote them."""
    rows = stored(model)
    check_fit(path / "model.safetensors", rows)
    rows |= raw
    for name, parameter, optimizer in _in_training(model, optimizers):
        state = {}
        for key in _state_keys(optimizer):
            if key == "step":
                step = read_tensor(path / "trainer.safetensors", f"step.{name}")
                state[key] = step.clone().reshape(()).to(parameter.device)
            else:
                rows[f"{key}.{name}"] = state[key] = torch.zeros_like(parameter.detach())
        optimizer.state[parameter] = state
    load_rows(path, rows)


def load_rows(path: Path, rows: dict[str, Tensor]) -> None:
    """Fill this rank's rows of tensors from the safetensors files of a folder; the rest is never read."""
    state_dict_loader.load(rows, storage_reader=HuggingFaceStorageReader(str(path)))
    for name, tensor in rows.items():
        check_finite(path, name, parallel.local(tensor))


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else _ADAMW


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    found = checkpoints(run_dir)
    return found[max(found)] if found else None


def prune(run_dir: Path, best_step: int | None) -> None:
    """Delete all checkpoints but the newest ones and that of `best_step`."""
    for step, path in sorted(checkpoints(run_dir).items())[:-NUM_KEPT]:
        if step != best_step:  # under a scratch name first, so that a kill leaves no half of it
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")))


def check_config(run_dir: Path, config: Config, is_writer: bool = True) -> None:
    """Write run_dir/config.json, or compare it with the one there: changed leaves raise ValueError.

    More steps are allowed, with a remark on what they do to the learning rate. A run that has not come to its
    first checkpoint, one that failed at once say, may change as it likes.
    """
    path = run_dir / "config.json"
    if not path.exists() or not (found := checkpoints(run_dir)):
        refuse_others(run_dir, MANIFEST, "model.safetensors")  # a checkpoint, a store, an image tokenizer
        if is_writer:  # one of several processes
            write_json(path, to_json(config))
        return
    free = {f"train.{name}" for name in _FREE}
    there = from_json(Config, read_json(path), str(path))  # an older version's, completed by the defaults
    if config.train.steps > there.train.steps or there.optim.learning_rate == there.optim.min_learning_rate:
        free.add("train.steps")
    changed = differing(to_json(there), to_json(config))
    if bad := [said for key, said in changed.items() if key not in free]:
        raise ValueError(
            f"{run_dir} holds a run with another config ({', '.join(bad)}); resume it with its own settings, "
            "or use a new run directory and train.init_from"
        )
    if "train.steps" in changed:
        _tell_rate(config, there.train.steps, max(found))
    if changed and is_writer:
        write_json(path, to_json(config))


def _tell_rate(config: Config, steps: int, step: int) -> None:
    """Say what another number of steps than `steps` does to the learning rate of a run that is at `step`."""
    (old, _), (new, end) = (
        [learning_rate(at, num, config.optim) for at in (min(step, num - 1), num - 1)]
        for num in (steps, config.train.steps)
    )
    logging.getLogger("worldvla").warning(
        "train.steps %d, was %d: the run goes on at step %d with its optimiser and a learning rate of %.3g, "
        "which was %.3g, and ends at %.3g",
        *(config.train.steps, steps, step, new, old, end),
    )


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value.detach()
        for name, parameter, optimizer in _in_training(model, optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _in_training(
    model: nn.Module, optimizers: Optimizers
) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer]]:
    """Yield name and optimiser of every parameter that has one."""
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            yield names[id(parameter)], parameter, optimizer
