"""A policy that answers for the moment at which its answer comes.

A robot that does not wait goes on with the actions that it has. It sends them with its observation as
`committed` (D, A), in physical units; the world model imagines them, and the policy acts on what is expected
then. Each observation is imagined alone, so that an answer does not depend on the batch that it is in.
"""

from collections.abc import Mapping
from typing import Any

from worldvla.infer.model import Model
from worldvla.infer.world import World


def can_look_ahead(model: Model) -> bool:
    """Return whether the model's world model reads actions, in ranges that no request has to choose, and says
    all that its policy reads."""
    layout = model.config.layout
    reads = layout.action_conditioning and len(model.unnorm_keys) < 2
    says = layout.history == 1 and (layout.world_state or not layout.state)
    return bool(model.config.data.world_fraction and reads and says)


def look_ahead(model: Model, observation: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the observation that is expected after its `committed` actions, itself without any."""
    committed = observation.get("committed", ())
    if not len(committed):
        return observation
    world = World(model)
    world.reset(observation)
    for action in committed:
        world.advance(action)
    expected = {**observation, **world.frame(), "committed": ()}
    return expected if world.state is None else expected | {"state": world.state}
