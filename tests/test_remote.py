"""Any server that speaks openpi's protocol is an actor; one that dies or answers badly ends the run so.

Run: pytest tests/test_remote.py
"""

import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_env import TABLE, make
from policy_server import image, policy_server, request
from websockets.sync.server import serve as serve_in_thread

from worldvla.eval.actors import ActorError, Query
from worldvla.eval.remote import RemoteActor
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.serve.protocol import pack, unpack


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


def look(step: int = 0, **observation: Any) -> Query:
    seen = {
        "agentview": image(),
        "wrist": image(),
        "state": np.full(8, 0.25, np.float32),
        "instruction": "go",
    }
    return Query(TABLE[0], 2, step, {**seen, "previous": [], **observation})


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
        ({"action": np.zeros((5, 7))}, r"expected actions, .*\(U, 7\), .* got the keys \['action'\]"),
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
    """Numbers and keys of examples/libero/main.py."""
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
        with closing(RemoteActor(at, "libero_object", unnorm_key="bridge")) as actor:
            actor.act([look()])
            assert actor.identity()["unnorm_key"] == "bridge"
        server.shutdown()
        thread.join()
    assert actions is not None
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(actions, np.arange(35).reshape(5, 7))
    first, second, of_dataset = echo
    assert of_dataset.pop("unnorm_key") == "bridge"
    assert set(of_dataset) == set(request())
    assert set(first) == set(second) == set(request())
    assert first["observation/image"].shape == (224, 224, 3)
    assert (first["observation/wrist_image"] == 4).all()
    assert first["observation/state"].shape == (8,)
    assert first["prompt"] == "go"


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


def test_the_steps_just_before_go_with_a_request() -> None:
    with (
        policy_server(history=3, metadata={"views": {"agentview": [4, 4]}, "history": 3}) as at,
        closing(RemoteActor(f"ws://{at}", "tabletop_object")) as actor,
    ):
        (actions,) = actor.act([look(5, previous=[{"agentview": image(8)}, {"agentview": image(9)}])])
    assert actions is not None
    assert actions[0, 1:4].tolist() == [8, 9, 3]
