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
from tiny_run import _episode, tiny_config, write_tiny

from paper.chunk_error import chunk_codes, chunk_error
from worldvla.data.episode import write_episodes
from worldvla.eval import distance, inverse
from worldvla.eval.world import (
    Clip,
    Extras,
    Measure,
    check,
    choose,
    evaluate_world,
    imagine,
    label,
    other_episodes,
    psnr,
    reconstruct,
    score,
    ssim,
)
from worldvla.infer.model import load
from worldvla.infer.world import World
from worldvla.train.build import build, build_model
from worldvla.train.checkpoint import save
from worldvla.train.optim import build_optimizers


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path)
    pieces = build(tiny_config(path))
    model = build_model(pieces)
    save(
        path / "run" / "ckpt" / "step_0",
        pieces,
        model,
        build_optimizers(model, pieces.config.optim),
        {"step": 0},
    )
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


def test_ssim_is_one_for_equal_frames_and_follows_a_slow_loop() -> None:
    a, b = pictures(0, (2, 14, 13, 3)), pictures(1, (2, 14, 13, 3))
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    offsets = np.arange(11) - 5
    weight = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    wide = [np.pad(z[0].numpy().astype(float), ((5, 5), (5, 5), (0, 0)), "reflect") for z in (a, b)]
    for y in range(14):
        for x in range(13):
            for c in range(3):
                p, q = (z[y : y + 11, x : x + 11, c] for z in wide)
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq, cov = (
                    (weight * r).sum() for r in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq))
                )
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert float(ssim(a, b)[0]) == pytest.approx(np.mean(values), abs=1e-10)


def test_psnr_and_ssim_are_torchmetrics() -> None:
    """Numbers of torchmetrics 1.9.0 on these frames: peak_signal_noise_ratio(dim=(1, 2, 3), reduction="none")
    and structural_similarity_index_measure(reduction="none"), data_range=255.0; its logarithm is of float32.
    """
    a, noise = pictures(2, (2, 32, 40, 3)), pictures(3, (2, 32, 40, 3))
    b = (a.double() * 0.7 + noise.double() * 0.2).to(torch.uint8)
    assert psnr(a, b).tolist() == pytest.approx([18.666923995, 18.6680975222], abs=1e-6)
    assert ssim(a, b).tolist() == pytest.approx([0.9099761068, 0.9081730652], abs=1e-9)


def test_clips_start_at_the_truth_and_end_where_it_does(root: Path) -> None:
    model = load(root / "run")
    clips = choose(sorted(root.glob("*.hdf5")), 3, 4, seed=0, shorter=True)
    kinds, _ = imagine(model, clips)
    for i, clip in enumerate(clips):
        assert clip.steps == min(4, len(clip.episode) - 1)
        for view, images in clip.episode.images.items():
            np.testing.assert_array_equal(clip.real[view], images[: clip.steps + 1])
            np.testing.assert_array_equal(kinds["ceiling"][i][view], reconstruct(model, clip.real[view]))
            assert (kinds["floor"][i][view] == images[0]).all()
            for kind in ("imagined", "swapped", "still"):
                assert kinds[kind][i][view].shape == clip.real[view].shape
                np.testing.assert_array_equal(kinds[kind][i][view][0], kinds["ceiling"][i][view][0])
    alone, _ = imagine(model, clips[:1], batch_size=1)
    np.testing.assert_array_equal(alone["imagined"][0]["wrist"], kinds["imagined"][0]["wrist"])


def test_each_kind_takes_its_own_actions(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = load(root / "run"), []
    clips = choose(sorted(root.glob("*.hdf5")), 2, 3, seed=0)
    original = World.step
    monkeypatch.setattr(World, "step", lambda self, a: (seen.append(a), original(self, a))[1])
    imagine(model, clips)
    imagined, swapped, still = np.split(np.stack(seen), 3)
    for i, clip in enumerate(clips):
        np.testing.assert_array_equal(imagined[:, i], clip.actions)
        np.testing.assert_array_equal(swapped[:, i], clips[1 - i].actions)
        assert not still[:, i, :6].any()
        np.testing.assert_array_equal(still[:, i, 6], clip.actions[:, 6])


def test_actions_are_swapped_between_episodes_alone(root: Path, tmp_path: Path) -> None:
    one, two = (_episode(np.random.default_rng(0), i, 9) for i in range(2))
    clips = [Clip(one, 0, 2), Clip(one, 2, 2), Clip(two, 0, 2), Clip(two, 2, 2)]
    assert other_episodes(clips) == [2, 2, 0, 0]
    assert other_episodes(clips[:2]) == []
    record = evaluate_world(
        [root / "run"], [root / "a_demo.hdf5"], tmp_path, clips=1, page=False, horizons=(2,)
    )
    kinds = record["horizons"][0]["views"]["wrist"]["tiny"]
    assert list(kinds) == ["ceiling", "floor", "imagined", "still"]
    assert record["remarks"] == ["all clips are of one episode: no other one's actions to swap in"]


def test_clips_are_windows_of_the_files_in_turn(root: Path) -> None:
    files = sorted(root.glob("*.hdf5"))
    clips = choose(files, 6, 2, seed=0)
    assert [(len(c.episode), c.start) for c in clips] == [(4, 0), (4, 0), (6, 0), (6, 0), (6, 2), (6, 2)]
    assert all(len(c.real["wrist"]) == 3 == len(c.actions) + 1 for c in clips)
    with pytest.raises(ValueError, match="asked for 7 clips of 2 steps, the 2 files hold 6"):
        choose(files, 7, 2, seed=0)
    with pytest.raises(ValueError, match="at least one of each"):
        choose([], 1, 2, seed=0)


def test_means_are_over_the_clips_that_reach_a_step() -> None:
    episode = _episode(np.random.default_rng(0), 0, 4)
    clips, frames = [Clip(episode, 0, 2), Clip(episode, 0, 1)], []
    for clip, level in zip(clips, (51, 255), strict=True):
        clip.episode.images["v"] = np.zeros((4, 4, 4, 3), np.uint8)
        frames.append({"v": clip.real["v"] + np.uint8(level)})
    table = score(clips, {"m": {"imagined": frames, "ceiling": [{"v": c.real["v"]} for c in clips]}})
    assert (table["steps"], table["num_clips"]) == ([1, 2], [2, 1])
    rows = table["views"]["v"]["m"]
    assert rows["imagined"]["psnr"] == pytest.approx([10 * np.log10(5), 20 * np.log10(5)], abs=1e-4)
    assert rows["ceiling"]["psnr"] == [60.0, 60.0]


def test_the_record_and_its_page_are_complete(root: Path, tmp_path: Path) -> None:
    files, path = sorted(root.glob("*.hdf5")), root / "run"
    record = evaluate_world([path], files, tmp_path, clips=2, horizons=(3, 2))
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert list(record["models"]) == ["tiny"]
    for section, steps in zip(record["horizons"], (3, 2), strict=True):
        assert set(section["views"]) == {"agentview", "wrist"}
        scores = section["views"]["wrist"]["tiny"]
        assert set(scores) == {"imagined", "swapped", "still", "ceiling", "floor"}
        assert all(len(values) == steps for kind in scores.values() for values in kind.values())
        decoding = section["decoding"]["tiny"]
        assert (decoding["codes"], decoding["close"]) == (13, 0)
        assert all(1 <= n <= 13 for n in decoding["passes"])
        assert all((tmp_path / clip["video"]).stat().st_size for clip in section["clips"])
    page = (tmp_path / "index.html").read_text()
    words = "tiny, passes a frame of 13 codes, by step: ", "; guesses right, %: "
    assert all(word in page for word in ("Imagination", "difference", "actions of another clip", *words))


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


def test_the_probe_reads_motion_and_is_not_trained_on_the_clips(root: Path, monkeypatch) -> None:
    monkeypatch.setattr(inverse, "STEPS", 60)
    rng = np.random.default_rng(0)
    episode = _episode(rng, 0, 200)
    light = rng.integers(0, 200, (200, 1, 1, 1)).astype(np.uint8)
    for view in episode.images:
        episode.images[view][:] = light
    episode.actions[:-1, :3] = np.diff(light[:, 0, 0].astype(np.float32), axis=0) / 255
    net = inverse.train_inverse([episode], ["wrist"])
    truth = episode.actions[:-1, :3]
    error = np.abs(inverse.read_motion(net, episode.images) - truth).mean()
    assert error < 0.5 * np.abs(truth).mean()
    files = sorted(root.glob("*.hdf5"))
    with pytest.raises(ValueError, match="holds clips: train the probe on other"):
        Measure(Extras(probe=files[:1]), files, [["wrist"]])


def test_too_few_clips_for_a_distance_are_said() -> None:
    measure = Measure(Extras(), [], [["v"]])
    measure.clip_networks["fvd"] = (lambda clips: clips.mean((1, 2, 3)), distance.frechet)
    episode = _episode(np.random.default_rng(0), 0, 9)
    clips = [Clip(episode, t, 2) for t in range(4)]
    frames = [{"wrist": clip.real["wrist"]} for clip in clips]
    found = measure.distances(clips, {"m": {"imagined": frames}})
    assert found["distances"]["wrist"]["m"]["imagined"]["fvd"]["value"] == pytest.approx(0, abs=1e-6)
    assert measure.remarks == ["4 clips are too few for a stable fvd: it needs 401"]


def test_models_that_do_not_compare_are_refused(root: Path) -> None:
    model = load(root / "run")
    with pytest.raises(ValueError, match="was given twice"):
        label([model, model, model, model])
    clips = choose(sorted(root.glob("*.hdf5")), 1, 2, seed=0)
    wide = replace(model.config.layout, grids=((6, 6), (2, 2)))
    other = replace(model, config=replace(model.config, layout=wide))
    with pytest.raises(ValueError, match="agentview has other sizes in other models"):
        check({"a": model, "b": other}, clips)
    small = {view: frames[:, :4, :4] for view, frames in clips[0].episode.images.items()}
    with pytest.raises(
        ValueError, match=r"of the clips is \(4, 4\), the models see \(\d+, \d+\): collect it so"
    ):
        check({"a": model}, [Clip(replace(clips[0].episode, images=small), 0, 2)])
    lengths = [*clips, replace(clips[0], steps=1)]
    check({"a": model}, lengths)
    with pytest.raises(ValueError, match="need clips of one length: leave out --shorter"):
        check({"a": model}, lengths, as_sets=True)
    with pytest.raises(ValueError, match=r"need 2 clips \(50 for a stable kvd_.*\), got 1: raise"):
        check({"a": model}, clips, as_sets=True)
    with pytest.raises(ValueError, match=r"FVD needs clips of at least 10 frames, got 3: raise --horizons"):
        check({"a": model}, clips * 2, as_sets=True, least=10)
    fast = Clip(replace(clips[0].episode, suite="tabletop_goal"), 0, 2)
    with pytest.raises(ValueError, match="evaluate each simulator apart"):
        check({"a": model}, [*clips, fast])


def test_clips_are_checked_before_anything_is_trained(root: Path, tmp_path: Path) -> None:
    missing = Extras(i3d=tmp_path / "no.pt", probe=[tmp_path / "none.hdf5"])
    files = sorted(root.glob("*.hdf5"))
    with pytest.raises(ValueError, match="asked for 6 clips of 3 steps"):
        evaluate_world([root / "run"], files, tmp_path, clips=6, horizons=(2, 3), extras=missing)


def test_errors_of_a_chunk_are_those_of_its_own_tokens(root: Path) -> None:
    found = chunk_error(root / "run", batches=1)
    assert all(len(found[kind]) == 3 for kind in ("forced", "free", "still"))
    model = load(root / "run")
    pieces = build(tiny_config(root))
    truth, forced, free = chunk_codes(model, pieces.loader.val_batch(0, "policy"))
    # The first dim of every action follows the prompt alone, so there forcing changes nothing.
    np.testing.assert_array_equal(forced[:, :, 0], free[:, :, 0])
    assert truth.shape == forced.shape == free.shape == (4, 3, 7)
