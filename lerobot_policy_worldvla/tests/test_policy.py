"""The plugin against the genuine LeRobot: found, saved, loaded, the same actions, driven by lerobot-eval.

Run in an environment of LeRobot 0.6 in which both packages are installed:
pytest lerobot_policy_worldvla/tests
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.envs.utils import preprocess_observation
from lerobot.policies.factory import make_policy, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from tabletop_env import TabletopConfig

import worldvla

register_third_party_plugins()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return the shipped tabletop model as a policy folder, as the command writes it."""
    out = tmp_path_factory.mktemp("lerobot") / "tabletop"
    words = [sys.executable, "-m", "lerobot_policy_worldvla", "tabletop", "--out", str(out)]
    subprocess.run(words, check=True)
    return out


def load(path: Path, **changes):
    config = PreTrainedConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config, name, value)
    config.pretrained_path = path
    policy = make_policy(config, env_cfg=TabletopConfig())
    return policy, *make_pre_post_processors(config, pretrained_path=str(path))


def observations(count: int = 2) -> list[dict]:
    env = worldvla.make("tabletop_object", 1)
    return [env.reset(options={"init": i})[0] for i in range(count)]


def as_batch(seen: list[dict]) -> dict:
    pixels = {view: np.stack([o[view] for o in seen]) for view in ("agentview", "wrist")}
    batch = preprocess_observation({"pixels": pixels, "agent_pos": np.stack([o["state"] for o in seen])})
    return batch | {"task": [o["instruction"] for o in seen]}


def test_the_type_is_known(saved: Path):
    assert "worldvla" in PreTrainedConfig.get_known_choices()
    config = json.loads((saved / "config.json").read_text())
    assert (config["type"], config["checkpoint"]) == ("worldvla", "")
    assert str(saved.parent) not in (saved / "config.json").read_text()
    features = config["input_features"]
    assert features["observation.images.wrist"] == {"type": "VISUAL", "shape": [3, 32, 32]}


def test_the_actions_are_those_of_worldvla(saved: Path):
    policy, before, after = load(saved)
    seen = observations()
    expected = worldvla.load("tabletop").policy().act(seen)
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(before(as_batch(seen)))
        assert np.array_equal(after(chunk).numpy(), expected)
        steps = [after(policy.select_action(before(as_batch(seen)))).numpy() for _ in range(5)]
        assert np.array_equal(np.stack(steps, 1), expected)
        policy.reset()
        other = policy.select_action(before(as_batch(seen[1:])))
        with torch.autocast("cpu"):  # as lerobot-eval --policy.use_amp=true
            assert np.array_equal(policy.predict_action_chunk(as_batch(seen)).numpy(), expected)
    assert np.array_equal(other.numpy(), expected[1:, 0])


def test_a_saved_policy_is_saved_again(saved: Path, tmp_path: Path):
    policy, *_ = load(saved)
    policy.save_pretrained(tmp_path / "again")
    for name in ("config.json", "worldvla/model.safetensors", "worldvla/manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    policy, *_ = load(saved, n_action_steps=2)
    with torch.inference_mode():
        for _ in range(3):
            policy.select_action(as_batch(observations(1)))
    assert len(policy._queue) == 1  # of the second chunk


def test_what_is_wrong_is_said(saved: Path):
    policy, *_ = load(saved)
    batch = as_batch(observations(1))
    del batch["observation.images.wrist"]
    with pytest.raises(ValueError, match=r"no camera observation\.images\.wrist: .*set --policy\.views"):
        policy.select_action(batch)
    batch = as_batch(observations(1))
    del batch["observation.state"]
    with pytest.raises(ValueError, match=r"no observation\.state: .* names end in \.pos or \.vel"):
        policy.select_action(batch)
    with pytest.raises(ValueError, match="n_action_steps 9: chunks have 5 actions"):
        load(saved, n_action_steps=9)
    with pytest.raises(ValueError, match="the checkpoint reads agentview, wrist"):
        load(saved, views={"top": "observation.images.top"})
    with pytest.raises(NotImplementedError, match="worldvla train"):
        policy.forward({})


def test_history_and_differences(saved: Path):
    policy, *_ = load(saved)
    asked = []

    def act(observations: list[dict]) -> np.ndarray:
        asked.extend(observations)
        return np.zeros((len(observations), 5, 7), np.float32)

    policy.policy = SimpleNamespace(act=act)
    names = [f"joint{i}" for i in range(6)] + ["gripper"]
    policy.deltas = type(policy.deltas).of(
        {"delta": names[:6], "action_names": names, "state_names": [*names, "x"]}
    )
    layout = SimpleNamespace(history=3, chunk=5, state=True)
    policy.model = SimpleNamespace(
        config=SimpleNamespace(layout=layout), view_sizes=policy.model.view_sizes, device="cpu"
    )
    policy.config.n_action_steps = 3
    policy.reset()
    batches = [as_batch([o]) for o in observations(4)]
    actions = [policy.select_action(batch) for batch in batches]
    for action, batch in zip(actions, batches, strict=True):
        assert torch.equal(action[:, :6], batch["observation.state"][:, :6])
        assert action[0, 6] == 0
    first, second = asked  # at steps 0 and 3
    assert first["previous"] == []
    wrist = [255 * batch["observation.images.wrist"][0].permute(1, 2, 0).numpy() for batch in batches]
    for past, seen in zip(second["previous"], wrist[1:3], strict=True):
        assert np.array_equal(past["wrist"], seen.astype(np.uint8))
    with pytest.raises(ValueError, match="use select_action"):
        policy.predict_action_chunk(batches[0])


def run(*words: str) -> None:
    """Run a command of LeRobot, which finds the environment and the robot beside this file."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([f"{Path(sys.executable).parent}/{words[0]}", *words[1:]], check=True, env=environment)


def test_lerobot_eval_drives_it(saved: Path, tmp_path: Path):
    words = ["lerobot-eval", f"--policy.path={saved}", "--policy.device=cpu", "--env.type=worldvla_tabletop"]
    words += ["--env.discover_packages_path=tabletop_env", "--eval.n_episodes=8", "--eval.batch_size=4"]
    views = {view: f"observation.images.{view}" for view in ("agentview", "wrist")}
    words += [f"--policy.views={json.dumps(views)}"]
    run(*words, "--eval.use_async_envs=false", "--seed=0", f"--output_dir={tmp_path}/eval")
    overall = json.loads((tmp_path / "eval/eval_info.json").read_text())["overall"]
    assert overall["n_episodes"] == 8
    assert overall["pc_success"] >= 75


def test_lerobot_rollout_drives_a_robot(saved: Path, tmp_path: Path):
    """The robot is told, bit for bit, what worldvla answers to what the robot showed."""
    words = ["lerobot-rollout", f"--policy.path={saved}", "--policy.device=cpu", "--fps=12", "--duration=12"]
    words += ["--robot.type=worldvla_tabletop", "--robot.discover_packages_path=tabletop_robot"]
    words += [
        f"--robot.record={tmp_path}/record.npz",
        f"--robot.calibration_dir={tmp_path}",
        "--robot.init=10",
    ]
    task = "put the red cube on the plate"
    run(*words, f"--task={task}", "--play_sounds=false", "--return_to_initial_position=false")
    record = dict(np.load(tmp_path / "record.npz"))
    told, success = record.pop("action"), record.pop("success")
    seen = [{name: values[t] for name, values in record.items()} for t in range(0, len(told), 5)]
    policy = worldvla.load("tabletop").policy()
    answers = [policy.act(observation | {"instruction": task}) for observation in seen]
    assert np.array_equal(np.concatenate(answers)[: len(told)], told)
    assert success
