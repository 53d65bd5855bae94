"""A robot that does not wait: which action of overlapping chunks it executes, and what it does without one.

Run: pytest tests/test_async_client.py
"""

import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from worldvla.serve.client import AsyncClient, Plan, keep_still


def chunk(start: int, length: int = 4) -> np.ndarray:
    """Actions that name the step that they are for."""
    return np.arange(start, start + length, dtype=np.float32)[:, None]


def test_a_chunk_starts_at_the_step_of_its_observation():
    plan = Plan(blend=0.0)
    plan.add(0, chunk(0))
    assert plan.action(2) == [2]  # the answer came two steps late: its first two actions are over
    plan.add(2, 100 + chunk(2))
    assert plan.action(3) == [103]  # the newest
    assert plan.action(5) == [105]
    assert plan.action(6) is None


def test_overlapping_chunks_are_averaged_by_age():
    plan = Plan(blend=0.5)
    plan.add(1, chunk(1) + 3)  # the order in which answers come does not matter
    plan.add(0, chunk(0))
    assert plan.action(1) == pytest.approx((4 + 0.5 * 1) / 1.5)
    assert plan.action(4) == 7  # the older one has ended
    with pytest.raises(ValueError, match=r"blend must be in \[0, 1\], got 2"):
        Plan(blend=2)


def test_a_robot_without_an_action_keeps_still():
    last = np.array([0.3, -0.2, 1.0], np.float32)
    assert keep_still(None, last) is last
    assert keep_still([0, 0, math.nan], last).tolist() == [0, 0, 1]  # pyright: ignore[reportOptionalMemberAccess]
    assert keep_still([0, 0, math.nan], None).tolist() == [0, 0, 0]  # pyright: ignore[reportOptionalMemberAccess]


class SlowServer:
    """Stands in for `Client`: answers when it is let."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.committed: list[Any] = []
        self.metadata: dict[str, Any] = {}
        self.address = "here"
        self.may_answer = threading.Semaphore(0)
        self.is_gone = False

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        self.asked.append(observation["step"])
        self.committed.append(observation.get("committed"))
        assert self.may_answer.acquire(timeout=20)
        if self.is_gone:
            raise ConnectionError("it went away")
        return {"actions": chunk(observation["step"])}

    def close(self) -> None: ...


def test_the_robot_moves_while_the_next_chunk_is_computed():
    server = SlowServer()
    robot: Any = AsyncClient(server, still=[math.nan])  # pyright: ignore[reportArgumentType]

    def answer() -> None:
        server.may_answer.release()
        robot._request.exception(timeout=20)

    assert robot.act({"step": 0}) == [0]  # `still`, before any action: 0
    assert robot.act({"step": 1}) == [0]
    answer()
    assert robot.act({"step": 2}) == [2]  # the third action of the answer to step 0; step 2 is asked
    assert robot.latency == 2
    assert robot.act({"step": 3}) == [3]
    assert robot.act({"step": 4}) == [3]  # the chunk has ended: the last action again
    answer()
    assert robot.act({"step": 5}) == [5]
    server.is_gone = True
    answer()
    with pytest.raises(ConnectionError, match="it went away"):
        robot.act({"step": 6})
    assert server.asked == [0, 2, 5]
    robot.close()


def test_a_robot_that_looks_ahead_sends_what_is_under_way():
    server = SlowServer()
    server.metadata = {"looks_ahead": True}
    robot: Any = AsyncClient(server, still=[0.0], blend=0.0, ahead=True)  # pyright: ignore[reportArgumentType]

    def answer() -> None:
        server.may_answer.release()
        robot._request.exception(timeout=20)

    assert [robot.act({"step": step}) for step in (0, 1)] == [0, 0]
    answer()
    assert robot.act({"step": 2}) == [
        2
    ]  # asked with the actions of steps 2 and 3, as long as the last one took
    assert robot.act({"step": 3}) == [3]
    answer()  # the first action is the one of step 4
    assert robot.act({"step": 4}) == [2]
    assert [None if c is None else c[:, 0].tolist() for c in server.committed[:2]] == [None, [2, 3]]
    for step in range(5, 20):  # a slow answer: of what is under way only what is known is sent
        robot.act({"step": step})
    answer()
    robot.act({"step": 20})
    assert robot.latency == 16
    answer()
    assert server.committed[3] is None
    robot.reset()
    with pytest.raises(ValueError, match="cannot look ahead"):
        AsyncClient(SlowServer(), still=None, ahead=True)  # pyright: ignore[reportArgumentType]


def test_a_reset_forgets_the_episode_before():
    server = SlowServer()
    robot: Any = AsyncClient(server, still=[9.0])  # pyright: ignore[reportArgumentType]
    robot.act({"step": 0})
    server.may_answer.release()
    robot.reset()
    assert robot.act({"step": 0}) == [9]
    server.may_answer.release()
    robot.close()
