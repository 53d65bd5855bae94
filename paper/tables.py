"""Records -> the tables of paper/RESULTS.md and of README.md, each between two markers; words are a person's.

    python -m paper.tables            write them
    python -m paper.tables --check    write nothing; exit code 1 where a table is not what the records say

In RESULTS.md a table NAME stands between `<!-- table NAME -->` and `<!-- /table -->`, in README.md success
between `<!-- results -->` and `<!-- /results -->`, memory and time between those of `requirements`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tyro

from paper.records import LIBERO, PAIR, TABLETOP, Records, counts, ended, of_row, paired, pairs_of
from worldvla.eval.stats import Pairs, mcnemar, paired_interval, rank_agreement, wilson

ROOT = Path(__file__).parents[1]
PAPER = {
    "libero_spatial": "85.6 %",
    "libero_object": "89.0 %",
    "libero_goal": "82.6 %",
    "libero_10": "59.0 %",
}
"""WorldVLA, 7B, 256 pixels (arXiv 2506.21539, Table 1): 500 episodes a suite."""
NOT_RUN = "not run"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spec(text: str) -> list[list[str]]:
    """Return the lines of a text, each split at its bars."""
    return [line.split(" | ") for line in text.strip().splitlines()]


def rate(records: Records, names: Sequence[str], key: str = "successes", interval: bool = False) -> str:
    """Return k/n, with `interval` the percentage and its 95 % interval too."""
    k, n = counts(records, names, key)
    if not n:
        return NOT_RUN
    return f"{k}/{n}" + (f" = {100 * k / n:.1f} % ({percent(wilson(k, n))})" if interval else "")


def percent(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.0f} to {100 * interval[1]:.0f} %"


def cells(records: Records, row: str, suites: Sequence[str] = TABLETOP) -> list[str]:
    """Return a row's successes suite by suite, and of all suites with the interval."""
    return [
        *(rate(records, of_row(row, [suite])) for suite in suites),
        rate(records, of_row(row, suites), interval=True),
    ]


def effect(pairs: Pairs) -> tuple[str, str]:
    """Return the difference in points with its interval, and the exact p value."""
    low, high = paired_interval(pairs)
    p = mcnemar(pairs.only_a, pairs.only_b)
    difference = f"{100 * pairs.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return difference, f"{p:.2g}" + ("" if p < 0.05 else ", not significant")


def differences(
    records: Records, of: Iterable[tuple[str, str, str]], suites: Sequence[str] = TABLETOP
) -> str:
    """Return a table of A against B in success and in grasping, rows (A, B, words)."""
    rows = []
    for a, b, words in of:
        success, held = (paired(records, a, b, suites, grasped) for grasped in (False, True))
        if success is None or held is None:
            continue
        rows.append([words, success.total, *effect(success), *effect(held)])
    header = ("change", "pairs", "success, points (95 %)", "p", "grasping, points (95 %)", "p")
    return table(header, rows)


def queries(records: Records, names: Sequence[str]) -> str:
    """Return milliseconds a query of the policy, image to actions, while it was evaluated."""
    existing = [records[name] for name in names if name in records]
    if not existing:
        return NOT_RUN
    number = sum(-(-o["steps"] // r["protocol"]["executed"]) for r in existing for o in r["outcomes"])
    return f"{1000 * sum(r['policy_seconds'] for r in existing) / number:.0f} ms"


def training(records: Records, *names: str) -> str:
    """Return hours and hardware of trainings, one after the other; those on the same hardware together."""
    hours: dict[str, float] = {}
    for name in names:
        hardware = records[name]["hardware"]
        where = hardware["gpus"][0].split()[-1] if hardware["gpus"] else f"{hardware['cores']} cores"
        hours[where] = hours.get(where, 0.0) + records[name]["hours"]
    return " + ".join(f"{number:.2g} h on {where}" for where, number in hours.items())


README = """
tabletop_spatial tabletop_object tabletop_goal tabletop_long | tabletop_world/{} | \
tabletop tabletop_world tabletop_world/grasps
libero_spatial libero_object | libero/object_spatial_drawer/{}_discrete | \
libero/object_spatial_long libero/object_spatial_drawer
libero_goal | libero/goal/{}_discrete | libero/goal | (not shipped)
libero_10 | libero/visited/{}_discrete | tabletop tabletop_world libero/four libero/visited
"""
"""Suites of one model, its records, its trainings one after the other, a remark."""


def readme(records: Records) -> str:
    """Return the README's table: suite, success and interval, parameters and training, the paper's number."""
    rows = []
    for suites, pattern, trained, *remark in spec(README):
        hours = training(records, *(f"{name}/train" for name in trained.split()))
        for suite in suites.split():
            name = pattern.format(suite)
            k, n = counts(records, [name])
            size = f"{records[name]['checkpoint']['parameters'] / 1e6:.1f} M"
            success = f"{k}/{n} ({percent(wilson(k, n))})"
            rows.append([suite, success, f"{' '.join([size, *remark])}, {hours}", PAPER.get(suite, "")])
    results = table(("suite", "this repository", "parameters, training", "WorldVLA 7B, 256 px"), rows)
    record = records["tabletop_world/rank"]
    of = record["imagined"]["spearman"]
    low, high = of["interval_95"]
    shipped = records["tabletop_world/imagine"]["checkpoint"]["digest"]
    world = "The world model" if record["world"]["digest"] == shipped else "The previous world model"
    spearman = f"Spearman {of['value']:.2f} ({low:.2f} to {high:.2f})"
    ranked = f"{world} ranks {len(record['policies'])} policies, most of them noisy copies: {spearman}."
    pairs = of_plans(records, "imagination")
    without, tried = (n + pairs.both for n in (pairs.only_b, pairs.only_a))
    planned = (
        f"Trying eight chunks in imagination lifts a policy of 400 demonstrations from {without} to {tried} "
        f"of {pairs.total}."
    )
    return f"{results}\n\n{ranked}\n{planned}"


def requirements(records: Records) -> str:
    """Return the README's table of memory and time; of 7B: allocated on the device, random weights."""
    mode = records["bench/memory_7b"]["memory"]
    query = records["bench/cuda"]["bench"]["7b"]["actions"]["side by side"]["query_ms"]
    card = records["bench/memory_7b"]["gpu"]
    libero = records["libero/object_spatial_drawer/libero_spatial_discrete"]
    episode = libero["seconds"] / libero["episodes"]

    def gigabytes(name: str) -> str:
        return f"{mode[name]['measured'] / 1e9:.0f} GB"

    demo = records["bench/demo"]
    time = f"{demo['demo_s']:.0f} s after the installation"
    rows = [
        ["`make demo`", f"{demo['peak_gib']:.1f} GiB", time, "2 CPU cores"],
        ["LIBERO, evaluation", "1.7 GiB a worker", f"{episode:.1f} s an episode", "2 CPU cores"],
        ["7B, one query of ten actions", gigabytes("infer bfloat16"), f"{query:.0f} ms", card],
        ["7B in 4 bits", gigabytes("infer int4"), "", card],
        ["7B, LoRA on 4 bits, one sample", gigabytes("LoRA, int4 base"), "", card],
        ["7B, all weights, one sample", gigabytes("train all, layers again"), "", card],
    ]
    return table(("what", "memory", "time", "hardware"), rows)


def suites(records: Records) -> str:
    def row(words: str, pattern: str, four: Sequence[str]) -> list[str]:
        names = [pattern.format(suite) for suite in four]
        made = records.get(f"{pattern.rpartition('/')[0]}/train")
        hours = training(records, f"{pattern.rpartition('/')[0]}/train") if made else ""
        each = [rate(records, [name]) for name in names]
        return [words, *each, rate(records, names, interval=True), hours]

    paper = [
        ["OpenVLA, 7B (paper)", "84.7 %", "88.4 %", "79.2 %", "53.7 %", "76.5 %", ""],
        ["WorldVLA, 7B, 256 px (paper)", "85.6 %", "89.0 %", "82.6 %", "59.0 %", "79.1 %", ""],
        ["WorldVLA, 7B, 512 px (paper)", "87.6 %", "96.2 %", "83.4 %", "60.0 %", "81.8 %", ""],
    ]
    tabletop = [
        ("tabletop: the shipped model, 3 of 5 actions executed", "tabletop_world/{}"),
        ("tabletop: the policy that it grew from, 3 of 5 executed", "tabletop/{}"),
        ("the same, all 5 executed, as in the paper", "tabletop/{}_execute5"),
        ("the same, 1 of 5 executed", "tabletop/{}_execute1"),
        ("tabletop before DAgger (initial states 0 to 9)", "tabletop/first/{}"),
        ("random policy", "tabletop/{}_random"),
        ("open-loop replay of the mean demonstration", "tabletop/{}_blind"),
        ("scripted expert", "tabletop/{}_expert"),
    ]
    libero = [
        ("scripted expert (reads the simulator)", "libero/{}_expert"),
        ("one suite, 8.8 M, 3 of 5 executed", "libero/{}"),
        ("the same, all 5 executed", "libero/{}_execute5"),
        ("one suite, front view alone, no state, half the steps", "libero/{}_front"),
        ("two suites with a continuous head: discrete", "libero/object_spatial/{}_discrete"),
        ("the same: continuous (initial states 0 to 9)", "libero/object_spatial/{}_continuous"),
        ("two suites, 4.4 times the samples", "libero/object_spatial_long/{}_discrete"),
        ("libero (shipped): the same, then more of one task", "libero/object_spatial_drawer/{}_discrete"),
        ("libero, initial states like those of training", "libero/object_spatial_drawer/{}_training_states"),
        ("goal alone", "libero/goal/{}_discrete"),
        ("goal alone, initial states like those of training", "libero/goal/{}_training_states"),
        ("the goal model, trained on with long (initial states 0 to 4)", "libero/10/{}_discrete"),
        ("all four suites, 3.8 M, demonstrations alone (initial states 0 to 2)", "libero/four/{}_discrete"),
        (
            "libero_four (shipped): visited states, changed images (initial states 0 to 4)",
            "libero/visited/{}_discrete",
        ),
    ]
    head = ("LIBERO", "spatial", "object", "goal", "long", "all", "training")
    ours = [row(words, pattern, LIBERO) for words, pattern in libero]
    built_in = [row(words, pattern, TABLETOP)[:-1] for words, pattern in tabletop]
    return table(head, paper + ours) + "\n\n" + table(("built-in tabletop", *head[1:-1]), built_in)


def experts(records: Records) -> str:
    rows = []
    for suite in LIBERO:
        tasks = records[f"libero/{suite}_expert"]["tasks"]
        each = [f"{t['successes']}/{t['episodes'] - t['errors']}" for t in tasks]
        rows.append([suite, rate(records, [f"libero/{suite}_expert"]), *each])
    return table(("suite", "all", *map(str, range(10))), rows)


ABLATION = (
    ("action", "single actions", "77.8 / 82.9 / 67.3 / 23.0 / 62.8"),
    ("action_world", "single actions, world model", "80.2 / 88.0 / 73.1 / 27.3 / 67.2"),
    ("chunk_causal", "chunks, causal mask", "36.7 / 82.9 / 79.6 / 16.9 / 54.0"),
    ("chunk", "chunks, selective mask", "81.8 / 90.9 / 84.4 / 49.3 / 76.6"),
    ("full", "chunks, selective mask, world model", "84.0 / 90.9 / 85.1 / 52.4 / 78.1"),
)
"""Row, words, the paper's percentages of spatial, object, goal, long and all."""
COLUMNS = ("spatial", "object", "goal", "long", "all")


def ablation(records: Records) -> str:
    more = (
        ("full_even", "the same, image tokens weighted 1 instead of 0.04", ""),
        ("chunk_execute1", "chunks, selective mask; 1 of 5 executed", ""),
        ("full_execute1", "chunks, selective mask, world model; 1 of 5 executed", ""),
    )
    rows = [
        [words, *cells(records, row), rate(records, of_row(row), "grasped"), paper]
        for row, words, paper in ABLATION + more
    ]
    return table(("K = 5", *COLUMNS, "grasped", "paper, %"), rows)


STEPS = (
    ("action_world", "action", "world model, with single actions"),
    ("chunk_causal", "action", "chunks under the causal mask, against single actions"),
    ("chunk", "chunk_causal", "selective against causal mask"),
    ("chunk", "action", "chunks under the selective mask, against single actions"),
    ("chunk_execute1", "action", "learning chunks but executing one action, against single actions"),
    ("full", "chunk", "world model, with chunks"),
    ("full_execute1", "chunk_execute1", "world model, with chunks, one action executed"),
    ("full_even", "full", "image tokens weighted 1 instead of 0.04"),
    ("full", "action_world", "full model against the best other row"),
)


def ablation_differences(records: Records) -> str:
    return differences(records, STEPS)


def short_chunks(records: Records) -> str:
    rows = (
        ("action", "single actions"),
        ("action_world", "single actions, world model"),
        ("chunk2_causal", "chunks, causal mask"),
        ("chunk2", "chunks, selective mask"),
        ("full2", "chunks, selective mask, world model"),
        ("full2_execute1", "the same; 1 of 2 executed"),
    )
    body = [[words, *cells(records, row), rate(records, of_row(row), "grasped")] for row, words in rows]
    return table(("K = 2", *COLUMNS, "grasped"), body)


def short_chunks_differences(records: Records) -> str:
    return differences(
        records,
        (
            ("chunk2_causal", "action", "chunks under the causal mask, against single actions"),
            ("chunk2", "chunk2_causal", "selective against causal mask"),
            ("chunk2", "action", "chunks under the selective mask, against single actions"),
            ("full2", "chunk2", "world model, with chunks (full model against the best other row)"),
            ("full2", "action_world", "chunks against single actions, both with a world model"),
            ("full2", "action", "all three against single actions"),
            ("full2_execute1", "full2", "executing one action of two"),
        ),
    )


def ablation_libero(records: Records) -> str:
    rows = [
        [words, *cells(records, row, PAIR), rate(records, of_row(row, PAIR), "grasped")]
        for row, words, _ in ABLATION
    ]
    names = ("LIBERO, K = 5", "object", "spatial", "both", "grasped")
    return table(names, rows) + "\n\n" + differences(records, STEPS[:6], PAIR)


def history(records: Records) -> str:
    rows = (
        ("full", "chunks, 1 frame", "74.0"),
        ("history2", "chunks, 2 frames", "84.4"),
        ("history4", "chunks, 4 frames", "84.7"),
        ("low", "chunks, 1 frame, half the resolution", ""),
        ("action_world", "single actions, 1 frame", "73.1"),
        ("action_history2", "single actions, 2 frames", ""),
        ("action_history4", "single actions, 4 frames", ""),
    )
    body = [[words, *cells(records, row), queries(records, of_row(row)), paper] for row, words, paper in rows]
    changes = (
        ("history2", "full", "second frame, with chunks"),
        ("history4", "full", "four frames, with chunks"),
        ("low", "full", "half the resolution"),
        ("action_history2", "action_world", "second frame, with single actions"),
        ("action_history4", "action_world", "four frames, with single actions"),
    )
    names = ("row", *COLUMNS, "a query", "paper, LIBERO-Goal, %")
    return table(names, body) + "\n\n" + differences(records, changes)


HEADS = (
    ("chunk", "discrete head alone"),
    ("head", "trained with a continuous head; the discrete one acts"),
    ("head_continuous", "the same model; the continuous head acts"),
    ("head_after", "continuous head trained alone on the first model"),
)


def heads(records: Records) -> str:
    body = [[words, *cells(records, row), queries(records, of_row(row))] for row, words in HEADS]
    real = [
        [words, *cells(records, row, PAIR), queries(records, of_row(row, PAIR))] for row, words in HEADS[:3]
    ]
    changes = (
        ("head", "chunk", "joint training; the discrete head acts"),
        ("head_continuous", "head", "continuous instead of discrete head, one model"),
        ("head_continuous", "chunk", "continuous head, against the discrete one alone"),
        ("head_after", "chunk", "continuous head trained alone, against the discrete one"),
        ("head_after", "head_continuous", "training the continuous head alone instead of jointly"),
    )
    shipped = []
    for words, pattern in (
        ("trained with a continuous head; the discrete one acts", "object_spatial/{}_discrete"),
        ("the same model; the continuous head acts (states 0 to 9)", "object_spatial/{}_continuous"),
        ("libero (shipped); discrete head", "object_spatial_drawer/{}_discrete"),
        ("continuous head trained alone on libero", "object_spatial_head/{}_continuous"),
    ):
        names = [f"libero/{pattern.format(suite)}" for suite in PAIR]
        shipped.append([words, *(rate(records, [name]) for name in names), queries(records, names)])
    parts = (
        table(("tabletop", *COLUMNS, "a query"), body),
        differences(records, changes),
        table(("LIBERO, no world model", "object", "spatial", "both", "a query"), real),
        differences(records, changes[:3], PAIR),
        table(("LIBERO, with a world model", "object", "spatial", "a query"), shipped),
    )
    return "\n\n".join(parts)


def chunk_length(records: Records) -> str:
    rows = (
        ("action", "1"),
        ("chunk2", "2, selective mask"),
        ("chunk2_causal", "2, causal mask"),
        ("chunk", "5, selective mask"),
        ("chunk_execute1", "5, selective mask; 1 executed"),
        ("chunk_causal", "5, causal mask"),
        ("chunk10", "10, selective mask"),
        ("chunk10_causal", "10, causal mask"),
    )
    body = [[words, *cells(records, row)] for row, words in rows]
    changes = [(f"chunk{k}", f"chunk{k}_causal", f"selective mask, K = {k or 5}") for k in ("2", "", "10")]
    return table(("K", *COLUMNS), body) + "\n\n" + differences(records, changes)


def chunk_error(records: Records) -> str:
    words = {"forced": "teacher forcing", "free": "as decoded"}
    rows = []
    for name in ("tables/chunk_error", "tables/chunk_error_lengths"):
        for row in records[name]["chunks"]:
            mask = "selective" if row["selective_mask"] else "causal"
            for kind, text in words.items():
                errors = ", ".join(f"{x:.3f}" for x in row[kind])
                rows.append([len(row[kind]), mask, text, errors])
    return table(("K", "mask", "decoding", "error at k = 1, 2, ..."), rows)


def means(records: Records, name: str, model: str, view: str) -> list[str]:
    """Return mean PSNR and SSIM over all frames of a record of imagination, a text a kind."""
    section = records[name]["horizons"][0]
    weights, of = np.array(section["num_clips"]) / sum(section["num_clips"]), section["views"][view][model]
    kinds = [of[kind] for kind in ("imagined", "ceiling", "floor", "swapped", "still")]
    return [f"{weights @ kind['psnr']:.1f} / {weights @ kind['ssim']:.2f}" for kind in kinds]


KINDS = {"model": "imagined", "ceiling": "ceiling", "copy": "copied"}
WORLDS = (
    ("world", "world data alone"),
    ("world_long", "the same, 5,000 steps instead of 2,000"),
    ("full", "policy and world data"),
    ("full_even", "policy and world data, image tokens weighted 1"),
    ("world_no_action", "world data without the action"),
)


def world(records: Records) -> str:
    rows = []
    for frames in (10, 50):
        for row, words in WORLDS:
            for view in ("agentview", "wrist") if frames == 10 else ("agentview",):
                of = means(records, f"tables/world{frames}", f"pilot_{row}", view)
                rows.append([words, frames, view, *of])
    for view in ("agentview", "wrist"):
        of = means(records, "tabletop/imagine", "tabletop_dagger2", view)
        rows.append(["tabletop_dagger2 (shipped until November 2026)", "30", view, *of])
    names = ("model", "frames", "view", "imagined", "tokenizer's ceiling", "first frame copied")
    return table((*names, "another clip's actions", "no motion"), rows)


def shipped_world(records: Records) -> str:
    """Return what the shipped tabletop model imagines: PSNR a view, and the hand that a reader sees."""
    rows, name = [], "tabletop_world/imagine"
    for section in records[name]["horizons"] if name in records else ():
        frames = section["horizon"]
        for at in [t for t in (1, 3, 5, 10, 30) if t == frames or t < frames == 10]:
            front, wrist = (section["views"][view] for view in ("agentview", "wrist"))
            psnr = [f"{view[kind]['psnr'][at - 1]:.1f}" for view in (front, wrist) for kind in KINDS]
            hand = [f"{section['hand'][kind]['median_cm'][at - 1]:.1f}" for kind in KINDS]
            rows.append([at, section["num_clips"][at - 1], *psnr, *hand])
    names = [f"{what}: {kind}" for what in ("front", "wrist", "hand, cm") for kind in KINDS.values()]
    return table(("step", "clips", *names), rows)


def motion(records: Records) -> str:
    rows = []
    for frames in (10, 50):
        found = records[f"tables/world{frames}"]["horizons"][0]["probe"]
        for row, words in WORLDS:
            r2 = [f"{found[f'pilot_{row}'][kind]['r2']:.2f}" for kind in ("real", "imagined", "swapped")]
            rows.append([words, frames, *r2])
    return table(("model", "frames", "real frames", "imagined", "imagined with another clip's actions"), rows)


def rank(records: Records) -> str:
    policies = records["tables/rank"]["policies"]
    agreement = rank_agreement(policies)
    rows = []
    for words, executed in (("all", (1, 5)), ("one action executed", (1,)), ("five executed", (5,))):
        chosen = [p for p in policies if p["execute"] in executed]
        of = agreement if len(executed) > 1 else agreement["by_execute"][str(executed[0])]
        won = [sum(map(sum, outcomes)) for outcomes in zip(*(p["outcomes"] for p in chosen), strict=True)]
        total = sum(len(p["outcomes"][0]) for p in chosen)
        spearman = [of[key]["spearman"] for key in ("imagined", "judge_on_real_frames")]
        both = (f"{s['value']} ({s['interval_95'][0]} to {s['interval_95'][1]})" for s in spearman)
        rows.append([words, len(chosen), *(f"{k}/{total}" for k in won), *both])
    names = ("policies", "number", "simulator", "judge on its frames", "imagined")
    return table((*names, "Spearman, imagined (95 %)", "Spearman, judge (95 %)"), rows)


RANKED = {"tabletop_world": "few demonstrations"}
"""Name of a policy -> what it is called in the table."""


def ranking(records: Records) -> str:
    """Return how policies of different strength do in the simulator and in the shipped world model."""
    record, rows = records["tabletop_world/rank"], []
    for policy in sorted(record["policies"], key=lambda policy: -sum(policy["outcomes"][0])):
        name, _, noise = policy["name"].partition("_noise_")
        number = len(policy["outcomes"][0])
        who = "shipped" if name == record["world"]["name"] else RANKED[name]
        rows.append([who, noise or "none", *(f"{sum(o)}/{number}" for o in policy["outcomes"])])
    return table(("policy", "noise on the weights", "simulator", "judge on its frames", "imagined"), rows)


def ranking_agreement(records: Records) -> str:
    """Return how well the rates of `ranking` agree with the simulator's."""
    record, rows = records["tabletop_world/rank"], []
    for words, key in (("imagined", "imagined"), ("judge on real frames", "judge_on_real_frames")):
        of = record[key]
        both = (
            f"{of[n]['value']} ({of[n]['interval_95'][0]} to {of[n]['interval_95'][1]})"
            for n in ("spearman", "pearson")
        )
        same, total = of["same_episodes"]
        rows.append([words, *both, of["rank_violation"], of["bias_points"], f"{same}/{total}"])
    names = ("success", "Spearman (95 %)", "Pearson (95 %)", "mean maximum rank violation", "bias, points")
    return table((*names, "episodes that end alike"), rows)


SPEED = """
tabletop: physics and a 64 x 64 picture | decoding | simulation steps_s_camera | steps/s
tabletop model: chunk of 5 after the prefill | decoding | 3m actions side_by_side chunk_ms | ms
the same, against sequential decoding | decoding | 3m actions one_by_one slower_chunk | x faster
the same, without a cache | decoding | 3m actions without_cache slower_chunk | x faster
92 M, bf16: chunk of 10 | decoding_bfloat16 | 92m actions side_by_side chunk_ms | ms
against sequential | decoding_bfloat16 | 92m actions one_by_one slower_chunk | x faster
against HF Chameleon | decoding_bfloat16 | 92m actions transformers slower_chunk | x faster
whole query, HF | decoding_bfloat16 | 92m actions transformers slower_query | x faster
7 B, bf16, H200: query of 10 actions | cuda | 7b actions side_by_side query_ms | ms
without CUDA graphs | cuda | 7b actions side_by_side,_no_graphs slower_query | x faster
against HF Chameleon | cuda | 7b actions transformers slower_query | x faster
compiled blocks: query | cuda_compiled | 7b actions side_by_side query_ms | ms
passes after the first, of copy bandwidth | cuda_compiled | 7b actions side_by_side chunk_of_bandwidth | of 1
tabletop model, H200: frame, speculative | cuda_3m | 3m frames ms_frame | ms
the same, one code a pass | cuda_3m | 3m frames ms_frame_plain | ms
LIBERO evaluation without a policy, against the plain loop | libero_eval | ratio | x faster
with the shipped policy | libero_eval_model | ratio | x faster
its wall time over its simulation time | libero_eval_model | wall_over_simulation | x
"""
"""Words, record of bench/, way to its number, unit."""


def speed(records: Records) -> str:
    def value(name: str, way: str) -> float:
        record = records[f"bench/{name}"]
        for key in way.split():
            record = record.get("bench", record.get("bench_eval", record))
            record = record[key] if key in record else record[key.replace("_", " ")]
        return float(record)  # pyright: ignore[reportArgumentType]

    rows = [
        [words, f"{value(name, way):.3g} {unit}", f"bench/{name}"] for words, name, way, unit in spec(SPEED)
    ]
    return table(("what", "measured", "record"), rows)


DELAYED = {
    "latest": "the newest answer, after what was executed meanwhile",
    "blend": "overlapping answers averaged",
    "blocking": "stands still until the answer comes",
    "naive": "starts a late answer at its first action",
    "imagined": "the world model imagines what is under way",
}


PLANS = {"imagination": ("planned", "unplanned"), "the simulator": ("planned_in_simulator", "unplanned_20")}
"""Where chunks are tried -> folders of records with plans and without, in tabletop_improve."""


def of_plans(records: Records, where: str, suite: str = "tabletop") -> Pairs:
    """Return how a policy fares with plans and without, in suites whose names begin so."""
    folders = (f"tabletop_improve/{kind}/{suite}" for kind in PLANS[where])
    ends = [ended(records, [name for name in records if name.startswith(folder)]) for folder in folders]
    return pairs_of([(ends[0][key], ends[1][key]) for key in ends[0].keys() & ends[1].keys()])


def planning(records: Records) -> str:
    """Success of a policy that tries eight chunks before it acts, and without, on the same states."""
    rows = []
    for where, (planned, _) in PLANS.items():
        names = _of_improve(records, planned)
        ms = np.mean([records[name]["ms_a_decision"] for name in names])
        suites = sorted({records[name]["suite"] for name in names})
        for suite in (*suites, "tabletop") if len(suites) > 1 else suites:
            pairs = of_plans(records, where, suite)
            of = [f"{n + pairs.both}/{pairs.total}" for n in (pairs.only_b, pairs.only_a)]
            rows.append([where, "all" if suite == "tabletop" else suite, *of, *effect(pairs), f"{ms:.0f}"])
    names = ("chunks are tried in", "suite", "without", "with", "points (95 %)", "p", "ms a decision")
    return table(names, rows)


BY_NUMBER = {
    "by_chance": (8, "chance"),
    "planned_2": (2, "the judge"),
    "planned_4": (4, "the judge"),
    "planned": (8, "the judge of before"),
}
"""Folder of records in tabletop_improve -> how many chunks are drawn, and who chooses one."""


def planning_by_number(records: Records) -> str:
    """Success by the number of chunks, and when any is executed; on the states that all have."""
    ends = {name: ended(records, _of_improve(records, name)) for name in (*BY_NUMBER, "unplanned")}
    keys, rows = set.intersection(*map(set, ends.values())), []
    for name, (number, chooser) in BY_NUMBER.items():
        ms = np.mean([records[path]["ms_a_decision"] for path in _of_improve(records, name)])
        pairs = pairs_of([(ends[name][key], ends["unplanned"][key]) for key in keys])
        won = f"{pairs.only_a + pairs.both}/{pairs.total}"
        rows.append([number, chooser, won, *effect(pairs), f"{ms:.0f}"])
    without = [1, "", f"{sum(ends['unplanned'][key] for key in keys)}/{len(keys)}", "", "", ""]
    names = ("chunks", "chosen by", "successes", "points against the likeliest (95 %)", "p", "ms a decision")
    return table(names, [without, *rows])


def _of_improve(records: Records, folder: str) -> list[str]:
    return [name for name in records if name.startswith(f"tabletop_improve/{folder}/")]


def delay(records: Records) -> str:
    """Success by delay, and points against no delay on the same episodes."""
    ends: dict[str, dict[str, str]] = records["bench/delay"]["ends"]
    first, rows = ends["latest"]["0"], []
    delays = sorted(ends["latest"], key=int)
    for method, by_delay in ends.items():
        cells = []
        for of in map(by_delay.__getitem__, delays):
            pairs = pairs_of([(a == "S", b == "S") for a, b in zip(of, first, strict=True)])
            cells.append(f"{of.count('S')}" + ("" if of is first else f", {effect(pairs)[0]}"))
        rows.append([DELAYED[method], *cells])
    return table(("what the robot does", *(f"{ms} ms" for ms in delays)), rows)


def delay_real_time(records: Records) -> str:
    """The same by the wall clock, against a server: what an answer costs comes on top of the delay."""
    rows = [
        [
            DELAYED[row["method"]],
            row["delay_ms"],
            f"{row['latency_steps']:.1f}",
            f"{row['successes']}/{row['episodes']}",
        ]
        for row in records["bench/delay_real_time"]["rows"]
    ]
    return table(("what the robot does", "added delay, ms", "steps to an answer", "successes"), rows)


TABLES: dict[str, Callable[[Records], str]] = {
    f.__name__: f
    for f in (
        *(suites, experts, ablation, ablation_differences, short_chunks, short_chunks_differences),
        *(ablation_libero, history, heads, chunk_length, chunk_error, world, shipped_world, motion),
        *(rank, ranking, ranking_agreement, planning, planning_by_number, speed, delay, delay_real_time),
    )
}


def fill(text: str, records: Records) -> str:
    """Return the page with every table between its markers made anew; an unknown one raises ValueError."""

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}: expected one of {', '.join(TABLES)}")
        return f"<!-- table {name} -->\n\n{TABLES[name](records)}\n\n<!-- /table -->"

    text = re.sub(r"<!-- table (\w+) -->.*?<!-- /table -->", made, text, flags=re.DOTALL)
    for name, of in (("results", readme), ("requirements", requirements)):
        pattern = f"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, rf"\g<1>{of(records)}\n\g<2>", text, flags=re.DOTALL)
    return text


def main(check: bool = False) -> None:
    """Write the tables of paper/RESULTS.md and README.md. `check`: compare them instead."""
    records, stale = Records(), []
    for path in (ROOT / "paper/RESULTS.md", ROOT / "README.md"):
        old = path.read_text(encoding="utf-8")
        new = fill(old, records)
        if new != old:
            stale.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.write_text(new, encoding="utf-8")
    if check and stale:
        raise SystemExit(f"{', '.join(stale)}: not what the records say, run `python -m paper.tables`")


if __name__ == "__main__":
    tyro.cli(main)
