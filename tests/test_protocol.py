"""The wire is openpi's byte for byte, holds no pickle and is read with bounded work; pictures are converted
and resized as openpi does it.

Run: pytest tests/test_protocol.py
"""

from typing import Any

import msgpack
import numpy as np
import pytest

from worldvla.image import as_uint8, resize_with_pad
from worldvla.serve.protocol import pack, unpack

OPENPI = "pip install --no-deps openpi-client, which declares numpy < 2 and works with later ones"


def test_bytes_are_those_of_openpi() -> None:
    message = {"x": np.array([[1, 2]], dtype=np.uint8), "y": np.int16(-1), "z": "a"}
    array = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x01\x02\xc4\x05dtype\xa3|u1"
    array += b"\xc4\x05shape\x92\x01\x02"
    scalar = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xff\xc4\x05dtype\xa3<i2"
    assert pack(message) == b"\x83\xa1x" + array + b"\xa1y" + scalar + b"\xa1z\xa1a"


def test_bytes_and_pictures_are_those_of_the_genuine_client() -> None:
    theirs = pytest.importorskip("openpi_client.msgpack_numpy", reason=OPENPI)
    tools = pytest.importorskip("openpi_client.image_tools", reason=OPENPI)
    rng = np.random.default_rng(0)
    wide, tall = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 64), (97, 31)))
    message = {"wide": wide, "state": rng.normal(size=8), "y": np.float32(0.5), "z": "go", "n": [1, None]}
    assert pack(message) == theirs.packb(message)
    back = theirs.unpackb(pack(message))
    np.testing.assert_array_equal(back["state"], message["state"])
    for picture, size in ((wide, (32, 32)), (tall, (224, 224)), (tall, (20, 50))):
        np.testing.assert_array_equal(resize_with_pad(picture, *size), tools.resize_with_pad(picture, *size))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(6, dtype=">i4").reshape(2, 3).T,
        np.zeros((0, 7), dtype=np.float64),
        np.array(True),
        np.array(["red", "blue"]),
    ],
)
def test_arrays_come_back(array: np.ndarray) -> None:
    back = unpack(pack({"a": [array]}))["a"][0]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_numbers_and_texts_come_back() -> None:
    message = {"a": np.float32(0.5), "b": np.int64(7), "c": None, "d": "text", "e": [1, {"f": 2.5}]}
    back = unpack(pack(message))
    assert back == message
    assert type(back["a"]) is np.float32


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros(2, "i4,f4"), np.array([1j])], ids=str)
def test_arrays_that_are_no_numbers_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="are refused"):
        pack({"a": array})
    with pytest.raises(TypeError, match="cannot send a set"):
        pack({"a": {1}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({b"dtype": "|O"}, "dtype"),
        ({b"dtype": "|O8"}, "refused"),
        ({b"dtype": "|V2"}, "refused"),
        ({b"dtype": "<c8"}, "refused"),
        ({b"dtype": "i1,i1"}, "dtype"),
        ({b"shape": [3]}, "2 bytes, expected 3"),
        ({b"shape": [-1]}, "sizes from 0"),
        ({b"shape": 2}, "TypeError"),
        ({b"data": "ab"}, "TypeError"),
    ],
)
def test_forged_arrays_are_refused(change: dict[bytes, Any], reason: str) -> None:
    array = {b"__ndarray__": True, b"data": b"ab", b"dtype": "|u1", b"shape": [2]}
    forged: list[Any] = [msgpack.packb({**array, **change}) for change in ({}, change)]
    assert unpack(forged[0]).tolist() == [97, 98]
    with pytest.raises(ValueError, match=reason):
        unpack(forged[1])


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x81\xa1x", pack({"a": 1}) + b"!", b"\x81\x01\x02", b"\x91" * 5000, b"\xc7\x09\x01"],
)
def test_garbage_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a msgpack message"):
        unpack(data)


@pytest.mark.parametrize(
    "message",
    [
        [[]] * 300,  # one list too long
        [[[]] * 200] * 2,  # lists of allowed lengths, too many together
        [np.zeros(1)] * 200,
        dict.fromkeys(map(str, range(300))),
        "a" * 300,
    ],
)
def test_work_is_bounded_before_it_is_done(message: Any) -> None:
    assert unpack(pack(message)) == message or isinstance(message[0], np.ndarray | list)
    with pytest.raises(ValueError, match=r"holds too much .*: (shorten|send pictures|leave out)"):
        unpack(pack(message), max_items=256, max_text=256)


def test_pictures_keep_their_shape_inside_black_borders() -> None:
    wide = np.full((4, 8, 3), 200, dtype=np.uint8)
    out = resize_with_pad(wide, 6, 6)  # 3 rows of 6 in the middle of 6: one above, two below
    assert (out.max((1, 2)) > 0).tolist() == [False, True, True, True, False, False]
    assert (out[1:4] == 200).all()
    assert resize_with_pad(wide, 4, 8) is wide
    half = resize_with_pad(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), 2, 2)
    assert half[:, :, 0].tolist() == [[11, 16], [29, 34]]  # by openpi-client's resize_with_pad


def test_pictures_are_converted_as_openpi_does_it() -> None:
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    for dtype in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(as_uint8(levels.astype(dtype) / dtype(255)), levels)
    np.testing.assert_array_equal(as_uint8((levels / 255).astype(np.float32).transpose(2, 0, 1)), levels)
    assert as_uint8(levels) is levels
    for bad, fix in (
        (levels / 127.5 - 1, r"from -1 to .*: send floats in \[0, 1\]"),
        (levels * 1.0, r"from 0 to 235: send floats in \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), "send floats"),
        (levels.astype(np.int64), r"image.astype\(np.uint8\)"),
        (np.zeros((4, 4, 4), np.uint8), "alpha"),
        (levels[None], "send one picture"),
        ([1], "got list: send an array"),
    ):
        with pytest.raises(ValueError, match=fix):
            as_uint8(bad)
