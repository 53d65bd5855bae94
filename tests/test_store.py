"""TokenStore: what goes in comes out, whole or not at all; tokenising is idempotent, damage is named.

pytest tests/test_store.py
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from token_stubs import PixelSums, random_episode

from worldvla.config import ImageTokenizerConfig
from worldvla.data.augment import augmented
from worldvla.data.episode import Episode, demonstration_files, write_episodes
from worldvla.data.sources import open_source
from worldvla.data.store import TokenStore, write_store
from worldvla.data.tokenize import tokenize
from worldvla.files import write_digests
from worldvla.tokenizers.image import ImageTokenizer

EPISODES = [random_episode(seed, length=5 + seed) for seed in range(4)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", EPISODES, PixelSums())


def test_what_goes_in_comes_out(store: Path):
    opened = TokenStore.open(store, "stub")
    tokenizer = PixelSums()
    assert len(opened) == sum(len(e) for e in EPISODES)
    assert opened.grids == {"agentview": (3, 3), "wrist": (2, 2)}
    for row, episode in zip(opened.episodes, EPISODES, strict=True):
        span = slice(row.start, row.start + row.length)
        for name in ("actions", "states", "is_expert"):
            assert (getattr(opened, name)[span] == getattr(episode, name)).all(), name
        for view, images in episode.images.items():
            codes = tokenizer.encode(torch.from_numpy(images)).flatten(1).numpy()
            assert (opened.codes[view][span] == codes).all()
        for name in ("instruction", "suite", "task", "init", "seed"):
            assert getattr(row, name) == getattr(episode, name)
    assert opened.codes["agentview"].dtype == np.uint16


def test_the_experts_answers_are_kept_and_not_mixed(tmp_path: Path):
    labels = [
        np.random.default_rng(i).random((len(e), 4, 7), dtype=np.float32) for i, e in enumerate(EPISODES)
    ]
    told = [replace(e, expert_actions=label) for e, label in zip(EPISODES, labels, strict=True)]
    write_episodes(tmp_path / "a_demo.hdf5", told, {})
    tokenize([tmp_path / "a_demo.hdf5"], PixelSums(), tmp_path / "store")
    opened = TokenStore.open(tmp_path / "store")
    assert opened.expert_actions is not None
    assert np.array_equal(opened.expert_actions, np.concatenate(labels))
    with pytest.raises(ValueError, match="stores of their own"):
        write_store(tmp_path / "mixed", [told[0], EPISODES[1]], PixelSums())


def test_batches_do_not_change_the_codes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worldvla.data.store.BATCH", 2)
    other = write_store(tmp_path / "other", EPISODES, PixelSums())
    for name in ("codes_agentview.npy", "codes_wrist.npy", "actions.npy", "manifest.json", "episodes.json"):
        assert (store / name).read_bytes() == (other / name).read_bytes()


def test_the_manifest_says_how_many_codes_the_next_frame_keeps(tmp_path: Path):
    still = {view: images[:1].repeat(len(images), 0) for view, images in EPISODES[0].images.items()}
    half = {view: np.concatenate([images[:4], still[view][4:]]) for view, images in still.items()}
    half["wrist"] = np.concatenate([still["wrist"][:4], 255 - still["wrist"][4:]])
    assert len(EPISODES[0]) == 5
    other = replace(EPISODES[1], images={view: images[:1].repeat(6, 0) for view, images in still.items()})
    store = TokenStore.open(
        write_store(tmp_path / "s", [replace(EPISODES[0], images=half), other], PixelSums())
    )
    # One change in 4 + 5 pairs; the step from one episode to the next does not count.
    assert store.manifest["kept"] == {"agentview": 1.0, "wrist": round(8 / 9, 4)}


def test_a_crash_leaves_the_old_store_and_nothing_else(store: Path):
    before = {path.name: path.read_bytes() for path in store.iterdir()}

    def crash() -> Iterator[Episode]:
        yield EPISODES[0]
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_store(store, crash(), PixelSums())
    assert {path.name: path.read_bytes() for path in store.iterdir()} == before
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_a_store_is_replaced_whole(store: Path):
    write_store(store, EPISODES[:1], PixelSums())
    assert len(TokenStore.open(store)) == len(EPISODES[0])
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_a_directory_that_is_no_store_is_not_overwritten(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        write_store(tmp_path, EPISODES, PixelSums())
    assert (tmp_path / "thesis.txt").exists()


def test_another_tokenizer_is_named(store: Path):
    with pytest.raises(ValueError, match="codes of tokenizer stub, this one is other"):
        TokenStore.open(store, "other")


@pytest.mark.parametrize(
    "name", ["codes_wrist.npy", "actions.npy", "states.npy", "is_expert.npy", "episodes.json"]
)
@pytest.mark.parametrize("damage", ["cut", "gone", "empty"])
def test_damage_is_one_line(store: Path, name: str, damage: str):
    path = store / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-3] if damage == "cut" else b"")
    with pytest.raises(ValueError, match=path.stem) as caught:
        TokenStore.open(store)
    assert "\n" not in str(caught.value)


def test_arrays_must_match_the_manifest(store: Path):
    np.save(store / "actions.npy", np.load(store / "actions.npy")[:-1])
    write_digests(store)
    with pytest.raises(ValueError, match="by the manifest"):
        TokenStore.open(store)


def test_episodes_must_cover_the_frames(store: Path):
    rows = json.loads((store / "episodes.json").read_text())
    (store / "episodes.json").write_text(json.dumps(rows[:-1]))
    write_digests(store)
    with pytest.raises(ValueError, match="does not cover"):
        TokenStore.open(store)


@pytest.mark.parametrize("is_protected", [True, False])
def test_a_changed_array_never_opens(store: Path, is_protected: bool):
    """A code outside the codebook and an action that is no number, with the old digests and with new ones."""
    for name, value, message in (("codes_agentview", 64, "holds 64"), ("actions", np.nan, "frame 3")):
        before = (store / f"{name}.npy").read_bytes()
        array = np.load(store / f"{name}.npy", mmap_mode="r+")
        array[3, 1] = value
        array.flush()
        if not is_protected:
            write_digests(store)
        with pytest.raises(ValueError, match="SHA-256" if is_protected else message):
            TokenStore.open(store)
        (store / f"{name}.npy").write_bytes(before)
    write_digests(store)
    assert len(TokenStore.open(store)) == sum(map(len, EPISODES))


def test_no_store_at_all(tmp_path: Path):
    with pytest.raises(ValueError, match="is no token store"):
        TokenStore.open(tmp_path / "nothing")


def test_episodes_that_do_not_fit_together_raise(tmp_path: Path):
    with pytest.raises(ValueError, match="no episodes"):
        write_store(tmp_path / "store", [], PixelSums())
    with pytest.raises(ValueError, match=r"has the views .'wrist'.*those before it .'agentview', 'wrist'"):
        write_store(tmp_path / "store", [EPISODES[0], random_episode(0, views=("wrist",))], PixelSums())
    with pytest.raises(ValueError, match="a store of their own"):
        write_store(tmp_path / "store", [random_episode(0, views=("wrist",)), EPISODES[0]], PixelSums())
    wide = {view: images.repeat(2, axis=2) for view, images in EPISODES[1].images.items()}
    with pytest.raises(ValueError, match="changes grid"):
        write_store(tmp_path / "store", [EPISODES[0], replace(EPISODES[1], images=wide)], PixelSums())
    wild = PixelSums(num_codes=800)
    wild.encode = lambda images: PixelSums(num_codes=900).encode(images) + 100
    with pytest.raises(ValueError, match=r"expected \[0, 800\)"):
        write_store(tmp_path / "store", EPISODES, wild)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    folder = tmp_path / "demos"
    folder.mkdir()
    for task in range(2):
        episodes = [random_episode(seed) for seed in range(6) if seed % 3 == task]
        write_episodes(folder / f"task_{task}_demo.hdf5", episodes, {})
    return folder


def test_tokenising_twice_encodes_once(demos: Path, tmp_path: Path):
    tokenizer, out = PixelSums(), tmp_path / "store"
    first = tokenize(demos.glob("*.hdf5"), tokenizer, out)
    assert tokenizer.seen == 2 * len(first) == 2 * 4 * 9  # two views of four episodes of nine steps
    tokenize(demos.glob("*.hdf5"), tokenizer, out)
    assert tokenizer.seen == 2 * len(first)
    tokenizer.grey_levels = "float64"  # codes by another rule are made again, and the store names the rule
    again = tokenize(demos.glob("*.hdf5"), tokenizer, out)
    assert (tokenizer.seen, again.manifest["grey_levels"]) == (4 * len(first), "float64")
    tokenize(demos.glob("*.hdf5"), PixelSums(name="other"), out)
    assert TokenStore.open(out).manifest["tokenizer"] == "other"
    write_episodes(demos / "task_1_demo.hdf5", [random_episode(4)], {})
    assert len(tokenize(demos.glob("*.hdf5"), tokenizer, out)) == 3 * 9


def test_pictures_of_other_cameras_are_a_store_beside(demos: Path, tmp_path: Path):
    files, make = sorted(demos.glob("*.hdf5")), PixelSums()
    plain = tokenize(files, make, tmp_path / "plain")
    first, other = (tokenize(files, make, tmp_path / f"{n}", augment=n) for n in (1, 2))
    assert (plain.is_augmented, first.is_augmented) == (False, True)
    assert [e.key for e in first.episodes] == [e.key for e in plain.episodes]  # held out with the original
    assert np.array_equal(first.actions, plain.actions)
    assert all((first.codes[v] != plain.codes[v]).mean() > 0.5 for v in plain.codes)
    assert any((first.codes[v] != other.codes[v]).any() for v in plain.codes)
    again = tokenize(files, make, tmp_path / "again", augment=1)
    assert all(np.array_equal(first.codes[v], again.codes[v]) for v in plain.codes)
    seen = make.seen
    tokenize(files, make, tmp_path / "1", augment=1)
    assert make.seen == seen


def test_an_episode_is_shifted_and_lit_as_a_whole():
    """All its frames alike, the views each for itself; black and white stay what they are, about."""
    square = np.zeros((3, 64, 64, 3), dtype=np.uint8)
    square[:, 24:40, 24:40] = 200
    episode = replace(random_episode(0, 3), images={"agentview": square, "wrist": square})
    places, noisy = set(), 0
    for seed in range(40):
        changed = augmented(episode, np.random.default_rng(seed)).images["agentview"]
        assert (changed.shape, changed.dtype) == (square.shape, np.uint8)
        noisy += (changed[0] != changed[1]).any()
        rows, cols = np.nonzero(changed[0].mean(-1) > 110)
        places.add((round(np.median(rows)), round(np.median(cols))))
    assert 8 < noisy < 32
    away = np.abs(np.array([*places]) - 31.5).max(0)
    assert (away >= 1).all()
    assert (away <= 3).all()  # a 32nd of the side is 2
    assert np.array_equal(episode.images["agentview"], square)


def test_a_store_of_hdf5_files_knows_their_rate_and_names(demos: Path, tmp_path: Path):
    """The rate is the suite's or the files' own word, otherwise what the caller says; never two."""
    out, files = tmp_path / "store", sorted(demos.glob("*.hdf5"))
    write_episodes(files[0], [replace(random_episode(0), suite="tabletop_goal")], {})
    facts = tokenize(files, PixelSums(), out).manifest["source"]
    assert (facts["kind"], facts["fps"], facts["action_names"][-1]) == ("LIBERO HDF5", 12.5, "gripper")
    assert facts["cameras"]["wrist"]["feature"] == "eye_in_hand_rgb"
    with pytest.raises(ValueError, match=r"--fps 20: .* has 12.5 steps per second: leave --fps out"):
        tokenize(files, PixelSums(), out, fps=20)
    own = [replace(random_episode(0), suite="my_kitchen")]
    write_episodes(files[1], own, {"env_kwargs": {"control_freq": 20}})
    with pytest.raises(ValueError, match=r"different steps per second: .*task_0.* 12.5, .*task_1.* 20: take"):
        tokenize(files, PixelSums(), out)
    assert tokenize(files[1:], PixelSums(), out).manifest["source"]["fps"] == 20
    write_episodes(files[1], own, {})
    assert tokenize(files[1:], PixelSums(), out).manifest["source"]["fps"] is None
    assert tokenize(files[1:], PixelSums(), out, fps=15).manifest["source"]["fps"] == 15


def test_a_truncated_file_is_a_fault_beside_the_others(demos: Path, tmp_path: Path):
    path = min(demos.iterdir())
    path.write_bytes(path.read_bytes()[:500])
    store = tokenize(demos.glob("*.hdf5"), PixelSums(), tmp_path / "store", skip_bad=True)
    assert (len(store.episodes), store.manifest["source"]["skipped"]["count"]) == (2, 1)
    faults = [e for _, e in open_source(demos).attempts(True) if isinstance(e, ValueError)]
    assert [path.name in str(fault) for fault in faults] == [True]


def test_tokenize_with_the_image_tokenizer(demos: Path, tmp_path: Path):
    shape = ImageTokenizerConfig(
        channels=4, channel_mult=(1, 1), num_res_blocks=1, z_channels=4, embed_dim=4, num_codes=16
    )
    ImageTokenizer(shape).save(tmp_path / "image")
    store = tokenize(demos.glob("*.hdf5"), ImageTokenizer.load(tmp_path / "image"), tmp_path / "store")
    assert store.manifest["tokenizer"] == ImageTokenizer.load(tmp_path / "image").digest()
    assert store.grids == {"agentview": (3, 3), "wrist": (2, 2)}


def test_parts_of_a_stopped_collection_are_no_demonstrations(demos: Path):
    whole = sorted(demos.iterdir())
    for name in ("extra/more.h5", ".task_2.parts/0.hdf5"):
        write_episodes(demos / name, [random_episode(0)], {})
    assert demonstration_files([demos]) == [demos / "extra/more.h5", *whole]
    assert demonstration_files(whole[:1]) == whole[:1]
    with pytest.raises(ValueError, match=r"task_0.* is given 2 times: give every file once"):
        demonstration_files([demos, whole[0]])
    with pytest.raises(ValueError, match="no demonstrations given"):
        demonstration_files([])


def _spoilt(episode: Episode, what: str) -> Episode:
    """Return an episode with actions in another convention than the controller's."""
    actions, states = episode.actions.copy(), episode.states.copy()
    if what == "scaled":
        actions[:, 0] *= 3
    elif what == "poses":
        states[:, :3] = np.linspace(-0.3, 0.4, len(states))[:, None]
        actions[:-1, :3] = states[1:, :3]
    elif what == "0 or 1":
        actions[:, 6] = np.arange(len(actions)) % 2
    else:  # the fingers open after +1, close after -1
        actions[:, 6] = np.where(np.arange(len(actions)) % 10 < 5, -1, 1)
        states[:, 6:] = 0.02 + 0.004 * np.cumsum(np.append(0, actions[:-1, 6]))[:, None]
    return replace(episode, actions=actions, states=states)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("scaled", r"data/demo_1: actions\[:, 0\] \(x\) range from -2.* to 2.*, expected \[-1, 1\]"),
        ("poses", r"data/demo_1: actions\[:, 0:3\] .* are where the hand is"),
        ("0 or 1", r".*\(gripper\) range from 0 to 1, expected -1"),
        ("reversed", r".*\(gripper\) range from 1 \(open\) to -1 \(closed\), .*: change its sign"),
    ],
)
def test_foreign_actions_are_named_before_anything_is_encoded(what: str, message: str, tmp_path: Path):
    path, tokenizer, length = tmp_path / "bad_demo.hdf5", PixelSums(), 40
    sound = [replace(random_episode(i, length), states=np.zeros((length, 8), np.float32)) for i in range(2)]
    is_whole = what in ("0 or 1", "reversed")
    write_episodes(path, [_spoilt(sound[0], what) if is_whole else sound[0], _spoilt(sound[1], what)], {})
    write_episodes(tmp_path / "good_demo.hdf5", sound, {})
    with pytest.raises(ValueError, match=rf"^1 faults: {path}: {message}.*--skip-bad"):
        tokenize(tmp_path.glob("*.hdf5"), tokenizer, tmp_path / "store")
    assert not tokenizer.seen
    store = tokenize(tmp_path.glob("*.hdf5"), tokenizer, tmp_path / "store", skip_bad=True)
    assert len(store.episodes) == (2 if is_whole else 3)
    assert store.manifest["source"]["skipped"]["count"] == 1
    with pytest.raises(ValueError, match="1 faults"):  # what is left out is not forgotten
        tokenize(tmp_path.glob("*.hdf5"), tokenizer, tmp_path / "store")


def test_a_reversed_gripper_is_seen_over_files_that_move_it_seldom(tmp_path: Path):
    for i in range(8):
        sound = replace(random_episode(i, 12), states=np.zeros((12, 8), np.float32))
        bad = _spoilt(sound, "reversed")
        bad.states[3:, 6:] = bad.states[3, 6:]  # three steps that move
        write_episodes(tmp_path / f"{i}_demo.hdf5", [bad], {})
    with pytest.raises(ValueError, match=r"^8 faults: .*0_demo.hdf5: .* change its sign; .*7_demo.hdf5"):
        tokenize(tmp_path.glob("*.hdf5"), PixelSums(), tmp_path / "store")
    write_episodes(tmp_path / "good_demo.hdf5", [_with_gripper(random_episode(9, 40))], {})
    store = tokenize(tmp_path.glob("*.hdf5"), PixelSums(), tmp_path / "store", skip_bad=True)
    assert [e.key for e in store.episodes] == ["stub/task_0/9/0"]


def _with_gripper(episode: Episode) -> Episode:
    """Return an episode whose gripper does as it is told."""
    episode = _spoilt(episode, "reversed")
    return replace(episode, states=np.hstack((episode.states[:, :6], 1 - episode.states[:, 6:])))


def test_labels_out_of_range_are_named(tmp_path: Path):
    labels = [np.zeros((9, 2, 7), np.float32) for _ in range(2)]
    labels[1][4, 1, 2] = 3
    told = [replace(random_episode(i), expert_actions=label) for i, label in enumerate(labels)]
    write_episodes(tmp_path / "a_demo.hdf5", told, {})
    with pytest.raises(
        ValueError, match=r"^1 faults: .*demo_1: expert_actions\[:, :, 2\] \(z\) range from 0 to 3"
    ):
        tokenize([tmp_path / "a_demo.hdf5"], PixelSums(), tmp_path / "store")


def test_what_does_not_fit_into_a_store_is_named_before_anything_is_encoded(tmp_path: Path):
    tokenizer = PixelSums()
    first, small, lacks, odd, told = (random_episode(i) for i in range(5))
    small = replace(small, images={**small.images, "wrist": small.images["wrist"][:, :2, :2]})
    lacks = replace(lacks, images={"agentview": lacks.images["agentview"]})
    odd = replace(odd, images={**odd.images, "agentview": odd.images["agentview"][:, :5]})
    told = replace(told, expert_actions=np.zeros((9, 2, 7), np.float32))
    for i, episode in enumerate((first, small, lacks, odd, told)):
        write_episodes(tmp_path / f"{i}_demo.hdf5", [episode], {})
    lines = (
        r"4 faults: .*1_demo.*: wrist has pictures of 2x2 pixels, those before it 4x4: use one size; "
        r".*2_demo.*: has views \['agentview'\], those before it \['agentview', 'wrist'\]: use stores .*; "
        r".*3_demo.*: agentview has pictures of 5x6 pixels, the image tokenizer needs multiples of 2: .*; "
        r".*4_demo.*: has 2 expert actions a step, those before it 0"
    )
    with pytest.raises(ValueError, match=lines):
        tokenize(tmp_path.glob("*.hdf5"), tokenizer, tmp_path / "store")
    assert not tokenizer.seen
    assert len(tokenize(tmp_path.glob("*.hdf5"), tokenizer, tmp_path / "store", skip_bad=True).episodes) == 1


def test_a_hand_that_stays_closed_in_a_whole_file_is_no_fault(tmp_path: Path):
    episode = random_episode(0, 20)
    closed = np.full(20, 0.996)  # as a policy's bins say it
    episode = replace(episode, actions=np.column_stack((episode.actions[:, :6], closed)).astype(np.float32))
    write_episodes(tmp_path / "push_demo.hdf5", [episode], {})
    assert len(tokenize([tmp_path / "push_demo.hdf5"], PixelSums(), tmp_path / "store").episodes) == 1


def test_truncated_and_missing_files_are_named(demos: Path, tmp_path: Path):
    path = demos / "task_1_demo.hdf5"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="task_1_demo"):
        tokenize(demos.glob("*.hdf5"), PixelSums(), tmp_path / "store")
    assert not (tmp_path / "store").exists()
    shutil.rmtree(demos)
    with pytest.raises(FileNotFoundError, match="worldvla collect"):
        demonstration_files([demos])
