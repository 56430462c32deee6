"""Random sequences of cache operations: `python tests/random_operations.py --cases 10000 --seed 0 --out FILE`.

Each is done to mlx-lm's class and to the lossless spectral one; after every step both must show the same arrays, masks
and numbers. Half are of one sequence (append, trim, copy, save and load, state, a batch and back), half are of batches
(prompts padded on either side, steps, trim, filter, extend, extract and merge, copy, state). A finding prints the case
that repeats it: `--seed S --case N`. Exit status 1 when there is any.
"""

import collections
import copy
import pathlib
import random
import sys
import tempfile

import mlx.core as mx
import numpy as np
from many_cases import Cases
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache
from test_contract_batch import DIMS, HEADS, Twins, tokens_of

import vq_kvcache
from vq_kvcache.cache import LOSSLESS, SpectralKVCache

LONGEST = 700  # tokens of a sequence
COUNTS = (0, 1, 2, 15, 16, 17, 63, 64, 100, 200)


class Pair:
    """One sequence in both classes."""

    def __init__(self, rng, folder):
        self.window, self.sinks = rng.choice([0, 1, 32, 128]), rng.choice([0, 1, 4])
        self.caches = [SpectralKVCache(LOSSLESS, 0, self.window, self.sinks), KVCache()]
        self.folder, self.length, self.saves = folder, 0, 0
        self.dtype = rng.choice([mx.float32, mx.float16, mx.bfloat16])

    def append(self, rng):
        count = 1 if rng.random() < 0.3 else max(rng.choice(COUNTS), 1)
        for _ in range(rng.choice([1, 1, 20]) if count == 1 else 1):
            if self.length + count <= LONGEST:
                self._append(count, rng.choice([None, 5]))

    def _append(self, count, window_size):
        start, end = self.length, self.length + count
        queries, keys, values = (mx.array(x[None, :, start:end]).astype(self.dtype) for x in tokens_of(0))
        shown = []
        for cache in self.caches:
            mask = cache.make_mask(count, return_array=count > 1, window_size=window_size)
            fetched = cache.update_and_fetch(keys, values)
            out = mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.25, mask=mask)
            same = mask if isinstance(mask, mx.array) else mx.array(mask is None)
            shown.append([same, *fetched, out])
        self.length = end
        for mine, theirs in zip(shown[0][:3], shown[1][:3], strict=True):
            equal(mine, theirs)
        tolerance = 1e-5 if self.dtype == mx.float32 else 3e-2
        np.testing.assert_allclose(*(as_numpy(s[3]) for s in shown), atol=tolerance, rtol=tolerance)

    def trim(self, rng):
        count = rng.choice([*COUNTS, 10_000])
        assert [c.trim(count) for c in self.caches] == [min(count, self.length)] * 2
        self.length -= min(count, self.length)

    def copied(self, rng):
        self.caches = copy.deepcopy(self.caches)

    def saved(self, rng):
        if not self.length:  # of which mlx-lm has no keys to give back
            return
        self.saves += 1  # mlx-lm's class reads its arrays later: each time another file
        names = [str(self.folder / f"{name}.safetensors") for name in ("ours", f"theirs-{self.saves}")]
        for i, (cache, name) in enumerate(zip(self.caches, names, strict=True)):
            mlx_lm_cache.save_prompt_cache(name, [cache])
            self.caches[i] = mlx_lm_cache.load_prompt_cache(name)[0]
        mx.eval(self.caches[1].state)

    def state(self, rng):
        if self.length:
            for i, cache in enumerate(self.caches):
                state, other = cache.state, copy.deepcopy(cache)
                other.trim(rng.choice(COUNTS))
                other.state = state
                self.caches[i] = other

    def batched(self, rng):
        """Into a batch with another sequence, and out of it."""
        if self.length:
            self.caches[0] = SpectralKVCache.merge([self.caches[0], copy.deepcopy(self.caches[0])]).extract(1)

    def converted(self, rng):
        kv = self.caches[0].to_kvcache()
        if self.length:
            self.caches[0] = SpectralKVCache.from_cache(kv, self.caches[0])

    def check(self):
        ours, theirs = self.caches
        assert type(ours) is SpectralKVCache
        assert ours.offset == theirs.offset == ours.size() == theirs.size() == self.length
        arrays = [] if ours.empty() else ours._storage.arrays
        assert ours.nbytes == sum(a.nbytes for a in arrays)
        if self.length:
            for mine, other in zip(ours.keys_and_values(), (theirs.keys, theirs.values), strict=True):
                equal(mine, other[:, :, : self.length])
            ours._storage.check()


SINGLE = ("append", "append", "append", "trim", "copied", "saved", "state", "batched", "converted")
BATCH = ("prompt", "prompt", "step", "step", "trim", "filter", "extend", "copy", "saved", "remade")


def as_numpy(x):
    return np.array(mx.array(x).astype(mx.float32))


def equal(mine, theirs):
    assert mine.dtype == theirs.dtype
    np.testing.assert_array_equal(as_numpy(mine), as_numpy(theirs))


def one_sequence(rng, folder, did):
    twins = Pair(rng, folder)
    for _ in range(rng.randint(4, 12)):
        name = rng.choice(SINGLE)
        did.append(name)
        getattr(twins, name)(rng)
        twins.check()


def many_sequences(rng, folder, did):
    rows = rng.randint(1, 3)
    if rng.random() < 0.2:
        padding = [rng.choice([0, 2, 40]) for _ in range(rows)]
        did.append(f"left padding {padding}")
        twins = Twins.padded(range(rows), padding)
        width = max(padding) + rng.choice([1, 30, 150])
        twins.left_padded([width - n for n in padding])
    else:
        begin = [rng.choice(COUNTS) for _ in range(rows)]
        did.append(f"merge {begin}")
        twins = Twins.merged(range(rows), begin)
    for _ in range(rng.randint(2, 7)):
        name = rng.choice(BATCH)
        did.append(name)
        twins = changed(twins, name, rng) or twins


def changed(twins, name, rng):
    rows, longest = len(twins.sequences), max(twins.lengths)
    if name == "prompt":
        counts = [rng.choice(COUNTS) for _ in range(rows)]
        if max(counts) and longest < LONGEST:
            twins.prompt(counts, rng.choice([4, 64, 2048]) if max(counts) < 64 else rng.choice([64, 2048]))
    elif name == "step" and longest < LONGEST:
        twins.step(rng.choice([1, 3, 40]))
    elif name == "trim":
        twins.trim(rng.choice(COUNTS))
    elif name == "filter":
        twins.filter(rng.sample(range(rows), rng.randint(1, rows)))
    elif name == "extend" and rows < 5:
        counts = [rng.choice(COUNTS) for _ in range(rng.randint(1, 2))]
        twins.extend(Twins.merged(range(rows, rows + len(counts)), counts))
    elif name in ("copy", "saved", "remade"):
        return getattr(twins, name)()
    return None


def run_case(seed, index, folder):
    """The operations of one case, and what was wrong or None."""
    rng, did = random.Random(f"{seed}/{index}"), []
    try:
        (one_sequence if index % 2 else many_sequences)(rng, folder, did)
    except Exception as error:  # whatever differs, or fails
        return did, " ".join(f"after {did}: {type(error).__name__}: {error}".split())[:600]
    return did, None


def main():
    """Run the cases; returns the exit status."""
    cases, operations = Cases(__doc__, "sequence"), collections.Counter()
    with tempfile.TemporaryDirectory() as name, vq_kvcache.install():
        for case in cases:
            did, wrong = run_case(cases.seed, case, pathlib.Path(name))
            operations.update(step.split(" ")[0] for step in did)
            if wrong:
                cases.found(case, wrong)
    by_operation = dict(sorted(operations.items()))
    return cases.finish(operations=operations.total(), by_operation=by_operation, heads=HEADS, dims=DIMS)


if __name__ == "__main__":
    sys.exit(main())
