"""What a death costs: a killed rank, a killed agent of torchrun, SIGTERM to one rank; two sharded ranks each,
on one node or two.

pytest tests/test_deaths.py
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import free_port, launch, torchrun
from test_parallel import fifty, losses

from worldvla.config import to_json
from worldvla.files import check_digests
from worldvla.train import checkpoint
from worldvla.train.loop import train

Agent = subprocess.Popen[str]
Start = Callable[..., Agent]


def children(process: int) -> list[int]:
    """Return the ranks that an agent of torchrun has running."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(p) for p in found if b"ranks.py" in Path(f"/proc/{p}/cmdline").read_bytes()]


def steps_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def start(root: Path) -> Iterator[Start]:
    """Start a sharded run on two ranks by torchrun, as a user does, that saves every fifth step; with a
    `port`, a node of one rank.
    """
    agents: list[Agent] = []

    def begin(run_dir: Path, steps: int = 500, restarts: int = 0, port: int = 0) -> Agent:
        run_dir.mkdir(exist_ok=True)
        config = fifty(root, steps=steps, shard=2, save_every=5)
        (run_dir / "config.json").write_text(json.dumps(to_json(config)))
        agents.append(torchrun(1 if port else 2, run_dir, restarts, port))
        return agents[-1]

    yield begin
    for agent in agents:  # of a test that failed
        if agent.poll() is None:
            for process in (*children(agent.pid), agent.pid):
                os.kill(process, signal.SIGKILL)
            agent.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 20])
@pytest.mark.timeout(1200)
def test_kills_cost_the_steps_since_the_last_checkpoint(
    root: Path, tmp_path: Path, start: Start, kills: int
) -> None:
    """Of ranks, which the agent starts again, and of the agent, which is started again here. The losses are
    those of the same two ranks left alone; one process sums in another order, and drifts away."""
    rng, run_dir, steps = random.Random(0), tmp_path / "run", 25 * kills
    launch(2, (fifty(root, steps=steps, shard=2), tmp_path / "alone"), timeout=600)
    agent = start(run_dir, steps, restarts=kills)
    for _ in range(kills):
        before = steps_of(run_dir)
        wait_for(lambda before=before: steps_of(run_dir) > before)
        alive = children(agent.pid)
        victim = rng.choice([agent.pid, *alive])
        os.kill(victim, signal.SIGKILL)
        if victim == agent.pid:
            agent.communicate(timeout=300)
            agent = start(run_dir, steps, restarts=kills)
        else:
            wait_for(lambda alive=alive, pid=agent.pid: not set(alive) & set(children(pid)))
    said = agent.communicate(timeout=600)[0]
    assert agent.returncode == 0, said[-3000:]
    assert losses(run_dir) == losses(tmp_path / "alone")


@pytest.mark.slow
def test_ranks_of_a_dead_agent_save_and_end(tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    agent = start(run_dir)
    wait_for(lambda: steps_of(run_dir) > 1)
    ranks = children(agent.pid)
    assert len(ranks) == 2
    agent.kill()
    agent.communicate(timeout=300)  # ends when no rank has the pipe any more
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    path = checkpoint.latest(run_dir)
    assert path is not None
    check_digests(path)


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all_after_a_checkpoint(tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    agent = start(run_dir)
    wait_for(lambda: steps_of(run_dir) > 1)
    os.kill(children(agent.pid)[1], signal.SIGTERM)
    agent.communicate(timeout=300)
    assert agent.returncode == 1
    path = checkpoint.latest(run_dir)
    assert path is not None
    assert int(path.name.removeprefix("step_")) >= steps_of(run_dir) - 1


def _is_heard(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _processes(run_dir: Path) -> list[str]:
    """Return the agents and ranks of a run."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            commands.append(path.read_text())
    return [command for command in commands if command.endswith(f"{run_dir}\0")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_nodes_lose_either_agent(root: Path, tmp_path: Path, start: Start) -> None:
    """The second comes back, and the first has restarted its rank; without the first, where they meet, both
    end, and both are started again.
    """
    run_dir, steps = tmp_path / "run", 40
    train(fifty(root, steps=steps), tmp_path / "one")

    def both() -> tuple[Agent, Agent, int]:
        port = free_port()
        first = start(run_dir, steps, 3, port)
        wait_for(lambda: _is_heard(port))
        return first, start(run_dir, steps, 3, port), port

    def kill(agent: Agent) -> None:
        before = steps_of(run_dir)
        wait_for(lambda: steps_of(run_dir) > before)
        assert len(children(agent.pid)) == 1
        agent.kill()
        agent.communicate(timeout=300)  # ends when no rank has the pipe any more

    first, second, port = both()
    kill(second)
    second = start(run_dir, steps, 3, port)
    kill(first)
    assert second.wait(timeout=300) != 0
    wait_for(lambda: not _processes(run_dir), 60)
    assert checkpoint.latest(run_dir) is not None
    first, second, _ = both()
    said = [agent.communicate(timeout=600)[0] for agent in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), "\n".join(said)[-3000:]
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert not _processes(run_dir)
