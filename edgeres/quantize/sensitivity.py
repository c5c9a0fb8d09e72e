"""How much noise on each channel of a tensor reaches the network's answer.

To first order the answer's noise power is the sum, over all channels, of a channel's noise power times the squared
gradient of the answer there. Random signs over the classes give all logits' gradients at once, in expectation.

Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990, for the random signs; Dong et
al., "HAWQ-V2", 2020 (arXiv:1911.03852), section 3.1, for curvature as the weight of a layer's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from edgeres.quantize.follow import Follower

DRAWS = 4  # of random signs for each image


def sensitivities(
    follower: Follower,
    images: np.ndarray,
    tensors: Sequence[str],
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Return each tensor's sensitivity by channel: what one unit of noise power on each of its elements adds to the
    power of the logits' noise.

    Args:
        images: float32 ``(N, 3, H, W)``, normalized.
        tensors: names of activations.
        batch: images per step.

    Returns:
        float64 ``(C,)`` for each tensor; the mean over the images.
    """
    generator = torch.Generator().manual_seed(0)
    wanted = list(dict.fromkeys(tensors))
    total: dict[str, Tensor] = {}
    if not wanted:
        return {}
    for start in range(0, len(images), batch):
        x = torch.from_numpy(images[start : start + batch]).requires_grad_(True)
        logits, kept = follower.run(x, wanted)
        for draw in range(DRAWS):
            signs = torch.randint(0, 2, logits.shape, generator=generator).to(logits.dtype) * 2 - 1
            gradients = torch.autograd.grad(
                (logits * signs).sum(),
                [kept[name] for name in wanted],
                retain_graph=draw + 1 < DRAWS,
                allow_unused=True,
            )
            for name, gradient in zip(wanted, gradients, strict=True):
                value = torch.zeros_like(kept[name]) if gradient is None else gradient
                power = value.double().square().sum((0, *range(2, value.ndim)))
                total[name] = total.get(name, torch.zeros_like(power)) + power
        progress(min(start + batch, len(images)), len(images))
    return {name: (power / (DRAWS * len(images))).numpy() for name, power in total.items()}
