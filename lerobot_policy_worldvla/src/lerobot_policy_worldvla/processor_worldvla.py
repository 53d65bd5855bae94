"""The steps before and after the policy: LeRobot's default ones, which normalise nothing."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors

from .configuration_worldvla import WorldVLAConfig


def make_worldvla_pre_post_processors(config: WorldVLAConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Return the pipelines; `dataset_stats` are not used, since the checkpoint has those of its training."""
    del dataset_stats
    return make_default_pre_post_processors(config)
