"""Small models, tokenizers, codecs and caches that the tests share; each test starts and ends with mlx-lm untouched."""

import importlib
import json
import os
import pathlib
import shutil

# The matrices of the tests are small: on a busy machine, threads of OpenBLAS wait for each other for seconds.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if (compiler := shutil.which("g++")) and "VQ_KVCACHE_GXX" not in os.environ:
    os.environ["VQ_KVCACHE_GXX"] = compiler
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(__file__).parent / "compiler"), os.environ["PATH"]])

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import tokenizers
import transformers
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import vq_kvcache
from vq_kvcache import cache as cache_module
from vq_kvcache.cache import LOSSLESS, SpectralKVCache
from vq_kvcache.spectral.bit_allocator import gaussian_costs
from vq_kvcache.spectral.codec import Codec, Transforms, fingerprint, stored_path

VOCABULARY = 97
END = 1  # its embedding is zero, so that greedy text never ends by itself
TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "rms_norm_eps": 1e-5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _untouched(tmp_path, monkeypatch):
    monkeypatch.setenv("VQ_KVCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_module, "_plans", {LOSSLESS.name: LOSSLESS})
    yield
    vq_kvcache.uninstall()


def tiny_config(**changes):
    """The configuration of a llama of 2 layers, 4 query heads and 2 KV heads of 32, in mlx-lm's words."""
    return {**TINY, **changes}


def tiny_model(seed=0, **changes):
    """That llama with random float32 weights, large enough that every token of the context moves its greedy text."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(tiny_config(**changes)))

    def weights(path, array):
        if "norm" in path:
            return array
        if "embed" in path:
            return mx.where(mx.arange(len(array))[:, None] == END, 0.0, mx.random.normal(array.shape))
        return mx.random.normal(array.shape) * (2.0 / array.shape[-1] ** 0.5)

    model.update(tree_map_with_path(weights, model.parameters()))
    mx.eval(model.parameters())
    return model


def tiny_tokenizer():
    """A transformers tokenizer of 97 words: w2 w3 ..., and a word for "unknown" and one for "end"."""
    words = {"<unknown>": 0, "<end>": END, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unknown>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unknown>", eos_token="<end>")


def random_prompt(length, seed=0):
    """Token ids, none of them special."""
    return np.random.default_rng(seed).integers(2, VOCABULARY, length).tolist()


def random_transforms(generator, heads, dims):
    """A random basis with a falling spectrum and a mean larger than it, for each head."""
    bases = [np.linalg.qr(generator.normal(size=(dims, dims)))[0] for _ in range(heads)]
    spectrum = np.tile(4.0 * 0.9 ** np.arange(dims) + 0.01, (heads, 1))
    costs = np.stack([gaussian_costs(variances) for variances in spectrum])
    parts = generator.normal(size=(heads, dims)), np.stack(bases), spectrum, costs, np.ones_like(costs)
    return Transforms(*(part.astype(np.float32) for part in parts))


def random_codec(layers=1, heads=2, key_dims=32, value_dims=None, name="random-model", seed=0):
    """A codec that nobody calibrated: the one place of the tests that builds transforms."""
    generator = np.random.default_rng(seed)
    widths = key_dims, value_dims or key_dims
    pairs = {i: tuple(random_transforms(generator, heads, dims) for dims in widths) for i in range(layers)}
    return Codec(name, pairs, {"objective": "none"})


def like_calibrated(transforms, batch, tokens, seed=0, dtype=mx.float32):
    """Vectors [B, H, T, D] with the mean and the covariance that `transforms` were made for."""
    generator = np.random.default_rng(seed)
    heads, dims = transforms.mean.shape
    z = generator.normal(size=(batch, heads, tokens, dims)) * np.sqrt(transforms.eigenvalues)[:, None]
    return mx.array((z @ np.linalg.inv(transforms.analysis) + transforms.mean[:, None]).astype(np.float32)).astype(
        dtype
    )


def numpy(x):
    return np.array(x.astype(mx.float32))


def pair(count, batch=1, seed=0, heads=2, dims=(32, 32), dtype=mx.float16):
    generator = np.random.default_rng(seed)
    return tuple(
        mx.array(generator.normal(size=(batch, heads, count, d)).astype(np.float32)).astype(dtype) for d in dims
    )


class Feed:
    """The same keys and values for every cache that is fed: the n-th token is always the same."""

    def __init__(self, batch, dims=(32, 24)):
        self.pair = pair(1000, batch, dims=dims)

    def __call__(self, cache, count):
        start = cache.offset
        fetched = cache.update_and_fetch(*(x[:, :, start : start + count] for x in self.pair))
        return tuple(numpy(x) for x in fetched)


PROMPT = random_prompt(300)  # 128 of them are packed behind a window of 128, 192 behind one of 32


def module(name):
    return importlib.import_module(name)  # mlx_lm.generate, as an attribute, is the function


REPLACED = [
    ("mlx_lm.generate", "generate_step"),
    ("mlx_lm.generate", "speculative_generate_step"),
    ("mlx_lm.utils", "load_model"),
    ("mlx.core.fast", "scaled_dot_product_attention"),
    ("mlx_lm.models.cache", "SpectralKVCache"),
    ("mlx_lm.models.cache", "BatchSpectralKVCache"),
]


def symbols():
    """What the hooks replace or add, as it is now."""
    homes = [mx.fast if name == "mlx.core.fast" else module(name) for name, _ in REPLACED]
    return [getattr(home, symbol, None) for home, (_, symbol) in zip(homes, REPLACED, strict=True)]


PRISTINE = symbols()


def kinds(caches):
    return [type(c) for c in caches]


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer():
    return TokenizerWrapper(tiny_tokenizer())


@pytest.fixture(scope="session")
def codec(model):
    """A codec of the tiny model, by fingerprint and shape; its bases are random."""
    return random_codec(layers=2, name=fingerprint(model))


@pytest.fixture
def lossless():
    """Makes caches that store raw bits, window 32 and 4 sinks unless told."""
    return lambda window=32, sinks=4: SpectralKVCache(LOSSLESS, 0, window, sinks)


@pytest.fixture
def packed(codec):
    """Makes caches of 2 bits for layer 0 of the tiny model, window 32 and 4 sinks unless told."""
    return lambda window=32, sinks=4, bits=2.0: SpectralKVCache(
        cache_module.register_plan(codec.plan(bits)), 0, window, sinks
    )


@pytest.fixture
def full():
    """Makes mlx-lm's own caches."""
    return KVCache


@pytest.fixture
def stored_codec(codec):
    """The tiny model's codec in the cache folder, where it is found without a tokenizer."""
    codec.save(stored_path(codec.fingerprint))
    return codec


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    """The tiny model in the layout of a Hugging Face repository."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def full_text(model, tokenizer):
    """The tiny model's own text after PROMPT."""
    return mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=40)
