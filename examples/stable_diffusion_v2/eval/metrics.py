"""Distances between two sets of pictures by their features: FID, KID, Inception score, precision and recall.

All computation is in float64 on the host. Features are rows [N, D]. Large sets may be memory maps in float32, which are
read in blocks.

Eigenvalues and distances are computed by NumPy: its eigh took half the time of scipy.linalg's for 2,048 features, and
distances by one matrix product took a fifth of the time of scipy.spatial's cdist and cKDTree.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import rel_entr, softmax

from ldm.errors import UserError

BLOCK = 2048  # rows that are in memory at once; a matrix of BLOCK x BLOCK distances or kernel values takes 32 MiB


class Moments:
    """Count, mean [D] and covariance [D, D] of rows that come in pieces.

    Pieces are joined by their means and their sums of squared deviations (Chan, Golub and LeVeque, "Updating formulae
    and a pairwise algorithm for computing sample variances", 1979). So the result does not depend on the size of the
    pieces, and the moments of two processes can be merged. It takes the memory of a few [D, D] matrices.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))  # the sum of the outer products of deviations from the mean

    def add(self, rows: np.ndarray) -> None:
        """Take in rows [B, D] of any floating-point type."""
        if len(rows) == 0:
            return
        rows = np.asarray(rows, np.float64)
        mean = rows.mean(0)
        deviations = rows - mean
        self._join(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: Moments) -> None:
        """Take in all rows of `other`."""
        self._join(other.count, other.mean, other.scatter)

    def covariance(self) -> np.ndarray:
        """The unbiased covariance [D, D]; UserError where there are fewer than two rows."""
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

    S1 S2 is not symmetric. With fewer pictures than features it is singular, and its square root by a Schur
    decomposition (scipy.linalg.sqrtm) turns complex. But S1 = R Rᵀ with R of full column rank, and Rᵀ S2 R has the same
    eigenvalues but for zeros and is symmetric. So the trace of the root is the sum of the square roots of these
    eigenvalues. R leaves out the directions in which S1 is zero up to rounding: the square root of a rounding error is
    not small.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(array, np.float64) for array in (mu1, mu2, sigma1, sigma2))
    values, vectors = np.linalg.eigh(sigma1)  # ascending
    kept = values > max(values[-1], 0) * len(values) * np.finfo(np.float64).eps
    root = vectors[:, kept] * np.sqrt(values[kept])  # [D, rank]
    inner = np.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_of_root = np.sqrt(np.maximum(inner, 0)).sum()
    delta = mu1 - mu2
    distance = delta @ delta + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root
    return max(0.0, float(distance))  # rounding can make the distance of equal sets negative


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared maximum mean discrepancy of features [N, D] and [M, D], kernel (x·y / D + 1)³.

    arXiv 1801.01401, section 4: a mean over all pairs, in which no row is paired with itself. So two samples of one
    distribution give about 0, sometimes less. N and M are two at least. Time grows with (N + M)², memory does not.
    """

    def within(x):
        own = sum(_kernel(np.einsum("ij,ij->i", rows, rows), x.shape[1]).sum() for rows in _blocks(x))
        return (_kernel_sum(x, x) - own) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def kid_of_subsets(a: np.ndarray, b: np.ndarray, subsets: int, size: int, rng) -> np.ndarray:
    """The KIDs [subsets] of random subsets of `size` rows each, of features [N, D] and [M, D].

    `rng` is a Generator or a RandomState. For each subset it draws the rows of `a` before those of `b`.
    """
    picks = ((rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(subsets))
    return np.array([kid(a[np.sort(i)], b[np.sort(j)]) for i, j in picks])  # a memory map is read in order


def kid_with_error(a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, rng=None) -> tuple[float, float]:
    """(KID of all rows, standard deviation of the KIDs of random subsets) of features [N, D] and [M, D].

    A subset has `size` rows, or as many as the smaller set has. Let `size` be half of the smaller set at most: larger
    subsets share most rows, and their KIDs differ less than those of independent samples.
    """
    size = min(size, len(a), len(b))
    rng = np.random.default_rng(0) if rng is None else rng
    return kid(a, b), float(np.std(kid_of_subsets(a, b, subsets, size, rng)))


def inception_score(logits: np.ndarray, splits: int = 10, rng=None) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y): (mean, standard deviation) over the splits.

    arXiv 1606.03498, section 4, with logits [N, classes], N >= splits. `rng`, a Generator or a RandomState, shuffles
    the rows before they are split; without it they stay in order.
    """
    order = np.arange(len(logits)) if rng is None else rng.permutation(len(logits))
    scores = []
    for i in range(splits):
        part = np.sort(order[i * len(order) // splits : (i + 1) * len(order) // splits])
        p = softmax(np.asarray(logits[part], np.float64), 1)
        divergence = rel_entr(p, p.mean(0)).sum(1)  # rel_entr is 0 for a class of probability 0
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of features [N, D] and [M, D] (arXiv 1904.06991, equations 1 and 2); N and M exceed k.

    The ball of a real picture has as radius the distance to its k-th nearest real neighbour. Precision is the share of
    generated pictures that lie in the ball of any real picture. Recall is the same with the two sets exchanged. Time
    grows with (N + M)², memory does not.
    """
    precision = _covered(generated, real, _square_radii(real, k))
    recall = _covered(real, generated, _square_radii(generated, k))
    return precision, recall


def _blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), BLOCK):
        yield np.asarray(x[start : start + BLOCK], np.float64)


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    """(x·y / D + 1)³ from x·y. NumPy's third power is some twenty times slower than two products."""
    base = products / width + 1
    return base * base * base


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    return sum(_kernel(p @ q.T, x.shape[1]).sum() for p in _blocks(x) for q in _blocks(y))


def _square_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x|² + |y|² - 2 x·y for rows [N, D] and [M, D]; distances that are only rounding errors are set to zero."""
    scale = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y)
    squares = scale - 2 * x @ y.T
    return np.where(squares > 1e-12 * scale, squares, 0)


def _square_radii(x: np.ndarray, k: int) -> np.ndarray:
    """The squared distance [N] of each row to its k-th nearest other row."""
    out = []
    for rows in _blocks(x):
        nearest = np.full((len(rows), 0), 0.0)
        for others in _blocks(x):  # each row is among the others too, at distance 0
            nearest = np.hstack([nearest, _square_distances(rows, others)])
            nearest = np.partition(nearest, k, 1)[:, : k + 1] if nearest.shape[1] > k + 1 else nearest
        out.append(nearest.max(1))
    return np.concatenate(out)


def _covered(points: np.ndarray, centres: np.ndarray, square_radii: np.ndarray) -> float:
    """The share of points [N, D] that lie within the ball of any of the centres [M, D]."""
    inside = 0
    for rows in _blocks(points):
        hit = np.zeros(len(rows), bool)
        for block, start in zip(_blocks(centres), range(0, len(centres), BLOCK)):
            hit |= (_square_distances(rows, block) <= square_radii[start : start + BLOCK]).any(1)
        inside += hit.sum()
    return float(inside / len(points))
