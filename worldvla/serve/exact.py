"""Answers of a batch that are those of each request alone, though sums of a batch round otherwise.

A different batch size picks other matrix kernels, which add in another order: a last bit differs, and where
two codes are nearly tied, another one wins. Such ties are rare and can be seen, so what is decided by less
than the rounding is computed again alone. This holds in float32 and for discrete actions; a continuous head's
actions are those of the request alone up to rounding, and so are bfloat16's, of which nothing is repeated.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from worldvla.data.sample import SampleBuilder
from worldvla.infer.ahead import look_ahead
from worldvla.infer.model import Model
from worldvla.infer.policy import Observation, Policy, unnorm_key
from worldvla.tokenizers.action import choose
from worldvla.tokenizers.image import FiniteScalarQuantizer, ImageTokenizer, to_pixels
from worldvla.tokenizers.text import TextTokenizer

TOLERANCE = 1e-5
"""Of latents, relative to the largest, and of a probability: batches of `tabletop` differ by at most 3e-6."""


class CarefulTokenizer:
    """An image tokenizer whose codes of a picture do not depend on the pictures beside it."""

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer, self.config = tokenizer, tokenizer.config

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return codes (B, R, Q) of uint8 (B, Y, X, 3)."""
        if len(images) == 1:
            return self.tokenizer.encode(images)
        z_BERQ = self.tokenizer.latents(to_pixels(images))
        z_NE = rearrange(z_BERQ, "b e r q -> (b r q) e")
        codes = self.tokenizer.quantize.codes(z_NE).view(len(images), *z_BERQ.shape[2:])
        is_close_B = self._is_close(z_NE).view(len(images), -1).any(1)
        for i in is_close_B.nonzero()[:, 0].tolist():
            codes[i] = self.tokenizer.encode(images[i : i + 1])[0]
        return codes

    def _is_close(self, z_NE: Tensor) -> Tensor:
        """Return where a change of every latent by the tolerance could pick another code, bool (N,)."""
        quantize, step = self.tokenizer.quantize, TOLERANCE * z_NE.abs().amax()
        if isinstance(quantize, FiniteScalarQuantizer):  # each dim is rounded by itself
            return quantize.codes(z_NE + step) != quantize.codes(z_NE - step)
        book = quantize.embedding.weight.float()
        distances = torch.addmm(book.square().sum(1), z_NE.float(), book.T, alpha=-2.0)
        best_N2 = distances.topk(2, largest=False).values
        widest = 2 * (book - book.mean(0)).abs().sum(1).amax()  # two codes are no further apart (L1)
        return best_N2[:, 1] - best_N2[:, 0] <= 2 * step * widest + TOLERANCE * best_N2[:, 0].abs()


class BatchedPolicy:
    """A model's policy for `ServedPolicy`: `act` answers a batch, `check` a request before it joins one."""

    def __init__(self, model: Model, head: str) -> None:
        self.model, self.alone = model, Policy(model, head)
        self.is_exact = head == "discrete" and model.transformer.head.weight.dtype == torch.float32
        careful: Any = CarefulTokenizer(model.image)
        careful_model = dataclasses.replace(model, image=careful)
        self.together = Policy(careful_model, head) if self.is_exact else self.alone
        builder = model.builder  # one of its own, for `check` runs in another thread
        self._builder = SampleBuilder(builder.layout, builder.vocab, builder.text, builder.all_statistics)

    @property
    def max_prompt(self) -> int:
        """Letters of a prompt that could fit: the longest token as often as there is room."""
        table = TextTokenizer.load(self.model.path / "text.json").table()
        return max(map(len, table)) * self.model.config.data.sequence_length

    def check(self, observation: Observation) -> None:
        """Raise ValueError for a prompt that the model cannot read, too long or of letters unknown to it, and
        for a dataset that it does not know."""
        choose(self._builder.all_statistics, unnorm_key(observation))
        num_frames = 1 + min(len(observation.get("previous", ())), self.model.config.layout.history - 1)
        length = len(self._builder.policy_template(observation["instruction"], num_frames))
        if length > (longest := self.model.config.data.sequence_length):
            raise ValueError(
                f"the prompt makes a sequence of {length} tokens, at most {longest} are read: shorten it"
            )

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """Return actions (B, U, 7) float32."""
        observations, count = [look_ahead(self.model, o) for o in observations], len(observations)
        if count == 1:
            return self.alone.act(observations)
        if self.model.device.type == "cuda":  # few sizes: a graph is recorded for each
            observations = [*observations, *[observations[-1]] * ((1 << (count - 1).bit_length()) - count)]
        decision = self.together.decide(observations)
        if self.is_exact:
            is_close = decision.margin[:count].reshape(count, -1).min(1) < TOLERANCE
            for i in np.flatnonzero(is_close).tolist():
                decision.actions[i] = self.alone.act(observations[i])
        return decision.actions[:count]
