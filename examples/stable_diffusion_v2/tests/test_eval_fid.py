"""eval_fid.py: its figures against their definitions, its pictures and files, and the command on degenerate input.

The command runs with a small stand-in for the Inception network; the network itself is compared in tests/parity.
"""

import io
import json
import logging
import os
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from odd_pictures import odd_pictures, save
from ranks_in_threads import run_ranks

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from eval import eval_fid, inception, metrics, pictures, sides
from ldm.checkpoint import formats
from ldm.data.images import BadImageError
from ldm.errors import UserError
from ldm.pictures import save_drawn, save_png

WIDTH, CLASSES = 16, 7
LARGE = 20_000_000


# ---- figures ----


def gaussian(n, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + 100 * rng.standard_normal(width)


def test_moments_do_not_depend_on_how_rows_are_cut():
    rows = gaussian(101)
    whole, one, other = (metrics.Moments(5) for _ in range(3))
    whole.add(rows.astype(np.float64))
    for start in range(0, 60, 7):
        one.add(rows[start : min(start + 7, 60)])
    other.add(rows[60:61])
    other.add(rows[61:])
    other.add(rows[:0])
    one.merge(other)
    one.merge(metrics.Moments(5))
    for moments in (whole, one):
        assert moments.count == 101
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-13)
        np.testing.assert_allclose(moments.covariance(), np.cov(rows, rowvar=False), rtol=1e-11)


def test_covariance_of_rows_far_from_zero_keeps_its_digits():
    rows = gaussian(500) + 1e6
    moments = metrics.Moments(5)
    for part in np.array_split(rows, 50):
        moments.add(part)
    np.testing.assert_allclose(moments.covariance(), np.cov(rows - 1e6, rowvar=False), rtol=1e-6)


def test_frechet_distance_of_known_gaussians():
    mu, variances = np.array([[0.0, 1, 2], [3, 1, -2]]), np.array([[1.0, 4, 9], [4, 4, 1]])
    expected = 9 + 16 + ((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum()
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]  # the same in any basis
    sigma = [turn @ np.diag(v) @ turn.T for v in variances]
    assert metrics.frechet_distance(turn @ mu[0], sigma[0], turn @ mu[1], sigma[1]) == pytest.approx(expected)


def test_frechet_distance_of_singular_covariances():
    a, b = gaussian(6, 40, 1) / 10, gaussian(9, 40, 2) / 10
    one, other = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    # The square roots of the eigenvalues of S1 S2 are the singular values of the product of the centred rows.
    product = (a - a.mean(0)) @ (b - b.mean(0)).T / np.sqrt((len(a) - 1) * (len(b) - 1))
    root = np.linalg.svd(product, compute_uv=False).sum()
    expected = ((one[0] - other[0]) ** 2).sum() + np.trace(one[1]) + np.trace(other[1]) - 2 * root
    assert metrics.frechet_distance(*one, *other) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(*other, *one) == pytest.approx(expected, rel=1e-10)
    assert metrics.frechet_distance(*one, *one) < 1e-9 * np.trace(one[1])


def test_frechet_distance_of_a_point_is_defined():
    zero, cov = np.zeros((3, 3)), np.diag([1.0, 2, 3])
    assert metrics.frechet_distance(np.zeros(3), zero, np.ones(3), zero) == pytest.approx(3)
    assert metrics.frechet_distance(np.zeros(3), zero, np.zeros(3), cov) == pytest.approx(6)
    assert metrics.frechet_distance(np.zeros(3), cov, np.zeros(3), zero) == pytest.approx(6)


def test_kid_is_its_definition_and_blocks_change_nothing(monkeypatch):
    a, b = gaussian(23, 6, 1) / 50, gaussian(31, 6, 2) / 50

    def k(x, y):
        return (x @ y / 6 + 1) ** 3

    def mean(x, y, same):
        return np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)])

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert metrics.kid(a, b) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "BLOCK", 5)
    assert metrics.kid(a, b) == pytest.approx(expected)


def test_kid_has_an_error_and_no_bias():
    rng = np.random.default_rng(0)
    values = [metrics.kid(rng.standard_normal((50, 8)), rng.standard_normal((50, 8))) for _ in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    a, b = rng.standard_normal((120, 8)), rng.standard_normal((120, 8)) + 0.5
    value, error = metrics.kid_with_error(a, b, 50, 60)
    assert value == metrics.kid(a, b)
    assert 0 < error < value
    assert metrics.kid_with_error(a, b, 50, 10)[1] > error
    assert metrics.kid_with_error(a, b, 3, 1000)[1] == pytest.approx(0, abs=1e-12)  # every subset is everything


def test_inception_score_counts_the_classes():
    sure = 50 * np.eye(4)[np.arange(400) % 4]
    assert metrics.inception_score(sure, 10) == pytest.approx((4, 0))
    assert metrics.inception_score(np.zeros((20, 4)), 10) == pytest.approx((1, 0))
    assert metrics.inception_score(np.repeat(sure[:1], 20, 0), 10) == pytest.approx((1, 0))
    assert np.isfinite(metrics.inception_score(1e5 * sure, 10)).all()  # a class that underflows to nothing


def test_precision_and_recall_of_points_on_a_line(monkeypatch):
    real = np.array([[0.0], [1], [2], [3], [4]])
    generated = np.array([[1.5], [2.5], [30], [31], [32]])
    # With k = 1 real balls have radius 1, generated ones 1 (1.5, 2.5, 30, 31, 32): two of five and 1, 2, 3 of five.
    assert metrics.precision_recall(real, generated, 1) == (0.4, 0.6)
    monkeypatch.setattr(metrics, "BLOCK", 2)
    assert metrics.precision_recall(real, generated, 1) == (0.4, 0.6)
    assert metrics.precision_recall(real, real + 1e3, 3) == (0, 0)


def test_precision_and_recall_of_equal_sets_are_one():
    rows = np.repeat(gaussian(30, 12), 5, 0).astype(np.float32)  # balls of radius 0
    assert metrics.precision_recall(rows, rows[::-1], 3) == (1, 1)


# ---- pictures ----


def test_of_a_runs_folder_what_it_drew_is_taken(tmp_path, caplog):
    samples = tmp_path / "samples"
    samples.mkdir()
    for i in range(3):
        save_drawn(np.zeros((8, 8, 3), np.uint8), samples / f"{i:05}.png", {"prompt": "a"})
    for name in ("grid-00000.png", "samples/sheet.png", "validation/000010.png"):
        save(tmp_path / name)
    (samples / "cut.png").write_bytes(b"")  # for the one who decodes it to report
    drawn = [samples / name for name in ("00000.png", "00001.png", "00002.png", "cut.png")]
    for folder in (tmp_path, samples):
        caplog.clear()
        assert pictures.find_pictures(folder) == drawn
        (line,) = caplog.messages
        assert line.startswith("1 pictures that") and line.endswith("the first: " + str(samples / "sheet.png"))
    record = samples / "prompts.jsonl"
    record.write_text(record.read_text().splitlines()[0])  # the others say themselves how they were drawn
    assert pictures.find_pictures(tmp_path) == drawn
    (samples / "cut.png").unlink()
    for path in drawn[:3]:
        save_png(np.zeros((8, 8, 3), np.uint8), path)
    record.write_text('{"of": "another program"}')
    assert pictures.find_pictures(samples) == [*drawn[:3], samples / "sheet.png"]


@pytest.mark.parametrize(
    ("folders", "name", "advice"),
    [
        (["samples"], "grid-00000.png", "give .*/samples"),
        (["validation"], "loss_curve.png", "give .*/validation"),
        ([], "grid-00012.png", "give a folder without it"),
    ],
)
def test_a_runs_folder_without_a_record_is_refused(tmp_path, folders, name, advice):
    for folder in folders:
        save(tmp_path / folder / "00000.png")
    save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} would count as a picture: {advice}$"):
        pictures.find_pictures(tmp_path)


def test_every_kind_of_picture_is_decoded(tmp_path):
    found = pictures.find_pictures(odd_pictures(tmp_path))
    assert len(found) == 12 == len(set(found))
    shapes = {path.name: pictures.decode(path).shape for path in found}
    assert shapes["turned.JPG"] == (40, 30, 3) and shapes["cmyk.jpg"] == (30, 40, 3) and shapes["dot.bmp"] == (1, 1, 3)
    for kind in ("png", "gif", "webp"):  # the first frame, which WebP does not keep to the bit
        assert np.abs(pictures.decode(tmp_path / f"moving.{kind}")[0, 0].astype(int) - [255, 0, 0]).max() < 4
    sixteen = pictures.decode(tmp_path / "sixteen.png")
    assert 100 < sixteen.mean() < 156  # scaled, not clipped
    for prepare in pictures.RESIZE.values():
        for path in found:
            x = prepare(pictures.decode(path))
            assert x.shape == (3, 299, 299) and x.dtype == np.float32 and x.flags.c_contiguous
            assert -1 <= x.min() <= x.max() <= 1


def test_resizing_keeps_what_it_need_not_change():
    pixels = np.random.default_rng(0).integers(0, 256, (299, 299, 3), np.uint8)
    np.testing.assert_array_equal(pictures.resize_clean(pixels), pixels)
    np.testing.assert_allclose(pictures.resize_legacy(pixels), pixels / np.float32(255), atol=1e-6)
    for size in ((7, 5), (900, 1200)):
        flat = np.full((*size, 3), 77, np.uint8)
        np.testing.assert_allclose(pictures.resize_clean(flat), 77, rtol=1e-5)
        np.testing.assert_allclose(pictures.resize_legacy(flat), 77 / 255, rtol=1e-6)


def test_clean_smooths_what_legacy_skips():
    stripes = np.zeros((299 * 4, 299 * 4, 3), np.uint8)
    stripes[::2] = 255
    assert pictures.resize_clean(stripes)[10:-10].std() < 2
    assert pictures.resize_legacy(stripes).std() < 1e-6  # the two middle rows of four average
    stripes[...] = 0
    stripes[1::4] = 255
    assert pictures.resize_legacy(stripes).mean() == pytest.approx(0.5, abs=1e-3)  # a quarter is white


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        pictures.find_pictures(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    save(tmp_path / ".hidden" / "a.png")
    save(tmp_path / "._a.png")
    with pytest.raises(UserError, match="no picture in"):
        pictures.find_pictures(tmp_path)


def test_unreadable_pictures_are_named(tmp_path):
    whole = save(tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    for name in ("half.png", "text.jpg"):
        with pytest.raises(BadImageError, match=name):
            pictures.decode(tmp_path / name)
    ((batch, count, bad),) = pictures.batches(pictures.find_pictures(tmp_path), 4, pictures.clean)
    assert batch.shape == (4, 3, 299, 299) and count == 1 and len(bad) == 2
    np.testing.assert_array_equal(batch[0], batch[3])


def test_threads_keep_the_order_and_go_no_further_than_asked():
    begun, lock = [], threading.Lock()

    def work(item):
        with lock:
            begun.append(item)
        return item * item

    for taken, (item, future) in enumerate(pictures.ahead(work, range(10_000), 20)):
        assert future.result() == item * item and item == taken
        assert len(begun) <= taken + 21
    assert len(begun) == 10_000
    stopped = pictures.ahead(work, range(10_000), 20)
    next(stopped)
    stopped.close()
    assert len(begun) <= 10_021


# ---- network ----


def random_weights():
    rng = np.random.default_rng(0)
    shapes = inception.file_shapes(inception.Inception())
    tensors = {name: rng.standard_normal(shape, np.float32) * 0.05 for name, shape in shapes.items()}
    return {name: np.abs(array) + 0.5 if "running_var" in name else array for name, array in tensors.items()}


def test_both_published_files_give_the_same_network(tmp_path):
    tensors = random_weights()
    counters = {"Conv2d_1a_3x3.bn.num_batches_tracked": np.zeros((), np.int64)}
    biases = {"fc.bias": np.zeros(inception.CLASSES, np.float32)}
    formats.write(tmp_path / "a.safetensors", tensors | counters | biases, {}, "safetensors")
    theirs = {inception.mindone_name(name): array for name, array in tensors.items() if name != "fc.weight"}
    assert len(theirs) == len(tensors) - 1
    formats.write(tmp_path / "b.ckpt", theirs, {}, "mindspore")

    nets = [inception.Inception(), inception.Inception()]
    checksums = [inception.load(net, tmp_path / name) for net, name in zip(nets, ("a.safetensors", "b.ckpt"))]
    assert checksums[0] == checksums[1]
    for ours, other in zip(nets[0].trainable_params()[:-1], nets[1].trainable_params()[:-1]):  # the last is fc
        np.testing.assert_array_equal(ours.asnumpy(), other.asnumpy())
    features, logits = nets[0](ms.Tensor(np.zeros((1, 3, 299, 299), np.float32)))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    with pytest.raises(UserError, match=r"missing 1 \(first: fc.weight\)"):
        inception.load(nets[1], tmp_path / "b.ckpt", logits=True)


def test_other_inception_networks_are_refused(tmp_path):
    tensors = {name: np.zeros(3, np.float32) for name in ("Conv2d_1a_3x3.conv.weight", "fc.weight")}
    formats.write(tmp_path / "x.safetensors", tensors, {}, "safetensors")
    with pytest.raises(UserError, match="wrong shape 2"):
        inception.load(inception.Inception(), tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("Conv2d_2b_3x3.bn.running_var", "Conv2d_2b.bn.moving_variance"),
        ("Mixed_5c.branch5x5_2.bn.weight", "Mixed_5c.branch1.1.bn.gamma"),
        ("Mixed_6a.branch3x3dbl_3.conv.weight", "Mixed_6a.branch1.2.conv.weight"),
        ("Mixed_6d.branch_pool.bn.bias", "Mixed_6d.branch_pool.1.bn.beta"),
        ("Mixed_6b.branch7x7dbl_5.bn.running_mean", "Mixed_6b.branch2.4.bn.moving_mean"),
        ("Mixed_7a.branch3x3_2.conv.weight", "Mixed_7a.branch0.1.conv.weight"),
        ("Mixed_7b.branch3x3_2a.conv.weight", "Mixed_7b.branch1_a.conv.weight"),
        ("Mixed_7c.branch3x3dbl_3b.conv.weight", "Mixed_7c.branch2_b.conv.weight"),
    ],
)
def test_mindones_names(name, theirs):
    assert inception.mindone_name(name) == theirs


def test_a_norm_is_folded_into_its_convolution():
    rng = np.random.default_rng(0)
    fields = [inception.KERNEL, *inception.NORM]
    arrays = [rng.standard_normal((4, 3, 1, 1)), *rng.standard_normal((3, 4)), rng.uniform(0.1, 2, 4)]
    weight, bias = inception.fold_norm({f"c.{f}": a.astype(np.float32) for f, a in zip(fields, arrays)}, "c")
    x = rng.standard_normal(3)
    kernel, gain, shift, mean, variance = arrays
    expected = gain * (kernel[:, :, 0, 0] @ x - mean) / np.sqrt(variance + 1e-3) + shift
    np.testing.assert_allclose(weight[:, :, 0, 0] @ x + bias, expected, rtol=1e-5, atol=1e-6)


def test_averages_do_not_count_the_padding():
    np.testing.assert_allclose(inception.average()(ms.Tensor(np.ones((1, 2, 5, 5), np.float32))).asnumpy(), 1)
    below_zero = ms.Tensor(np.full((1, 2, 5, 5), -1, np.float32))
    np.testing.assert_array_equal(inception.maximum(1)(below_zero).asnumpy(), -1)


# ---- the command ----


class Small:
    """What stands for the network: a few pixels, mixed."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.to_features, self.to_logits = rng.standard_normal((75, WIDTH)), rng.standard_normal((WIDTH, CLASSES))

    def __call__(self, x):
        step = -(-x.shape[-1] // 5)
        features = np.abs(x.asnumpy()[:, :, ::step, ::step].reshape(len(x), -1) @ self.to_features)
        return ms.Tensor(features, ms.float32), ms.Tensor(features @ self.to_logits, ms.float32)


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command with the stand-in; returns its line of JSON, None where there is none."""
    monkeypatch.setattr(inception, "FEATURES", WIDTH)
    monkeypatch.setattr(inception, "CLASSES", CLASSES)
    monkeypatch.setattr(inception, "Inception", Small)
    monkeypatch.setattr(inception, "load", lambda net, path, logits: "0123abcd")
    monkeypatch.setattr(inception, "find_weights", lambda: Path("stand-in"))

    def run(*words):
        eval_fid.main([str(word) for word in words])
        out = capsys.readouterr().out
        assert out.count("\n") <= 1
        return json.loads(out) if out else None

    return run


@pytest.fixture
def two(tmp_path):
    """Two folders with twelve pictures each."""
    for i in range(12):
        save(tmp_path / "real" / f"a{'x' * i}.png", size=(20 + i, 30))
        save(tmp_path / "gen" / f"gen{'x' * 2 * i}.png", "L", size=(20 + i, 30))
    return tmp_path / "real", tmp_path / "gen"


def test_the_command_gives_all_figures_and_settings(command, two, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    real, gen = two
    words = ["--real_dir", real, "--gen_dir", gen, "--inception_score", "--precision_recall"]
    row = command(*words, "--output", tmp_path / "out" / "row.json")
    assert row == json.loads((tmp_path / "out" / "row.json").read_text())
    assert row["fid"] > 0 and row["kid_std"] > 0 and row["kid_subset_size"] == 6 and row["inception_score"] >= 1
    assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
    assert row["resize"] == "clean" and row["real_count"] == row["gen_count"] == 12 and row["unreadable"] == []
    assert row["weights"] == "stand-in" and row["seed"] == 0 and row["real_dir"] == str(real)
    for words_shown in ("not comparable", "FID (clean)", "KID x 1000", "Inception score", "precision", "recall"):
        assert words_shown in caplog.text

    small = command(*words, "--batch_size", 5)
    assert small.pop("unreadable") == row.pop("unreadable")
    assert small == pytest.approx(row)
    assert "kid" not in command(*words, "--kid", "no")
    assert command(*words, "--resize", "legacy")["fid"] != row["fid"]


@pytest.mark.parametrize("size", [2, 5])
def test_ranks_measure_parts_and_the_first_has_the_whole(command, two, tmp_path, monkeypatch, size):
    real, gen = two
    (gen / "broken.png").write_bytes(b"x")
    words = ["--real_dir", real, "--gen_dir", gen, "--inception_score", "--precision_recall", "--kid", "True"]
    words += ["--output", tmp_path / "row.json", "--save_stats", tmp_path / "real.npz"]
    alone = command(*words)
    with np.load(tmp_path / "real.npz") as file:
        sigma = file["sigma"]

    run_ranks(monkeypatch, size, eval_fid, [str(word) for word in (*words, "--batch_size", 3)])
    together = json.loads((tmp_path / "row.json").read_text())
    assert together.pop("unreadable") == alone.pop("unreadable") != []
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        assert together[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9)), name
    with np.load(tmp_path / "real.npz") as file:
        np.testing.assert_allclose(file["sigma"], sigma, rtol=1e-10, atol=1e-10)
    assert not (tmp_path / "row.json.parts").exists()


def test_equal_folders_have_no_distance(command, two):
    row = command("--real_dir", two[0], "--gen_dir", two[0], "--precision_recall")
    assert row["fid"] < 1e-3 and row["precision"] == row["recall"] == 1 and row["kid"] < row["kid_std"]


def test_a_caption_file_says_which_pictures(command, two, tmp_path):
    real, gen = two
    (real / "img_txt.csv").write_text("dir,text\naxx.png,one\na.png,two\naxx.png,three\n")
    (tmp_path / "part").mkdir()
    for name in ("a.png", "axx.png"):
        (tmp_path / "part" / name).write_bytes((real / name).read_bytes())
    rows = [command("--real_dir", path, "--gen_dir", gen) for path in (real / "img_txt.csv", tmp_path / "part")]
    assert rows[0]["real_count"] == 2 and rows[0]["fid"] == pytest.approx(rows[1]["fid"])
    with pytest.raises(UserError, match="no nothing.csv in data folder"):
        command("--real_dir", real / "nothing.csv", "--gen_dir", gen)


def test_odd_and_broken_pictures(command, two, tmp_path, caplog):
    odd = odd_pictures(tmp_path / "odd")
    (odd / "broken.png").write_bytes(b"\x89PNG")
    row = command("--real_dir", two[0], "--gen_dir", odd)
    assert np.isfinite(row["fid"]) and row["gen_count"] == 12
    assert len(row["unreadable"]) == 1 and "broken.png" in row["unreadable"][0] and "broken.png" in caplog.text


def test_few_pictures_give_what_is_defined(command, two, tmp_path, caplog):
    save(tmp_path / "pair" / "a.png")
    save(tmp_path / "pair" / "bb.png")
    row = command("--real_dir", two[0], "--gen_dir", tmp_path / "pair", "--inception_score", "--precision_recall")
    assert np.isfinite([row["fid"], row["kid"]]).all() and not {"inception_score", "precision"} & row.keys()
    assert "no Inception score" in caplog.text and "no precision and recall" in caplog.text
    (tmp_path / "pair" / "bb.png").unlink()
    with pytest.raises(UserError, match="only one picture"):
        command("--real_dir", two[0], "--gen_dir", tmp_path / "pair")
    (tmp_path / "pair" / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError, match="only 1 of 2 pictures"):
        command("--real_dir", two[0], "--gen_dir", tmp_path / "pair")


def test_ten_thousand_files(command, two, tmp_path, monkeypatch):
    data = save(tmp_path / "one.png", size=(5, 5)).read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(10_000):
        (tmp_path / "many" / f"{i:05}.png").write_bytes(data)
    monkeypatch.setitem(pictures.RESIZE, "clean", lambda picture: np.float32(picture[:5, :5].transpose(2, 0, 1)))
    real = tmp_path / "many"
    row = command("--real_dir", real, "--gen_dir", two[0], "--batch_size", 100, "--kid", "no")
    assert row["real_count"] == 10_000 and np.isfinite(row["fid"])


def test_statistics_are_kept_and_checked(command, two, tmp_path, caplog, monkeypatch):
    real, gen = two
    file = tmp_path / "stats" / "real.npz"
    assert command("--real_dir", real, "--save_stats", file) is None
    kept, direct = command("--real_dir", file, "--gen_dir", gen), command("--real_dir", real, "--gen_dir", gen)
    assert kept["fid"] == pytest.approx(direct["fid"]) and kept["real_count"] == 12 and "kid" not in kept
    with np.load(file) as arrays:
        assert arrays["mu"].shape == (WIDTH,) and arrays["sigma"].shape == (WIDTH, WIDTH)
        np.savez(tmp_path / "theirs.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    caplog.clear()
    theirs = command("--real_dir", tmp_path / "theirs.npz", "--gen_dir", gen, "--resize", "clean")
    assert theirs["fid"] == pytest.approx(direct["fid"]) and theirs["real_count"] is None
    assert "does not say how its pictures were resized" in caplog.text

    with pytest.raises(UserError, match="resize clean, not legacy"):
        command("--real_dir", file, "--gen_dir", gen, "--resize", "legacy")
    with pytest.raises(UserError, match="KID, precision and recall need the pictures"):
        command("--real_dir", file, "--gen_dir", gen, "--kid", "True")
    with pytest.raises(UserError, match="Inception score needs the pictures"):
        command("--real_dir", gen, "--gen_dir", file, "--inception_score")
    monkeypatch.setattr(inception, "load", lambda net, path, logits: "ffffffff")
    with pytest.raises(UserError, match="weights_crc32 0123abcd, not ffffffff"):
        command("--real_dir", file, "--gen_dir", gen)


def test_bad_statistics_are_refused(command, two, tmp_path):
    good = {"mu": np.zeros(WIDTH), "sigma": np.eye(WIDTH)}
    wrong = {
        "holds no statistics": {"mu": good["mu"]},
        "of other features": {"mu": np.zeros(3), "sigma": np.eye(3)},
        "not finite": {**good, "sigma": np.full((WIDTH, WIDTH), np.nan)},
        "mu holds 'object'": {**good, "mu": np.array([{}] * WIDTH, object)},
        "mu holds '<U3'": {**good, "mu": np.full(WIDTH, "1.0")},
        "mu holds 'complex128'": {**good, "mu": np.zeros(WIDTH, complex)},
        "mu holds 'datetime64.*'": {**good, "mu": np.zeros(WIDTH, "datetime64[s]")},
        "sigma holds 'bool'": {**good, "sigma": np.eye(WIDTH, dtype=bool)},
        "version": {**good, "mu": np.zeros(WIDTH, [("x" * 70_000, "f4")])},
    }
    for message, arrays in wrong.items():
        np.savez_compressed(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError, match=message) as caught:
            command("--real_dir", tmp_path / "x.npz", "--gen_dir", two[1])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (tmp_path / "x.npz").write_text("text")
    for path, message in (("x.npz", "cannot read statistics"), ("y.npz", "no file")):
        with pytest.raises(UserError, match=message):
            command("--real_dir", tmp_path / path, "--gen_dir", two[1])


def member(dtype="<f8", shape=(WIDTH,), size=8 * WIDTH):
    """An array's file: a header, and zeros that need not go with it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + bytes(size)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"mu": member(shape=(LARGE,), size=LARGE)}, "of other features: its mu is (20000000,)"),
        ({"mu": member(shape=(10**18, 10**18))}, "of other features"),
        ({"mu": member(shape=(1,) * 900)}, "of other features"),
        ({"mu": member(size=LARGE)}, "size of mu is not that of its numbers"),
        ({"mu": member(size=3)}, "size of mu is not that of its numbers"),
        ({"mu": b"\x93NUMPY\x02\0" + b"\xff" * 4 + b" " * LARGE}, "version"),
        ({"mu": b"\x93NUMPY\x01\0" + b"\xff" * 2 + b"(" * 10**5}, "cannot read"),
        ({"mu": b""}, "cannot read"),
        ({"other": member(shape=(LARGE,), size=LARGE), "words": member(f"<U{LARGE // 4}", (), LARGE)}, None),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_no_more_is_unpacked_than_what_is_wanted(tmp_path, members, told, monkeypatch):
    monkeypatch.setattr(inception, "FEATURES", WIDTH)
    good = {"mu": member(), "sigma": member(shape=(WIDTH, WIDTH), size=8 * WIDTH**2)}
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**good, **members}.items():
            archive.writestr(f"{name}.npy", data)
    tracemalloc.start()
    if told:
        with pytest.raises(UserError) as caught:
            sides.read_statistics(str(tmp_path / "x.npz"))
        assert told in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    else:
        assert sides.read_statistics(str(tmp_path / "x.npz")).settings == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_what_numpy_does_not_write_is_no_statistics_file(tmp_path):
    """A packing that is only unpacked as a whole, and a pipe, which is waited for without end."""
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("mu.npy", member())
        archive.writestr("sigma.npy", member())
    with pytest.raises(UserError, match="holds no statistics.* it has none"):
        sides.read_statistics(str(tmp_path / "lzma.npz"))
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UserError, match="cannot read statistics from .*x.npz: it is no file"):
        sides.read_statistics(str(tmp_path / "x.npz"))


def test_mistakes_are_told_before_anything_is_measured(command, two, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_fid, "compute_statistics", lambda *_: pytest.fail("too late"))
    real, gen = two
    with pytest.raises(UserError, match="give --gen_dir"):
        command("--real_dir", real)
    with pytest.raises(UserError, match="must end in .npz"):
        command("--real_dir", real, "--save_stats", tmp_path / "stats")
    with pytest.raises(UserError, match="batch_size is 0"):
        command("--real_dir", real, "--gen_dir", gen, "--batch_size", 0)
    with pytest.raises(UserError, match="cannot write"):
        command("--real_dir", real, "--gen_dir", gen, "--output", real / "a.png" / "row.json")


def test_missing_weights_say_where_to_get_them(monkeypatch):
    monkeypatch.setattr(inception, "search", lambda path: None)
    with pytest.raises(UserError) as caught:
        inception.find_weights()
    message = str(caught.value)
    assert "\n" not in message and "/models" in message and "--load_checkpoint" in message
    for name in ("pt_inception-2015-12-05-6726825d.pth", "inception_v3_fid-9ec6dfe4.ckpt"):
        assert f"/{name}" in message


def test_weights_that_give_nan_are_told(command, two, monkeypatch):
    monkeypatch.setattr(Small, "__call__", lambda self, x: (ms.Tensor(np.full((len(x), WIDTH), np.nan)),) * 2)
    with pytest.raises(UserError, match="NaN or infinity"):
        command("--real_dir", two[0], "--gen_dir", two[1])
