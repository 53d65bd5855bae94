"""The config of the policy type `worldvla`."""

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig

TRAIN = "a WorldVLA is trained by `worldvla train finetune`, not by lerobot-train"


@PreTrainedConfig.register_subclass("worldvla")
@dataclass
class WorldVLAConfig(PreTrainedConfig):
    checkpoint: str = ""
    """What `worldvla.load` takes; empty: the folder beside this config."""
    views: dict[str, str] = field(default_factory=dict)
    """View -> LeRobot's name of its camera; empty: the cameras of the checkpoint's data."""
    n_action_steps: int = 0
    """Actions of each chunk that are executed; 0: all."""
    head: str = "discrete"
    """Or `continuous`, of a checkpoint that has that head."""
    quantize: str = ""
    """`int8` or `int4`: hold its large matrices in 8 or 4 bits."""
    unnorm_key: str = ""
    """Of a checkpoint of several datasets, the one whose statistics are used."""
    action_feature_names: list[str] | None = None
    """Names of the action dims; None: those of the data. lerobot-rollout 0.6.1 still pairs by place."""
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {feature.value: NormalizationMode.IDENTITY for feature in FeatureType}
    )
    """None: the checkpoint has its own statistics."""

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError(TRAIN)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """The policy checks them against the checkpoint."""
