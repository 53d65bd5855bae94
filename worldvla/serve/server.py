"""A policy behind openpi's websocket protocol: openpi's clients drive it, and `worldvla eval websocket://...`.

    serve_checkpoint("worldvla/assets/tabletop", on_start=print)

The server speaks first, one frame of metadata; then each request, an observation, gets one answer, `actions`
float32 (K, 7) and `server_timing` (ms). Whatever fails is one line in a text frame, and the connection is
closed (1011); the server goes on. `GET /healthz` answers OK.
"""

import asyncio
import contextlib
import hmac
import http
import importlib.metadata
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from worldvla.serve.image import resize_with_pad
from worldvla.serve.protocol import IMAGE_KEYS, MAX_BYTES, PORT, PROMPT_KEY, STATE_KEY, pack, unpack

NUM_STATE_DIMS = 8
MAX_SESSIONS = 256
"""Sessions of one connection whose frames are kept; the one that was silent for longest is forgotten."""
log = logging.getLogger(__name__)
Frame = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served."""

    act: Callable[[dict[str, Any]], np.ndarray]
    """Observation, as `Policy.act` takes it, -> actions (K, 7)."""
    views: Mapping[str, tuple[int, int]]
    """View -> (rows, columns) in pixels that it reads."""
    history: int = 1
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resize: bool = False
    """Resize pictures of another size instead of refusing them."""


def serve_checkpoint(
    checkpoint: Path | str,
    *,
    head: str = "discrete",
    resize: bool = False,
    device: str = "cpu",
    quantize: Literal["", "int8", "int4"] = "",
    **options: Any,
) -> None:
    """Serve a checkpoint until interrupted; `options` as of `serve`, `head` as of `Model.policy`."""
    from worldvla.infer.model import load
    from worldvla.infer.policy import Policy

    model = load(checkpoint, device, quantize=quantize)
    layout = model.config.layout
    policy = Policy(model, head)
    metadata = {
        **{key: value for key, value in model.identity().items() if key != "path"},
        "quantize": quantize,
        "chunk": layout.chunk,
        "history": layout.history,
        "head": head,
        "decoding": policy.decoding,
        "views": {view: list(size) for view, size in model.view_sizes.items()},
        "worldvla": importlib.metadata.version("worldvla"),
    }
    served = Served(
        act=policy.act,
        views=model.view_sizes,
        history=layout.history,
        metadata=metadata,
        resize=resize,
    )
    asyncio.run(serve(served, **options))


async def serve(
    served: Served,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_key: str = "",
    on_start: Callable[[str], Any] = log.info,
) -> None:
    """Answer until cancelled; `on_start` is told the address, for port 0 that of a free port.

    One thread infers for all connections, and the event loop goes on answering pings and /healthz meanwhile.
    """

    def admit(connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "").encode()
        if api_key and not hmac.compare_digest(given, f"Api-Key {api_key}".encode()):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED,
                "send the header 'Authorization: Api-Key KEY' with the server's key\n",
            )
        return None

    with ThreadPoolExecutor(1) as thread:

        async def answer(connection: ServerConnection) -> None:
            await _answer(connection, served, thread)

        options: dict[str, Any] = {"process_request": admit, "compression": None, "max_size": MAX_BYTES}
        async with listen(answer, host, port, **options) as server:
            on_start(f"{host}:{server.sockets[0].getsockname()[1]}")
            await server.serve_forever()


async def _answer(connection: ServerConnection, served: Served, thread: ThreadPoolExecutor) -> None:
    """Answer one client until it leaves or an error ends the conversation."""
    sessions: dict[str, deque[Frame]] = {}
    previous_ms: float | None = None
    try:
        await connection.send(pack(dict(served.metadata)))
        async for data in connection:
            start = time.monotonic()
            observation = read_observation(data, served, sessions)
            actions = await asyncio.get_running_loop().run_in_executor(thread, served.act, observation)
            timing = {"infer_ms": (time.monotonic() - start) * 1000}
            if previous_ms is not None:
                timing["prev_total_ms"] = previous_ms
            await connection.send(pack({"actions": actions, "server_timing": timing}))
            previous_ms = (time.monotonic() - start) * 1000
    except ConnectionClosed:
        return
    except Exception as error:  # the process boundary: the client gets one line, the others their answers
        is_ours = not isinstance(error, ValueError)
        log.warning("%s: %s", connection.remote_address, error, exc_info=is_ours)
        line = " ".join(f"{type(error).__name__ + ': ' if is_ours else ''}{error}".split())
        with contextlib.suppress(ConnectionClosed):
            await connection.send(line)
            await connection.close(CloseCode.INTERNAL_ERROR, "the frame before says why")


def read_observation(data: bytes | str, served: Served, sessions: dict[str, deque[Frame]]) -> dict[str, Any]:
    """Return the observation in a request, as `Policy.act` takes it; a bad request raises ValueError.

    Keys are openpi's or ours. For a policy with a history the frames just before come with the request
    (`previous`), or else are those of the earlier requests of its session: `session_id` tells sessions of one
    connection apart, `reset` begins one anew.
    """
    message = unpack(data)
    if not isinstance(message, dict):
        raise ValueError(f"a request must be a map, got {type(message).__name__}")
    frame = _frame(message, served)
    observation = {**frame, "instruction": _text(message), **_state(message)}
    if served.history > 1:
        session = str(message.get("session_id", ""))
        seen = sessions.pop(session, None)  # the newest goes last
        if seen is None or message.get("reset"):
            seen = deque(maxlen=served.history - 1)
        sessions[session] = seen
        if len(sessions) > MAX_SESSIONS:
            del sessions[next(iter(sessions))]
        given = message.get("previous")
        if given is not None and not (isinstance(given, list) and all(isinstance(f, dict) for f in given)):
            raise ValueError(f"previous must be a list of maps of pictures, got {type(given).__name__}")
        observation["previous"] = list(seen) if given is None else [_frame(f, served) for f in given]
        seen.append(frame)
    return observation


def _pick(message: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in message:
            return message[key]
    raise ValueError(
        f"an observation needs {' or '.join(map(repr, keys))}, got the keys {sorted(map(str, message))}"
    )


def _frame(message: Mapping[str, Any], served: Served) -> Frame:
    frame = {}
    for view, size in served.views.items():
        key = IMAGE_KEYS.get(view, view)
        image = _pick(message, key, view)
        is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
        if is_image and image.shape[2] == 3 and image.size and served.resize:
            image = resize_with_pad(image, *size)
        if not is_image or image.shape != (*size, 3):
            got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(
                f"{key} must be a uint8 array of shape {(*size, 3)}, got {got}: "
                "render it at that size, or start the server with --resize"
            )
        frame[view] = image
    return frame


def _text(message: Mapping[str, Any]) -> str:
    text = _pick(message, PROMPT_KEY, "instruction")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{PROMPT_KEY} must be a text that is not empty, got {text!r}")
    return text


def _state(message: Mapping[str, Any]) -> Frame:
    """Return the state, float32 (8,), under our name; nothing where there is none."""
    state = message.get(STATE_KEY, message.get("state"))
    if state is None:
        return {}
    if not isinstance(state, np.ndarray) or state.shape != (NUM_STATE_DIMS,) or state.dtype.kind != "f":
        got = f"{state.dtype} {state.shape}" if isinstance(state, np.ndarray) else type(state).__name__
        raise ValueError(f"{STATE_KEY} must be a float array of shape ({NUM_STATE_DIMS},), got {got}")
    if not np.isfinite(state).all():
        raise ValueError(f"{STATE_KEY} must be finite, got {state.tolist()}")
    return {"state": state.astype(np.float32)}  # openpi's client sends float64
