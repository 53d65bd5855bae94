"""How many codes of a guessed frame one pass checks, and what guessing has brought."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

CHEAP, CHEAP_EACH = 24, 8
"""Codes that one pass on a CPU checks at least: of one row, where a pass costs hardly more than its overhead,
and of each of many, where it costs what its codes cost. Between them falls the fourth root of the rows."""
WIDE = 512
"""Codes at most on an accelerator: what bounds there is the memory of their scores."""
MEMORY = 0.5
"""Weight of the last pass in the running mean of codes a pass gives."""


@dataclass
class FrameStats:
    """What the next frame of a batch of rows took."""

    codes: int = 0
    """Codes decoded, over all rows: with one code a pass, `codes` / rows passes."""
    passes: int = 0
    """Model passes, the prompt's included. Rows share them: the slowest row decides."""
    judged: int = 0
    """Guesses that were checked up to the first wrong one of each pass, that one included."""
    accepted: int = 0
    """Of these, the right ones."""
    close: int = 0
    """Codes whose two best scores lie so near that rounding may have decided (decode.CLOSE)."""


class Window:
    """Codes that the next pass checks: on a CPU a few, or twice what the last passes gave, where that is
    more; of many rows, whose wrong guesses cost more, down to once. On an accelerator, where a pass over a
    frame takes hardly longer than one over a code, the frame.

    Widths follow from the codes, never from a clock: the same call takes the same passes.
    """

    def __init__(self, device: torch.device | str = "cpu", fixed: int | None = None) -> None:
        if fixed is not None and fixed < 1:
            raise ValueError(f"a window checks at least one code, got {fixed}")
        self.fixed = fixed
        self.is_wide = torch.device(device).type != "cpu"
        self.gain = 0.0

    def width(self, num_codes: int, rows: int = 1) -> int:
        """Return the codes of each of `rows` frames to check next, 1..num_codes."""
        wanted = max(CHEAP_EACH, round(CHEAP / rows**0.25), round((1 + rows**-0.5) * self.gain))
        return min(num_codes, self.fixed or (WIDE if self.is_wide else wanted))

    def update(self, gain: float) -> None:
        """Learn that the last pass gave `gain` codes, the mean of the rows."""
        self.gain += MEMORY * (gain - self.gain)


def summary(rollouts: Sequence[Sequence[FrameStats]], codes: int) -> dict[str, Any]:
    """Return what a record says of rollouts that each hold the stats of steps 1..T; `codes` a frame."""
    steps = []
    for t in range(max(map(len, rollouts))):
        steps.append([stats[t] for stats in rollouts if t < len(stats)])
    judged = [sum(s.judged for s in step) for step in steps]
    accepted = [sum(s.accepted for s in step) for step in steps]
    return {
        "codes": codes,
        "passes": [round(sum(s.passes for s in step) / len(step), 2) for step in steps],
        "acceptance": [round(a / j, 4) if j else None for a, j in zip(accepted, judged, strict=True)],
        "close": sum(s.close for step in steps for s in step),
    }
