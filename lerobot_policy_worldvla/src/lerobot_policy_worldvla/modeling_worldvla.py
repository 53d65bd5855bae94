"""A WorldVLA checkpoint as a policy of LeRobot. Dims: B robots, U actions of a chunk, A numbers of one."""

import shutil
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

import worldvla
from worldvla.image import as_uint8, resize_with_pad
from worldvla.infer.model import FILES, IMAGE_FILES
from worldvla.robot import Deltas

from .configuration_worldvla import TRAIN, WorldVLAConfig

FOLDER = "worldvla"
"""Of the checkpoint, beside LeRobot's config.json: both have a file of that name."""


class WorldVLAPolicy(PreTrainedPolicy):
    """Reads its weights when it is made, from `config.checkpoint`."""

    config_class = WorldVLAConfig
    name = "worldvla"

    def __init__(self, config: WorldVLAConfig, **_: Any) -> None:
        super().__init__(config)
        if not config.checkpoint:
            raise ValueError("no checkpoint: give --policy.checkpoint, or --policy.path of a saved policy")
        options = {"quantize": config.quantize, "unnorm_key": config.unnorm_key}
        loaded = worldvla.load(config.checkpoint, config.device, **options)
        self.model, self.policy = loaded.model, loaded.policy(config.head)
        _ = self.model.builder.statistics  # of one dataset, or an error that says how to choose
        self.transformer, self.image = self.model.transformer, self.model.image
        facts, layout = self.model.manifest.get("features", {}), self.model.config.layout
        for view in () if config.views else layout.views:
            feature = facts.get("cameras", {}).get(view, {}).get("feature", "")  # RLDS has names of its own
            is_known = feature.startswith("observation.")
            config.views[view] = feature if is_known else f"observation.images.{view}"
        if set(config.views) != set(layout.views):
            raise ValueError(f"views {config.views}: the checkpoint reads {', '.join(layout.views)}")
        config.n_action_steps = config.n_action_steps or layout.chunk
        if not 1 <= config.n_action_steps <= layout.chunk:
            raise ValueError(f"n_action_steps {config.n_action_steps}: chunks have {layout.chunk} actions")
        config.input_features = {
            config.views[view]: PolicyFeature(type=FeatureType.VISUAL, shape=(3, *size))
            for view, size in self.model.view_sizes.items()
        }
        if layout.state:
            config.input_features["observation.state"] = PolicyFeature(
                FeatureType.STATE, (layout.num_state_dims,)
            )
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (layout.num_action_dims,))}
        config.action_feature_names = config.action_feature_names or facts.get("action_names") or None
        self.deltas = Deltas.of(facts)
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> "WorldVLAPolicy":
        """Read what `save_pretrained` wrote: a folder, or a repository on the hub."""
        path = Path(pretrained_name_or_path)
        if not path.is_dir():
            options = {"revision": revision, "local_files_only": local_files_only}
            path = Path(snapshot_download(str(pretrained_name_or_path), **options))
        config = config or PreTrainedConfig.from_pretrained(path)
        config.checkpoint = config.checkpoint or str(path / FOLDER)
        return cls(config).eval()

    def _save_pretrained(self, save_directory: Path, state_dict: Any = None) -> None:
        """Write LeRobot's config beside a copy of the checkpoint's files."""
        del state_dict  # the weights are the checkpoint's, as they are
        if "base" in self.model.manifest:
            raise ValueError(f"{self.model.path} holds low-rank updates: run `worldvla export` on it first")
        for name in (*FILES, *IMAGE_FILES):
            (save_directory / FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.model.path / name, save_directory / FOLDER / name)
        replace(self.config, checkpoint="", pretrained_path=None)._save_pretrained(save_directory)

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()
        self._frames: deque[list[dict[str, np.ndarray]]] = deque(maxlen=self.model.config.layout.history - 1)

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the action (B, A) of this control step; asked once a step, with its observation."""
        frames = self._images(batch) if not self._queue or self._frames.maxlen else []
        if not self._queue:
            chunk_BUA = self._decide(batch, frames)[:, : self.config.n_action_steps]
            self._queue.extend(chunk_BUA.unbind(1))
        self._frames.append(frames)
        action_BA = self._queue.popleft()
        return self.deltas.add(action_BA, batch["observation.state"]) if self.deltas.pairs else action_BA

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the chunk (B, U, A) of this observation."""
        if self.deltas.pairs:
            raise ValueError(
                "this checkpoint predicts differences to the state of each step (--delta): use select_action"
            )
        return self._decide(batch, self._images(batch))

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict | None]:
        raise NotImplementedError(TRAIN)

    def get_optim_params(self) -> dict:
        raise NotImplementedError(TRAIN)

    def _decide(self, batch: dict[str, Any], frames: list[dict[str, np.ndarray]]) -> Tensor:
        if (has_state := self.model.config.layout.state) and "observation.state" not in batch:
            raise ValueError(
                f"no observation.state: the observation has {', '.join(batch)}; lerobot-rollout passes on "
                "numbers of the robot whose names end in .pos or .vel"
            )
        tasks = batch["task"] if not isinstance(batch["task"], str) else [batch["task"]] * len(frames)
        observations = []
        for row, (images, task) in enumerate(zip(frames, tasks, strict=True)):
            observation = {**images, "instruction": task, "previous": [past[row] for past in self._frames]}
            if has_state:
                observation["state"] = batch["observation.state"][row].float().cpu().numpy()
            observations.append(observation)
        with torch.autocast(torch.device(self.model.device).type, enabled=False):  # --policy.use_amp
            chunk_BUA = self.policy.act(observations)
        return torch.from_numpy(chunk_BUA).to(self.model.device)

    def _images(self, batch: dict[str, Any]) -> list[dict[str, np.ndarray]]:
        """Return the images of each robot, view -> uint8 (Y, X, 3)."""
        if missing := [name for name in self.config.views.values() if name not in batch]:
            raise ValueError(
                f"no camera {missing[0]}: the observation has {', '.join(batch)}; set --policy.views"
            )
        views = {
            view: [
                resize_with_pad(as_uint8(image.cpu().numpy()), *self.model.view_sizes[view])
                for image in batch[name]
            ]
            for view, name in self.config.views.items()
        }
        return [dict(zip(views, images, strict=True)) for images in zip(*views.values(), strict=True)]
