"""Every value of a config fits its annotation, wherever it comes from: a file, an option, a recipe.

Run: pytest tests/test_config.py
"""

import json
import re
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config

from worldvla.config import (
    Config,
    ImageTokenizerConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    from_json,
    to_json,
)

ASSETS = Path(__file__).parents[1] / "worldvla/assets"

BAD: list[tuple[str, Any, str]] = [
    ("train.dtype", "float16", "must be one of 'float32', 'bfloat16', 'auto', got 'float16'"),
    ("train.steps", -5, "must be a whole number from 1 to 1,000,000,000, got -5"),
    ("train.steps", 1.5, "must be a whole number"),
    ("train.steps", 10**30, "must be a whole number"),
    ("train.save_every", -1, "must be a whole number from 0 to"),
    ("train.batch_size", 0, "must be a whole number from 1 to"),
    ("train.accumulation", 0, "must be a whole number from 1 to"),
    ("train.num_threads", 0, "must be a whole number from 1 to"),
    ("train.num_threads", 10**9, "must be a whole number from 1 to 1,024, got 1000000000"),
    ("train.accumulation", 10**8, "must be a whole number from 1 to 1,024, got 100000000"),
    ("train.batch_size", 10**8, "must be a whole number from 1 to 65,536"),
    ("model.num_layers", 10**9, "must be a whole number from 1 to 1,024"),
    ("model.head.num_layers", 10**9, "must be a whole number from 0 to 1,024"),
    ("model.hidden", 10**9, "must be a whole number from 1 to 65,536"),
    ("layout.chunk", 10**9, "must be a whole number from 1 to 1,024"),
    ("data.sequence_length", 10**9, "must be a whole number from 1 to 65,536"),
    ("lora.rank", 10**9, "must be a whole number from 0 to 65,536"),
    ("train.seed", -1, "must be a whole number from 0 to"),
    ("train.seed", True, "must be a whole number from 0 to 4,294,967,295, got True"),
    ("train.device", None, "must be a text, got None"),
    ("model.num_layers", 0, "must be a whole number from 1 to"),
    ("model.rope_theta", 0, "must be a finite number above 0, got 0"),
    ("model.head", 3, "must be an object, got 3"),
    ("layout.selective_mask", "no", "must be true or false, got 'no'"),
    ("layout.grids", [[8, 8], [4]], "must be a list of a list of a whole number from 1 to 1,024"),
    ("layout.grids", 3, "must be a list"),
    ("layout.views", "agentview", "must be a list of a text, got 'agentview'"),
    ("optim.learning_rate", float("inf"), "must be a finite number from 0, got inf"),
    ("loss.image_weight", 1e200, "must be a finite number from 0, got 1e+200"),
    ("optim.min_learning_rate", float("nan"), "must be a finite number from 0, got nan"),
    ("optim.warmup_steps", -5, "must be a whole number from 0 to"),
    ("optim.weight_decay", -1, "must be a finite number from 0, got -1"),
    ("optim.clip", -1, "must be a finite number above 0, got -1"),
    ("optim.betas", ["0", 0.9], "must be a list of a finite number from 0 to 1"),
    ("optim.betas", [0.9], "must be a list of a finite number from 0 to 1, a finite number from 0 to 1"),
    ("loss.image_weight", -1, "must be a finite number from 0, got -1"),
    ("data.world_fraction", 1.5, "must be a finite number from 0 to 1, got 1.5"),
    ("lora.targets", ["q", "x"], "must be a list of one of 'q', 'k'"),
    ("num_text", 10**9, "must be a whole number from 1 to 1,048,576, got 1000000000"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{p}={v}" for p, v, _ in BAD])
def test_a_value_that_does_not_fit_is_one_line(path: str, value: object, message: str) -> None:
    data = json.loads(json.dumps(to_json(tiny_config(Path("x")))))
    *sections, key = path.split(".")
    reduce(dict.__getitem__, sections, data)[key] = value
    with pytest.raises(ValueError, match=re.escape(f"config.json.{path} {message}")) as error:
        from_json(Config, data, "config.json")
    assert "\n" not in str(error.value)


def test_muon_is_for_whole_matrices() -> None:
    config = tiny_config(Path("x"))
    with pytest.raises(ValueError, match=r"with lora.rank set optim.method adamw"):
        replace(config, optim=replace(config.optim, method="muon"), lora=replace(config.lora, rank=2))


def test_values_are_checked_without_a_file_too() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size must be a whole number from 1 to .*, got 0"):
        TrainConfig(steps=1, batch_size=0)
    with pytest.raises(ValueError, match=r"name is part of a path: .* got '\.\./x'"):
        replace(tiny_config(Path("x")), name="../x")
    with pytest.raises(ValueError, match=r"name is part of a path: .* not empty, .* got ''"):
        replace(tiny_config(Path("x")), name="")
    with pytest.raises(ValueError, match=r"optim\.betas \(1, 1\): expected less than 1"):
        OptimConfig(betas=(1, 1))
    with pytest.raises(ValueError, match=r"width 18 / num_heads 2 is 9: .* make it even"):
        ModelConfig(num_layers=1, width=18, num_heads=2, num_kv_heads=2, hidden=8)
    with pytest.raises(ValueError, match=r"give 4 codes of 2 dims, num_codes is 8192"):
        ImageTokenizerConfig(quantizer="fsq", fsq_levels=(2, 2))
    assert TrainConfig(steps=1, batch_size=1, save_every=0).save_every == 0


@pytest.mark.parametrize(
    "prompt", ["do it", "{x}", "{task} {x}", "{task", "{task:>9}", "{}", "{task.real}", ""]
)
def test_a_policy_prompt_holds_the_instruction(prompt: str) -> None:
    line = f"layout.policy_prompt {prompt!r}: expected a text with {{task}}"
    with pytest.raises(ValueError, match=re.escape(line)):
        LayoutConfig(policy_prompt=prompt)
    assert LayoutConfig(policy_prompt="{{{task}}}").policy_prompt.format(task="go") == "{go}"


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*/config.json")), ids=lambda p: p.parent.name)
def test_configs_of_older_versions_load_through_defaults(path: Path) -> None:
    data = json.loads(path.read_text())
    config = from_json(Config, data)
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config
    for section in ("optim", "lora", *(() if data["model"].get("code_levels") else ("loss",))):
        del data[section]
    assert from_json(Config, data).layout == config.layout


def test_the_longest_sample_of_a_published_layout() -> None:
    assert LayoutConfig().longest == 704
    assert LayoutConfig(views=("a", "b"), grids=((16, 16),) * 2, state=True).longest == 1280
