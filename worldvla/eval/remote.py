"""A policy behind openpi's websocket protocol as an actor: `worldvla eval websocket://HOST:PORT`.

One connection, one request an environment. Requests hold openpi's LIBERO keys (pictures uint8, state float32
(8,), prompt), and where the server's metadata name a `history` above 1, `previous`, the pictures of the steps
just before. No torch here.
"""

import contextlib
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect

from worldvla.eval.actors import CHUNK, Actor, ActorError, Query
from worldvla.image import MAX_PIXELS, resize_with_pad
from worldvla.serve.protocol import (
    IMAGE_KEYS,
    MAX_BYTES,
    PORT,
    PROMPT_KEY,
    STATE_KEY,
    UNNORM_KEY,
    pack,
    unpack,
)
from worldvla.sim.protocol import NUM_ACTION_DIMS
from worldvla.sim.suites import suite

SCHEMES = {"websocket": "ws", "ws": "ws", "wss": "wss"}
PATIENCE_S = 600.0
"""Longest wait for an answer: the first may compile the policy."""
GREETING_S = 20.0
LIBERO_SENT = (224, 224)
"""openpi renders LIBERO at 256, as we do, and resizes to this (examples/libero/main.py)."""
Size = tuple[int, int]


class RemoteActor(Actor):
    """Connects at once; whatever goes wrong raises ActorError with one line.

    Sizes of the pictures: those that the server's metadata name (`views`, as our own server does), rendered
    so; else tabletop's 64 x 64 and 32 x 32, or LIBERO's 256 x 256 resized to 224 x 224.
    """

    name = "remote"

    def __init__(
        self,
        address: str,
        suite_name: str,
        execute: int | None = None,
        api_key: str | None = None,
        unnorm_key: str = "",
    ) -> None:
        self.address = _websocket(address)
        self.suite, self.unnorm_key = suite_name, unnorm_key
        self._requests = 0
        self._stack = contextlib.ExitStack()  # websockets wants its connections entered
        # Also at the end of the program: a client that just goes is a traceback in a server's log.
        weakref.finalize(self, self._stack.close)
        self._connect(os.environ.get("WORLDVLA_API_KEY", "") if api_key is None else api_key)
        self.views, self.sent = self._choose_views()
        self.history = self._positive("history") or 1
        chunk = self._positive("chunk")
        self.execute = min(CHUNK, chunk or CHUNK) if execute is None else execute
        if self.execute < 1:
            raise ValueError(f"--execute must be at least 1 action, got {execute}")
        if self.execute > (chunk or self.execute):
            raise self._error(f"it gives {chunk} actions at a time, asked for {self.execute}: execute fewer")

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        return [self._ask(query) for query in queries]

    def identity(self) -> dict[str, Any]:
        name = self.metadata.get("name")
        return {
            "name": name if isinstance(name, str) and name else self.name,
            "address": self.address,
            "sent": {view: list(size) for view, size in self.sent.items()},
            "server": _plain(self.metadata),
            **self._dataset(),
        }

    def close(self) -> None:
        self._stack.close()

    def _error(self, text: str) -> ActorError:
        return ActorError(f"policy server {self.address}: " + " ".join(text.split()))

    def _connect(self, api_key: str) -> None:
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        try:
            # A server that computes in its event loop, as openpi's, answers no pings meanwhile: send none.
            connecting = connect(
                self.address,
                additional_headers=headers,
                compression=None,
                max_size=MAX_BYTES,
                ping_interval=None,
                proxy=None,
            )
            self._connection = self._stack.enter_context(connecting)
        except InvalidStatus as error:
            status = error.response.status_code
            fix = (
                "give its key by the environment variable WORLDVLA_API_KEY"
                if status in (401, 403)
                else "is it the right port?"
            )
            raise self._error(f"it refuses the connection with HTTP {status}: {fix}") from None
        except (OSError, WebSocketException) as error:
            raise self._error(f"no connection ({error}): start it by `worldvla serve CHECKPOINT`") from None
        self.metadata = self._receive(GREETING_S, "metadata")

    def _receive(self, patience_s: float, what: str) -> dict[str, Any]:
        try:
            data = self._connection.recv(timeout=patience_s)
        except TimeoutError:
            raise self._error(f"no {what} within {patience_s:.0f} s: is it openpi's protocol?") from None
        except (OSError, WebSocketException) as error:
            raise self._error(
                f"it went away before its {what}, after {self._requests} requests ({error}): "
                "start it again, then the same command goes on"
            ) from None
        if isinstance(data, str):  # openpi's holds a traceback, which says what happened at its end
            lines = [line for line in data.splitlines() if line.strip()] or ["no reason given"]
            raise self._error(f"it reports an error: {lines[-1][:500]}")
        try:
            message = unpack(data)
        except ValueError as error:
            raise self._error(f"bad {what}: {error}") from None
        if not isinstance(message, dict):
            raise self._error(f"bad {what}: expected a map, got {type(message).__name__}")
        return message

    def _positive(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if type(value) is int and value > 0 else None

    def _choose_views(self) -> tuple[dict[str, Size], dict[str, Size]]:
        """Return the sizes that are rendered and those that are sent."""
        named = self.metadata.get("views")
        if isinstance(named, dict):
            if not named or any(v not in IMAGE_KEYS or not _is_size(s) for v, s in named.items()):
                raise self._error(
                    f"it asks for the views {named!r}, expected [rows, columns] of {sorted(IMAGE_KEYS)}"
                )
            views = {view: (int(rows), int(cols)) for view, (rows, cols) in named.items()}
            return views, views
        row = suite(self.suite)
        usual = dict(row.rules.views)
        return usual, dict.fromkeys(usual, LIBERO_SENT) if row.simulator == "libero" else usual

    def _ask(self, query: Query) -> np.ndarray:
        observation = query.observation
        message = {
            **self._pictures(observation),
            STATE_KEY: np.asarray(observation["state"], dtype=np.float32),
            PROMPT_KEY: observation["instruction"],
            **self._dataset(),
        }
        if self.history > 1:
            message["previous"] = [self._pictures(frame) for frame in observation["previous"]]
        # If it has gone, receiving says why: its last words may still be there.
        with contextlib.suppress(OSError, WebSocketException):
            self._connection.send(pack(message))
        answer = self._receive(PATIENCE_S, "answer")
        self._requests += 1
        return self._actions(answer)

    def _dataset(self) -> dict[str, str]:
        return {UNNORM_KEY: self.unnorm_key} if self.unnorm_key else {}

    def _pictures(self, frame: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return {IMAGE_KEYS[view]: resize_with_pad(frame[view], *size) for view, size in self.sent.items()}

    def _actions(self, answer: Mapping[str, Any]) -> np.ndarray:
        expected = f"numbers of shape (U, {NUM_ACTION_DIMS}), U at least {self.execute}"
        if "actions" not in answer:
            raise self._error(
                f"bad answer: expected actions, {expected}, got the keys {sorted(map(str, answer))}"
            )
        actions = answer["actions"]
        if not isinstance(actions, np.ndarray) or actions.dtype.kind not in "fiu":
            got = actions.dtype if isinstance(actions, np.ndarray) else type(actions).__name__
            raise self._error(f"bad answer: expected actions, {expected}, got {got}")
        if actions.ndim != 2 or actions.shape[1] != NUM_ACTION_DIMS:
            raise self._error(f"bad answer: expected actions, {expected}, got the shape {actions.shape}")
        if len(actions) < self.execute:
            raise self._error(
                f"it gives {len(actions)} actions at a time, asked to execute {self.execute}: execute fewer"
            )
        if not np.isfinite(actions).all():
            raise self._error("bad answer: expected finite actions, got NaN or infinity")
        return actions[: self.execute].astype(np.float32)


def _websocket(address: str) -> str:
    """Return the address as websockets wants it."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:  # half of an IPv6 address, or a port above 65535
        parts = host = port = None
    if parts is None or parts.scheme not in SCHEMES or not host:
        raise ValueError(f"bad address {address!r}: expected websocket://HOST:PORT, ws:// or wss://")
    return f"{SCHEMES[parts.scheme]}://{f'[{host}]' if ':' in host else host}:{port or PORT}{parts.path}"


def _is_size(size: Any) -> bool:
    is_pair = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    return is_pair and size[0] * size[1] <= MAX_PIXELS


def _plain(value: Any) -> Any:
    """Return a server's metadata as a record can hold it; long arrays and bytes by their size alone."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= 64 else f"{value.dtype} {value.shape}"
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
