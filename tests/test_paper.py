"""The paper's tables are what its records say; records keep every episode; a row is what it says.

Run: pytest tests/test_paper.py
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny_run import tiny_config, write_tiny

from paper import average, closings, grow, noisy, planning, run, scaling
from paper.ablations import ROWS, SCALED, config_of
from paper.records import Records, paired, read_folder, write
from paper.tables import ROOT, TABLES, effect, fill
from worldvla.config import Config, from_json, to_json
from worldvla.data.collect import collect
from worldvla.data.episode import read_episodes
from worldvla.eval.actors import Query
from worldvla.eval.compare import compare
from worldvla.eval.judge import Judge, encoded
from worldvla.eval.planning import PlanningActor
from worldvla.eval.stats import Pairs, count
from worldvla.files import read_json, write_json
from worldvla.infer.model import Model, export, load
from worldvla.infer.policy import Policy
from worldvla.model.weights import empty_model
from worldvla.recipes import recipe
from worldvla.sim import suites
from worldvla.sim.protocol import Task
from worldvla.train.build import build, build_model
from worldvla.train.loop import train


def record(won: str) -> dict:
    """An evaluation of two tasks; a letter an episode: s success, f fail, e error."""
    status = {"s": "success", "f": "fail", "e": "error"}
    outcomes = [
        {"task": t, "init": 10 + i, "status": status[x], "grasped": i > 0, "steps": 9 + i, "reason": ""}
        for t in (0, 1)
        for i, x in enumerate(won)
    ]
    rows = [
        {
            "index": t,
            "name": f"n{t}",
            "instruction": f"do {t}",
            **count(o for o in outcomes if o["task"] == t),
        }
        for t in (0, 1)
    ]
    made = {"suite": "tabletop_goal", "seed": 0, "checkpoint": {"name": "m"}, "protocol": {"executed": 5}}
    return {**made, **count(outcomes), "tasks": rows, "outcomes": outcomes}


def test_records_keep_every_episode_and_pairs(tmp_path: Path) -> None:
    rows = {f"tables/{row}_0/tabletop_goal": record(won) for row, won in (("a", "ssfe"), ("b", "sfse"))}
    for name, row in rows.items():
        path = tmp_path / "run" / name
        path.mkdir(parents=True)
        (path / "record.json").write_text(json.dumps(row))
        (path / "episodes.jsonl").write_text("{}\n")
    (tmp_path / "run/tables/metrics.jsonl").write_text('{"step": 1}\n')
    for _ in range(2):  # again: nothing is added twice
        write(read_folder(tmp_path / "run"), tmp_path)
    read = Records(tmp_path)
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"tables.jsonl", "tasks.jsonl"}
    assert read["tables/metrics"] == {"lines": [{"step": 1}]}
    for name, row in rows.items():
        row["outcomes"] = [{k: v for k, v in o.items() if k != "reason"} for o in row["outcomes"]]
        assert read[name] == row
    a, b = rows
    assert compare(read[a], read[b]) == compare(rows[a], rows[b])
    assert paired(read, "a", "b", ("tabletop_goal",)) == Pairs(2, 2, 2, 0)
    assert paired(read, "a", "b", ("tabletop_goal",), grasped=True) == Pairs(4, 0, 0, 2)


def test_committed_tables_are_what_the_records_say() -> None:
    records = Records()
    for path in (ROOT / "paper/RESULTS.md", ROOT / "README.md"):
        text = path.read_text(encoding="utf-8")
        assert fill(text, records) == text, f"{path}: run python -m paper.tables"
    assert "| libero_spatial | 181/200 (86 to 94 %) |" in (ROOT / "README.md").read_text()
    used = (ROOT / "paper/RESULTS.md").read_text().count("<!-- table ")
    assert used == len(TABLES)
    with pytest.raises(ValueError, match="no table 'nothing': expected one of suites"):
        fill("<!-- table nothing --><!-- /table -->", records)


def test_a_difference_says_whether_it_is_significant() -> None:
    assert effect(Pairs(50, 20, 1, 29)) == ("+19.0 (+10.5 to +27.0)", "2.1e-05")
    assert effect(Pairs(50, 3, 1, 46))[1] == "0.62, not significant"


def test_records_are_small() -> None:
    files = list((ROOT / "paper/records").iterdir())
    assert len(files) < 60
    assert sum(path.stat().st_size for path in files) < 3e6


MACHINE = ("device", "num_threads", "compile", "dtype")
"""What a checkpoint's config says of the machine that trained it."""


@pytest.mark.parametrize(
    ("recipe_name", "shipped"),
    [
        ("tabletop_grasps", "tabletop"),
        ("libero_object_spatial_drawer", "libero"),
        ("libero_visited", "libero_four"),
    ],
)
def test_recipes_of_the_shipped_models_give_their_configs(recipe_name: str, shipped: str) -> None:
    made = from_json(Config, json.loads((ROOT / f"worldvla/assets/{shipped}/config.json").read_text()))
    config = recipe(recipe_name)
    machine = {name: getattr(made.train, name) for name in MACHINE}
    assert replace(config, train=replace(config.train, **machine)) == made


def test_a_model_of_another_world_grows_from_a_trained_one(tmp_path: Path) -> None:
    """Blocks, places, bins and specials come along; words are those of the new stores."""
    for name in ("old", "new"):
        write_tiny(tmp_path / name)
    old = train(tiny_config(tmp_path / "old", steps=1), tmp_path / "run").checkpoint
    config = tiny_config(tmp_path / "new")
    config = replace(config, num_text=270, model=replace(config.model, num_layers=3))
    write_json(tmp_path / "new.json", to_json(config))
    grow.grow(old, tmp_path / "new.json", tmp_path / "grown")
    one, other = load(old), load(tmp_path / "grown")
    theirs, own = one.transformer, other.transformer
    for layer, before in ((own.layers[0], theirs.layers[0]), (own.layers[2], theirs.layers[1])):
        assert all(map(torch.equal, layer.parameters(), before.parameters()))
    assert not any(
        p.any() for n, p in own.layers[1].named_parameters() if n.endswith(("o.weight", "down.weight"))
    )
    for span in ("action", "state"):
        rows, before = getattr(other.vocab, span), getattr(one.vocab, span)
        head = theirs.head.weight[before.start : before.stop]
        assert torch.equal(own.head.weight[rows.start : rows.stop], head)
    text, drawn = other.vocab.text, build_model(build(config)).embed.weight
    assert torch.equal(own.embed.weight[: text.start], theirs.embed.weight[: text.start])
    assert torch.equal(own.embed.weight[text.start : text.stop], drawn[text.start : text.stop])


@pytest.mark.parametrize("row", ROWS)
def test_rows_differ_from_full_in_what_they_say(row: str) -> None:
    config, full = config_of(row), config_of("full")
    batch, share = config.train.batch_size, config.data.world_fraction
    assert batch * share in (0, 64)
    assert batch * (1 - share) in (0, 96)
    assert config.optim == full.optim
    assert replace(config.loss, image_weight=full.loss.image_weight) == full.loss
    assert replace(config.model, head=full.model.head) == full.model
    assert (config.model.head != full.model.head) == row.startswith("head")
    assert config.train.only_head == bool(config.train.init_from) == (row == "head_after")
    assert config.train.steps == (5_000 if row == "world_long" else full.train.steps)


def test_configs_of_records_are_those_of_their_rows() -> None:
    """A record of a row was trained with what the row says now (fields that were added later aside)."""
    records = Records()
    for row in ROWS:
        if made := records.get(f"tables/{row}_0/train"):
            config = from_json(Config, made["config"])
            expected = config_of(row)
            machine = {
                name: getattr(config.train, name) for name in ("device", "num_threads", "compile", "dtype")
            }
            assert replace(expected, train=replace(expected.train, **machine)) == config, row


def test_a_run_skips_what_is_done_and_trains_before_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: list[str] = []

    def fake(command: Sequence[str], threads: int | None = None) -> None:
        assert threads in (None, 1)
        words = " ".join(command)
        calls.append(words.split(" -m ", 1)[1])
        if "paper.ablations" in words:
            out = Path(command[command.index("--out") + 1])
            out.mkdir(parents=True)
            lines = ({"event": "train", "train_seconds": 36.0}, {"event": "val", "loss": 1.0})
            (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (out / "config.json").write_text("{}")
        if "scaling measure" in words:
            write_json(Path(command[command.index("--out") + 1]), {})

    monkeypatch.setattr(run, "call", fake)
    run.main(("head_after", "world"))
    trained = [words.split("paper.ablations ")[1].split()[0] for words in calls if "paper.ablations" in words]
    assert trained == ["world", "chunk", "head_after"]
    evaluated = [words for words in calls if words.startswith("worldvla eval ")]
    assert len(evaluated) == 4
    assert all("out/tables/head_after_0" in words and "--head continuous" in words for words in evaluated)
    assert json.loads((tmp_path / "out/paper/tables/world_0/train.json").read_text())["hours"] == 0.01
    calls.clear()
    run.main(("head_after", "world"))
    assert not [words for words in calls if " eval " in words or "ablations" in words]
    with pytest.raises(SystemExit, match="unknown nothing: expected action"):
        run.main(("nothing",))
    for times in (6, 0):
        calls.clear()
        run.main(("scaling_small",))
        for word in ("paper.ablations scaled_", "paper.scaling measure"):
            assert sum(word in words for words in calls) == times
        assert calls[-1].startswith("paper.scaling fit")


@pytest.mark.parametrize("name", SCALED)
def test_a_model_of_the_scaling_law_has_the_size_of_its_name(name: str) -> None:
    size, demonstrations = name.split("_")[1:]
    config = SCALED[name]()
    millions = empty_model(config.model, 5_000, 13, 9, config.layout.action_shape).num_parameters() / 1e6
    assert millions == pytest.approx(float(size.removesuffix("m")), rel=0.1)
    assert config.train.steps == 20 * int(demonstrations)


def test_a_scaling_law_has_its_exponents_inside_their_intervals() -> None:
    rng, law = np.random.default_rng(0), {"size": 0.1, "data": 0.3}
    n, d = (a.flatten() for a in np.meshgrid([2e5, 1e6, 7e6], [1e4, 3e4, 1e5]))
    inside = []
    for _ in range(200):
        losses = 20 * n ** -law["size"] * d ** -law["data"] * np.exp(rng.normal(0, 0.05, len(n)))
        found = scaling.exponents(n.tolist(), d.tolist(), losses.tolist())
        inside += [found[name][1] <= value <= found[name][2] for name, value in law.items()]
    assert 0.92 < np.mean(inside) < 0.98
    with pytest.raises(ValueError, match="3 runs of 3 sizes and 1 amounts of data do not determine"):
        scaling.exponents(n[:3].tolist(), d[:3].tolist(), [3.0, 2.0, 1.0])


def test_models_are_measured_on_other_data_and_fitted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(root, steps=2, compile=False)
    model = export(train(config, tmp_path / "run").checkpoint, tmp_path / "model")
    write_json(model / "train.json", {"config": to_json(config), "hours": 0.5})
    row = tmp_path / "results/a/row.json"
    scaling.measure(model, (str(root / "store"),), row)
    found = read_json(row)
    assert (found["frames"], found["samples"]) == (48, 8)
    assert found["block_parameters"] < found["parameters"] == load(model).transformer.num_parameters()
    for i, name in enumerate("bcd", 1):
        grown = {"block_parameters": 10_000 * i, "frames": 48 * (1 + i % 2), "flops": found["flops"] * 1.3**i}
        write_json(tmp_path / f"results/{name}/row.json", found | grown)
    scaling.fit(tmp_path / "results", tmp_path / "law.svg")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [r["compute"] for r in said["rows"]] == ["a", "a", "b", "b"]
    assert said["scaling"].keys() == {"action_loss", "image_loss"}
    assert "policy loss" in (tmp_path / "law.svg").read_text()


def test_an_average_lies_between_its_checkpoints(tmp_path: Path) -> None:
    noisy.main(ROOT / "worldvla/assets/tabletop", (0.5,), tmp_path)
    weak = tmp_path / "noise_0.5"
    average.main(ROOT / "worldvla/assets/tabletop", weak, tmp_path / "mean", share=0.25)
    model = load(tmp_path / "mean")  # whole, its digests right
    before, after = (load(path).transformer.state_dict() for path in ("tabletop", weak))
    for name, tensor in model.transformer.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * after[name]
        assert torch.allclose(tensor, expected, atol=0.01, rtol=0.01)
    with pytest.raises(ValueError, match="expected a share from 0 to 1, got 2"):
        average.main(ROOT / "worldvla/assets/tabletop", weak, tmp_path / "none", share=2)


def _untaught(model: Model, task: Task, folder: Path) -> Path:
    """Return the weights of a judge that knows `task` and has learnt nothing."""
    path = folder / "judge.safetensors"
    judge = Judge(model, [task], np.zeros(8, np.float32), np.ones(8, np.float32))
    judge.save(path, {"made_of": {"tokenizer": model.image.digest()}, "errors": {}})
    return path


@pytest.mark.parametrize("ahead", [1, 2])
def test_chunks_are_tried_in_the_simulator(ahead: int, tmp_path: Path) -> None:
    """What the judge is shown is what the chunks and, looking ahead, the policy's next ones lead to, and what
    is chosen is executed."""
    task, model = suites.tasks("tabletop_object")[0], load("tabletop")
    path = _untaught(model, task, tmp_path)
    actor = planning.Rehearsal("tabletop", "tabletop", path, 3, spread=0.2, ahead=ahead)
    shown: list[np.ndarray] = []

    def value(*given: np.ndarray) -> np.ndarray:
        shown.append(given[0])
        return np.array([0.0, 1.0, 0.5])

    actor.judge.value = value  # pyright: ignore
    env, twin = (cast(Any, suites.make(task, model.view_sizes)) for _ in range(2))
    observation = env.reset(options={"init": 0})[0]
    for step in (0, 5):
        query = Query(task, 0, step, {**observation, "instruction": task.instruction})
        (chosen,) = actor.act([query])
        assert chosen is not None
        for action in chosen:
            observation = env.step(action)[0]
        twin.set_state(env.get_state())
        end = twin.observe()
        for _ in range(ahead - 1):
            for action in Policy(model).act([{**end, "instruction": task.instruction}])[0]:
                end = twin.step(action)[0]
        codes = encoded(model, {view: end[view][None] for view in model.view_sizes})
        np.testing.assert_array_equal(shown[-1][1], codes[0])
    elsewhere = {**observation, "instruction": task.instruction, "state": observation["state"] + 0.01}
    with pytest.raises(ValueError, match="went astray"):
        actor.act([Query(task, 0, 10, elsewhere)])


def test_by_chance_any_of_the_same_chunks_is_executed(tmp_path: Path) -> None:
    task, model = suites.tasks("tabletop_object")[0], load("tabletop")
    actor = planning.Chance("tabletop", "tabletop", _untaught(model, task, tmp_path), 4, spread=0.2)
    env: Any = suites.make(task, model.view_sizes)
    seen, ranks = {**env.reset(options={"init": 0})[0], "instruction": task.instruction}, []
    offered = PlanningActor("tabletop", "tabletop", tmp_path / "judge.safetensors", 4, spread=0.2)
    for step in range(0, 40, 5):
        query = Query(task, 0, step, seen)
        (chosen,), each = actor.act([query]), []
        assert chosen is not None
        for best in np.eye(4):
            offered._values = lambda *_, best=best: best  # pyright: ignore
            each += offered.act([query])
        ranks += [i for i, chunk in enumerate(each) if np.array_equal(cast(Any, chunk), chosen)]
    assert len(ranks) == 8
    assert len(set(ranks)) > 1


def test_of_each_closing_hand_it_is_asked_whether_it_holds(tmp_path: Path) -> None:
    collect("tabletop_object", tmp_path, kind="grasps", episodes=9, tasks=(0,), workers=1, seed=5)
    episodes = list(read_episodes(next(tmp_path.glob("*.hdf5"))))
    found = closings.closings(episodes)
    for episode, t in found:
        width = np.abs(episode.states[:, 6:]).sum(1)
        assert width[t] > 0.08
        assert (episode.actions[t : t + 3, 6] > 0).all()
        assert t == 0 or episode.actions[t - 1, 6] < 0
        assert width[t + 3] < 0.07  # closed on a thing or on nothing
    table = closings.judged(load("tabletop"), found, 0)
    assert table.sum() == len(found) >= 18
    assert np.trace(table) > 0.6 * table.sum()
    held = sum(np.abs(e.states[t + 3, 6:]).sum() > closings.HELD_WIDTH for e, t in found)
    assert table[1].sum() == held
