"""OptimConfig -> the optimisers, each over its own parameters, the learning rate of each step, and the
average of weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from worldvla.config import OptimConfig
from worldvla.train.parallel import local


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Return a fused AdamW of all trained parameters; or, with `method` muon, a Muon of the linear layers
    inside the transformer and an AdamW of the rest.

    Embeddings, norms and everything else of one dimension do not decay. Muon's update is scaled to the size
    of AdamW's (arXiv 2502.16982), so one learning rate serves both.
    """
    inner = (m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head")
    inner = {id(weight) for weight in inner if config.method == "muon"}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in parameters if id(p) in inner]
    outer = [p for p in parameters if id(p) not in inner]
    decayed = [p for p in outer if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in outer if p.ndim < 2 or id(p) in embeddings]
    rate, decay = config.learning_rate, config.weight_decay
    # Groups of DTensors or of plain tensors: the fused step takes no mixture (parallel.spread).
    groups = [
        {"params": params, "weight_decay": own}
        for group, own in ((decayed, decay), (others, 0.0))
        for sharded in (True, False)
        if (params := [p for p in group if isinstance(p, DTensor) == sharded])
    ]
    betas = float(config.betas[0]), float(config.betas[1])  # a file may say 0
    adamw = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    if not hidden:
        return [adamw]
    return [adamw, torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]


class Average:
    """The exponential moving average of a model's trained weights; of nothing with a decay of 0."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad and decay}
        self.tensors = {name: p.detach().clone() for name, p in self.weights.items()}

    def update(self, step: int) -> None:
        """Count in the weights after step 0, 1, ..; the decay grows: the first ones would stay for long."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.tensors.items():
            local(tensor).lerp_(local(self.weights[name].detach()), 1 - decay)

    def swap(self) -> None:
        """Let the model and this change places: the model is the average, `tensors` are the weights."""
        for name, tensor in self.tensors.items():
            own, mean = local(self.weights[name].detach()), local(tensor)
            weights = own.clone()
            own.copy_(mean)
            mean.copy_(weights)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the average inside the block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the rate of step 0, 1, ..: linear warm-up, then a cosine that ends at min_learning_rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
