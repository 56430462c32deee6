"""What tests/fuzz_files.py reads: of each kind of file a whole one, and what its readers are put through.

`exercise` returns what was loaded, and raises whatever a reader raises; `Wrong` says that something loaded which does
not work.
"""

import contextlib
import io
import json
import pathlib
import random

import mlx.core as mx
import mutations
import numpy as np
from conftest import pair, random_codec, random_transforms
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import save_prompt_cache

from vq_kvcache import inspection, library, patching
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.cache import LOSSLESS, SpectralKVCache, register_plan
from vq_kvcache.spectral.calibration_text import Placed
from vq_kvcache.spectral.codec import Codec, CodecError, plan_of_rotations, stored_path
from vq_kvcache.spectral.files import sha256
from vq_kvcache.spectral.fisher import LayerFisher, Setting
from vq_kvcache.spectral.partial import Partial
from vq_kvcache.spectral.rotation_files import RotationFileError, load_cached_rotations, save_rotations
from vq_kvcache.spectral.spectral_quant import SpectralRotation

HEADS, DIMS, WINDOW, SINKS = 2, 8, 4, 2
NAME = "random-model"


class Wrong(Exception):  # noqa: N818  # not an error of what is tested
    """Something loaded that does not work."""


def require(fine, sentence):
    if not fine:
        raise Wrong(sentence)


def finite(*arrays):
    require(all(bool(mx.isfinite(a).all().item()) for a in arrays), "what was loaded gives NaN or infinity")


class Target:
    """One kind of file. files: path below the case's folder -> its bytes; refusals: what its readers may raise."""

    refusals = (CodecError,)

    def __init__(self, folder):
        folder.mkdir()
        self.make(folder)
        self.files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

    def make(self, folder):
        raise NotImplementedError

    def mutate(self, rng):
        """Path -> other bytes, or a function that puts something else there."""
        name = rng.choice(list(self.files))
        if rng.random() < 0.02:
            return {name: mutations.place}
        return {name: self.mutated(rng, name)}

    def mutated(self, rng, name):
        return mutations.safetensors(rng, self.files[name])


class CodecFile(Target):
    refusals = (CodecError, ValueError)  # bits_for and plan say ValueError

    def make(self, folder):
        codec = random_codec(2, HEADS, DIMS, name=NAME)
        codec.provenance.update(costs="nats", sequence_length=64, window=8, sinks=2)
        codec.save(folder / f"{NAME}.safetensors")

    def exercise(self, folder, rng):
        path = folder / f"{NAME}.safetensors"
        if rng.random() < 0.2:
            self._as_library(path)
        codec = Codec.load(path)
        json.dumps(codec.provenance)
        bits = rng.choice([0.25, 1.0, 2.0, 8.0, (3.0, 1.0)])
        if codec.in_nats:
            require(np.isfinite(codec.predicted_kl(bits)), "a codec predicts NaN")
            with contextlib.suppress(ValueError):
                codec.bits_for(0.01)
        for layer in codec.plan(bits).layers.values():
            for quantizer in (layer.keys, layer.values):
                if quantizer is not None:
                    x = mx.array(
                        np.random.default_rng(0).normal(size=(1, quantizer.layout.heads, 3, quantizer.head_dim))
                    )
                    finite(quantizer.decode_words(quantizer.encode_words(x)))
        inspection.table(inspection.inspect(str(path)))
        return True

    @staticmethod
    def _as_library(path):
        with contextlib.redirect_stdout(io.StringIO()):
            library.show()
            library.take(path, force=True)
            library.show()


class Rotations(Target):
    refusals = (RotationFileError, CodecError, ValueError)  # a quantizer says ValueError

    def make(self, folder):
        save_rotations([random_rotation(i, random_rotation(i + 10)) for i in range(2)], folder)

    def mutate(self, rng):
        """A manifest that is changed in itself, or that vouches for an array that is."""
        name = rng.choice(list(self.files))
        if rng.random() < 0.03:
            return {name: mutations.place}
        manifest = json.loads(self.files["manifest.json"])
        if name == "manifest.json" or rng.random() < 0.3:
            return {"manifest.json": mutations.as_json(rng, mutations.tree(rng, manifest))}
        changed = mutations.npy(rng, self.files[name])
        if rng.random() < 0.1:
            return {name: changed}
        vouched = json.dumps(manifest).replace(sha256(self.files[name]), sha256(changed))
        with contextlib.suppress(Exception):  # what NumPy makes of it is not asked here
            if rng.random() < 0.5:
                array = np.load(io.BytesIO(changed), allow_pickle=False)
                for entry in (*manifest["rotations"], *(e["values"] for e in manifest["rotations"])):
                    for described in entry["arrays"].values():
                        if described["file"] == name:
                            described.update(shape=list(array.shape), sha256=sha256(changed))
                vouched = json.dumps(manifest)
        return {name: changed, "manifest.json": vouched.encode()}

    def exercise(self, folder, rng):
        found = load_cached_rotations(folder)
        for rotation in found:
            json.dumps(rotation.layer_name)
        plan = plan_of_rotations(found, dict.fromkeys(range(len(found)), HEADS), 4, 1, rng.random() < 0.5)
        for layer in plan.layers.values():
            for quantizer in (layer.keys, layer.values):
                if quantizer is not None:
                    x = mx.ones((1, HEADS, 3, quantizer.head_dim))
                    finite(quantizer.decode_words(quantizer.encode_words(x)))
        return bool(found)


class Archive(Rotations):
    """veloxquant_mlx's."""

    def make(self, folder):
        arrays = {}
        for i in range(2):
            for part in ("key", "val"):
                rotation = random_rotation(i)
                arrays[f"layer_{i}_{part}_U"] = np.array(rotation.rotation_matrix)
                arrays[f"layer_{i}_{part}_ev"] = np.array(rotation.eigenvalues)
        np.savez(folder / "rotations.npz", **arrays)

    def mutate(self, rng):
        if rng.random() < 0.02:
            return {"rotations.npz": mutations.place}
        return {"rotations.npz": mutations.npz(rng, self.files["rotations.npz"])}


def random_rotation(seed, values=None):
    made = random_transforms(np.random.default_rng(seed), 1, DIMS)
    arrays = (mx.array(a[0]) for a in (made.analysis, made.eigenvalues, made.mean))
    matrix, eigenvalues, mean = arrays
    return SpectralRotation(matrix, eigenvalues, DIMS, f"layers.{seed % 10}", mean, values)


class PromptCache(Target):
    """One sequence, of 2 bits and lossless."""

    refusals = (ValueError,)  # CodecError is one

    def make(self, folder):
        self.plan = register_plan(random_codec(2, HEADS, DIMS, name=NAME).plan(2.0))
        caches = [SpectralKVCache(self.plan, 0, WINDOW, SINKS), SpectralKVCache(LOSSLESS, 1, WINDOW, SINKS)]
        for cache, count in zip(caches, (150, 100), strict=True):
            cache.update_and_fetch(*pair(count, 1, dims=(DIMS, DIMS)))
        self.save(folder, caches)

    def save(self, folder, caches):
        save_prompt_cache(str(folder / "saved.safetensors"), caches, {"model": "tiny", "chat_template": "None"})

    def mutated(self, rng, name):
        texts = [n for n in mutations.split_safetensors(self.files[name])[0] if n.endswith(".0")]
        return mutations.safetensors(rng, self.files[name], texts)

    def exercise(self, folder, rng):
        path = str(folder / "saved.safetensors")
        if not (folder / "saved.safetensors").is_dir():  # which would be a model's
            inspection.table(inspection.inspect(path))
        caches, _ = mlx_lm_cache.load_prompt_cache(path, return_metadata=True)
        own = [c for c in caches if isinstance(c, SpectralKVCache | BatchSpectralKVCache)]
        for cache in own:
            self.use(cache, rng)
        return bool(own)

    @staticmethod
    def use(cache, rng):
        """Read it, go on with it, cut it."""
        batch = isinstance(cache, BatchSpectralKVCache)
        rows, dims, dtype = (len(cache._left_padding) if batch else 1), (DIMS, DIMS), mx.float16
        if not cache.empty():
            require(cache.nbytes == sum(a.nbytes for a in cache._storage.arrays), "nbytes are not those of the arrays")
            dims, dtype = (cache.keys.shape[3], cache.values.shape[3]), cache.keys.dtype
            rows = cache.keys.shape[0]
            PromptCache.fetch(cache, cache.keys_and_values(), dtype)
        heads = HEADS if cache.empty() else cache.keys.shape[1]
        for count in (1, rng.choice([2, 90])):
            keys, values = pair(count, rows, heads=heads, dims=dims, dtype=dtype)
            mask = cache.make_mask(count, return_array=False, window_size=None)
            PromptCache.fetch(cache, cache.update_and_fetch(keys, values), dtype, count, mask)
        cache.trim(rng.choice([1, 30, 10_000]))
        PromptCache.fetch(cache, cache.update_and_fetch(*pair(1, rows, heads=heads, dims=dims, dtype=dtype)), dtype)

    @staticmethod
    def fetch(cache, fetched, dtype, count=1, mask=None):
        keys, values = fetched
        queries = mx.ones((keys.shape[0], keys.shape[1], count, keys.shape[3]), dtype)
        out = mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.3, mask=mask)
        mx.eval(out)
        if not isinstance(cache, BatchSpectralKVCache) and cache._plan is not LOSSLESS:
            finite(out, mx.array(keys) + 0, mx.array(values) + 0)  # raw bits may be any


class BatchPromptCache(PromptCache):
    """Rows of different lengths."""

    def save(self, folder, caches):
        batches = []
        for cache in caches:
            plan = cache._plan
            others = [SpectralKVCache(plan, cache._layer, WINDOW, SINKS) for _ in range(2)]
            others[1].update_and_fetch(*pair(20, 1, seed=2, dims=(DIMS, DIMS)))
            batches.append(BatchSpectralKVCache.merge([cache, *others]))
        super().save(folder, batches)


class Unfinished(Target):
    """A calibration that was interrupted: resumed as it was, or begun anew."""

    refusals = ()

    def make(self, folder):
        generator = np.random.default_rng(0)
        self.partial = Partial(NAME, [Placed(mx.arange(8), 0)], Setting(4, 2, 0))
        self.partial.folder, self.partial._saved_at = folder, -1e9
        statistics = {i: (LayerFisher(), LayerFisher()) for i in range(2)}
        for n in range(3):
            for part in (p for layer in statistics.values() for p in layer):
                x, g = (mx.array(generator.normal(size=(1, HEADS, 6, DIMS)).astype(np.float32)) for _ in range(2))
                part.update(x, g, n, keep=True)
        self.partial.save(statistics, 3)
        self.sums = self.digest(*self.partial.load())

    @staticmethod
    def digest(statistics, done):
        arrays = [str(done).encode()]
        for layer in statistics.values():
            for part in layer:
                arrays += [np.array(part.vectors.covariance).tobytes(), part.metric.tobytes()]
                arrays += [np.array(a).tobytes() for pair_ in part.kept for a in pair_]
        return sha256(b"".join(arrays))

    def mutated(self, rng, name):
        data = self.files[name]
        return mutations.flipped(rng, data) if rng.random() < 0.3 else data[:64] + mutations.safetensors(rng, data[64:])

    def exercise(self, folder, rng):
        self.partial.folder = folder
        statistics, done = self.partial.load()
        if done or statistics:
            require(self.digest(statistics, done) == self.sums, "a calibration goes on from other sums than it left")
        return bool(done)


PATCH = """diff --git a/mlx_lm/one.py b/mlx_lm/one.py
index {old}..{new} 100644
--- a/mlx_lm/one.py
+++ b/mlx_lm/one.py
@@ -2,3 +2,4 @@
 line 2
-line 3
+line three
+line three and a half
 line 4
"""


class Patched(Target):
    """An mlx-lm with a patch on it, its backup, and the patch itself."""

    refusals = (patching.PatchError,)

    def make(self, folder):
        self.released = "".join(f"line {i}\n" for i in range(1, 21)).encode()
        self.changed = self.released.replace(b"line 3\n", b"line three\nline three and a half\n")
        ids = (patching._blob_id(text)[:10] for text in (self.released, self.changed))
        (folder / "one.py").write_bytes(self.changed)
        (folder / f"one.py{patching.BACKUP_SUFFIX}").write_bytes(self.released)
        (folder / "_version.py").write_text("__version__ = '9.9'\n")
        (folder / "patch").write_text(PATCH.format(old=next(ids), new=next(ids)))
        self.patch = PATCH
        patching.available_patches = lambda: {"9.9": self.now / "patch"}

    def mutated(self, rng, name):
        return mutations.text(rng, self.files[name])

    def mutate(self, rng):
        changed = super().mutate(rng)
        if rng.random() < 0.4:  # a clean one
            changed = {"one.py": self.released, f"one.py{patching.BACKUP_SUFFIX}": None, **changed}
        return changed

    def exercise(self, folder, rng):
        self.now, one = folder, folder / "one.py"
        before = one.read_bytes() if one.is_file() else None
        try:
            patching.check(folder)
        except patching.PatchError:
            for action in (patching.apply, patching.revert):
                with contextlib.suppress(patching.PatchError):
                    action(folder)
            if (folder / "patch").is_file() and (folder / "patch").read_bytes() == self.files["patch"]:
                now = one.read_bytes() if one.is_file() else None
                require(now in (before, self.released, self.changed), "a file was written that is neither")
            raise
        patching.apply(folder)
        patching.revert(folder)
        if (folder / "patch").read_bytes() == self.files["patch"]:
            require(one.read_bytes() == self.released, "reverted is not as released")
        return True


TARGETS = {
    "codec": CodecFile, "rotations": Rotations, "archive": Archive, "prompt cache": PromptCache,
    "batch prompt cache": BatchPromptCache, "partial calibration": Unfinished, "patch": Patched,
}  # fmt: skip


def library_path():
    """Where the fuzzed codec is found by its model."""
    return pathlib.Path(stored_path(NAME))


def case_random(seed, index):
    """The numbers of one case, whatever ran before it."""
    return random.Random(f"{seed}/{index}")
