"""Text like the calibration's is told from other text, on the shipped model with its codec."""

import dataclasses
import re
import warnings

import drift_limit
import measure
import mlx.core as mx
import numpy as np
import pytest
from conftest import like_calibrated, random_codec

from vq_kvcache import demo, drift, hooks
from vq_kvcache.drift import LEAST_TOKENS, LIMIT, STRIDE, Drift, DriftSums
from vq_kvcache.hooks import make_prompt_cache
from vq_kvcache.options import CacheOptions
from vq_kvcache.spectral.codec import find_codec, fingerprint
from vq_kvcache.spectral.sealing import BLOCK
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer


@pytest.fixture(scope="module")
def shipped():
    model, tokenizer = hooks.load(str(demo.model_folder()))
    codec = find_codec(fingerprint(model))
    model.set_dtype(mx.float32)  # fast on a CPU
    return model, tokenizer, codec


def read(shipped, monkeypatch, ids):
    """(the largest energy of a layer, warnings) of a text read in pieces, at 8 bits, which are coded fastest."""
    model, _, codec = shipped
    monkeypatch.setattr(codec, "fingerprint", fingerprint(model))
    monkeypatch.setattr(drift, "_warned", set())
    caches = make_prompt_cache(model, cache=CacheOptions(8.0, codec=codec))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for piece in (ids[:-64], ids[-64:]):
            mx.eval(model(mx.array([piece]), cache=caches), [c.state for c in caches])
    told = [str(w.message) for w in found]
    assert all(c.drift.tokens * STRIDE >= LEAST_TOKENS for c in caches)
    assert any(c.drift.is_large for c in caches) is bool(told)
    return max(c.drift.energy for c in caches), told


def test_no_warning_on_text_of_the_calibrations_kind(shipped, monkeypatch):
    kinds = measure.held_out(shipped[1], shipped[2], drift_limit.TOKENS // 4, 1)
    energy, told = read(shipped, monkeypatch, [i for ids in kinds for i in ids])
    assert 0.9 < energy < LIMIT - 0.1
    assert told == []


def test_one_warning_on_text_unlike_the_calibrations(shipped, monkeypatch):
    texts = drift_limit.unlike(shipped[1])
    assert {len(ids) for ids in texts.values()} == {drift_limit.TOKENS}
    energy, told = read(shipped, monkeypatch, texts["French"])
    assert energy > LIMIT
    (line,) = told
    assert re.match(r"this text is unlike the codec's calibration text \(1\.[34] times the energy in its coord", line)


def test_energy_is_that_of_coordinates_over_their_variance():
    transforms = random_codec(heads=2, key_dims=32).layers[0][0]
    stretch = np.where(np.arange(32) % 2, 1.5, 1.0).astype(np.float32)
    stretch = np.broadcast_to(np.where(np.arange(9) > 0, stretch[:, None], 1.0), (2, 32, 9)).astype(np.float32)
    transforms = dataclasses.replace(transforms, stretch=stretch)
    table = [np.array([4] * 8 + [2] * 8 + [0] * 16), np.array([3] * 4 + [0] * 28)]
    quantizer = transforms.quantizer(table)
    x = like_calibrated(transforms, 3, 200)
    z = (np.array(x, dtype=np.float64) - transforms.mean[:, None]) @ transforms.analysis
    over = (z**2 / transforms.eigenvalues[:, None]).sum(axis=(0, 2))
    # Eight dimensions without bits are looked at, those of most variance.
    seen = np.concatenate([over[0][: 16 + 8], over[1][: 4 + 8]])
    assert quantizer.drift(x).item() == pytest.approx(seen.sum() / (24 + 12), rel=1e-4)
    assert quantizer.drift(x).item() == pytest.approx(3 * 200, rel=0.1)
    twice = mx.array(transforms.mean)[:, None] + 2 * (x - mx.array(transforms.mean)[:, None])
    assert quantizer.drift(twice).item() == pytest.approx(4 * quantizer.drift(x).item(), rel=1e-4)


def test_what_never_varied_is_not_looked_at():
    quantizer = SpectralQuantizer.stack([
        SpectralQuantizer.from_transform(np.zeros(4), np.eye(4), [4.0, 1.0, 0.0, 0.0], [4, 4, 4, 0])
    ])  # fmt: skip
    x = mx.array([[[[2.0, 1.0, 1e-3, 1e-3]]]])
    assert quantizer.drift(x).item() == pytest.approx(1.0)


def test_the_larger_of_keys_and_values_counts_per_token():
    sums = DriftSums(mx.array([50.0, 260.0]), 200)
    assert sums.read() == Drift(200, 1.3)
    assert DriftSums.total([sums, DriftSums(mx.array([10.0, 0.0]), 50), DriftSums()]).read() == Drift(250, 1.04)
    assert DriftSums().read() is None
    assert Drift(LEAST_TOKENS // STRIDE, LIMIT * 1.01).is_large
    assert not Drift(LEAST_TOKENS // STRIDE - 1, LIMIT * 1.01).is_large
    assert not Drift(LEAST_TOKENS // STRIDE, LIMIT).is_large


def test_of_blocks_that_come_one_at_a_time_every_fourth_is_looked_at():
    layer = random_codec().plan(2.0).layers[0]
    vectors = mx.ones((1, layer.keys.mean.shape[0], 3 * BLOCK, layer.keys.mean.shape[-1]))
    words, sums, looked = mx.zeros((1, 1, 1)), DriftSums(), []
    for tokens in (3 * BLOCK, *[BLOCK] * 9):
        before = sums.tokens
        sums.watch(words, vectors[:, :, :tokens], vectors[:, :, :tokens], layer.keys, layer.values)
        looked.append(sums.tokens - before)
    assert looked == [3 * BLOCK // STRIDE, *[BLOCK, 0, 0, 0] * 2, BLOCK]
    alike = max(q.drift(vectors[:, :, :1]).item() for q in (layer.keys, layer.values))
    assert sums.read().energy == pytest.approx(alike, rel=1e-4)
