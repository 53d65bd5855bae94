"""The page on which a world model is played, and the websocket that it talks to: `worldvla play`.

    asyncio.run(serve(open_playable(worldvla.load("tabletop")), Start("tabletop_object", 0), on_start=print))

GET / is the page; /socket the websocket. The page sends JSON with a `type`:
  start {suite, task, init}   move {right, away, up, turn}: keys held, numbers in [-1, 1]
  drive {driver: person | policy}   gripper   step   pause {on}   simulator {on}   reality   record {on}
The server sends JSON, `hello` first (what can be played), then `notice`, `error`, `recorded`; and frames as
binary messages: 4 bytes, little endian, the length of a JSON header, the header, then RGBA of each picture
that its `pictures` list, [world, view, rows, columns]. Inputs never queue: the latest of each type wins.
"""

import asyncio
import contextlib
import errno
import hmac
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from aiohttp import WSCloseCode, WSMsgType, web

from worldvla.machine import is_loopback
from worldvla.serve.play.session import MAX_RECORDED, Playable, Recording, Session
from worldvla.sim.protocol import NUM_INITS

PORT = 8010
MAX_MESSAGE = 4096
"""Bytes of a message from the page."""
MAX_SESSIONS = 4
HEARTBEAT_S = 20
PAGE = {"": "page.html", "page.js": "page.js", "page.css": "page.css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold the key
    "Cache-Control": "no-store",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    suite: str
    task: int = 0
    init: int = 0


async def serve(
    playable: Playable,
    start: Start,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    api_key: str = "",
    threads: int = 1,
    out: Path = Path("out/play"),
    save_dataset: Path | None = None,
    on_start: Callable[[str], Any] = log.info,
) -> None:
    """Serve the page until cancelled or SIGTERM; `on_start` gets its address, for port 0 that of a free port.

    `threads`: of inference, which all sessions share; a small model is fastest on one. `save_dataset`: record
    every episode from its start on, and write it there as a demonstration in place of a film in `out`.
    """
    is_local = is_loopback(host)
    if not (api_key or is_local):
        raise ValueError(f"anyone who reaches {host} could play and write recordings: set WORLDVLA_API_KEY")
    with ThreadPoolExecutor(1, "imagine", torch.set_num_threads, (threads,)) as thread:
        house = _House(playable, start, out, save_dataset, thread, api_key, is_local)
        runner = web.AppRunner(house.app(), access_log=None, shutdown_timeout=2)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                raise ValueError(
                    f"port {port} is in use: choose another with --port, or 0 for a free one"
                ) from None
            on_start(f"http://{host}:{runner.addresses[0][1]}/")
            stop = asyncio.Event()
            if threading.current_thread() is threading.main_thread():
                asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            await stop.wait()
        finally:
            await runner.cleanup()


class _House:
    """What all sessions of a server share."""

    def __init__(
        self,
        playable: Playable,
        start: Start,
        out: Path,
        save_dataset: Path | None,
        thread: ThreadPoolExecutor,
        api_key: str,
        is_local: bool,
    ) -> None:
        self.playable, self.start, self.out, self.thread = playable, start, out, thread
        self.save_dataset = save_dataset
        self.api_key, self.is_local = api_key, is_local
        self.connections: set[web.WebSocketResponse] = set()
        self.recordings: dict[str, Path] = {}
        """Address below /recordings/ -> file."""
        self.writing = asyncio.Lock()

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                *(web.get(f"/{path}", partial(_file, Path(__file__).parent / f)) for path, f in PAGE.items()),
                web.get("/healthz", _healthz),
                web.get("/socket", self._socket),
                web.get("/recordings/{folder}/{file}", self._recording),
            ]
        )
        app.on_shutdown.append(self._goodbye)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Turn away pages of other sites, names of this machine that others chose, and those without key."""
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text=f"a page from {origin} may not play here\n")
        if self.is_local and not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            raise web.HTTPForbidden(text=f"{request.host} is not this machine: open http://127.0.0.1\n")
        is_open = request.path in ("/healthz", "/page.js", "/page.css")
        key = request.query.get("key", "").encode(errors="replace")
        if self.api_key and not is_open and not hmac.compare_digest(key, self.api_key.encode()):
            raise web.HTTPUnauthorized(text="add ?key=KEY, the server's WORLDVLA_API_KEY, to the address\n")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(HEADERS)
        return response

    async def _recording(self, request: web.Request) -> web.StreamResponse:
        path = self.recordings.get(f"{request.match_info['folder']}/{request.match_info['file']}")
        if path is None or not path.is_file():
            raise web.HTTPNotFound(text="no such recording\n")
        return web.FileResponse(path)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE, heartbeat=HEARTBEAT_S, compress=False)
        await socket.prepare(request)
        if len(self.connections) >= MAX_SESSIONS:
            text = f"{MAX_SESSIONS} people play already: close a page, then reload this one"
            await socket.send_json({"type": "error", "text": text})
            await socket.close(code=WSCloseCode.TRY_AGAIN_LATER)
            return socket
        self.connections.add(socket)
        try:
            await _Connection(self, socket).run()
        finally:
            self.connections.discard(socket)
        return socket

    async def _goodbye(self, _: web.Application) -> None:
        for socket in list(self.connections):
            await socket.close(code=WSCloseCode.GOING_AWAY)


async def _file(path: Path, _: web.Request) -> web.StreamResponse:
    return web.FileResponse(path)


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="OK\n")


class _Connection:
    """One page. A reader notes what it wants, the loop does it and steps; inference is in the thread."""

    def __init__(self, house: _House, socket: web.WebSocketResponse) -> None:
        self.house, self.socket = house, socket
        self.session: Session | None = None
        self.wanted: dict[str, dict[str, Any]] = {}
        """Type -> the latest message of it that is still to be done."""
        self.wake = asyncio.Event()
        self.is_paused = False
        self.move = (0.0, 0.0, 0.0, 0.0)

    async def run(self) -> None:
        """Serve until the page leaves; whatever fails is one line on it."""
        await self.socket.send_json(self._hello())
        playing = asyncio.create_task(self._play())
        reading = asyncio.create_task(self._read())
        try:
            await asyncio.wait({playing, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in (playing, reading):
                if task.done() and (error := task.exception()) is not None:
                    raise error
        except ConnectionError:
            pass  # the page has gone
        except Exception as error:  # the process boundary: this page gets one line, others play on
            log.warning("a session ended: %s", error, exc_info=not isinstance(error, ValueError))
            with contextlib.suppress(ConnectionError):
                await self._say("error", f"{type(error).__name__}: {' '.join(str(error).split())}")
                await self.socket.close(code=WSCloseCode.INTERNAL_ERROR)
        finally:
            for task in (playing, reading):
                task.cancel()
            await asyncio.gather(playing, reading, return_exceptions=True)
            if self.session is not None:
                await self._finish_recording()
                await self._in_thread(self.session.close)

    def _hello(self) -> dict[str, Any]:
        playable, start = self.house.playable, self.house.start
        return {
            "type": "hello",
            "model": playable.model.identity(),
            "simulator": playable.simulator,
            "rate": playable.rate,
            "temperature": playable.temperature,
            "suites": {name: [t.instruction for t in tasks] for name, tasks in playable.tasks.items()},
            "inits": NUM_INITS,
            "views": {view: list(size) for view, size in playable.model.view_sizes.items()},
            "start": {"suite": start.suite, "task": start.task, "init": start.init},
        }

    async def _read(self) -> None:
        async for message in self.socket:
            if message.type != WSMsgType.TEXT:
                raise ValueError("a message of the page must be JSON text")
            kind, wish = read_message(message.data)
            if kind == "move":
                self.move = wish["move"]
                if self.session is not None:
                    self.session.move = self.move
                    if any(self.move) and self.session.driver == "policy":
                        self.wanted["drive"] = {"driver": "person"}
            elif kind == "gripper" and kind in self.wanted:
                del self.wanted[kind]  # twice is as it was
            else:
                self.wanted[kind] = wish
            self.wake.set()

    async def _play(self) -> None:
        """Do what is wanted, then step at most at the control rate; sleep while nothing moves."""
        period = 1 / self.house.playable.rate
        while True:
            await self.wake.wait()
            began = time.monotonic()
            wanted, self.wanted = self.wanted, {}
            is_single = "step" in wanted
            for kind, wish in wanted.items():
                await self._do(kind, wish)
            session = self.session
            if session is None or not (is_single or (session.is_moving and not self.is_paused)):
                if wanted and session is not None:
                    await self._send_frame(session)
                if not self.wanted:
                    self.wake.clear()
                continue
            try:
                await self._in_thread(session.step)
            except ValueError as error:  # such as an instruction that is too long for the policy
                session.drive("person")
                await self._say("error", str(error))
            await self._send_frame(session)
            if session.recording and len(session.recording.actions) >= MAX_RECORDED:
                await self._finish_recording()
            await asyncio.sleep(max(0.0, began + period - time.monotonic()))

    async def _do(self, kind: str, wish: dict[str, Any]) -> None:
        if kind == "start":
            await self._start(Start(wish["suite"], wish["task"], wish["init"]))
        if kind == "pause":
            self.is_paused = wish["on"]
        if (session := self.session) is None:
            return
        if kind == "drive":
            session.drive(wish["driver"])
        elif kind == "gripper":
            session.drive("person")
            session.toggle_gripper()
        elif kind == "simulator":
            await self._in_thread(session.show, wish["on"])
        elif kind == "reality":
            await self._in_thread(session.back_to_reality)
        elif kind == "record" and wish["on"]:
            session.record()
        elif kind == "record":
            await self._finish_recording()

    async def _start(self, start: Start) -> None:
        await self._finish_recording()
        place = (start.suite, start.task, start.init)
        try:
            if self.session is None:
                session: Session = await self._in_thread(Session, self.house.playable, *place)
                session.move, self.session = self.move, session
            else:
                await self._in_thread(self.session.start, *place)
        except ValueError as error:
            await self._say("error", str(error))
        if self.session is not None and self.house.save_dataset:
            self.session.record()

    async def _finish_recording(self) -> None:
        if self.session is None or (recording := self.session.stop_recording()) is None:
            return
        name = f"{recording.task.suite}_{recording.task.index}_{time.strftime('%Y%m%d_%H%M%S')}"
        out, is_demonstration = self.house.save_dataset or self.house.out, bool(self.house.save_dataset)
        async with self.house.writing:  # one finds the name free, and takes it, at a time
            folder, paths = await asyncio.to_thread(_write, recording, out, name, is_demonstration)
        files = {f"{folder.name}/{path.name}": path for path in paths}
        self.house.recordings |= files
        with contextlib.suppress(ConnectionError):
            steps = len(recording.actions)
            line = {"type": "recorded", "folder": str(folder), "files": list(files), "steps": steps}
            await self.socket.send_json(line)

    async def _send_frame(self, session: Session) -> None:
        await self.socket.send_bytes(frame_message(session, self.is_paused))

    async def _say(self, kind: str, text: str) -> None:
        await self.socket.send_json({"type": kind, "text": text})

    async def _in_thread(self, do: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.house.thread, partial(do, *args))


def _write(recording: Recording, out: Path, name: str, as_demonstration: bool) -> tuple[Path, list[Path]]:
    """Write a recording under `out`; return the folder and its new files."""
    suffix = "_demo.hdf5" if as_demonstration else ""
    path, number = out / f"{name}{suffix}", 2
    while path.exists():  # two of one second
        path, number = out / f"{name}-{number}{suffix}", number + 1
    if as_demonstration:
        return out, [recording.write_demonstration(path)]
    return path, sorted(recording.write(path).iterdir())


def read_message(text: str) -> tuple[str, dict[str, Any]]:
    """Return the type and the checked fields of a page's message; anything else raises ValueError."""
    try:
        message: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"a message of the page must be JSON, got {text[:40]!r}") from None
    kind: Any = message.get("type") if isinstance(message, dict) else None
    if kind in ("gripper", "step", "reality"):
        return kind, {}
    if kind in ("pause", "simulator", "record") and isinstance(message.get("on"), bool):
        return kind, {"on": message["on"]}
    if kind == "drive" and message.get("driver") in ("person", "policy"):
        return kind, {"driver": message["driver"]}
    if kind == "start" and isinstance(message.get("suite"), str):
        numbers: list[Any] = [message.get(name) for name in ("task", "init")]
        if all(type(number) is int for number in numbers):
            return kind, {"suite": message["suite"], "task": numbers[0], "init": numbers[1]}
    if kind == "move":
        values: list[Any] = [message.get(name) for name in ("right", "away", "up", "turn")]
        if all(type(v) in (int, float) and math.isfinite(v) and abs(v) <= 1 for v in values):
            return kind, {"move": tuple(map(float, values))}
    raise ValueError(f"the page sent {text[:80]!r}: expected a message as the head of server.py lists them")


def frame_message(session: Session, is_paused: bool) -> bytes:
    """Return the current pictures and their status as one binary message."""
    worlds = {"imagined": session.frame, "simulator": session.real if session.is_shown else None}
    listed, parts = [], []
    for world, frame in worlds.items():
        for view, image in (frame or {}).items():
            listed.append([world, view, *image.shape[:2]])
            parts.append(np.dstack([image, np.full(image.shape[:2], 255, dtype=np.uint8)]).tobytes())
    header = json.dumps({**session.status(), "paused": is_paused, "pictures": listed}).encode()
    return b"".join([len(header).to_bytes(4, "little"), header, *parts])
