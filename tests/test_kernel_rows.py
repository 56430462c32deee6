"""The attention kernel over rows of different lengths: each row as float64 attention over its own tokens."""

import host_kernels
import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import numpy
from test_attention_rows import GROUPS, HEADS, LENGTHS, held_by, masks, of_row, snapshot_of

from vq_kvcache import kernels
from vq_kvcache.attention import attend_codes

PLACE = "host" if mx.default_device().type == mx.DeviceType.cpu else kernels.backend()
DIMS = 64
ERROR = 2e-4 if PLACE == "host" else 2e-2  # of results of size 10; a GPU multiplies float32 in pieces of fewer bits


def run(launch, place):
    return host_kernels.run(launch) if place == "host" else kernels.run(launch, place)


@pytest.mark.parametrize("name", sorted(masks(1, 1)))
@pytest.mark.parametrize("length", [1, 3, 16])
def test_each_row_attends_to_its_own_tokens(length, name):
    snapshot = snapshot_of("spectral", LENGTHS, DIMS)
    assert len(set(snapshot.layout.packed_tokens)) > 2
    queries = mx.random.normal((len(LENGTHS), HEADS * GROUPS, length, DIMS), key=mx.random.key(length))
    mask = masks(length, len(LENGTHS))[name]
    given = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    sinks = mx.arange(HEADS * GROUPS) / 3 if name == "none" else None
    result = numpy(attend_codes(snapshot, queries, 0.2, given, sinks, PLACE, run))
    judged = 0
    for row, (keys, values) in enumerate(held_by(snapshot)):
        own = of_row(mask, row, keys.shape[1])
        if not keys.shape[1] or (isinstance(own, str) and keys.shape[1] < length):
            continue  # queries before the first token
        one = numpy(queries)[row : row + 1]
        expected = oracle.attention(one, keys[None], values[None], 0.2, own, None if sinks is None else numpy(sinks))
        np.testing.assert_allclose(result[row : row + 1], expected, atol=ERROR)
        judged += 1
    assert judged >= 4
    assert np.isfinite(result).all()
