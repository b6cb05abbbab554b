"""Distances between two sets of pictures by their features: FID, KID, Inception score, precision and recall; PSNR.

Only NumPy, in float64. Features are rows, [N, D]; large sets may be memory maps in float32, they are read in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ldm.errors import UserError

BLOCK = 2048  # rows looked at at once; a matrix of BLOCK x BLOCK distances or kernel values takes 32 MiB


class Moments:
    """Count, mean [D] and covariance [D, D] of rows that come in pieces.

    Pieces are joined by their means and their sums of squared deviations (Chan, Golub and LeVeque, "Updating formulae
    and a pairwise algorithm for computing sample variances", 1979), so the result does not depend on how the rows were
    cut, and two halves counted in two places can be merged. The memory is that of a few [D, D] matrices.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # the sum of the outer products of deviations from the mean

    def add(self, rows: np.ndarray) -> None:
        """Takes in rows [B, D] of any floating-point type."""
        if len(rows) == 0:
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        deviations = rows - mean
        self._join(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> None:
        """Takes in all that `other` has seen."""
        self._join(other.count, other.mean, other.scatter)

    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]; UserError for fewer than two rows, which have none."""
        if self.count < 2:
            raise UserError(f"a covariance needs two pictures at least; there is {self.count}")
        return self.scatter / (self.count - 1)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(delta, delta * (self.count * count / total))
        self.mean = self.mean + delta * (count / total)
        self.count = total


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)) for means [D] and covariances [D, D] (arXiv 1706.08500, eq. 6).

    S1 S2 is not symmetric, and its square root by a Schur decomposition turns complex where it is singular, as it is
    for fewer pictures than features. But S1^(1/2) S2 S1^(1/2) has the same eigenvalues and is symmetric and positive:
    the trace wanted is the sum of their square roots. With S1 = R Rᵀ, R of full column rank, Rᵀ S2 R has them too,
    without the directions in which S1 is zero but for rounding, whose square roots would not be small.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(array, np.float64) for array in (mu1, mu2, sigma1, sigma2))
    values, vectors = np.linalg.eigh(sigma1)  # ascending
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])  # [D, rank]
    inner = np.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(np.maximum(inner, 0)).sum()
    delta = mu1 - mu2
    distance = delta @ delta + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))  # rounding may leave equal sets just below


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of features [N, D] and [M, D], kernel (x·y / D + 1)³.

    arXiv 1801.01401, section 4: the mean over all pairs, without a row's pair with itself; so two draws of one source
    give about 0, sometimes less. N and M are two at least. Time grows with (N + M)², memory does not.
    """

    def within(x):
        own = sum(_kernel(np.einsum("ij,ij->i", rows, rows), x.shape[1]).sum() for rows in _blocks(x))
        return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def kid_of_subsets(a: np.ndarray, b: np.ndarray, subsets: int, size: int, rng) -> np.ndarray:
    """The KID [subsets] of random subsets of `size` rows each, of features [N, D] and [M, D].

    `rng` is a Generator or a RandomState; of each subset, the rows of `a` are drawn first.
    """
    picks = ((rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(subsets))
    return np.array([kid(a[np.sort(i)], b[np.sort(j)]) for i, j in picks])  # a memory map is read in order


def kid_with_error(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, rng=None) -> tuple[float, float]:
    """(KID of all, standard deviation of the KIDs of random subsets) of features [N, D] and [M, D].

    Subsets have `size` rows, or all of the smaller set where that has fewer. Subsets that are nearly the whole set
    differ less than two draws of that many pictures would: let `size` be half of it at most.
    """
    size = min(size, len(a), len(b))
    rng = np.random.default_rng(0) if rng is None else rng
    return kid(a, b), float(np.std(kid_of_subsets(a, b, subsets, size, rng)))


def inception_score(logits: np.ndarray, splits: int = 10, rng=None) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y): (mean, standard deviation) over the splits.

    arXiv 1606.03498, section 4, with logits [N, classes], N >= splits. The rows are shuffled by `rng`, a Generator or a
    RandomState, before they are split; without one they stay in order.
    """
    order = np.arange(len(logits)) if rng is None else rng.permutation(len(logits))
    scores = []
    for i in range(splits):
        part = np.sort(order[i * len(order) // splits : (i + 1) * len(order) // splits])
        x = np.asarray(logits[part], np.float64)
        x -= x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        with np.errstate(divide="ignore", invalid="ignore"):  # a class that no picture has adds 0, not 0 * inf
            divergence = np.where(p > 0, p * (log_p - np.log(p.mean(0))), 0)
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of features [N, D] and [M, D] (arXiv 1904.06991, equations 1 and 2); N and M exceed k.

    Precision is the share of generated pictures that lie in a real picture's ball, whose radius is the distance to its
    k-th nearest real neighbour; recall is the share of real pictures in the balls of generated ones. Time grows with
    (N + M)², memory does not.
    """
    precision = _covered(generated, real, _square_radii(real, k))
    recall = _covered(real, generated, _square_radii(generated, k))
    return precision, recall


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), BLOCK):
        yield np.asarray(x[start : start + BLOCK], np.float64)


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    """(x·y / D + 1)³ from x·y; by products, since NumPy's third power is some twenty times slower."""
    base = products / width + 1
    return base * base * base


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    return sum(_kernel(p @ q.T, x.shape[1]).sum() for p in _blocks(x) for q in _blocks(y))


def _square_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x|² + |y|² - 2 x·y for rows [N, D] and [M, D]; what only rounding keeps from zero is zero."""
    scale = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    squares = scale - 2 * x @ y.T
    return np.where(squares > 1e-12 * scale, squares, 0)


def _square_radii(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance [N] of each row to its k-th nearest other row."""
    out = []
    for rows in _blocks(x):
        nearest = np.full((len(rows), 0), 0.0)
        for others in _blocks(x):  # the row itself is among them, at distance 0
            nearest = np.hstack([nearest, _square_distances(rows, others)])
            nearest = np.partition(nearest, k, 1)[:, : k + 1] if nearest.shape[1] > k + 1 else nearest
        out.append(nearest.max(1))
    return np.concatenate(out)


def _covered(points: np.ndarray, centres: np.ndarray, square_radii: np.ndarray) -> float:
    """The share of points [N, D] that lie within any ball around centres [M, D]."""
    inside = 0
    for rows in _blocks(points):
        hit = np.zeros(len(rows), bool)
        for block, start in zip(_blocks(centres), range(0, len(centres), BLOCK)):
            hit |= (_square_distances(rows, block) <= square_radii[start : start + BLOCK]).any(1)
        inside += hit.sum()
    return float(inside / len(points))
