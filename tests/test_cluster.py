"""On a Ray cluster evaluation and collection give the records of one machine, whatever is lost meanwhile.

What is wrong with a cluster is one line. Two nodes of one core each are simulated on this machine.
Run: pytest tests/test_cluster.py
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_env import CRASH, DIE, HANG, TABLE, make

from worldvla import machine
from worldvla.cli import main
from worldvla.cluster import open_cluster
from worldvla.data.collect import collect
from worldvla.eval.actors import Actor, Query
from worldvla.eval.rollout import Protocol, evaluate, open_actor

ray = pytest.importorskip("ray", reason="needs the cluster extra")


class Steady(Actor):
    """Moves right, a little later; where `dies` names a file that is not there, it makes it and dies."""

    name, execute = "steady", 3

    def __init__(self, pause_s: float = 0.0, dies: Path | None = None) -> None:
        self.pause_s, self.dies = pause_s, dies

    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        time.sleep(self.pause_s)
        if self.dies is not None and not self.dies.exists():
            self.dies.touch()
            os._exit(9)
        return [np.full((self.execute, 7), 0.05 if q.task.index == 2 else 0.2) for q in queries]


class Deadly(Steady):
    def act(self, queries: Sequence[Query]) -> list[np.ndarray | None]:
        os._exit(len(queries))


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    root = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root.parent}:{root}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100_000_000}
        there: Any = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        there.small = small
        there.add_node(**small)
        yield there
        there.shutdown()


def roll(
    out: Path, there: Any = None, actor: Any = Steady, tasks: tuple[int, ...] = (0, 2), **options: Any
) -> list[Any]:
    """Return the outcomes of 5 episodes a task, without times; on the cluster `there` if one is given."""
    protocol = Protocol("tabletop_object", tasks, episodes=5, videos=1)
    options = {"workers": 1, "make": make, "table": TABLE, "patience_s": 8.0} | options
    if there is None:
        record = evaluate(actor(), protocol, out, **options)
    else:
        with open_cluster(there.address, "node") as pool:
            assert pool.processes == len(there.list_all_nodes())
            record = evaluate(actor(), protocol, out, cluster=pool, open_there=actor, **options)
    return [{k: v for k, v in o.items() if "seconds" not in k} for o in record["outcomes"]]


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:1", "127.0.0.1:PORT", "127.0.0.1:99999"])
def test_an_address_without_a_cluster_is_one_line(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    words = ["eval", "random", "--suite", "tabletop_object", "--out", str(tmp_path / "out")]
    assert main([*words, "--cluster", address.replace("PORT", port)]) == 2
    err = capsys.readouterr().err
    assert "ray start --head" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_record_is_that_of_one_machine(tmp_path: Path, nodes: Any) -> None:
    """Also where an environment raises, dies and hangs."""
    here = roll(tmp_path / "here", tasks=(0, 1))
    there = roll(tmp_path / "there", nodes, tasks=(0, 1))
    assert {o["init"] for o in there if o["status"] == "error"} == {CRASH, DIE, HANG}
    assert there == here
    films = [sorted(p.name for p in (tmp_path / name / "videos").iterdir()) for name in ("here", "there")]
    assert films[0] == films[1] == ["00_00.mp4", "01_00.mp4"]


@pytest.mark.slow
def test_a_lost_node_costs_no_episode(tmp_path: Path, nodes: Any) -> None:
    third, journal = nodes.add_node(**nodes.small), tmp_path / "there" / "episodes.jsonl"

    def lose() -> None:
        while not journal.exists() or len(journal.read_text().splitlines()) < 2:
            time.sleep(0.05)
        ended.append(len(journal.read_text().splitlines()) - 1)
        nodes.remove_node(third, allow_graceful=False)

    ended: list[int] = []
    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    there = roll(tmp_path / "there", nodes, partial(Steady, 0.5))
    thread.join(60)
    assert 1 <= ended[0] < len(there)
    assert there == roll(tmp_path / "here")


@pytest.mark.slow
def test_a_lost_policy_costs_no_episode_but_one_that_always_dies_ends(tmp_path: Path, nodes: Any) -> None:
    there = roll(tmp_path / "there", nodes, partial(Steady, 0.0, tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert there == roll(tmp_path / "here")
    with pytest.raises(OSError, match="3 workers of the cluster were lost with the same task"):
        roll(tmp_path / "dead", nodes, Deadly)


@pytest.mark.slow
def test_a_model_does_there_what_it_does_here(tmp_path: Path, nodes: Any) -> None:
    options = {"actor": partial(open_actor, "tabletop", "tabletop_object"), "tasks": (0,)}
    options |= {"make": cluster_make, "table": None}
    assert roll(tmp_path / "there", nodes, **options) == roll(tmp_path / "here", **options)
    assert (tmp_path / "there/tokens.npz").exists()


def cluster_make(*args: Any) -> Any:
    from worldvla.sim import suites

    return suites.make(*args)


@pytest.mark.slow
def test_collection_gives_the_episodes_of_one_machine(tmp_path: Path, nodes: Any) -> None:
    from test_collect import Line, Right, _content

    options: dict[str, Any] = {"episodes": 6, "views": {"agentview": (4, 4)}, "tasks": (0, 2)}
    options |= {"make": Line, "expert": Right}
    with open_cluster(nodes.address, "core") as pool:
        there = collect("tabletop_object", tmp_path / "there", cluster=pool, **options)
    assert there == collect("tabletop_object", tmp_path / "here", workers=2, **options)
    assert _content(tmp_path / "there") == _content(tmp_path / "here")


@pytest.mark.slow
def test_what_is_wrong_with_nodes_is_one_line(
    tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"none of .* 2 nodes has a gpu"), open_cluster(nodes.address, "gpu"):
        pass
    missing = partial(open_actor, str(tmp_path / "nowhere"), "tabletop_object")
    with (
        pytest.raises(ValueError, match=r"on node \S+: .*nowhere") as error,
        open_cluster(nodes.address, "node") as pool,
    ):
        evaluate(Steady(), Protocol("tabletop_object"), tmp_path / "out", cluster=pool, open_there=missing)
    assert "\n" not in str(error.value)
    here = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: here | {"mujoco": "9.9"})
    message = r"node [\d.]+ of the cluster differs \(mujoco [\d.]+ there, 9.9 here\): install the same"
    with pytest.raises(ValueError, match=message), open_cluster(nodes.address, "node"):
        pass


@pytest.mark.slow
def test_the_command_line_starts_a_cluster_of_its_own(tmp_path: Path) -> None:
    words = ["eval", "random", "--suite", "tabletop_object", "--tasks", "0", "--episodes", "2"]
    assert main([*words, "--cluster", "local", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "index.html").exists()
