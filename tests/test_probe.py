"""The probe: it reads positions off frames that hold them, and fails codes that do not.

Run: pytest tests/test_probe.py
"""

import numpy as np
import pytest
import torch

from paper import probe
from worldvla.config import ImageTokenizerConfig
from worldvla.tokenizers.image import ImageTokenizer

CONFIG = ImageTokenizerConfig(
    channels=8, channel_mult=(1, 1), patch=4, num_res_blocks=1, z_channels=16, embed_dim=4, num_codes=4096,
    quantizer="fsq", fsq_levels=(8, 8, 8, 8),
)  # fmt: skip


@pytest.fixture
def data() -> probe.ProbeData:
    """Squares in a 32-pixel picture, 1 cm a pixel; their places are the truth: red gripper, blue target."""
    rng = np.random.default_rng(0)
    count, side = 800, 32
    places = rng.uniform(4, 28, (count, 2, 2))
    images = np.full((count, side, side, 3), 120, np.uint8)
    y, x = np.mgrid[:side, :side][:, None]
    for thing, colour in enumerate(((220, 20, 20), (20, 20, 220))):
        near = (
            np.maximum(abs(x - places[:, thing, 0, None, None]), abs(y - places[:, thing, 1, None, None]))
            < 3.5
        )
        images[near] = colour
    truth = np.concatenate([places, np.zeros((count, 2, 1))], axis=2) / 100
    places = {"gripper": truth[:, 0], "target": truth[:, 1]}
    return probe.ProbeData({"agentview": images}, rng.integers(0, 3, count), np.arange(count) // 4, places)


def test_pixels_tell_positions_and_blind_codes_do_not(data):
    blind = ImageTokenizer(CONFIG).eval()
    with torch.no_grad():
        blind.quant_conv.weight.zero_()
    record = probe.probe(data, blind, steps=180, batch_size=64)
    assert record["task median"]["target"]["x"] > 4
    assert record["pixels"]["target"]["x"] < 0.4 * record["task median"]["target"]["x"]
    assert record["codes"]["target"]["x"] > 0.8 * record["task median"]["target"]["x"]
    assert not record["gate"]["passed"]
    assert record["gate"]["ratio"] > probe.GATE_RATIO
    assert "FAILED" in str(probe.table(record).title)


def test_whole_episodes_are_held_out(data):
    mask = probe.held_out(data.episodes)
    assert 0.1 < mask.mean() < 0.2
    assert not set(data.episodes[mask]) & set(data.episodes[~mask])


def test_errors_are_medians_in_centimetres():
    truth = np.zeros((5, 3))
    guess = np.zeros((5, 6)) + np.array([0.01, 0.02, 0.0, 0.03, 0.04, 0.0])
    errors = probe._errors(guess, {"gripper": truth, "target": truth})
    assert errors["gripper"]["y"] == pytest.approx(2.0)
    assert errors["target"]["distance"] == pytest.approx(5.0)


def test_unknown_view_is_named(data):
    with pytest.raises(ValueError, match="wrist"):
        probe.probe(data, ImageTokenizer(CONFIG), ["wrist"])
