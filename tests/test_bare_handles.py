"""Handles without an array: who is given them, and that nothing depends on them."""

import copy
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest
from conftest import module, pair, random_prompt, tiny_model
from mlx import nn
from mlx_lm.models import cache as mlx_lm_cache

import vq_kvcache
from vq_kvcache import SpectralKVCache, hooks
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.intercept import BareHandle, Handle, array_of, attended_only

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


OPERATORS = {
    "product": lambda x, like: x @ mx.ones_like(like).swapaxes(-1, -2),
    "sum": lambda x, like: 2 * x + like,
    "sign": lambda x, like: -x,
    "slice": lambda x, like: x[:, :1, -2:],
    "method": lambda x, like: x.swapaxes(-1, -2),
    "comparison": lambda x, like: (x == like) & (x < 1.0) & ~(x == 0),
    "two": lambda x, like: x * x,
}


@pytest.mark.parametrize("how", OPERATORS)
def test_operators_and_attributes_are_those_of_the_array(how, bare):
    cache = bare()
    with intercept.dispatching():
        handle = cache.update_and_fetch(*token())[1]
    array = cache._storage.snapshot().decoded()[1]
    assert mx.array_equal(OPERATORS[how](handle, array), OPERATORS[how](array, array)).item()
    assert (handle.shape, handle.dtype, len(handle)) == ((1, 2, 251, 32), mx.float16, 1)
    assert np.array_equal(np.array(handle), np.array(array))
    assert mx.array_equal(copy.copy(handle), array).item()
    assert BareHandle.__module__ == intercept.__name__
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
        two = copy.deepcopy(batch).update_and_fetch(*(mx.concatenate([x, x], axis=2) for x in more))
        assert [type(x) for x in two] == [Handle] * 2
        assert mx.array_equal(array_of(fetched[1]), as_arrays[1]).item()
        assert fetched[0].shape == as_arrays[0].shape == (2, 2, 258, 32)
        assert mx.array_equal(attended(fetched, queries, mask=mask), attended(as_arrays, queries, mask=mask)).item()
    assert batch.extract(0).bare_handles is True
    kv = mlx_lm_cache.KVCache()
    kv.update_and_fetch(*pair(20))
    assert SpectralKVCache.from_cache(kv, rows[0]).bare_handles is True


class Reads:
    """A model of two layers that does with what it fetched of the second what `read` does."""

    def __init__(self, model, read):
        self.layers, self._model, self._read = model.layers, model, read

    def make_cache(self):
        return [mlx_lm_cache.KVCache() for _ in range(2)]

    def __call__(self, tokens, cache):
        queries = mx.zeros((1, 4, tokens.shape[1], 32), mx.float16)
        attended(cache[0].update_and_fetch(*pair(tokens.shape[1])), queries)
        return self._read(cache[1], queries, *cache[1].update_and_fetch(*pair(tokens.shape[1])))


def fails(error):
    def read(*_):
        raise error

    return read


# Which caches are attended only: the second, too; the first, if whoever reads it can; or nobody knows.
BOTH, FIRST, NONE = {0, 1}, {0}, set()
ATTEND = mx.fast.scaled_dot_product_attention
READS = {
    "attention": (lambda c, q, k, v: attended((k, v), q), BOTH),
    "nothing": (lambda c, q, k, v: q, BOTH),
    "keys as values": (lambda c, q, k, v: attended((k, k), q), FIRST),
    "values of its own": (lambda c, q, k, v: attended((k, mx.zeros((1, 2, 1, 32))), q), FIRST),
    "exchanged": (lambda c, q, k, v: attended((v, k), q), FIRST),
    "state": (lambda c, q, k, v: attended(c.state, q), FIRST),
    "shape": (lambda c, q, k, v: mx.zeros(k.shape), FIRST),
    "method": (lambda c, q, k, v: v.swapaxes(-1, -2), FIRST),
    "operator": (lambda c, q, k, v: 2 * v, FIRST),
    "product": (lambda c, q, k, v: v @ q[:, :2].swapaxes(-1, -2), FIRST),
    "slice": (lambda c, q, k, v: v[:, :, -1:], FIRST),
    "MLX's own function": (lambda c, q, k, v: ATTEND(q, k, v, scale=1.0), NONE),
    "product on the right": (lambda c, q, k, v: q[:, :2, :, :1] @ v, NONE),
    "function": (lambda c, q, k, v: mx.repeat(v, 2, axis=1), NONE),
    "bad cast": (lambda c, q, k, v: mx.depends([q], [v]), NONE),
    "traced": (lambda c, q, k, v: mx.compile(lambda x: x + 1)(v), NONE),
    "anything": (fails(KeyError("kind")), NONE),
}


@pytest.mark.parametrize("how", READS)
def test_a_model_that_reads_what_it_fetched_is_seen(how, model):
    read, expected = READS[how]
    assert attended_only(Reads(model, read), {0, 1}) == expected


def test_caches_that_stay_the_models_own_do_not_count(model):
    assert attended_only(Reads(model, READS["shape"][0]), {0}) == {0}


def test_what_a_traced_module_keeps_is_put_back_and_nothing_is_held(model):
    """As gemma3n and plamo3 do, whose next thread would wait for arrays of another one's stream."""
    passed = []

    class Keeps(nn.Module):
        fails = False

        def __init__(self):
            super().__init__()
            self.weight, self.layers, self.scale = mx.ones(2), [nn.Linear(2, 2)], None

        def make_cache(self):
            return [mlx_lm_cache.KVCache()]

        def __call__(self, tokens, cache):
            self.weight, self.scale = self.weight.astype(mx.float16), mx.exp(self.weight)
            self.new, self.layers[0].weight = mx.zeros(3), mx.zeros((2, 2))
            passed.append(weakref.ref(cache[0].update_and_fetch(*pair(1))[0].source))
            if self.fails:
                raise ValueError
            return tokens

    keeps = Keeps()
    inner, weight, items, attributes = keeps.layers[0].weight, keeps.weight, set(keeps), set(vars(keeps))
    gc.collect()
    gc.disable()
    try:
        assert attended_only(keeps, {0}) == {0}
        assert [ref() for ref in passed] == [None]
        assert intercept.uses(keeps)[0].kind == "own"
        assert [ref() for ref in passed] == [None, None]
        Keeps.fails = True
        assert attended_only(keeps, {0}) == set()
    finally:
        gc.enable()
    assert keeps.weight is weight
    assert keeps.layers[0].weight is inner
    assert keeps.scale is None
    assert (set(keeps), set(vars(keeps))) == (items, attributes)


def test_a_model_is_given_them_from_its_second_token_on(attached, made, monkeypatch):
    def tokens():
        steps = module("mlx_lm.generate").generate_step(mx.array(random_prompt(250)), attached, max_tokens=6)
        return [int(t) for t, _ in steps]

    found = tokens()
    assert made[BareHandle] > 0
    decoded, made[BareHandle] = made[Handle], 0
    monkeypatch.setattr("vq_kvcache.attachment.attended_only", lambda model, packed: set())
    attached._vq_kvcache._attended_only.clear()
    assert tokens() == found
    assert made[BareHandle] == 0
    assert made[Handle] > 2 * decoded


@pytest.fixture
def attached(codec):
    own = tiny_model()
    yield vq_kvcache.attach(own, cache=SpectralKVCache.with_options(2.0, codec=codec))
    vq_kvcache.uninstall()


def test_the_model_is_traced_once_and_caches_are_told_one_by_one(attached, monkeypatch):
    traced = []
    monkeypatch.setattr(
        "vq_kvcache.attachment.attended_only", lambda model, packed: traced.append((model, packed)) or {1}
    )
    for _ in range(3):
        assert [c.bare_handles for c in vq_kvcache.make_prompt_cache(attached)] == [False, True]
    assert traced == [(attached, {0, 1})]


def test_caches_from_a_file_are_told_when_they_are_used(attached, tmp_path):
    caches = vq_kvcache.make_prompt_cache(attached)
    mx.eval(attached(mx.array(random_prompt(250))[None], cache=caches))
    file = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(file, caches)
    again = mlx_lm_cache.load_prompt_cache(file)
    assert [c.bare_handles for c in again] == [None, None]
    again[1].bare_handles = False  # somebody knows better
    generate_step = module("mlx_lm.generate").generate_step
    next(iter(generate_step(mx.array(random_prompt(3)), attached, max_tokens=1, prompt_cache=again)))
    assert [c.bare_handles for c in hooks.spectral_caches(again)] == [True, False]


def test_caches_of_another_class_or_of_a_draft_are_told_nothing(attached, packed):
    class Other(SpectralKVCache):
        pass

    own, draft = packed(), packed()
    own.__class__ = Other
    hooks._choose_cache(attached, None, [own, packed(), draft], None)
    assert [own.bare_handles, draft.bare_handles] == [None, None]


def test_an_attention_put_over_ours_is_given_arrays(bare, monkeypatch):
    cache = bare()
    with intercept.dispatching(), monkeypatch.context() as patched:
        patched.setattr(mx.fast, "scaled_dot_product_attention", ATTEND)
        assert [type(x) for x in cache.update_and_fetch(*token())] == [Handle] * 2
