"""Handles without an array: who is given them, and that nothing depends on them."""

import copy

import mlx.core as mx
import pytest
from conftest import module, pair, random_prompt, tiny_model
from mlx_lm.models import cache as mlx_lm_cache

import vq_kvcache
from vq_kvcache import SpectralKVCache, hooks
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.intercept import BareHandle, Handle, array_of, attends_only

KEYS, VALUES = pair(250)


@pytest.fixture
def bare(packed):
    """A cache with codes whose model attends only."""

    def make():
        cache = packed()
        cache.bare_handles = True
        cache.update_and_fetch(KEYS, VALUES)
        return cache

    return make


@pytest.fixture
def made(monkeypatch):
    """How many handles are made from here on, of each kind."""
    counts = {Handle: 0, BareHandle: 0}

    def counted(kind, original):
        def init(self, *args):
            counts[kind] += 1
            original(self, *args)

        return init

    for kind in counts:
        monkeypatch.setattr(kind, "__init__", counted(kind, kind.__init__))
    return counts


def token(seed=1, count=1):
    return pair(count, seed=seed)


def attended(fetched, queries, **options):
    return mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.2, **options)


def test_single_tokens_alone_are_answered_with_them(bare):
    cache = bare()
    with intercept.dispatching():
        assert [type(x) for x in cache.update_and_fetch(*token())] == [BareHandle] * 2
        assert [type(x) for x in cache.update_and_fetch(*token(count=2))] == [Handle] * 2
        assert [type(x) for x in cache.keys_and_values()] == [Handle] * 2
    assert [type(x) for x in cache.update_and_fetch(*token())] == [Handle] * 2  # nobody would understand them


@pytest.mark.parametrize("flag", [None, False])
def test_caches_of_models_that_may_read_them_give_arrays(bare, flag):
    cache = bare()
    cache.bare_handles = flag
    with intercept.dispatching():
        assert [type(x) for x in cache.update_and_fetch(*token())] == [Handle] * 2


def test_their_attention_is_that_of_handles_and_nothing_is_decoded(bare, monkeypatch):
    cache, like = bare(), bare()
    like.bare_handles = False
    queries = mx.random.normal((1, 4, 1, 32)).astype(mx.float16)
    with intercept.dispatching():
        expected = attended(like.update_and_fetch(*token()), queries)
        monkeypatch.setattr(type(cache._storage.snapshot()), "decoded", None)
        assert mx.array_equal(attended(cache.update_and_fetch(*token()), queries), expected).item()


@pytest.mark.parametrize("swap", ["values twice", "the other way round", "values of another append"])
def test_unusual_pairs_are_taken_for_arrays(bare, swap):
    cache = bare()
    queries = mx.random.normal((1, 4, 1, 32)).astype(mx.float16)
    with intercept.dispatching():
        keys, values = cache.update_and_fetch(*token())
        again = cache.keys_and_values()
        keys, values = {
            "values twice": (values, values), "the other way round": (values, keys),
            "values of another append": (keys, again[1]),
        }[swap]  # fmt: skip
        arrays = [mx.array(array_of(x)) for x in (keys, values)]
        expected = intercept.original_attention()(queries, *arrays, scale=0.2)
        assert mx.array_equal(attended((keys, values), queries), expected).item()


def test_whoever_reads_one_finds_the_array_or_is_told(bare):
    cache = bare()
    with intercept.dispatching():
        handles = cache.update_and_fetch(*token())
    for handle, array in zip(handles, cache._storage.snapshot().decoded(), strict=True):
        assert (handle.shape, handle.dtype) == ((1, 2, 251, 32), mx.float16)
        assert mx.array_equal(handle.swapaxes(-1, -2), array.swapaxes(-1, -2)).item()
        assert mx.array_equal(mx.zeros_like(array) + handle, array).item()
        assert mx.array_equal(array_of(handle), array).item()
        with pytest.raises(TypeError):
            mx.concatenate([handle, handle])


def test_a_batch_answers_with_them_and_those_of_its_rows_go_on_with_it(bare):
    rows = [bare(), bare()]
    rows[1].update_and_fetch(*token(seed=3, count=7))
    batch = SpectralKVCache.merge(rows)
    more = [mx.concatenate([x, x]) for x in token()]
    queries = mx.random.normal((2, 4, 1, 32)).astype(mx.float16)
    with intercept.dispatching():
        eager = copy.deepcopy(batch)
        eager.bare_handles = False
        mask = batch.make_mask(1)
        fetched = batch.update_and_fetch(*more)
        assert [type(x) for x in fetched] == [BareHandle] * 2
        as_arrays = eager.update_and_fetch(*more)
        assert [type(x) for x in as_arrays] == [Handle] * 2
        assert mx.array_equal(array_of(fetched[1]), as_arrays[1]).item()
        assert fetched[0].shape == as_arrays[0].shape == (2, 2, 258, 32)
        assert mx.array_equal(attended(fetched, queries, mask=mask), attended(as_arrays, queries, mask=mask)).item()
    assert batch.extract(0).bare_handles is True
    kv = mlx_lm_cache.KVCache()
    kv.update_and_fetch(*pair(20))
    assert SpectralKVCache.from_cache(kv, rows[0]).bare_handles is True


class Reads:
    """A model of one layer that does with its keys what `read` does."""

    def __init__(self, model, read):
        self.layers, self._model, self._read = model.layers, model, read

    def make_cache(self):
        return [mlx_lm_cache.KVCache()]

    def __call__(self, tokens, cache):
        keys, values = cache[0].update_and_fetch(*pair(tokens.shape[1]))
        return self._read(cache[0], mx.zeros((1, 4, tokens.shape[1], 32), mx.float16), keys, values)


ATTEND = mx.fast.scaled_dot_product_attention
READS = {
    "attention": (lambda c, q, k, v: attended((k, v), q), True),
    "keys as values": (lambda c, q, k, v: attended((k, k), q), True),
    "nothing": (lambda c, q, k, v: q, True),
    "MLX's own function": (lambda c, q, k, v: ATTEND(q, k, v, scale=1.0), False),
    "values of its own": (lambda c, q, k, v: attended((k, mx.zeros((1, 2, 1, 32))), q), False),
    "exchanged": (lambda c, q, k, v: attended((v, k), q), False),
    "shape": (lambda c, q, k, v: mx.zeros(k.shape), False),
    "method": (lambda c, q, k, v: v.swapaxes(-1, -2), False),
    "operator": (lambda c, q, k, v: 2 * v, False),
    "product": (lambda c, q, k, v: q[:, :2, :, :1] @ v, False),
    "slice": (lambda c, q, k, v: v[:, :, -1:], False),
    "function": (lambda c, q, k, v: mx.repeat(v, 2, axis=1), False),
    "bad cast": (lambda c, q, k, v: mx.depends([q], [v]), False),
    "traced": (lambda c, q, k, v: mx.compile(lambda x: x + 1)(v), False),
    "state": (lambda c, q, k, v: attended(c.state, q), False),
}


@pytest.mark.parametrize("how", READS)
def test_a_model_that_reads_what_it_fetched_is_seen(how, model):
    read, only = READS[how]
    assert attends_only(Reads(model, read), {0}) is only


def test_caches_that_stay_the_models_own_do_not_count(model):
    assert attends_only(Reads(model, READS["shape"][0]), set())


def test_a_model_is_given_them_from_its_second_token_on(attached, made, monkeypatch):
    def tokens():
        steps = module("mlx_lm.generate").generate_step(mx.array(random_prompt(250)), attached, max_tokens=6)
        return [int(t) for t, _ in steps]

    found = tokens()
    assert made[BareHandle] > 0
    decoded, made[BareHandle] = made[Handle], 0
    monkeypatch.setattr("vq_kvcache.attachment.attends_only", lambda model, only: False)
    attached._vq_kvcache._attends_only.clear()
    assert tokens() == found
    assert made[BareHandle] == 0
    assert made[Handle] > 2 * decoded


@pytest.fixture
def attached(codec):
    own = tiny_model()
    yield vq_kvcache.attach(own, cache=SpectralKVCache.with_options(2.0, codec=codec))
    vq_kvcache.uninstall()


def test_the_model_is_traced_once(attached, monkeypatch):
    traced = []
    monkeypatch.setattr("vq_kvcache.attachment.attends_only", lambda model, only: traced.append((model, only)) or True)
    for _ in range(3):
        assert all(c.bare_handles for c in vq_kvcache.make_prompt_cache(attached))
    assert traced == [(attached, {0, 1})]


def test_caches_from_a_file_are_told_when_they_are_used(attached, tmp_path):
    caches = vq_kvcache.make_prompt_cache(attached)
    mx.eval(attached(mx.array(random_prompt(250))[None], cache=caches))
    file = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(file, caches)
    again = mlx_lm_cache.load_prompt_cache(file)
    assert [c.bare_handles for c in again] == [None, None]
    generate_step = module("mlx_lm.generate").generate_step
    next(iter(generate_step(mx.array(random_prompt(3)), attached, max_tokens=1, prompt_cache=again)))
    assert [c.bare_handles for c in hooks.spectral_caches(again)] == [True, True]
