"""Observation -> the next U actions in physical units.

An observation is `{"<view>": uint8 (Y, X, 3), ..., "state": float32 (8,), "instruction": str}` as in
sim/protocol.py, and for models with a history `"previous"`: image dicts of the steps before, oldest first
(fewer at an episode's start; more are ignored). Of a model of several datasets it names one, `"unnorm_key"`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldvla.batch import Sample
from worldvla.infer.decode import Seeds, chunk_path, decode_chunk, regress_chunk
from worldvla.infer.model import Model
from worldvla.tokenizers.action import choose, denormalize, dequantize

Observation = Mapping[str, Any]
HEADS = ("discrete", "continuous")


@dataclass(frozen=True)
class Decision:
    """Actions (U, 7) float32 and how sure the model is of each dim; with B in front for a list."""

    actions: np.ndarray
    entropy: np.ndarray
    """Nats, of each dim given those before it; an action's is the sum over its dims."""
    margin: np.ndarray
    """Probability of the likeliest bin minus that of the second. Small among neighbouring bins too.

    Both are NaN of the continuous head, which knows no probabilities.
    """


class Policy:
    """Holds no state between calls: the same observation gives the same actions. `head`: one of HEADS."""

    def __init__(self, model: Model, head: str = "discrete") -> None:
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if head == "continuous" and model.transformer.action_head is None:
            raise ValueError(
                f"{model.path} has no continuous action head: use head 'discrete', or train one "
                "(model.head.num_layers above 0)"
            )
        self.model, self.head = model, head
        self._tail = model.builder.policy_tail()
        self._blocks_UA = model.builder.action_block_positions(0)

    @property
    def decoding(self) -> str:
        """`parallel`, or `sequential: ` and why the mask asks for it; `at once`: the continuous head."""
        return "at once" if self.head == "continuous" else chunk_path(self._tail, self._blocks_UA)

    def act(
        self, observation: Observation | Sequence[Observation], temperature: float = 0.0, seed: Seeds = 0
    ) -> np.ndarray:
        """Return actions (U, 7) float32 of one observation, (B, U, 7) of a list of them.

        The likeliest ones; with a `temperature` they are drawn, by one seed for all or by one an observation:
        each draws what it would draw alone with its seed.
        """
        return self.decide(observation, temperature, seed).actions

    def decide(
        self, observation: Observation | Sequence[Observation], temperature: float = 0.0, seed: Seeds = 0
    ) -> Decision:
        """Return what `act` does, with the model's confidence, which costs nothing."""
        layout = self.model.config.layout
        if isinstance(observation, Mapping):
            one = self.decide([observation], temperature, seed)
            return Decision(one.actions[0], one.entropy[0], one.margin[0])
        if not observation:
            nothing = np.zeros((0, layout.chunk, layout.num_action_dims), dtype=np.float32)
            return Decision(nothing, nothing, nothing)
        if self.head == "continuous":
            if temperature != 0:
                raise ValueError(
                    f"the continuous head draws nothing: temperature must be 0, got {temperature}"
                )
            values = regress_chunk(self.model.transformer, self.model.vocab, self.prompts(observation))
            unknown = np.full(np.shape(values), np.nan, dtype=np.float32)
            return Decision(self._physical(values, observation), unknown, unknown)
        chunk = decode_chunk(
            self.model.runner,
            self.model.vocab,
            self.prompts(observation),
            self._tail,
            self._blocks_UA,
            temperature,
            seed,
        )
        actions = self._physical(dequantize(chunk.codes_BUA), observation)
        return Decision(actions, chunk.entropy_BUA, chunk.margin_BUA)

    def _physical(self, values_BUA: np.ndarray, observations: Sequence[Observation]) -> np.ndarray:
        """Return normalised actions in physical units, float32, by the statistics that each observation asks
        for."""
        rows = []
        for values_UA, observation in zip(values_BUA, observations, strict=True):
            own = choose(self.model.builder.all_statistics, unnorm_key(observation))
            low, high = (np.asarray(v, dtype=np.float32) for v in (own.action_low, own.action_high))
            actions = denormalize(values_UA, own.action_low, own.action_high).astype(np.float32)
            rows.append(np.clip(actions, low, high))
        return np.stack(rows)

    def prompts(self, observations: Sequence[Observation]) -> list[Sample]:
        """Return the sequences that the model reads; bad input raises ValueError."""
        layout, data = self.model.config.layout, self.model.config.data
        frames = [[*_previous(o, layout.history), o] for o in observations]
        flat = [frame for sequence in frames for frame in sequence]
        codes = iter(self.model.encode_frames(flat))
        prompts = []
        for observation, sequence in zip(observations, frames, strict=True):
            instruction = observation.get("instruction")
            if not isinstance(instruction, str) or not instruction:
                raise ValueError(
                    f"an observation needs an instruction, a text that is not empty, got {instruction!r}"
                )
            state = self._state(observation) if layout.state else None
            key = unnorm_key(observation)
            shown = [self.model.builder.split_views(next(codes)) for _ in sequence]
            prompt = self.model.builder.policy_prompt(instruction, state, shown, key)
            if (length := len(prompt) + len(self._tail)) > data.sequence_length:
                raise ValueError(
                    f"the instruction {instruction[:40]!r} makes a sequence of {length} tokens, the model "
                    f"was trained on {data.sequence_length} at most (data.sequence_length): shorten it"
                )
            prompts.append(prompt)
        return prompts

    def _state(self, observation: Observation) -> np.ndarray:
        num_dims = self.model.config.layout.num_state_dims
        if "state" not in observation:
            raise ValueError(
                f"an observation needs a state ({num_dims},), got the keys {sorted(observation)}"
            )
        state = np.asarray(observation["state"])
        if state.shape != (num_dims,) or state.dtype.kind != "f":
            raise ValueError(
                f"state must be float ({num_dims},), got {state.dtype} {state.shape}: see docs/CONVENTIONS.md"
            )
        return state


def unnorm_key(observation: Observation) -> str:
    """Return the name of the dataset whose statistics an observation asks for; empty: the only one."""
    key = observation.get("unnorm_key", "")
    if not isinstance(key, str):
        raise ValueError(f"unnorm_key must be the name of a dataset, got {key!r:.60}")
    return key


def _previous(observation: Observation, history: int) -> list[Mapping[str, Any]]:
    previous = list(observation.get("previous", ()))
    return previous[max(0, len(previous) - (history - 1)) :]
