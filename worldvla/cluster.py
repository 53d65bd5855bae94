"""Processes on many machines by Ray, behind the interface of `concurrent.futures`.

    with open_cluster("10.0.0.1:6379", "core") as pool:
        pool.submit(function, argument).result()

A call whose machine or process is lost runs again on another. Ray pickles calls and results: everybody who
reaches its port can run code, so it belongs into a network of your own.
"""

import os
import queue
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

from worldvla.files import one_line
from worldvla.machine import cores, differences, installation

TRIES = 3
"""Losses of the same call after which it is taken to be what kills its machines."""
PATIENCE_S = 180.0
"""Longest wait for the first answer of the processes: others may hold the machines."""


class Host:
    """A process on some machine; what is wrong there says where."""

    def __init__(self) -> None:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line sets it
        if not os.environ.get("CUDA_VISIBLE_DEVICES"):  # Ray hides GPUs, which renderers may use
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            raise ValueError(f"on node {socket.gethostname()}: {error}") from error


class Cluster(ThreadPoolExecutor):
    """An executor with one process a core, node or GPU of the Ray cluster that this process has joined."""

    def __init__(self, unit: Literal["core", "node", "gpu"], per_node: int = 0) -> None:
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        self.cores = 1
        """Of each process; the fewest that any has."""
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Processes; None: there will be no more."""
        self._places: dict[Any, tuple[str, dict[str, float]]] = {}
        """Process -> the node and what it occupies there."""
        self._is_open = True
        for node in nodes:
            cpus, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
            number = {"core": per_node or cpus, "node": 1, "gpu": gpus}[unit]
            share = min(1.0, cpus / max(1, number)) if unit == "core" else cpus // max(1, number)
            for _ in range(number):
                self._start(node["NodeID"], {"num_cpus": share, "num_gpus": int(unit == "gpu")})
        if not self._places:
            raise ValueError(
                f"none of the cluster's {len(nodes)} nodes has a {unit} for a worker: see `ray status`"
            )
        self.cores = max(1, int(min(need["num_cpus"] for _, need in self._places.values())))
        self.processes = len(self._places)
        super().__init__(self.processes)
        self._check_versions()

    def _start(self, node: str, need: dict[str, float]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(node, soft=False)
        host = ray.remote(Host).options(scheduling_strategy=there, **need).remote()
        self._places[host] = (node, need)
        self._idle.put(host)

    def _check_versions(self) -> None:
        """Raise ValueError unless every process answers and runs the same versions as this one."""
        import ray

        here = installation()
        answers = {host.call.remote(installation, ()): node for host, (node, _) in self._places.items()}
        ready, silent = ray.wait(list(answers), num_returns=len(answers), timeout=PATIENCE_S)
        if silent:
            raise ValueError(
                f"{len(silent)} of {len(answers)} workers of the cluster did not start within "
                f"{PATIENCE_S:.0f} s: do other programs hold their nodes? See `ray status`"
            )
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        for ref in ready:
            if other := differences(_result(ref), here):
                raise ValueError(
                    f"node {addresses[answers[ref]]} of the cluster differs ({other}): "
                    "install the same on every node"
                )

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run fn(*args), which every node must be able to import, in a free process."""
        return super().submit(self._run, fn, args)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        from ray.exceptions import RayError

        reason = ""
        for _ in range(TRIES):
            host = self._idle.get()
            if host is None:
                self._idle.put(None)
                raise OSError("the cluster has no node left; the same command goes on where this one stopped")
            try:
                result = _result(host.call.remote(function, args))
            except (RayError, ConnectionError) as error:
                reason = one_line(str(error), 300)
                self._lose(host)
                continue
            except BaseException:
                self._idle.put(host)
                raise
            self._idle.put(host)
            return result
        raise OSError(
            f"{TRIES} workers of the cluster were lost with the same task ({reason}): see Ray's logs"
        )

    def _lose(self, host: Any) -> None:
        """Replace a process that was lost, unless its node was."""
        import ray

        node, need = self._places.pop(host)
        if self._is_open and node in {there["NodeID"] for there in ray.nodes() if there["Alive"]}:
            self._start(node, need)
        elif not self._places:
            self._idle.put(None)

    def close(self) -> None:
        """End every process, whatever it does."""
        import ray

        self._is_open = False
        for host in list(self._places):
            ray.kill(host)
        self._idle.put(None)
        self.shutdown(cancel_futures=True)


def _result(ref: Any) -> Any:
    """Return what a call answered; what it raised is raised."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise error.cause from None


@contextmanager
def open_cluster(address: str, unit: Literal["core", "node", "gpu"], per_node: int = 0) -> Iterator[Cluster]:
    """Join the Ray cluster at `address`, HOST:PORT, or start one of this machine alone: "local".

    `unit`: one process for each core, node or GPU; `per_node`: so many on each node instead of one a core.
    An address that does not answer, other versions on a node, or no Ray raise ValueError.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--cluster needs Ray: pip install 'ray>=2.60'") from None
    where: dict[str, Any] = {"num_cpus": cores(), "include_dashboard": False}
    if address != "local":
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal()) or "/" in host:
            raise ValueError(f"bad cluster {address!r}: expected local, or HOST:PORT of `ray start --head`")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cluster {address} does not answer ({error}): start it by `ray start --head`"
            ) from None
        where = {"address": address}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": "error", "configure_logging": False}
    try:
        ray.init(**where, **quiet)
    except (RuntimeError, ConnectionError, ValueError) as error:  # versions of Ray and Python, no node here
        raise ValueError(f"cluster {address}: {one_line(str(error), 500)}") from None
    try:
        cluster = Cluster(unit, per_node)
        try:
            yield cluster
        finally:
            cluster.close()
    finally:
        ray.shutdown()
