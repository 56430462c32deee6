import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_prompt, tiny_model
from mlx_lm.models.cache import RotatingKVCache

from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.intercept import Handle, disable, dispatching, enable, observers, original_attention, recorders

MLX_ATTENTION = mx.fast.scaled_dot_product_attention


def attention():
    return mx.fast.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _restored():
    yield
    while intercept._users:
        disable()
    mx.fast.scaled_dot_product_attention = MLX_ATTENTION


class Source:
    """Notes how it was asked to attend, and answers with a constant."""

    def attention(self, queries, keys, values, original, **options):
        self.asked = queries, keys, values, original, options
        return mx.full(queries.shape, 7.0)


def arrays(count=3):
    return mx.random.normal((count, 1, 2, 5, 8), key=mx.random.key(0))


def test_enable_replaces_one_function_and_disable_restores_it():
    assert attention() is original_attention() is MLX_ATTENTION
    enable()
    assert attention() is not MLX_ATTENTION
    assert original_attention() is MLX_ATTENTION
    disable()
    assert attention() is MLX_ATTENTION


def test_enable_is_counted():
    enable()
    enable()
    replaced = attention()
    disable()
    assert attention() is replaced
    disable()
    assert attention() is MLX_ATTENTION


def test_disable_without_enable_does_nothing():
    disable()
    enable()
    assert attention() is not MLX_ATTENTION
    disable()
    assert attention() is MLX_ATTENTION


def test_the_block_restores_after_an_error():
    def fail():
        with dispatching():
            raise KeyError("inside" if attention() is not MLX_ATTENTION else "not replaced")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert attention() is MLX_ATTENTION


def test_blocks_of_many_threads_end_with_mlxs_own():
    replaced = []

    def enter():
        for _ in range(200):
            with dispatching():
                replaced.append(attention() is not MLX_ATTENTION)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert replaced == [True] * 800
    assert attention() is MLX_ATTENTION


def test_another_wrapper_on_top_stays_and_ours_passes_everything_on():
    calls = []
    enable()
    ours = attention()

    def theirs(*args, **options):
        calls.append(args)
        return ours(*args, **options)

    mx.fast.scaled_dot_product_attention = theirs
    disable()
    assert attention() is theirs
    q, k, v = arrays()
    found = attention()(q, k, v, scale=0.3, mask="causal")
    assert len(calls) == 1
    assert (found == MLX_ATTENTION(q, k, v, scale=0.3, mask="causal")).all().item()


def test_a_wrapper_that_was_there_before_is_called_and_restored():
    calls = []

    def theirs(*args, **options):
        calls.append(options)
        return MLX_ATTENTION(*args, **options)

    mx.fast.scaled_dot_product_attention = theirs
    with dispatching():
        assert original_attention() is theirs
        attention()(*arrays(), scale=1.0)
    assert attention() is theirs
    assert calls == [{"scale": 1.0}]


def test_plain_arrays_go_to_mlx_with_every_option():
    q, k, v = arrays()
    options = {"scale": 0.5, "mask": mx.ones((5, 5), mx.bool_), "sinks": mx.array([1.0, -1.0])}
    with dispatching():
        found = attention()(q, k, v, **options)
    assert (found == MLX_ATTENTION(q, k, v, **options)).all().item()


def test_a_handle_is_attended_by_its_source_with_every_option():
    q, k, v = arrays()
    source = Source()
    handle, values = Handle(k, source, "keys"), Handle(v, source, "values")
    with dispatching():
        found = attention()(q, handle, values, scale=0.5, mask="causal")
    assert (found == 7).all().item()
    asked = source.asked
    assert asked[0] is q
    assert asked[1] is handle
    assert asked[2] is values
    assert asked[3] is MLX_ATTENTION
    assert asked[4] == {"scale": 0.5, "mask": "causal"}


def test_a_handle_behaves_as_the_array_it_wraps():
    plain = arrays(1)[0]
    handle = Handle(plain, Source(), "values")
    assert isinstance(handle, mx.array)
    assert (handle.part, handle.shape, handle.dtype, handle.size) == ("values", plain.shape, plain.dtype, plain.size)
    for op in (
        lambda x: x + 1, lambda x: 2 * x, lambda x: x[:, :1, -2:], lambda x: x.swapaxes(-1, -2), mx.sum,
        lambda x: x @ x.swapaxes(-1, -2), lambda x: mx.concatenate([x, x], axis=2), lambda x: x.astype(mx.float16),
        lambda x: mx.repeat(x, 2, axis=1), lambda x: mx.expand_dims(x, 2),
    ):  # fmt: skip
        found, expected = op(handle), op(plain)
        assert type(found) is mx.array
        assert mx.array_equal(found, expected).item()
    assert np.array_equal(np.array(handle), np.array(plain))
    mx.eval(handle)


def test_without_dispatching_mlx_takes_a_handle_for_its_array():
    q, k, v = arrays()
    source = Source()
    found = MLX_ATTENTION(q, Handle(k, source, "keys"), Handle(v, source, "values"), scale=0.5)
    assert (found == MLX_ATTENTION(q, k, v, scale=0.5)).all().item()


def test_observers_see_every_layer_and_change_nothing(model):
    ids = mx.array(random_prompt(12))[None]
    seen = {}
    with dispatching():
        found = model(ids, cache=observers(model, lambda i, *arrays: seen.setdefault(i, arrays)))
    assert mx.array_equal(found, model(ids)).item()
    assert sorted(seen) == [0, 1]
    assert [a.shape for a in seen[1]] == [(1, 4, 12, 32), (1, 2, 12, 32), (1, 2, 12, 32)]


def first_keys(model, ids, offset=0):
    keys = []
    with dispatching():
        model(mx.array(ids)[None], cache=observers(model, lambda i, q, k, v: keys.append(k), offset))
    return keys[0]


def test_the_offset_is_the_position_of_the_first_token(model):
    ids = random_prompt(12)
    # Keys of the first layer know their own token and position only.
    expected = first_keys(model, random_prompt(5, seed=1) + ids)[:, :, 5:]
    assert mx.allclose(first_keys(model, ids, offset=5), expected, atol=1e-5).item()
    assert not mx.allclose(first_keys(model, ids), expected, atol=1e-2).item()


def test_recorders_attend_by_the_function_given(model):
    def attend(index, queries, keys, values, original, **options):
        assert options["mask"] == "causal"
        return original(queries, keys, values * (0 if index == 0 else 1), **options)

    ids = mx.array(random_prompt(6))[None]
    changed = tiny_model()
    changed.layers[0].self_attn.o_proj.weight = mx.zeros_like(changed.layers[0].self_attn.o_proj.weight)
    with dispatching():
        found = model(ids, cache=recorders(model, attend))
    assert mx.allclose(found, changed(ids), atol=1e-4).item()


def test_layers_of_another_kind_keep_their_own_cache():
    model = tiny_model(num_hidden_layers=3, layer_types=["full_attention", "sliding_attention", "full_attention"],
                       sliding_window=8)  # fmt: skip
    caches = recorders(model, lambda *args, **options: None)
    assert [type(c) is RotatingKVCache for c in caches] == [False, True, False]
    seen = {}
    ids = mx.array(random_prompt(20))[None]
    with dispatching():
        found = model(ids, cache=observers(model, lambda i, *arrays: seen.setdefault(i, arrays)))
    assert sorted(seen) == [0, 2]
    assert mx.allclose(found, model(ids, cache=type(model).make_cache(model)), atol=1e-5).item()


def test_a_cache_hook_on_the_instance_is_not_asked():
    model = tiny_model()

    def hook():
        raise AssertionError("asked")

    model.make_cache = hook
    assert len(recorders(model, lambda *args, **options: None)) == 2


def recorder():
    return recorders(tiny_model(), lambda *args, **options: None)[0]


def test_masks_are_those_of_an_empty_cache():
    assert recorder().make_mask(1) is None
    assert recorder().make_mask(4) == "causal"
    causal = np.tril(np.ones((4, 4), bool))
    assert np.array_equal(recorder().make_mask(4, return_array=True), causal)
    assert np.array_equal(recorder().make_mask(4, window_size=2), causal & ~np.tril(np.ones((4, 4), bool), -2))


def test_a_recorder_gives_back_what_it_was_given_last():
    cache = recorder()
    k, v = arrays(2)
    fetched = cache.update_and_fetch(k, v)
    assert cache.keys_and_values() == fetched
    assert [(type(h), h.part) for h in fetched] == [(Handle, "keys"), (Handle, "values")]
    assert all(mx.array_equal(h, a).item() for h, a in zip(fetched, (k, v), strict=True))
