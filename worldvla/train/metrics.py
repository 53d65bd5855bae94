"""What a run records: one JSON line an event (the record), TensorBoard, progress, and the validation numbers.

Validation is teacher-forced: the argmax over the action range (what decoding does) against the truth, in
normalised units. Three constant dimensions can make a cross-entropy look good, so the error of the first
action's x, y, z stands beside that of predicting no motion.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor

from worldvla.batch import KIND_ACTION, KIND_IMAGE, KIND_LAYOUT, KIND_STATE, Batch
from worldvla.files import reading, write_text
from worldvla.model.transformer import Transformer, previous_ids
from worldvla.progress import progress_bar
from worldvla.train.loss import Loss, Targets
from worldvla.vocab import Vocab

KINDS = {"action": KIND_ACTION, "image": KIND_IMAGE, "layout": KIND_LAYOUT, "state": KIND_STATE}
Forward = Callable[[Batch, Targets], tuple[Tensor, Tensor | None]]
"""Hidden states at the targets' positions, (P, D), and the continuous head's actions (B, U, A), if any."""
log = logging.getLogger("worldvla")


class Recorder:
    """Writes run_dir/metrics.jsonl and run_dir/tensorboard; shows progress on stderr (plain lines off a tty).

    Records of steps after `start` (written by a run that died before its next checkpoint) are dropped.
    """

    def __init__(
        self, run_dir: Path, start: int, num_steps: int, is_silent: bool = False, module: Any = None
    ) -> None:
        """`is_silent`: write and show nothing (every rank but the first). `module`: a tracker's, or None."""
        self._is_silent, self._module = is_silent, module
        if is_silent:
            return
        from torch.utils.tensorboard import SummaryWriter  # one second: only where it is used

        path = run_dir / "metrics.jsonl"
        with reading(path, "record of a training", "mend or remove the file"):
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            if lines and not lines[-1].endswith("\n"):
                log.warning("%s: dropped its last line, which a stop cut short", path)
                lines.pop()
            kept = [line for line in lines if json.loads(line)["step"] <= start]
        write_text(path, "".join(kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start + 1)
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._progress = progress_bar(self._console, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task("train", total=num_steps, completed=start)

    def __enter__(self) -> Self:
        if not self._is_silent:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_silent:
            return
        self._progress.stop()
        self._file.close()
        self._board.close()

    def advance(self, step: int, loss: float) -> None:
        if not self._is_silent:
            self._progress.update(self._task, completed=step, description=f"train, loss {loss:.4f}")

    def record(self, event: str, step: int, values: dict[str, float]) -> None:
        """Append {"event", "step", ...}; `step` counts finished optimiser steps."""
        if self._is_silent:
            return
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{event}/{name}", value, step)
        if self._module is not None:
            self._module.log({f"{event}/{name}": value for name, value in values.items()}, step=step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(f"step {step}  {event}  {shown}", markup=False)

    def say(self, line: str) -> None:
        if not self._is_silent:
            self._console.print(line, markup=False)


@dataclass(frozen=True)
class ActionScale:
    """How action codes read as numbers: normalised values of each code and of a zero action."""

    centres_C: Tensor
    no_motion_A: Tensor
    """NaN of a mixture of datasets, where a zero action has no one code."""
    chunk: int

    def to(self, device: torch.device) -> Self:
        return replace(self, centres_C=self.centres_C.to(device), no_motion_A=self.no_motion_A.to(device))


@torch.no_grad()
def validate(
    forward: Forward, model: Transformer, loss: Loss, batches: Iterable[Batch], scale: ActionScale
) -> dict[str, float]:
    """Return the mean cross-entropy per kind of target, and how good the greedy actions and codes are.

    Keys appear only for what the batches hold: loss; {action,image,layout,state}_loss (nats);
    {changed,kept}_loss, of image codes that differ from the code at their place one frame earlier, and of
    those that do not; {action,image}_accuracy; state_bins, how far a state dim is off, in bins;
    first_{x,y,z,xyz}_l1, of the first action of a chunk; end_xyz_l1, of the whole chunk's motion;
    still_xyz_l1 and still_end_xyz_l1, the same of predicting no motion; gripper_accuracy; action_l1, of all
    dims, against what they were before they became bins; head_*, of the continuous head.
    """
    parts: dict[str, list[Tensor]] = {}
    totals: list[float] = []
    for batch in batches:
        targets = loss.targets(batch)
        x_PD, actions_BUA = forward(batch, targets)
        divisors = loss.totals([targets])
        value, cross_entropy_P = loss(x_PD, model.head.weight, targets, divisors, model.code_head)
        if actions_BUA is not None:
            share, error_BUA = loss.of_actions(actions_BUA, targets, divisors)
            value = value + share
            found = {"l1": error_BUA} | motion_errors(actions_BUA, targets.values_N.view_as(actions_BUA))
            for name, values in found.items():
                parts.setdefault(f"head_{name}", []).append(values.float().flatten())
        totals.append(float(value))
        for name, kind in KINDS.items():
            parts.setdefault(f"{name}_loss", []).append(cross_entropy_P[targets.kind_P == kind])
        before_BT = previous_ids(batch.ids_BT, batch.row_BT, batch.col_BT)
        before_P = before_BT.flatten()[targets.positions_P]
        for name, is_P in (("changed", before_P != targets.ids_P), ("kept", before_P == targets.ids_P)):
            parts.setdefault(f"{name}_loss", []).append(cross_entropy_P[is_P & (before_P > 0)])
        for name, values in greedy(model, loss.vocab, x_PD, targets, scale).items():
            parts.setdefault(name, []).append(values.float().flatten())
    means = {name: float(torch.cat(values).mean()) for name, values in parts.items() if sum(map(len, values))}
    for head in ("", "head_"):
        if first := [means[name] for axis in "xyz" if (name := f"{head}first_{axis}_l1") in means]:
            means[f"{head}first_xyz_l1"] = sum(first) / len(first)
    return {"loss": sum(totals) / max(1, len(totals)), **means}


def greedy(
    model: Transformer, vocab: Vocab, x_PD: Tensor, targets: Targets, scale: ActionScale
) -> dict[str, Tensor]:
    """Return how right the most likely codes are, each within its own range of ids, as decoding has it."""
    out: dict[str, Tensor] = {}
    is_image_P = targets.kind_P == KIND_IMAGE
    if is_image_P.any():
        if model.code_head is not None:
            guess_P, _ = model.code_head.choose(x_PD[is_image_P])
        else:
            guess_P = model.logits(x_PD[is_image_P], vocab.image).argmax(-1)
        out["image_accuracy"] = guess_P == targets.ids_P[is_image_P] - vocab.image.start
    is_state_P = targets.kind_P == KIND_STATE
    if is_state_P.any():
        guess_P = model.logits(x_PD[is_state_P], vocab.state).argmax(-1)
        out["state_bins"] = (guess_P - (targets.ids_P[is_state_P] - vocab.state.start)).abs()
    is_bin_P = (targets.ids_P >= vocab.action.start) & (targets.ids_P < vocab.action.stop)
    if is_bin_P.any():
        shape = (-1, scale.chunk, len(scale.no_motion_A))  # every policy sample holds a whole chunk
        guess_BUA = model.logits(x_PD[is_bin_P], vocab.action).argmax(-1).reshape(shape)
        truth_BUA = (targets.ids_P[is_bin_P] - vocab.action.start).reshape(shape)
        out["action_accuracy"] = guess_BUA == truth_BUA
        guess_BUA, truth_BUA = scale.centres_C[guess_BUA], scale.centres_C[truth_BUA]
        out |= motion_errors(guess_BUA, truth_BUA)
        if not scale.no_motion_A.isnan().any():
            still_BUA = scale.no_motion_A.expand_as(truth_BUA)
            out["still_xyz_l1"] = (still_BUA - truth_BUA)[:, 0, :3].abs()
            out["still_end_xyz_l1"] = motion_errors(still_BUA, truth_BUA)["end_xyz_l1"]
        if len(targets.values_N):
            out["action_l1"] = (guess_BUA - targets.values_N.view_as(guess_BUA)).abs()
    return out


def motion_errors(guess_BUA: Tensor, truth_BUA: Tensor) -> dict[str, Tensor]:
    """Return how far off the first action, the whole chunk's motion and the gripper's sign are."""
    axes = enumerate("xyz"[: guess_BUA.shape[-1]])  # a robot may have fewer dims
    out = {f"first_{axis}_l1": (guess_BUA - truth_BUA)[:, 0, dim].abs() for dim, axis in axes}
    out["end_xyz_l1"] = (guess_BUA[..., :3].sum(1) - truth_BUA[..., :3].sum(1)).abs()
    out["gripper_accuracy"] = guess_BUA[..., -1].sign() == truth_BUA[..., -1].sign()
    return out
