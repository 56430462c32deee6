"""What mlx-lm's store of prompts gives back with the hook on: a prompt cut within its codes has a window again."""

import mlx.core as mx
import pytest
from conftest import random_prompt
from mlx_lm.models.cache import LRUPromptCache

import vq_kvcache
from vq_kvcache import SpectralKVCache
from vq_kvcache.cache import window_to_repeat

WINDOW = 32
TOKENS = random_prompt(400)


@pytest.fixture
def options(codec):
    return SpectralKVCache.with_options(bits_per_value=3.0, window=WINDOW, codec=codec)


@pytest.fixture
def store(model, options):
    """A function that fetches from a store which holds TOKENS."""
    caches = vq_kvcache.make_prompt_cache(model, cache=options)
    mx.eval(model(mx.array(TOKENS)[None], cache=caches))
    held = LRUPromptCache()
    held.insert_cache("model", TOKENS, caches)
    with vq_kvcache.install():
        yield lambda tokens: held.fetch_nearest_cache("model", tokens)


@pytest.mark.parametrize("shared", [200, WINDOW, 5])
def test_a_window_of_a_prompt_cut_within_its_codes_is_read_again(store, model, shared):
    asked = [*TOKENS[:shared], 7, 8, 9]
    caches, rest = store(asked)
    kept = max(shared - WINDOW, 0)
    assert [c.offset for c in caches] == [kept] * len(caches)
    assert rest == asked[kept:]
    mx.eval(model(mx.array(rest)[None], cache=caches))
    assert all(c.offset == len(asked) and c.cut_window == 0 for c in caches)


def test_a_prompt_cut_within_its_window_is_given_as_it_is(store):
    shared = len(TOKENS) - 4
    caches, rest = store([*TOKENS[:shared], 7])
    assert (caches[0].offset, rest) == (shared, [7])


@pytest.mark.parametrize("options", [SpectralKVCache.with_options(lossless=True, window=WINDOW)])
def test_a_lossless_prompt_is_never_read_again(store):
    caches, rest = store([*TOKENS[:200], 7])
    assert (caches[0].offset, rest) == (200, [7])


def test_other_caches_are_left_to_mlx_lm(model):
    assert window_to_repeat(None, 9) == 0
    assert window_to_repeat(vq_kvcache.hooks.own_caches(model), 9) == 0
