"""Checkpoint -> the error of the k-th action of its chunks on held-out episodes: does it grow with k, and is
it the model's own earlier choices that make it grow?
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from worldvla.batch import Batch, Sample
from worldvla.data.loader import Loader
from worldvla.data.store import TokenStore
from worldvla.files import write_json
from worldvla.infer.decode import bin_scores, decode_chunk
from worldvla.infer.model import Model, load
from worldvla.machine import provenance
from worldvla.model.mask import additive_mask, dense_mask

BATCH = 64


def chunk_error(path: Path, stores: Sequence[Path] = (), batches: int = 8) -> dict[str, Any]:
    """Return lists over k = 1..K of the mean |error| of x, y, z in units of an action: `forced` (teacher
    forcing: the true tokens before each), `free` (as decoded), `still` (predicting no motion).

    `stores`: default those of the config; the episodes that it holds out are used. Under the selective mask
    an action sees no other of its chunk: forced and free then differ only by the dims before, within it.
    """
    model = load(path)
    config = model.config
    opened = [TokenStore.open(Path(s), model.image.digest()) for s in stores or config.data.stores]
    loader = Loader(opened, model.builder, config.data, BATCH, config.train.seed)
    num = min(batches, -(-loader.num_val("policy") // BATCH))
    if not num:
        raise ValueError(f"the stores of {path} hold out no chunk: raise data.val_fraction or give --stores")
    codes: dict[str, list[np.ndarray]] = {"truth": [], "forced": [], "free": []}
    for i in range(num):
        batch = loader.val_batch(i, "policy")
        for name, values in zip(codes, chunk_codes(model, batch), strict=True):
            codes[name].append(values)
    decode = model.builder.statistics.decode_actions
    truth, forced, free = (decode(np.concatenate(c))[..., :3] for c in codes.values())
    errors = {"forced": forced - truth, "free": free - truth, "still": truth}
    return {
        "name": config.name,
        "step": model.manifest.get("step"),
        "chunks": len(truth),
        "selective_mask": config.layout.selective_mask,
        **{name: [round(float(x), 4) for x in np.abs(e).mean((0, 2))] for name, e in errors.items()},
    }


@torch.inference_mode()
def chunk_codes(model: Model, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the codes (B, K, A) of policy samples: the true ones, the greedy ones given the true ones
    before, the decoded ones.
    """
    builder, vocab = model.builder, model.vocab
    lengths_B = (batch.kind_BT > 0).int().argmax(1)  # the first target ends the prompt
    blocks_UA = builder.action_block_positions(0)[:, 1:-1]
    where_BUA = lengths_B[:, None, None] + torch.from_numpy(blocks_UA)
    rows_B11 = torch.arange(len(lengths_B))[:, None, None]
    truth_BUA = batch.ids_BT[rows_B11, where_BUA] - vocab.action.start
    mask = additive_mask(dense_mask(batch.chunk_BT), torch.float32)
    x_BTD: Tensor = model.transformer(batch.ids_BT, mask, batch.row_BT, batch.col_BT)
    logits = model.transformer.logits(x_BTD[rows_B11, where_BUA - 1], vocab.action)
    names = {"ids": batch.ids_BT, "chunk": batch.chunk_BT, "kind": batch.kind_BT}
    names |= {"row": batch.row_BT, "col": batch.col_BT}
    prompts = [
        Sample(**{name: tensor[b, :length].numpy() for name, tensor in names.items()})
        for b, length in enumerate(lengths_B.tolist())
    ]
    tail, blocks = builder.policy_tail(), builder.action_block_positions(0)
    free = decode_chunk(model.runner, vocab, prompts, tail, blocks).codes_BUA
    return truth_BUA.numpy(), bin_scores(logits).argmax(-1).numpy(), free


def main(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]], out: Path, stores: tuple[Path, ...] = ()
) -> None:
    """Write the errors of every checkpoint to the JSON record `out`; `stores`: instead of its own."""
    rows = [chunk_error(path, stores) for path in checkpoints]
    for row in rows:
        print(f"{row['name']}: forced {row['forced']}, free {row['free']}, no motion {row['still']}")
    write_json(out, {"chunks": rows, **provenance()})


if __name__ == "__main__":
    tyro.cli(main)
