"""The id tables: published ids are where the reference says, ranges do not overlap, codes round-trip.

pytest tests/test_vocab.py
"""

from dataclasses import replace

import numpy as np
import pytest

from worldvla.vocab import NUM_BIN_CODES, Vocab, chameleon, compact, to_codes, to_ids

SPECIALS = ("bos", "pad", "eos", "sep", "boi", "eoi", "boa", "eoa", "bostate", "eostate")
TABLES = [chameleon(), compact(1024, 512), compact(1, 1)]


def test_published_ids_are_golden():
    vocab = chameleon()
    assert (vocab.size, vocab.bos, vocab.pad, vocab.eos) == (65536, 0, 1, 2)
    assert (vocab.boi, vocab.eoi, vocab.sep, vocab.newline) == (8197, 8196, 8710, 8803)
    assert (vocab.boa, vocab.eoa, vocab.bostate, vocab.eostate) == (10004, 15004, 15504, 16004)
    assert (vocab.image, vocab.action, vocab.state) == (
        range(4, 8196),
        range(10006, 10262),
        range(15506, 15762),
    )
    assert vocab.grid_start is not None
    assert (vocab.grid_start + 8, vocab.grid_start + 16) == (8812, 8820)  # 256 and 512 pixels


@pytest.mark.parametrize("vocab", TABLES, ids=lambda v: f"{v.name}{v.size}")
def test_no_id_means_two_things(vocab: Vocab):
    spans = [vocab.image, vocab.action, vocab.state]
    taken = [getattr(vocab, name) for name in SPECIALS] + [i for span in spans for i in span]
    if vocab.newline is not None and vocab.grid_start is not None:
        taken += [vocab.newline, *range(vocab.grid_start, vocab.grid_start + 33)]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(range(vocab.size))


@pytest.mark.parametrize("vocab", TABLES[1:], ids=lambda v: f"{v.size}")
def test_compact_table_has_no_gaps(vocab: Vocab):
    spans = [vocab.text, vocab.image, vocab.action, vocab.state]
    every = [getattr(vocab, name) for name in SPECIALS] + [i for span in spans for i in span]
    assert sorted(every) == list(range(vocab.size))


@pytest.mark.parametrize("vocab", TABLES, ids=lambda v: f"{v.name}{v.size}")
def test_codes_round_trip_over_all_ids(vocab: Vocab):
    for span in (vocab.image, vocab.action, vocab.state, vocab.text):
        codes = np.arange(len(span))
        ids = to_ids(codes, span)
        assert ids.tolist() == list(span)
        assert (to_codes(ids, span) == codes).all()


def test_out_of_range_raises():
    vocab = compact(16, 8)
    for bad in (-1, NUM_BIN_CODES):
        with pytest.raises(ValueError, match="codes must be in"):
            to_ids(np.array([0, bad]), vocab.action)
    for bad in (vocab.action.start - 1, vocab.action.stop):
        with pytest.raises(ValueError, match="ids must be in"):
            to_codes(np.array([bad]), vocab.action)
    assert to_ids(np.zeros((0, 3), dtype=np.int64), vocab.action).shape == (0, 3)


def test_a_table_with_a_collision_is_refused():
    with pytest.raises(ValueError, match="sep"):
        replace(chameleon(), sep=100)
    with pytest.raises(ValueError, match="leave"):
        replace(chameleon(), state_start=65400)


def test_digest_follows_every_number():
    vocab = chameleon()
    assert vocab.digest() == chameleon().digest()
    assert vocab.digest() != replace(vocab, sep=8711).digest()
    assert compact(16, 8).digest() != compact(16, 9).digest()
