"""Pictures as clients and data sets have them -> uint8 (Y, X, 3): converted and resized as openpi does it."""

from typing import Any

import numpy as np
from PIL import Image

MAX_PIXELS = 2**20
"""Of a picture that is resized."""


def as_uint8(image: Any) -> np.ndarray:
    """Return uint8 (Y, X, 3) of a picture that is so, or channel-first, or of floats in [0, 1].

    As openpi's servers convert it (policies/libero_policy.py, _parse_image): LeRobot keeps pictures as float
    (3, Y, X), and 255 x is cut to an integer, which gives back each of the 256 levels. Anything else raises
    ValueError with what to send.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"got {type(image).__name__}: send an array, uint8 (Y, X, 3)")
    got, sides = f"got {image.dtype} {image.shape}", image.shape[::2] if image.ndim == 3 else ()
    if 3 not in sides or not image.size:
        fix = "leave out the alpha channel" if 4 in sides else "send one picture, uint8 (Y, X, 3)"
        raise ValueError(f"{got}: {fix}")
    if image.dtype.kind == "f":
        low, high = float(image.min()), float(image.max())
        if not 0 <= low <= high <= 1:  # NaN too
            raise ValueError(f"{got} from {low:g} to {high:g}: send floats in [0, 1], or uint8")
        image = (255 * image).astype(np.uint8)
    elif image.dtype != np.uint8:
        raise ValueError(f"{got}: send it as uint8, image.astype(np.uint8)")
    return image if image.shape[2] == 3 else np.ascontiguousarray(image.transpose(1, 2, 0))


def resize_with_pad(image: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Return uint8 (rows, cols, 3): bilinear, undistorted, centred, the rest black.

    The same bytes as `resize_with_pad` of openpi-client's image_tools.py.
    """
    height, width = image.shape[:2]
    if (height, width) == (rows, cols):
        return image
    ratio = max(width / cols, height / rows)
    inner_rows, inner_cols = max(1, int(height / ratio)), max(1, int(width / ratio))
    top, left = (rows - inner_rows) // 2, (cols - inner_cols) // 2
    out = np.zeros((rows, cols, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((inner_cols, inner_rows), Image.Resampling.BILINEAR)
    out[top : top + inner_rows, left : left + inner_cols] = np.asarray(small)
    return out
