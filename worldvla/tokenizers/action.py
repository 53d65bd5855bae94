"""Physical actions and states <-> [-1, 1] <-> codes: normalisation statistics and 256 uniform bins.

OpenVLA's scheme as WorldVLA uses it (data/item_processor.py:246-250, 303-334): 256 edges from -1 to 1, 255
centres; code = np.digitize - 1, in 0..255; code 255 appears only at exactly 1 and decodes like 254. A gripper
at +-1 therefore decodes to +-0.996. In a range symmetric about zero, 0 has code 127, which decodes to 0.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int

from worldvla.files import read_json, reading
from worldvla.vocab import NUM_BIN_CODES

EDGES = np.linspace(-1.0, 1.0, NUM_BIN_CODES)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
EPSILON = 1e-8
"""Added to every range (WorldVLA item_processor.py:326-334)."""
MIN_HALF_RANGE = 1e-3
"""No range is narrower than twice this: a dimension that never moves must not amplify rounding noise."""


@dataclass(frozen=True)
class Statistics:
    """Ranges of every action and state dimension in physical units; they travel with the checkpoint."""

    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    state_low: tuple[float, ...]
    state_high: tuple[float, ...]
    kind: Literal["minmax", "quantile", "published"]
    world_low: tuple[float, ...] = ()
    """Range of the actions that the world model reads, where it is another (RynnVLA-002); empty: the same."""
    world_high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("action", "state", "world"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if len(low) != len(high):
                raise ValueError(
                    f"statistics have {len(low)} {name}_low, {len(high)} {name}_high values: make them agree"
                )
            for dim, (a, b) in enumerate(zip(low, high, strict=True)):
                if not (np.isfinite(a) and np.isfinite(b) and a < b):
                    raise ValueError(
                        f"statistics of {name} dim {dim} must be finite with low < high, got {a} and {b}"
                    )

    def normalize_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return physical actions (..., A) in [-1, 1], float64."""
        return normalize(self._as_recorded(actions), self.action_low, self.action_high)

    def encode_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return the codes of physical actions (..., A), int64 in 0..255."""
        return quantize(self.normalize_actions(actions))

    def encode_world_actions(self, actions: np.ndarray) -> np.ndarray:
        """Return the codes (..., A) of physical actions as the world model reads them, int64 in 0..255."""
        low, high = self.world_low or self.action_low, self.world_high or self.action_high
        return quantize(normalize(self._as_recorded(actions), low, high))

    def decode_actions(self, codes: np.ndarray) -> np.ndarray:
        """Return physical actions (..., A) float32, the centres of the bins of `codes`."""
        return denormalize(dequantize(codes), self.action_low, self.action_high).astype(np.float32)

    def encode_states(self, states: np.ndarray) -> np.ndarray:
        """Return the codes of physical states (..., S), int64 in 0..255."""
        return quantize(normalize(self._as_recorded(states), self.state_low, self.state_high))

    def decode_states(self, codes: np.ndarray) -> np.ndarray:
        """Return physical states (..., S) float32."""
        return denormalize(dequantize(codes), self.state_low, self.state_high).astype(np.float32)

    def _as_recorded(self, values: np.ndarray) -> np.ndarray:
        """Return float64. Under published ranges float32 becomes the decimal number that it stands for.

        The published code bins the float64 numbers of LIBERO's files, and some lie on the edge of a bin but
        for the last bits: -0.225 has code 50, the nearest float32, read as float64, 51. Our own ranges are
        those of float32 data, which must not leave them.
        """
        values = np.asarray(values)
        if self.kind != "published" or values.dtype != np.float32:
            return values.astype(np.float64)
        distinct, inverse = np.unique(values, return_inverse=True)  # demonstrations repeat a few values
        return distinct.astype(str).astype(np.float64)[inverse].reshape(values.shape)

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values; without a range of the world's own, where it has none."""
        return {k: v for k, v in asdict(self).items() if v or not k.startswith("world_")}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Build from `to_json`'s dict; missing or unknown keys raise ValueError."""
        own = {"world_low", "world_high"}
        names = set(cls.__dataclass_fields__) - (own - set(data))
        if set(data) != names:
            raise ValueError(f"statistics need exactly the keys {sorted(names)}, got {sorted(data)}")
        ranges = {key: tuple(float(v) for v in value) for key, value in data.items() if key != "kind"}
        return cls(**ranges, kind=data["kind"])

    def digest(self) -> str:
        """Sixteen hex digits that change whenever a number does."""
        return _digest(self.to_json())


@dataclass(frozen=True)
class DatasetStatistics:
    """The statistics of each dataset of a mixture. Its name is what OpenVLA calls `unnorm_key`."""

    sets: dict[str, Statistics]

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {"datasets": {name: own.to_json() for name, own in self.sets.items()}}

    def digest(self) -> str:
        """Sixteen hex digits that change whenever a name or a number does."""
        return _digest(self.to_json())


def load_statistics(path: Path) -> Statistics | DatasetStatistics:
    """Read a JSON file of `to_json`'s dict, of one dataset or of several; a damaged one raises ValueError."""
    data = read_json(path)
    with reading(path, "statistics of a model", "restore it"):
        if set(data) != {"datasets"}:
            return Statistics.from_json(data)
        return DatasetStatistics({name: Statistics.from_json(own) for name, own in data["datasets"].items()})


def choose(statistics: Statistics | DatasetStatistics, key: str) -> Statistics:
    """Return the statistics of the dataset `key`, which may be empty where there is one dataset only; another
    name raises ValueError."""
    if isinstance(statistics, Statistics):
        if key:
            raise ValueError(f"unnorm_key {key!r}: the model has one dataset, without a name; leave it out")
        return statistics
    if not key and len(statistics.sets) == 1:
        return next(iter(statistics.sets.values()))
    if key not in statistics.sets:
        names = ", ".join(map(repr, statistics.sets))
        raise ValueError(
            f"unnorm_key {key!r}: the model was trained on the datasets {names}; name one of them in the "
            "observation or `load`, or by --unnorm-key of `worldvla eval`, `serve` and `export`"
        )
    return statistics.sets[key]


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


WORLDVLA = Statistics(
    action_low=(-0.9375, -0.9375, -0.9375, -0.32571429, -0.375, -0.375, -1.0),
    action_high=(0.9375, 0.9375, 0.9375, 0.375, 0.375, 0.375, 1.0),
    state_low=(),
    state_high=(),
    kind="published",
)
"""WorldVLA's one set for all four LIBERO suites (data/item_processor.py:327-328); it has no state."""

RYNNVLA = Statistics(
    action_low=(-0.9375, -0.9375, -0.9375, -0.24214286, -0.375, -0.36428571, -1.0),
    action_high=(0.9375, 0.9375, 0.9375, 0.34821429, 0.375, 0.375, 1.0),
    state_low=(
        -0.4827807,
        -0.3309336,
        0.00812818,
        1.00279467,
        -3.63125079,
        -1.84273835,
        -0.00545302,
        -0.04201502,
    ),
    state_high=(
        0.210313803,
        0.39042644,
        1.47277813,
        3.72486417,
        3.56188956,
        1.3863216,
        0.0423214189,
        0.00131260958,
    ),
    kind="published",
    world_low=WORLDVLA.action_low,
    world_high=WORLDVLA.action_high,
)
"""RynnVLA-002's statistics: of its policy (data/item_processor.py:546-565), and of its world samples, which
were pretokenised with WorldVLA's (327-328)."""


def compute_statistics(
    actions: Float[np.ndarray, "F A"], states: Float[np.ndarray, "F S"], kind: Literal["minmax", "quantile"]
) -> Statistics:
    """Return the statistics of all frames: minimum and maximum, or the 1st and 99th percentile.

    A range under 2e-3 is widened: symmetrically about zero where it holds zero, so that 0 is the centre of a
    bin, else about its middle.
    """
    action_low, action_high = _ranges(actions, kind)
    state_low, state_high = _ranges(states, kind)
    return Statistics(action_low, action_high, state_low, state_high, kind)


def _ranges(values: np.ndarray, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"statistics need finite values of at least one frame, got shape {values.shape}")
    values = values.astype(np.float64)
    if kind == "minmax":
        low, high = values.min(axis=0), values.max(axis=0)
    else:
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
    narrow = high - low < 2 * MIN_HALF_RANGE
    centre = np.where((low <= 0) & (high >= 0), 0.0, (low + high) / 2)
    half = np.maximum(MIN_HALF_RANGE, np.maximum(high - centre, centre - low))
    low, high = np.where(narrow, centre - half, low), np.where(narrow, centre + half, high)
    return tuple(low.tolist()), tuple(high.tolist())


def normalize(values: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Map physical values (..., D) to [-1, 1], float64; clips outside the range, raises on non-finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.shape[-1:] != (len(low),):
        raise ValueError(f"the last axis must have the statistics' {len(low)} dims, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"actions and states must be finite, got {values[~np.isfinite(values)][0]}")
    low_D, high_D = np.asarray(low), np.asarray(high)
    return np.clip(2 * (values - low_D) / (high_D - low_D + EPSILON) - 1, -1.0, 1.0)


def denormalize(values: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Map [-1, 1] back to physical units, float64 (WorldVLA eval_solver_libero_256.py:125-133)."""
    low_D, high_D = np.asarray(low), np.asarray(high)
    return (np.asarray(values, dtype=np.float64) + 1) / 2 * (high_D - low_D + EPSILON) + low_D


def quantize(values: Float[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Return the codes 0..255 of values in [-1, 1]; 255 only at 1."""
    return np.clip(np.digitize(values, EDGES) - 1, 0, NUM_BIN_CODES - 1).astype(np.int64)


def dequantize(codes: Int[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the bin centres of codes 0..255; 254 and 255 share the last. Other codes raise ValueError."""
    codes = np.asarray(codes)
    if codes.size and (codes.min() < 0 or codes.max() >= NUM_BIN_CODES):
        raise ValueError(f"bin codes must be in [0, {NUM_BIN_CODES}), got {codes.min()}..{codes.max()}")
    return np.asarray(CENTRES[np.minimum(codes, len(CENTRES) - 1)])
