"""A policy behind openpi's websocket protocol: openpi's clients drive it, and `worldvla eval websocket://...`.

    serve_checkpoint("tabletop", on_start=print)

The server speaks first, one frame of metadata; then each request, an observation, gets one answer: `actions`
float32 (U, 7) and `server_timing`. Whatever fails is one line in a text frame, and the connection is closed
(1011); a missed deadline leaves it open. `GET /healthz` says whether inference still answers, `/metrics` has
counts, queue and latency for Prometheus.

One client cannot stop the others. Every length is bounded before it costs work, a connection has one request
at a time, what is slow or silent is closed, and requests of all clients are answered in batches.
"""

import asyncio
import contextlib
import hmac
import http
import logging
import math
import resource
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from worldvla.image import MAX_PIXELS, as_uint8, resize_with_pad
from worldvla.machine import is_loopback, version
from worldvla.serve.batcher import SECONDS, Answer, Batcher, Histogram, LateError, Observation
from worldvla.serve.protocol import (
    COMMITTED_KEY,
    DEADLINE_KEY,
    HISTORY_KEY,
    IMAGE_KEYS,
    MAX_COMMITTED,
    PORT,
    PROMPT_KEY,
    STATE_KEY,
    UNNORM_KEY,
    pack,
    unpack,
)

PICTURE_ITEM_BYTES = 4
"""A colour of a picture: float32 is the widest that clients send."""
MESSAGE_BYTES, MESSAGE_ITEMS, MESSAGE_TEXT = 2**20, 256, 2**16
"""Bytes of a message beside its pictures, so many that a picture of the wrong size still gets a hint; lists
and maps of a message, and entries in each; bytes of a text."""
MAX_PROMPT = 4096
"""Letters of a prompt, whatever the tokenizer could take."""
OTHER_FILES = 128
"""Open files beside connections."""
MAX_UNSENT, MAX_LINE = 2**20, 500
"""Bytes that wait for a client that does not read; letters of an error."""
Address = tuple[str, int]
"""Host and port of a client."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedPolicy:
    """What is served."""

    act: Callable[[Sequence[Observation]], np.ndarray]
    """Observations, as `Policy.act` takes them, -> actions (B, U, 7)."""
    views: Mapping[str, tuple[int, int]]
    """View -> (rows, columns) in pixels that it reads."""
    check: Callable[[Observation], None] | None = None
    """Raises ValueError for an observation that `act` would refuse; in another thread than `act`."""
    num_state_dims: int = 8
    """0: it reads no state."""
    history: int = 1
    num_committed_dims: int = 0
    """Of an action that a robot executes before it has the answer (COMMITTED_KEY); 0: none are taken."""
    max_prompt: int = MAX_PROMPT
    """Letters of the longest prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resize: bool = False
    """Resize pictures of another size instead of refusing them."""

    @property
    def max_bytes(self) -> int:
        """Longest message, bytes: all pictures of a request, as floats, and a margin."""
        pixels = sum(MAX_PIXELS if self.resize else math.prod(size) for size in self.views.values())
        return 3 * pixels * PICTURE_ITEM_BYTES * self.history + MESSAGE_BYTES


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server puts up with. Times in seconds."""

    max_connections: int = 1000
    max_batch: int = 16
    """Requests that are answered together."""
    wait_s: float = 0.005
    """Longest wait of a request for company, while nothing else runs."""
    handshake_s: float = 10.0
    max_handshakes: int = 128
    """Connections that have not asked yet; of more, the oldest of the host with most is dropped."""
    idle_s: float = 600.0
    """Longest silence between an answer and the next request."""
    send_s: float = 20.0
    """Longest wait for a client that does not read its answer."""
    stall_s: float = 120.0
    """A batch that takes longer makes /healthz say so."""
    stop_s: float = 30.0
    """After SIGTERM, for what runs to finish."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_connections", "max_handshakes"):
            if (value := getattr(self, name)) < 1:  # a batch of none would be gathered for ever
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def serve_checkpoint(
    checkpoint: Path | str,
    *,
    head: str = "discrete",
    resize: bool = False,
    device: str = "cpu",
    quantize: Literal["", "int8", "int4"] = "",
    unnorm_key: str = "",
    **options: Any,
) -> None:
    """Serve a checkpoint until interrupted; `options` as of `serve`, `head` as of `Model.policy`.

    Of a model of several datasets each request names one, unless `unnorm_key` does for all.
    """
    from worldvla.infer.ahead import can_look_ahead
    from worldvla.infer.model import load
    from worldvla.serve.exact import BatchedPolicy

    model = load(checkpoint, device, quantize=quantize, unnorm_key=unnorm_key)
    layout = model.config.layout
    policy = BatchedPolicy(model, head)
    metadata = {
        **{key: value for key, value in model.identity().items() if key != "path"},
        **({"features": model.manifest["features"]} if "features" in model.manifest else {}),
        "quantize": quantize,
        **({"unnorm_keys": model.unnorm_keys} if model.unnorm_keys else {}),
        "chunk": layout.chunk,
        "history": layout.history,
        "looks_ahead": can_look_ahead(model),
        "head": head,
        "decoding": policy.alone.decoding,
        "views": {view: list(size) for view, size in model.view_sizes.items()},
        "worldvla": version("worldvla"),
    }
    served = ServedPolicy(
        act=policy.act,
        check=policy.check,
        views=model.view_sizes,
        num_state_dims=layout.num_state_dims if layout.state else 0,
        history=layout.history,
        num_committed_dims=layout.num_action_dims if metadata["looks_ahead"] else 0,
        max_prompt=min(policy.max_prompt, MAX_PROMPT),
        metadata=metadata,
        resize=resize,
    )
    asyncio.run(serve(served, **options))


async def serve(
    served: ServedPolicy,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_key: str = "",
    insecure: bool = False,
    certificate: Path | None = None,
    key_file: Path | None = None,
    limits: Limits | None = None,
    on_start: Callable[[str], Any] = log.info,
) -> None:
    """Answer until cancelled or SIGTERM, which lets what runs finish and closes connections (1001).

    `on_start` gets the address, for port 0 that of a free port. Other machines are let in with an `api_key`
    alone, or `insecure`. `certificate`, `key_file`: PEM files, for wss://.
    """
    if not (api_key or insecure or is_loopback(host)):
        raise ValueError(
            f"whoever reaches {host or 'this machine'} could drive the robot: set the environment variable "
            "WORLDVLA_API_KEY, or --insecure"
        )
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be in 0..65535 (0: a free one), got {port}")
    limits = limits or Limits()
    _allow_files(limits.max_connections + limits.max_handshakes + OTHER_FILES)
    tls = _tls(certificate, key_file)
    serving = _Serving(served, api_key, limits)
    door = _Door(host, port, serving.greet)
    stop = asyncio.Event()
    tasks = [asyncio.create_task(work) for work in (serving.batcher.run(), serving.watch(), stop.wait())]
    try:
        async with listen(
            serving.converse,
            sock=door,
            process_request=serving.admit,
            create_connection=partial(_Connection, serving),  # pyright: ignore[reportArgumentType]
            origins=[None],  # a browser says where its page is from; no page of ours asks
            compression=None,
            max_size=served.max_bytes,
            max_queue=1,
            open_timeout=limits.handshake_s,
            close_timeout=2,
            ssl=tls,
            ssl_handshake_timeout=limits.handshake_s if tls else None,
        ) as server:
            if threading.current_thread() is threading.main_thread():
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            on_start(f"{host}:{server.sockets[0].getsockname()[1]}")
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await serving.stop(server)
            for task in done:
                task.result()  # none but that of `stop` ends, unless it broke
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        serving.readers.shutdown()
        door.close()


class _Door(socket.socket):
    """A socket that listens, and shows whoever comes in from the first moment, before TLS has begun."""

    def __init__(self, host: str, port: int, greet: Callable[[socket.socket, "Address"], None]) -> None:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        super().__init__(family, kind, protocol)
        self.greet = greet
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.bind(address)
        except OSError as error:
            self.close()
            raise OSError(
                error.errno, f"cannot listen on {host}:{port}: {error.strerror}: choose another --port"
            ) from None

    def accept(self) -> tuple[socket.socket, Any]:
        visitor, address = super().accept()
        self.greet(visitor, address[:2])
        return visitor, address


class _Connection(ServerConnection):
    """A connection that is no longer counted once it is lost."""

    def __init__(self, serving: "_Serving", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.serving = serving

    def connection_lost(self, exc: Exception | None) -> None:
        self.serving.connections.discard(self)
        super().connection_lost(exc)


class _Serving:
    """One server's connections."""

    def __init__(self, served: ServedPolicy, api_key: str, limits: Limits) -> None:
        self.served, self.api_key, self.limits = served, api_key, limits
        self.batcher = Batcher(served.act, limits.max_batch, limits.wait_s)
        self.readers = ThreadPoolExecutor(1, "reader")
        self.connections: set[ServerConnection] = set()
        self.handshakes: dict[Address, socket.socket] = {}
        """Who has come in and has not asked yet, the oldest first."""
        self.running = 0
        """Requests between their arrival and the end of their answer."""
        self.is_stopping = False
        self.outcomes = dict.fromkeys(("answered", "refused", "failed", "late", "left"), 0)
        self.turned_away = dict.fromkeys(("key", "full", "handshake"), 0)
        self.request_s = Histogram(SECONDS)

    def admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answer plain HTTP, and let in whom there is room for; None: a websocket may open."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            trouble = self.trouble()
            status = http.HTTPStatus.SERVICE_UNAVAILABLE if trouble else http.HTTPStatus.OK
            return connection.respond(status, f"{trouble or 'OK'}\n")
        keys = request.headers.get_all("Authorization") or [""]
        expected, sent = f"Api-Key {self.api_key}".encode(), keys[0].encode(errors="replace")
        if self.api_key and not hmac.compare_digest(sent, expected):
            self.turned_away["key"] += 1
            line = "send the header 'Authorization: Api-Key KEY' with the server's key\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, line)
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self.metrics())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if self.is_stopping or len(self.connections) >= self.limits.max_connections:
            self.turned_away["full"] += 1
            line = f"{len(self.connections)} clients are connected, no more are let in: come again later\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, line)
        self.handshakes.pop(connection.remote_address[:2], None)
        self.connections.add(connection)
        return None

    def greet(self, visitor: socket.socket, address: Address) -> None:
        """Count who comes in; of too many, shut out the oldest of the host with most."""
        self.handshakes = {at: other for at, other in self.handshakes.items() if other.fileno() >= 0}
        self.handshakes[address] = visitor
        if len(self.handshakes) > self.limits.max_handshakes:
            (most, _), *_ = Counter(host for host, _ in self.handshakes).most_common(1)
            oldest = next(at for at in self.handshakes if at[0] == most)
            self.turned_away["handshake"] += 1
            with contextlib.suppress(OSError):  # it has left by itself
                self.handshakes.pop(oldest).shutdown(socket.SHUT_RDWR)

    def trouble(self) -> str:
        """Return why requests are not answered; empty while they are."""
        if self.is_stopping:
            return "the server stops"
        if self.batcher.busy_s > self.limits.stall_s:
            return f"inference has not answered for {self.batcher.busy_s:.0f} s"
        failures = self.batcher.failures
        return f"inference failed {failures} times in succession" if failures >= 3 else ""

    def metrics(self) -> str:
        """Return the counts in Prometheus' text format."""
        lines = ["# TYPE worldvla_requests_total counter"]
        lines += [f'worldvla_requests_total{{outcome="{k}"}} {n}' for k, n in self.outcomes.items()]
        lines += ["# TYPE worldvla_turned_away_total counter"]
        lines += [f'worldvla_turned_away_total{{reason="{k}"}} {n}' for k, n in self.turned_away.items()]
        for name, value in (("connections", len(self.connections)), ("waiting_requests", len(self.batcher))):
            lines += [f"# TYPE worldvla_{name} gauge", f"worldvla_{name} {value}"]
        lines += self.batcher.sizes.lines("worldvla_batch_size")
        lines += self.batcher.queue_s.lines("worldvla_queue_seconds")
        lines += self.request_s.lines("worldvla_request_seconds")
        return "\n".join(lines) + "\n"

    async def watch(self) -> None:
        """Drop clients that let answers, to pings too, pile up unread."""
        while True:
            await asyncio.sleep(1)
            for connection in list(self.connections):
                if connection.transport.get_write_buffer_size() > MAX_UNSENT:
                    connection.transport.abort()

    async def stop(self, server: Server) -> None:
        """Let what runs finish, then close every connection."""
        self.is_stopping = True
        until = time.monotonic() + self.limits.stop_s
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.01)
        server.close(code=CloseCode.GOING_AWAY, reason="the server stops")
        await server.wait_closed()

    async def converse(self, connection: ServerConnection) -> None:
        """Answer one client, one request at a time, until it leaves or an error ends the conversation."""
        has_asked = False
        try:
            await self._send(connection, pack(dict(self.served.metadata)))
            timing: dict[str, float] = {}
            while not self.is_stopping:
                try:
                    async with asyncio.timeout(self.limits.idle_s):
                        data = await connection.recv()
                except TimeoutError:
                    line = f"no request in {self.limits.idle_s:g} s: connect again"
                    await connection.close(CloseCode.GOING_AWAY, line)
                    return
                self.batcher.active += not has_asked
                has_asked, self.running = True, self.running + 1
                try:
                    timing = await self._reply(connection, data, timing)
                finally:
                    self.running -= 1
            await connection.close(CloseCode.GOING_AWAY, "the server stops")
        except ConnectionClosed:
            return
        except Exception as error:  # the process boundary: its client gets one line, the others their answers
            await self._fail(connection, error)
        finally:
            self.connections.discard(connection)
            self.batcher.active -= has_asked

    async def _reply(
        self, connection: ServerConnection, data: bytes | str, before: Mapping[str, float]
    ) -> dict[str, float]:
        """Answer one request; return its timing, of which the next answer tells the total."""
        start = time.monotonic()
        loop = asyncio.get_running_loop()
        observation, patience_s = await loop.run_in_executor(self.readers, read_request, data, self.served)
        try:
            work = self.batcher.ask(observation, start + patience_s)
            answer = await self._unless_it_leaves(connection, work)
        except LateError as error:
            self.outcomes["late"] += 1
            await self._send(connection, str(error))
            return {}
        timing = {
            "infer_ms": 1000 * answer.infer_s,
            "queue_ms": 1000 * answer.queue_s,
            "batch": answer.batch,
            **({"prev_total_ms": before["total_ms"]} if before else {}),
        }
        await self._send(connection, pack({"actions": answer.actions, "server_timing": timing}))
        total_s = time.monotonic() - start
        self.request_s.add(total_s)
        self.outcomes["answered"] += 1
        return {"total_ms": 1000 * total_s}

    async def _unless_it_leaves(self, connection: ServerConnection, work: Awaitable[Answer]) -> Answer:
        """Return the answer; if its client leaves meanwhile, drop the work and raise ConnectionClosed."""
        answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(connection.wait_closed())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            self.outcomes["left"] += 1
            raise connection.protocol.close_exc
        finally:
            answer.cancel()
            gone.cancel()

    async def _send(self, connection: ServerConnection, message: bytes | str) -> None:
        """Send, or drop a client that does not read."""
        try:
            async with asyncio.timeout(self.limits.send_s):
                await connection.send(message)
        except TimeoutError:
            connection.transport.abort()
            await connection.wait_closed()

    async def _fail(self, connection: ServerConnection, error: Exception) -> None:
        is_ours = not isinstance(error, ValueError)
        self.outcomes["failed" if is_ours else "refused"] += 1
        line = " ".join(f"{type(error).__name__ + ': ' if is_ours else ''}{error}".split())
        line = line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..."
        log.warning("%s: %s", connection.remote_address, line, exc_info=error if is_ours else None)
        with contextlib.suppress(ConnectionClosed):
            await self._send(connection, line)
            await connection.close(CloseCode.INTERNAL_ERROR, "the frame before says why")


def read_request(data: bytes | str, served: ServedPolicy) -> tuple[Observation, float]:
    """Return the observation in a request, as `Policy.act` takes it, and the seconds that an answer may take
    (infinity: any time); a bad request raises ValueError. Keys are openpi's or ours.

    A policy with a history wants the pictures of the steps just before (`previous`): those of the requests
    before would be as many steps apart as the client executes actions, where training had one.
    """
    message = unpack(data, MESSAGE_ITEMS, MESSAGE_TEXT)
    if not isinstance(message, dict):
        raise ValueError(f"a request must be a map, got {type(message).__name__}")
    observation: Observation = {**_frame(message, served), "instruction": _prompt(message, served)}
    if served.num_state_dims:
        observation["state"] = _state(message, served.num_state_dims)
    if served.history > 1:
        observation["previous"] = _previous(message, served)
    if COMMITTED_KEY in message:
        observation["committed"] = _committed(message[COMMITTED_KEY], served.num_committed_dims)
    if UNNORM_KEY in message:
        observation["unnorm_key"] = message[UNNORM_KEY]
    if served.check is not None:
        served.check(observation)
    return observation, _patience_s(message)


def _pick(message: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        if key in message:
            return message[key]
    raise ValueError(
        f"an observation needs {' or '.join(map(repr, keys))}, got the keys {sorted(map(str, message))}"
    )


def _frame(message: Mapping[str, Any], served: ServedPolicy) -> dict[str, np.ndarray]:
    frame = {}
    for view, size in served.views.items():
        key = IMAGE_KEYS.get(view, view)
        try:
            image = as_uint8(_pick(message, key, view))
        except ValueError as error:
            raise ValueError(f"{key} must be a picture of {size[0]} x {size[1]} pixels, {error}") from None
        rows, cols = image.shape[:2]
        if (rows, cols) != size and not served.resize:
            raise ValueError(
                f"{key} must be a picture of {size[0]} x {size[1]} pixels, got {rows} x {cols}: "
                "render it at that size, or start the server with --resize"
            )
        if rows * cols > max(MAX_PIXELS, math.prod(size)):
            raise ValueError(f"{key} has {rows} x {cols} pixels, at most {MAX_PIXELS} are read: send fewer")
        frame[view] = resize_with_pad(image, *size)
    return frame


def _prompt(message: Mapping[str, Any], served: ServedPolicy) -> str:
    text = _pick(message, PROMPT_KEY, "instruction")
    if not isinstance(text, str) or not text:
        raise ValueError(f"{PROMPT_KEY} must be a text that is not empty, got {text!r:.60}")
    if len(text) > served.max_prompt:
        raise ValueError(
            f"{PROMPT_KEY} has {len(text)} letters, expected at most {served.max_prompt}: shorten it"
        )
    return text


def _state(message: Mapping[str, Any], num_dims: int) -> np.ndarray:
    """Return the state, float32 (S,); openpi's clients send float64, its server takes integers and lists."""
    value = _pick(message, STATE_KEY, "state")
    is_plain = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    state = np.array(value, dtype=np.float64) if is_plain else value
    if not isinstance(state, np.ndarray) or state.shape != (num_dims,) or state.dtype.kind not in "fiu":
        got = f"{state.dtype} {state.shape}" if isinstance(state, np.ndarray) else type(state).__name__
        raise ValueError(f"{STATE_KEY} must be {num_dims} numbers of shape ({num_dims},), got {got}")
    if not _is_finite(state):
        raise ValueError(f"{STATE_KEY} must be finite, got {state.tolist()}")
    return state.astype(np.float32)


def _previous(message: Mapping[str, Any], served: ServedPolicy) -> list[dict[str, np.ndarray]]:
    frames = message.get(HISTORY_KEY)
    if frames is None:
        raise ValueError(
            f"this policy reads {served.history} frames, one step apart: send those just before as "
            f"{HISTORY_KEY!r}, a list of maps of pictures, oldest first, empty at an episode's first step; "
            "or serve a model with layout.history 1"
        )
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{HISTORY_KEY} must be a list of maps of pictures, got {type(frames).__name__}")
    return [_frame(frame, served) for frame in frames[max(0, len(frames) - served.history + 1) :]]


def _committed(value: Any, num_dims: int) -> np.ndarray:
    """Return the actions under way, float32 (D, A)."""
    if not num_dims:
        raise ValueError(
            f"this policy cannot look ahead: its model imagines no states or reads a history; leave "
            f"{COMMITTED_KEY!r} out (AsyncClient: ahead=False)"
        )
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.ndim == 2
    if not is_array or value.shape[1] != num_dims or len(value) > MAX_COMMITTED:
        got = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(
            f"{COMMITTED_KEY} must be at most {MAX_COMMITTED} actions, numbers of shape (D, {num_dims}), "
            f"got {got}"
        )
    if not _is_finite(value):
        raise ValueError(f"{COMMITTED_KEY} must be finite, got {value.tolist()}")
    return value.astype(np.float32)


def _is_finite(array: np.ndarray) -> bool:
    """Return whether all numbers are finite in float32, too; NaN is not."""
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())


def _patience_s(message: Mapping[str, Any]) -> float:
    value = message.get(DEADLINE_KEY)
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not value > 0:
        raise ValueError(f"{DEADLINE_KEY} must be milliseconds above 0, got {value!r:.60}")
    return float(value) / 1000


def _allow_files(number: int) -> None:
    """Let this process open so many files; where the system does not, raise ValueError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if most < number:
        raise ValueError(
            f"so many connections need {number} open files, the system allows {hard}: lower "
            "--max-connections, or raise `ulimit -Hn`"
        )
    if soft != resource.RLIM_INFINITY and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))


def _tls(certificate: Path | None, key_file: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key_file is None:
        return None
    if certificate is None or key_file is None:
        raise ValueError("TLS needs both --certificate and --key-file, PEM files")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key_file)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"no TLS by {certificate} and {key_file} ({error}): give PEM files that belong together"
        ) from None
    return context
