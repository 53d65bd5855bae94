"""Distances between sets of clips: closed forms, scipy's matrix square root, plain loops; networks by path.

Run: pytest tests/test_distance.py
"""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from worldvla.eval import distance, features


def draw(num: int = 40, dims: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, dims)), rng.normal(size=(num, dims)) @ rng.normal(size=(dims, dims)) + 1


def test_frechet_is_scipys() -> None:
    a, b = draw()
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert distance.frechet(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_has_its_closed_forms() -> None:
    a, _ = draw()
    shift = np.arange(5.0)
    assert distance.frechet(a, a + shift) == pytest.approx((shift**2).sum())  # same covariance
    assert distance.frechet(a, 3 * a) == pytest.approx(4 * ((a.mean(0) ** 2).sum() + np.trace(np.cov(a.T))))
    few = a[:3]  # fewer clips than dims: singular covariances
    assert distance.frechet(few, few) == pytest.approx(0, abs=1e-9)


def test_kernel_is_the_slow_loop() -> None:
    a, b = draw(9)
    scale = np.sqrt(((a - a.mean(0)) ** 2).mean())

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / scale**2 / len(x) + 1) ** 3)

    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    expected = np.mean([k(a[i], a[j]) + k(b[i], b[j]) - 2 * k(a[i], b[j]) for i, j in pairs])
    assert distance.kernel(a, b) == pytest.approx(expected)


def test_weights_count_as_repeats() -> None:
    a, b = draw(12)
    weight = np.array([2.0] * 3 + [0.0] * 3 + [1.0] * 6)
    rows = np.repeat(np.arange(12), weight.astype(int))
    assert distance.frechet(a, b, weight) == pytest.approx(distance.frechet(a[rows], b[rows]))


@pytest.mark.parametrize("between", [distance.frechet, distance.kernel])
def test_a_report_has_an_interval_and_shows_fewer_clips(between: distance.Distance) -> None:
    a, b = draw(12)
    row = distance.report(between, a, b)
    assert row["interval_95"][0] < row["interval_95"][1]
    assert list(row["at_clips"]) == ["3", "6", "12"]
    assert row["at_clips"]["12"] == row["value"]


def test_clip_features_tell_motion_from_its_reverse() -> None:
    ramp = np.arange(6.0)[None, :, None] * np.ones((1, 6, 2))
    forward, backward = (distance.clip_features(x)[0] for x in (ramp, ramp[:, ::-1]))
    np.testing.assert_allclose(forward, [2.5, 2.5, 1, 1, 3, 3])
    np.testing.assert_allclose(backward, [2.5, 2.5, 1, 1, -3, -3])


def write_alexnet(root: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    shapes[10] = (256, 256, 3, 3)
    weights = {f"features.{i}.weight": torch.randn(s, generator=generator) / 30 for i, s in shapes.items()}
    weights |= {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
    heads = {f"lin{k}.model.1.weight": torch.rand(1, s[0], 1, 1) for k, s in enumerate(shapes.values())}
    paths = root / "alexnet.pth", root / "alex.pth"
    torch.save(weights, paths[0])
    torch.save(heads, paths[1])
    return paths


def test_lpips_reads_its_files_and_is_zero_for_equal_frames(tmp_path: Path) -> None:
    name, metric = features.lpips(*write_alexnet(tmp_path))
    a = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    near, far = (a.int() + 2).clamp(max=255).to(torch.uint8), a.flip(1)
    assert name == "lpips_alex"
    assert metric(a, a).tolist() == [0, 0]
    assert (metric(a, near) < metric(a, far)).all()
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"lacks features\.0\.weight"):
        features.lpips(tmp_path / "empty.pth", tmp_path / "alex.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded here; it is alexnet"):
        features.lpips(tmp_path / "none.pth", tmp_path / "alex.pth")


class Stub(torch.nn.Module):
    """Called as I3D is; its features are the means of the channels."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert rescale
        assert resize
        assert return_features
        return x.mean(dim=(2, 3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fvd_reads_its_file_by_path(tmp_path: Path) -> None:
    torch.jit.script(Stub()).save(str(tmp_path / "i3d.pt"))
    network = features.i3d(tmp_path / "i3d.pt")
    clips = np.random.default_rng(0).integers(0, 256, (3, 10, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(network(clips), clips.mean((1, 2, 3)), rtol=1e-5)
    with pytest.raises(ValueError, match="at least 10 frames, got 9"):
        network(clips[:, :9])
    with pytest.raises(FileNotFoundError, match="i3d_torchscript"):
        features.i3d(tmp_path / "none.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["random", "empty", "cut", "list"])
def test_a_weight_file_that_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    path = write_alexnet(tmp_path)[0]
    content = {"random": bytes(range(256)) * 9, "empty": b"", "cut": path.read_bytes()[:5000]}
    if kind == "list":
        torch.save([1], path)
    else:
        path.write_bytes(content[kind])
    with pytest.raises(
        ValueError, match=r"alexnet\.pth (cannot be read|holds no table).*must be alexnet"
    ) as lpips:
        features.lpips(path, tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=r"alexnet\.pth cannot be read .*must be i3d_torchscript") as i3d:
        features.i3d(path)
    assert "\n" not in str(lpips.value) + str(i3d.value)
