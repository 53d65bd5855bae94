"""Processes of one training on this machine: forked from a server that has torch loaded (a second each), or
started by torchrun, which ends and restarts them.
"""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

from worldvla.config import Config, from_json
from worldvla.train.loop import train

ROOT = Path(__file__).parents[1]
SLOW = ("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.tensorboard")
"""What takes a rank seconds to load; the server has no path to our own modules."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(num: int, *runs: tuple[Config, Path], timeout: float = 280) -> None:
    """Train each config in its run directory, one after the other, on `num` ranks; errors are raised."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(SLOW))
    arguments = (num, free_port(), runs)
    ranks = start_processes(_rank, arguments, num, join=False, start_method="forkserver")
    assert ranks is not None
    end = time.monotonic() + timeout
    try:
        while not ranks.join(1):
            assert time.monotonic() < end, f"{num} ranks did not end in {timeout} s"
    finally:
        for process in filter(None, ranks.processes):
            process.kill()


def _rank(rank: int, num: int, port: int, runs: tuple[tuple[Config, Path], ...]) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for config, run_dir in runs:
        train(config, run_dir)


def torchrun(num: int, run_dir: Path, restarts: int = 0, port: int = 0) -> "subprocess.Popen[str]":
    """Start torchrun on a node of `num` ranks that train what run_dir/config.json says; its output is one
    pipe. With a `port`, it is one of two nodes, which meet there.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    two = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    command += [*two, "--local-addr", "127.0.0.1"] if port else ["--standalone"]
    command += [str(Path(__file__)), str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # parallel.start says why
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    outcome = train(from_json(Config, json.loads((run_dir / "config.json").read_text())), run_dir)
    sys.exit(0 if outcome.is_finished else 130)
