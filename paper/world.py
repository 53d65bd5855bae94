"""What several models imagine of the same clips: the records behind the paper's Table 2.

    python -m paper.world CHECKPOINT... --demos DEMOS --probe OTHER_DEMOS --out OUT --clips 64 --horizon 10

Beside `imagined` stand the tokenizer's `ceiling`, the first frame copied (`floor`), and the same model with
another clip's actions (`swapped`) and with none (`still`): a model that listens to the action is worse then.
A probe, trained on other demonstrations, reads the hand's motion off the frames (paper/motion.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from paper.motion import NUM_DIMS, Inverse, read_motion, train_inverse
from worldvla.data.episode import demonstration_files, read_episodes
from worldvla.eval.world import Clip, Frames, check, choose, imagine, references, score
from worldvla.files import write_json
from worldvla.infer.model import Model, load
from worldvla.machine import provenance


def other_episodes(clips: Sequence[Clip]) -> list[int]:
    """Return for every clip the next one of another episode; clips of one episode raise ValueError."""
    turns = [[*range(i + 1, len(clips)), *range(i)] for i in range(len(clips))]
    others = [[j for j in t if clips[j].episode is not clips[i].episode] for i, t in enumerate(turns)]
    if not all(others):
        raise ValueError("all clips are of one episode: there are no other actions to swap in, collect more")
    return [js[0] for js in others]


def kinds_of(model: Model, clips: Sequence[Clip]) -> dict[str, list[Frames]]:
    """Return kind -> the frames of every clip."""
    gripper = np.arange(clips[0].actions.shape[1]) == clips[0].actions.shape[1] - 1
    plans = {
        "imagined": [clip.actions for clip in clips],
        "swapped": [clips[i].actions for i in other_episodes(clips)],
        "still": [clip.actions * gripper for clip in clips],
    }
    lines = references(model, clips)
    frames = {"ceiling": lines["ceiling"], "floor": lines["copy"]}
    return frames | {kind: imagine(model, clips, plan, title=kind)[0] for kind, plan in plans.items()}


def read_back(
    net: Inverse, clips: Sequence[Clip], kinds: Mapping[str, Sequence[Frames]]
) -> dict[str, dict[str, float]]:
    """Return kind -> `error`, `size` and `r2` of the motion read off the frames against that asked for."""
    asked = [clip.actions[:, :NUM_DIMS] for clip in clips]
    wanted = {"swapped": [asked[i] for i in other_episodes(clips)], "still": [0 * a for a in asked]}
    rows = {}
    for kind, frames in {"real": [clip.real for clip in clips], **kinds}.items():
        if kind == "floor":
            continue
        read = np.concatenate([read_motion(net, clip) for clip in frames])
        truth = np.concatenate(wanted.get(kind, asked))
        error, spread = ((read - truth) ** 2).sum(), ((truth - truth.mean(0)) ** 2).sum()
        rows[kind] = {"error": float(np.abs(read - truth).mean()), "size": float(np.abs(read).mean())}
        rows[kind] |= {"r2": float(1 - error / spread)} if spread else {}
    return {kind: {name: round(value, 4) for name, value in row.items()} for kind, row in rows.items()}


def evaluate(
    checkpoints: Sequence[Path],
    demos: Sequence[Path],
    out: Path,
    probe: Sequence[Path] = (),
    *,
    clips: int = 64,
    horizon: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Write out/record.json and return it. Files of `probe` that hold clips raise ValueError."""
    models = {model.config.name: model for model in map(load, checkpoints)}
    if len(models) < len(checkpoints):
        raise ValueError(f"models of one name among {list(models)}: evaluate them apart")
    if shared := {path.resolve() for path in demos} & {path.resolve() for path in probe}:
        raise ValueError(f"{shared.pop()} holds clips: train the probe on other demonstrations")
    chosen = choose(demos, clips, horizon, seed)
    for model in models.values():
        check(model, chosen)
    kinds = {name: kinds_of(model, chosen) for name, model in models.items()}
    scores = {name: score(chosen, of) for name, of in kinds.items()}
    first = next(iter(scores.values()))
    views = {view: {name: scores[name]["views"][view] for name in models} for view in first["views"]}
    section: dict[str, Any] = {"horizon": horizon, **first, "views": views}
    if probe:
        net = train_inverse([e for path in probe for e in read_episodes(path)], list(views))
        section["probe"] = {name: read_back(net, chosen, of) for name, of in kinds.items()}
    section["clips"] = [clip.describe() for clip in chosen]
    identities = {name: model.identity() for name, model in models.items()}
    record = {"models": identities, "seed": seed, "horizons": [section], **provenance()}
    write_json(out / "record.json", record)
    return record


def main(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    demos: tuple[Path, ...],
    out: Path,
    probe: tuple[Path, ...] = (),
    clips: int = 64,
    horizon: int = 10,
) -> None:
    """Evaluate checkpoints on the same held-out clips of `demos`; `probe`: other demonstrations."""
    others = demonstration_files(probe) if probe else ()
    evaluate(checkpoints, demonstration_files(demos), out, others, clips=clips, horizon=horizon)


if __name__ == "__main__":
    tyro.cli(main)
