"""Demonstrations as another camera would see them: a policy that learns from them beside the originals minds
shifts, colours and noise less.

    augmented(episode, np.random.default_rng(1))
"""

from dataclasses import replace

import numpy as np

from worldvla.data.episode import Episode

SHIFT = 1 / 32
"""Of a side, at most: 4 of 128 pixels. The same over an episode, as of a camera that was moved."""
GAIN, LIGHT = (0.75, 1.25), (-25.0, 25.0)
"""Contrast, of all channels and a third as far of each, and brightness in grey levels; over an episode."""
NOISY, NOISE = 0.5, (0.0, 25.0)
"""Share of the episodes with noise in every pixel, and its spread in grey levels."""


def augmented(episode: Episode, rng: np.random.Generator) -> Episode:
    """Return the episode with other pictures: shifted, lit and coloured otherwise, every view for itself."""
    return replace(episode, images={view: _changed(frames, rng) for view, frames in episode.images.items()})


def _changed(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return frames (T, Y, X, 3) uint8 that are changed, all in the same way but for noise."""
    rows, cols = (round(SHIFT * side) for side in frames.shape[1:3])
    y, x = rng.integers(2 * rows + 1), rng.integers(2 * cols + 1)
    wide = np.pad(frames, ((0, 0), (rows, rows), (cols, cols), (0, 0)), mode="edge")
    shifted = wide[:, y : y + frames.shape[1], x : x + frames.shape[2]].astype(np.float32)
    gain = rng.uniform(*GAIN) + (rng.uniform(*GAIN, 3) - 1) / 3
    values = (shifted - 128) * gain.astype(np.float32) + np.float32(128 + rng.uniform(*LIGHT))
    if rng.random() < NOISY:
        values += rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(*NOISE))
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
