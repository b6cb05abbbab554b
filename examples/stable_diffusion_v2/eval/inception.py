"""The Inception network of 2015 that FID is defined by (arXiv 1512.00567, arXiv 1706.08500), and its weights.

It is TensorFlow's inception-2015-12-05 in pytorch-fid's form and with pytorch-fid's names. It differs from later
Inception v3 networks: it has 1,008 classes, its averages of 3x3 pixels do not count the padding, and its last block has
a maximum in the place of the average.

Batch norms are folded into the convolutions when the weights are read: y = W x + b followed by g (y - m) / s + c is one
convolution with g W / s. So every layer here is a convolution, a bias and a ReLU, and the names in files have ``.conv``
and ``.bn`` where the network's have none.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from ldm import kernels
from ldm.checkpoint import formats, match
from ldm.config.versions import PUBLISHED
from ldm.config.yaml_file import SCRIPTS, search
from ldm.errors import UserError
from ldm.kernels import plain
from ldm.networks.layers import Linear, fill, parameter

FEATURES, CLASSES = 2048, 1008
NORM_EPS = 1e-3
WEIGHTS = {  # file name -> where it is published
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
    "inception_v3_fid-9ec6dfe4.ckpt": f"{PUBLISHED}/fid",
}
KERNEL, NORM, LAST = "conv.weight", ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"), "fc.weight"


class Conv(nn.Cell):
    """Convolution, bias, ReLU; `kernel` is (height, width). The plane keeps its size with `pad` and stride 1."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int] = (1, 1), stride: int = 1, pad: bool = True):
        super().__init__()
        h, w = kernel
        self.weight, self.bias = parameter(outputs, inputs, h, w), parameter(outputs)
        if (kernel, stride, pad) == ((3, 3), 1, True):
            self.conv = kernels.select().Conv2d(outputs, 3, 1, 1)
        else:
            self.conv = plain.Conv2d(outputs, kernel, stride, (h // 2, h // 2, w // 2, w // 2) if pad else 0)
        self.relu = ops.ReLU()

    def construct(self, x):
        return self.relu(self.conv(x, self.weight, self.bias))


def average() -> ops.AvgPool:
    """The mean of 3x3 pixels; the plane keeps its size. Padding does not count: a corner has the mean of 4 pixels."""
    return ops.AvgPool(3, 1, "same")


def maximum(stride: int) -> ops.MaxPool:
    """The maximum of 3x3 pixels; with stride 1 the plane keeps its size."""
    return ops.MaxPool(3, stride, "same" if stride == 1 else "valid")


class InceptionA(nn.Cell):
    """[B, inputs, 35, 35] to [B, 224 + pooled, 35, 35]."""

    def __init__(self, inputs: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48), Conv(48, 64, (5, 5))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64), Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3))
        self.pool, self.branch_pool = average(), Conv(inputs, pooled)

    def construct(self, x):
        b5 = self.branch5x5_2(self.branch5x5_1(x))
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return ops.concat((self.branch1x1(x), b5, b3, self.branch_pool(self.pool(x))), 1)


class InceptionB(nn.Cell):
    """[B, 288, 35, 35] to [B, 768, 17, 17]."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, (3, 3), 2, False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64), Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3), 2, False)
        self.pool = maximum(2)

    def construct(self, x):
        b3 = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return ops.concat((self.branch3x3(x), b3, self.pool(x)), 1)


class InceptionC(nn.Cell):
    """[B, 768, 17, 17] to the same shape; the inner convolutions have `width` channels."""

    def __init__(self, width: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width), Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width), Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, row), Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.pool, self.branch_pool = average(), Conv(768, 192)

    def construct(self, x):
        b7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        b77 = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        b77 = self.branch7x7dbl_5(self.branch7x7dbl_4(b77))
        return ops.concat((self.branch1x1(x), b7, b77, self.branch_pool(self.pool(x))), 1)


class InceptionD(nn.Cell):
    """[B, 768, 17, 17] to [B, 1280, 8, 8]."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, (3, 3), 2, False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, (3, 3), 2, False)
        self.pool = maximum(2)

    def construct(self, x):
        b3 = self.branch3x3_2(self.branch3x3_1(x))
        b7 = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return ops.concat((b3, b7, self.pool(x)), 1)


class InceptionE(nn.Cell):
    """[B, inputs, 8, 8] to [B, 2048, 8, 8]; `pool` begins the last branch."""

    def __init__(self, inputs: int, pool):
        super().__init__()
        self.branch1x1 = Conv(inputs, 320)
        self.branch3x3_1 = Conv(inputs, 384)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448), Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.pool, self.branch_pool = pool, Conv(inputs, 192)

    def construct(self, x):
        b3 = self.branch3x3_1(x)
        b3d = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = (self.branch1x1(x), self.branch3x3_2a(b3), self.branch3x3_2b(b3))
        parts += (self.branch3x3dbl_3a(b3d), self.branch3x3dbl_3b(b3d), self.branch_pool(self.pool(x)))
        return ops.concat(parts, 1)


class Inception(nn.Cell):
    """x [B, 3, 299, 299] in [-1, 1] to (features [B, 2048], logits [B, 1008]).

    The logits lack the last layer's bias, as in the code of arXiv 1606.03498, which defines the Inception score, and in
    torch-fidelity.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), 2, False)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), 1, False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), 1, False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = InceptionA(192, 32), InceptionA(256, 64), InceptionA(288, 64)
        self.Mixed_6a = InceptionB()
        self.Mixed_6b, self.Mixed_6c = InceptionC(128), InceptionC(160)
        self.Mixed_6d, self.Mixed_6e = InceptionC(160), InceptionC(192)
        self.Mixed_7a = InceptionD()
        self.Mixed_7b, self.Mixed_7c = InceptionE(1280, average()), InceptionE(2048, maximum(1))
        self.fc = Linear(FEATURES, CLASSES, bias=False)
        self.pool = maximum(2)

    def construct(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.pool(x)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.pool(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # [B, 1280, 8, 8]
        x = self.Mixed_7c(self.Mixed_7b(x))  # [B, 2048, 8, 8]
        features = ops.mean(x.astype(ms.float32), (2, 3))
        return features, self.fc(features)


# ---- weights ----


def _chain(stem: str, branch: int, length: int) -> dict[str, str]:
    return {f"{stem}_{i + 1}": f"branch{branch}.{i}" for i in range(length)}


MINDONE_FIELDS = {
    "conv.weight": "conv.weight",
    "bn.weight": "bn.gamma",
    "bn.bias": "bn.beta",
    "bn.running_mean": "bn.moving_mean",
    "bn.running_var": "bn.moving_variance",
}
MINDONE_BRANCHES = {  # by the block's number, or its first digit
    "5": {"branch1x1": "branch0", **_chain("branch5x5", 1, 2), **_chain("branch3x3dbl", 2, 3)},
    "6a": {"branch3x3": "branch0", **_chain("branch3x3dbl", 1, 3)},
    "6": {"branch1x1": "branch0", **_chain("branch7x7", 1, 3), **_chain("branch7x7dbl", 2, 5)},
    "7a": {**_chain("branch3x3", 0, 2), **_chain("branch7x7x3", 1, 4)},
    "7": {
        "branch1x1": "branch0",
        "branch3x3_1": "branch1",
        "branch3x3_2a": "branch1_a",
        "branch3x3_2b": "branch1_b",
        **_chain("branch3x3dbl", 2, 2),
        "branch3x3dbl_3a": "branch2_a",
        "branch3x3dbl_3b": "branch2_b",
    },
}


def find_weights() -> Path:
    """The first known file of weights in models/; UserError, with the addresses, where there is none."""
    for name in WEIGHTS:
        found = search(f"models/{name}")
        if found is not None:
            return found
    links = " or ".join(f"{place}/{name}" for name, place in WEIGHTS.items())
    raise UserError(
        f"no weights of the Inception network: get {links} and put it into {SCRIPTS / 'models'}, or give a file by "
        "--load_checkpoint"
    )


def load(net: Inception, path: str | Path, logits: bool = False) -> str:
    """Fill the network from pytorch-fid's file or MindONE's.

    Without `logits` the file may lack the last layer, which only the Inception score needs. Returns a checksum of the
    weights before that layer, eight hexadecimal digits that are the same for both files. Raises UserError where the
    file does not fit.
    """
    tensors = to_published_names(formats.read(path)[0])
    shapes = file_shapes(net)
    prefixes = ("Conv2d_", "Mixed_") + ((LAST,) if logits or LAST in tensors else ())
    tensors = match(tensors, shapes, path, prefixes)
    checksum = 0
    for name, cell in net.cells_and_names():
        if isinstance(cell, Conv):
            weight, bias = fold_norm(tensors, name)
            fill(cell.weight, weight)
            fill(cell.bias, bias)
            checksum = zlib.crc32(bias, zlib.crc32(weight, checksum))
    if LAST in tensors:
        fill(net.fc.weight, tensors[LAST])
    return f"{checksum:08x}"


def file_shapes(net: Inception) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that are read from pytorch-fid's file, without the last layer's bias."""
    shapes = {LAST: (CLASSES, FEATURES)}
    for name, cell in net.cells_and_names():
        if isinstance(cell, Conv):
            shapes[f"{name}.{KERNEL}"] = cell.weight.shape
            shapes.update({f"{name}.{field}": cell.bias.shape for field in NORM})
    return shapes


def fold_norm(tensors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias, float32, of one convolution for the file's convolution and its batch norm."""
    weight, gain, shift, mean, variance = (tensors[f"{name}.{f}"].astype(np.float64) for f in (KERNEL, *NORM))
    scale = gain / np.sqrt(variance + NORM_EPS)
    return (weight * scale[:, None, None, None]).astype(np.float32), (shift - mean * scale).astype(np.float32)


def to_published_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of MindONE's file by pytorch-fid's names; any other file keeps its names. Counters are left out."""
    if any(name.endswith(".bn.gamma") for name in tensors):
        back = {mindone_name(name): name for name in file_shapes(Inception())}
        tensors = {back.get(name, name): array for name, array in tensors.items()}
    return {name: array for name, array in tensors.items() if not name.endswith(".num_batches_tracked")}


def mindone_name(name: str) -> str:
    """MindONE's name of a parameter of pytorch-fid's."""
    if name == LAST:
        return name
    block, *branch, kind, field = name.split(".")
    field = MINDONE_FIELDS[f"{kind}.{field}"]
    if not branch:
        return f"{block.rsplit('_', 1)[0]}.{field}"  # Conv2d_1a_3x3 is Conv2d_1a
    number = block.split("_")[1]
    branches = MINDONE_BRANCHES.get(number) or MINDONE_BRANCHES[number[0]]
    return f"{block}.{branches.get(branch[0], 'branch_pool.1')}.{field}"
