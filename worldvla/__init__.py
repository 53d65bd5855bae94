"""WorldVLA: one transformer that acts as a robot policy and imagines as a world model.

model, env = worldvla.load("tabletop"), worldvla.make("tabletop_goal")
observation, _ = env.reset(options={"init": 0})
actions = model.policy().act(observation)
world = model.world(); world.reset(observation); frame = world.step(actions[0])
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch is imported by what is called, not with the package
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import gymnasium as gym
    import torch

    from worldvla.infer.model import Model
    from worldvla.infer.policy import Policy
    from worldvla.infer.world import World
    from worldvla.sim.protocol import Task

__version__ = "0.1.0"


@dataclass(frozen=True)
class WorldVLA:
    """A loaded checkpoint and its two uses; `model` has the weights, the vocabulary and the tokenizers."""

    model: "Model"

    def policy(self, head: Literal["discrete", "continuous"] = "discrete") -> "Policy":
        """Return what acts: by action tokens, or by the continuous head of a model that has one."""
        from worldvla.infer.policy import Policy

        return Policy(self.model, head)

    def world(self, speculative: bool = True, temperature: float = 0.0, seed: int = 0) -> "World":
        """Return what imagines; without `speculative` decoding it takes one model pass a code. `temperature`:
        0 takes the likeliest codes, more draws them."""
        from worldvla.infer.world import World

        return World(self.model, speculative, temperature, seed)

    @property
    def view_sizes(self) -> dict[str, tuple[int, int]]:
        """View -> (rows, columns) in pixels of the images that the model reads."""
        return self.model.view_sizes


def load(
    name: Path | str,
    device: str = "cpu",
    dtype: "torch.dtype | None" = None,
    quantize: Literal["", "int8", "int4"] = "",
    unnorm_key: str = "",
) -> WorldVLA:
    """Return a shipped model (`tabletop`, `libero`, `libero_four`), that of a checkpoint directory, the
    newest of a run, or one on the hub (`ORG/NAME`, `hf://ORG/NAME/FOLDER`).

    `quantize` holds its large matrices in 8 or 4 bits. `unnorm_key`: of a model of several datasets, the one
    whose ranges of actions and states are used.
    """
    from worldvla.infer.model import load as load_model

    return WorldVLA(load_model(name, device, dtype, quantize, unnorm_key))


def make(
    task: "Task | str", index: int = 0, views: dict[str, tuple[int, int]] | None = None
) -> "gym.Env[Any, Any]":
    """Return an environment of a task, or of the task `index` of a suite: `make("tabletop_goal", 3)`.

    Its observations hold the task's instruction, too, as a policy wants them. `views` maps a view to its
    (rows, columns) in pixels: those of a model are `model.view_sizes`. `reset(options={"init": i})` starts
    from the i-th of fifty fixed initial states.
    """
    from worldvla.sim.instructed import make as make_env

    return make_env(task, index, views) if isinstance(task, str) else make_env(task.suite, task, views)


class _OnceImported(MetaPathFinder):
    """Registers the ids when gymnasium is imported later."""

    def find_spec(self, fullname: str, *rest: Any) -> "ModuleSpec | None":
        if fullname != "gymnasium":
            return None
        others = (finder.find_spec(fullname, *rest) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if loader := spec and spec.loader:
            execute = loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                import_module("worldvla.sim.instructed")

            loader.exec_module = exec_module
        return spec


if "gymnasium" in sys.modules:  # its users expect ids; who does not use it does not wait for it
    import_module("worldvla.sim.instructed")
else:
    sys.meta_path.insert(0, _OnceImported())
