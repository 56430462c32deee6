"""What the package ought to compute, in float64 NumPy and written for clarity: it imports nothing from the package."""

import functools
import itertools
import math
import statistics

import numpy as np

# Degree 2 k - 1 of the polynomial that replaces the table of b-bit levels, as k coefficients (issue 2, point 3).
COEFFICIENTS = {1: 1, 2: 2, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 8: 6}
MAX_BITS = 8


# Levels of the unit Gaussian.


def _cells(levels):
    """Mass and mean of the unit Gaussian in the cell of each level; levels ascending and odd-symmetric."""
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    half = len(levels) // 2  # the lower half alone, where erfc keeps its precision
    cdf = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges[: half + 1]])
    pdf = np.array([math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges[: half + 1]])
    mass, moment = np.diff(cdf), -np.diff(pdf)
    centroid = moment / mass
    return np.concatenate([mass, mass[::-1]]), np.concatenate([centroid, -centroid[::-1]])


def distortion(levels):
    """Mean squared error of the unit Gaussian coded by the nearest of `levels` (ascending, odd-symmetric)."""
    if len(levels) == 1:
        return 1.0
    mass, centroid = _cells(levels)
    return float(1 + (mass * (levels**2 - 2 * centroid * levels)).sum())


def _settle(levels, step):
    """Levels where `step` comes to rest, by Newton's method."""
    for _ in range(100):
        change = step(levels)
        levels = levels - change
        levels = (levels - levels[::-1]) / 2  # odd to the last bit, as `_cells` takes for granted
        if np.abs(change).max() < 1e-11:
            return levels
    raise AssertionError(f"{len(levels)} levels do not settle")


def _density_of_edges(levels):
    edges = (levels[1:] + levels[:-1]) / 2
    return edges, np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi) / 2


def _step_to_centroids(levels):
    """Newton's step towards levels that are the means of their cells."""
    mass, centroid = _cells(levels)
    edges, density = _density_of_edges(levels)
    below, above = density * (centroid[1:] - edges) / mass[1:], density * (edges - centroid[:-1]) / mass[:-1]
    jacobian = np.diag(1 - np.append(0, below) - np.append(above, 0)) - np.diag(below, -1) - np.diag(above, 1)
    return np.linalg.solve(jacobian, levels - centroid)


@functools.cache
def lloyd_max_levels(bits):
    """The optimal 2^bits levels: each is the mean of its cell (Max 1960, Lloyd 1982)."""
    count = 2**bits
    # Panter & Dite 1951: the optimal density of levels is a Gaussian of variance 3.
    normal = statistics.NormalDist(0, math.sqrt(3))
    return _settle(np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)]), _step_to_centroids)


def _powers(bits):
    t = (2 * np.arange(2**bits) + 1 - 2**bits) / 2**bits
    return t[:, None] ** (2 * np.arange(COEFFICIENTS[bits]) + 1)


def polynomial_step(levels, bits):
    """One of Lloyd's iterations: coefficients of the least-squares polynomial through the cells' means, by mass."""
    mass, centroid = _cells(levels)
    root = np.sqrt(mass)
    return np.linalg.lstsq(_powers(bits) * root[:, None], centroid * root, rcond=None)[0]


@functools.cache
def polynomial_coefficients(bits):
    """c of level = sum_k c_k t^(2k+1), t = (2 code + 1 - 2^b) / 2^b, where `polynomial_step` comes to rest.

    That is where the gradient of the distortion, mass (level - mean of its cell), vanishes in the span of the powers.
    """
    powers = _powers(bits)
    basis = np.linalg.qr(powers)[0]

    def step(levels):
        mass, centroid = _cells(levels)
        pull = _density_of_edges(levels)[1] * np.diff(levels) / 2
        hessian = np.diag(mass - np.append(pull, 0) - np.append(0, pull)) - np.diag(pull, 1) - np.diag(pull, -1)
        return basis @ np.linalg.solve(basis.T @ hessian @ basis, basis.T @ (mass * (levels - centroid)))

    fixed = _settle(powers @ polynomial_step(lloyd_max_levels(bits), bits), step)
    return np.linalg.lstsq(powers, fixed, rcond=None)[0]


@functools.cache
def levels(bits):
    """The 2^bits levels that are really used, ascending; one level, 0, at 0 bits."""
    if bits == 0:
        return np.zeros(1)
    return _powers(bits) @ polynomial_coefficients(bits)


def nearest(z, table):
    """Index of the nearest entry of `table` (ascending) for every number of z; of two equally near, the lower."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, np.asarray(z, dtype=np.float64))


# Rings: the codes of one width in one word, coded together.


def ring_neighbours(codes):
    """j [n, ...] of a ring of codes [n, ...]: 2 (c[k] ^ low(c[k-2])) + low(c[k-1]), k modulo n."""
    n = len(codes)
    low = [c & 1 for c in codes]
    return np.stack([2 * (codes[k] ^ low[(k - 2) % n]) + low[(k - 1) % n] for k in range(n)])


def polynomial(coefficients, count):
    """Values of an odd polynomial at the midpoints of `count` equal parts of (-1, 1)."""
    t = (2 * np.arange(count) + 1 - count) / count
    return sum(c * t ** (2 * k + 1) for k, c in enumerate(coefficients))


def nearest_ring(z, levels):
    """Least squared error of coding z [n] as a ring, by trying every ring of codes; levels [2^(b+1)]."""
    count = len(levels) // 2
    rings = np.array(list(itertools.product(range(count), repeat=len(z)))).T
    return float(((levels[ring_neighbours(rings)] - np.asarray(z, np.float64)[:, None]) ** 2).sum(axis=0).min())


# Spectra.


def participation_ratio(eigenvalues):
    """(sum l)^2 / (d sum l^2)."""
    x = np.asarray(eigenvalues, dtype=np.float64)
    return x.sum() ** 2 / (len(x) * (x**2).sum())


def spectral_gap(eigenvalues):
    """Dimensions before the largest drop, the first on ties."""
    x = [float(v) for v in eigenvalues]
    best, position = -math.inf, 1
    for i in range(len(x) - 1):
        if x[i] - x[i + 1] > best:
            best, position = x[i] - x[i + 1], i + 1
    return position


def costs(eigenvalues):
    """Distortion of each dimension at 0..8 bits, [D, 9]."""
    table = [distortion(levels(b)) for b in range(MAX_BITS + 1)]
    return np.array([[variance * d for d in table] for variance in np.asarray(eigenvalues, dtype=np.float64)])


def water_fill(table, total, min_bits=0, max_bits=MAX_BITS):
    """Widths [N] spending `total` bits on `table` [N, 9]: one bit at a time where it helps most, first on ties."""
    widths = [min_bits] * len(table)
    for _ in range(total - sum(widths)):
        gains = [row[b] - row[b + 1] if b < max_bits else -math.inf for row, b in zip(table, widths, strict=True)]
        widths[gains.index(max(gains))] += 1
    return widths


def best_allocation(table, total, min_bits, max_bits):
    """Lowest cost of any widths that spend `total` bits, by trying all of them."""
    choices = itertools.product(range(min_bits, max_bits + 1), repeat=len(table))
    return min(sum(r[b] for r, b in zip(table, c, strict=True)) for c in choices if sum(c) == total)


def pca(x):
    """(mean [D], eigenvectors as columns [D, D], eigenvalues [D] descending) of vectors [N, D], about their mean."""
    x = np.asarray(x, dtype=np.float64)
    mean = x.mean(axis=0)
    _, singular, vt = np.linalg.svd(x - mean, full_matrices=True)
    eigenvalues = np.zeros(x.shape[1])
    eigenvalues[: len(singular)] = singular**2 / len(x)
    return mean, vt.T, eigenvalues


# The affine quantizer: z = analysisT (x - mean) / sqrt(l), codes are the nearest levels of z.


def encode(x, mean, analysis, eigenvalues, widths):
    """Codes [..., D], one integer per dimension (0 where its width is 0), of vectors [..., D]."""
    z = (np.asarray(x, dtype=np.float64) - mean) @ analysis / np.sqrt(eigenvalues)
    return np.stack([nearest(z[..., i], levels(b)) for i, b in enumerate(widths)], axis=-1)


def decode(codes, mean, analysis, eigenvalues, widths):
    """Vectors [..., D] of codes [..., D]."""
    z = np.stack([levels(b)[codes[..., i]] for i, b in enumerate(widths)], axis=-1)
    return (z * np.sqrt(eigenvalues)) @ np.linalg.inv(analysis) + mean


# The byte layout, from the words of packing.py's docstring.


@functools.cache
def _fullest(counts, order, room):
    """(bits, codes of each width of `order`) of the fullest word, with the most codes of the first width, and so on."""
    if not order:
        return 0, ()
    options = []
    for codes in range(min(counts[0], room // order[0]) + 1):
        bits, others = _fullest(counts[1:], order[1:], room - codes * order[0])
        options.append((codes * order[0] + bits, (codes, *others)))
    return max(options)


def segment_table(widths):
    """Rows (width, shift, first_word, words, slots, first) of one head's layout, word by word."""
    order = (3, 5, 7, 6, 8, 4, 2, 1)
    left, contents = [list(widths).count(b) for b in order], []
    while any(left):
        codes = _fullest(tuple(left), order, 32)[1]
        left = [a - b for a, b in zip(left, codes, strict=True)]
        contents.append(sorted(zip(order, codes, strict=True), reverse=True))
    table, first, first_word = [], 0, 0
    for content, run in itertools.groupby(contents):
        words, shift = len(list(run)), 0
        for width, slots in content:
            if slots:
                table.append((width, shift, first_word, words, slots, first))
                shift, first = shift + width * slots, first + words * slots
        first_word += words
    return table


def words_of(table):
    """Words that a segment table fills."""
    return max((first_word + words for _, _, first_word, words, _, _ in table), default=0)


def read_codes(words, table):
    """Codes in storage order of one token's words [W], read bit by bit."""
    bits = [[(int(word) >> i) & 1 for i in range(32)] for word in words]
    codes = {}
    for width, shift, first_word, count, slots, first in table:
        for slot in range(slots):
            for w in range(count):
                start = shift + slot * width
                field = bits[first_word + w][start : start + width]
                assert len(field) == width, "a code straddles a word"
                codes[first + slot * count + w] = sum(bit << i for i, bit in enumerate(field))
    return [codes[i] for i in range(len(codes))]


def storage_order(widths, table):
    """Dimension of each stored code: a segment takes the lowest dimensions of its width that are still left."""
    left = {b: [i for i, width in enumerate(widths) if width == b] for b in range(1, MAX_BITS + 1)}
    return [left[width].pop(0) for width, _, _, words, slots, _ in table for _ in range(words * slots)]


def unpack(words, widths):
    """Codes [T, D] (0 where the width is 0) of one head's words [W, T]."""
    table = segment_table(widths)
    order = storage_order(widths, table)
    words = np.asarray(words)
    codes = np.zeros((words.shape[1], len(widths)), dtype=np.int64)
    for t in range(words.shape[1]):
        codes[t, order] = read_codes(words[:, t], table)
    return codes


# Attention.


def _additive(mask, queries, tokens):
    """A mask as numbers to add to scores [..., L, T]. "causal" aligns the last query with the last key."""
    if mask is None:
        return np.zeros((queries, tokens))
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"mask {mask!r}")
        allowed = np.arange(queries)[:, None] + (tokens - queries) >= np.arange(tokens)[None]
        return np.where(allowed, 0.0, -np.inf)
    mask = np.asarray(mask)
    return np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask.astype(np.float64)


def attention_weights(q, k, scale, mask=None, sinks=None):
    """Softmax weights [B, Hq, L, T]; they sum to less than 1 when `sinks` [Hq] takes part in the softmax."""
    groups = q.shape[1] // k.shape[1]
    scores = np.einsum("bhld,bhtd->bhlt", q, np.repeat(k, groups, axis=1)) * scale
    scores = scores + _additive(mask, q.shape[2], k.shape[2])
    largest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks, dtype=np.float64).reshape(1, -1, 1, 1)
        largest = np.maximum(largest, sinks)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - largest)
    return weights / total


def attention(q, k, v, scale, mask=None, sinks=None):
    """Softmax attention. q [B, Hq, L, D], k [B, H, T, D], v [B, H, T, Dv] -> [B, Hq, L, Dv].

    Query head i reads key head i // (Hq / H). mask: None, "causal", bool (True is seen) or additive, broadcast to
    [B, Hq, L, T]. sinks [Hq]: a logit per query head that takes weight and gives nothing.
    """
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    weights = attention_weights(q, k, scale, mask, sinks)
    return np.einsum("bhlt,bhtd->bhld", weights, np.repeat(v, q.shape[1] // k.shape[1], axis=1))
