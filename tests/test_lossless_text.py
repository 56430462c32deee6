"""Without the quantizer, the shipped model writes what it writes with mlx-lm's own cache, token for token."""

import importlib.resources

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from vq_kvcache import SpectralKVCache, stream_generate
from vq_kvcache import cache as cache_module
from vq_kvcache.attention import attend_reference
from vq_kvcache.demo import model_folder

LENGTHS = (1, 2, 127, 128, 129, 300, 2000)
TOKENS = 200
LOSSLESS = SpectralKVCache.with_options(lossless=True)
ULPS = 2


@pytest.fixture(scope="module")
def prompt():
    tokenizer = mlx_lm.load(str(model_folder()))[1]
    text = (importlib.resources.files("vq_kvcache") / "data" / "demo.txt").read_text("utf-8")
    return tokenizer.encode(text)


class Writer:
    """The shipped model in one dtype, and what it writes after prompts of several lengths."""

    def __init__(self, dtype, prompt):
        self.model, self.tokenizer = mlx_lm.load(str(model_folder()))[:2]
        self.tokenizer.eos_token_ids = set()  # so that every text has all its tokens
        self.model.set_dtype(dtype)
        self._prompt, self._known = prompt, {}

    def greedy(self, length, cache):
        """The TOKENS most likely tokens after the first `length` of the prompt."""
        ids = self._prompt[:length]
        responses = stream_generate(self.model, self.tokenizer, ids, cache=cache, max_tokens=TOKENS + 1)
        return [r.token for r in responses][:TOKENS]

    def expected(self, length):
        """`greedy` with mlx-lm's own cache."""
        if length not in self._known:
            self._known[length] = self.greedy(length, KVCache)
        return self._known[length]

    def gap_in_ulps(self, length, tokens):
        """Between the two best logits that mlx-lm's own cache gives after the prompt and `tokens`."""
        ids = mx.array(self._prompt[:length] + tokens)[None]
        caches = make_prompt_cache(self.model)
        mx.eval(self.model(ids[:, :-1], cache=caches))
        second, best = np.sort(np.array(self.model(ids[:, -1:], cache=caches)[0, -1]))[-2:]
        return float(best - second) / float(np.spacing(best))


@pytest.fixture(scope="module")
def half(prompt):
    return Writer(mx.float16, prompt)


@pytest.fixture(scope="module")
def single(prompt):
    return Writer(mx.float32, prompt)


@pytest.mark.parametrize("length", LENGTHS)
def test_decoding_everything_gives_the_same_text_in_the_models_own_float16(half, length, monkeypatch):
    monkeypatch.setattr(cache_module, "attend", attend_reference)
    assert half.greedy(length, LOSSLESS) == half.expected(length)


@pytest.mark.parametrize("length", LENGTHS)
def test_attending_to_the_packed_part_gives_the_same_text_in_float32(single, length):
    assert single.greedy(length, LOSSLESS) == single.expected(length)


@pytest.mark.parametrize("length", LENGTHS)
def test_attending_in_float16_differs_first_only_where_the_best_logits_tie(half, length):
    ours, theirs = half.greedy(length, LOSSLESS), half.expected(length)
    assert len(ours) == len(theirs) == TOKENS
    differing = [i for i in range(TOKENS) if ours[i] != theirs[i]]
    if differing:
        assert half.gap_in_ulps(length, theirs[: differing[0]]) <= ULPS
