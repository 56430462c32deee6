"""Speculative decoding: rejected guesses are trimmed off, out of the window or out of the codes, and the text stays."""

import mlx_lm
import pytest
from conftest import random_prompt, tiny_model
from mlx_lm.generate import stream_generate

import vq_kvcache
from vq_kvcache import SpectralKVCache
from vq_kvcache.cache import SpectralKVCache as Cache
from vq_kvcache.spectral.sealing import LAG

TOKENS = 120
# One guesses what the model itself would write, the other is always wrong.
DRAFTS = {"itself": 0, "another": 1}


@pytest.fixture(scope="module")
def drafts():
    return {name: tiny_model(seed) for name, seed in DRAFTS.items()}


@pytest.fixture(scope="module")
def texts(model, tokenizer):
    """What mlx-lm writes after prompts of some lengths, one token at a time."""
    return {n: mlx_lm.generate(model, tokenizer, random_prompt(n, n), max_tokens=TOKENS) for n in (3, 300)}


@pytest.fixture
def trims(monkeypatch):
    """(tokens, of them packed) of each trim of a spectral cache."""
    seen, original = [], Cache.trim

    def trim(self, n):
        before = self.stats()["packed_tokens"]
        done = original(self, n)
        seen.append((done, before - self.stats()["packed_tokens"]))
        return done

    monkeypatch.setattr(Cache, "trim", trim)
    return seen


@pytest.mark.parametrize("window", [0, 32])
@pytest.mark.parametrize("length", [3, 300])
@pytest.mark.parametrize("guesses", [4, LAG, 40])
@pytest.mark.parametrize("draft", sorted(DRAFTS))
def test_the_text_is_that_of_one_token_at_a_time(
    model, tokenizer, drafts, texts, trims, draft, guesses, length, window
):
    options = SpectralKVCache.with_options(lossless=True, window=window)
    caches = vq_kvcache.make_prompt_cache(model, cache=options)
    caches += vq_kvcache.make_prompt_cache(drafts[draft], cache=options)  # the draft's too, beyond what hooks would do
    settings = {"draft_model": drafts[draft], "num_draft_tokens": guesses, "max_tokens": TOKENS}
    prompt = random_prompt(length, length)
    responses = list(stream_generate(model, tokenizer, prompt, prompt_cache=caches, **settings))
    assert "".join(r.text for r in responses) == texts[length]
    accepted = sum(r.from_draft for r in responses)
    assert accepted > TOKENS / 3 if draft == "itself" else accepted < TOKENS / 4
    rejected = max(count for count, _ in trims)
    if draft == "another":
        assert rejected == guesses
        # A rollback of the lag never lands in codes; a longer one does, and goes on from there.
        assert (max(packed for _, packed in trims) > 0) is (guesses > window + LAG)
