"""Our server answers openpi's clients in batches as it would answer each alone, says what is wrong in one
line, and no client stops it.

Run: pytest tests/test_serve.py
"""

import ast
import asyncio
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from fake_env import TABLE
from policy_server import image, policy_process, policy_server, request
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import worldvla
from worldvla.config import ImageTokenizerConfig
from worldvla.eval.actors import ActorError, Query
from worldvla.eval.remote import RemoteActor
from worldvla.files import ASSETS
from worldvla.infer.model import load, weights_digest
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.serve import exact
from worldvla.serve.client import Client, ServerError
from worldvla.serve.exact import BatchedPolicy, CarefulTokenizer
from worldvla.serve.protocol import IMAGE_KEYS, PROMPT_KEY, STATE_KEY, pack, unpack
from worldvla.serve.server import Limits, ServedPolicy, read_request, serve, serve_checkpoint
from worldvla.tokenizers.image import ImageTokenizer, VectorQuantizer


@pytest.fixture(scope="module")
def right() -> Iterator[str]:
    with policy_server() as at:
        yield at


def ask(connection: ClientConnection, message: Any) -> dict[str, Any]:
    connection.send(pack(message))
    return unpack(connection.recv())


def fetch(at: str, path: str = "/healthz") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{at}{path}", timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_speaks_first_and_answers_both_vocabularies(right: str) -> None:
    with connect(f"ws://{right}") as connection:
        assert unpack(connection.recv()) == {"name": "right", "views": {"agentview": [4, 4]}}
        first = ask(connection, request())
        assert first["actions"].shape == (5, 7)
        assert first["actions"][0].tolist() == pytest.approx([0.2, 3, 0.2, 0.2, 0.2, 0.2, 0.25])
        assert set(first["server_timing"]) == {"infer_ms", "queue_ms", "batch"}
        ours = {"agentview": image(9), "state": [0] * 8, "instruction": "go"}
        second = ask(connection, ours)
        assert second["actions"][0, 1] == 9
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
        lerobot = (image(7) / 255).astype(np.float32).transpose(2, 0, 1)
        third = ask(connection, request(**{"observation/image": lerobot, "observation/state": np.arange(8)}))
        assert third["actions"][0, [1, 6]].tolist() == [7, 0]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            request(**{"observation/image": image(side=5)}),
            r"observation/image .*4 x 4 pixels, got 5 x 5: render",
        ),
        (request(**{"observation/image": image(side=224)}), "got 224 x 224"),
        (request(**{"observation/image": image() * 1.0}), r"send floats in \[0, 1\]"),
        (request(**{"observation/state": np.zeros(7)}), r"observation/state .* \(8,\), got float64 \(7,\)"),
        (request(**{"observation/state": np.full(8, np.nan)}), "finite"),
        (request(**{"observation/state": np.full(8, 1e300)}), "finite"),
        (request(prompt=""), "prompt must be a text"),
        (request(prompt="a" * 5000), "prompt has 5000 letters, expected at most 4096"),
        (
            request(prompt="a" * 10**6),
            r"holds too much \(1000000 exceeds max_str_len.*: shorten the text, a prompt",
        ),
        (request(deadline_ms=-1), "deadline_ms must be milliseconds above 0, got -1"),
        ({"prompt": "go"}, r"needs 'observation/image' or 'agentview', got the keys \['prompt'\]"),
        ([1], "must be a map, got list"),
        ([[]] * 10**6, "holds too much .*: send pictures and other numbers as numpy arrays, not as lists"),
        (request(**{"observation/image": image().tolist()}), "got list: send an array, uint8"),
        (
            request(**{"observation/image": image(side=20).tolist()}),
            "holds too much .*: send pictures .* arrays",
        ),
        (b"\xdd\xff\xff\xff\xff", "holds too much"),
        (request(prompt="go", x=[np.zeros(0)] * 10_000), "holds too much .* as numpy arrays"),
        (dict.fromkeys(map(str, range(10**5))), "holds too much .*: leave out"),
        (b"\xc1", "not a msgpack message"),
        ("hello", "binary msgpack frame"),
        (request(prompt="raise"), "RuntimeError: the policy fell off"),
        (request(prompt="lose"), "RuntimeError: 0 answers to 1 requests"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_one_line_and_the_server_lives(right: str, message: Any, reason: str) -> None:
    with connect(f"ws://{right}") as other:
        other.recv()
        with connect(f"ws://{right}") as connection:
            connection.recv()
            connection.send(message if isinstance(message, str | bytes) else pack(message))
            line = connection.recv()
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
        assert "actions" in ask(other, request())
    assert isinstance(line, str)
    assert "\n" not in line
    assert "Traceback" not in line
    assert len(line) <= 500
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(line)


@pytest.mark.parametrize(
    "data",
    [b"\xff" * (15 * 2**20), pack({"prompt": "a" * (15 * 10**6)}), "a" * 2**21],
    ids=["ff", "prompt", "text"],
)
def test_messages_that_hold_more_than_the_pictures_are_refused(right: str, data: bytes | str) -> None:
    with connect(f"ws://{right}") as connection:
        connection.recv()
        with suppress(ConnectionClosed):
            connection.send(data)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009  # None: it hung up while we sent


def test_inference_does_not_block_the_server_and_what_a_client_left_is_dropped(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    with policy_server(limits={"stall_s": 0.5}) as at, connect(f"ws://{at}") as slow:
        slow.recv()
        slow.send(pack(request(prompt=f"await {tmp_path / 'go'}")))
        with pytest.raises(TimeoutError):
            slow.recv(timeout=0.1)
        for _ in range(3):
            with connect(f"ws://{at}") as leaving:
                leaving.recv()
                leaving.send(pack(request(prompt=f"count {counter}")))
        while "no" not in (health := fetch(at))[1]:  # not within 0.5 s
            assert health == (200, "OK\n")
            time.sleep(0.05)
        assert health[0] == 503
        (tmp_path / "go").touch()
        assert "actions" in unpack(slow.recv())
        assert "actions" in ask(slow, request(prompt=f"count {counter}"))
        assert fetch(at) == (200, "OK\n")
        assert 'requests_total{outcome="left"} 3' in fetch(at, "/metrics")[1]
    assert counter.read_text() == "1"


def test_requests_of_many_clients_are_answered_together(tmp_path: Path) -> None:
    """All that wait go in one batch; one that fails in it costs the others nothing."""
    with policy_server() as at, ExitStack() as stack:
        clients = [stack.enter_context(Client(f"ws://{at}")) for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            first = pool.submit(clients[0].infer, request(prompt=f"await {tmp_path / 'go'}"))
            time.sleep(0.3)
            prompts = ["go"] * 4 + ["raise"]
            rest = [
                pool.submit(c.infer, request(prompt=p)) for c, p in zip(clients[1:], prompts, strict=True)
            ]
            while "worldvla_waiting_requests 5" not in fetch(at, "/metrics")[1]:
                time.sleep(0.05)
            (tmp_path / "go").touch()
            assert first.result()["server_timing"]["batch"] == 1
            assert [f.result()["server_timing"]["batch"] for f in rest[:4]] == [5] * 4
            with pytest.raises(ServerError, match="RuntimeError: the policy fell off"):
                rest[4].result()
        metrics = fetch(at, "/metrics")[1]
    assert 'worldvla_requests_total{outcome="answered"} 5' in metrics
    assert 'worldvla_batch_size_bucket{le="8"} 2' in metrics
    assert "worldvla_queue_seconds_count 6" in metrics
    assert 'worldvla_request_seconds_bucket{le="+Inf"} 5' in metrics


def test_an_answer_after_the_deadline_is_an_error_and_the_next_is_not(right: str) -> None:
    with Client(f"ws://{right}") as client:
        assert "actions" in client.infer(request(), deadline_ms=10_000)
        with pytest.raises(ServerError, match=r"late by .* ms: send newer pictures"):
            client.infer(request(prompt="sleep 0.2"), deadline_ms=100)
        with Client(f"ws://{right}") as other, ThreadPoolExecutor(1) as pool:
            running = pool.submit(other.infer, request(prompt="sleep 0.4"))
            time.sleep(0.1)
            with pytest.raises(ServerError, match="late by"):
                client.infer(request(), deadline_ms=100)
            assert "actions" in running.result()
        assert "actions" in client.infer(request())


def test_idle_connections_and_clients_that_do_not_read_stop_nobody() -> None:
    """500 idle connections, one that never ends its handshake, one that pumps pings and reads nothing."""
    with policy_server(limits={"handshake_s": 4, "max_connections": 503}) as at, ExitStack() as stack:
        host, port = at.split(":")
        for _ in range(500):
            stack.enter_context(connect(f"ws://{at}", ping_interval=None)).recv()
        mute = stack.enter_context(socket.create_connection((host, int(port))))
        pump = stack.enter_context(socket.socket())
        pump.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pump.connect((host, int(port)))
        key = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        key += "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg=="
        pump.sendall(f"GET / HTTP/1.1\r\nHost: {at}\r\n{key}\r\n\r\n".encode())
        pump.settimeout(100)
        client = stack.enter_context(Client(f"ws://{at}"))
        with ThreadPoolExecutor(1) as pool:
            pumping = pool.submit(pump.sendall, (b"\x89\xfd" + bytes(129)) * 10**6)
            while not pumping.done():
                start = time.monotonic()
                assert "actions" in client.infer(request())
                assert fetch(at) == (200, "OK\n")
                assert time.monotonic() - start < 5
        assert isinstance(pumping.exception(), ConnectionError)
        mute.settimeout(30)
        assert mute.recv(1) == b""
        stack.enter_context(Client(f"ws://{at}"))
        stack.enter_context(Client(f"ws://{at}"))
        with pytest.raises(ConnectionError, match="HTTP 503: 503 clients are connected"):
            Client(f"ws://{at}")


def assert_shut_out(out: list[socket.socket], waiting: list[socket.socket]) -> None:
    for connection in out:
        connection.settimeout(10)
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    for connection in waiting:
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_raw_sockets_use_up_neither_files_nor_places() -> None:
    """Of those that say nothing the oldest go; clients come in, and are not counted by their handshakes."""
    with policy_server(limits={"max_handshakes": 8, "max_connections": 20}) as at, ExitStack() as stack:
        host, port = at.split(":")
        client = stack.enter_context(Client(f"ws://{at}"))
        mute = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        assert "actions" in client.infer(request())
        assert "actions" in stack.enter_context(Client(f"ws://{at}")).infer(request())
        assert_shut_out(mute[:92], mute[94:])
        assert re.search(r'turned_away_total\{reason="handshake"\} 9\d', fetch(at, "/metrics")[1])


def test_a_system_that_allows_too_few_files_is_refused() -> None:
    served = ServedPolicy(act=lambda o: np.zeros((len(o), 5, 7)), views={"agentview": (4, 4)})
    with pytest.raises(
        ValueError, match=r"need 1000000256 open files, the system allows \d+: lower --max-conn"
    ):
        asyncio.run(serve(served, limits=Limits(max_connections=10**9)))


def test_a_silent_client_is_told_to_come_again() -> None:
    with policy_server(limits={"idle_s": 0.3}) as at, Client(f"ws://{at}") as client:
        time.sleep(1)
        with pytest.raises(ConnectionError, match=r"1001.*connect again.*infer\(\) connects again"):
            client.infer(request())
        assert "actions" in client.infer(request())


def test_sigterm_finishes_what_runs() -> None:
    with policy_process() as (at, process), connect(f"ws://{at}") as idle, Client(f"ws://{at}") as client:
        idle.recv()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.infer, request(prompt="sleep 1"))
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert fetch(at) == (503, "the server stops\n")
            assert "actions" in running.result()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert process.wait(10) == 0


def test_a_server_that_could_answer_nobody_is_refused() -> None:
    for limits, reason in (({"max_batch": 0}, "--max-batch"), ({"max_connections": 0}, "--max-connections")):
        with pytest.raises(ValueError, match=f"{reason} must be at least 1, got 0"):
            Limits(**limits)
    served = ServedPolicy(act=lambda o: np.zeros((len(o), 5, 7)), views={"agentview": (4, 4)})
    with pytest.raises(ValueError, match=r"--port must be in 0\.\.65535 \(0: a free one\), got 99999"):
        asyncio.run(serve(served, port=99_999))


def test_who_may_come_in(tmp_path: Path) -> None:
    """The key, pages of other sites, other machines."""
    with policy_server(api_key="a key", resize=True) as at:
        for key in ("", "another"):
            with pytest.raises(ActorError, match=r"HTTP 401: give its key by .* WORLDVLA_API_KEY"):
                RemoteActor(f"ws://{at}", "tabletop_object", api_key=key)
        assert (fetch(at)[0], fetch(at, "/metrics")[0], fetch(at, "/")[0]) == (200, 401, 401)
        headers = {"Authorization": "Api-Key a key", "Origin": "http://evil.example"}
        with pytest.raises(InvalidStatus, match="403"):
            connect(f"ws://{at}", additional_headers=headers)
        with Client(f"ws://{at}", api_key="a key") as client:
            assert client.infer(request(**{"observation/image": image(7, side=9)}))["actions"][0, 1] == 7
    served = ServedPolicy(act=lambda observations: np.zeros((len(observations), 5, 7)), views={})
    for host in ("0.0.0.0", "", "::", "example.com"):
        with pytest.raises(ValueError, match="set the environment variable WORLDVLA_API_KEY, or --insecure"):
            asyncio.run(serve(served, host=host))
    with pytest.raises(ValueError, match="needs both --certificate and --key-file"):
        asyncio.run(serve(served, certificate=tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="PEM files that belong together"):
        asyncio.run(serve(served, certificate=tmp_path / "none.pem", key_file=tmp_path / "none.key"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_tls_by_certificate_files(tmp_path: Path) -> None:
    files = {"certificate": str(tmp_path / "cert.pem"), "key_file": str(tmp_path / "key.pem")}
    words = (
        "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    words += f" -out {files['certificate']} -keyout {files['key_file']}"
    subprocess.run(words.split(), check=True, capture_output=True)
    with policy_server(**files, limits={"max_handshakes": 8}) as at, ExitStack() as stack:
        with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            Client(f"wss://{at}")
        client = stack.enter_context(Client(f"wss://{at}", certificate=files["certificate"]))
        assert "actions" in client.infer(request())
        host, port = at.split(":")
        mute = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(100)]
        again = stack.enter_context(Client(f"wss://{at}", certificate=files["certificate"]))
        assert "actions" in client.infer(request())
        assert "actions" in again.infer(request())
        assert_shut_out(mute[:92], mute[94:])  # before TLS, too


def test_a_history_is_of_frames_one_step_apart() -> None:
    """The pictures of earlier requests are K steps apart, so they are never taken for the history."""
    metadata = {"views": {"agentview": [4, 4]}, "history": 3}
    with policy_server(history=3, metadata=metadata) as at:

        def seen(previous: list[int], value: int) -> list[float]:
            frames = [{"agentview": image(v)} for v in previous]
            with Client(f"ws://{at}") as client:
                actions = client.infer(request(**{"observation/image": image(value), "previous": frames}))[
                    "actions"
                ]
            return [x for x in actions[0, 1:6].tolist() if x >= 1]

        assert (seen([], 5), seen([7], 6), seen([2, 3, 4], 5)) == ([5], [7, 6], [3, 4, 5])
        for previous, reason in ((None, r"3 frames, one step apart: send .*'previous'"), (7, "list of maps")):
            with Client(f"ws://{at}") as client, pytest.raises(ServerError, match=reason):
                client.infer(request(previous=previous))


def test_the_client_says_what_happened() -> None:
    with pytest.raises(ConnectionError, match=r"no policy server at .*: start it by `worldvla serve"):
        Client("ws://127.0.0.1:9")
    with policy_process() as (at, process), Client(f"ws://{at}", timeout_s=0.2) as client:
        with pytest.raises(TimeoutError, match="has not answered within"):
            client.infer(request(prompt="sleep 1"))
        client.timeout_s = 10
        assert (
            client.infer(request(**{"observation/image": image(8)}))["actions"][0, 1] == 8
        )  # not the old one
        process.kill()
        with pytest.raises(ConnectionError, match=r"went away .*infer\(\) connects again"):
            client.infer(request())


@pytest.mark.slow
def test_a_soak_of_twenty_seconds() -> None:
    words = [sys.executable, "-m", "paper.bench_serve", "--soak", str(1 / 3)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["wrong"], result["answers"] > 50, result["hostile_messages"] > 5) == (0, True, True)
    assert result["healthz_max_ms"] < 2000  # whatever else this machine does
    assert result["memory_mb_thirds"][2] < 1.1 * result["memory_mb_thirds"][0]


def test_the_client_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import worldvla.eval.remote, worldvla.serve.server"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys; [sys.modules.setdefault(name, None) for name in ('torch', 'PIL', 'worldvla.sim')]"
    subprocess.run([sys.executable, "-c", f"{code}; import worldvla.serve.client"], check=True)
    for name in ("__init__", "serve/__init__", "serve/protocol", "serve/client"):
        text = (Path(worldvla.__file__).parent / f"{name}.py").read_text()
        ast.parse(text, feature_version=(3, 10))


# A checkpoint


@contextmanager
def served_here(checkpoint: Path) -> Iterator[str]:
    """Serve a checkpoint in a thread of this process, which has torch loaded already."""
    started: queue.Queue[Any] = queue.Queue()

    def start(at: str) -> None:
        started.put((at, asyncio.get_running_loop(), asyncio.current_task()))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            serve_checkpoint(checkpoint, port=0, on_start=start)

    thread = threading.Thread(target=run)
    thread.start()
    at, loop, task = started.get(timeout=60)
    try:
        yield at
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def frames(model: Any, count: int) -> list[dict[str, Any]]:
    """Return observations of noise, for a model of any size."""
    rng = np.random.default_rng(0)
    sizes = model.view_sizes.items()
    return [
        {v: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for v, size in sizes}
        | {"state": rng.uniform(-1, 1, 8).astype(np.float32), "instruction": f"do {i % 2}"}
        for i in range(count)
    ]


def test_a_served_checkpoint_acts_as_it_does_at_home(checkpoint: Path) -> None:
    model = load(checkpoint)
    first, before, now = frames(model, 3)
    images = [{view: before[view] for view in model.view_sizes}]
    queries = [Query(TABLE[0], 0, 0, {**o, "previous": p}) for o, p in ((first, []), (now, images))]
    expected = Policy(model).act([q.observation for q in queries])
    with served_here(checkpoint) as at:
        with closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor:
            assert (actor.views, actor.history, actor.execute) == (model.view_sizes, 2, 3)
            answers = [a for a in actor.act(queries) if a is not None]
            server = actor.identity()["server"]
        np.testing.assert_array_equal(np.stack(answers), expected)
        names = {**IMAGE_KEYS, "state": STATE_KEY, "instruction": PROMPT_KEY}
        plain = {names[key]: value for key, value in now.items()}
        with Client(f"ws://{at}") as client, pytest.raises(ServerError, match="one step apart"):
            client.infer(plain)
        for prompt, reason in (("a b" * 30, "makes a sequence of .* tokens"), ("a" * 4000, "letters")):
            with Client(f"ws://{at}") as client, pytest.raises(ServerError, match=reason):
                client.infer({**plain, "previous": [], PROMPT_KEY: prompt})
    assert (server["name"], server["step"], server["chunk"]) == ("tiny", 7, 3)
    assert server["decoding"] == Policy(model).decoding
    assert server["digest"] == weights_digest(checkpoint)


@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")  # of websockets 17, for its client
def test_openpis_own_client_is_answered_as_ours_is() -> None:
    """The shipped model answers it bit for bit as at home, and an error reaches it as text."""
    reason = "pip install --no-deps openpi-client, which declares numpy < 2 and works with later ones"
    theirs = pytest.importorskip("openpi_client.websocket_client_policy", reason=reason)
    model, names = load("tabletop"), {**IMAGE_KEYS, "state": STATE_KEY, "instruction": PROMPT_KEY}
    observations, policy = frames(model, 3), Policy(model)
    requests = [{names[key]: value for key, value in o.items()} for o in observations]
    with served_here(ASSETS / "tabletop") as at:
        client = theirs.WebsocketClientPolicy(*at.split(":"))
        with closing(client._ws):
            views = {view: list(size) for view, size in model.view_sizes.items()}
            assert client.get_server_metadata()["views"] == views
            for observation, sent in zip(observations, requests, strict=True):
                np.testing.assert_array_equal(client.infer(sent)["actions"], policy.act(observation))
            with pytest.raises(RuntimeError, match="Error in inference server:\nprompt must be a text"):
                client.infer({**requests[0], PROMPT_KEY: ""})


def test_answers_of_a_batch_are_those_of_each_request_alone() -> None:
    """In float32, ties included; the same where every code and every action counts as nearly tied."""
    model = load("tabletop")
    observations = frames(model, 5)
    policy = BatchedPolicy(model, "discrete")
    expected = np.stack([Policy(model).act(o) for o in observations])
    np.testing.assert_array_equal(policy.act(observations), expected)
    repeated: list[int] = []
    alone, encode = policy.alone, model.image.encode
    policy.alone = SimpleNamespace(act=lambda o: repeated.append(1) or alone.act(o))  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "TOLERANCE", 2.0)
        patch.setattr(model.image, "encode", lambda images: repeated.append(0) or encode(images))
        np.testing.assert_array_equal(policy.act(observations), expected)
    assert (repeated.count(0) >= 10, repeated.count(1)) == (True, 5)


def test_actions_under_way_are_imagined() -> None:
    model = load("tabletop")
    first, *others = frames(model, 3)
    committed = np.full((2, 7), 0.2, np.float32)
    world = World(model)
    world.reset(first)
    seen = [world.step(action) for action in committed][-1]
    expected = Policy(model).act({**first, **cast(dict[str, Any], seen), "state": world.state})
    answers = BatchedPolicy(model, "discrete").act([{**first, "committed": committed}, *others])
    np.testing.assert_array_equal(answers[0], expected)
    np.testing.assert_array_equal(answers[1:], [Policy(model).act(o) for o in others])
    assert not np.array_equal(expected, Policy(model).act(first))


@pytest.mark.parametrize(
    ("dims", "value", "reason"),
    [
        (0, np.zeros((1, 7)), "this policy cannot look ahead"),
        (7, np.zeros((1, 6)), r"at most 32 actions, numbers of shape \(D, 7\), got float64 \(1, 6\)"),
        (7, np.zeros((33, 7)), r"at most 32 actions.* got float64 \(33, 7\)"),
        (7, [[0.0] * 7], "got list"),
        (7, np.full((1, 7), np.nan), "committed must be finite"),
        (7, np.full((1, 7), 1e300), "committed must be finite"),
    ],
)
def test_actions_under_way_that_cannot_be_imagined_are_refused(dims: int, value: Any, reason: str) -> None:
    served = ServedPolicy(
        act=lambda o: np.zeros((len(o), 5, 7)), views={"agentview": (4, 4)}, num_committed_dims=dims
    )
    with pytest.raises(ValueError, match=reason):
        read_request(pack(request(committed=value)), served)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_codes_that_rounding_could_change_are_seen(
    quantizer: Literal["vq", "fsq"], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"channels": 4, "channel_mult": (1, 1), "num_res_blocks": 1, "z_channels": 4, "embed_dim": 2}
    config = ImageTokenizerConfig(
        **sizes, num_codes=16, quantizer=quantizer, fsq_levels=(4, 4) if quantizer == "fsq" else ()
    )
    tokenizer = ImageTokenizer(config)
    if isinstance(tokenizer.quantize, VectorQuantizer):
        tokenizer.quantize.embedding.weight.data.normal_(generator=generator)
    z_NE = torch.randn(2000, 2, generator=generator)
    assert CarefulTokenizer(tokenizer)._is_close(z_NE).float().mean() < 0.01
    monkeypatch.setattr(exact, "TOLERANCE", 1e-2)
    may_change = CarefulTokenizer(tokenizer)._is_close(z_NE)
    moved = z_NE + 1e-2 * z_NE.abs().max() * torch.randn(2000, 2, generator=generator).sign()
    is_changed = tokenizer.quantize.codes(moved) != tokenizer.quantize.codes(z_NE)
    assert 10 < is_changed.sum() <= may_change.sum() < 2000
    assert may_change[is_changed].all()
