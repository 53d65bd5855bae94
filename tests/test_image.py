"""The image tokenizer: exact pixels, published names, nearest codes, files that come back, learning.

Run: pytest tests/test_image.py
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from token_stubs import random_episode

from worldvla.config import ImageTokenizerConfig, TokenizerTraining
from worldvla.data.episode import write_episodes
from worldvla.files import ASSETS
from worldvla.tokenizers.image import (
    Encoder,
    FiniteScalarQuantizer,
    ImageTokenizer,
    VectorQuantizer,
    to_images,
    to_pixels,
)
from worldvla.train import image_tokenizer
from worldvla.train.image_tokenizer import (
    TABLETOP,
    Frames,
    TokenizerTrainer,
    foreground,
    load_frames,
    train_tokenizer,
)

TINY = ImageTokenizerConfig(
    channels=8, channel_mult=(1, 2), patch=2, num_res_blocks=1, z_channels=8, embed_dim=4, num_codes=64
)
TINY_FSQ = replace(TINY, quantizer="fsq", fsq_levels=(4, 4, 2, 2))
CELL = replace(TINY_FSQ, encoder="cell")
TRAINING = TokenizerTraining(steps=40, batch_size=8, num_threads=1, dtype="float32")


def discs(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 pictures (count, side, side, 3) of one red disc on grey."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(0.2, 0.8, (count, 2, 1, 1)) * side
    y, x = np.mgrid[:side, :side][:, None]
    inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < (side / 8) ** 2
    return torch.from_numpy(np.where(inside[..., None], (220, 30, 30), (128, 128, 120)).astype(np.uint8))


def views(count: int = 64) -> list[Frames]:
    both = [discs(count, 16), discs(count, 8)]
    median = to_pixels(both[0]).median(dim=0).values
    return [Frames("agentview", both[0], both[0][:8], median), Frames("wrist", both[1], both[1][:8], None)]


def test_every_byte_survives_the_round_trip():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert torch.equal(to_images(to_pixels(images)), images)
    assert to_pixels(images).min() == -1.0
    assert to_pixels(images).max() == 1.0


def test_module_names_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        published = ImageTokenizer(ImageTokenizerConfig())
    shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    # WorldVLA model/chameleon_vae_ori/vqgan.yaml: ch 128, ch_mult [1, 1, 2, 2, 4], 2 blocks, 8192 codes.
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.1.conv2.weight": (128, 128, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.4.block.0.nin_shortcut.weight": (512, 256, 1, 1),
        "encoder.mid.block_1.norm1.weight": (512,),
        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (256, 256, 1, 1),
        "quantize.embedding.weight": (8192, 256),
        "post_quant_conv.bias": (256,),
        "decoder.conv_in.weight": (512, 256, 3, 3),
        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.up.4.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.0.block.2.norm2.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    absent = (
        "encoder.down.4.downsample.conv.weight",
        "decoder.up.0.upsample.conv.weight",
        "decoder.up.0.block.3.conv1.weight",
    )
    assert not set(absent) & set(shapes)
    assert not [name for name in shapes if ".attn." in name]  # attention stands in the middle only
    encoding = [name for name in shapes if not name.startswith("decoder.")]
    assert len(encoding) == 129  # as many `model.vqmodel.*` tensors as the published base model has
    assert isinstance(published.encoder, Encoder)
    assert published.encoder.mid.block_1.norm1.num_groups == 32
    assert published.encoder.mid.block_1.norm1.eps == 1e-6


def test_vq_finds_the_nearest_vector():
    quantizer = VectorQuantizer(50, 6)
    torch.nn.init.normal_(quantizer.embedding.weight)
    z = torch.randn(200, 6)
    distance = (z.double()[:, None] - quantizer.embedding.weight.double()).square().sum(-1)
    codes = quantizer.codes(z)
    assert torch.equal(codes, distance.argmin(1))
    assert torch.equal(quantizer.vectors(codes), quantizer.embedding.weight[codes])


@pytest.mark.parametrize("levels", [(4, 4, 2, 2), (8, 8, 8, 8), (5, 3, 2)])
def test_every_fsq_code_is_its_own_vector(levels):
    quantizer = FiniteScalarQuantizer(levels)
    book = quantizer.vectors(torch.arange(math.prod(levels)))
    sizes = torch.tensor(levels)
    half, offset = (sizes - 1) * 1.001 / 2, torch.where(sizes % 2 == 0, 0.5, 0.0)
    z = torch.atanh((book * (sizes // 2) + offset) / half) - torch.atanh(offset / half)
    vectors, codes = quantizer(z)
    assert torch.equal(codes, torch.arange(len(book)))
    assert torch.equal(quantizer.codes(z), codes)
    assert torch.allclose(vectors, book, atol=1e-5)
    assert book.unique(dim=0).shape == book.shape
    assert (
        int(quantizer.codes(torch.full((1, len(levels)), 50.0))) == len(book) - 1
    )  # saturates, never leaves the range


@pytest.mark.parametrize("config", [TINY, TINY_FSQ, CELL], ids=["vq", "fsq", "cell"])
def test_shapes_both_ways_at_any_size(config):
    tokenizer = ImageTokenizer(config).eval()
    assert config.factor == 4
    for rows, cols in ((16, 16), (8, 24)):
        images = torch.randint(0, 256, (2, rows, cols, 3), dtype=torch.uint8)
        codes = tokenizer.encode(images)
        assert codes.shape == (2, rows // 4, cols // 4)
        assert codes.dtype == torch.int64
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tokenizer.encode(images), codes)
        back = tokenizer.decode(codes)
        assert back.shape == images.shape
        assert back.dtype == torch.uint8
    assert tokenizer.codebook().shape == (64, 4)
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.encode(torch.zeros(1, 10, 16, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"0\.\.63"):
        tokenizer.decode(torch.full((1, 2, 2), 64))


def test_a_cell_encoder_sees_one_cell_alone_and_the_published_one_the_whole_frame():
    before, digests = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8), set()
    after = before.clone()
    after[:, 4:8, 8:12] = 255 - after[:, 4:8, 8:12]
    for config in (CELL, TINY_FSQ):
        tokenizer = ImageTokenizer(config).eval()
        pair = tokenizer.latents(to_pixels(torch.cat([before, after]))).unbind()
        changed = (pair[0] != pair[1]).any(0).nonzero().tolist()
        assert changed == [[1, 2]] if config is CELL else len(changed) == 16
        digests.add(tokenizer.digest())
    assert len(digests) == 2


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    tokenizer = ImageTokenizer(TINY)
    tokenizer.save(tmp_path / "tok")
    again = ImageTokenizer.load(tmp_path / "tok")
    assert again.config == TINY
    assert again.digest() == tokenizer.digest()
    assert {p.name for p in (tmp_path / "tok").iterdir()} == {
        *("ancestors.json", "config.json", "model.safetensors")
    }
    with torch.no_grad():
        again.post_quant_conv.weight += 1
    assert again.digest() != tokenizer.digest()
    config = json.loads((tmp_path / "tok/config.json").read_text())
    (tmp_path / "tok/config.json").write_text(json.dumps(config | {"num_codes": 32}))
    with pytest.raises(ValueError, match=r"does not fit: .*quantize\.embedding"):
        ImageTokenizer.load(tmp_path / "tok")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        ImageTokenizer.load(tmp_path)


def test_a_tokenizer_goes_by_the_name_of_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ImageTokenizer.load("tabletop")
    assert shipped.digest() == ImageTokenizer.load(ASSETS / "tabletop").digest()  # a checkpoint's folder
    assert shipped.digest() == ImageTokenizer.load(ASSETS / "tabletop/image_tokenizer").digest()
    Path("tabletop").mkdir()
    with pytest.raises(FileNotFoundError, match=r"tabletop is no image tokenizer: config\.json is missing"):
        ImageTokenizer.load("tabletop")


def test_small_things_weigh_more_than_the_table():
    frames = views()[0]
    pixels = to_pixels(frames.train)
    red = pixels[:, :1] > 0.5
    for background in (frames.background, None):
        weight = foreground(pixels, background)
        assert weight[red].mean() > 0.9
        assert weight[~red].mean() < 0.5
    assert foreground(pixels, frames.background).max() <= 1.0


@pytest.mark.parametrize("config", [TINY_FSQ, CELL], ids=["fsq", "cell"])
def test_training_learns_and_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    record = train_tokenizer(views(), config, tmp_path / "a", TRAINING)
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == record["num_steps"] == 40
    assert record["views"]["agentview"]["psnr"] > 14
    assert {"psnr_foreground", "used", "perplexity"} <= record["views"]["wrist"].keys()
    assert record["digest"] == ImageTokenizer.load(tmp_path / "a").digest()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        *("ancestors.json", "config.json", "model.safetensors", "metrics.jsonl", "report")
    }
    pictures = {"agentview.png", "wrist.png", "index.html", "report.json"}
    assert pictures <= {p.name for p in (tmp_path / "a/report").iterdir()}

    monkeypatch.setattr(image_tokenizer, "METRIC_STEPS", 10)
    monkeypatch.setattr(image_tokenizer, "SAVE_SECONDS", 0.0)
    step = TokenizerTrainer.step

    def killed(self, rate):
        if self.num_steps == 27:
            raise RuntimeError("killed")
        return step(self, rate)

    monkeypatch.setattr(TokenizerTrainer, "step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train_tokenizer(views(), config, tmp_path / "b", TRAINING)
    monkeypatch.setattr(TokenizerTrainer, "step", step)
    with pytest.raises(
        ValueError, match=r"of another run \(train\.seed: 0 there, 1 now\).*choose another directory"
    ):
        train_tokenizer(views(), config, tmp_path / "b", replace(TRAINING, seed=1))
    for name in ("training/state.safetensors", "training/state.json", "metrics.jsonl"):
        content = (tmp_path / "b" / name).read_bytes()
        (tmp_path / "b" / name).write_bytes(content[:-9] + b"\xff" + content[-8:])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/b/{name} .*(SHA-256|is damaged)"):
            train_tokenizer(views(), config, tmp_path / "b", TRAINING)
        (tmp_path / "b" / name).write_bytes(content)
    torch.manual_seed(99)
    again = train_tokenizer(views(), config, tmp_path / "b", TRAINING)
    assert again["digest"] == record["digest"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]


def test_a_finished_tokenizer_stays_as_it_is(tmp_path, monkeypatch):
    record = train_tokenizer(views(), CELL, tmp_path, replace(TRAINING, steps=1))
    monkeypatch.setattr(TokenizerTrainer, "step", lambda *_: pytest.fail("trained again"))
    assert train_tokenizer(views(), CELL, tmp_path, replace(TRAINING, steps=1)) == json.loads(
        json.dumps(record)
    )
    with pytest.raises(
        ValueError, match=r"of another run \(train\.steps: 1 there, 2 now\).*choose another directory"
    ):
        train_tokenizer(views(), CELL, tmp_path, replace(TRAINING, steps=2))
    with pytest.raises(ValueError, match=r"of another run \(frames\.agentview: "):
        train_tokenizer(views(32), CELL, tmp_path, replace(TRAINING, steps=1))


def test_a_tokenizer_that_does_not_fit_is_refused_before_it_is_made(tmp_path):
    config = replace(CELL, channels=2**16)
    with pytest.raises(ValueError, match=r"needs .* GB .* are free: make config\.channels or"):
        train_tokenizer(views(), config, tmp_path, TRAINING)
    assert not list(tmp_path.iterdir())


def test_one_trained_on_keeps_its_codes_and_says_from_which(tmp_path):
    first, other, on, further = (tmp_path / name for name in ("first", "other", "on", "further"))
    train = partial(train_tokenizer, views(), CELL)
    gentle = replace(TRAINING, steps=10, seed=2, learning_rate=2e-4)
    train(first, replace(TRAINING, steps=60))
    train(other, replace(TRAINING, steps=60, seed=1))
    train(on, gentle, first)
    train(further, replace(gentle, steps=1), on)
    tokenizers = [ImageTokenizer.load(path) for path in (first, other, on)]
    mine, away, near = (t.latents(to_pixels(views()[0].val)) for t in tokenizers)  # codes sit on edges, flip
    assert 0 < 20 * (mine - near).abs().mean() < (mine - away).abs().mean()
    assert tokenizers[0].ancestors == ()
    ancestors = (tokenizers[2].digest(), tokenizers[0].digest())
    assert ImageTokenizer.load(further).ancestors == ancestors
    with pytest.raises(ValueError, match=r"init_from: .* has the config .*, asked for .*: give its own"):
        train_tokenizer(views(), TINY_FSQ, tmp_path / "x", TRAINING, first)


@pytest.mark.parametrize("name", ["manifest.json", "ckpt", "model.safetensors"])
def test_what_is_there_is_not_spoilt(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds something else \({name}\): choose another folder"):
        train_tokenizer(views(), CELL, tmp_path, TRAINING)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(ValueError, match=r"^loss nan at step \d+: lower --learning-rate$"):
        train_tokenizer(views(), CELL, tmp_path, replace(TRAINING, learning_rate=1e30))
    assert not (tmp_path / "model.safetensors").exists()


def test_only_fsq_is_trained_within_a_budget(tmp_path):
    with pytest.raises(ValueError, match="'vq' is only loaded, not trained: set quantizer 'fsq'"):
        train_tokenizer(views(), TINY, tmp_path, TRAINING)
    with pytest.raises(
        ValueError, match=r"tokenizer_training\.steps must be a whole number from 0 .* got -5"
    ):
        TokenizerTraining(steps=-5)


def test_published_tokenizers_read_grey_levels_as_the_published_code_computes_them():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    published = torch.from_numpy(images.numpy() / 255.0 * 2 - 1).permute(0, 3, 1, 2).float()
    for config, num_differing in ((TINY, 0), (TINY_FSQ, 128)):  # our own keep the rule of their training
        tokenizer, pixels = ImageTokenizer(config), list[torch.Tensor]()
        tokenizer.encoder.register_forward_pre_hook(lambda _, args, p=pixels: p.append(args[0]))  # pyright: ignore
        tokenizer.encode(images)
        assert (
            len(images[pixels[0].permute(0, 2, 3, 1) != published.permute(0, 2, 3, 1)].unique())
            == num_differing
        )
        assert tokenizer.grey_levels == ("float32" if num_differing else "float64")


def test_frames_are_read_with_the_last_episode_held_out(tmp_path):
    episodes = [random_episode(i, length=5) for i in range(3)]
    for i, episode in enumerate(episodes):
        episode.images["agentview"][:] = 10 * i
    write_episodes(tmp_path / "a_demo.hdf5", episodes, {})
    fixed, moving = load_frames([tmp_path / "a_demo.hdf5"])
    assert (fixed.view, moving.view) == ("agentview", "wrist")
    assert fixed.train.shape == (10, 6, 6, 3)
    assert set(fixed.val.unique().tolist()) == {20}
    assert fixed.background is not None
    assert moving.background is None
    one_camera = [replace(e, images={"agentview": e.images["agentview"]}) for e in episodes]
    write_episodes(tmp_path / "0_demo.hdf5", one_camera, {})
    fixed, moving = load_frames([tmp_path / "0_demo.hdf5", tmp_path / "a_demo.hdf5"])
    assert fixed.first_train is not None
    assert moving.first_train is not None
    assert moving.first_val is not None
    assert fixed.first_train.tolist() == [0] * 5 + [5] * 5 + [10] * 5 + [15] * 5
    assert moving.first_train.tolist() == [0] * 5 + [5] * 5
    assert moving.first_val.tolist() == [0] * 5
    (tmp_path / "bad.hdf5").write_text("not HDF5")
    with pytest.raises(ValueError, match="no HDF5 file"):
        load_frames([tmp_path / "bad.hdf5"])


def test_the_preset_fits_the_tabletop_views():
    assert TABLETOP.factor == 8
