"""Draw the axes of robustness: one sheet, a row for each axis, a column for each initial state.

Run: python -m paper.axes --suite libero_goal --task 0 --out out/axes.png
"""

from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw

from worldvla.sim import suites as sim
from worldvla.sim.protocol import AXES

SIDE = 128
"""Of a picture, pixels."""


def sheet(suite: str, task: int, states: int) -> Image.Image:
    """Return the first frames of `states` initial states: unperturbed, then along each axis."""
    env: Any = sim.make(sim.tasks(suite)[task], {"agentview": (SIDE, SIDE)})
    rows = ["", *(axis for axis in AXES if axis != "language")]
    page = Image.new("RGB", (states * SIDE, len(rows) * SIDE))
    pen = ImageDraw.Draw(page)
    try:
        for row, axis in enumerate(rows):
            env.axis = axis
            for init in range(states):
                picture: np.ndarray = env.reset(options={"init": init})[0]["agentview"]
                page.paste(Image.fromarray(picture), (init * SIDE, row * SIDE))
            pen.rectangle((0, row * SIDE, 64, row * SIDE + 11), fill="white")
            pen.text((2, row * SIDE), axis or "unchanged", fill="black")
    finally:
        env.close()
    return page


def main(
    suite: str = "libero_goal", task: int = 0, states: int = 6, out: Path = Path("out/axes.png")
) -> None:
    """Draw the axes of robustness of a task, from so many initial states."""
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(suite, task, states).save(out)
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
