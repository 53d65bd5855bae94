"""Released checkpoints become ours and go back bit by bit, are read one tensor at a time, act and train on.

pytest tests/test_pretrained.py   (on synthetic folders with the published names, see released.py)
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from fake_env import TABLE, make_brief, make_short
from released import IMAGE, MODEL, RynnHead, image_state, transformer_state, write_release, write_tokenizer
from safetensors.torch import load_file, save_file
from token_stubs import PixelSums, random_episode

import worldvla
from worldvla import cli
from worldvla.batch import Batch
from worldvla.config import HeadConfig, LoraConfig
from worldvla.data.store import write_store
from worldvla.eval.actors import ModelActor
from worldvla.eval.rollout import Protocol, evaluate
from worldvla.infer.decode import regress_chunk
from worldvla.infer.model import export, load
from worldvla.infer.policy import Policy
from worldvla.model.mask import dense_mask
from worldvla.published.convert import convert, convert_back
from worldvla.published.names import RELEASES, open_release, published_names
from worldvla.published.tokenizers import load_image_tokenizer
from worldvla.recipes import RECIPES, published
from worldvla.tokenizers.action import RYNNVLA, WORLDVLA
from worldvla.train.loop import train
from worldvla.vocab import chameleon

TEMPLATE = published("libero_256")

FORMS = [
    ("chameleon", 1, True),
    ("chameleon", 2, False),
    ("worldvla_256", 1, False),
    ("worldvla_512", 2, False),
]
FORMS += [("rynnvla_256", 1, False), ("rynnvla_world_512", 1, False), ("rynnvla_action_world_512", 1, True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return directory


def folder(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(("release", "norm_rows", "image"), FORMS)
def test_every_layout_round_trips(
    release: str, norm_rows: int, image: bool, tmp_path: Path, tokenizer: Path
) -> None:
    state = transformer_state(MODEL, norm_rows)
    if norm_rows > 1:  # types may be mixed
        state["model.norm.weight"] = state["model.norm.weight"].float()
    shards = 3 if norm_rows == 1 else 1
    head = 10 if RELEASES[release].may_have_head else 0
    given = write_release(tmp_path / "theirs", shards=shards, image=image, head=head, state=state)
    suite = "libero_10" if RELEASES[release].chunks else ""
    without_head = release == "rynnvla_action_world_512"
    remarks = convert(
        tmp_path / "theirs",
        tmp_path / "ours",
        release,
        TEMPLATE,
        suite,
        tokenizer,
        without_head,
    )
    assert ("not used" in " ".join(remarks)) == without_head
    model = load(tmp_path / "ours")
    layout = model.config.layout
    assert layout.chunk == (10 if suite else 5)
    assert layout.state == (release in ("rynnvla_256", "rynnvla_action_world_512"))
    assert layout.grids[0] == ((32, 32) if release.endswith("512") else (16, 16))
    assert len(layout.views) == (2 if "rynnvla" in release else 1)
    ranges = RYNNVLA if layout.state else WORLDVLA
    assert model.builder.statistics.action_low == ranges.action_low
    assert replace(model.config.model, head=MODEL.head) == replace(MODEL, dropout=0.05)
    assert (model.transformer.action_head is not None) == (release == "rynnvla_256")
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    for name, key in published_names(model.config.model).items():
        theirs = given[key][0] if "q_norm" in name or "k_norm" in name else given[key]
        assert torch.equal(model.transformer.get_parameter(name), theirs.bfloat16()), name

    convert_back(tmp_path / "ours", tmp_path / "again")
    back = folder(tmp_path / "again")
    assert back.keys() == given.keys()
    assert all(back[k].dtype == v.dtype and torch.equal(back[k], v) for k, v in given.items())
    kept = {p.name for p in (tmp_path / "theirs").iterdir()}
    assert {p.name for p in (tmp_path / "again").iterdir()} == kept
    for name in kept & {"config.json", "model.safetensors.index.json"}:
        old, new = (json.loads((tmp_path / d / name).read_text()) for d in ("theirs", "again"))
        assert old == new


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_a_released_head_answers_as_torchs_own_modules_do(
    quantize: Any, tmp_path: Path, tokenizer: Path
) -> None:
    given = write_release(tmp_path / "theirs", head=5)
    convert(
        tmp_path / "theirs",
        tmp_path / "ours",
        "rynnvla_256",
        TEMPLATE,
        "libero_goal",
        tokenizer,
    )
    model = load(tmp_path / "ours", dtype=torch.float32, quantize=quantize)
    restated = RynnHead(5).eval()
    restated.load_state_dict(
        {k.removeprefix("action_head."): v for k, v in given.items() if "action_head" in k}
    )
    rng = np.random.default_rng(0)
    views = {v: rng.integers(256, size=(256, 256, 3), dtype=np.uint8) for v in ("agentview", "wrist")}
    observation = views | {"state": 0.1 * rng.normal(size=8), "instruction": "open it"}
    policy = Policy(model, "continuous")
    prompt = policy.prompts([observation])[0]
    actions_KA = regress_chunk(model.transformer, model.vocab, [prompt])[0]
    with torch.inference_mode():
        batch = Batch.stack([prompt], model.vocab.pad)
        mask = dense_mask(batch.chunk_BT)
        x_SD = model.transformer(batch.ids_BT, mask, batch.row_BT, batch.col_BT)[0]
        expected_KA = restated(x_SD[: len(prompt)])
    assert actions_KA.shape == (5, 7)
    assert actions_KA.std() > 0.01
    assert np.allclose(actions_KA, expected_KA.numpy(), atol=1e-5)


def test_releases_say_what_was_published() -> None:
    """M, K, views, state and pixels of reference part 1 and 5, and the tokens of an image: 276 and 1060."""
    from oracle import VOCAB

    from worldvla.data.sample import SampleBuilder
    from worldvla.data.show import CountedWords

    lengths = {}
    for name, release in RELEASES.items():
        layout = replace(release.layout, chunk=release.chunks.get("libero_goal", 5))
        ranges = replace(WORLDVLA, state_low=RYNNVLA.state_low, state_high=RYNNVLA.state_high)
        builder = SampleBuilder(layout, VOCAB, CountedWords(first=16_100), ranges)
        words = 9  # What action should the robot take to open it?
        frame = len(builder.policy_template("open it", 2)) - len(builder.policy_template("open it", 1))
        lengths[name] = frame, len(builder.policy_template("open it", 2)) - words
        assert layout.history == 2
    assert lengths["worldvla_256"] == (276, 1 + 552 + 1 + 45 + 1)
    assert lengths["worldvla_512"] == (1060, 1 + 2120 + 1 + 45 + 1)
    assert lengths["rynnvla_256"] == (2 * 276, 1 + 10 + 4 * 276 + 1 + 45 + 1)
    assert lengths["rynnvla_world_512"] == (2120, 1 + 4240 + 1 + 45 + 1)
    assert RELEASES["rynnvla_256"].chunks == {
        "libero_spatial": 10, "libero_object": 5, "libero_goal": 5, "libero_10": 10
    }  # fmt: skip


def test_recipes_are_what_was_published() -> None:
    """Reference 5.1 and 5.2, of every suite: batch, rate, decay, dropout, K, 40 epochs; what all share."""
    rows = (
        # WorldVLA: 8 a GPU; 4 GPUs, of the script for goal at 256 pixels 2.
        ("libero_256_spatial", 32, 5e-6, 0.1, 0.05, 5, 132_400),
        ("libero_256_object", 32, 5e-6, 0.1, 0.05, 5, 167_440),
        ("libero_256_goal", 16, 5e-6, 0.1, 0.05, 5, 260_200),
        ("libero_256_10", 32, 5e-6, 0.1, 0.05, 10, 253_640),
        ("libero_512_spatial", 32, 5e-6, 0.1, 0.05, 5, 132_400),
        ("libero_512_object", 32, 5e-6, 0.1, 0.05, 5, 167_440),
        ("libero_512_goal", 32, 5e-6, 0.1, 0.05, 5, 130_080),
        ("libero_512_10", 32, 5e-6, 0.1, 0.05, 10, 253_640),
        # RynnVLA-002, the pretokenised column: 8 GPUs.
        ("rynnvla_256_spatial", 64, 5e-6, 0.1, 0.05, 10, 66_200),
        ("rynnvla_256_object", 64, 5e-6, 0.1, 0.05, 5, 83_720),
        ("rynnvla_256_goal", 64, 5e-6, 0.15, 0.08, 5, 65_040),
        ("rynnvla_256_10", 64, 8e-6, 0.18, 0.1, 10, 126_800),
        # Its world model alone: one sample a frame; no chunks, so that K is the layout's default.
        ("rynnvla_world_512_spatial", 64, 5e-6, 0.15, 0.08, 5, 33_080),
        ("rynnvla_world_512_object", 64, 5e-6, 0.15, 0.08, 5, 41_840),
        ("rynnvla_world_512_goal", 64, 5e-6, 0.15, 0.08, 5, 32_520),
        ("rynnvla_world_512_10", 64, 5e-6, 0.15, 0.08, 5, 63_400),
    )
    families = ("libero_256", "libero_512", "rynnvla")
    assert {row[0] for row in rows} == {name for name in RECIPES if name.startswith(families)}
    for name, batch, rate, decay, dropout, chunk, steps in rows:
        config = RECIPES[name]()
        layout, optim, loss, training = config.layout, config.optim, config.loss, config.train
        assert config.name == name
        assert (training.batch_size, training.steps, layout.chunk) == (batch, steps, chunk), name
        assert (optim.learning_rate, optim.weight_decay, config.model.dropout) == (rate, decay, dropout), name
        assert optim.min_learning_rate == rate, name
        assert optim.warmup_steps == steps // 4000, name
        assert (optim.method, optim.betas, optim.clip) == ("adamw", (0.9, 0.95), 4.0), name
        assert (loss.z_weight, loss.image_weight, loss.head_weight) == (1e-5, 0.04, 10.0), name
        assert (loss.reduction, loss.supervise, loss.action_smoothing) == ("published", "all", 0.0), name
        assert (training.accumulation, training.seed, training.dtype) == (1, 0, "bfloat16"), name
        assert training.checkpoint_layers, name
        is_world = name.startswith("rynnvla_world")
        assert config.data.world_fraction == (1.0 if is_world else 0.5), name
        assert (layout.history, layout.state) == (2, name.startswith("rynnvla_256")), name
        side = 32 if "512" in name else 16
        assert layout.grids == ((side, side),) * (2 if "rynnvla" in name else 1), name
        head = HeadConfig(num_layers=2, width=1024, num_heads=4, hidden=4096, dropout=0.1)
        assert config.model.head == (head if name.startswith("rynnvla_256") else HeadConfig()), name


MEASURE = """
import sys, torch
from pathlib import Path
import worldvla
from safetensors.torch import load_file
def memory(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024
torch.set_num_threads(1)
worldvla.load(Path(worldvla.__file__).parent / "assets/tabletop")  # imports what it needs
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
before = memory("VmRSS:")
if sys.argv[1] == "load":
    model = worldvla.load(sys.argv[2])
else:
    shards = [load_file(path) for path in Path(sys.argv[2]).glob("*.safetensors")]
    model = [tensor.clone() for shard in shards for tensor in shard.values()]
print(memory("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory counters")
def test_loading_takes_the_model_and_less_than_one_shard(tmp_path: Path, tokenizer: Path) -> None:
    """Peak resident memory of another process; all at once and copied, to compare, takes twice the model."""
    config = replace(MODEL, num_layers=4, width=128, hidden=8192)
    state = write_release(tmp_path / "theirs", config=config, shards=2, state=transformer_state(config))
    shard = max(p.stat().st_size for p in (tmp_path / "theirs").glob("*.safetensors"))
    convert(tmp_path / "theirs", tmp_path / "ours", "chameleon", TEMPLATE, "", tokenizer)
    size = sum(v.nbytes for v in state.values())
    image = (tmp_path / "ours/image_tokenizer/model.safetensors").stat().st_size

    def peak(way: str) -> int:
        command = [sys.executable, "-c", MEASURE, way, str(tmp_path / "ours")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 0.9 * size < peak("load") < size + image + shard
    assert peak("at once") > 1.6 * size  # what was read before left some room


def test_a_downloaded_release_is_converted_evaluated_and_trained_on(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that a user walks, with a copy for the download, a stand-in for LIBERO and two steps."""
    hub = tmp_path / "hub"
    write_release(hub / "model_256/libero_goal")
    shutil.copytree(tokenizer, hub / "chameleon/tokenizer")
    (hub / "model_256/libero_goal/optimizer.00000-of-00004.pth").write_bytes(b"large")
    asked = []

    def snapshot_download(repo: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        assert "*.pth" in ignore_patterns
        target = tmp_path / "cache"
        part = allow_patterns[0].removesuffix("/*")
        shutil.copytree(hub / part, target / part, ignore=shutil.ignore_patterns(*ignore_patterns))
        return str(target)

    files = [p.relative_to(hub).as_posix() for p in hub.rglob("*") if p.is_file()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: files)
    ours, name = tmp_path / "ours", "Some-Org/WorldVLA"
    words = [
        "convert",
        f"hf://{name}/model_256/libero_goal",
        "--release",
        "worldvla_256",
        "--suite",
        "libero_goal",
    ]
    assert cli.main([*words, "--tokenizer", f"hf://{name}/chameleon/tokenizer", "--out", str(ours)]) == 0
    assert asked == [(name, ["model_256/libero_goal/*"]), (name, ["chameleon/tokenizer/*"])]
    assert not list((tmp_path / "cache").rglob("*.pth"))
    with pytest.raises(OSError, match=r"its folders are chameleon/tokenizer, model_256/libero_goal; check"):
        worldvla.load(name)

    actor = ModelActor(str(ours))
    protocol = Protocol("tabletop_object", (0,), episodes=1, videos=0)
    record = evaluate(actor, protocol, tmp_path / "eval", 1, make=make_short, table=TABLE)
    assert (record["episodes"], record["errors"]) == (1, 0)
    assert record["checkpoint"]["name"] == actor.model.config.name == "worldvla_256_goal"
    assert record["protocol"]["executed"] == 5
    assert record["protocol"]["head"] == "discrete"
    assert actor.model.view_sizes == {"agentview": (256, 256)}
    single = load(ours, dtype=torch.float32)
    assert {p.dtype for p in single.transformer.parameters()} == {torch.float32}

    config = actor.model.config
    episodes = [replace(random_episode(i, views=("agentview",)), instruction="open it") for i in range(2)]
    for episode in episodes:
        episode.images["agentview"] = np.zeros((9, 256, 256, 3), np.uint8) + np.uint8(7)
    stub = PixelSums(16, 8192, actor.model.image.digest())
    write_store(tmp_path / "store", episodes, stub)
    config = replace(
        config,
        data=replace(config.data, stores=(str(tmp_path / "store"),)),
        optim=replace(config.optim, warmup_steps=1, learning_rate=1e-3, min_learning_rate=1e-3),
        train=replace(
            config.train, steps=2, batch_size=1, device="cpu", dtype="float32", compile=False, num_threads=1,
            log_every=1, eval_every=2, num_eval_batches=1, init_from=str(ours),
        ),
    )  # fmt: skip
    outcome = train(config, tmp_path / "run")
    trained = load(outcome.checkpoint)
    moved = trained.transformer.embed.weight - actor.model.transformer.embed.weight.float()
    assert 0 < float(moved.abs().max()) < 0.05
    assert trained.builder.statistics == WORLDVLA
    convert_back(tmp_path / "run", tmp_path / "back", like=ours)
    back = folder(tmp_path / "back")
    assert back.keys() == folder(hub / "model_256/libero_goal").keys()
    assert torch.equal(back["lm_head.weight"], trained.transformer.head.weight.bfloat16())

    tuned = replace(config, lora=LoraConfig(rank=2, base="int8"))
    train(tuned, tmp_path / "lora")
    plain = load(export(tmp_path / "lora", tmp_path / "plain"))
    state = plain.transformer.state_dict()
    moved = {k for k, v in actor.model.transformer.state_dict().items() if not torch.equal(v, state[k])}
    assert {k.split(".")[-2] for k in moved} == set("qkvo") | {"gate", "up", "down"}
    assert {p.dtype for p in state.values()} == {torch.bfloat16}
    observation = {"agentview": np.zeros((256, 256, 3), np.uint8), "instruction": "open it"}
    assert Policy(plain).act(observation).shape == (5, 7)
    convert_back(tmp_path / "plain", tmp_path / "merged", like=ours)
    assert folder(tmp_path / "merged").keys() == back.keys()


@pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="needs worldvla[libero]")
@pytest.mark.parametrize(("release", "head"), [("worldvla_256", "discrete"), ("rynnvla_256", "continuous")])
def test_a_converted_release_acts_in_libero(release: str, head: str, tmp_path: Path, tokenizer: Path) -> None:
    """Ten steps of a real episode: pictures, state, prompt, mask and range are those of the release."""
    write_release(tmp_path / "theirs", head=5 if head == "continuous" else 0)
    convert(tmp_path / "theirs", tmp_path / "ours", release, TEMPLATE, "libero_goal", tokenizer)
    actor = ModelActor(str(tmp_path / "ours"), head=head)
    protocol = Protocol("libero_goal", (0,), episodes=1, videos=0)
    record = evaluate(actor, protocol, tmp_path / "eval", 1, make=make_brief)
    episode = json.loads((tmp_path / "eval/episodes.jsonl").read_text().splitlines()[-1])
    assert (record["errors"], episode["status"], episode["steps"]) == (0, "fail", 10), record
    assert record["protocol"]["head"] == head


def test_a_model_of_ours_is_loaded_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(worldvla.__file__).parent / "assets/tabletop"
    files = [p.relative_to(shipped).as_posix() for p in shipped.rglob("*") if p.is_file()]
    asked = []

    def snapshot_download(
        repo: str, allow_patterns: None, ignore_patterns: list[str], revision: str = "main"
    ) -> str:
        asked.append((repo, allow_patterns, revision))
        ignored = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(shipped, tmp_path / "cache", ignore=ignored, dirs_exist_ok=True)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
    model = load("hf://Org/tabletop")
    load("Org/tabletop@v2")
    assert asked == [("Org/tabletop", None, "main"), ("Org/tabletop", None, "v2")]
    assert model.path == tmp_path / "cache"
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float32}  # stored in bfloat16


@pytest.mark.parametrize("prefix", ["", "model.vqmodel.", "vqmodel."])
@pytest.mark.parametrize("decoder", [True, False])
def test_image_tokenizers_of_every_layout_load(prefix: str, decoder: bool, tmp_path: Path) -> None:
    state = image_state(decoder)
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "model.safetensors")
    tokenizer = load_image_tokenizer(tmp_path / "model.safetensors")
    assert tokenizer.config == IMAGE
    assert all(torch.equal(v, state[k]) for k, v in tokenizer.state_dict().items())
    codes = tokenizer.encode(torch.zeros(1, 16, 32, 3, dtype=torch.uint8))
    assert codes.shape == (1, 1, 2)
    tokenizer.save(tmp_path / "saved")
    again = type(tokenizer).load(tmp_path / "saved")
    assert again.digest() == tokenizer.digest()
    if decoder:
        assert again.decode(codes).shape == (1, 16, 32, 3)
    else:
        with pytest.raises(ValueError, match=r"no decoder.*vqgan\.ckpt"):
            again.decode(codes)


def test_the_base_model_brings_its_own_tokenizer(tmp_path: Path) -> None:
    """Chameleon as on the hub: codes from `model.vqmodel.*`, text from tokenizer.json; no decoder."""
    write_release(tmp_path / "base", image=True)
    write_tokenizer(tmp_path / "other", text="tokenizer.json")
    shutil.copy(tmp_path / "other/tokenizer.json", tmp_path / "base")
    remarks = convert(tmp_path / "base", tmp_path / "ours", "chameleon", TEMPLATE)
    assert "no decoder" in remarks[0]
    model = load(tmp_path / "ours")
    expected = {k: v.bfloat16().float() for k, v in image_state(decoder=False).items()}
    assert all(torch.equal(v, expected[k]) for k, v in model.image.state_dict().items())
    assert chameleon().digest() == model.vocab.digest()
    assert len(open_release(tmp_path / "base", chameleon()).aside) == len(expected)
