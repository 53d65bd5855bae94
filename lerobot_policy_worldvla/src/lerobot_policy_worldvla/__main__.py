"""A checkpoint -> a policy folder of LeRobot: python -m lerobot_policy_worldvla CHECKPOINT --out DIR"""

from pathlib import Path

import tyro
from tyro.conf import Positional

from . import WorldVLAConfig, WorldVLAPolicy, make_worldvla_pre_post_processors


def write(
    checkpoint: Positional[str], *, out: Path, views: tuple[str, ...] = (), unnorm_key: str = ""
) -> None:
    """Write the folder that `--policy.path` takes.

    Args:
        checkpoint: What `worldvla.load` takes: a checkpoint, a run directory, ORG/NAME on the hub.
        out: Directory of the policy.
        views: VIEW=FEATURE of each camera, such as agentview=observation.images.top.
        unnorm_key: Of a checkpoint of several datasets, the one whose ranges are used.
    """
    if out.exists():
        raise SystemExit(f"{out} exists already: expected a new directory")
    config = WorldVLAConfig(
        checkpoint=checkpoint,
        device="cpu",
        views=dict(v.split("=", 1) for v in views),
        unnorm_key=unnorm_key,
    )
    policy = WorldVLAPolicy(config)
    policy.save_pretrained(out)
    for pipeline in make_worldvla_pre_post_processors(config):
        pipeline.save_pretrained(out)
    print(f"policy: {out}   next: lerobot-rollout --policy.path={out}")


tyro.cli(write)
