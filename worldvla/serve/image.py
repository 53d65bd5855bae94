"""Pictures of another size, resized as openpi's LIBERO client does it."""

import numpy as np
from PIL import Image


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
