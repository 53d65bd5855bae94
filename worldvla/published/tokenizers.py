"""Published tokenizers -> ours: the VQGAN of `vqgan.ckpt` or `model.vqmodel.*` keys; a text file's id table.

Shapes decide the VQGAN's settings; names in the text tokenizer say which id stands for which image code, and
are compared with the vocabulary. Sources: WorldVLA model/chameleon_vae_ori/{vqgan.py, vqgan.yaml,
vocab.py:73-107}.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from worldvla.config import ImageTokenizerConfig
from worldvla.files import load_tensors
from worldvla.tokenizers.image import ImageTokenizer
from worldvla.tokenizers.text import TextTokenizer
from worldvla.vocab import Vocab

PREFIXES = ("model.vqmodel.", "vqmodel.")
IMAGE_FILES = ("vqgan.ckpt", "vqgan.safetensors", "model.safetensors")
TEXT_FILES = ("text_tokenizer.json", "tokenizer.json")
CHECKLIST = "checklist.chk"
MD5 = {
    "text_tokenizer.json": "170a932b687671a4e676f3bf69147295",
    "vqgan.yaml": "25724c8110d6adabc9130a123b4b922e",
    "vqgan.ckpt": "1a559fb5dab4d351d19496ae89da1db1",
}
"""Of the tokenizer that WorldVLA and RynnVLA-002 publish: WorldVLA chameleon/tokenizer/checklist.chk."""
NUM_GROUPS = 32
RESERVED_OFFSET = 4
"""`<reservedN>` has id N + 4."""


def find(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


def verify_checksums(directory: Path) -> None:
    """Compare the files that `checklist.chk` names (md5 or sha256, `HEX NAME` a line)."""
    path = directory / CHECKLIST
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        match = re.fullmatch(r"([0-9a-f]{32}|[0-9a-f]{64}) [ *]?(\S.*)", line.strip())
        if match is None or not (file := directory / match[2]).is_file():
            continue
        with file.open("rb") as opened:
            got = hashlib.file_digest(opened, "md5" if len(match[1]) == 32 else "sha256").hexdigest()
        if got != match[1]:
            raise ValueError(f"{file} has checksum {got}, {path} says {match[1]}: download it again")


def unlike_published(directory: Path) -> list[str]:
    """Return a line on each tokenizer file that is not the published one: repacked, or another vocabulary."""
    lines = []
    for file in (directory / name for name in MD5 if (directory / name).is_file()):
        with file.open("rb") as opened:
            got = hashlib.file_digest(opened, "md5").hexdigest()
        if got != MD5[file.name]:
            lines.append(
                f"{file} has md5 {got}, the published one {MD5[file.name]}: not that file, bit by bit"
            )
    return lines


def load_image_tokenizer(path: Path) -> ImageTokenizer:
    """Read a VQGAN's file: a state dict of torch (`weights_only`) under `state_dict`, or safetensors."""
    if path.suffix == ".safetensors":
        return image_tokenizer(load_tensors(path), str(path))
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or holds Python objects beside tensors, which are not unpickled "
            f"({str(error).splitlines()[0]}): take the published file, or its tensors as vqgan.safetensors"
        ) from None
    state = data.get("state_dict", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors, got {type(data).__name__}: take vqgan.ckpt")
    return image_tokenizer(state, str(path))


def image_tokenizer(state: Mapping[str, Tensor], where: str) -> ImageTokenizer:
    """Return the tokenizer of a VQGAN's weights, in float32; without a decoder where they have none.

    Keys of its training loss (`loss.*`) are left out; any other key too many or too few raises ValueError.
    """
    for prefix in PREFIXES:
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith("loss.")}
    return ImageTokenizer.of(_shape(state, where), state, where, "take the published vqgan.ckpt")


def _shape(state: Mapping[str, Tensor], where: str) -> ImageTokenizerConfig:
    """Return the settings that the shapes tell (vqgan.yaml has the same numbers)."""
    levels = 1 + max((int(k.split(".")[2]) for k in state if k.startswith("encoder.down.")), default=-1)
    blocks = {k.split(".")[4] for k in state if k.startswith("encoder.down.0.block.")}
    keys = ["encoder.conv_in.weight", "quantize.embedding.weight", "quant_conv.weight"]
    keys += [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    if missing := [k for k in keys if k not in state]:
        raise ValueError(f"{where} lacks {missing[0]}: expected the state dict of a VQGAN, as in vqgan.ckpt")
    conv, book, quant, *widths = (tuple(state[k].shape) for k in keys)
    if any(w[0] % (4 * NUM_GROUPS) for w in [conv, *widths]):
        raise ValueError(
            f"{where}: widths {[w[0] for w in widths]}, expected multiples of {4 * NUM_GROUPS} (32 groups)"
        )
    return ImageTokenizerConfig(
        channels=conv[0],
        channel_mult=tuple(w[0] // conv[0] for w in widths),
        num_res_blocks=len(blocks),
        z_channels=quant[1],
        embed_dim=book[1],
        num_codes=book[0],
    )


def check_text(text: TextTokenizer, vocab: Vocab, where: str) -> None:
    """Assert that the file's names stand for the ids of `vocab`: specials, and `IMGIMG...Z` for every code.

    Letters A..J of such a name are the digits of its code.
    """
    table = text.table()
    expected = {"<s>": vocab.bos, "<pad>": vocab.pad, "</s>": vocab.eos, "<eoss>": vocab.eoi}
    expected["<racm3:break>"] = vocab.boi
    numbers = [vocab.sep, vocab.newline, vocab.grid_start, vocab.boa, vocab.eoa, vocab.bostate, vocab.eostate]
    expected |= {f"<reserved{n - RESERVED_OFFSET:05d}>": n for n in numbers if n is not None}
    for code, id_ in enumerate(vocab.image):
        expected["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"] = id_
    images = {name for name in table if re.fullmatch(r"IMGIMG[A-J]+Z", name)}
    wrong = [name for name, id_ in expected.items() if table.get(name) != id_]
    if wrong := wrong or sorted(images - set(expected)):
        raise ValueError(
            f"{where}: {wrong[0]} has id {table.get(wrong[0])}, vocabulary {vocab.name} says "
            f"{expected.get(wrong[0])} ({len(wrong)} such names): another vocabulary; take the "
            "text_tokenizer.json of the checkpoint"
        )
