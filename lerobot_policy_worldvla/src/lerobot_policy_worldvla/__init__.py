"""WorldVLA as a policy of LeRobot: importing this registers the type `worldvla`."""

from .configuration_worldvla import WorldVLAConfig
from .modeling_worldvla import WorldVLAPolicy
from .processor_worldvla import make_worldvla_pre_post_processors

__all__ = ["WorldVLAConfig", "WorldVLAPolicy", "make_worldvla_pre_post_processors"]
