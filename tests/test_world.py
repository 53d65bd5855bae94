"""Imagined clips are scored against the truth with metrics that agree with independent ones; ceiling and
floor are what they say.

Run: pytest tests/test_world.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import _episode, tiny_config, write_tiny

from worldvla.data.episode import write_episodes
from worldvla.eval.world import Clip, choose, evaluate_world, imagine, psnr, reconstruct, score, ssim
from worldvla.infer.load import load
from worldvla.train.build import build, build_model
from worldvla.train.checkpoint import save
from worldvla.train.optim import build_optimizer


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
        build_optimizer(model, pieces.config.optim),
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


def test_clips_start_at_the_truth_and_end_where_it_does(root: Path) -> None:
    model = load(root / "run")
    episodes = choose(sorted(root.glob("*.hdf5")), 3, seed=0)
    clips = imagine(model, episodes, horizon=4)
    for episode, clip in zip(episodes, clips, strict=True):
        steps = min(4, len(episode) - 1)
        for view, images in episode.images.items():
            np.testing.assert_array_equal(clip.real[view], images[: steps + 1])
            assert clip.imagined[view].shape == clip.real[view].shape
            np.testing.assert_array_equal(clip.ceiling[view], reconstruct(model, clip.real[view]))
            np.testing.assert_array_equal(clip.imagined[view][0], clip.ceiling[view][0])
            assert (clip.floor[view] == images[0]).all()
    alone = imagine(model, episodes[:1], horizon=2)[0]
    np.testing.assert_array_equal(alone.imagined["wrist"], clips[0].imagined["wrist"][:3])


def test_means_are_over_the_clips_that_reach_a_step() -> None:
    def clip(level: int, length: int) -> Clip:
        real = np.zeros((length, 4, 4, 3), np.uint8)
        return Clip(
            _episode(np.random.default_rng(0), 0, length),
            {"v": real},
            {"v": real + np.uint8(level)},
            {"v": real},
        )

    table = score([clip(51, 3), clip(255, 2)])
    assert (table["steps"], table["num_clips"]) == ([1, 2], [2, 1])
    assert table["views"]["v"]["imagined"]["psnr"] == pytest.approx(
        [10 * np.log10(5), 20 * np.log10(5)], abs=1e-4
    )
    assert table["views"]["v"]["ceiling"]["psnr"] == [60.0, 60.0]


def test_the_record_and_its_page_are_complete(root: Path, tmp_path: Path) -> None:
    record = evaluate_world(root / "run", sorted(root.glob("*.hdf5")), tmp_path, episodes=2, horizon=3)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert set(record["views"]) == {"agentview", "wrist"}
    decoding = record["decoding"]
    assert (decoding["drafts"], decoding["codes"], decoding["close"]) == (True, 13, 0)
    assert len(decoding["passes"]) == len(decoding["acceptance"]) == 3
    assert all(1 <= n <= 13 for n in decoding["passes"])
    assert all(len(v) == 3 for v in record["views"]["wrist"]["imagined"].values())
    assert all((tmp_path / clip["video"]).stat().st_size for clip in record["clips"])
    assert "Imagination" in (tmp_path / "index.html").read_text()


def test_bad_requests_are_one_line(root: Path, tmp_path: Path) -> None:
    files = sorted(root.glob("*.hdf5"))
    with pytest.raises(ValueError, match="asked for 9 episodes, the 2 files gave 4"):
        choose(files, 9, 0)
    with pytest.raises(ValueError, match="at least one"):
        evaluate_world(root / "run", [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
