"""Speed of the built-in world and of decoding, each beside its baselines in the same run; ends with one JSON
line.

Run: worldvla bench   (or: make bench; python tools/bench.py --sizes 3m --seconds 1)

Sizes: 3m is the shipped model (or --checkpoint), on its own observation. 25m and 92m have random weights, the
published 65,536 ids and layout at 256 pixels, two frames, K = 10. Baselines, same weights, same prompts: one
by one with our cache; one by one with the whole sequence run again for each token; `transformers`' Chameleon
`generate` with its cache, where it is installed and the model has no place embeddings. It has no selective
mask: it does the same work under a causal one, the structure of the chunk included (9 K tokens).
`prefill_ms` is the first model pass, `chunk_ms` what follows it; images are tokenised before both. Frames:
`ms_frame` by verified drafts, `ms_frame_plain` one code a pass. A random model's frames are noise, of which
no guess is right: their `passes` are the worst case.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import worldvla
from worldvla.batch import Batch, Sample
from worldvla.config import LayoutConfig, ModelConfig
from worldvla.data.sample import SampleBuilder
from worldvla.eval.record import provenance
from worldvla.infer.decode import best_bin, decode_chunk, decode_frame
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.sim.env import make, tasks
from worldvla.tokenizers.action import WORLDVLA
from worldvla.vocab import Vocab, chameleon

SHIPPED = Path(worldvla.__file__).parent / "assets/tabletop"
SIZES = {
    "25m": ModelConfig(num_layers=12, width=160, num_heads=5, num_kv_heads=5, hidden=448),
    "92m": ModelConfig(num_layers=8, width=512, num_heads=8, num_kv_heads=8, hidden=1376),
}
COLUMNS = (
    *("size", "parameters", "decoding", "prefill_ms", "chunk_ms", "chunk_ms_p95", "actions_s"),
    *("slower_chunk", "slower_query", "ms_frame", "passes"),
)


@dataclass(frozen=True)
class Case:
    """A model, a policy prompt, and a world prompt with the guess of its next frame."""

    model: Transformer
    vocab: Vocab
    builder: SampleBuilder
    prompt: Sample
    world_prompt: Sample
    guess_BN: np.ndarray


class Words:
    """Text of as many tokens as it has words: ids of the published table that stand for text."""

    size = 65_536

    def encode(self, text: str) -> list[int]:
        return [self.size - 1 - i for i, _ in enumerate(text.split())]


def timed(action: Callable[[], object], seconds: float, least: int = 3) -> list[float]:
    """Return the milliseconds of each call, after one that is not counted (none where `least` is 1)."""
    if least > 1:
        action()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < least:
        before = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - before))
        if least == 1:
            break
    return times


def simulation(seconds: float) -> dict[str, float]:
    env = make(tasks("tabletop_goal")[0], {"agentview": (64, 64)})
    env.reset(options={"init": 0})
    still, rates = np.zeros(7), {}
    for name in ("steps_s_camera", "steps_s_physics"):
        rates[name] = 1e3 / statistics.median(timed(lambda: env.step(still), seconds))
        env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    return rates


def case_of(size: str, checkpoint: Path, quantize: Any) -> Case:
    if size == "3m":
        loaded, task = worldvla.load(checkpoint, quantize=quantize), tasks("tabletop_goal")[0]
        observation = make(task, loaded.view_sizes).reset(options={"init": 0})[0]
        policy, world = loaded.policy(), loaded.world()
        prompt = policy.prompts([{**observation, "instruction": task.instruction}])[0]
        world.reset(observation)
        codes = np.concatenate([view.reshape(-1) for view in world.codes.values()])
        frame = loaded.builder.split_views(codes)
        world_prompt = loaded.builder.world_prompt([frame], np.zeros(loaded.config.layout.num_action_dims))
        return Case(loaded.transformer, loaded.vocab, loaded.builder, prompt, world_prompt, codes[None])
    rng, vocab = np.random.default_rng(0), chameleon()
    builder = SampleBuilder(LayoutConfig(chunk=10), vocab, Words(), WORLDVLA)
    model = Transformer(SIZES[size], vocab.size).eval().requires_grad_(False)
    model.init_weights(0)
    old, new = (rng.integers(0, vocab.num_image_codes, 256) for _ in range(2))
    prompt = builder.policy_prompt("put the bowl on the plate", None, [(old,), (new,)])
    return Case(model, vocab, builder, prompt, builder.world_prompt([(new,)], np.zeros(7)), new[None])


def without_cache(case: Case) -> np.ndarray:
    """Return codes (K, A) of a loop that runs the whole sequence again for each token."""
    tail, blocks_KA = case.builder.policy_tail(), case.builder.action_block_positions(0)
    parts = [Batch.stack([sample], case.vocab.pad) for sample in (case.prompt, tail)]
    whole = Batch(**{n: torch.cat([getattr(p, n) for p in parts], 1) for n in vars(parts[0])})
    start, span = len(case.prompt), case.vocab.action
    for block in blocks_KA:
        for position in block[1:-1] + start:
            places = [getattr(whole, name)[:, :position] for name in ("row_BT", "col_BT")]
            x_BTD = case.model(whole.ids_BT[:, :position], dense_mask(whole.chunk_BT[:, :position]), *places)
            whole.ids_BT[:, position] = best_bin(case.model.logits(x_BTD[:, -1], span)) + span.start
    return whole.ids_BT[0, start + blocks_KA[:, 1:-1]].numpy() - span.start


def hugging_face(case: Case) -> tuple[Callable[[], object], torch.nn.Module] | str:
    """Return a call of `generate` over a chunk and the model's last norm, or why there is none."""
    tests = Path(__file__).parents[1] / "tests"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if case.model.row_embed is not None:
        return "Chameleon has no place embeddings"
    if not (tests / "oracle.py").is_file():
        return f"no {tests / 'oracle.py'}"
    sys.path.insert(0, str(tests))
    from oracle import hub_config, published_state  # pyright: ignore[reportMissingImports]
    from transformers import ChameleonForConditionalGeneration

    config = hub_config(case.model.config, vocab_size=case.vocab.size, attn_implementation="sdpa")
    theirs: Any = ChameleonForConditionalGeneration(config).eval()
    theirs.load_state_dict(published_state(case.model), strict=False)
    num = case.builder.action_block_positions(0).size
    ids = torch.from_numpy(case.prompt.ids)[None]
    more = {"min_new_tokens": num, "max_new_tokens": num, "do_sample": False, "use_cache": True}
    call = partial(theirs.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return call, theirs.model.norm


def split(call: Callable[[], object], norm: torch.nn.Module, seconds: float, least: int) -> np.ndarray:
    """Return milliseconds (n, 2) of the first pass, which ends in `norm`, and of the rest, of every call."""
    marks: list[float] = []
    handle = norm.register_forward_hook(lambda *_: marks.append(time.perf_counter()))
    found: list[tuple[float, float]] = []

    def once() -> None:
        marks.clear()
        before = time.perf_counter()
        call()
        found.append((marks[0] - before, time.perf_counter() - marks[0]))

    count = len(timed(once, seconds, least))
    handle.remove()
    return 1e3 * np.array(found[-count:])


@torch.inference_mode()
def decoding(case: Case, seconds: float) -> dict[str, dict[str, Any]]:
    """Return way of decoding -> numbers; the ways that are ours are checked to give the same codes."""
    model, tail, blocks_KA = case.model, case.builder.policy_tail(), case.builder.action_block_positions(0)

    def ours(together: bool) -> np.ndarray:
        prompts = [case.prompt]
        return decode_chunk(model, case.vocab, prompts, tail, blocks_KA, together=together).codes_BKA[0]

    theirs = hugging_face(case)
    ways: dict[str, tuple[Callable[[], object], torch.nn.Module, int]] = {
        "side by side": (lambda: ours(True), model.norm, 3),
        "one by one": (lambda: ours(False), model.norm, 3),
        "without cache": (lambda: without_cache(case), model.norm, 1 if len(blocks_KA) > 5 else 3),
    }
    if not isinstance(theirs, str):
        ways["transformers"] = (*theirs, 3)
    rows: dict[str, dict[str, Any]] = {}
    codes = ours(True)
    np.testing.assert_array_equal(codes, ours(False))
    for name, (call, norm, least) in ways.items():
        times = split(call, norm, seconds, least)
        prefill_ms, chunk_ms = (float(v) for v in np.median(times, 0))
        query_ms = float(np.median(times.sum(1)))
        rows[name] = {
            "prefill_ms": prefill_ms,
            "chunk_ms": chunk_ms,
            "chunk_ms_p95": float(np.quantile(times[:, 1], 0.95)),
            "query_ms": query_ms,
            "actions_s": 1e3 * len(blocks_KA) / query_ms,
        }
        first = rows["side by side"]
        rows[name] |= {f"slower_{n}": rows[name][f"{n}_ms"] / first[f"{n}_ms"] for n in ("chunk", "query")}
    if isinstance(theirs, str):
        rows["transformers"] = {"left_out": f"transformers left out: {theirs}"}
    return rows


def frames(case: Case, seconds: float) -> dict[str, float]:
    tail = case.builder.world_tail()
    prompts, (model, vocab) = [case.world_prompt], (case.model, case.vocab)
    plain, plain_stats = decode_frame(model, vocab, prompts, tail)
    drafted, stats = decode_frame(model, vocab, prompts, tail, case.guess_BN)
    same = float((plain == drafted).mean())
    assert same == 1 or stats.close + plain_stats.close, "drafts changed a code that was no near tie"
    least = 1 if plain.size > 100 else 3
    plain_ms = timed(lambda: decode_frame(model, vocab, prompts, tail), seconds, least)
    ms = timed(lambda: decode_frame(model, vocab, prompts, tail, case.guess_BN), seconds, least)
    return {
        "ms_frame": statistics.median(ms),
        "ms_frame_plain": statistics.median(plain_ms),
        "passes": stats.passes,
        "passes_plain": plain_stats.passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ["3m", *SIZES]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="model of size 3m")
    parser.add_argument("--quantize", choices=["", "int8", "int4"], default="", help="of size 3m")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numbers: dict[str, Any] = {"simulation": simulation(args.seconds)}
    table, console = Table(*COLUMNS), Console(stderr=True, width=150)
    for size in args.sizes:
        case = case_of(size, args.checkpoint, args.quantize)
        rows, frame = decoding(case, args.seconds), frames(case, args.seconds)
        parameters = case.model.num_parameters()
        numbers[size] = {"parameters": parameters, "actions": rows, "frames": frame}
        lines = dict(rows)
        for way, suffix in (("frame by drafts", ""), ("frame, one code a pass", "_plain")):
            lines[way] = {name: frame[name + suffix] for name in ("ms_frame", "passes")}
        for way, row in lines.items():
            cells = [f"{row[c]:.1f}" if c in row else "" for c in COLUMNS[3:]]
            table.add_row(size, f"{parameters:,}", row.get("left_out", way), *cells)
    console.print(table)
    for name, value in numbers["simulation"].items():
        console.print(f"{name} {value:.0f}")
    print(json.dumps({"bench": numbers, "threads": args.threads, "quantize": args.quantize, **provenance()}))


if __name__ == "__main__":
    main()
