"""Imagined clips are scored against the truth with metrics that agree with independent ones; ceiling and
floor are what they say.

Run: pytest tests/test_world.py
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import _episode, tiny_config, write_checkpoint, write_tiny

from paper import motion
from paper.chunk_error import chunk_codes, chunk_error
from paper.world import evaluate, other_episodes
from worldvla.data.episode import write_episodes
from worldvla.data.sources import open_source
from worldvla.data.sources.source import Names
from worldvla.eval.page import write_page
from worldvla.eval.world import (
    Clip,
    _cut,
    check,
    choose,
    choose_of,
    evaluate_world,
    imagine,
    psnr,
    psnr_changed,
    references,
    score,
    ssim,
)
from worldvla.infer.model import load
from worldvla.infer.world import World
from worldvla.train.build import build


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    write_checkpoint(tiny_config(path), path / "run/ckpt/step_0")
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        episodes = [_episode(rng, i, length) for i, length in enumerate((4, 6))]
        write_episodes(path / f"{name}_demo.hdf5", episodes, {})
    return path


def pictures(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_psnr_is_the_formula() -> None:
    black = torch.zeros((2, 4, 4, 3), dtype=torch.uint8)
    grey = black.clone()
    grey[0] = 51  # a fifth of the range: 20 log10(5)
    assert psnr(grey, black).tolist() == pytest.approx([20 * np.log10(5), 60.0])


def test_psnr_of_what_changed_leaves_the_rest_out() -> None:
    first, real = (torch.zeros((4, 4, 3), dtype=torch.uint8), torch.zeros((2, 4, 4, 3), dtype=torch.uint8))
    real[0, :2] = 100
    guess = real + 51  # wrong everywhere, by a fifth of the range
    guess[:, :1] = real[:, :1]
    half = 20 * np.log10(5) + 10 * np.log10(2)  # of the two rows that changed, one is perfect
    assert psnr_changed(guess, real, first).tolist() == pytest.approx([half, np.nan], nan_ok=True)


def test_scores_are_those_of_earlier_records() -> None:
    """Values of our own PSNR and SSIM in float64, by which the records of before torchmetrics were made."""
    a, noise = pictures(2, (2, 32, 40, 3)), pictures(3, (2, 32, 40, 3))
    b = (a.double() * 0.7 + noise.double() * 0.2).to(torch.uint8)
    assert psnr(a, b).tolist() == pytest.approx([18.666923995, 18.6680975222], abs=1e-4)
    assert ssim(a, b).tolist() == pytest.approx([0.9099761068, 0.9081730652], abs=1e-4)
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert torch.isfinite(ssim(a[:, :4, :4], b[:, :4, :4])).all()


def test_clips_start_at_the_truth_and_end_where_it_does(root: Path) -> None:
    model = load(root / "run")
    clips = choose(sorted(root.glob("*.hdf5")), 3, 4, seed=0, shorter=True)
    frames, _, stats = imagine(model, clips)
    kinds = {"model": frames, **references(model, clips)}
    for i, clip in enumerate(clips):
        assert clip.steps == min(4, len(clip.episode) - 1)
        for view, images in clip.episode.images.items():
            np.testing.assert_array_equal(clip.real[view], images[: clip.steps + 1])
            np.testing.assert_array_equal(kinds["ceiling"][i][view], model.image.reconstruct(clip.real[view]))
            assert (kinds["copy"][i][view] == images[0]).all()
            assert frames[i][view].shape == clip.real[view].shape
            np.testing.assert_array_equal(frames[i][view][0], kinds["ceiling"][i][view][0])
    assert [len(steps) for steps in stats] == [4]
    alone, _, _ = imagine(model, clips, batch_size=1)
    for one, together in zip(alone, frames, strict=True):
        np.testing.assert_array_equal(one["wrist"], together["wrist"])


def test_imagination_takes_the_actions_of_the_clip_or_those_it_is_given(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = load(root / "run"), []
    clips = choose(sorted(root.glob("*.hdf5")), 2, 3, seed=0)
    original = World.step
    monkeypatch.setattr(World, "step", lambda self, a: (taken.append(a), original(self, a))[1])
    imagine(model, clips)
    imagine(model, clips, [0 * clip.actions for clip in clips])
    own, still = np.split(np.stack(taken), 2)
    for i, clip in enumerate(clips):
        np.testing.assert_array_equal(own[:, i], clip.actions)
    assert not still.any()


def test_clips_are_windows_of_the_files_in_turn(root: Path) -> None:
    files = sorted(root.glob("*.hdf5"))
    clips = choose(files, 6, 2, seed=0)
    assert [(len(c.episode), c.start) for c in clips] == [(4, 0), (4, 0), (6, 0), (6, 0), (6, 2), (6, 2)]
    assert all(len(c.real["wrist"]) == 3 == len(c.actions) + 1 for c in clips)
    with pytest.raises(ValueError, match="asked for 7 clips of 2 steps, the 2 files hold 6"):
        choose(files, 7, 2, seed=0)
    with pytest.raises(ValueError, match="at least one of each"):
        choose([], 1, 2, seed=0)


def test_clips_of_another_format_are_spread_over_its_episodes(root: Path, tmp_path: Path) -> None:
    """As own data have it: resized to what the model sees, at their own rate, without a reader."""
    genuine = Path(__file__).parent / "lerobot_v3"
    source = open_source(genuine, Names(sizes=load(root / "run").view_sizes))
    instructions = [e.instruction for e in source.episodes(images=False)]
    for seed in (0, 1):
        chosen = choose_of(source, 2 * len(instructions), 3, seed)
        assert {c.episode.instruction for c in chosen} == set(instructions)
        assert all(len(c.episode) == 4 and c.fps == source.fps for c in chosen)
    (clip,) = choose_of(source, 1, 3, shorter=True)
    whole = [e for e in source.episodes() if np.array_equal(e.actions[:4], clip.episode.actions)]
    assert [np.array_equal(e.images["wrist"][:4], clip.real["wrist"]) for e in whole] == [True]
    with pytest.raises(ValueError, match=r"asked for 99 clips of 3 steps, the \d+ episodes .* hold \d+: ask"):
        choose_of(source, 99, 3)
    episodes = list(source.episodes())
    short = [e if i else _cut(e, 0, 1) for i, e in enumerate(episodes)]
    some = replace(source, attempts=lambda _: ((str(i), e) for i, e in enumerate(short)))
    for seed in range(4):  # another one stands in for the first, which is too short
        assert len(choose_of(some, len(short) - 1, 3, seed)) == len(short) - 1
    record = evaluate_world(root / "run", [genuine], tmp_path / "out", clips=2, horizons=(3,), videos=1)
    (section,) = record["horizons"]
    assert section.keys().isdisjoint({"hand", "said"})
    assert section["views"]["wrist"].keys() == {"model", "copy", "ceiling"}
    with pytest.raises(ValueError, match="--reader is for HDF5 files"):
        evaluate_world(root / "run", [genuine], tmp_path / "out", reader=tmp_path / "reader.safetensors")
    with pytest.raises(ValueError, match="expected at least one horizon, got none"):
        evaluate_world(root / "run", [genuine], tmp_path / "out", horizons=())


def test_means_are_over_the_clips_that_reach_a_step() -> None:
    episode = _episode(np.random.default_rng(0), 0, 4)
    clips, frames = [Clip(episode, 0, 2), Clip(episode, 0, 1)], []
    for clip, level in zip(clips, (51, 255), strict=True):
        clip.episode.images["v"] = np.zeros((4, 4, 4, 3), np.uint8)
        frames.append({"v": clip.real["v"] + np.uint8(level)})
    table = score(clips, {"model": frames, "ceiling": [{"v": c.real["v"]} for c in clips]})
    assert (table["steps"], table["num_clips"]) == ([1, 2], [2, 1])
    rows = table["views"]["v"]
    assert rows["model"]["psnr"] == pytest.approx([10 * np.log10(5), 20 * np.log10(5)], abs=1e-4)
    assert rows["ceiling"]["psnr"] == [60.0, 60.0]


def test_the_record_and_its_page_are_complete(root: Path, tmp_path: Path) -> None:
    files = sorted(root.glob("*.hdf5"))
    record = evaluate_world(root / "run", files, tmp_path, clips=2, horizons=(3, 2))
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert record["checkpoint"]["name"] == "tiny"
    assert {"commit", "versions", "hardware", "seed", "protocol"} <= set(record)
    for section, steps in zip(record["horizons"], (3, 2), strict=True):
        assert set(section["views"]) == {"agentview", "wrist"}
        kinds = section["views"]["wrist"]
        assert set(kinds) == {"model", "copy", "ceiling"}
        assert all(len(kinds[kind][name]) == steps for kind in kinds for name in ("psnr", "ssim"))
        assert section["decoding"]["codes"] == 13
        assert all(
            (tmp_path / clip[what]).stat().st_size for clip in section["clips"] for what in ("video", "strip")
        )
    page = write_page(tmp_path / "index.html", "A", worlds=[tmp_path]).read_text()
    assert all(word in page for word in ("Imagination", "difference", "ceiling", "first frame"))


def test_clips_that_do_not_fit_the_model_are_refused(root: Path, tmp_path: Path) -> None:
    model = load(root / "run")
    clips = choose(sorted(root.glob("*.hdf5")), 1, 2, seed=0)
    images = clips[0].episode.images
    small = {view: frames[:, :4, :4] for view, frames in images.items()}
    with pytest.raises(ValueError, match=r"\w+ is \(4, 4\), the model sees \(\d+, \d+\): collect it so"):
        check(model, [Clip(replace(clips[0].episode, images=small), 0, 2)])
    with pytest.raises(ValueError, match="view wrist is missing"):
        check(model, [Clip(replace(clips[0].episode, images={"agentview": images["agentview"]}), 0, 2)])
    fast = Clip(replace(clips[0].episode, suite="tabletop_goal"), 0, 2)
    with pytest.raises(ValueError, match="evaluate each simulator apart"):
        check(model, [*clips, fast])
    with pytest.raises(ValueError, match="asked for 6 clips of 3 steps"):
        evaluate_world(root / "run", sorted(root.glob("*.hdf5")), tmp_path / "out", clips=6, horizons=(2, 3))
    assert not (tmp_path / "out").exists()


def test_the_table_of_guesses_is_of_exact_rollouts(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parents[1] / "paper/drafts.py"
    count = runpy.run_path(str(path))["count"]
    guess, frame = np.array([1, 2, 3, 4, 5]), np.array([1, 0, 3, 4, 0])
    assert [count(guess, frame, width) for width in (1, 2, 9)] == [5, 3, 2]
    monkeypatch.setattr("sys.argv", [str(path), str(root / "run"), str(root), "--steps", "2"])
    runpy.run_path(str(path), run_name="__main__")
    table = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in table[:-1]] == [6, 6, 6, 6, 0]
    assert table[-2].endswith("; the same codes as one a pass")
    told = json.loads(table[-1])
    plain, guessed = told["drafts"]["one code a pass"], told["drafts"]["by drafts"]
    assert plain["passes"] == 13 >= guessed["passes"] >= 1
    assert told["drafts"]["faster"] == pytest.approx(plain["ms_frame"] / guessed["ms_frame"], abs=0.1)


def test_the_probe_reads_motion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(motion, "STEPS", 60)
    rng = np.random.default_rng(0)
    episode = _episode(rng, 0, 200)
    light = rng.integers(0, 200, (200, 1, 1, 1)).astype(np.uint8)
    for view in episode.images:
        episode.images[view][:] = light
    episode.actions[:-1, :3] = np.diff(light[:, 0, 0].astype(np.float32), axis=0) / 255
    net = motion.train_inverse([episode], ["wrist"])
    truth = episode.actions[:-1, :3]
    error = np.abs(motion.read_motion(net, episode.images) - truth).mean()
    assert error < 0.5 * np.abs(truth).mean()


def test_models_are_compared_with_other_actions_none_and_the_probe(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(motion, "STEPS", 2)
    files = sorted(root.glob("*.hdf5"))
    write_episodes(tmp_path / "other.hdf5", [_episode(np.random.default_rng(5), 5, 80)], {})
    probe = [tmp_path / "other.hdf5"]
    record = evaluate([root / "run"], files, tmp_path, probe, clips=2, horizon=2)
    section = record["horizons"][0]
    kinds = {"imagined", "ceiling", "floor", "swapped", "still"}
    assert all(of["tiny"].keys() == kinds for of in section["views"].values())
    assert section["probe"]["tiny"].keys() == kinds - {"floor"} | {"real"}
    with pytest.raises(ValueError, match="holds clips: train the probe on other"):
        evaluate([root / "run"], files, tmp_path, files[:1], clips=2, horizon=2)
    clips = choose(files, 3, 1, seed=0)
    others = [clips[i] for i in other_episodes(clips)]
    assert all(other.episode is not clip.episode for other, clip in zip(others, clips, strict=True))
    with pytest.raises(ValueError, match="all clips are of one episode"):
        other_episodes([clips[0], clips[0]])


def test_errors_of_a_chunk_are_those_of_its_own_tokens(root: Path) -> None:
    found = chunk_error(root / "run", batches=1)
    assert all(len(found[kind]) == 3 for kind in ("forced", "free", "still"))
    model = load(root / "run")
    pieces = build(tiny_config(root))
    truth, forced, free = chunk_codes(model, pieces.loader.val_batch(0, "policy"))
    # The first dim of every action follows the prompt alone, so there forcing changes nothing.
    np.testing.assert_array_equal(forced[:, :, 0], free[:, :, 0])
    assert truth.shape == forced.shape == free.shape == (4, 3, 7)
