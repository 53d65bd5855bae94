"""Speed of the built-in world and of decoding, each beside its baseline in the same run; ends with one JSON
line.

Run: make bench   (or: python tools/bench.py --checkpoint out/train/tabletop --seconds 5)
Decoding baseline: the same weights and mask, the whole sequence run again for each token, as a loop without
a cache does.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import worldvla
from worldvla.batch import Batch
from worldvla.eval.record import provenance
from worldvla.infer.decode import best_bin, decode_actions
from worldvla.model.mask import dense_mask
from worldvla.sim.env import make, tasks

SHIPPED = Path(worldvla.__file__).parent / "assets/tabletop"


def rate(action: Callable[[], object], seconds: float) -> float:
    """Return calls a second: the median over calls of one warm process."""
    action()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = time.perf_counter()
        action()
        times.append(time.perf_counter() - before)
    return 1.0 / statistics.median(times)


def simulation(seconds: float) -> dict[str, float]:
    env = make(tasks("tabletop_goal")[0], {"agentview": (64, 64)})
    env.reset(options={"init": 0})
    still = np.zeros(7)
    with_camera = rate(lambda: env.step(still), seconds)
    env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    return {"steps_s_camera": with_camera, "steps_s_physics": rate(lambda: env.step(still), seconds)}


def decoding(checkpoint: Path, seconds: float) -> dict[str, float]:
    model = worldvla.load(checkpoint)
    env = make(tasks("tabletop_goal")[0], model.view_sizes)
    observation = {**env.reset(options={"init": 0})[0], "instruction": tasks("tabletop_goal")[0].instruction}
    policy = model.policy()
    prompts = policy.prompts([observation])
    tail, blocks_KA = model.builder.policy_tail(), model.builder.action_block_positions(0)

    def one_by_one() -> np.ndarray:
        batch = Batch.stack([*prompts], model.vocab.pad)
        end = Batch.stack([tail], model.vocab.pad)
        whole = Batch(**{n: torch.cat((t, getattr(end, n)), 1) for n, t in vars(batch).items()})
        start = batch.ids_BT.shape[1]
        for block in blocks_KA:
            for position in block[1:-1] + start:
                mask = dense_mask(whole.chunk_BT[:, :position])
                parts = [getattr(whole, name)[:, :position] for name in ("row_BT", "col_BT")]
                x_BTD = model.transformer(whole.ids_BT[:, :position], mask, *parts)
                code = best_bin(model.transformer.logits(x_BTD[:, -1], model.vocab.action))
                whole.ids_BT[:, position] = code + model.vocab.action.start
        return whole.ids_BT[:, start + blocks_KA[:, 1:-1]][0].numpy() - model.vocab.action.start

    def side_by_side() -> np.ndarray:
        return decode_actions(model.transformer, model.vocab, prompts, tail, blocks_KA)[0]

    with torch.inference_mode():
        np.testing.assert_array_equal(one_by_one(), side_by_side())
        slow, fast = rate(one_by_one, seconds), rate(side_by_side, seconds)
    whole = rate(lambda: policy.act(observation), seconds)
    return {"chunks_s": fast, "chunks_s_one_by_one": slow, "ratio": fast / slow, "queries_s": whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers = {**simulation(args.seconds), **decoding(args.checkpoint, args.seconds)}
    table = Table("what", "a second")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.1f}")
    Console(stderr=True).print(table)
    print(json.dumps({"bench": numbers, "threads": args.threads, **provenance()}))


if __name__ == "__main__":
    main()
