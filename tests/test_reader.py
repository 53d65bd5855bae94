"""A reader finds the hand on frames; imagination is judged by it: perfect, copied, and with a lost hold.

Run: pytest tests/test_reader.py
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import TOKENIZER, _episode

from worldvla.data.episode import Episode, write_episodes
from worldvla.eval.reader import Reader, Sights, fit, gather, holding, measure, train_reader
from worldvla.eval.world import Clip, find_reader, score
from worldvla.files import check_digests, read_json, write_digests, write_json
from worldvla.tokenizers.image import ImageTokenizer

SIZES = {"agentview": (16, 16), "wrist": (8, 8)}


def discs(places_T2: np.ndarray, is_held_T: np.ndarray) -> dict[str, np.ndarray]:
    """Return frames with a disc at `places` (metres, +-0.2), red where a thing is held, else white."""
    frames = {}
    for view, (rows, cols) in SIZES.items():
        y, x = np.mgrid[:rows, :cols] / (rows - 1) * 0.6 - 0.3
        away = np.hypot(x - places_T2[:, 0, None, None], y - places_T2[:, 1, None, None])
        color = np.where(is_held_T[:, None], (255, 0, 0), (255, 255, 255))
        frames[view] = (np.clip((0.08 - away) / 0.02, 0, 1)[..., None] * color[:, None, None]).astype(
            np.uint8
        )
    return frames


def episode(rng: np.random.Generator, length: int = 24) -> Episode:
    """Return a walk of the disc, whose gripper closes on something in the middle third."""
    places = np.cumsum(rng.uniform(-0.02, 0.02, (length, 2)), 0) + rng.uniform(-0.1, 0.1, 2)
    plain, third = _episode(rng, 0, length), length // 3
    is_held = (np.arange(length) >= third) & (np.arange(length) < 2 * third)
    states, actions = np.zeros((length, 8), np.float32), np.zeros((length, 7), np.float32)
    states[:, :2], states[:, 6] = places, np.where(is_held, 0.02, 0.04)
    states[:, 7] = -states[:, 6]
    actions[:, 6] = np.where(np.roll(is_held, -1), 1, -1)
    frames = discs(places, holding(replace(plain, states=states, actions=actions)))
    return replace(plain, states=states, actions=actions, images=frames)


@pytest.fixture(scope="module")
def reader() -> Reader:
    rng = np.random.default_rng(0)
    episodes = [episode(rng) for _ in range(60)]
    images = {view: np.concatenate([e.images[view] for e in episodes]) for view in SIZES}
    truth = [np.c_[e.states[:, :3], e.states[:, 6] - e.states[:, 7], holding(e)] for e in episodes]
    number = np.repeat(np.arange(60), len(episodes[0]))
    sights = Sights(images, np.concatenate(truth).astype(np.float32), number % 2 == 0, number < 8)
    reader = fit(sights, 150)
    errors = measure(reader, sights, is_shown=False)
    assert errors["hand_median_cm"] < 0.7 < errors["hand_p90_cm"] + 0.7
    assert errors["holds_right"] > 0.95
    return reader


def test_what_a_gripper_holds_is_seen_from_its_fingers() -> None:
    opening = np.array([0.08, 0.08, 0.04, 0.04, 0.04, 0.04, 0.08, 0.04, 0.0])
    closes = np.array([0, 1, 1, 1, 1, 0, 1, 1, 1])  # the action after each state
    plain = _episode(np.random.default_rng(0), 0, len(opening))
    states, actions = plain.states.copy(), plain.actions.copy()
    states[:, 6], states[:, 7], actions[:, 6] = opening / 2, -opening / 2, np.where(closes, 1, -1)
    assert np.flatnonzero(holding(replace(plain, states=states, actions=actions))).tolist() == [3, 4, 5]


def test_imagination_is_judged_by_the_hand_and_by_what_it_holds(reader: Reader) -> None:
    rng = np.random.default_rng(9)
    contact = np.arange(24) < 5
    clips = [Clip(replace(episode(rng), contact=contact), start, 10) for start in (0, 6, 12)]
    real = [clip.real for clip in clips]
    empty = [discs(c.episode.states[c.start : c.start + 11, :2], np.zeros(11, bool)) for c in clips]
    still = [{v: np.repeat(f[:1], 11, 0) for v, f in frames.items()} for frames in real]
    table = score(clips, {"model": real, "ceiling": real, "copy": still, "empty": empty}, reader)
    hand, held = table["hand"], table["held"]
    assert hand["model"] == hand["ceiling"]  # a perfect imagination has the reader's own error
    assert max(hand["model"]["median_cm"]) < 1.5 < hand["copy"]["median_cm"][-1]
    assert all(
        low <= high for low, high in zip(hand["copy"]["median_cm"], hand["copy"]["p90_cm"], strict=True)
    )
    assert sum(held["num_clips"]) == sum(int(holding(c.episode)[c.later].sum()) for c in clips) > 0
    shown = [(kind, n) for kind in ("model", "empty") for n in held[kind] if n is not None]
    assert np.mean([n for kind, n in shown if kind == "model"]) > 0.9
    assert np.mean([n for kind, n in shown if kind == "empty"]) < 0.1
    assert [held["model"][i] is None for i in range(10)] == [n == 0 for n in held["num_clips"]]
    assert table["num_clips"] == [3] * 10
    assert table["contact"]["num_clips"] == [1] * 10
    assert np.mean([n for n in table["held_wrongly"]["model"] if n is not None]) < 0.1
    assert set(table["contact"]) == {"num_clips", "views", "hand", "held", "held_wrongly"}
    views = table["views"]["agentview"]
    assert (
        views["model"]["psnr_changed"][0]
        == 60.0
        > views["copy"]["psnr"][-1]
        > views["copy"]["psnr_changed"][-1]
    )
    assert "hand" not in score(clips, {"model": real})


def test_a_reader_replaces_nothing_else(tmp_path: Path) -> None:
    train = partial(train_reader, [], ImageTokenizer(TOKENIZER))
    write_json(tmp_path / "config.json", {"width": 1})
    (tmp_path / "model.safetensors").touch()
    for name in ("config.safetensors", "model.safetensors"):
        with pytest.raises(ValueError, match=f"{name} or .* exists and is no reader: choose another name"):
            train(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path} is no file for a reader: .*/reader.safetensors"):
        train(tmp_path)
    with pytest.raises(ValueError, match="expected frames and steps >= 1"):
        train(tmp_path / "reader.safetensors", steps=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_reader_is_trained_stored_and_found(tmp_path: Path) -> None:
    rng, tokenizer = np.random.default_rng(0), ImageTokenizer(TOKENIZER)
    write_episodes(tmp_path / "a_demo.hdf5", [episode(rng) for _ in range(3)], {})
    files, path = [tmp_path / "a_demo.hdf5"], tmp_path / "reader.safetensors"
    errors = train_reader(files, tokenizer, path, frames=90, steps=3)
    sights = gather(files, tokenizer, 90, 0)
    assert np.bincount(sights.is_shown + 2 * sights.is_held_out).tolist() == [48, 12, 24, 6]
    assert path.stat().st_size < 500_000
    write_json(tmp_path / "manifest.json", {})  # of the checkpoint that it lies in
    write_digests(tmp_path)
    model = SimpleNamespace(path=tmp_path, view_sizes=SIZES, image=tokenizer)
    reader, told = find_reader(model)  # pyright: ignore[reportArgumentType]
    assert reader is not None
    assert told is not None
    assert measure(reader, sights, is_shown=True) == errors["shown"] == told["errors"]["shown"]
    assert told["trained_with_this_tokenizer"]
    model.view_sizes = {"agentview": (8, 8)}
    with pytest.raises(ValueError, match="train a reader of its views"):
        find_reader(model)  # pyright: ignore[reportArgumentType]
    model.view_sizes = SIZES
    errors = train_reader(files, tokenizer, path, frames=90, steps=4)  # again: the checkpoint stays sealed
    check_digests(tmp_path)
    assert (find_reader(model)[1] or {})["errors"] == errors  # pyright: ignore[reportArgumentType]
    write_json(tmp_path / "config.json", {})
    write_digests(tmp_path)
    write_json(tmp_path / "config.json", {"damaged": True})
    with pytest.raises(ValueError, match=r"config\.json is not as it was written"):
        train_reader(files, tokenizer, path, frames=90, steps=3)
    write_json(tmp_path / "config.json", {})
    told = read_json(path.with_suffix(".json"))
    write_json(path.with_suffix(".json"), told | {"held_out": 0})
    with pytest.raises(ValueError, match=r"reader.safetensors or reader.json is not as it was written"):
        find_reader(model, path.parent / "../" / path.parent.name / path.name)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"reader\.json is not as it was written"):
        find_reader(model)  # pyright: ignore[reportArgumentType]
    write_episodes(tmp_path / "b_demo.hdf5", [episode(rng)], {})
    with pytest.raises(ValueError, match="at least two episodes"):
        gather([tmp_path / "b_demo.hdf5"], tokenizer, 30, 0)
    model.path = tmp_path / "elsewhere"
    assert find_reader(model) == (None, None)  # pyright: ignore[reportArgumentType]
