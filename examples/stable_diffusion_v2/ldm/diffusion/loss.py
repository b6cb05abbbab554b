"""The training loss: add noise, run the network, compare with the target."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import NoiseSchedule


class DiffusionLoss(nn.Cell):
    """Weighted mean squared error of the network's output.

    Args:
        network: Cell, network(z [B, C, H, W], t int32 [B], *condition) -> [B, C, H, W].
        schedule: the noise schedule.
        prediction: what the network predicts.

    Raises:
        UserError: the schedule has a step that this prediction type cannot learn.
    """

    def __init__(self, network: nn.Cell, schedule: NoiseSchedule, prediction: Prediction):
        super().__init__(auto_prefix=False)  # the network's parameters keep their names
        schedule.check(prediction)
        t = np.arange(len(schedule))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        to_x0 = 1 / prediction.x0_factor(alpha, sigma)
        self.network = network
        self.target = prediction.target
        self.alpha = Tensor(alpha[:, None, None, None], ms.float32)  # [T, 1, 1, 1]
        self.sigma = Tensor(sigma[:, None, None, None], ms.float32)
        self.to_x0 = Tensor(to_x0, ms.float32)
        self.to_eps = Tensor(to_x0 * alpha**2 / sigma**2, ms.float32)

    def construct(self, latents: Tensor, eps: Tensor, t: Tensor, weight: Tensor, *condition: Tensor):
        """The loss, and the same error as one of x0 and as one of eps.

        Args:
            latents: float32 [B, C, H, W], of unit variance.
            eps: float32 [B, C, H, W], unit Gaussian noise.
            t: int32 [B], in [0, T - 1].
            weight: float32 [B], the weight on each sample's squared error; see weighting.loss_weight.
            condition: the network's further inputs; see `Condition.given`.

        Returns:
            loss: float32 scalar, to be minimized.
            x0_loss, eps_loss: float32 [B], each sample's unweighted squared error of x0 and of eps. They can be
                compared across prediction types; the loss cannot.
        """
        return self.compare(self.network(self.noisy(latents, eps, t), t, *condition), latents, eps, t, weight)

    def noisy(self, latents: Tensor, eps: Tensor, t: Tensor):
        """The network's input z = alpha x0 + sigma eps."""
        return ops.gather(self.alpha, t, 0) * latents + ops.gather(self.sigma, t, 0) * eps  # factors [B, 1, 1, 1]

    def compare(self, output: Tensor, latents: Tensor, eps: Tensor, t: Tensor, weight: Tensor):
        """As `construct`, from the network's output [B, C, H, W]."""
        alpha, sigma = ops.gather(self.alpha, t, 0), ops.gather(self.sigma, t, 0)
        error = output.astype(ms.float32) - self.target(latents, eps, alpha, sigma)
        squared = (error * error).mean((1, 2, 3))  # [B]
        loss = (weight * squared).mean()
        return loss, ops.gather(self.to_x0, t, 0) * squared, ops.gather(self.to_eps, t, 0) * squared
