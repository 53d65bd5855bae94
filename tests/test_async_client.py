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


def late_plan(**options: Any) -> Plan:
    """A plan that executes the actions 0, 1, ... when a question of step 1 is under way, in step 3."""
    plan = Plan([9.0], **options)
    plan.question()
    plan.answer(chunk(0, 6))
    plan.act()
    assert plan.question() is not None
    assert [plan.act(), plan.act()] == [1, 2]
    assert plan.question() is None  # one at a time
    return plan


def test_a_chunk_starts_after_the_actions_that_were_executed_since_its_question():
    plan = late_plan()
    plan.answer(100 + chunk(1))
    assert plan.latency == 2
    assert [plan.act() for _ in range(4)] == [103, 104, 5, 9]  # the newest chunk, then the older, then still


def test_while_the_robot_stands_still_no_action_is_over():
    plan = Plan([9.0])
    plan.question()
    assert [plan.act(), plan.act()] == [9, 9]
    plan.answer(chunk(0, 2))
    plan.question()
    assert [plan.act(), plan.act(), plan.act()] == [0, 1, 9]
    plan.answer(chunk(10))
    assert plan.act() == [12]  # two were executed, one step it stood


def test_overlapping_chunks_are_averaged_by_age():
    plan = late_plan(blend=0.5)
    plan.answer(100 + chunk(1))
    assert plan.act() == pytest.approx((103 + 0.5 * 3) / 1.5)
    with pytest.raises(ValueError, match=r"blend must be in \[0, 1\], got 2"):
        Plan(blend=2)


def test_a_robot_that_executes_so_many_actions_waits_between():
    plan = Plan([9.0], execute=2)
    done = []
    for step in range(8):
        if step in (2, 6):  # an answer takes two steps
            plan.answer(chunk(step))
        assert (plan.question() is not None) == (step in (0, 4))
        done.append(plan.act())
    assert done == [9, 9, 2, 3, 9, 9, 6, 7]
    with pytest.raises(ValueError, match="not for ahead or blend, got execute=2, ahead=True, blend=0"):
        Plan(ahead=True, execute=2)


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
    assert robot.act({"step": 2}) == [0]  # it stood still until then; step 2 is asked
    assert robot.latency == 2
    assert [robot.act({"step": step}) for step in (3, 4, 5)] == [1, 2, 3]
    assert robot.act({"step": 6}) == [3]  # the chunk has ended: the last action again
    answer()
    assert robot.act({"step": 7}) == [3]  # four were executed since step 2, so all of its actions are over
    server.is_gone = True
    answer()
    with pytest.raises(ConnectionError, match="it went away"):
        robot.act({"step": 8})
    server.is_gone = False
    assert robot.act({"step": 9}) == [3]  # it is asked again
    answer()
    assert server.asked == [0, 2, 7, 9]
    robot.act({"step": 10})
    server.is_gone = True
    server.may_answer.release()
    robot.reset()  # whatever became of the last question
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
    # Asked with the actions of steps 2 and 3, as many as the last one took.
    assert [robot.act({"step": step}) for step in (2, 3)] == [0, 1]
    answer()  # its first action is for step 4
    assert robot.act({"step": 4}) == [2]
    assert [None if c is None else c[:, 0].tolist() for c in server.committed[:2]] == [None, [0, 1]]
    for step in range(5, 20):  # a slow answer: of what is under way only what is known is sent
        robot.act({"step": step})
    answer()
    robot.act({"step": 20})
    assert robot.latency == 16
    answer()
    assert server.committed[3][:, 0].tolist() == [6, 7]
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
