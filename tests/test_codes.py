"""Image codes by their levels: the tokenizer's digits, a proper distribution, greedy takes its steps.

python -m pytest tests/test_codes.py
"""

import itertools

import torch

from worldvla.model.codes import CodeHead, Levels
from worldvla.tokenizers.image import FiniteScalarQuantizer

LEVELS = (4, 3, 2)


def head(width: int = 8) -> CodeHead:
    made = CodeHead(LEVELS, width)
    generator = torch.Generator().manual_seed(0)
    made.init_weights(generator)
    for parameter in (made.out, made.mix, made.bias):
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def test_levels_are_the_digits_of_the_quantizer():
    codes = torch.arange(24)
    levels = Levels(LEVELS)
    assert torch.equal(levels.join(levels.split(codes)), codes)
    vectors = FiniteScalarQuantizer(LEVELS).vectors(codes)
    assert torch.equal(levels.split(codes) / torch.tensor([2, 1, 1]) - 1.0, vectors)


def test_probabilities_of_all_codes_sum_to_one():
    x_PD = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    nats = torch.stack([head().cross_entropy(x_PD, torch.full((5,), code)) for code in range(24)])
    torch.testing.assert_close((-nats).exp().sum(0), torch.ones(5))


def test_without_noise_each_level_is_the_median_given_those_before():
    x_PD = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    made, levels = head(), Levels(LEVELS)
    codes_P, lead_P = made.choose(x_PD)
    p_PEL = made.scores(x_PD, codes_P).softmax(-1)
    level_PE1 = levels.split(codes_P)[..., None]
    up_to = p_PEL.cumsum(-1).gather(-1, level_PE1)
    before = up_to - p_PEL.gather(-1, level_PE1)
    assert torch.all(before < 0.5)
    assert torch.all(up_to >= 0.5)
    torch.testing.assert_close(lead_P, torch.minimum(0.5 - before, up_to - 0.5).amin((1, 2)))


def test_draws_follow_the_distribution():
    x_1D = torch.randn(1, 8, generator=torch.Generator().manual_seed(3))
    made, number = head(), 40_000
    noise = -torch.empty(number, 3, 4).exponential_(generator=torch.Generator().manual_seed(4)).log()
    drawn, _ = made.choose(x_1D.expand(number, -1), 1.0, noise)
    share = torch.bincount(drawn, minlength=24) / number
    p = torch.stack([(-made.cross_entropy(x_1D, torch.tensor([c]))).exp()[0] for c in range(24)]).detach()
    assert (share - p).abs().max() < 0.01
    assert len(list(itertools.product(*map(range, LEVELS)))) == 24
