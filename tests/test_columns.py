"""The columns in which the CUDA kernel holds a head's levels, and the tables that tell it of them."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from vq_kvcache import doctor
from vq_kvcache.attention import attend_codes
from vq_kvcache.kernels import columns, launches, steps
from vq_kvcache.spectral import codebook, trellis

BITS = (0.5, 1.0, 2.0, 3.0, 4.25, 6.0, 7.5)


def layouts(dims=128):
    return [doctor.quantizer(dims, 3, bits, 0).layout for bits in BITS]


def test_every_stored_coordinate_has_one_column():
    for layout in layouts():
        for h in range(layout.heads):
            order = columns.head_columns(layout, h).order
            assert sorted(c for c in order if c >= 0) == list(range(len(layout.order[h])))
            assert len(order) % 16 == 0


def test_columns_hold_the_slots_that_the_kernel_writes_there():
    """Read the lists as columns.h does: each ring and code alone is told of with the coordinates of its columns."""
    for layout in layouts():
        for h, segments in enumerate(layout.segments):
            found = columns.head_columns(layout, h)
            place = {}  # (word, shift) of each coordinate
            for s in segments:
                for slot in range(s.slots):
                    for w in range(s.words):
                        place[s.first + slot * s.words + w] = (s.first_word + w, s.shift + slot * s.width)
            seen = set()
            for told, rest in zip(found.words[::2], found.words[1::2], strict=True):
                word, rings, start, alone = told & 0xFFFF, told >> 16, rest & 0xFFFF, rest >> 16
                for i in range(rings):
                    a, b = found.runs[start + 2 * i : start + 2 * i + 2]
                    width, slots, shift = a & 255, a >> 8 & 255, a >> 16
                    eights = columns.RING_SLOTS[width]
                    if width < 3 and slots <= len(eights) // 2:
                        eights = eights[: len(eights) // 2]
                    pairs = columns.RING_PAIRS.get(width, [])
                    written = [(b & 0xFFFF) + n for n in range(len(eights))] + [
                        (b >> 16) + n for n in range(len(pairs))
                    ]
                    for column, slot in zip(written, eights + pairs, strict=True):
                        coordinate = found.order[column]
                        assert (coordinate >= 0) == (0 <= slot < slots)
                        if coordinate >= 0:
                            assert place[coordinate] == (word, shift + slot * width)
                            seen.add(coordinate)
                for told_code in found.runs[start + 2 * rings : start + 2 * rings + alone]:
                    coordinate = found.order[told_code >> 16]
                    assert place[coordinate] == (word, told_code & 31)
                    seen.add(coordinate)
            assert seen == set(range(len(layout.order[h])))


@pytest.mark.parametrize("count", [1, 4, 5, 8, 23])
def test_words_are_dealt_to_warps_evenly(count):
    costs = np.random.default_rng(count).integers(40, 120, count).tolist()
    dealt = columns._dealt(costs)
    assert sorted(dealt) == list(range(count))
    loads = [sum(costs[w] for w in dealt[i :: columns.WARPS]) for i in range(columns.WARPS)]
    assert max(loads) - min(x for x in loads if x) <= max(costs)


def test_looked_up_levels_are_those_of_the_codebooks():
    table = np.array(columns.lookup()).view(np.uint32)
    for width, first in ((1, 0), (2, 2)):
        raw = table[first : first + 2**width].view(np.uint8).reshape(2, -1)
        halves = np.ascontiguousarray(raw.T).view(np.float16)[:, 0]
        assert np.array_equal(halves, trellis.ring_levels(width).astype(np.float16))
    alone = table[columns.ALONE_LEVELS :].view(np.float16)
    for width in range(1, codebook.MAX_BITS + 1):
        start = 2**width - 2
        assert np.array_equal(alone[start : start + 2**width], codebook.levels(width).astype(np.float16))


def test_layouts_with_too_many_columns_go_another_way():
    keys, values = (doctor.quantizer(64, 2, 3.0, seed) for seed in (0, 1))
    assert columns.column_table(keys, values, columns.most_columns(64, 64)) is not None
    assert columns.column_table(keys, values, 48) is None
    case = doctor.Case(bits=3.0)
    held = doctor.snapshot(case)
    queries = mx.zeros((1, 8, 1, 64), mx.float16)
    for place, dtype, taken in (("cuda", mx.float16, True), ("cuda", mx.float32, False), ("metal", mx.float16, False)):
        plan, _ = steps.step(held, queries.astype(dtype), 1.0, None, None, place)
        assert bool(plan.shape.columns) == taken


def test_groups_fill_the_machine():
    """Four on each multiprocessor where there are tokens enough, exact tokens included while they are few."""
    shape = steps.Shape("cuda", mx.float16, 1, 8, 4, 1, 128, 128, 176, (0, 0, 0, 0))
    rows = doctor.rows_of((4,), (4,), 208, (131072,))
    plan, params, _ = steps._numbers(shape, rows, 256, ((131072, 131072),), (0, 0, 0, 0, 0), False)
    assert columns.groups_that_fill(176, 128) == 4 * 132
    assert columns.groups_that_fill(304, 256) == 2 * 132  # so much shared memory does each need
    assert 0.9 * 4 * 132 <= plan.splits * shape.planes <= 4 * 132
    numbers = np.array(params)
    assert numbers[4] == 4  # 208 exact tokens
    assert (numbers[5] - 1) * numbers[8] < 131072 // columns.TOKENS <= numbers[5] * numbers[8]


def test_a_step_of_many_layers_is_planned_once(monkeypatch):
    held = doctor.snapshot(doctor.Case(bits=2.25))
    queries = mx.ones((1, 8, 1, 64), mx.float16)
    first = steps.step(held, queries, 0.5, None, None, "cuda")
    again = steps.step(held, queries * 2, 0.5, None, None, "cuda")
    assert first[0] == again[0]
    assert first[1].params is again[1].params
    traced = []

    def counting(run, plan, o):
        traced.append(plan)
        return o.queries[..., :64] * 1

    monkeypatch.setattr(steps, "attend_by", counting)
    steps._traced.cache_clear()
    results = [attend_codes(held, queries * i, 0.5, None, None, "cuda") for i in (1, 2, 3)]
    steps._traced.cache_clear()
    assert len(traced) == 1
    assert [r[0, 0, 0, 0].item() for r in results] == [1, 2, 3]


def test_a_mask_of_every_token_is_not_traced_anew_at_every_step(monkeypatch):
    traced = []
    monkeypatch.setattr(steps, "attend_by", lambda run, plan, o: o.queries * 1)
    monkeypatch.setattr(steps, "_traced", lambda plan, thread: traced.append(plan) or (lambda *o: o[1]))
    queries = mx.ones((1, 8, 1, 64), mx.float16)
    held = doctor.snapshot(doctor.Case(bits=2.25))
    attend_codes(held, queries, 0.5, None, None, "cuda")
    assert len(traced) == 1
    attend_codes(held, queries, 0.5, mx.ones((1, 1, 1, held.length), mx.bool_), None, "cuda")
    attend_codes(held, queries, 0.5, mx.zeros((1, 1, 1, held.length)), None, "cuda")
    assert len(traced) == 1


def test_tables_go_with_their_quantizers():
    keys, values = (doctor.quantizer.__wrapped__(64, 2, 2.25, seed) for seed in (0, 1))
    steps._tables(keys, values, False, "cuda")
    steps._tables(keys, values, True, "cuda")
    launches.word_table(keys)
    alive = weakref.ref(keys)
    del keys, values
    gc.collect()
    assert alive() is None


def test_more_exact_tokens_than_splits_go_another_way():
    held = doctor.snapshot(doctor.Case(bits=2.25))
    queries = mx.zeros((1, 8, 1, 64), mx.float16)
    assert launches.fits(held, queries, "cuda")
    wide = doctor.rows_of((4,), (4,), 70_000, (256,))
    assert not launches.fits(doctor.dataclasses.replace(held, layout=wide), queries, "cuda")
