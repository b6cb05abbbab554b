"""The loss of a run that trains the text encoders along with the UNet."""

from __future__ import annotations

from mindspore import nn, ops


class TextLoss(nn.Cell):
    """The text encoders, then the diffusion loss: it takes token ids in the place of a condition.

    Args:
        text_encoder: ids int32 [N, L], or [N, 2, L] for two encoders -> the condition's fields without sizes. N is B
            times the pieces of each text; see `Wording`.
        loss: of latents, eps, t, weight and the condition's fields.
        told: whether the UNet is told sizes.
    """

    def __init__(self, text_encoder: nn.Cell, loss: nn.Cell, told: bool = False):
        super().__init__(auto_prefix=False)
        self.text_encoder, self.loss, self.told = text_encoder, loss, told

    def construct(self, latents, eps, t, weight, ids, kept, *sizes):
        """The loss's outputs.

        Args:
            kept: float32 [B], the factor of each sample's text: 0 where zeros stand for an empty caption, else 1.
            sizes: where `told`, float32 [B, n], the embedded sizes; they follow the pooled text.
        """
        fields = self.text_encoder(ids)
        count = kept.shape[0]
        context = fields[0].reshape(count, -1, fields[0].shape[-1]) * kept.reshape(-1, 1, 1)
        if not self.told:
            return self.loss(latents, eps, t, weight, context)
        pooled = fields[1].reshape(count, -1, fields[1].shape[-1])[:, 0]  # the first piece's
        vector = ops.concat((pooled * kept.reshape(-1, 1), sizes[0]), 1)
        return self.loss(latents, eps, t, weight, context, vector)
