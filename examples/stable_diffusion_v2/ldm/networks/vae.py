"""The autoencoder of Stable Diffusion: pictures to a Gaussian over latents and back (arXiv 2112.10752, appendix G)."""

from __future__ import annotations

from mindspore import nn, ops

from ldm import kernels
from ldm.networks.layers import Conv2d, GroupNorm


class AutoencoderKL(nn.Cell):
    """Encoder and decoder; pictures [B, 3, H, W] in [-1, 1], latents [B, embed_dim, H / f, W / f], unscaled."""

    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x):
        """The Gaussian's mean and log-variance, each [B, embed_dim, h, w]; log-variance within [-30, 20]."""
        mean, log_var = ops.split(self.quant_conv(self.encoder(x)), self.quant_conv.bias.shape[0] // 2, 1)
        return mean, ops.clamp(log_var, -30.0, 20.0)

    def decode(self, z):
        """Pictures [B, 3, H, W], about [-1, 1], from latents [B, embed_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z))

    def construct(self, z):
        return self.decode(z)


class VAEEncode(nn.Cell):
    """`vae.encode` as a cell of its own, which graph mode compiles."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, x):
        return self.vae.encode(x)


class Encoder(nn.Cell):
    def __init__(self, config):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = Conv2d(config.in_channels, config.ch, 3)
        self.down = nn.CellList(
            [
                Level(before, width, config.num_res_blocks, Downsample if i + 1 < len(widths) else None)
                for i, (before, width) in enumerate(zip([config.ch, *widths], widths))
            ]
        )
        self.mid = Middle(widths[-1])
        self.norm_out = GroupNorm(widths[-1], 1e-6, silu=True)
        self.conv_out = Conv2d(widths[-1], 2 * config.z_channels, 3)

    def construct(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Cell):
    """The levels are numbered like the encoder's and run from the last to the first."""

    def __init__(self, config):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3)
        self.mid = Middle(widths[-1])
        self.up = nn.CellList(
            [
                Level(before, width, config.num_res_blocks + 1, Upsample if i else None)
                for i, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths))
            ]
        )
        self.norm_out = GroupNorm(widths[0], 1e-6, silu=True)
        self.conv_out = Conv2d(widths[0], config.out_ch, 3)

    def construct(self, z):
        h = self.mid(self.conv_in(z))
        for i in range(len(self.up)):
            h = self.up[len(self.up) - 1 - i](h)
        return self.conv_out(self.norm_out(h))


class Level(nn.Cell):
    """Residual blocks at one resolution, then the step to the next one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, resample: type | None):
        super().__init__()
        self.block = nn.CellList([ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)])
        step = resample(outputs) if resample else nn.Identity()
        setattr(self, {Downsample: "downsample", Upsample: "upsample", None: "last"}[resample], step)
        self.step = (step,)

    def construct(self, h):
        for block in self.block:
            h = block(h)
        return self.step[0](h)


class Middle(nn.Cell):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def construct(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class ResnetBlock(nn.Cell):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs, 1e-6, silu=True), Conv2d(inputs, outputs, 3)
        self.norm2, self.conv2 = GroupNorm(outputs, 1e-6, silu=True), Conv2d(outputs, outputs, 3)
        self.nin_shortcut = nn.Identity() if inputs == outputs else Conv2d(inputs, outputs, 1)

    def construct(self, x):
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Cell):
    """One-head attention over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels, 1e-6)
        self.q, self.k, self.v = (Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = Conv2d(channels, channels, 1)
        self.heads = kernels.select().Heads(1)

    def construct(self, x):
        h = self.norm(x)
        out = self.heads(self.tokens(self.q(h)), self.tokens(self.k(h)), self.tokens(self.v(h)))  # [B, HW, C]
        return x + self.proj_out(out.swapaxes(1, 2).reshape(x.shape))

    def tokens(self, x):
        return x.reshape(x.shape[0], x.shape[1], -1).swapaxes(1, 2)


class Downsample(nn.Cell):
    """Stride 2 with one row and column of padding at the bottom and the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, h):
        return self.conv(h)


class Upsample(nn.Cell):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)
        self.enlarge = kernels.select().Upsample2()

    def construct(self, h):
        return self.conv(self.enlarge(h))
