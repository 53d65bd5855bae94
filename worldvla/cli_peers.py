"""The verbs by which policies meet, `serve` and `compare`; nothing heavy is imported before they run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from worldvla.cli_data import say


def _key(given: str) -> str:
    return given or os.environ.get("WORLDVLA_API_KEY", "")


def remote_actor(address: str, suite: str, execute: int | None, size: int | None, api_key: str) -> Any:
    """Return the actor behind `worldvla eval websocket://...`, connected."""
    from worldvla.eval.remote import RemoteActor

    return RemoteActor(address, suite, execute, size, _key(api_key))


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a checkpoint to any openpi client; `worldvla eval websocket://...` is one."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run directory (its newest checkpoint)."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: every network, set --api-key then."""
    port: int = 8000
    """0: any free port."""
    api_key: str = ""
    """Key that clients must send. Default: the environment variable WORLDVLA_API_KEY; none: let all in."""
    resize: bool = False
    """Resize pictures of another size, with black borders, instead of refusing them."""
    head: Literal["discrete", "continuous"] = "discrete"
    """Which head acts: bins, or the continuous one of a model that has one."""
    device: str = "cpu"
    quantize: Literal["", "int8", "int4"] = ""
    """Hold the model's large matrices in 8 or 4 bits: less memory, not less time (docs/MODELS.md)."""

    def run(self) -> int:
        from worldvla.serve.server import serve_checkpoint

        serve_checkpoint(
            self.checkpoint,
            host=self.host,
            port=self.port,
            api_key=_key(self.api_key),
            head=self.head,
            resize=self.resize,
            device=self.device,
            quantize=self.quantize,
            on_start=lambda at: say(f"serving at {at}   next: worldvla eval websocket://{at} --suite SUITE"),
        )
        return 0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two evaluations episode by episode; the last line of the output is JSON."""

    a: tyro.conf.Positional[Path]
    """A record.json, or the directory of an evaluation."""
    b: tyro.conf.Positional[Path]
    force: bool = False
    """Compare though suite, seed or protocol differ."""

    def run(self) -> int:
        from rich.console import Console

        from worldvla.eval.compare import compare, read_record, table

        comparison = compare(read_record(self.a), read_record(self.b), self.force)
        Console().print(table(comparison))
        low, high = comparison["interval_95"]
        left_out = (
            f"{comparison['left_out_errors']} left out for errors, {sum(comparison['unpaired'])} unpaired"
        )
        say(
            f"{comparison['pairs']} pairs ({left_out}); A - B {comparison['difference']:+.3f} "
            f"(95 % {low:+.3f} to {high:+.3f}), McNemar exact p = {comparison['p']:.4g}"
        )
        say(json.dumps(comparison))
        return 0
