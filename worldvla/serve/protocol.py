"""Messages of a policy server and its client, the bytes of openpi: msgpack, NumPy arrays as maps.

    send(pack({"prompt": "lift the red cube", "observation/image": image}))
    actions = unpack(receive())["actions"]

The keys of an array's map are bytes, its data are in C order (openpi-client msgpack_numpy.py). There is no
pickle: arrays of objects, records and complex numbers are refused on both sides. Decoded arrays are
read-only. Runs in Python 3.10, with NumPy and msgpack alone.
"""

import itertools
import math
import re
from typing import Any

import msgpack
import numpy as np

PORT = 8000
MAX_BYTES = 16 * 2**20
"""Longest message that a client takes, bytes; a server's limit follows from the pictures that it reads."""
MAX_ITEMS, MAX_TEXT = 65_536, 2**20
"""Default bounds of `unpack`: lists and maps of a message, entries of each; bytes of a text."""
IMAGE_KEYS = {"agentview": "observation/image", "wrist": "observation/wrist_image"}
"""View -> openpi's name of its picture."""
STATE_KEY, PROMPT_KEY = "observation/state", "prompt"
HISTORY_KEY, DEADLINE_KEY, UNNORM_KEY = "previous", "deadline_ms", "unnorm_key"
"""Ours: pictures of the steps just before, oldest first; ms from a request's arrival to its answer; of a
model of several datasets, the one whose statistics are used."""
COMMITTED_KEY, MAX_COMMITTED = "committed", 32
"""Ours: actions (D, A) that the robot executes before it has the answer, which is then for the step after
them; how many are taken."""
REFUSED_KINDS = "OVc"


def pack(message: Any) -> bytes:
    """Return the message as bytes; an unknown type raises TypeError, a refused dtype ValueError."""
    data: Any = msgpack.packb(message, default=_encode)  # bytes, which its stub doubts
    return data


_HINTS = {
    "max_str_len": "shorten the text, a prompt say",
    "max_array_len": "send pictures and other numbers as numpy arrays, not as lists",
    "lists and maps": "send pictures and other numbers as numpy arrays, not as lists",
    "max_map_len": "leave out what the server does not ask for",
}
"""What an error of a bound says -> what to do about it."""


def unpack(data: bytes | str, max_items: int = MAX_ITEMS, max_text: int = MAX_TEXT) -> Any:
    """Return the message in a frame; a text frame, or bytes that are no message, raises ValueError.

    Its work is bounded: at most `max_items` lists and maps, entries in each of them, and `max_text` bytes in
    a text, refused by the length that they declare, before anything of that size is made.
    """
    if isinstance(data, str):
        raise ValueError(f"a message must be a binary msgpack frame, got text {data[:40]!r}")
    containers = itertools.count(1)

    def counted(value: Any) -> Any:
        if next(containers) > max_items:
            raise ValueError(f"more than {max_items} lists and maps")
        return _decode(value) if isinstance(value, dict) else value

    bounds = {"max_array_len": max_items, "max_map_len": max_items, "max_str_len": max_text, "max_ext_len": 0}
    try:
        return msgpack.unpackb(data, object_hook=counted, list_hook=counted, **bounds)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError, msgpack.UnpackException) as error:
        for bound, hint in _HINTS.items():
            if bound in str(error):
                raise ValueError(f"a message holds too much ({error}): {hint}") from None
        raise ValueError(
            f"not a msgpack message of openpi's protocol ({type(error).__name__}: {error})"
        ) from None


def _encode(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot send a {type(value).__name__}: expected numbers, texts, lists, maps, arrays")
    if value.dtype.kind in REFUSED_KINDS:
        raise ValueError(f"arrays of {value.dtype} are refused: send numbers, bools or texts")
    dtype = value.dtype.str
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": dtype}


def _decode(value: dict[Any, Any]) -> Any:
    if b"__npgeneric__" in value:
        return _dtype(value[b"dtype"]).type(value[b"data"])
    if b"__ndarray__" not in value:
        return value
    data, shape, dtype = value[b"data"], tuple(value[b"shape"]), _dtype(value[b"dtype"])
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"an array has shape {shape}, expected sizes from 0 on")
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"an array {dtype} {shape} has {len(data)} bytes, expected {math.prod(shape) * dtype.itemsize}"
        )
    return np.ndarray(shape, dtype, buffer=data)


def _dtype(name: Any) -> np.dtype[Any]:
    # The pattern of `dtype.str`: np.dtype alone would also read records out of a text.
    if not isinstance(name, str) or not re.fullmatch(r"[<>|=][a-zA-Z]\d+(\[\w+\])?", name):
        raise ValueError(f"an array has dtype {name!r}, expected one like '<f4'")
    dtype = np.dtype(name)
    if dtype.kind in REFUSED_KINDS:
        raise ValueError(f"arrays of {dtype} are refused: send numbers, bools or texts")
    return dtype
