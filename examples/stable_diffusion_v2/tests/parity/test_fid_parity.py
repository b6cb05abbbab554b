"""eval_fid.py against pytorch-fid, clean-fid and torch-fidelity at the same random weights and on the same pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make parity")

from mindspore import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from eval import inception, metrics, pictures
from eval.inception_statistics import compute_statistics
from eval.sides import Side, find_side, write_statistics
from ldm.checkpoint import formats
from ldm.parallel.ranks import Ranks

pytestmark = pytest.mark.parity

SETS = [ROOT / f"datasets/emoji/{style}/test" for style in ("noto", "openmoji")]
EACH = 8


def module(name: str):
    """A package to compare with, or a reason to skip.

    Beside a PyTorch for the CPU, a torchvision for CUDA finds its own operators missing. Of those the networks need
    none, but the import wants two to be declared.
    """
    try:
        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            DECLARED.append(library)
        return __import__(name, fromlist=["_"])
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed: pip install pytorch-fid clean-fid torch-fidelity")


DECLARED = []  # declarations last as long as their library


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of random weights with pytorch-fid's names, whose activations neither vanish nor grow."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in inception.file_shapes(inception.Inception()).items():
        if name.endswith(("running_var", "bn.weight")):
            array = rng.uniform(0.7, 1.4, shape)
        else:
            array = rng.standard_normal(shape) * (0.1 if len(shape) < 4 else np.sqrt(2 / np.prod(shape[1:])))
        tensors[name] = array.astype(np.float32)
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    formats.write(path, tensors, {}, "safetensors")
    return path


@pytest.fixture(scope="module")
def ours(file):
    net = inception.Inception()
    inception.load(net, file, logits=True)
    return net


@pytest.fixture
def theirs(file, monkeypatch):
    """pytorch-fid's network with the same weights, which it would otherwise download."""
    reference = module("pytorch_fid.inception")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in formats.read(file)[0].items()}
    tensors["fc.bias"] = torch.zeros(inception.CLASSES)
    tensors |= {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in tensors if "running_var" in name
    }
    monkeypatch.setattr(reference, "load_state_dict_from_url", lambda *_, **__: tensors)
    return reference.InceptionV3([3]).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight pictures of each of two styles."""
    out = []
    for source in SETS:
        folder = tmp_path_factory.mktemp(source.parent.name)
        for path in sorted(source.glob("*.png"))[:EACH]:
            Image.open(path).convert("RGB").save(folder / path.name)
        out.append(folder)
    return out


def picture(width: int, height: int) -> np.ndarray:
    """Smooth and sharp parts, uint8."""
    rng = np.random.default_rng(width * height)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    out = np.array(small.resize((width, height), Image.BICUBIC))
    out[: height // 3] = rng.integers(0, 256, out[: height // 3].shape)
    return out


SIZES = [(299, 299), (64, 64), (640, 480), (1, 1), (31, 700), (300, 298)]


@pytest.mark.parametrize("width, height", SIZES)
def test_clean_resizing_is_clean_fids_bit_for_bit(width, height):
    module("cleanfid.resize")
    from cleanfid.resize import build_resizer

    pixels = picture(width, height)
    np.testing.assert_array_equal(pictures.resize_clean(pixels), build_resizer("clean")(pixels))


def test_clean_input_is_clean_fids_bit_for_bit():
    x = torch.from_numpy(pictures.resize_clean(picture(400, 300)))
    expected = (x - 128) / 128
    np.testing.assert_array_equal(pictures.clean(picture(400, 300)), expected.permute(2, 0, 1).numpy())


@pytest.mark.parametrize("width, height", SIZES)
def test_legacy_resizing_is_pytorchs(width, height):
    pixels = picture(width, height)
    x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    # Both compute the places between the pixels in float32, which is good to 1e-5 of a pixel here.
    np.testing.assert_allclose(pictures.resize_legacy(pixels), expected.numpy(), atol=4e-5)


def test_features_are_pytorch_fids(ours, theirs):
    sizes = [(64, 64), (299, 299), (200, 320)]
    prepared = np.stack([pictures.legacy(picture(*size)) for size in sizes])
    features, logits = (out.asnumpy() for out in ours(Tensor(prepared)))
    with torch.no_grad():
        x = [torch.from_numpy(picture(*size).astype(np.float32) / 255).permute(2, 0, 1)[None] for size in sizes]
        expected = torch.cat([theirs(one)[0] for one in x])[:, :, 0, 0].numpy()
    error = np.sqrt(((features - expected) ** 2).mean() / (expected**2).mean())
    print(f"features: relative rms {error:.1e}")
    assert error < 1e-5
    weights = ours.fc.weight.asnumpy()
    np.testing.assert_allclose(logits, expected @ weights.T, rtol=1e-4, atol=1e-4 * np.abs(logits).max())


def test_fid_of_two_folders_is_pytorch_fids(ours, theirs, folders):
    reference = module("pytorch_fid.fid_score")
    sides = [find_side(str(folder)) for folder in folders]
    for side in sides:
        compute_statistics(side, ours, "legacy", EACH, [], Ranks(), folders[0])
    fid = metrics.frechet_distance(sides[0].mean, sides[0].covariance, sides[1].mean, sides[1].covariance)
    expected = [
        reference.calculate_activation_statistics(sorted(folder.glob("*.png")), theirs, EACH, num_workers=0)
        for folder in folders
    ]
    for side, (mean, covariance) in zip(sides, expected):
        np.testing.assert_allclose(side.mean, mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(side.covariance, covariance, atol=1e-4 * np.abs(covariance).max())
    # Singular covariances of 2,048 features: where the square root is delicate, and slow (their part of the test).
    assert fid == pytest.approx(reference.calculate_frechet_distance(*expected[0], *expected[1]), rel=1e-4)


def features_of(n: int, seed: int, width: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(rng.standard_normal((n, width)) + 0.3 * rng.standard_normal(width), 0).astype(np.float32)


@pytest.mark.parametrize("size", [50, 90])
def test_kid_is_torch_fidelitys(size):
    reference = module("torch_fidelity.metric_kid")
    a, b = features_of(90, 1), features_of(120, 2)
    settings = {"kid_subsets": 20, "kid_subset_size": size, "rng_seed": 2020, "verbose": False}
    expected = reference.kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), **settings)
    values = metrics.kid_of_subsets(a, b, 20, size, np.random.RandomState(2020))
    assert values.mean() == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    assert values.std() == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)


def test_kid_of_all_is_clean_fids():
    reference = module("cleanfid.fid")
    a, b = features_of(100, 1), features_of(100, 2)  # as many on both sides: its one subset is everything
    expected = reference.kernel_distance(a.astype(np.float64), b.astype(np.float64), 1, 100)
    assert metrics.kid(a, b) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_are_torch_fidelitys():
    reference = module("torch_fidelity.metric_prc")
    real, generated = features_of(300, 3, 8), 0.7 * features_of(200, 4, 8)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    both = torch.from_numpy(generated), torch.from_numpy(real)
    expected = reference.prc_features_to_metric(*both, **settings)
    precision, recall = metrics.precision_recall(real, generated)
    assert 0 < recall < precision < 1
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_inception_score_is_torch_fidelitys():
    reference = module("torch_fidelity.metric_isc")
    logits = 3 * features_of(203, 5, 30)
    expected = reference.isc_features_to_metric(torch.from_numpy(logits))
    score = metrics.inception_score(logits, 10, np.random.RandomState(2020))
    values = expected["inception_score_mean"], expected["inception_score_std"]
    assert score == pytest.approx(values, rel=1e-6)


def test_pytorch_fid_reads_our_statistics(tmp_path):
    reference = module("pytorch_fid.fid_score")
    rng = np.random.default_rng(0)
    side = Side("x", mean=rng.random(2048), covariance=rng.random((2048, 2048)), count=12)
    write_statistics(tmp_path / "x.npz", side, {"resize": "legacy"})
    mean, covariance = reference.compute_statistics_of_path(str(tmp_path / "x.npz"), None, 1, 2048, "cpu")
    np.testing.assert_array_equal(mean, side.mean)
    np.testing.assert_array_equal(covariance, side.covariance)
