"""A robot of 14 dims and three cameras of different sizes: the recipe `finetune` trains on its LeRobot data,
and the policy answers a client of its server. Robots of 1 and of 32 dims, of one and four cameras, train too.

Run: pytest tests/test_finetune.py
"""

import os
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from released import MODEL, write_release, write_tokenizer
from token_stubs import PixelSums

from worldvla.cli import main
from worldvla.config import Config, ImageTokenizerConfig
from worldvla.data.episode import Episode
from worldvla.data.export import export_lerobot
from worldvla.data.sources.source import Camera, Source, Vector
from worldvla.data.store import write_store
from worldvla.infer.model import load
from worldvla.infer.policy import Policy
from worldvla.infer.world import World
from worldvla.published.convert import convert
from worldvla.recipes import finetune, published, tabletop
from worldvla.serve.client import Client
from worldvla.serve.server import serve_checkpoint
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.train.build import build, fit
from worldvla.train.image_tokenizer import LEVELS

SIZES = {"agentview": (32, 48), "left_wrist": (16, 16), "right_wrist": (24, 16)}
FOUR = SIZES | {"top": (40, 24)}
SHAPE = ImageTokenizerConfig(
    channels=4, channel_mult=(1, 2), patch=4, num_res_blocks=1, z_channels=4, embed_dim=4, num_codes=16
)
JOINTS = tuple(f"{side}_{i}" for side in ("left", "right") for i in range(6)) + ("left_grip", "right_grip")


SETTINGS = {
    "model.num-layers": 1,
    "model.width": 32,
    "model.hidden": 32,
    "model.num-heads": 2,
    "model.num-kv-heads": 2,
    "train.dtype": "float32",
    "train.num-threads": 1,
    "train.batch-size": 4,
    "train.steps": 2,
    "train.num-eval-batches": 1,
    "optim.warmup-steps": 1,
}
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


def episode(
    seed: int, length: int = 24, num_dims: int = 14, sizes: Mapping[str, tuple[int, int]] = SIZES
) -> Episode:
    """A light whose brightness is what every joint should do."""
    rng = np.random.default_rng(seed)
    light = np.repeat(rng.permutation(np.linspace(0, 1, length // 3)), 3)[:, None]
    pictures = {
        view: (255 * light[:, :, None, None] * np.ones((1, *size, 3))).astype(np.uint8)
        for view, size in sizes.items()
    }
    return Episode(
        instruction="fold the towel",
        suite="home",
        task="fold",
        actions=(light * np.linspace(-1, 1, num_dims)).astype(np.float32),
        states=rng.normal(size=(length, num_dims)).astype(np.float32),
        images=pictures,
        sim_states=np.zeros((length, 0)),
        is_expert=np.ones(length, dtype=np.bool_),
        init=-1,
        seed=-1,
    )


def train_on(root: Path, joints: tuple[str, ...], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Write data/, image_tokenizer/, store/ and run/ of a robot under `root`, by the guide's commands."""
    vector = Vector(("action",), joints)
    source = Source(
        path=root,
        kind="made here",
        num_episodes=6,
        fps=30.0,
        cameras={view: Camera(view, *size) for view, size in sizes.items()},
        action=vector,
        state=vector,
        guesses=(),
        files=(),
        attempts=lambda _: ((f"episode {i}", episode(i, 24, len(joints), sizes)) for i in range(6)),
    )
    export_lerobot(source, root / "data", "png")
    data, image, store = (str(root / name) for name in ("data", "image_tokenizer", "store"))
    torch.manual_seed(0)
    ImageTokenizer(SHAPE).save(root / "image_tokenizer")  # what `train-tokenizer` would have written
    views = ["--camera", *(f"{view}=observation.images.{view}" for view in sizes)]
    assert main(["tokenize", data, "--tokenizer", image, "--out", store, *views]) == 0
    words = ["--data.stores", store, "--tokenizer", image, "--out", str(root / "run")]
    words += SMALL
    assert main(["train", "finetune", *words]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("robot")
    train_on(root, JOINTS, SIZES)
    return root


def test_the_layout_is_that_of_the_store(run: Path):
    config = fit(replace(finetune(), data=replace(finetune().data, stores=(str(run / "store"),))))
    layout = config.layout
    assert (layout.num_action_dims, layout.num_state_dims) == (14, 14)
    assert dict(zip(layout.views, layout.grids, strict=True)) == {
        view: (rows // 8, cols // 8) for view, (rows, cols) in SIZES.items()
    }
    assert fit(config) == config
    seven = replace(episode(0), actions=episode(0).actions[:, :7].copy())
    write_store(run / "seven", [seven], PixelSums())
    mixed = replace(finetune(), data=replace(config.data, stores=(str(run / "store"), str(run / "seven"))))
    with pytest.raises(ValueError, match="train on one kind"):
        fit(mixed)


def check_policy(root: Path, joints: tuple[str, ...], sizes: Mapping[str, tuple[int, int]]) -> None:
    model, num_dims = load(root / "run"), len(joints)
    assert model.view_sizes == sizes
    assert model.manifest["features"]["action_names"] == list(joints)
    assert model.manifest["features"]["fps"] == 30.0
    shown = episode(7, 24, num_dims, sizes)
    frame = {view: frames[0] for view, frames in shown.images.items()}
    actions = Policy(model).act(frame | {"state": shown.states[0], "instruction": shown.instruction})
    assert actions.shape == (finetune().layout.chunk, num_dims)
    widest = np.abs(np.linspace(-1, 1, num_dims))  # the range of each joint's data
    assert (np.abs(actions) <= widest + 1e-6).all()
    with pytest.raises(ValueError, match=rf"state must be float \({num_dims},\)"):
        Policy(model).act(frame | {"state": np.zeros(8, np.float32), "instruction": shown.instruction})


def test_the_policy_acts_within_what_it_was_shown(run: Path):
    check_policy(run, JOINTS, SIZES)


@pytest.mark.parametrize(("num_dims", "num_cameras"), [(1, 1), (32, 4)])
def test_from_1_to_32_dims_and_from_1_to_4_cameras_train_and_act(
    tmp_path: Path, num_dims: int, num_cameras: int
):
    joints, sizes = tuple(f"joint_{i}" for i in range(num_dims)), dict([*FOUR.items()][:num_cameras])
    train_on(tmp_path, joints, sizes)
    check_policy(tmp_path, joints, sizes)


def test_a_server_answers_a_client_of_the_robot(run: Path):
    """Over openpi's protocol, pictures twice as large, which the server resizes. SIGTERM ends it."""
    shown, answers = episode(8), {}

    def ask(address: str) -> None:
        try:
            with Client(f"ws://{address}") as client:
                request = {view: frames[0].repeat(2, 0).repeat(2, 1) for view, frames in shown.images.items()}
                request |= {"state": shown.states[0], "prompt": shown.instruction}
                answers.update(client.metadata | client.infer(request))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        serve_checkpoint(run / "run", resize=True, port=0, on_start=lambda at: pool.submit(ask, at))
    assert answers["features"]["state_names"] == list(JOINTS)
    assert answers["actions"].shape == (8, 14)


def test_a_released_model_is_tuned_by_low_rank_updates(tmp_path: Path):
    """The recipe of the guide, with a converted release of two small layers in place of the 7B."""
    write_release(tmp_path / "theirs")
    write_tokenizer(tmp_path / "tokenizer")
    ours, store, out = (str(tmp_path / name) for name in ("ours", "store", "run"))
    template, parts = published("libero_256"), tmp_path / "tokenizer"
    convert(tmp_path / "theirs", Path(ours), "worldvla_256", template, "libero_goal", parts)
    base, sizes = load(ours), {"agentview": (32, 64), "right_wrist": (32, 32)}
    episodes = [
        replace(episode(i), images={v: np.full((24, *size, 3), 7, np.uint8) for v, size in sizes.items()})
        for i in range(2)
    ]
    write_store(Path(store), episodes, PixelSums(16, 8192, base.image.digest()))
    own = {name: getattr(MODEL, name) for name in ("num_layers", "width", "num_heads", "num_kv_heads")}
    own = {f"model.{name.replace('_', '-')}": n for name, n in own.items()} | {"model.hidden": MODEL.hidden}
    own |= {"train.device": "cpu", "train.steps": 1, "train.batch-size": 1, "train.accumulation": 1}
    own |= {"data.sequence-length": 256, "data.val-fraction": 0, "tokenizer": f"{ours}/image_tokenizer"}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    words += ["--data.stores", store, "--train.init-from", ours, "--out", out]
    assert main(["train", "finetune_7b", *words]) == 0
    model = load(out, unnorm_key="my")
    assert model.view_sizes == sizes
    layers = base.transformer.layers.state_dict()
    moved = {n for n, v in model.transformer.layers.state_dict().items() if not torch.equal(v, layers[n])}
    assert {name.split(".")[-2] for name in moved} == set("qkvo") | {"gate", "up", "down"}
    assert torch.equal(model.transformer.embed.weight, base.transformer.embed.weight)
    shown = episode(7)
    frame = {v: np.zeros((*size, 3), np.uint8) for v, size in sizes.items()}
    actions = Policy(model).act(frame | {"state": shown.states[0], "instruction": shown.instruction})
    assert actions.shape == (5, 14)
    assert (np.abs(actions) <= np.abs(np.linspace(-1, 1, 14)) + 1e-6).all()  # of this arm, not LIBERO's


@pytest.mark.parametrize("recipe", [finetune, tabletop])
def test_training_needs_stores(run: Path, recipe: Callable[[], Config]):
    config = replace(recipe(), tokenizer=str(run / "image_tokenizer"))
    with pytest.raises(ValueError, match=r"data\.stores is empty: name the token stores"):
        build(replace(config, data=replace(config.data, stores=())))


def test_the_world_model_of_the_same_data_imagines_all_cameras(run: Path):
    torch.manual_seed(0)
    small = replace(LEVELS, channels=8, z_channels=8)  # of train-tokenizer --levels
    ImageTokenizer(small).save(run / "levels")
    data, image, store = (str(run / name) for name in ("data", "levels", "levels_store"))
    views = ["--camera", *(f"{view}=observation.images.{view}" for view in SIZES)]
    assert main(["tokenize", data, "--tokenizer", image, "--out", store, *views]) == 0
    words = ["--data.stores", store, "--tokenizer", image, "--out", str(run / "world")]
    assert main(["train", "finetune_world", *words, *SMALL]) == 0
    model, shown = load(run / "world"), episode(7)
    world = World(model)
    frame = world.reset(
        {view: frames[0] for view, frames in shown.images.items()} | {"state": shown.states[0]}
    )
    for action in shown.actions[:5]:  # past the end of a clip
        frame = world.step(action)
    assert {view: picture.shape[:2] for view, picture in frame.items()} == SIZES
    assert world.state is not None
    assert world.state.shape == (14,)
    before = run / "from_run"  # a run may be named as where to start from
    words[-1] = str(before)
    assert main(["train", "finetune_world", *words, *SMALL, "--train.init-from", str(run / "world")]) == 0
    assert load(before).config.train.init_from == str(run / "world/ckpt/step_2")
