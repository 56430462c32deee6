"""BatchSpectralKVCache alone: what mlx-lm's class has no word for, or does otherwise."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from conftest import numpy, pair
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import BatchKVCache, KVCache

import vq_kvcache
from vq_kvcache import batch_cache, cache
from vq_kvcache.batch_cache import BatchSpectralKVCache, RowMask
from vq_kvcache.cache import LOSSLESS, Planned, SpectralKVCache
from vq_kvcache.measuring import active_bytes
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.codec import CodecError
from vq_kvcache.spectral.intercept import Handle

# Random vectors are unlike any calibration text, and say so once.
pytestmark = pytest.mark.filterwarnings("ignore:this text is unlike the codec")
WINDOW, SINKS = 32, 4


@pytest.fixture
def batch(codec):
    """Makes batches of 2 bits for layer 0 of the tiny model, or lossless ones."""
    plan = cache.register_plan(codec.plan(2.0))
    return lambda padding, bits=2: BatchSpectralKVCache(padding, plan if bits else LOSSLESS, 0, WINDOW, SINKS)


def fed(made, count, rows, seed=0, dtype=mx.float32):
    """The batch after `count` columns, and what was fetched."""
    return made, made.update_and_fetch(*pair(count, rows, seed, dtype=dtype))


# The members.


def unseen_members():
    """Public names that BatchKVCache, or an instance of it, has and BatchSpectralKVCache does not define itself."""
    names = {n for n in dir(BatchKVCache) if not n.startswith("_")}
    names |= {n for n in vars(BatchKVCache([0])) if not n.startswith("_")}
    return names - set(vars(BatchSpectralKVCache)) - set(vars(Planned))


def test_nothing_of_mlx_lms_cache_is_inherited_unseen(monkeypatch):
    assert {"update_and_fetch", "prepare", "merge"} <= set(dir(BatchKVCache))
    assert {"left_padding", "offset"} <= set(vars(BatchKVCache([0])))
    assert unseen_members() == set()
    monkeypatch.setattr(BatchKVCache, "brand_new", lambda self: None, raising=False)
    assert unseen_members() == {"brand_new"}


def test_what_mlx_lm_dispatches_on_is_hidden(batch):
    made = fed(batch([0, 3]), 200, 2)[0]
    for name in ("to_quantized", "bits", "group_size", "__len__", "__bool__"):
        assert not hasattr(made, name)
    assert isinstance(made, BatchKVCache)
    with pytest.raises(AttributeError, match=r"a BatchSpectralKVCache is quantized already; expected no --kv-bits"):
        made.to_quantized(group_size=64, bits=4)


# Refusals.


def test_a_batch_needs_a_plan_that_has_its_layer(codec):
    with pytest.raises(ValueError, match="BatchSpectralKVCache was made without a plan; expected a codec's; use vq_kv"):
        BatchSpectralKVCache([0, 1])
    with pytest.raises(CodecError, match=r"the codec has no layer 7; it has \[0, 1\]; use this model's codec\."):
        BatchSpectralKVCache([0], codec.plan(2.0), layer=7)


def test_what_does_not_fit_is_refused(batch):
    empty = batch([0, 1])
    for name in ("keys", "values"):
        assert getattr(empty, name) is None
        with pytest.raises(ValueError, match="the cache is empty; expected keys and values; append some first"):
            setattr(empty, name, mx.zeros((2, 2, 3, 4)))
    with pytest.raises(ValueError, match="the cache is empty; expected keys and values; append some first"):
        empty.keys_and_values()
    with pytest.raises(ValueError, match=r"keys of 4 rows were given; expected 2, the rows of the batch\."):
        empty.update_and_fetch(*pair(3, 4))
    held = fed(empty, 3, 2)[0]
    with pytest.raises(ValueError, match="the cache holds tokens; expected an empty one; left padding comes before"):
        held.prepare(left_padding=[1, 1])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("plan", lambda plan: SpectralKVCache(LOSSLESS, 0, WINDOW, SINKS)),
        ("layer", lambda plan: SpectralKVCache(plan, 1, WINDOW, SINKS)),
        ("window", lambda plan: SpectralKVCache(plan, 0, 33, SINKS)),
        ("sinks", lambda plan: SpectralKVCache(plan, 0, WINDOW, 5)),
    ],
)
def test_one_batch_is_packed_in_one_way(codec, name, other):
    plan = cache.register_plan(codec.plan(2.0))
    one, other = SpectralKVCache(plan, 0, WINDOW, SINKS), other(plan)
    with pytest.raises(CodecError, match=rf"caches of {name} .* were put into one batch; expected one {name}; make al"):
        SpectralKVCache.merge([one, other])
    with pytest.raises(CodecError, match=rf"caches of {name} .* were put into one batch; expected one {name}; make al"):
        SpectralKVCache.merge([one]).extend(SpectralKVCache.merge([other]))


def damages():
    def set_to(name, value):
        return lambda storage: setattr(storage, name, value(storage))

    return {
        "a row without counts": set_to("held_sinks", lambda s: s.held_sinks[:1]),
        "more sinks than asked for": set_to("held_sinks", lambda s: (5, 4)),
        "fewer sinks than asked for": set_to("held_sinks", lambda s: (4, 3)),
        "a window that begins in the sinks": set_to("window_start", lambda s: (3, s.window_start[1])),
        "a window that begins behind its end": set_to("window_start", lambda s: (s.window_end + 1,) * 2),
        "more tokens than columns": set_to("window_end", lambda s: s.exact_keys.shape[2] + 1),
        "more packed tokens than codes": set_to("packed_tokens", lambda s: (s.packed_tokens[0] + 1, 64)),
        "fewer packed tokens than codes": set_to("packed_tokens", lambda s: (64, 64)),
        "negative packed tokens": set_to("packed_tokens", lambda s: (s.packed_tokens[0], -1)),
        "another batch of values": set_to("exact_values", lambda s: mx.concatenate([s.exact_values] * 2)),
        "fewer values": set_to("exact_values", lambda s: s.exact_values[:, :, 1:]),
        "fewer words": lambda s: setattr(s.codes.held[0], "words", s.codes.held[0].words[:, 1:]),
        "words of another type": lambda s: setattr(s.codes.held[0], "words", s.codes.held[0].words.astype(mx.int32)),
    }


@pytest.mark.parametrize("damage", sorted(damages()))
def test_a_damaged_state_is_refused(batch, damage):
    made = fed(batch([0, 100]), 300, 2)[0]
    made._storage.check()
    damages()[damage](made._storage)
    with pytest.raises(ValueError, match=r"a stored cache's shapes do not fit its codec; the file is damaged; make it"):
        made._storage.check()


def test_padding_that_does_not_fit_is_refused(batch):
    made = fed(batch([0, 100]), 300, 2)[0]
    for change in (lambda c: setattr(c, "_left_padding", (0, 101)), lambda c: setattr(c, "_left_padding", (0,))):
        other = copy.deepcopy(made)
        change(other)
        with pytest.raises(ValueError, match="a stored cache's padding does not fit its tokens; the file is damaged"):
            other.state = other.state
    made.state = made.state
    with pytest.raises(ValueError, match="the saved state holds 2 arrays; expected 3; the file is damaged"):
        made.state = made.state[:-1]


# Padding.


def attended(made, count, rows, mask=None, seed=9):
    keys, values = pair(count, rows, seed, dtype=mx.float32)
    mask = made.make_mask(count) if mask is None else mask
    queries = mx.random.normal((rows, 4, count, 32), key=mx.random.key(seed))
    with intercept.dispatching():
        fetched = made.update_and_fetch(keys, values)
        return numpy(mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.2, mask=mask))


@pytest.mark.parametrize("bits", [0, 2])
def test_numbers_of_pads_reach_nothing(batch, bits):
    """Neither attention nor any token that is held, now or later, be they NaN."""
    made = batch([0, 0, 0], bits)
    made.prepare(lengths=[150, 7, 0], right_padding=[0, 143, 150])
    keys, values = pair(150, 3, dtype=mx.float32)
    real = mx.array([150, 7, 0])[:, None, None, None] > mx.arange(150)[:, None]
    made.make_mask(150)
    made.update_and_fetch(mx.where(real, keys, mx.nan), mx.where(real, values, mx.nan))
    made.finalize()
    results = [attended(made, 1, 3, seed=seed) for seed in range(100)]
    assert np.isfinite(results).all()
    assert np.isfinite(numpy(made.keys)).all()
    for part in made.keys_and_values():
        assert np.isfinite(numpy(part)).all()


def test_queries_of_pads_see_some_token(batch):
    """A softmax over nothing may be NaN, and would make NaN of the next layer's keys."""
    made = batch([30, 0], 0)
    assert mx.all(made.make_mask(40).of_rows.any(axis=-1))
    assert np.isfinite(attended(made, 40, 2)).all()
    made.prepare(lengths=[20, 1], right_padding=[0, 19])
    assert mx.all(made.make_mask(20).of_rows.any(axis=-1))
    assert np.isfinite(attended(made, 20, 2)).all()


def test_padding_on_the_right_of_unknown_lengths_is_dropped_at_the_end(batch):
    """Until then nothing is sealed: a pad never enters the codes."""
    known, unknown = (fed(batch([0, 0, 0], 0), 90, 3)[0] for _ in range(2))
    for made, lengths in ((known, [200, 150, 0]), (unknown, None)):
        made.prepare(lengths=lengths, right_padding=[0, 50, 200])
        for start in (0, 100):
            made.update_and_fetch(*(x[:, :, start : start + 100] for x in pair(200, 3, 5, dtype=mx.float32)))
        assert (made._storage.packed_tokens == (0, 0, 0)) is (lengths is None)
        made.finalize()
    assert unknown._storage.packed_tokens == known._storage.packed_tokens == (192, 128, 0)
    assert unknown.offset.tolist() == known.offset.tolist() == [290, 240, 90]
    held = [made._storage.snapshot().decoded() for made in (known, unknown)]
    for a, b in zip(*held, strict=True):
        for row, length in enumerate([290, 240, 90]):
            np.testing.assert_array_equal(numpy(a)[row, :, :length], numpy(b)[row, :, :length])


def test_a_row_trimmed_beyond_its_begin_starts_anew(batch):
    """mlx-lm would take the tokens that follow for padding."""
    made, anew = fed(batch([0, 100], 0), 300, 2)[0], batch([0], 0)
    assert made.offset.tolist() == [300, 200]
    assert made.trim(250) == 250
    assert made.offset.tolist() == [50, 0]
    for seed in range(150):
        result = attended(made, 1, 2, seed=seed)
        keys, values = (x[1:] for x in pair(1, 2, seed, dtype=mx.float32))
        queries = mx.random.normal((2, 4, 1, 32), key=mx.random.key(seed))[1:]
        with intercept.dispatching():
            fetched = anew.update_and_fetch(keys, values)
            expected = mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.2)
        np.testing.assert_allclose(result[1:], numpy(expected), atol=1e-5)
    assert made.offset.tolist() == [200, 150]
    assert made.trim(1000) == made._columns + 200
    assert made.offset.tolist() == [0, 0]


# Masks.


def foreign_masks(columns, count):
    generator = np.random.default_rng(count)
    some = generator.random((3, 4, count, columns)) < 0.5
    some[..., -1] = True
    return {
        "a copy of our own": mx.array,
        "our own and more": lambda own: own & mx.array(some[:, :1]),
        "per head": lambda own: own & mx.array(some),
        "additive": lambda own: mx.where(own, mx.array(generator.normal(size=some.shape).astype(np.float32)), -mx.inf),
        "for all rows": lambda own: mx.array(some[0, 0]) & (mx.arange(columns) >= 120),
    }


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("name", sorted(foreign_masks(300, 1)))
def test_masks_that_a_model_makes_are_in_mlx_lms_columns(batch, name, count):
    padding = [0, 120, 33]
    results = []
    for made in (batch(padding, 0), BatchKVCache(padding)):
        fed(made, 300, 3)
        mask = foreign_masks(300 + count, count)[name](made.make_mask(count))
        assert type(mask) is mx.array
        results.append(attended(made, count, 3, mask))
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.parametrize("window_size", [1, 7, 150, 400])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_masks_with_a_window(batch, count, window_size):
    padding, results = [0, 120, 33], []
    for made in (batch(padding, 0), BatchKVCache(padding)):
        fed(made, 300, 3)
        mask = made.make_mask(count, window_size=window_size)
        results.append((np.array(mask), attended(made, count, 3, mask)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)


def test_our_own_masks_are_told_apart_and_looked_at_once(batch, monkeypatch):
    """What attend is given for a token each, for a chunk of equal rows, and for a padded one: nothing if possible."""
    seen = []
    monkeypatch.setattr(cache, "attend", lambda snapshot, q, scale, mask, sinks: seen.append(mask) or q)
    layers = [fed(batch([0, 100]), 300, 2)[0] for _ in range(2)]

    def attend_all(count):
        mask, queries = layers[0].make_mask(count), mx.zeros((2, 4, count, 32))
        assert type(mask) is RowMask
        with intercept.dispatching():
            for layer in layers:
                fetched = layer.update_and_fetch(*pair(count, 2, dtype=mx.float32))
                mx.fast.scaled_dot_product_attention(queries, *fetched, scale=1.0, mask=mask)
        return seen[-2:]

    assert attend_all(1) == [None, None]
    assert attend_all(20) == ["causal", "causal"]
    for layer in layers:
        layer.prepare(lengths=[20, 3], right_padding=[0, 17])
    first, second = attend_all(20)
    assert first is second
    assert first.shape == (2, 1, 20, 341)
    mask = fed(batch([0, 50]), 300, 2)[0].make_mask(1)  # of other rows: it is taken for the numbers it holds
    other = fed(batch([0, 100]), 300, 2)[0]
    with intercept.dispatching():
        fetched = other.update_and_fetch(*pair(1, 2, dtype=mx.float32))
        mx.fast.scaled_dot_product_attention(mx.zeros((2, 4, 1, 32)), *fetched, scale=1.0, mask=mask)
    assert seen[-1].shape == (2, 1, 1, 301)


# What is packed.


def test_rows_are_packed_as_if_they_were_alone(codec):
    """The codes of every row are those of a cache of its own, where both have packed."""
    plan = cache.register_plan(codec.plan(2.0))
    lengths = [300, 170, 60, 0]
    alone = [SpectralKVCache(plan, 0, WINDOW, SINKS) for _ in lengths]
    feeds = [pair(700, 1, seed, dtype=mx.float16) for seed in range(4)]
    for one, feed, length in zip(alone, feeds, lengths, strict=True):
        if length:
            one.update_and_fetch(*(x[:, :, :length] for x in feed))
    made = SpectralKVCache.merge(alone)
    assert made._storage.packed_tokens == tuple(max(n - SINKS - WINDOW - 16, 0) // 64 * 64 for n in lengths)
    for step in range(200):
        tokens = [
            mx.concatenate([feed[i][:, :, n + step : n + step + 1] for feed, n in zip(feeds, lengths, strict=True)])
            for i in range(2)
        ]
        made.update_and_fetch(*tokens)
        for row, one in enumerate(alone):
            one.update_and_fetch(*(x[row : row + 1] for x in tokens))
    for row, one in enumerate(alone):
        packed = min(one._storage.packed_tokens, made._storage.packed_tokens[row])
        assert one._storage.packed_tokens - packed in (0, 64)
        assert packed >= 64
        words = made._storage.codes.words(0, packed)[row : row + 1]
        assert mx.array_equal(words, one._storage.codes.words(0, packed))


def test_rows_are_sealed_together_once_in_64_steps(batch):
    made = fed(batch([0, 50, 13, 27, 90]), 300, 5)[0]
    seals, before = [], made._storage.packed_tokens
    for step in range(600):
        exact = made._storage.exact_keys
        made.update_and_fetch(*pair(1, 5, dtype=mx.float32))
        if made._storage.packed_tokens != before:
            before = made._storage.packed_tokens
            seals.append(step)
        else:
            assert made._storage.exact_keys.shape == exact.shape
        assert max(made._storage.newest) < WINDOW + 16 + 2 * 64
    assert len(seals) >= 5
    assert min(np.diff(seals)) >= 64


def test_drift_is_read_only_when_something_is_packed(batch, monkeypatch):
    """On a GPU whoever reads waits for it."""
    due = []
    monkeypatch.setattr(batch_cache, "warn_once", lambda sums, name: due.append(made._storage.due))
    made = batch([0, 3])
    fed(made, 300, 2)
    for _ in range(130):
        made.update_and_fetch(*pair(1, 2, dtype=mx.float32))
    assert len(due) == 2
    assert due[1] == 128


def test_offsets_of_rows_are_one_array_for_all_layers(batch, tmp_path):
    first, second = (fed(batch([0, 3]), 9, 2)[0] for _ in range(2))
    assert first._storage.layout.tokens is second._storage.layout.tokens
    own = first.offset
    mx.export_to_dot(str(tmp_path / "graph"), own)
    assert "rectangle" not in (tmp_path / "graph").read_text()  # or each layer would copy it, for queries and for keys
    own += 5
    assert own.tolist() == [14, 11]
    assert first.offset.tolist() == second.offset.tolist() == [9, 6]


def test_only_tokens_are_watched_for_drift(codec):
    plan = cache.register_plan(codec.plan(2.0))
    alone = [SpectralKVCache(plan, 0, WINDOW, SINKS) for _ in range(2)]
    made = BatchSpectralKVCache([0, 0], plan, 0, WINDOW, SINKS)
    keys, values = pair(300, 2, dtype=mx.float32)
    made.prepare(lengths=[300, 200], right_padding=[0, 100])
    pads = mx.arange(300)[:, None] >= mx.array([300, 200])[:, None, None, None]
    made.update_and_fetch(keys, mx.where(pads, 1e6, values))
    for row, one in enumerate(alone):
        length = [300, 200][row]
        one.update_and_fetch(*(x[row : row + 1, :, :length] for x in (keys, values)))
    sums = made._storage.drift
    assert sums.tokens == sum(one._storage.drift.tokens for one in alone) == (192 + 128) // 4
    expected = sum(numpy(one._storage.drift.sums) for one in alone)
    np.testing.assert_allclose(numpy(sums.sums), expected, rtol=1e-4)
    merged = SpectralKVCache.merge(alone)
    np.testing.assert_allclose(numpy(merged._storage.drift.sums), expected, rtol=1e-4)
    assert merged._storage.drift.tokens == sums.tokens
    assert made.drift.tokens == sums.tokens
    assert BatchSpectralKVCache([0], plan).drift is None


# Parting and joining.


def test_what_is_extracted_owns_its_arrays(batch):
    made = fed(batch([0, 200]), 1000, 2)[0]
    alone = [made.extract(row) for row in range(2)]
    assert [one.offset for one in alone] == [1000, 800]
    mx.eval([one.state for one in alone], made.state)
    del made
    mx.clear_cache()
    held = mx.get_active_memory()
    size = alone[0].nbytes
    assert size == sum(a.nbytes for a in alone[0]._storage.arrays)
    alone.pop(0)
    assert mx.get_active_memory() <= held - size  # the row's memory goes with it: nothing of the batch is left
    feed = pair(2, seed=8, dtype=mx.float32)
    assert alone[0].update_and_fetch(*feed)[0].shape == (1, 2, 802, 32)


def test_mlx_lms_own_caches_are_packed_when_they_join(lossless):
    theirs, ours = KVCache(), lossless()
    fed(theirs, 200, 1, dtype=mx.float32)
    fed(ours, 130, 1, 1, dtype=mx.float32)
    made = SpectralKVCache.merge([theirs, ours, KVCache()])
    assert made._storage.packed_tokens == (128, 64, 0)
    expected = BatchKVCache.merge([theirs, ours.to_kvcache(), KVCache()])
    for a, b in zip(fed(made, 1, 3, 2)[1], fed(expected, 1, 3, 2)[1], strict=True):
        for row, padding in enumerate([0, 70, 200]):
            np.testing.assert_array_equal(numpy(a)[row, :, padding:], numpy(b)[row, :, padding:])


def test_batches_are_saved_and_loaded_by_name(batch, tmp_path):
    """As mlx-lm saves any cache: its class is looked up by name, its codec by the name in its state."""
    vq_kvcache.install()
    layers = [fed(batch([0, 100], bits), 300, 2)[0] for bits in (0, 2)]
    mlx_lm_cache.save_prompt_cache(str(tmp_path / "batch.safetensors"), layers)
    loaded = mlx_lm_cache.load_prompt_cache(str(tmp_path / "batch.safetensors"))
    for mine, other in zip(layers, loaded, strict=True):
        assert type(other) is BatchSpectralKVCache
        assert other.offset.tolist() == [300, 200]
        np.testing.assert_array_equal(attended(mine, 1, 2), attended(other, 1, 2))


def test_nbytes_is_what_memory_grows_by(batch):
    """As far as MLX's allocator counts: it rounds every buffer up to whole pages."""
    feed = [pair(1100, 3, seed, dtype=mx.float16) for seed in range(2)]
    mx.eval(feed)
    before, limit = active_bytes(), mx.set_cache_limit(0)
    layers = [batch([0, 100, 900]) for _ in range(2)]
    for start, end in ((0, 1000), *((n, n + 1) for n in range(1000, 1100))):
        for layer, arrays in zip(layers, feed, strict=True):
            layer.update_and_fetch(*(x[:, :, start:end] for x in arrays))
        mx.eval([layer.state for layer in layers])
    grown = active_bytes() - before
    mx.set_cache_limit(limit)
    assert grown == pytest.approx(sum(layer.nbytes for layer in layers), rel=0.02)


def test_the_last_row_can_go(batch):
    made = fed(batch([0, 3]), 300, 2)[0]
    made.filter([])
    assert made.empty()
    assert made.size() == 0
    assert made.offset.tolist() == []
    assert made.nbytes == 0


def test_handles_where_something_is_packed_or_padded(batch):
    for padding, count, kind in (([0, 0], 50, mx.array), ([0, 0], 300, Handle), ([0, 9], 50, Handle)):
        fed(made := batch(padding), count, 2)
        assert [type(x) for x in made.keys_and_values()] == [kind] * 2
    nothing = batch([9, 9])
    assert [type(x) for x in fed(nothing, 2, 2)[1]] == [mx.array] * 2
    assert nothing.offset.tolist() == [-7, -7]


def test_unusual_pairs_of_handles_are_taken_for_arrays(batch):
    made = fed(batch([0, 100]), 300, 2)[0]
    keys, values = fed(made, 1, 2, 3)[1]
    queries = mx.random.normal((2, 4, 1, 32))
    mask = made.make_mask(1)[..., :-1]
    expected = intercept.original_attention()(queries, mx.array(values), mx.array(values), scale=0.2, mask=mask)
    with intercept.dispatching():
        result = mx.fast.scaled_dot_product_attention(queries, values, values, scale=0.2, mask=mask)
    assert mx.array_equal(result, expected)
    assert isinstance(keys, Handle)


def test_keys_that_are_values_too_are_attended_from_their_codes(batch):
    """Multi-head latent attention, with the scores of positions as a mask over the columns."""
    made = fed(batch([0, 100]), 300, 2)[0]
    keys, _ = fed(made, 1, 2, 3)[1]
    queries = mx.random.normal((2, 4, 1, 32))
    hidden = mx.where(made.make_mask(1)[..., :-1], 0.0, -1e9)
    mask = hidden + mx.random.normal((2, 4, 1, keys.shape[2]))
    expected = intercept.original_attention()(queries, mx.array(keys), mx.array(keys), scale=0.2, mask=mask)
    with intercept.dispatching():
        result = mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=0.2, mask=mask)
    assert not mx.array_equal(result, expected)  # sums in another order: not the decoded array
    assert mx.allclose(result, expected, atol=1e-5)


def test_keys_can_be_made_to_depend_on_something(batch):
    made, same = (fed(batch([0, 100], 0), 300, 2)[0] for _ in range(2))
    made.keys = mx.depends(made.keys, mx.ones((3,)) * 2)
    made.values = mx.depends(made.values, mx.ones((3,)) * 2)
    np.testing.assert_array_equal(attended(made, 1, 2), attended(same, 1, 2))
