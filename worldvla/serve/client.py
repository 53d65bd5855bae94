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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
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
        self._options["ping_interval"] = None  # a server that computes may not answer; timeout_s is for that
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
        """Return the server's answer, `actions` (U, 7) and `server_timing`. An answer that would come later
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
    """Chunks of actions that come late -> one action a step, without waiting for any.

    Each step: `question` says whether to ask, `answer` takes the chunk (U, A) when it is there, `act` returns
    the action. A chunk begins with the action that follows what was executed since its question: actions in
    whose place others were executed are left out, and while the robot stood still none was. Where several
    chunks know a step, their actions are averaged, an older chunk with `blend` times the weight of the next
    newer one; 0: the newest alone. `still`, `ahead`, `execute`: see AsyncClient.
    """

    def __init__(
        self,
        still: Sequence[float] | None = None,
        *,
        blend: float = 0.0,
        ahead: bool = False,
        execute: int | None = None,
    ) -> None:
        if not 0 <= blend <= 1:
            raise ValueError(f"blend must be in [0, 1], got {blend}")
        if execute is not None and (execute < 1 or ahead or blend):
            got = f"execute={execute}, ahead={ahead}, blend={blend}"
            raise ValueError(f"execute must be 1 or more, and is not for ahead or blend, got {got}")
        self.still, self.blend, self.ahead, self.execute = still, blend, ahead, execute
        self.latency = 0
        """Steps from the last question to its answer."""
        self._chunks: list[tuple[int, np.ndarray]] = []
        self._step, self._is_asking, self._last = 0, False, None
        self._asked, self._begins, self._num_moves = 0, 0, 0

    def question(self) -> np.ndarray | None:
        """Return the actions that are under way, (D, A), to be sent with the observation of this step; None:
        nothing is to be asked now.

        They are as many as the last answer took, at most those that are known: each costs the server a
        frame, and one that is slow must not be asked for more and more.
        """
        is_busy = self.execute is not None and self.known(self._step) is not None
        if self._is_asking or is_busy:
            return None
        committed: list[np.ndarray] = []
        while self.ahead and len(committed) < min(self.latency, MAX_COMMITTED):
            if (action := self.known(self._step + len(committed))) is None:
                break
            committed.append(action)
        self._is_asking, self._asked, self._num_moves = True, self._step, 0
        self._begins = self._step + len(committed)
        return np.stack(committed) if committed else np.zeros((0, 0), np.float32)

    def answer(self, actions: np.ndarray) -> None:
        """Take the chunk (U, A) that the last question is answered by."""
        start = max(self._begins, self._step - self._num_moves)
        self._chunks = [(s, a) for s, a in self._chunks if self._step < s + len(a)]
        self._chunks.append((start, np.asarray(actions)[: self.execute]))
        self.latency, self._is_asking = self._step - self._asked, False

    def fail(self) -> None:
        """Forget the last question, to which no answer will come."""
        self._is_asking = False

    def act(self) -> np.ndarray | None:
        """Return the action (A,) of this step and go on to the next; None: there is none yet, nor `still`."""
        action = self.known(self._step)
        self._num_moves += action is not None and self._step >= self._begins
        self._step += 1
        self._last = keep_still(self.still, self._last) if action is None else action
        return self._last

    def known(self, step: int) -> np.ndarray | None:
        """Return the action (A,) of a step; None: no chunk reaches it."""
        actions = [a[step - s] for s, a in reversed(self._chunks) if s <= step < s + len(a)]
        if not actions:
            return None
        weights = self.blend ** np.arange(len(actions))
        return np.average(actions, axis=0, weights=weights).astype(np.float32)


class AsyncClient:
    """Keeps a robot moving while the next chunk is computed: `act` returns at once.

    At most one request is under way; the next one is sent in the step in which it is answered. Before the
    first answer, and where the server is slower than its chunks are long, the robot gets `still`: NaN repeats
    that number of the last action, None all of it, which is right for absolute actions. Whatever a request
    raises, the next `act` raises: a lost connection stops the robot.

    `ahead`: send the actions that are executed until the answer is expected, and let the server's world model
    imagine them: the answer is for the step after them. By default where the server's metadata say
    `looks_ahead`. `execute`: stand still until each answer comes, and then execute so many of its actions, as
    evaluations do; slower, and the safest where nothing moves by itself. `blend`: average overlapping chunks.
    paper/bench_delay.py compares them.
    """

    def __init__(
        self,
        client: Client,
        *,
        still: Sequence[float] | None,
        blend: float = 0.0,
        ahead: bool | None = None,
        execute: int | None = None,
    ) -> None:
        can = bool(client.metadata.get("looks_ahead"))
        if ahead and not can:
            raise ValueError(f"the policy at {client.address} cannot look ahead: leave ahead=True out")
        if ahead is None:
            ahead = can and execute is None
        self.client = client
        self._new_plan = partial(Plan, still, blend=blend, ahead=ahead, execute=execute)
        self._thread = ThreadPoolExecutor(1, "policy")
        self._request: Future[dict[str, Any]] | None = None
        self.reset()

    @property
    def latency(self) -> int:
        """Control steps from an observation to its answer, the last time."""
        return self._plan.latency

    def reset(self) -> None:
        """Begin an episode: forget the actions of the one before."""
        if self._request is not None:
            wait([self._request])  # its answer would be taken for one to this episode
        self._request, self._plan = None, self._new_plan()

    def act(self, observation: Mapping[str, Any]) -> np.ndarray | None:
        """Return the action (A,) of this control step; None: nothing is known yet and `still` is None."""
        if self._request is not None and self._request.done():
            answer, self._request = self._request, None
            try:
                self._plan.answer(answer.result()["actions"])
            except BaseException:
                self._plan.fail()  # raised once; the next step asks anew
                raise
        if (committed := self._plan.question()) is not None:
            extra = {COMMITTED_KEY: committed} if len(committed) else {}
            self._request = self._thread.submit(self.client.infer, {**observation, **extra})
        return self._plan.act()

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
