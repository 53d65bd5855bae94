"""Whatever is wrong with a released folder is one line: what, got, expected, fix; before weights are read.

pytest tests/test_pretrained_errors.py
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from released import image_state, names_of_ids, transformer_state, write_release, write_text, write_tokenizer
from safetensors.torch import load_file, save_file

import worldvla
from worldvla.cli import main
from worldvla.infer import model as loading
from worldvla.published.convert import convert, convert_back
from worldvla.published.hub import locate
from worldvla.published.names import open_release
from worldvla.published.tokenizers import check_text, load_image_tokenizer, verify_checksums
from worldvla.recipes import published
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import chameleon

TEMPLATE = published("libero_256")

LAYER = "model.layers.1."


def settings(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(directory: Path, shard: str, **tensors: torch.Tensor | None) -> None:
    """Rewrite one shard with tensors replaced, added or (None) left out; the index stays as it is."""
    state = load_file(directory / shard) | tensors
    save_file({k: v for k, v in state.items() if v is not None}, directory / shard)


def whole(directory: Path, **tensors: torch.Tensor | None) -> None:
    """Replace the shards by one file with some tensors changed."""
    for path in directory.glob("model*"):
        path.unlink()
    state = transformer_state() | tensors
    save_file({k: v for k, v in state.items() if v is not None}, directory / "model.safetensors")


def pickled(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    torch.save({"a": torch.zeros(1)}, directory / "pytorch_model.bin")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


LAST = "model-00003-of-00003.safetensors"
ONES = torch.ones(2, 2).bfloat16()
UNEVEN = torch.arange(32.0).reshape(2, 16).bfloat16()
BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / LAST).unlink(), rf"lacks shards, {LAST}: download"),
    (lambda d: cut(d / LAST), rf"{LAST} is damaged.*download it again"),
    (lambda d: (d / "config.json").unlink(), r"no .*config\.json: expected a released folder"),
    (lambda d: (d / "config.json").write_text("{"), r"config\.json is damaged.*download"),
    (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"index\.json has no weight_map"),
    (lambda d: change(d, LAST, extra=ONES), r"not where model\.safetensors\.index\.json says: extra"),
    (lambda d: whole(d, **{"model.extra.weight": ONES}), r"has unknown model\.extra\.weight: choose another"),
    (
        lambda d: whole(d, **{f"{LAYER}mlp.up_proj.weight": None}),
        rf"lacks {LAYER}mlp.up_proj.weight: download",
    ),
    (
        lambda d: whole(d, **{f"{LAYER}mlp.up_proj.weight": ONES}),
        rf"other shapes.*{LAYER}mlp.up_proj.weight \(2, 2\), expected \(48, 32\): use files of one",
    ),
    (
        lambda d: whole(d, **{f"{LAYER}self_attn.q_norm.weight": torch.ones(3, 16).bfloat16()}),
        r"q_norm\.weight \(3, 16\), expected \(2, 16\)",
    ),
    (
        lambda d: whole(d, **{f"{LAYER}mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)}),
        "has other types",
    ),
    (lambda d: settings(d, hidden_size=64), r"other shapes.*and \d+ more"),
    (lambda d: settings(d, vocab_size=32000), r"vocab_size is 32000, vocabulary chameleon has 65536"),
    (lambda d: settings(d, swin_norm=True), r"\{'swin_norm': True\}, expected .*another architecture"),
    (lambda d: settings(d, hidden_size=None), r"\['hidden_size'\] missing"),
    (lambda d: settings(d, rope_scaling={"factor": 2}), r"rope_scaling is \{'factor': 2\}, expected none"),
    (lambda d: settings(d, rope_parameters={"rope_type": "yarn"}), "rope_scaling is .*yarn"),
    (pickled, r"pytorch_model\.bin may be pickles, which are not opened; take the safetensors"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[m[:24] for _, m in BROKEN])
def test_a_damaged_folder_is_one_clear_line(
    damage: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write_release(tmp_path)
    open_release(tmp_path, chameleon())
    damage(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_release(tmp_path, chameleon())
    assert "\n" not in str(caught.value)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_release(tmp_path)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    key = next(key for key, shard in where.items() if shard == LAST)  # the index names the later one
    change(tmp_path, LAST.replace("00003-", "00001-"), **{key: ONES})
    with pytest.raises(ValueError, match=rf"keys in {LAST} that another shard has too: {re.escape(key)}"):
        open_release(tmp_path, chameleon())


def test_what_is_not_as_published_is_said(tmp_path: Path) -> None:
    """A head that is not there, and tokenizer files with other checksums than the authors'."""
    write_release(tmp_path / "theirs")
    write_tokenizer(tmp_path / "tokenizer")
    where = tmp_path / "theirs", tmp_path / "ours"
    told = convert(*where, "rynnvla_256", TEMPLATE, "libero_goal", tmp_path / "tokenizer")
    assert any(
        "no action_head.* keys, which RynnVLA-002's training adds: the bins alone act" in t for t in told
    )
    assert any(re.search(r"vqgan\.ckpt has md5 .*, the published one 1a559fb5dab4d351d", t) for t in told)
    assert any(re.search(r"text_tokenizer\.json has md5 .*, the published one 170a932b687", t) for t in told)
    with (tmp_path / "tokenizer/checklist.chk").open("w") as file:
        file.write(f"{'0' * 32}  vqgan.ckpt\n")
    with pytest.raises(ValueError, match=r"vqgan\.ckpt has checksum .* says 0+: download it again"):
        convert(*where, "rynnvla_256", TEMPLATE, "libero_goal", tmp_path / "tokenizer")


def test_heads_that_differ_in_their_norm_are_refused(tmp_path: Path) -> None:
    write_release(tmp_path, norm_rows=2)
    whole(tmp_path, **{f"{LAYER}self_attn.k_norm.bias": UNEVEN})
    state = load_file(tmp_path / "model.safetensors")
    released = open_release(tmp_path, chameleon())
    assert released.norm_rows["layers.1.attention.k_norm.bias"] == 2
    with pytest.raises(ValueError, match=r"k_norm\.bias differs from head to head"):
        dict(released.tensors())
    assert state


def test_an_action_head_is_checked_like_the_rest(tmp_path: Path) -> None:
    state = write_release(tmp_path, head=5)
    with pytest.raises(ValueError, match=r"has unknown action_head\.action_token_embeddings\.weight"):
        open_release(tmp_path, chameleon())  # a release that has none
    with pytest.raises(ValueError, match=r"embeddings\.weight \(1, 1120\), expected \(1, 2240\)"):
        open_release(tmp_path, chameleon(), (10, 7))  # another suite's chunks
    assert open_release(tmp_path, chameleon(), (5, 7)).config.head.num_layers == 2
    aside = open_release(tmp_path, chameleon(), (5, 7), without_head=True)
    assert len(aside.aside) == sum(key.startswith("action_head.") for key in state)
    assert aside.config.head.num_layers == 0
    key = "action_head.output_projection.model.fc2.weight"
    write_release(tmp_path / "other", state={k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=rf"lacks {re.escape(key)}: .* --without-action-head"):
        open_release(tmp_path / "other", chameleon(), (5, 7))
    write_release(tmp_path / "more", state=state | {"action_head.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has unknown action_head\.bias"):
        open_release(tmp_path / "more", chameleon(), (5, 7))


def test_another_text_vocabulary_is_refused(tmp_path: Path) -> None:
    path, names = tmp_path / "text_tokenizer.json", names_of_ids()
    write_text(path, names)
    check_text(TextTokenizer.load(path), chameleon(), str(path))
    moved = names | {"IMGIMGBCZ": names["IMGIMGBDZ"], "IMGIMGBDZ": names["IMGIMGBCZ"]}  # codes 12 and 13
    write_text(path, moved)
    with pytest.raises(ValueError, match=r"IMGIMGBCZ has id 17, vocabulary chameleon says 16 \(2 such"):
        check_text(TextTokenizer.load(path), chameleon(), str(path))
    write_text(path, {name: id_ for name, id_ in names.items() if name != "<reserved08706>"})
    with pytest.raises(ValueError, match=r"<reserved08706> has id None, .* says 8710"):
        check_text(TextTokenizer.load(path), chameleon(), str(path))
    write_text(path, names | {"IMGIMGIBJCZ": 20000})
    with pytest.raises(ValueError, match=r"IMGIMGIBJCZ has id 20000, .* says None"):
        check_text(TextTokenizer.load(path), chameleon(), str(path))


class Stranger:
    """What a pickle may hold."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": Stranger()}}, r"holds Python objects beside tensors.*take the published file"),
        ({"state_dict": {"a": 1}}, r"holds no state dict of tensors, got dict"),
        ([torch.zeros(1)], r"holds no state dict of tensors, got list"),
        ({"state_dict": {"a": torch.zeros(1)}}, r"lacks encoder\.conv_in\.weight: expected the state dict"),
    ],
)
def test_a_foreign_vqgan_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match=message):
        load_image_tokenizer(tmp_path / "vqgan.ckpt")


def test_a_vqgan_with_other_keys_shapes_or_widths_is_refused(tmp_path: Path) -> None:
    state, path = image_state(), tmp_path / "vqgan.safetensors"
    for changed, message in (
        (state | {"encoder.down.0.attn.0.q.weight": ONES}, r"1 tensors differ, first encoder\.down\.0\.attn"),
        (state | {"quant_conv.bias": torch.zeros(5)}, r"quant_conv\.bias with shape \(5,\), expected \(4,\)"),
        (state | {"encoder.conv_in.weight": torch.zeros(64, 3, 3, 3)}, r"expected multiples of 128"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(path)
    cut(path)
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_image_tokenizer(path)


def test_a_checksum_that_differs_is_refused(tmp_path: Path) -> None:
    for name, kind in (("a.json", "md5"), ("b.ckpt", "sha256")):
        (tmp_path / name).write_text(name)
        digest = hashlib.new(kind, name.encode()).hexdigest()
        with (tmp_path / "checklist.chk").open("a") as file:
            file.write(f"{digest}  {name}\n")
    with (tmp_path / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  not_downloaded.bin\n")
    verify_checksums(tmp_path)
    (tmp_path / "b.ckpt").write_text("B")
    with pytest.raises(ValueError, match=r"b\.ckpt has checksum .* says .*: download it again"):
        verify_checksums(tmp_path)


def test_too_little_memory_is_said_with_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path / "theirs")
    write_tokenizer(tmp_path / "tokenizer")
    convert(
        tmp_path / "theirs",
        tmp_path / "ours",
        "chameleon",
        TEMPLATE,
        "",
        tmp_path / "tokenizer",
    )
    free = loading.available_memory("cpu")
    assert free is None or free > 10_000_000
    monkeypatch.setattr(loading, "available_memory", lambda _: 12_000_000)
    message = r"needs 0\.01 GB on cpu \(4,212,000 parameters in bfloat16 and one tensor\), 0\.01 GB are free"
    with pytest.raises(ValueError, match=message):
        worldvla.load(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"in float32.*use a device with more, or fewer bits"):
        worldvla.load(tmp_path / "ours", dtype=torch.float32)
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_convert_needs_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_release(tmp_path / "theirs", image=True)
    write_tokenizer(tmp_path / "tokenizer")

    def fails(*words: str) -> str:
        assert main(["convert", *words, "--out", str(tmp_path / "ours")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert not (tmp_path / "ours").exists()
        return err

    theirs, tokenizer = str(tmp_path / "theirs"), ("--tokenizer", str(tmp_path / "tokenizer"))
    assert "choose one of chameleon, worldvla_256" in fails(theirs)
    assert "got --suite ''" in fails(theirs, "--release", "worldvla_256")
    assert "text_tokenizer.json or tokenizer.json" in fails(theirs, "--release", "chameleon")
    assert "no folder" in fails(str(tmp_path / "nothing"), "--release", "chameleon")
    save_file(image_state() | {"quant_conv.bias": torch.ones(4)}, tmp_path / "tokenizer/vqgan.safetensors")
    (tmp_path / "tokenizer/vqgan.ckpt").unlink()
    assert "is not the image tokenizer of the checkpoint (quant_conv.bias" in fails(
        theirs, "--release", "chameleon", *tokenizer
    )
    (tmp_path / "tokenizer/vqgan.safetensors").unlink()
    write_release(tmp_path / "bare")
    assert "has no vqgan.ckpt" in fails(str(tmp_path / "bare"), "--release", "chameleon", *tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no published\.json.*--like"):
        convert_back(Path("worldvla/assets/tabletop"), tmp_path / "back")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").touch()
    write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="holds something else"):
        convert(theirs, tmp_path / "full", "chameleon", TEMPLATE, "", tmp_path / "tokenizer")
    assert (tmp_path / "full/precious").exists()


def test_a_released_folder_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    write_release(tmp_path / "theirs")
    with pytest.raises(
        ValueError, match=r"released checkpoint, not one of ours: `worldvla convert .*--release"
    ):
        worldvla.load(tmp_path / "theirs")


def test_names_that_are_nowhere_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str) -> list[str]:
        raise ConnectionError(f"401 Client Error: {repo}\nRepository Not Found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(OSError, match=r"Org/Name was read as a name on the hub, .*: 401.*auth login"):
        locate("Org/Name")
    (tmp_path / "made").mkdir()
    paths = ("out/mistyped", "./a/b", "/a/b", "name", "made/b", "Org/Name/model_256", "../b")
    for path in (*paths, "worldvla/assets/tabletop"):
        with pytest.raises(FileNotFoundError, match=rf"no folder {path} \(read as a path from .*tabletop\)"):
            worldvla.load(path)
    for name in ("hf://out/train", Path("hf://out/train")):
        with pytest.raises(OSError, match="out/train was read as a name on the hub"):
            locate(name)


def test_shipped_models_have_names_in_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libero").mkdir()
    monkeypatch.chdir(tmp_path)
    assert worldvla.load("tabletop").model.config.layout.chunk == 5
    assert locate("libero").parent.name == "assets"
    assert locate("./libero") == Path("libero")


def test_a_download_that_is_there_serves_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(repo: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if repo != "Org/Name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not here")
        return str(tmp_path)

    def refuse(_: str) -> list[str]:
        raise ConnectionError("no network")

    (tmp_path / "model_256").mkdir()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.warns(
        UserWarning, match=r"does not give Org/Name now \(no network\): its earlier download .* is used"
    ):
        assert locate("hf://Org/Name/model_256") == tmp_path / "model_256"
    for absent in ("hf://Org/Name/model_512", "Org/Other"):
        with pytest.raises(OSError, match="no network; check the name"):
            locate(absent)
