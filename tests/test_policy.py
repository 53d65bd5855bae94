"""A checkpoint directory alone is enough to act and to imagine; what does not belong to it, or is no
observation, is refused in one line.

Run: pytest tests/test_policy.py
"""

import gc
import json
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import _episode, tiny_config, write_tiny

import worldvla
from worldvla.cli import main
from worldvla.data.store import write_store
from worldvla.files import load_tensors, save_tensors, write_digests, write_json
from worldvla.infer.ahead import can_look_ahead
from worldvla.infer.model import Model, export, load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.serve.exact import BatchedPolicy
from worldvla.serve.protocol import pack
from worldvla.serve.server import ServedPolicy, read_request
from worldvla.sim.suites import make, tasks
from worldvla.tokenizers.action import DatasetStatistics
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.build import build
from worldvla.train.loop import train

Observation = dict[str, Any]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load(checkpoint)


def observe(seed: int, num_previous: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    frames = [
        {v: rng.integers(0, 256, (n, n, 3), dtype=np.uint8) for v, n in (("agentview", 6), ("wrist", 4))}
        for _ in range(num_previous + 1)
    ]
    state = rng.uniform(-1, 1, 8).astype(np.float32)
    return {**frames[-1], "previous": frames[:-1], "state": state, "instruction": f"do {seed % 2}"}


def test_import_brings_no_torch() -> None:
    code = "import sys, worldvla; assert 'torch' not in sys.modules; assert callable(worldvla.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_face_knows_both_policy_and_world(checkpoint: Path, model: Model) -> None:
    both, observation = worldvla.load(checkpoint), observe(0)
    np.testing.assert_array_equal(both.policy().act(observation), Policy(model).act(observation))
    first = both.world(speculative=False).reset(observation)
    assert first.keys() == both.view_sizes.keys()


def test_a_run_directory_means_its_newest_checkpoint(checkpoint: Path, model: Model) -> None:
    assert load(checkpoint.parents[1]).path == checkpoint
    assert model.manifest["step"] == 7
    assert model.view_sizes == {"agentview": (6, 6), "wrist": (4, 4)}
    with pytest.raises(FileNotFoundError, match="ckpt/step_N"):
        load(checkpoint.parent)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(checkpoint / "none")


def test_a_batch_acts_like_its_observations_alone(model: Model) -> None:
    observations = [observe(0), observe(1, 1), observe(2, 3)]
    actions = Policy(model).act(observations)
    assert actions.shape == (3, 3, 7)
    assert actions.dtype == np.float32
    statistics = model.builder.statistics
    assert (actions >= np.array(statistics.action_low, dtype=np.float32)).all()
    assert (actions <= np.array(statistics.action_high, dtype=np.float32)).all()
    for observation, expected in zip(observations, actions, strict=True):
        np.testing.assert_array_equal(Policy(model).act(observation), expected)
    assert Policy(model).act([]).shape == (0, 3, 7)


def test_only_the_last_frames_of_the_history_count(model: Model) -> None:
    observation = observe(3, 4)
    newest = {**observation, "previous": observation["previous"][-1:]}
    assert (
        Policy(model).prompts([observation])[0].ids.tolist()
        == Policy(model).prompts([newest])[0].ids.tolist()
    )
    assert len(Policy(model).prompts([newest])[0]) > len(
        Policy(model).prompts([{**newest, "previous": []}])[0]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"agentview": np.zeros((6, 4, 3), np.uint8)},
            r"agentview must be a uint8 array of shape \(6, 6, 3\), got uint8 \(6, 4, 3\)",
        ),
        ({"wrist": np.zeros((4, 4, 3), np.float32)}, "got float32"),
        ({"wrist": None}, "got NoneType"),
        ({"agentview": ...}, "needs the view 'agentview'"),
        ({"state": ...}, "needs a state"),
        ({"state": np.zeros(7, np.float32)}, r"state must be float \(8,\), got float32 \(7,\)"),
        ({"state": np.full(8, np.nan, np.float32)}, "finite"),
        ({"instruction": ...}, "instruction"),
        ({"instruction": ""}, "instruction"),
        ({"previous": [{}]}, "needs the view"),
        (
            {"instruction": "do 1" * 99},
            r"sequence of \d{3} tokens, the model was trained on 80 at most",
        ),
    ],
)
def test_bad_observations_are_one_line(model: Model, change: Observation, message: str) -> None:
    observation = {k: v for k, v in {**observe(0), **change}.items() if v is not ...}
    with pytest.raises(ValueError, match=message) as error:
        Policy(model).act(observation)
    assert "\n" not in str(error.value)


def test_confidence_comes_with_the_same_actions(model: Model) -> None:
    policy, observations = Policy(model), [observe(0), observe(1, 1)]
    decision = policy.decide(observations)
    np.testing.assert_array_equal(decision.actions, policy.act(observations))
    assert decision.entropy.shape == decision.margin.shape == (2, 3, 7)
    assert ((decision.entropy > 0) & (decision.entropy <= np.log(255) + 1e-4)).all()
    assert ((decision.margin >= 0) & (decision.margin <= 1)).all()
    one = policy.decide(observations[1])
    np.testing.assert_allclose(one.entropy, decision.entropy[1], rtol=1e-4)
    assert policy.decide([]).entropy.shape == (0, 3, 7)
    assert policy.decoding == "parallel"


def test_drawn_actions_belong_to_their_seed(model: Model) -> None:
    policy, observation = Policy(model), observe(0)
    drawn = policy.act(observation, temperature=1.0, seed=1)
    np.testing.assert_array_equal(drawn, policy.act(observation, temperature=1.0, seed=1))
    assert (drawn != policy.act(observation, temperature=1.0, seed=2)).any()
    np.testing.assert_array_equal(policy.act(observation, temperature=1e-6, seed=1), policy.act(observation))


def test_guessing_frames_changes_no_frame(model: Model) -> None:
    world, plain = World(model), World(model, speculative=False)
    world.reset(observe(0))
    plain.reset(observe(0))
    for t in range(3):
        world.step(np.full(7, 0.2 * t))
        plain.step(np.full(7, 0.2 * t))
        for view, codes in plain.codes.items():
            np.testing.assert_array_equal(world.codes[view], codes)
    assert [s.passes for s in plain.stats] == [13, 13, 13]
    assert len(world.stats) == 3
    assert all(s.passes <= 13 and s.judged == s.codes == 13 for s in world.stats)
    world.reset(observe(1))
    assert world.stats == []


def test_the_calls_in_docs_decoding_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comment that is a value is that value."""
    root, task = Path(__file__).parents[1], tasks("tabletop_goal")[0]
    monkeypatch.chdir(root)
    block = (root / "docs/DECODING.md").read_text().split("```python\n")[1].split("```")[0]
    env = make(task, {"agentview": (64, 64), "wrist": (32, 32)})
    names: Observation = {"worldvla": worldvla}
    names["observation"] = {**env.reset(options={"init": 0})[0], "instruction": task.instruction}
    exec(block, names)
    policy, world = names["policy"], names["world"]
    assert names["actions"].shape == (5, 7)
    assert f'policy.decoding  # "{policy.decoding}"' in block
    assert policy.decide(names["observation"]).entropy.sum(-1).shape == (5,)
    assert f"world.stats[-1]  # {world.stats[-1]}\n" in block


def test_long_rollouts_hold_no_more_than_short_ones(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and arrays; of sixteen worlds, codes that were not let go would be 80 kB from step 10 to 60."""
    world, frames, rooms, held = World(model), [observe(i) for i in range(16)], set(), []
    arrays = [tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)]
    opened = model.runner.open
    monkeypatch.setattr(model.runner, "open", lambda *args: rooms.add(args) or opened(*args))
    world.reset({view: np.stack([f[view] for f in frames]) for view in model.view_sizes})
    tracemalloc.start()
    for t in range(60):
        world.step(np.full((16, 7), np.sin(t)))
        if t in (9, 59):
            gc.collect()
            tensors = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)
            traces = tracemalloc.take_snapshot().filter_traces(arrays).traces
            held.append((tensors, sum(trace.size for trace in traces)))
    tracemalloc.stop()
    assert len(rooms) == 1
    assert held[1] == held[0]


def test_world_feeds_its_own_codes_back(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    world, observation = World(model), observe(0)
    with pytest.raises(ValueError, match="reset"):
        world.step(np.zeros(7))
    start = world.reset(observation)
    assert {view: image.shape for view, image in start.items()} == {
        "agentview": (6, 6, 3),
        "wrist": (4, 4, 3),
    }

    def refuse(*_: object) -> None:
        raise AssertionError("frames were encoded again")

    monkeypatch.setattr(ImageTokenizer, "encode", refuse)
    before = {view: codes.copy() for view, codes in world.codes.items()}
    frames = [world.step(np.full(7, 0.3)) for _ in range(3)]
    assert all(f["wrist"].dtype == np.uint8 for f in frames)
    assert any((codes != before[view]).any() for view, codes in world.codes.items())


def test_worlds_at_once_equal_worlds_alone(model: Model) -> None:
    world, alone = World(model), World(model)
    observations, actions = [observe(i) for i in range(3)], np.random.default_rng(1).uniform(-1, 1, (3, 7))
    world.reset({view: np.stack([o[view] for o in observations]) for view in ("agentview", "wrist")})
    frames = world.step(actions)
    for i, observation in enumerate(observations):
        alone.reset(observation)
        frame = alone.step(actions[i])
        for view, image in frame.items():
            np.testing.assert_array_equal(image, frames[view][i])


def test_bad_frames_and_actions_are_refused(model: Model) -> None:
    world = World(model)
    with pytest.raises(ValueError, match="same number of frames"):
        world.reset(
            {"agentview": np.zeros((2, 6, 6, 3), np.uint8), "wrist": np.zeros((1, 4, 4, 3), np.uint8)}
        )
    with pytest.raises(ValueError, match="at least one frame, got none"):
        world.reset(
            {"agentview": np.zeros((0, 6, 6, 3), np.uint8), "wrist": np.zeros((0, 4, 4, 3), np.uint8)}
        )
    world.reset(observe(0))
    with pytest.raises(ValueError, match=r"shape \(7,\), got \(6,\)"):
        world.step(np.zeros(6))


@pytest.mark.parametrize("name", ["vocab", "statistics", "text"])
def test_a_foreign_piece_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    data = json.loads((copy / f"{name}.json").read_text())
    if name == "vocab":
        data["name"] = "other"
    elif name == "statistics":
        data["action_high"][0] += 1.0
    else:
        data["model"]["merges"] = data["model"]["merges"][:-1]
        data["model"]["vocab"].popitem()
    (copy / f"{name}.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{name}.json is not as it was written"):
        load(copy)
    write_digests(copy)
    with pytest.raises(ValueError, match=f"{name} has digest"):
        load(copy)


def test_damaged_checkpoints_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is not as it was written \(SHA-256"):
        load(copy)
    write_digests(copy)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or no safetensors file"):
        load(copy)
    tensors = load_file(checkpoint / "model.safetensors") | {"head.weight": torch.tensor([np.nan])}
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.weight holds numbers that are not finite"):
        load_tensors(copy / "model.safetensors")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        load(copy)
    (copy / "text.json").unlink()
    with pytest.raises(ValueError, match=r"text.json missing"):
        load(copy)


def test_an_exported_model_is_smaller_and_acts_alike(checkpoint: Path, model: Model, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    save_tensors(source / "reader.safetensors", {"weight": torch.ones(2)})
    write_json(source / "reader.json", {"views": {}})
    exported = load(export(source, tmp_path / "shipped"))
    for name in ("reader.safetensors", "reader.json"):
        assert (exported.path / name).read_bytes() == (source / name).read_bytes()
    for path in exported.path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}, path.name
    assert not (exported.path / "trainer.safetensors").exists()
    assert len({f.stat().st_mode for f in exported.path.rglob("*") if f.is_file()}) == 1, "the umask's"
    card = (exported.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: worldvla\nlicense: apache-2.0\n")
    assert "| trained on | store |" in card
    assert str(Path(model.config.tokenizer).parent) not in card, "no path of this machine"
    assert f"weights {exported.identity()['digest']}, image tokenizer {model.image.digest()}" in card
    assert f"a WorldVLA of {model.transformer.num_parameters():,} parameters".lower() in card.lower()
    words = [file.read_text() for file in exported.path.rglob("*.json")]
    assert not any(str(Path(model.config.tokenizer).parent) in text for text in words), "nor in the config"
    assert exported.config.data.stores == ("store",)
    for name, weight in exported.transformer.state_dict().items():
        torch.testing.assert_close(weight, model.transformer.state_dict()[name], rtol=1e-2, atol=1e-3)
    assert Policy(exported).act(observe(0)).shape == Policy(model).act(observe(0)).shape


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained on two datasets, the second with tenfold actions and other states."""
    root = tmp_path_factory.mktemp("mixture")
    write_tiny(root)
    config, image = tiny_config(root, steps=2), ImageTokenizer.load(root / "image_tokenizer")
    wide = [replace(_episode(np.random.default_rng(7), i), instruction="lift") for i in range(6)]
    wide = [replace(e, actions=10 * e.actions, states=2 + e.states) for e in wide]
    write_store(root / "wide", wide, image, source={"fps": 30.0})
    stores = (*config.data.stores, str(root / "wide"))
    data = replace(config.data, stores=stores, datasets=("arm", "wide"), weights=(3.0, 1.0))
    return train(replace(config, data=data), root / "run").checkpoint


def test_a_dataset_of_a_mixture_is_chosen_by_unnorm_key(mixture: Path, tmp_path: Path) -> None:
    """In the observation, when it is loaded or when it is exported: the same actions, those of its ranges."""
    model = load(mixture)
    assert model.unnorm_keys == ["arm", "wide"]
    assert model.manifest["features"] == {"datasets": {"arm": {}, "wide": {"fps": 30.0}}}
    both = [observe(i) | {"unnorm_key": key} for i in range(3) for key in ("arm", "wide")]
    actions = Policy(model).act(both)
    assert np.abs(actions[1::2]).max() > 1.5 > np.abs(actions[::2]).max()
    chosen = {key: load(mixture, unnorm_key=key) for key in ("arm", "wide")}
    blind = replace(model.config.layout, history=1, state=False)
    ahead = [
        can_look_ahead(replace(m, config=replace(m.config, layout=blind))) for m in (model, chosen["arm"])
    ]
    assert ahead == [False, True]  # whose ranges the actions under way are in, only a request knows
    assert chosen["wide"].manifest["features"] == {"fps": 30.0}
    assert chosen["wide"].identity()["unnorm_key"] == "wide"
    for observation, expected in zip(both, actions, strict=True):
        one = chosen[observation["unnorm_key"]]
        np.testing.assert_array_equal(Policy(one).act(observation), expected)
        np.testing.assert_array_equal(Policy(one).act(without_key(observation)), expected)
    assert main(["export", str(mixture), "--out", str(tmp_path / "wide"), "--unnorm-key", "wide"]) == 0
    exported, rounded = load(tmp_path / "wide"), load(mixture, dtype=torch.bfloat16, unnorm_key="wide")
    assert exported.builder.statistics == chosen["wide"].builder.statistics
    for observation in both[1::2]:
        np.testing.assert_array_equal(Policy(exported).act(observation), Policy(rounded).act(observation))
    World(exported).reset(observe(0))
    assert "| action (minmax, wide) |" in (tmp_path / "wide/README.md").read_text()
    assert "| state (minmax, arm) |" in (export(mixture, tmp_path / "both") / "README.md").read_text()


def test_no_dataset_is_guessed(mixture: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("", "tall"):
        with pytest.raises(ValueError, match=f"unnorm_key '{key}': .* datasets 'arm', 'wide'; name one"):
            Policy(load(mixture)).act(observe(0) | {"unnorm_key": key})
    with pytest.raises(ValueError, match="unnorm_key must be the name of a dataset, got 3"):
        Policy(load(mixture)).act(observe(0) | {"unnorm_key": 3})
    with pytest.raises(ValueError, match="unnorm_key 'wide': the model was trained on the datasets 'arm'"):
        Policy(load(mixture, unnorm_key="arm")).act(observe(0) | {"unnorm_key": "wide"})
    with pytest.raises(ValueError, match="one dataset, without a name"):
        Policy(model).act(observe(0) | {"unnorm_key": "wide"})
    world = World(load(mixture))
    world.reset(observe(0))
    with pytest.raises(ValueError, match="name one of them"):
        world.step(np.zeros(7))
    assert main(["eval", str(mixture), "--suite", "tabletop_object", "--out", str(mixture / "eval")]) == 2
    assert "--unnorm-key of `worldvla eval`" in capsys.readouterr().err


def test_a_new_dataset_brings_its_own_ranges(mixture: Path) -> None:
    """Where training goes on from a mixture, a name that it knows keeps its ranges, whatever the new data."""
    known, config = load(mixture).builder.all_statistics, load(mixture).config
    data = replace(config.data, datasets=("wide", "new"))
    start = replace(config, train=replace(config.train, init_from=str(mixture)))
    found = build(replace(start, data=data)).statistics
    assert isinstance(known, DatasetStatistics)
    assert isinstance(found, DatasetStatistics)
    assert found.sets["wide"] == known.sets["wide"]
    assert found.sets["new"] == known.sets["wide"]  # computed: the same store
    with pytest.raises(ValueError, match=r"was trained on the datasets 'arm', 'wide': give each store one"):
        build(replace(start, data=replace(config.data, datasets=())))


def test_a_server_of_a_mixture_wants_a_dataset_in_each_request(mixture: Path) -> None:
    policy = BatchedPolicy(load(mixture), "discrete")
    served = ServedPolicy(act=policy.act, views=policy.model.view_sizes, check=policy.check, history=2)
    sent = observe(0) | {"prompt": "do 0"}
    for key in ("arm", "wide"):
        seen, _ = read_request(pack(sent | {"unnorm_key": key}), served)
        direct = policy.alone.act(observe(0) | {"unnorm_key": key})
        np.testing.assert_array_equal(policy.act([seen, seen])[1], direct)
    with pytest.raises(ValueError, match="name one of them"):
        read_request(pack(sent), served)


def without_key(observation: Observation) -> Observation:
    return {name: value for name, value in observation.items() if name != "unnorm_key"}


def test_what_is_pushed_names_no_folder_of_this_machine(
    checkpoint: Path,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A dry run writes what an upload sends, which `load` reads again."""
    record = {"suite": "tabletop_object", "checkpoint": model.identity(), "protocol": {"executed": 3}}
    record |= {"outcomes": [], "tasks": [], "successes": 19, "episodes": 20, "wilson_95": [0.764, 0.991]}
    write_json(tmp_path / "eval/record.json", record)
    words = ["push", str(checkpoint), "Org/tiny", "--results", str(tmp_path / "eval")]
    assert main([*words, "--dry-run", str(tmp_path / "pushed")]) == 0
    card = (tmp_path / "pushed/README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "license: apache-2.0 (the default; --license names another)\n" in capsys.readouterr().out
    assert main([*words, "--dry-run", str(tmp_path / "own"), "--license", "cc-by-nc-4.0"]) == 0
    own = (tmp_path / "own/README.md").read_text()
    assert own == card.replace("license: apache-2.0", "license: cc-by-nc-4.0")
    assert 'worldvla.load("Org/tiny")' in card
    assert "| tabletop_object | 19 of 20 | 0.764 to 0.991 | 3 |\n\nBy `worldvla eval`, before" in card
    for path in (tmp_path / "pushed").rglob("*.[jm]*"):
        assert str(checkpoint.parents[2]) not in path.read_text(), path
    assert {p.suffix for p in (tmp_path / "pushed").rglob("*") if p.is_file()} == {
        ".json",
        ".md",
        ".safetensors",
    }
    assert Policy(load(tmp_path / "pushed")).act(observe(0)).shape == (3, 7)

    sent: list[Any] = []

    def create_repo(_: HfApi, name: str, **options: Any) -> str:
        sent.append((name, options))
        return f"https://hub/{name}"

    def upload_folder(_: HfApi, folder_path: Path, **options: Any) -> None:
        sent.append((options["repo_id"], (folder_path / "README.md").read_text()))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert main([*words, "--private"]) == 0
    assert sent == [("Org/tiny", {"private": True, "exist_ok": True}), ("Org/tiny", card)]


def test_what_cannot_be_pushed_is_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"suite": "tabletop_object", "checkpoint": {"digest": "of another"}, "protocol": {}}
    write_json(tmp_path / "record.json", record | {"outcomes": [], "tasks": []})
    assert main(["push", str(checkpoint), "Org/tiny", "--results", str(tmp_path)]) == 2
    assert "is of weights of another, these are" in capsys.readouterr().err
    assert main(["push", str(checkpoint), "tiny"]) == 2
    assert "expected ORG/NAME" in capsys.readouterr().err
    assert main(["push", str(checkpoint), "Org/a b"]) == 2
    capsys.readouterr()
    assert main(["push", str(checkpoint), "Org/tiny", "--license", "Apache 2"]) == 2
    assert "--license 'Apache 2': expected a name of the hub's: apache-2.0" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(HfApi, "create_repo", Mock(side_effect=OSError("no network")))
    assert main(["push", str(checkpoint), "Org/tiny"]) == 2
    assert "the hub does not take Org/tiny (no network): check `hf auth login`" in capsys.readouterr().err
