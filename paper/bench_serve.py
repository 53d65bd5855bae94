"""Load on `worldvla serve`: answers a second in batches and one at a time, in one run; or a soak.

    python -m paper.bench_serve                        # tabletop, 30 clients; the last line is JSON
    python -m paper.bench_serve --soak 30              # 50 clients, one that does not read, one hostile

The two servers take turns, a few rounds each. Clients live in this process, ask again as soon as they are
answered, and compare every answer with that of `Policy.act` for one observation. Everything stays on the
loopback device.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from worldvla.infer.model import Model, load
from worldvla.infer.policy import Policy
from worldvla.serve.protocol import MAX_BYTES, pack, unpack

NUM_OBSERVATIONS = 16
PING = b"\x89\xfd" + bytes(4 + 125)  # masked by zeros
OPTIONS: dict[str, Any] = {"compression": None, "max_size": MAX_BYTES, "proxy": None}


def observations(model: Model) -> list[dict[str, Any]]:
    """Return requests in openpi's words: blocks of colour under noise, states within the trained range."""
    rng, low, high = np.random.default_rng(0), *(np.array(v) for v in _state_range(model))
    texts = ["pick up the red cube", "push the green cube to the left", "open the drawer"]
    requests = []
    for i in range(NUM_OBSERVATIONS):
        frame = {}
        for view, (rows, cols) in model.view_sizes.items():
            blocks = rng.integers(0, 200, (4, 4, 3)).repeat(rows // 4, 0).repeat(cols // 4, 1)
            frame[view] = (blocks + rng.integers(0, 56, (rows, cols, 3))).astype(np.uint8)
        state = rng.uniform(low, high).astype(np.float32)
        requests.append({**frame, "state": state, "prompt": texts[i % len(texts)]})
    return requests


def _state_range(model: Model) -> tuple[Any, Any]:
    return model.builder.statistics.state_low, model.builder.statistics.state_high


@contextlib.contextmanager
def server(checkpoint: str, max_batch: int, log: Path) -> Iterator[tuple[str, int]]:
    """Run `worldvla serve` in another process; yield its address and process id."""
    code = (
        "import sys, worldvla.serve.server as s; s.serve_checkpoint(sys.argv[1], port=0, "
        "limits=s.Limits(max_batch=int(sys.argv[2])), on_start=lambda at: print(at, flush=True))"
    )
    words = [sys.executable, "-c", code, checkpoint, str(max_batch)]
    with log.open("ab") as errors, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().decode().strip(), process.pid
        finally:
            process.terminate()


class Load:
    """Clients in a closed loop, and what became of their requests."""

    def __init__(self, at: str, requests: list[bytes], expected: np.ndarray) -> None:
        self.at, self.requests, self.expected = at, requests, expected
        self.latencies: list[float] = []
        self.counts: Counter[str] = Counter()
        self.timing: list[dict[str, float]] = []

    async def client(self, index: int, stop: float) -> None:
        """Ask until `stop`; an error of the connection counts as one wrong answer and ends the client."""
        try:
            async with connect(f"ws://{self.at}", **OPTIONS) as connection:
                await connection.recv()
                while time.monotonic() < stop:
                    index = (index + 7) % len(self.requests)
                    await self._ask(connection, index)
        except (OSError, WebSocketException, ValueError):
            self.counts["broken"] += 1

    async def _ask(self, connection: ClientConnection, index: int) -> None:
        start = time.monotonic()
        await connection.send(self.requests[index])
        answer = unpack(await connection.recv())
        self.latencies.append(time.monotonic() - start)
        self.timing.append(answer["server_timing"])
        is_right = np.array_equal(answer["actions"], self.expected[index])
        self.counts["right" if is_right else "wrong"] += 1

    def summary(self, seconds: float) -> dict[str, Any]:
        ms = 1000 * np.array(self.latencies)
        p50, p99 = np.percentile(ms, [50, 99])
        batch, queue = (np.array([t[key] for t in self.timing]) for key in ("batch", "queue_ms"))
        return {
            "answers_per_s": round(len(ms) / seconds, 2),
            "p50_ms": round(p50, 1),
            "p99_ms": round(p99, 1),
            "p99_over_p50": round(p99 / p50, 2),
            "queue_p50_ms": round(float(np.median(queue)), 1),
            "batch_mean": round(float(1 / (1 / batch).mean()), 2),
            "answers": len(ms),
            "wrong": self.counts["wrong"] + self.counts["broken"],
        }


async def round_of(load: Load, clients: int, seconds: float) -> None:
    stop = time.monotonic() + seconds
    await asyncio.gather(*(load.client(i, stop) for i in range(clients)))


def bench(args: argparse.Namespace, requests: list[bytes], expected: np.ndarray) -> dict[str, Any]:
    """Return the throughput of both servers, which take turns."""
    log = Path(args.log)
    with server(args.checkpoint, args.batch, log) as (a, _), server(args.checkpoint, 1, log) as (b, _):
        loads = {"batched": Load(a, requests, expected), "one_at_a_time": Load(b, requests, expected)}
        for name, load in loads.items():  # warm
            asyncio.run(round_of(Load(load.at, requests, expected), args.clients, 1))
            print(f"{name}: {load.at}", flush=True)
        spent = dict.fromkeys(loads, 0.0)
        for _ in range(args.rounds):
            for name, load in loads.items():
                start = time.monotonic()
                asyncio.run(round_of(load, args.clients, args.seconds))
                spent[name] += time.monotonic() - start
    result = {name: load.summary(spent[name]) for name, load in loads.items()}
    faster = result["batched"]["answers_per_s"] / result["one_at_a_time"]["answers_per_s"]
    return {"clients": args.clients, "faster": round(faster, 2), "cores": os.cpu_count(), **result}


def hostile_messages() -> list[bytes | str]:
    """Return what servers broke on: long texts, many small things, garbage."""
    empty = np.zeros(0, np.uint8)
    return [
        pack({"prompt": "a" * 10**6}),
        pack({"prompt": "a" * (15 * 10**6)}),
        b"\xff" * (15 * 2**20),
        b"\xdd" + (15_900_000).to_bytes(4, "big") + b"\x90" * 15_900_000,
        pack({"prompt": "go", "x": [empty] * 20_000}),
        msgpack.packb({str(i): i for i in range(10**6)}) or b"",
        b"\x91" * 900_000,
        b"",
        "text",
        pack({"prompt": "go", "agentview": np.zeros((8, 8, 3), np.uint8)}),
    ]


async def hostile(at: str, stop: float) -> int:
    """Send one bad message a connection, again and again; return how many."""
    messages, count = hostile_messages(), 0
    while time.monotonic() < stop:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5), raw_websocket(at) as (reader, writer):
                writer.write(frame(messages[count % len(messages)]))
                await writer.drain()
                while await reader.read(2**16):
                    pass
        count += 1
        await asyncio.sleep(0.2)
    return count


async def never_reads(at: str, request: bytes, stop: float) -> None:
    """Send requests and pings and read nothing until the server hangs up; then again."""
    while time.monotonic() < stop:
        with contextlib.suppress(OSError, TimeoutError):
            async with raw_websocket(at) as (reader, writer):
                while time.monotonic() < stop and not reader.at_eof():
                    writer.write(frame(request) + PING * 100)
                    async with asyncio.timeout(30):
                        await writer.drain()
                    await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def raw_websocket(at: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a websocket without a library that would keep its rules; a reader that holds 64 KiB."""
    reader, writer = await asyncio.open_connection(*at.split(":"), limit=2**15)
    key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key += "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
    try:
        writer.write(f"GET / HTTP/1.1\r\nHost: {at}\r\n{key}\r\n".encode())
        yield reader, writer
    finally:
        writer.close()


def frame(message: bytes | str) -> bytes:
    """Return a whole frame from a client, its mask zeros."""
    kind, data = (b"\x81", message.encode()) if isinstance(message, str) else (b"\x82", message)
    return kind + b"\xff" + len(data).to_bytes(8, "big") + bytes(4) + data


def health(at: str, stop: float) -> list[float]:
    """Ask /healthz twice a second, from a process of its own; return its latencies in ms, infinity where it
    did not answer OK.
    """
    latencies = []
    while time.monotonic() < stop:
        start = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://{at}/healthz", timeout=30) as response:
                is_ok = response.status == 200
        except OSError:
            is_ok = False
        latencies.append(1000 * (time.monotonic() - start) if is_ok else np.inf)
        time.sleep(0.5)
    return latencies


async def memory(pid: int, stop: float) -> list[float]:
    """Return the server's resident memory in MB, twice a second."""
    sizes = []
    while time.monotonic() < stop:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        await asyncio.sleep(0.5)
    return sizes


def soak(args: argparse.Namespace, requests: list[bytes], expected: np.ndarray) -> dict[str, Any]:
    """Return what 50 clients, /healthz and the memory saw beside one that does not read and a hostile one."""

    async def run(at: str, pid: int) -> dict[str, Any]:
        load, seconds = Load(at, requests, expected), 60 * args.soak
        await round_of(load, 50, min(10.0, seconds))  # warm: memory has its size then
        load = Load(at, requests, expected)
        stop = time.monotonic() + seconds
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # waits for no client here
            others = (
                never_reads(at, requests[0], stop),
                hostile(at, stop),
                asyncio.get_running_loop().run_in_executor(pool, health, at, stop),
                memory(pid, stop),
            )
            _, _, bad, ms, mb = await asyncio.gather(round_of(load, 50, seconds), *others)
        third = len(mb) // 3
        return {
            "minutes": args.soak,
            **load.summary(seconds),
            "hostile_messages": bad,
            "healthz_max_ms": round(max(ms), 1),
            "healthz_p99_ms": round(float(np.percentile(ms, 99)), 1),
            "memory_mb_thirds": [round(max(mb[i * third : (i + 1) * third]), 1) for i in range(3)],
        }

    with server(args.checkpoint, args.batch, Path(args.log)) as (at, pid):
        return asyncio.run(run(at, pid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", default="tabletop")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16, help="largest batch")
    parser.add_argument("--seconds", type=float, default=10, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=float, default=0, help="minutes; 0: the load benchmark")
    parser.add_argument("--log", default=os.devnull, help="what the servers write")
    args = parser.parse_args()
    model = load(args.checkpoint)
    plain = observations(model)
    policy = Policy(model)
    expected = np.stack([policy.act({**request, "instruction": request["prompt"]}) for request in plain])
    result = (soak if args.soak else bench)(args, [pack(request) for request in plain], expected)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
