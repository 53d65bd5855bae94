"""The wire is openpi's byte for byte and holds no pickle; our server answers it, says what is wrong in one
line and lives on; any server that speaks it is an actor; one that dies or answers badly ends the run so.

Run: pytest tests/test_serve.py
"""

import asyncio
import json
import queue
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from fake_env import TABLE, make
from tiny_run import tiny_config, write_tiny
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import serve as serve_in_thread

from worldvla.eval.actors import ActorError, Query
from worldvla.eval.remote import RemoteActor
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.infer.model import load, weights_digest
from worldvla.infer.policy import Policy
from worldvla.serve.image import resize_with_pad
from worldvla.serve.protocol import IMAGE_KEYS, MAX_BYTES, PROMPT_KEY, STATE_KEY, pack, unpack
from worldvla.serve.server import serve_checkpoint
from worldvla.train.build import build, build_model
from worldvla.train.checkpoint import save
from worldvla.train.optim import build_optimizers


@contextmanager
def policy_server(**told: Any) -> Iterator[str]:
    """Run tests/policy_server.py in another process; yield its address, HOST:PORT."""
    words = [sys.executable, str(Path(__file__).with_name("policy_server.py")), json.dumps(told)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def plain_server(greeting: Any, *answers: Any) -> Iterator[str]:
    """Run a server that knows nothing of ours: greet, then answer each request with the next of `answers`."""
    asked: list[bytes] = []

    def handle(connection: Any) -> None:
        for message in (greeting, *answers):
            connection.send(message if isinstance(message, str | bytes) else pack(message))
            asked.append(connection.recv())

    with serve_in_thread(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{server.socket.getsockname()[0]}:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def right() -> Iterator[str]:
    with policy_server() as at:
        yield at


def image(value: int = 3, side: int = 4) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


def request(**other: Any) -> dict[str, Any]:
    """Return a request as openpi's client sends it: the state is float64, the wrist is always there."""
    state = np.full(8, 0.25)
    keys = {"observation/image": image(), "observation/wrist_image": image(), "observation/state": state}
    return {**keys, "prompt": "go", **other}


def ask(connection: ClientConnection, message: Any) -> dict[str, Any]:
    connection.send(pack(message))
    return unpack(connection.recv())


def look(step: int = 0, **observation: Any) -> Query:
    seen = {
        "agentview": image(),
        "wrist": image(),
        "state": np.full(8, 0.25, np.float32),
        "instruction": "go",
    }
    return Query(TABLE[0], 2, step, {**seen, "previous": [], **observation})


# The wire


def test_bytes_are_those_of_openpi() -> None:
    message = {"x": np.array([[1, 2]], dtype=np.uint8), "y": np.int16(-1), "z": "a"}
    array = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x01\x02\xc4\x05dtype\xa3|u1"
    array += b"\xc4\x05shape\x92\x01\x02"
    scalar = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\xff\xc4\x05dtype\xa3<i2"
    assert pack(message) == b"\x83\xa1x" + array + b"\xa1y" + scalar + b"\xa1z\xa1a"


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
    "data", [b"", b"\xc1", b"\x81\xa1x", pack({"a": 1}) + b"!", b"\x81\x01\x02", b"\x91" * 5000]
)
def test_garbage_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a msgpack message"):
        unpack(data)


def test_pictures_keep_their_shape_inside_black_borders() -> None:
    wide = np.full((4, 8, 3), 200, dtype=np.uint8)
    out = resize_with_pad(wide, 6, 6)  # 3 rows of 6 in the middle of 6: one above, two below
    assert (out.max((1, 2)) > 0).tolist() == [False, True, True, True, False, False]
    assert (out[1:4] == 200).all()
    assert resize_with_pad(wide, 4, 8) is wide
    half = resize_with_pad(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), 2, 2)
    assert half[:, :, 0].tolist() == [[11, 16], [29, 34]]  # by openpi-client's resize_with_pad


# The server


def test_the_server_speaks_first_and_answers_both_vocabularies(right: str) -> None:
    with connect(f"ws://{right}") as connection:
        assert unpack(connection.recv()) == {"name": "right", "views": {"agentview": [4, 4]}}
        first = ask(connection, request())
        assert first["actions"].shape == (5, 7)
        assert first["actions"][0].tolist() == pytest.approx([0.2, 3, 0.2, 0.2, 0.2, 0.2, 0.25])
        assert set(first["server_timing"]) == {"infer_ms"}
        ours = {"agentview": image(9), "state": np.zeros(8, np.float32), "instruction": "go"}
        second = ask(connection, ours)
        assert second["actions"][0, 1] == 9
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            request(**{"observation/image": image(side=5)}),
            r"observation/image .* \(4, 4, 3\), got uint8 \(5, 5, 3\)",
        ),
        (request(**{"observation/image": image() / 255}), "got float64"),
        (request(**{"observation/state": np.zeros(7)}), r"observation/state .* \(8,\), got float64 \(7,\)"),
        (request(**{"observation/state": np.full(8, np.nan)}), "finite"),
        (request(prompt=""), "prompt must be a text"),
        ({"prompt": "go"}, r"needs 'observation/image' or 'agentview', got the keys \['prompt'\]"),
        ([1], "must be a map, got list"),
        (b"\xc1", "not a msgpack message"),
        ("hello", "binary msgpack frame"),
        (request(prompt="raise"), "RuntimeError: the policy fell off"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_server_lives(right: str, message: Any, reason: str) -> None:
    with connect(f"ws://{right}") as connection:
        connection.recv()
        connection.send(message if isinstance(message, str | bytes) else pack(message))
        line = connection.recv()
        assert isinstance(line, str)
        assert "\n" not in line
        assert "Traceback" not in line
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(line)
    with connect(f"ws://{right}") as connection:
        connection.recv()
        assert "actions" in ask(connection, request())


def test_messages_without_end_are_refused(right: str) -> None:
    with connect(f"ws://{right}") as connection:
        connection.recv()
        connection.send(bytes(MAX_BYTES + 1))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_inference_does_not_block_the_server(right: str, tmp_path: Path) -> None:
    with connect(f"ws://{right}") as slow:
        slow.recv()
        slow.send(pack(request(prompt=f"await {tmp_path / 'healthz'}")))
        with urllib.request.urlopen(f"http://{right}/healthz", timeout=10) as response:
            assert (response.status, response.read()) == (200, b"OK\n")
        with pytest.raises(TimeoutError):
            slow.recv(timeout=0)
        (tmp_path / "healthz").touch()
        assert "actions" in unpack(slow.recv())


def test_the_key_is_checked() -> None:
    with policy_server(api_key="a key", resize=True) as at:
        for key in ("", "another"):
            with pytest.raises(ActorError, match=r"HTTP 401: give its key by .* WORLDVLA_API_KEY"):
                RemoteActor(f"ws://{at}", "tabletop_object", api_key=key)
        with urllib.request.urlopen(f"http://{at}/healthz") as response:
            assert response.status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{at}/")
        with connect(f"ws://{at}", additional_headers={"Authorization": "Api-Key a key"}) as connection:
            connection.recv()
            assert ask(connection, request(**{"observation/image": image(7, side=9)}))["actions"][0, 1] == 7


def test_sessions_of_one_connection_have_their_own_history() -> None:
    def told(connection: ClientConnection, value: int, **other: Any) -> list[float]:
        answer = ask(connection, request(**{"observation/image": image(value)}, **other))
        return [x for x in answer["actions"][0, 1:6].tolist() if x >= 1]

    metadata = {"views": {"agentview": [4, 4]}, "history": 3}
    with policy_server(history=3, metadata=metadata) as at, connect(f"ws://{at}") as connection:
        connection.recv()
        assert told(connection, 1) == [1]
        assert told(connection, 2) == [1, 2]
        assert told(connection, 9, session_id="other") == [9]
        assert told(connection, 3) == [1, 2, 3]
        assert told(connection, 4) == [2, 3, 4]
        assert told(connection, 5, reset=True) == [5]
        assert told(connection, 6, previous=[{"agentview": image(7)}]) == [7, 6]
        with connect(f"ws://{at}") as another:
            another.recv()
            assert told(another, 8) == [8]
        with closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor:  # it knows the steps just before
            (actions,) = actor.act([look(5, previous=[{"agentview": image(8)}, {"agentview": image(9)}])])
    assert actions is not None
    assert actions[0, 1:4].tolist() == [8, 9, 3]


# The actor


def roll(at: str, out: Path, **options: Any) -> dict[str, Any]:
    settings = {"workers": 2, "make": make, "table": TABLE, **options}
    protocol = Protocol("tabletop_object", settings.pop("tasks", (0, 2)), episodes=2, videos=0)
    with closing(RemoteActor(f"websocket://{at}", "tabletop_object")) as actor:
        return evaluate(actor, protocol, out, **settings)


def test_a_server_in_another_process_is_rolled_out(right: str, tmp_path: Path) -> None:
    record = roll(right, tmp_path)
    assert (record["successes"], record["errors"]) == (4, 0)
    assert [o["steps"] for o in record["outcomes"]] == [5] * 4
    assert record["checkpoint"] == {
        "name": "right",
        "address": f"ws://{right}",
        "sent": {"agentview": [4, 4]},
        "server": {"name": "right", "views": {"agentview": [4, 4]}},
    }
    assert record["protocol"]["executed"] == 5
    assert json.loads((tmp_path / "record.json").read_text()) == record


def test_a_server_that_dies_costs_no_finished_episode(tmp_path: Path) -> None:
    with policy_server(requests=3) as at, pytest.raises(ActorError) as failed:
        roll(at, tmp_path, workers=1)
    line = str(failed.value)
    assert "\n" not in line
    assert line.startswith(f"policy server ws://{at}: it went away before its answer, after 3 requests")
    assert "the same command goes on" in line
    partial = json.loads((tmp_path / "record.json").read_text())
    assert (partial["successes"], partial["errors"]) == (3, 1)
    assert partial["outcomes"][-1]["reason"] == line
    kept = [json.loads(text) for text in (tmp_path / "episodes.jsonl").read_text().splitlines()[1:]]
    assert [(o["task"], o["init"]) for o in kept if o["status"] == "success"] == [(0, 0), (0, 1), (2, 0)]
    with policy_server(port=int(at.rpartition(":")[2])) as again:
        record = roll(again, tmp_path, workers=1)
    assert (record["successes"], record["errors"]) == (4, 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"action": np.zeros((5, 7))}, r"expected actions, .*\(K, 7\), .* got the keys \['action'\]"),
        ({"actions": np.zeros((5, 8))}, r"got the shape \(5, 8\)"),
        ({"actions": np.zeros(7)}, r"got the shape \(7,\)"),
        ({"actions": [0.0] * 7}, "got list"),
        ({"actions": np.full((5, 7), np.nan)}, "finite"),
        ({"actions": np.zeros((3, 7))}, "3 actions at a time, asked to execute 5"),
        ([1, 2], "expected a map, got list"),
        (b"\xc1", "not a msgpack message"),
        (
            "Traceback (most recent call last):\n  File\nKeyError: 'base_rgb'\n",
            "reports an error: KeyError: 'base_rgb'",
        ),
    ],
)
def test_a_bad_answer_is_one_line(answer: Any, reason: str) -> None:
    with plain_server({}, answer) as at, closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor:
        with pytest.raises(ActorError, match=reason) as failed:
            actor.act([look()])
        assert "\n" not in str(failed.value)


def test_no_server_and_no_address_are_one_line() -> None:
    with pytest.raises(ActorError, match=r"no connection .*: start it by `worldvla serve CHECKPOINT`"):
        RemoteActor("ws://127.0.0.1:9", "tabletop_object")
    with pytest.raises(ValueError, match="expected websocket://HOST:PORT"):
        RemoteActor("http://127.0.0.1:8000", "tabletop_object")
    with plain_server("not allowed") as at, pytest.raises(ActorError, match="reports an error: not allowed"):
        RemoteActor(f"ws://{at}", "tabletop_object")


def test_requests_are_openpis() -> None:
    """Numbers and keys of examples/libero/main.py; three keys more, which plain servers ignore."""
    echo: list[dict[str, Any]] = []

    def handle(connection: Any) -> None:
        connection.send(pack({}))
        for data in connection:
            echo.append(unpack(data))
            connection.send(pack({"actions": np.arange(350, dtype=np.float64).reshape(50, 7)}))

    with serve_in_thread(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        at = f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        with closing(RemoteActor(at, "libero_object")) as actor:
            assert actor.views == {"agentview": (256, 256), "wrist": (256, 256)}
            assert (actor.execute, actor.history) == (5, 1)
            (actions,) = actor.act([look(agentview=image(3, 256), wrist=image(4, 256))])
            actor.act([look(5, agentview=image(3, 256), wrist=image(4, 256))])
        server.shutdown()
        thread.join()
    assert actions is not None
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, np.arange(35).reshape(5, 7))
    first, second = echo
    assert set(first) == {*request(), "session_id", "reset"}
    assert first["observation/image"].shape == (224, 224, 3)
    assert (first["observation/wrist_image"] == 4).all()
    assert first["observation/state"].shape == (8,)
    assert (first["prompt"], first["session_id"]) == ("go", "tabletop_object/0/2")
    assert [r["reset"] for r in echo] == [True, False]
    assert second["session_id"] == first["session_id"]


def test_sizes_are_the_servers_or_the_simulators() -> None:
    ours = {"name": "ours", "views": {"agentview": [96, 96]}, "history": 2, "chunk": 3}
    with plain_server(ours) as at, closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor:
        assert (actor.views, actor.history, actor.execute) == ({"agentview": (96, 96)}, 2, 3)
        assert actor.identity()["server"] == ours
        with pytest.raises(ActorError, match="gives 3 actions at a time, asked for 4"):
            RemoteActor(f"ws://{at}", "tabletop_object", execute=4)
    with plain_server({}) as at:
        for suite, rendered, sent in (
            ("tabletop_object", {"agentview": (64, 64), "wrist": (32, 32)}, None),
            ("libero_object", {"agentview": (256, 256), "wrist": (256, 256)}, (224, 224)),
        ):
            with closing(RemoteActor(f"ws://{at}", suite)) as actor:
                assert actor.views == rendered
                assert actor.sent == (dict.fromkeys(rendered, sent) if sent else rendered)
    with plain_server({"views": {"front": [4, 4]}}) as at, pytest.raises(ActorError, match="views"):
        RemoteActor(f"ws://{at}", "tabletop_object")


def test_the_client_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import worldvla.eval.remote, worldvla.serve.server"
    subprocess.run([sys.executable, "-c", code], check=True)


# A checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    write_tiny(root)
    pieces = build(tiny_config(root))
    model = build_model(pieces)
    save(root / "step_7", pieces, model, build_optimizers(model, pieces.config.optim), {"step": 7})
    return root / "step_7"


@contextmanager
def served_here(checkpoint: Path) -> Iterator[str]:
    """Serve a checkpoint in a thread of this process, which has torch loaded already."""
    started: queue.Queue[Any] = queue.Queue()

    def serve() -> None:
        with suppress(asyncio.CancelledError):
            serve_checkpoint(
                checkpoint,
                port=0,
                on_start=lambda at: started.put((at, asyncio.get_running_loop(), asyncio.current_task())),
            )

    thread = threading.Thread(target=serve)
    thread.start()
    at, loop, task = started.get(timeout=60)
    try:
        yield at
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def test_a_served_checkpoint_acts_as_it_does_at_home(checkpoint: Path) -> None:
    rng = np.random.default_rng(0)

    def frame() -> dict[str, np.ndarray]:
        sides = {"agentview": 6, "wrist": 4}
        return {v: rng.integers(0, 256, (n, n, 3), dtype=np.uint8) for v, n in sides.items()}

    state = rng.uniform(-1, 1, 8).astype(np.float32)
    first, before, now = frame(), frame(), frame()
    queries = [ask_for(first, [], state), ask_for(now, [before], state)]
    model = load(checkpoint)
    expected = Policy(model).act([q.observation for q in queries])
    with served_here(checkpoint) as at, closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor:
        assert (actor.views, actor.history, actor.execute) == (model.view_sizes, 2, 3)
        np.testing.assert_array_equal(np.stack([a for a in actor.act(queries) if a is not None]), expected)
        server = actor.identity()["server"]
        # A client of openpi sends single frames; the server remembers the one before.
        with connect(f"ws://{at}") as plain:
            plain.recv()
            for images in (before, now):
                keys = {IMAGE_KEYS[view]: image for view, image in images.items()}
                answer = ask(plain, {**keys, STATE_KEY: state.astype(np.float64), PROMPT_KEY: "do 1"})
    np.testing.assert_array_equal(answer["actions"], expected[1])
    assert (server["name"], server["step"], server["chunk"]) == ("tiny", 7, 3)
    assert server["decoding"] == "parallel"
    assert server["digest"] == weights_digest(checkpoint)


def ask_for(frame: dict[str, np.ndarray], previous: list[dict[str, np.ndarray]], state: np.ndarray) -> Query:
    return Query(TABLE[0], 0, 0, {**frame, "previous": previous, "state": state, "instruction": "do 1"})
