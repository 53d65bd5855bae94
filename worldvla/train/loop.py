"""Config -> a trained checkpoint in a run directory. The same call again goes on where the last one stopped.

    python -c "from worldvla.recipes import debug; from worldvla.train.loop import train; train(debug(),
    'out/train/debug')"

run_dir/{config.json,metrics.jsonl,tensorboard/,ckpt/step_N/}. The loader is a pure function of the step, so
its place is the step.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_PROMPT, Batch
from worldvla.config import Config, from_json, to_json
from worldvla.data.loader import MODES
from worldvla.files import only_writer, read_json, reading
from worldvla.machine import faster_dtype, matmul_rate, peak_memory
from worldvla.model.action_head import ActionHead
from worldvla.model.lora import stored
from worldvla.model.mask import additive_mask, dense_mask, read_ids
from worldvla.model.transformer import previous_ids
from worldvla.track import Tracker, tracked
from worldvla.train import checkpoint, parallel
from worldvla.train.build import Pieces, action_scale, build, build_model, fit
from worldvla.train.corruption import corrupted, own_codes
from worldvla.train.loss import Loss, Targets
from worldvla.train.metrics import KINDS, Forward, Recorder, validate
from worldvla.train.optim import Average, build_optimizers, learning_rate

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks for a checkpoint and the end: Slurm, a cloud that takes its machine back, Ctrl-C."""


@dataclass(frozen=True)
class Outcome:
    checkpoint: Path
    step: int
    is_finished: bool
    """False: stopped by a signal (SIGNALS) after saving; the same call goes on."""


@dataclass
class State:
    """What a checkpoint holds beside weights and optimiser."""

    step: int = 0
    """Finished optimiser steps."""
    best_loss: float | None = None
    best_step: int | None = None
    train_seconds: float = 0.0
    window: dict[str, list[float]] = field(default_factory=dict)
    """Per-step values since the last record."""


def train(config: Config, run_dir: Path | str, tracker: Tracker = "") -> Outcome:
    """Train until config.train.steps, resuming if `run_dir` holds a checkpoint. `tracker` gets every record,
    too."""
    run_dir = Path(run_dir)
    config = fit(config)
    is_writer = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    with only_writer(run_dir) if is_writer else nullcontext():
        checkpoint.check_config(run_dir, config, is_writer)
        config, remark = with_dtype(config, run_dir)
        with tracked(tracker if is_writer else "", run_dir, to_json(config)) as module:
            return Trainer(build(config), run_dir).run(remark, module)


def with_dtype(config: Config, run_dir: Path) -> tuple[Config, str]:
    """Return the config with train.dtype "auto" decided, and a line that says how: as the run began, or by a
    measurement. Checkpoints hold what was decided.
    """
    if config.train.dtype != "auto":
        return config, ""
    if (path := checkpoint.latest(run_dir)) is not None:
        there = from_json(Config, read_json(path / "config.json"), f"{path}/config.json")
        dtype, remark = there.train.dtype, "as this run began"
    else:
        dtype, remark = faster_dtype(parallel.start(config.train))
        dtype = parallel.from_first(dtype)
    return replace(config, train=replace(config.train, dtype=dtype)), f"train.dtype auto is {dtype}: {remark}"


class Trainer:
    """One run: the pieces, the model, the optimiser, and the step."""

    def __init__(self, pieces: Pieces, run_dir: Path) -> None:
        self.pieces, self.config, self.run_dir = pieces, pieces.config, run_dir
        config = self.config.train
        if config.dtype == "auto":
            raise ValueError("train.dtype auto is decided by train(); a Trainer needs float32 or bfloat16")
        self.device = parallel.start(config)
        torch.manual_seed(config.seed)
        self.model = build_model(pieces)
        template = pieces.builder.world_template(self.config.layout.clip)
        self.model.ahead = int((template.table[1] == -1).sum())
        parallel.spread(self.model, config, self.device)
        if self.model.norm.weight.is_meta:
            self.model.to_empty(device=self.device)
            checkpoint.load_rows(Path(config.init_from), stored(self.model))
        self.model.to(self.device)
        self.optimizers = build_optimizers(self.model, self.config.optim)
        self.average = Average(self.model, self.config.optim.ema)
        self.loss = Loss(self.config.loss, pieces.vocab)
        self.state, self.saved = State(), -1
        if (path := checkpoint.latest(run_dir)) is not None:
            with checkpoint.or_earlier(run_dir, path):
                state = checkpoint.resume(path, pieces, self.model, self.optimizers, self.average)
                with reading(path / "trainer.json", "state of a training", "copy the folder again"):
                    self.state = State(**state)
            self.saved = self.state.step
        hidden, head = torch.compile(self.model) if config.compile else self.model, self.model.action_head
        if config.compile and head is not None:
            head.compile()
        reads_previous = self.config.model.previous_code
        self.forward = make_forward(
            hidden, config.dtype, head, config.only_head, reads_previous, pieces.vocab.pad
        )

    def run(self, remark: str = "", module: Any = None) -> Outcome:
        """Train to the end or until a signal; `remark`: a line to say first; `module`: that of a tracker."""
        config, state = self.config.train, self.state
        with (
            Recorder(self.run_dir, state.step, config.steps, parallel.rank() > 0, module) as recorder,
            _stop_requests() as is_stopping,
            self._prefetch() as fetch,
            checkpoint.Background(parallel.is_spread(self.model)) as background,
        ):
            if remark:
                recorder.say(remark)
            self.rate = matmul_rate(self.device, config.dtype, 0.05) * parallel.num_ranks()
            size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            recorder.say(
                f"{size:,} trained parameters, step {state.step} of {config.steps}, in {self.run_dir}"
            )
            while state.step < config.steps and not parallel.any_rank(is_stopping(), self.device):
                started = time.perf_counter()
                batches = fetch(state.step)
                waited = time.perf_counter() - started
                self._note(self.step(batches))
                state.step += 1
                seconds = time.perf_counter() - started
                state.train_seconds += seconds
                self._note({**self._count(batches), "seconds": seconds, "waited": waited})
                recorder.advance(state.step, state.window["loss"][-1])
                is_last = state.step == config.steps
                if is_last or is_due(state.step, config.log_every):
                    recorder.record("train", state.step, self._drain())
                if is_last or is_due(state.step, config.eval_every):
                    self._validate(recorder)
                background.check()
                if not is_last and is_due(state.step, config.save_every):
                    self.save(background)
            background.wait()
            if not state.step:
                raise KeyboardInterrupt  # nothing to save
            is_finished = state.step >= config.steps
            path = self.save()
            recorder.say(f"{'finished' if is_finished else 'stopped'} at step {state.step}: {path}")
        return Outcome(path, state.step, is_finished)

    def step(self, batches: list[Batch]) -> dict[str, float]:
        """Take one optimiser step and return its numbers; a loss that is not finite raises ValueError."""
        self.model.train()
        if self.config.train.only_head:  # no dropout in what stays as it is
            for name, module in self.model.named_children():
                module.train(name == "action_head")
        # Dropout is a function of (step, rank): resuming needs no more than the step, on any device.
        seed = self.config.train.seed * 1_000_003 + self.state.step
        torch.manual_seed(seed * parallel.num_ranks() + parallel.rank())
        rate = learning_rate(self.state.step, self.config.train.steps, self.config.optim)
        values = self.backward(batches)
        norm = parallel.clip_gradients(self.model, self.config.optim.clip)
        if not math.isfinite(values["loss"]) or not math.isfinite(norm):
            raise ValueError(
                f"loss {values['loss']} with gradient norm {norm} at step {self.state.step}, learning rate "
                f"{rate:.3g}; expected finite numbers: lower optim.learning_rate or optim.clip and start a "
                f"new run directory from {checkpoint.latest(self.run_dir)} by train.init_from"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.state.step)
        return {**values, "gradient_norm": norm, "learning_rate": rate}

    def backward(self, batches: list[Batch]) -> dict[str, float]:
        """Add the gradients of one step's loss, means over all micro-batches; return its parts."""
        totals = self.loss.totals([self.loss.targets(batch) for batch in batches])
        batches = parallel.own_rows(batches, together=parallel.is_spread(self.model))
        targets = [self.loss.targets(batch) for batch in batches]
        total, cross_entropies, errors = 0.0, [], []
        for index, (batch, target) in enumerate(zip(batches, targets, strict=True), 1):
            batch = self._with_own_codes(batch, target)
            parallel.gather(self.model, index == len(batches))
            with self._autocast():
                x_PD, actions_BUA = self.forward(batch, target)
                value, cross_entropy_P = self.loss(
                    x_PD, self.model.head.weight, target, totals, self.model.code_head
                )
                if actions_BUA is not None:
                    share, error_BUA = self.loss.of_actions(actions_BUA, target, totals)
                    value = value + share
                    errors.append(error_BUA.flatten())
            value.backward()
            total += float(value.detach())
            cross_entropies.append(cross_entropy_P)
        cross_entropy_P = torch.cat(cross_entropies)
        kind_P = torch.cat([target.kind_P for target in targets])
        per_kind = {f"{name}_loss": cross_entropy_P[kind_P == kind] for name, kind in KINDS.items()}
        per_kind["head_l1"] = torch.cat(errors) if errors else cross_entropy_P[:0]
        own = [number for v in per_kind.values() for number in (float(v.sum()), len(v))]
        total, *every = parallel.sum_gradients(self.model, total, *own)
        parts = zip(per_kind, every[::2], every[1::2], strict=True)
        return {"loss": total} | {name: value / count for name, value, count in parts if count}

    def save(self, background: checkpoint.Background | None = None) -> Path:
        """Save the state that the run is in, unless it is saved; with `background`, while it goes on."""
        path, state = self.run_dir / "ckpt" / f"step_{self.state.step}", self.state
        is_writer = parallel.rank() == 0
        is_new, self.saved = self.saved != state.step, state.step
        if is_new and (is_writer or parallel.is_spread(self.model)):
            what = path, self.pieces, self.model, self.optimizers, vars(state), self.average
            if background is not None:
                background.save(*what)
                return path
            checkpoint.save(*what)
        if is_writer:  # a kill may have come between the last checkpoint and this
            checkpoint.prune(self.run_dir, state.best_step)
        return path

    def _batches(self, step: int) -> list[Batch]:
        num = self.config.train.accumulation
        indices = [0] * num if self.config.train.overfit else range(step * num, (step + 1) * num)
        return [self._read(part, i).to(self.device) for i in indices for part in self.pieces.loader.batch(i)]

    def _read(self, batch: Batch, index: int) -> Batch:
        """Return the batch, of world samples with some of the codes that the model reads wrong."""
        if not self.config.data.corrupt or not (batch.kind_BT == KIND_IMAGE).any():
            return batch
        generator = torch.Generator().manual_seed(self.config.train.seed * 1_000_003 + index)
        levels, share = self.config.model.code_levels, self.config.data.corrupt
        has_anchor, vocab = self.config.layout.anchor, self.pieces.vocab
        return replace(batch, wrong_BT=corrupted(batch, vocab, levels, share, generator, has_anchor))

    @torch.no_grad()
    def _with_own_codes(self, batch: Batch, target: Targets) -> Batch:
        """Return the batch with some image codes read as the model itself chooses them, given what it reads
        now: scheduled sampling in one parallel pass (arXiv 1906.07651). In imagination it reads nothing else.
        The draws are a function of (step, rank), as dropout.
        """
        share, is_image_P = self.config.train.scheduled_sampling, target.kind_P == KIND_IMAGE
        if not share or not is_image_P.any():
            return batch
        with self._autocast():
            x_PD, _ = self.forward(batch, target)
            where_P, image = target.positions_P[is_image_P] + 1, self.pieces.vocab.image
            return replace(
                batch, wrong_BT=own_codes(batch, self.model, image, x_PD[is_image_P], where_P, share)
            )

    @contextmanager
    def _prefetch(self) -> Iterator[Callable[[int], list[Batch]]]:
        """Give a function step -> batches that assembles the next step's while this one computes."""
        with ThreadPoolExecutor(1) as pool:
            ahead = {self.state.step: pool.submit(self._batches, self.state.step)}

            def fetch(step: int) -> list[Batch]:
                ahead[step + 1] = pool.submit(self._batches, step + 1)
                return ahead.pop(step).result()

            yield fetch

    def _validate(self, recorder: Recorder) -> None:
        is_without = not (self.config.data.val_fraction or self.config.train.overfit)
        is_spread = parallel.is_spread(self.model)  # then no rank has all weights: all compute the same
        if is_without or (parallel.rank() > 0 and not is_spread):
            return
        self.model.eval()
        with self._autocast(), self.average.in_place():
            scale = action_scale(self.pieces).to(self.device)
            values = validate(self.forward, self.model, self.loss, self._val_batches(), scale)
            parallel.release(self.model)
        recorder.record("val", self.state.step, values)
        step, train = self.state.step, self.config.train
        is_saved = step == train.steps or is_due(step, train.save_every)
        if is_saved and (self.state.best_loss is None or values["loss"] < self.state.best_loss):
            self.state.best_loss, self.state.best_step = values["loss"], self.state.step

    def _val_batches(self) -> Iterator[Batch]:
        fraction, loader = self.config.data.world_fraction, self.pieces.loader
        if self.config.train.overfit:
            yield from self._batches(0)
            return
        for mode in MODES:
            if (fraction if mode == "world" else 1 - fraction) == 0:
                continue
            for index in range(self.config.train.num_eval_batches):
                yield loader.val_batch(index, mode).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.dtype == "bfloat16")

    def _note(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.state.window.setdefault(name, []).append(value)

    def _count(self, batches: list[Batch]) -> dict[str, float]:
        """Return a step's tokens, how many are padding, and the operations of the model on the others."""
        tokens, real, flops = 0, 0, 0
        for batch in batches:
            rows, own = len(batch.ids_BT), int((batch.ids_BT != self.pieces.vocab.pad).sum())
            num_targets = int((batch.kind_BT != KIND_PROMPT).sum())
            flops += 3 * rows * self.model.flops(own // rows, num_targets // rows)
            tokens, real = tokens + batch.ids_BT.numel(), real + own
        return {"tokens": tokens, "padded": tokens - real, "flops": flops}

    def _drain(self) -> dict[str, float]:
        """Return the means since the last record and forget them: of times and tokens, their rates."""
        window, self.state.window = self.state.window, {}
        names = ("tokens", "seconds", "waited", "padded", "flops")
        tokens, seconds, waited, padded, flops = (sum(window.pop(name, ())) for name in names)
        rates = {"tokens_s": round(tokens / seconds, 1), "wait_share": round(waited / seconds, 4)}
        rates |= {"padding_share": round(padded / tokens, 4), "mfu": round(flops / seconds / self.rate, 4)}
        rates["memory_gb"] = round(peak_memory(self.device) / 1e9, 3)
        means = {name: sum(values) / len(values) for name, values in window.items()}
        return {**means, **rates, "train_seconds": round(self.state.train_seconds, 1)}


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps happens after `step`; 0: only at the end."""
    return every > 0 and step % every == 0


def make_forward(
    model: Callable[..., Tensor],
    dtype: str,
    head: ActionHead | None,
    only_head: bool = False,
    reads_previous: bool = False,
    pad: int = 0,
) -> Forward:
    """Return batch -> hidden states at its targets, and the head's actions where there is a head and a policy
    sample; the mask is built once for all layers.
    """
    mask_dtype = torch.bfloat16 if dtype == "bfloat16" else torch.float32

    def forward(batch: Batch, targets: Targets) -> tuple[Tensor, Tensor | None]:
        mask = additive_mask(dense_mask(batch.chunk_BT), mask_dtype)
        ids_BT = read_ids(batch.read_BT, batch.chunk_BT, batch.row_BT, pad)
        inputs = [ids_BT, mask, batch.row_BT, batch.col_BT]
        if reads_previous:
            inputs += [None, previous_ids(batch.read_BT, batch.row_BT, batch.col_BT)]
        is_action_BT = batch.kind_BT == KIND_ACTION
        rows = is_action_BT.any(1).nonzero().squeeze(1) if head is not None else ()
        if head is None or not len(rows):
            return model(*inputs, keep_P=targets.positions_P), None
        # Prompt and targets are nearly all positions of a policy sample: nothing is left out.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_head):
            x_BTD = model(*inputs)
        lengths_B = is_action_BT[rows].int().argmax(1)
        actions_BUA = head(x_BTD[rows, : int(lengths_B.max())], lengths_B)
        return x_BTD.flatten(0, 1).index_select(0, targets.positions_P), actions_BUA

    return forward


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether one of SIGNALS came, or torchrun's agent, which started this process,
    is gone; a second Ctrl-C interrupts at once.
    """
    requests: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield lambda: False
        return
    # What is ignored stays so: SIGHUP under nohup, Ctrl-C of a shell's background job.
    old = {n: signal.signal(n, handle) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    try:
        yield lambda: bool(requests) or (agent is not None and os.getppid() != agent)
    finally:
        for number, handler in old.items():
            if handler is not None:  # None: set by another language, which Python cannot set again
                signal.signal(number, handler)
