"""The columns in which the CUDA kernel holds a head's levels, and the tables that tell it of them."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from vq_kvcache import doctor, kernels
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
    """Read the tasks as lookup.h does: each ring and code alone is told of with the coordinates of its columns."""
    for layout in layouts():
        for h, segments in enumerate(layout.segments):
            found = columns.head_columns(layout, h)
            place = {}  # (word, shift, width) of each coordinate
            for s in segments:
                for slot in range(s.slots):
                    for w in range(s.words):
                        place[s.first + slot * s.words + w] = (s.first_word + w, s.shift + slot * s.width, s.width)
            seen, written, at, starts = set(), [], 0, []
            while at < len(found.tasks):
                what, told, shifts, mask = found.tasks[at : at + 4]
                starts.append(at // 4)
                at += 4
                width, word, column = what & 15, what >> 8, told & 0xFFFF
                if width == 0:
                    codes = [n >> half & 0xFFFF for n in found.tasks[at : at + 4] for half in (0, 16)]
                    at += 4
                    expected = [(c & 63, ((c >> 6 & 31) + 1) % 32, c >> 11) for c in codes]
                    own = range(column, column + 8)
                else:
                    slots = mask.bit_length() // width
                    assert (shifts >> 8 & 255, shifts >> 16) == ((slots - 1) * width, (slots - 2) * width)
                    eights, pairs = columns.RING_SLOTS[width], columns.RING_PAIRS.get(width, [])
                    if what & columns.HALF_RING:
                        eights, pairs = eights[: len(eights) if pairs else len(eights) // 2], []
                    places = [*eights, *pairs]
                    expected = [(word, (shifts & 255) + slot * width, width) for slot in places]
                    own = [*range(column, column + len(eights)), *range(told >> 16, (told >> 16) + len(pairs))]
                    assert sorted(found.order[c] >= 0 for c in own).count(True) == slots
                written += own
                for c, code in zip(own, expected, strict=True):
                    if found.order[c] >= 0:
                        assert place[found.order[c]] == code
                        seen.add(found.order[c])
            assert seen == set(range(len(layout.order[h])))
            assert sorted(written) == list(range(found.written))
            assert found.ends[-1] == len(found.tasks) // 4
            assert {0, *found.ends} <= {*starts, found.ends[-1]}


def test_a_tasks_numbers_find_room():
    """A task fills eight columns or more and takes eight numbers at most: so much is there, see VqColumnSpace."""
    for layout in layouts():
        for h in range(layout.heads):
            found = columns.head_columns(layout, h)
            assert len(found.tasks) <= found.written


@pytest.mark.parametrize("count", [1, 4, 5, 8, 23])
def test_tasks_are_dealt_to_warps_evenly(count):
    costs = np.random.default_rng(count).integers(40, 120, count).tolist()
    dealt = columns._dealt([columns._Task([i, 0, 0, 0], cost) for i, cost in enumerate(costs)])
    assert sorted(task.told[0] for own in dealt for task in own) == list(range(count))
    loads = [sum(task.cost for task in own) for own in dealt]
    assert len(loads) == columns.WARPS
    assert max(loads) - min(loads) <= max(costs)


def test_looked_up_levels_are_those_of_the_codebooks():
    table = np.array(columns.lookup()).view(np.uint32)
    for width in (1, 2):
        raw = table[4 * width - 4 : 4 * width].view(np.uint8).reshape(2, 8)
        halves = np.ascontiguousarray(raw.T).view(np.float16)[:, 0]
        levels = trellis.ring_levels(width).astype(np.float16)
        for bits in range(8):  # of slots s - 2, s - 1 and s, or the index itself
            index = 2 * ((bits >> 2 ^ bits) & 1) + (bits >> 1 & 1) if width == 1 else bits
            assert halves[bits] == levels[index]
    alone = table[columns.ALONE :].view(np.float16)
    for width in range(1, codebook.MAX_BITS + 1):
        assert np.array_equal(alone[2**width : 2 ** (width + 1)], codebook.levels(width).astype(np.float16))


def test_layouts_with_too_many_columns_go_another_way():
    keys, values = (doctor.quantizer(64, 2, 3.0, seed) for seed in (0, 1))
    most, groups, table = columns.chosen(keys, values)
    assert np.array_equal(columns.column_table(keys, values, most), table)
    assert groups == kernels.MOST_GROUPS
    assert columns.column_table(keys, values, 48) is None
    case = doctor.Case(bits=3.0)
    held = doctor.snapshot(case)
    queries = mx.zeros((1, 8, 1, 64), mx.float16)
    for place, dtype, taken in (("cuda", mx.float16, True), ("cuda", mx.float32, False), ("metal", mx.float16, False)):
        plan, _ = steps.step(held, queries.astype(dtype), 1.0, None, None, place)
        assert bool(plan.shape.columns) == taken


def test_groups_fill_the_machine():
    """Four on each multiprocessor where there are tokens enough, exact tokens included while they are few."""
    shape = steps.Shape("cuda", mx.float16, 1, 8, 4, 1, 128, 128, 176, (0, 0, 0, 0), 4)
    rows = doctor.rows_of((4,), (4,), 208, (131072,))
    plan, params, _ = steps._numbers(shape, rows, 256, ((131072, 131072),), (0, 0, 0, 0, 0), False)
    assert 0.9 * 4 * 132 <= plan.splits * shape.planes <= 1.05 * 4 * 132
    numbers = np.array(params)
    assert numbers[4] == 4  # 208 exact tokens
    assert numbers[8] == 16  # tiles of a split: with room left for the exact tokens it were 17
    assert (numbers[5] - 1) * numbers[8] < 131072 // columns.TOKENS <= numbers[5] * numbers[8]


def test_shared_memory_is_shared_out():
    """All groups fit a multiprocessor, and each has what it needs; fewer of them where words or columns are many."""
    for bits, dims, expected in ((1.0, 128, 4), (2.0, 128, 4), (6.0, 128, 3), (7.5, 256, 1)):
        keys, values = (doctor.quantizer(dims, 2, bits, seed) for seed in (0, 1))
        most, groups, _ = columns.chosen(keys, values)
        needed = columns.least_bytes(most, dims, columns.most_words(keys) + columns.most_words(values))
        assert groups == expected
        assert needed <= columns.shared_bytes(groups)
        assert groups * (columns.shared_bytes(groups) + kernels.GROUP_BYTES) <= kernels.SHARED_BYTES


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
    monkeypatch.setattr(steps, "_traced", launches.kept_by_thread(2)(steps._traced.__wrapped__))
    results = [attend_codes(held, queries * i, 0.5, None, None, "cuda") for i in (1, 2, 3)]
    assert len(traced) == 1
    assert [r[0, 0, 0, 0].item() for r in results] == [1, 2, 3]


def test_a_mask_of_every_token_is_not_traced_anew_at_every_step(monkeypatch):
    traced = []
    monkeypatch.setattr(steps, "attend_by", lambda run, plan, o: o.queries * 1)
    monkeypatch.setattr(steps, "_traced", lambda plan: traced.append(plan) or (lambda *o: o[1]))
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
