"""Speed of the built-in world and of decoding, each beside its baselines in the same run; ends with one JSON
line.

Run: make bench   (or: python -m paper.bench --sizes 3m --seconds 1)

Sizes: 3m is the shipped model (or --checkpoint), on its own observation. 25m and 92m have random weights, the
published 65,536 ids and layout at 256 pixels, two frames, K = 10; so have 1b and 7b, which need --device
cuda. Baselines, same weights, same prompts: one by one with our cache; one by one with the whole sequence run
again for each token; on a GPU, side by side without recorded passes; `transformers`' Chameleon `generate`
with its cache, where it is installed and the model has no place embeddings. It has no selective mask: it does
the same work under a causal one, the structure of the chunk included (9 K tokens).
`prefill_ms` is the first model pass, `chunk_ms` what follows it; images are tokenised before both. `passes`:
model passes of a chunk, the first included (not told on a GPU), or of a frame. Frames: `ms_frame` by verified
drafts, `ms_frame_plain` one code a pass. A random model's frames are noise, of which no guess is right: their
`passes` are the worst case. `tokens_s`: action codes a second of whole queries, the
best over batches of up to --batch. `prefill_of_matmul`, `chunk_of_bandwidth`: operations and bytes (weights
and cache, read once a pass) a second, as parts of what one large product and one large copy reach in the same
run; above 1 where a small model stays in the processor's cache. `peak_mb`: of our own decoding, weights
included.
"""

import argparse
import importlib.util
import json
import re
import resource
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
from paper.compiled import compiled
from worldvla.batch import Batch, Sample
from worldvla.config import LayoutConfig, ModelConfig
from worldvla.data.sample import SampleBuilder
from worldvla.data.show import CountedWords
from worldvla.infer.cache import Cache
from worldvla.infer.decode import bin_scores, decode_chunk, decode_frame
from worldvla.infer.graphs import Runner
from worldvla.infer.model import load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.machine import find_device, matmul_rate, provenance
from worldvla.model.mask import dense_mask
from worldvla.model.transformer import Transformer
from worldvla.recipes import PUBLISHED
from worldvla.sim.suites import make, tasks
from worldvla.tokenizers.action import WORLDVLA
from worldvla.vocab import Vocab, chameleon

SHIPPED = Path(worldvla.__file__).parent / "assets/tabletop"
SIZES = {
    "25m": ModelConfig(num_layers=12, width=160, num_heads=5, num_kv_heads=5, hidden=448),
    "92m": ModelConfig(num_layers=8, width=512, num_heads=8, num_kv_heads=8, hidden=1376),
    "1b": ModelConfig(num_layers=16, width=2048, num_heads=16, num_kv_heads=16, hidden=5504),
    "7b": PUBLISHED,
}
ON_GPU = ("1b", "7b")
COLUMNS = (
    *("size", "parameters", "decoding", "prefill_ms", "chunk_ms", "chunk_ms_p95", "actions_s"),
    *("slower_chunk", "slower_query", "ms_frame", "passes"),
)
OURS = (
    *("size", "tokens_s", "tokens_s_best", "best_batch", "peak_mb", "prefill_of_matmul"),
    *("chunk_of_bandwidth", "instruction_kept_time", "same_codes"),
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
    who: dict[str, Any]
    """What a record names as the model."""
    runner: Runner


def timed(action: Callable[[], object], seconds: float, least: int = 3) -> list[float]:
    """Return the milliseconds of each call, after one that is not counted (none where `least` is 1)."""
    if least > 1:
        action()
        synchronize()
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < least:
        before = time.perf_counter()
        action()
        synchronize()
        times.append(1e3 * (time.perf_counter() - before))
        if least == 1:
            break
    return times


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine(device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Return what the machine reaches: operations a second of one large product, bytes a second of a copy."""
    side, size = (8192, 2**30) if device == "cuda" else (2048, 2**28)
    product = matmul_rate(device, str(dtype).removeprefix("torch."), seconds, side)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = statistics.median(timed(lambda: target.copy_(source), seconds))
    return {"matmul_flops_s": product, "copy_bytes_s": 2e3 * size / copy}


def peak_mb(action: Callable[[], object]) -> float:
    """Return the megabytes held at most while `action` runs; where the system keeps only one, ever."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() / 1e6
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        action()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    reset.write_text("5")
    action()
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert found is not None
    return 1.024e-3 * int(found[1])


def simulation(seconds: float) -> dict[str, float]:
    env = make(tasks("tabletop_goal")[0], {"agentview": (64, 64)})
    env.reset(options={"init": 0})
    still, rates = np.zeros(7), {}
    for name in ("steps_s_camera", "steps_s_physics"):
        rates[name] = 1e3 / statistics.median(timed(lambda: env.step(still), seconds))
        env.rendering = False  # pyright: ignore[reportAttributeAccessIssue]
    return rates


def case_of(
    size: str, checkpoint: Path, quantize: Any, device: str, dtype: torch.dtype, prepare: Any
) -> Case:
    if size == "3m":
        loaded, task = load(checkpoint, device, dtype, quantize), tasks("tabletop_goal")[0]
        observation = make(task, loaded.view_sizes).reset(options={"init": 0})[0]
        policy, world = Policy(loaded), World(loaded)
        prompt = policy.prompts([{**observation, "instruction": task.instruction}])[0]
        world.reset(observation)
        (world_prompt,) = world.prompts(np.zeros((1, loaded.config.layout.num_action_dims)))
        who = {key: value for key, value in loaded.identity().items() if key != "path"}
        runner, samples = Runner(loaded.transformer, prepare), (prompt, world_prompt)
        pieces = loaded.transformer, loaded.vocab, loaded.builder
        return Case(*pieces, *samples, world.current(), who, runner)
    rng, vocab = np.random.default_rng(0), chameleon()
    builder = SampleBuilder(LayoutConfig(chunk=10), vocab, CountedWords(60_000), WORLDVLA)
    with torch.device(device):
        model = Transformer(SIZES[size], vocab.size).eval().requires_grad_(False).to(dtype)
    if size not in ON_GPU:
        model.init_weights(0)
    old, new = (rng.integers(0, vocab.num_image_codes, 256) for _ in range(2))
    prompt = builder.policy_prompt("put the bowl on the plate", None, [(old,), (new,)])
    return Case(
        model,
        vocab,
        builder,
        prompt,
        builder.world_prompt([(new,)], np.zeros(7)),
        new[None],
        {"name": "random weights"},
        Runner(model, prepare),
    )


def without_cache(case: Case) -> np.ndarray:
    """Return codes (K, A) of a loop that runs the whole sequence again for each token."""
    tail, blocks_UA = case.builder.policy_tail(), case.builder.action_block_positions(0)
    parts = [Batch.stack([sample], case.vocab.pad) for sample in (case.prompt, tail)]
    names = [name for name, tensor in vars(parts[0]).items() if tensor is not None]
    whole = Batch(**{n: torch.cat([getattr(p, n) for p in parts], 1) for n in names})
    whole = whole.to(case.model.head.weight.device)
    start, span = len(case.prompt), case.vocab.action
    for block in blocks_UA:
        for position in block[1:-1] + start:
            places = [getattr(whole, name)[:, :position] for name in ("row_BT", "col_BT")]
            x_BTD = case.model(whole.ids_BT[:, :position], dense_mask(whole.chunk_BT[:, :position]), *places)
            best_B = bin_scores(case.model.logits(x_BTD[:, -1], span)).argmax(-1)
            whole.ids_BT[:, position] = best_B + span.start
    return whole.ids_BT[0, start + blocks_UA[:, 1:-1]].cpu().numpy() - span.start


def hugging_face(case: Case) -> tuple[Callable[[], object], torch.nn.Module] | str:
    """Return a call of `generate` over a chunk and the model's last norm, or why there is none."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if case.model.row_embed is not None:
        return "Chameleon has no place embeddings"
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from oracle import hub_config, published_state  # pyright: ignore[reportMissingImports]
    from transformers import ChameleonForConditionalGeneration

    config = hub_config(case.model.config, vocab_size=case.vocab.size, attn_implementation="sdpa")
    with torch.device(case.model.head.weight.device), torch.no_grad():
        theirs: Any = ChameleonForConditionalGeneration._from_config(
            config, dtype=case.model.head.weight.dtype
        )
    theirs.eval().load_state_dict(published_state(case.model), strict=False)
    num = case.builder.action_block_positions(0).size
    ids = torch.from_numpy(case.prompt.ids)[None].to(theirs.device)
    more = {"min_new_tokens": num, "max_new_tokens": num, "do_sample": False, "use_cache": True}
    call = partial(theirs.generate, input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    return call, theirs.model.norm


def split(
    call: Callable[[], object], norm: torch.nn.Module, seconds: float, least: int
) -> tuple[np.ndarray, int]:
    """Return milliseconds (n, 2) of the first pass, which ends in `norm`, and of the rest, of every call; and
    the passes of a call that are launched: recorded ones are not seen.
    """
    marks: list[float] = []

    def mark(*_: object) -> None:
        if not marks:  # of the first pass alone: to wait costs time
            synchronize()
        marks.append(time.perf_counter())

    handle = norm.register_forward_hook(mark)
    found: list[tuple[float, float]] = []

    def once() -> None:
        marks.clear()
        before = time.perf_counter()
        call()
        synchronize()
        found.append((marks[0] - before, time.perf_counter() - marks[0]))

    count = len(timed(once, seconds, least))
    handle.remove()
    return 1e3 * np.array(found[-count:]), len(marks)


def limits(case: Case, row: dict[str, Any], reached: dict[str, float]) -> dict[str, float]:
    """Return which parts of the machine's product and copy a chunk's prefill and later passes reach."""
    model, length, num_passes = case.model, len(case.prompt), case.builder.layout.num_action_dims - 1
    width = model.head.weight.element_size()
    cache = 2 * model.config.num_layers * model.layers[0].attention.k.out_features * length * width  # pyright: ignore
    read = sum(t.nbytes for t in model.layers.state_dict().values()) + cache
    num_bytes, flops = num_passes * (read + 256 * model.config.width * width), model.flops(length, 0)
    return {
        "prefill_of_matmul": 1e3 * flops / row["prefill_ms"] / reached["matmul_flops_s"],
        "chunk_of_bandwidth": 1e3 * num_bytes / row["chunk_ms"] / reached["copy_bytes_s"],
    }


def kept_instruction(case: Case) -> dict[str, float]:
    """Return what part of the prefill's tokens and of its time is left where the keys and values of the
    instruction are kept from the query before.
    """
    model, device, length = case.model, case.model.head.weight.device, len(case.prompt)
    images = [i for i in (case.vocab.bostate, case.vocab.boi) if i is not None]
    start = int(np.isin(case.prompt.ids, images).argmax())
    batch = Batch.stack([case.prompt], case.vocab.pad).to(device)
    mask, cache = dense_mask(batch.chunk_BT), Cache(model.config, 1, length, model.head.weight)
    where = torch.arange(length, device=device)[None]

    def prefill(first: int) -> None:
        cache.place(slice(first, length), length)
        fields = (t[:, first:] for t in (batch.row_BT, batch.col_BT, where))
        model(batch.ids_BT[:, first:], mask[:, :, first:], *fields, cache=cache.layers)

    both = [[timed(partial(prefill, first), 0, 1)[0] for first in (0, start)] for _ in range(21)][1:]
    ratio = statistics.median(kept / whole for whole, kept in both)
    return {"instruction_kept_tokens": 1 - start / length, "instruction_kept_time": ratio}


@torch.inference_mode()
def decoding(case: Case, seconds: float, most: int, reached: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return way of decoding -> numbers; the ways that are ours are checked to give the same codes."""
    model, tail, blocks_UA = case.model, case.builder.policy_tail(), case.builder.action_block_positions(0)

    def ours(parallel: bool, batch: int = 1) -> np.ndarray:
        prompts = [case.prompt] * batch
        return decode_chunk(case.runner, case.vocab, prompts, tail, blocks_UA, parallel=parallel).codes_BUA[0]

    def eager() -> np.ndarray:
        launched = Runner(model, recorded=False)
        return decode_chunk(launched, case.vocab, [case.prompt], tail, blocks_UA).codes_BUA[0]

    peak = peak_mb(lambda: ours(True))
    theirs = hugging_face(case)
    ways: dict[str, tuple[Callable[[], object], torch.nn.Module, int]] = {
        "side by side": (lambda: ours(True), model.norm, 3),
        "one by one": (lambda: ours(False), model.norm, 3),
        **({"side by side, no graphs": (eager, model.norm, 3)} if model.head.weight.is_cuda else {}),
        "without cache": (lambda: without_cache(case), model.norm, 1 if len(blocks_UA) > 5 else 3),
    }
    if not isinstance(theirs, str):
        ways["transformers"] = (*theirs, 3)
    rows: dict[str, dict[str, Any]] = {}
    codes = ours(True)
    same = float((codes == ours(False)).mean())
    assert same == 1 or model.head.weight.dtype != torch.float32, "side by side changed a code"
    for name, (call, norm, least) in ways.items():
        times, passes = split(call, norm, seconds, least)
        prefill_ms, chunk_ms = (float(v) for v in np.median(times, 0))
        query_ms = float(np.median(times.sum(1)))
        rows[name] = {
            "prefill_ms": prefill_ms,
            "chunk_ms": chunk_ms,
            "chunk_ms_p95": float(np.quantile(times[:, 1], 0.95)),
            "query_ms": query_ms,
            "actions_s": 1e3 * len(blocks_UA) / query_ms,
        } | ({} if model.head.weight.is_cuda else {"passes": passes})
        first = rows["side by side"]
        rows[name] |= {f"slower_{n}": rows[name][f"{n}_ms"] / first[f"{n}_ms"] for n in ("chunk", "query")}
    batches = [2**i for i in range(most.bit_length())]
    rates = {
        b: 1e3 * b * codes.size / statistics.median(timed(partial(ours, True, b), seconds / 4))
        for b in batches
    }
    best = max(rates, key=lambda b: rates[b])
    first = rows["side by side"]
    first |= {
        "tokens_s": rates[1],
        "tokens_s_best": rates[best],
        "best_batch": best,
        "peak_mb": peak,
        "same_codes": same,
    }
    first |= limits(case, first, reached) | kept_instruction(case)
    if isinstance(theirs, str):
        rows["transformers"] = {"left_out": f"transformers left out: {theirs}"}
    return rows


def frames(case: Case, seconds: float) -> dict[str, float]:
    tail = case.builder.world_tail()
    prompts, (runner, vocab) = [case.world_prompt], (case.runner, case.vocab)
    plain, plain_stats = decode_frame(runner, vocab, prompts, tail)
    drafted, stats = decode_frame(runner, vocab, prompts, tail, case.guess_BN)
    same = float((plain == drafted).mean())
    assert same == 1 or stats.close + plain_stats.close, "drafts changed a code that was no near tie"
    least = 1 if plain.size > 100 else 3
    plain_ms = timed(lambda: decode_frame(runner, vocab, prompts, tail), seconds, least)
    ms = timed(lambda: decode_frame(runner, vocab, prompts, tail, case.guess_BN), seconds, least)
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
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=["3m", "25m", "92m"])
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED, help="model of size 3m")
    parser.add_argument("--quantize", choices=["", "int8", "int4"], default="", help="of size 3m")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="largest batch tried")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our blocks (transformers' stay)")
    args = parser.parse_args()
    try:
        find_device(args.device)
        if args.device == "cpu" and (big := sorted(set(args.sizes) & set(ON_GPU))):
            raise ValueError(f"{', '.join(big)}: too large for a CPU, pass --device cuda")
        if min(args.batch, args.threads) < 1:
            raise ValueError(f"--batch and --threads must be at least 1, got {args.batch}, {args.threads}")
        if args.quantize and args.sizes != ["3m"]:
            raise ValueError(f"--quantize is of size 3m alone, got sizes {args.sizes}: pass --sizes 3m")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    reached = machine(args.device, dtype, args.seconds)
    world = simulation(args.seconds) if "3m" in args.sizes else {}
    numbers: dict[str, Any] = {"simulation": world, "machine": reached}
    console = Console(stderr=True, width=150)
    for size in args.sizes:  # each is printed when it is done: what a stop leaves is not nothing
        table, ours = Table(*COLUMNS), Table(*OURS)
        prepare = compiled if args.compile else None
        case = case_of(size, args.checkpoint, args.quantize, args.device, dtype, prepare)
        rows, frame = decoding(case, args.seconds, args.batch, reached), frames(case, args.seconds)
        parameters = case.model.num_parameters()
        numbers[size] = {"parameters": parameters, "actions": rows, "frames": frame, "model": case.who}
        lines = dict(rows)
        for way, suffix in (("frame by drafts", ""), ("frame, one code a pass", "_plain")):
            lines[way] = {name: frame[name + suffix] for name in ("ms_frame", "passes")}
        for way, row in lines.items():
            cells = [f"{row[c]:.1f}" if c in row else "" for c in COLUMNS[3:]]
            table.add_row(size, f"{parameters:,}", row.get("left_out", way), *cells)
        ours.add_row(size, *(f"{rows['side by side'][c]:.4g}" for c in OURS[1:]))
        console.print(table, ours)
    for name, value in (numbers["simulation"] | reached).items():
        console.print(f"{name} {value:.4g}")
    settings = {name: getattr(args, name) for name in ("threads", "quantize", "device", "dtype", "compile")}
    print(json.dumps({"bench": numbers, **settings, **provenance()}))


if __name__ == "__main__":
    main()
