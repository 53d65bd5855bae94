"""Who attends to whom: a golden picture, the published definition, and influence in the model.

pytest tests/test_mask.py
"""

import re
from pathlib import Path

import pytest
import torch
from tiny_run import MODEL
from torch import Tensor

from worldvla.model.mask import additive_mask, dense_mask, visible
from worldvla.model.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden" / "mask.txt"
POLICY = "bttiiis" + "111" + "222" + "333" + "s"
"""bos, text, image codes, separator, three actions of a chunk (digits: the chunk index), separator."""
WORLD = "bttiii" + "aaa" + "siiis"


def chunk_of(picture: str) -> Tensor:
    return torch.tensor([[int(c) if c.isdigit() else 0 for c in picture]])


def draw() -> str:
    """Return rows of queries over columns of keys for both samples, # = may attend."""
    blocks = []
    for name, picture in (("policy", POLICY), ("world", WORLD)):
        mask_TS = dense_mask(chunk_of(picture))[0, 0].tolist()
        rows = [
            query + " " + "".join("#" if m else "." for m in row)
            for query, row in zip(picture, mask_TS, strict=True)
        ]
        blocks.append("\n".join([name, "  " + picture, *rows]) + "\n")
    return "\n".join(blocks)


def test_the_picture_of_docs_decoding_is_the_mask() -> None:
    """Rows of its first block look at the columns under which they have a #."""
    header, *rows = (
        (Path(__file__).parents[1] / "docs/DECODING.md").read_text().split("```")[1].splitlines()[1:]
    )
    columns = [(m[0], m.start(), m.end()) for m in re.finditer(r"\S+", header)]
    chunk = {name: 0 if name == "prompt" else int(name[1]) for name, _, _ in columns}
    names, seen = list(chunk), 0
    for row in rows:
        query = row[:12].partition("->")[0].strip()
        if query:
            found = {name for name, start, stop in columns if "#" in row[max(12, start) : stop]}
            at = names.index(query)
            assert found == {n for i, n in enumerate(names) if visible(at, i, chunk[query], chunk[n])}, row
            seen += 1
    assert seen == 7


def published(picture: str) -> Tensor:
    """Return the mask as the published code builds it: walk over the action blocks after the last image."""
    length = len(picture)
    mask_TS = torch.ones(length, length, dtype=torch.bool).tril()
    last_image = max(i for i, c in enumerate(picture) if c == "i")
    blocks = [[i for i, c in enumerate(picture) if c == name] for name in "a123" if name in picture]
    after = [block for block in blocks if block[0] > last_image]
    for index, block in enumerate(after):
        for earlier in after[:index]:
            mask_TS[block[0] : block[-1] + 1, earlier[0] : earlier[-1] + 1] = False
    return mask_TS


def test_picture_is_golden() -> None:
    """Regenerate with `make golden`."""
    assert draw() == GOLDEN.read_text()


@pytest.mark.parametrize("picture", [POLICY, WORLD, "biis11s", "bis" + "1" * 9 + "2" * 9])
def test_equals_the_published_definition(picture: str) -> None:
    assert torch.equal(dense_mask(chunk_of(picture))[0, 0], published(picture))


def test_predicate_on_plain_integers() -> None:
    assert visible(5, 5, 2, 2)
    assert visible(5, 1, 2, 0)
    assert visible(9, 5, 0, 2)  # the closing separator sees every action
    assert not visible(5, 4, 2, 1)
    assert not visible(4, 5, 0, 0)
    assert visible(4, 5, -1, -1)  # a frame that is predicted at once sees all of itself
    assert not visible(4, 5, -1, -2)
    assert not visible(4, 5, 0, -1)
    assert visible(5, 4, -2, -1)
    assert visible(5, 4, 0, -1)


def test_decoding_rows_equal_rows_of_the_whole_mask() -> None:
    chunk_BT = chunk_of(POLICY)
    whole = dense_mask(chunk_BT)
    queries = torch.tensor([[8, 11, 14]])  # the second token of each action, in parallel
    rows = dense_mask(chunk_BT[:, queries[0]], chunk_BT, queries)
    assert torch.equal(rows, whole[:, :, queries[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_keys_weigh_exactly_nothing(dtype: torch.dtype) -> None:
    mask = additive_mask(dense_mask(chunk_of(POLICY)), dtype)
    weights = (torch.randn(mask.shape, dtype=dtype) * 50 + mask).softmax(-1)
    assert torch.equal(weights == 0, weights.masked_fill(mask < 0, 0) == 0)
    assert not weights.isnan().any()


@pytest.mark.parametrize("picture", [POLICY, WORLD])
def test_influence_in_the_model_is_the_mask(picture: str) -> None:
    """Changing token j moves the output at i exactly where j reaches i along the mask, layer by layer."""
    length = len(picture)
    model = Transformer(MODEL, vocab_size=40, num_rows=1, num_cols=1).double()
    model.init_weights(0)
    mask = dense_mask(chunk_of(picture))
    places = torch.zeros(1, length, dtype=torch.int64)
    ids_BT = torch.randint(0, 40, (1, length))
    before = model(ids_BT, mask, places, places)[0]
    reach = torch.linalg.matrix_power(mask[0, 0].double(), MODEL.num_layers) > 0
    for j in range(length):
        changed = ids_BT.clone()
        changed[0, j] = (changed[0, j] + 1) % 40
        moved = (model(changed, mask, places, places)[0] - before).abs().amax(-1) > 1e-12
        assert torch.equal(moved, reach[:, j]), j
