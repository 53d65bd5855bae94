"""A small client of a policy server: NumPy, msgpack and websockets, no torch; Python 3.10 or later.

    with Client("ws://127.0.0.1:8000", api_key="...") as client:
        print(client.metadata["views"])
        actions = client.infer({"observation/image": image, ..., "prompt": "lift the red cube"})["actions"]

It speaks openpi's protocol, so any server of that answers it. A server keeps nothing between requests: when a
connection is lost, the next `infer` connects again.

A robot that must not wait asks in the background instead, once a control step:

    robot = AsyncClient(client, still=[0, 0, 0, 0, 0, 0, math.nan])
    while True:
        move(robot.act(observe()))
"""

import contextlib
import ssl
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from worldvla.serve.protocol import COMMITTED_KEY, DEADLINE_KEY, MAX_BYTES, MAX_COMMITTED, pack, unpack


class ServerError(RuntimeError):
    """The server's own words: it refused a request, failed, or would have answered after the deadline."""


class Client:
    """Connects at once. A server that is not there or goes away raises ConnectionError, one that is silent
    for `timeout_s` TimeoutError, one that reports an error ServerError. `certificate`: for wss://, the PEM
    file of a server that the system does not trust.
    """

    def __init__(
        self,
        address: str = "ws://127.0.0.1:8000",
        *,
        api_key: str = "",
        timeout_s: float = 60.0,
        certificate: Path | str | None = None,
    ) -> None:
        self.address, self.timeout_s = address, timeout_s
        self.metadata: dict[str, Any] = {}
        self._options: dict[str, Any] = {"compression": None, "max_size": MAX_BYTES, "proxy": None}
        if api_key:
            self._options["additional_headers"] = {"Authorization": f"Api-Key {api_key}"}
        if certificate is not None:
            self._options["ssl"] = ssl.create_default_context(cafile=certificate)
        self._stack = contextlib.ExitStack()
        self._connection: ClientConnection | None = None
        self.connect()

    def connect(self) -> None:
        """Connect anew and read the metadata."""
        self.close()
        try:
            self._connection = self._stack.enter_context(
                connect(self.address, open_timeout=self.timeout_s, **self._options)
            )
        except InvalidStatus as error:
            body = error.response.body.decode(errors="replace").strip()
            status = error.response.status_code
            raise ConnectionError(f"{self.address} refuses with HTTP {status}: {body}") from None
        except (OSError, WebSocketException) as error:
            raise ConnectionError(
                f"no policy server at {self.address} ({error}): start it by `worldvla serve CHECKPOINT`"
            ) from None
        self.metadata = self._receive()

    def infer(self, observation: Mapping[str, Any], *, deadline_ms: float | None = None) -> dict[str, Any]:
        """Return the server's answer, `actions` (K, 7) and `server_timing`. An answer that would come later
        than `deadline_ms` after the request is a ServerError instead of an old action.
        """
        if self._connection is None:
            self.connect()
        assert self._connection is not None
        extra = {} if deadline_ms is None else {DEADLINE_KEY: deadline_ms}
        data = pack({**observation, **extra})
        with contextlib.suppress(OSError, WebSocketException):  # if it has gone, receiving says why
            self._connection.send(data)
        return self._receive()

    def close(self) -> None:
        """Say goodbye; `infer` connects again."""
        self._connection = None
        with contextlib.suppress(OSError, WebSocketException):
            self._stack.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        try:
            data = self._connection.recv(timeout=self.timeout_s)
        except TimeoutError:
            self.close()  # its answer would be taken for that of the next request
            raise TimeoutError(f"{self.address} has not answered within {self.timeout_s:g} s") from None
        except (OSError, WebSocketException) as error:
            self.close()
            raise ConnectionError(f"{self.address} went away ({error}): infer() connects again") from None
        if isinstance(data, str):
            raise ServerError(" ".join(data.split())[-500:])
        return unpack(data)


class Plan:
    """Chunks of actions that overlap in time -> one action a step.

    A chunk begins at the step whose observation it answers, so that what has passed meanwhile is left out
    (a start index by latency). Where several chunks know a step, their actions are averaged, an older chunk
    with `blend` times the weight of the next newer one; 0: the newest alone. The actions of a chunk do not
    see one another (the mask of WorldVLA), so none of them can be conditioned on those already under way.
    """

    def __init__(self, blend: float = 0.0) -> None:
        if not 0 <= blend <= 1:
            raise ValueError(f"blend must be in [0, 1], got {blend}")
        self.blend = blend
        self._chunks: list[tuple[int, np.ndarray]] = []

    def add(self, start: int, actions: np.ndarray) -> None:
        """Take the chunk (K, A) whose first action is for step `start`; those that end before are dropped."""
        self._chunks = [(s, a) for s, a in self._chunks if start < s + len(a)]
        self._chunks.append((start, np.asarray(actions)))

    def action(self, step: int) -> np.ndarray | None:
        """Return the action (A,) of a step; None: no chunk reaches it."""
        known = [(s, a[step - s]) for s, a in self._chunks if s <= step < s + len(a)]
        if not known:
            return None
        known.sort(key=lambda pair: -pair[0])
        weights = np.array([self.blend**age for age in range(len(known))])
        return np.average([action for _, action in known], axis=0, weights=weights).astype(np.float32)


class AsyncClient:
    """Keeps a robot moving while the next chunk is computed: `act` returns at once.

    At most one request is under way; the next one is sent in the step in which it is answered. Before the
    first answer, and where the server is slower than its chunks are long, the robot gets `still`: NaN repeats
    that number of the last action, None all of it, which is right for absolute actions. Whatever a request
    raises, the next `act` raises: a lost connection stops the robot.

    `ahead`: send the actions that are executed until the answer is expected, as long as the last one took,
    and let the server's world model imagine them: the answer is for the step after them. By default where the
    server's metadata say `looks_ahead`. With 200 ms of delay 190 of 200 episodes succeed with it and 46
    without, 29 with a `blend` of 0.5 (paper/bench_delay.py).
    """

    def __init__(
        self,
        client: Client,
        *,
        still: Sequence[float] | None,
        blend: float = 0.0,
        ahead: bool | None = None,
    ) -> None:
        can = bool(client.metadata.get("looks_ahead"))
        if ahead and not can:
            raise ValueError(f"the policy at {client.address} cannot look ahead: leave ahead=True out")
        self.client, self.still, self.blend = client, still, blend
        self.ahead = can if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, "policy")
        self._request: Future[dict[str, Any]] | None = None
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the actions of the one before."""
        if self._request is not None:
            self._request.result()  # its answer would be taken for one to this episode
        self._request, self._asked, self._begins = None, 0, 0
        self._plan, self._step = Plan(self.blend), 0
        self._last: np.ndarray | None = None
        self.latency = 0
        """Control steps from an observation to its answer, the last time."""

    def act(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """Return the action (A,) of this control step; None: nothing is known yet and `still` is None."""
        if self._request is not None and self._request.done():
            self._plan.add(self._begins, self._request.result()["actions"])
            self.latency, self._request = self._step - self._asked, None
        if self._request is None:
            committed = self._committed() if self.ahead else []
            self._asked, self._begins = self._step, self._step + len(committed)
            extra = {COMMITTED_KEY: np.stack(committed)} if committed else {}
            self._request = self._thread.submit(self.client.infer, {**observation, **extra})
        action = self._plan.action(self._step)
        self._step += 1
        self._last = keep_still(self.still, self._last) if action is None else action
        return self._last

    def _committed(self) -> list[np.ndarray]:
        """Return the actions of the next steps, as many as the last answer took, at most those that are
        known: each costs the server a frame, and one that is slow must not be asked for more and more."""
        committed: list[np.ndarray] = []
        while len(committed) < min(self.latency, MAX_COMMITTED):
            if (action := self._plan.action(self._step + len(committed))) is None:
                break
            committed.append(action)
        return committed

    def close(self) -> None:
        self._thread.shutdown()
        self.client.close()


def keep_still(still: Sequence[float] | None, last: np.ndarray | None) -> np.ndarray | None:
    """Return the action of a robot that waits: `still`, its NaN replaced by the numbers of the last action,
    or 0 before any."""
    if still is None:
        return last
    rest = np.asarray(still, dtype=np.float32)
    return np.where(np.isnan(rest), np.zeros_like(rest) if last is None else last, rest)
