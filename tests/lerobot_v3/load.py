"""Load a data set, such as `worldvla export-dataset` or make.py wrote, with lerobot's own reader (0.4.4 and
later), in its environment: every frame and number is that of our reader, whose arrays `dump` writes.

    python tests/lerobot_v3/load.py dump DATASET out.npz      in the environment of worldvla
    python tests/lerobot_v3/load.py check DATASET out.npz     in that of lerobot
"""

import sys
from pathlib import Path

import numpy as np


def dump(root: Path, out: Path) -> None:
    from worldvla.data.sources import open_source

    arrays: dict[str, np.ndarray] = {}
    source = open_source(root)
    for i, episode in enumerate(source.episodes()):
        arrays |= {f"{i}/action": episode.actions, f"{i}/observation.state": episode.states}
        arrays |= {f"{i}/{source.cameras[view].feature}": frames for view, frames in episode.images.items()}
        arrays[f"{i}/task"] = np.array(episode.instruction)
    np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]


def check(root: Path, arrays: dict[str, np.ndarray]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

    data = LeRobotDataset("any/name", root=root, video_backend="pyav")  # torchcodec needs the system's FFmpeg
    worst, count = 0.0, 0
    for item in (data[i] for i in range(len(data))):
        episode, frame = int(item["episode_index"]), int(item["frame_index"])
        assert item["task"] == str(arrays[f"{episode}/task"])
        for name in ("action", "observation.state"):
            assert np.array_equal(item[name].numpy(), arrays[f"{episode}/{name}"][frame])
        for name in data.meta.camera_keys:
            picture = (255 * item[name].permute(1, 2, 0)).round().numpy()
            worst = max(worst, float(np.abs(picture - arrays[f"{episode}/{name}"][frame]).max()))
        count += 1
    assert count == sum(len(a) for name, a in arrays.items() if name.endswith("/action"))
    times = {"action": [0.0, 1 / data.fps]}
    near = LeRobotDataset("any/name", root=root, video_backend="pyav", delta_timestamps=times)
    assert near[0]["action"].shape[0] == 2
    print(
        f"{count} frames of {data.num_episodes} episodes: numbers equal, pictures differ by {worst:g} at most"
    )


if __name__ == "__main__":
    verb, root, file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    dump(root, file) if verb == "dump" else check(root, dict(np.load(file)))
