"""The columns in which the CUDA kernel holds a head's levels, and the tables that tell it of them."""

import copy
import gc
import itertools
import weakref

import host_kernels
import mlx.core as mx
import numpy as np
import pytest

from vq_kvcache import attention, doctor, kernels
from vq_kvcache.attention import attend_codes
from vq_kvcache.kernels import columns, launches, steps
from vq_kvcache.spectral import codebook, trellis
from vq_kvcache.spectral.packing import Layout
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer

BITS = (0.5, 1.0, 2.0, 3.0, 4.25, 6.0, 7.5)


def layouts(dims=128):
    return [doctor.quantizer(dims, 3, bits, 0).layout for bits in BITS]


def test_every_stored_coordinate_has_one_column():
    for layout in layouts():
        for h in range(layout.heads):
            found = columns.head_columns(layout, h)
            assert len(found.order) % 16 == 0
            for part in (0, 1):
                order = found.orders(part, 176)
                assert len(order) == 176
                assert sorted(c for c in order if c >= 0) == list(range(len(layout.order[h])))


def tasks_of(numbers):
    """Read a head's list as lookup.h does: (kind, numbers of a task, its columns) of each task. Of a ring of 2 bits
    that fills a word the kind is its word."""
    column, alone, tail = 0, numbers[2] & 0xFFFF, numbers[2] >> 16
    for ring in range(numbers[3] >> 16 & 255):
        yield (numbers[3] >> 24) + ring, (), range(column, column + 16)
        column += 16
    at = columns.LIST_HEADER
    counts = [n >> 8 * i & 255 for n in numbers[:2] for i in range(4)]
    for kind, count in zip(columns.KINDS, counts, strict=True):
        for _ in range(count):
            if kind is None:
                yield kind, numbers[at : at + 24], range(alone, alone + 8)
                at, alone = at + 24, alone + 8
                continue
            width, half = kind
            eights, pairs = columns.RING_SLOTS[width], columns.RING_PAIRS.get(width, [])
            own = len(eights) // 2 if half else len(eights)
            yield kind, numbers[at : at + 4], [*range(column, column + own), *range(tail, tail + len(pairs))]
            at, column, tail = at + 4, column + own, tail + len(pairs)
    assert numbers[at:] == (0, 0, 0, 0)  # what is read ahead of the last


def test_columns_hold_the_slots_that_the_kernel_writes_there():
    """Each ring and code alone is told of with the coordinates of its columns; what is written later stays."""
    for layout in layouts():
        for h, segments in enumerate(layout.segments):
            found = columns.head_columns(layout, h)
            place = {}  # (word, shift, width) of each coordinate
            for s in segments:
                for slot in range(s.slots):
                    for w in range(s.words):
                        place[s.first + slot * s.words + w] = (s.first_word + w, s.shift + slot * s.width, s.width)
            written = {}
            for kind, task, own in tasks_of(found.numbers):
                if kind is None:
                    told = zip(task[::3], task[1::3], strict=True)
                    codes = [(n >> 12, ((n & 31) + 1) % 32, mask.bit_length() - 1) for n, mask in told]
                    assert list(task[1::3]) == [2 ** (width + 1) - 2 for _, _, width in codes]
                    assert list(task[2::3]) == [2 ** (width + 1) for _, _, width in codes]
                elif isinstance(kind, int):
                    codes = [(kind, 2 * slot, 2) for slot in columns.RING_SLOTS[2]]
                else:
                    width, half = kind
                    n, to_one, mask, to_two = task
                    slots = mask.bit_length() // width
                    assert mask == (1 << slots * width) - 1
                    assert (to_one, to_two) == ((slots - 1) * width, (slots - 2) * width)
                    eights, pairs = columns.RING_SLOTS[width], columns.RING_PAIRS.get(width, [])
                    places = [*(eights[: len(eights) // 2] if half else eights), *pairs]
                    codes = [(n >> 12, (n & 31) + slot * width, width) if slot < slots else None for slot in places]
                written |= dict(zip(own, codes, strict=True))
            for ring, coordinates in enumerate(found.whole):
                word = (found.numbers[3] >> 8 & 255) + ring
                assert [place[n] for n in coordinates] == [(word, slot, 1) for slot in range(32)]
            assert len(found.whole) == found.numbers[3] & 255
            assert sorted(written) == list(range(found.written))
            assert [written[c] for c, n in enumerate(found.order) if n >= 0] == [
                place[n] for n in found.order if n >= 0
            ]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 8, 12, 16, 19])
def test_heads_that_share_a_multiprocessor_are_cheap_and_dear(heads):
    """Each group shares with that of the head 132 further on; where that is itself, no order is better than another."""
    costs = [int(n) for n in np.random.default_rng(heads).permutation(heads) * 10 + 100]
    turns = columns.in_turn(costs)
    assert sorted(turns) == list(range(heads))
    together = [costs[turns[h]] + costs[turns[(h + 132) % heads]] for h in range(heads)]
    if heads == 8:
        assert together == [2 * 135] * heads
    if heads == 16:
        assert max(together) - min(together) <= 80
    if 132 % heads:
        assert max(together) <= 200 + 10 * heads  # the dearest with one of the cheapest


@pytest.mark.parametrize(
    ("widths", "cost"),
    [
        ([2] * 32 + [1] * 32, 2 * 35 + 63),  # words that are full
        ([4] * 8, 58),
        ([3] * 10 + [2], 64 + 56),  # a code alone takes as long as eight
        ([2] * 8 + [1] * 16, 37 + 44),  # half of the columns
        ([5] * 6 + [2], 58 + 56),
    ],
)
def test_a_head_costs_what_its_tasks_do(widths, cost):
    assert columns.head_columns(Layout([widths], trellis=True), 0).cost == cost


def test_entries_are_in_the_order_of_turns():
    keys, values = (doctor.quantizer(128, 8, 2.0, seed) for seed in (0, 1))
    made = columns.every_head(keys, values)
    _, table, _ = columns.chosen(keys, values)
    entries = np.array(table)[columns.HEADER_INTS :][: 2 * 8 * columns.HEAD_INTS].reshape(2, 8, -1)
    turns = columns.in_turn([made[0][h].cost + made[1][h].cost for h in range(8)])
    assert turns != list(range(8))
    assert entries[:, :, 5].tolist() == [turns, turns]
    assert entries[0, :, 3].tolist() == [keys.layout.first_words[h] for h in turns]


def test_looked_up_levels_are_those_of_the_codebooks():
    table = np.array(columns.lookup()).view(np.uint32)
    for width in (1, 2):
        raw = table[8 * width - 8 : 8 * width - 4].view(np.uint8).reshape(2, 8)
        halves = np.ascontiguousarray(raw.T).view(np.float16)[:, 0]
        levels = trellis.ring_levels(width).astype(np.float16)
        for bits in range(8):  # of slots s - 2, s - 1 and s, or the index itself
            index = 2 * ((bits >> 2 ^ bits) & 1) + (bits >> 1 & 1) if width == 1 else bits
            assert halves[bits] == levels[index]
    alone = table[columns.ALONE :].view(np.float16)
    for width in range(1, codebook.MAX_BITS + 1):
        assert np.array_equal(alone[2**width : 2 ** (width + 1)], codebook.levels(width).astype(np.float16))


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_fragments_are_the_basis_of_the_keys_in_the_order_of_the_columns(size):
    """PTX: of a 16 x 16 factor a lane has rows lane / 4 and eight more, pairs of columns 2 (lane % 4) and more."""
    keys = copy.copy(doctor.quantizer(64, 2, 2.0, 0))
    keys.synthesis = keys.synthesis * mx.array([size, 64 * size])[:, None, None]
    made = [columns.head_columns(keys.layout, h) for h in range(2)]
    found = np.array(columns.fragments(keys, made, 112)).view(np.float16).reshape(2, 7, 4, 32, 4, 2)
    assert 2**13 <= np.abs(found).max() < 2**14
    basis = np.array(keys.synthesis) * 2.0 ** -columns.exponent_of(keys)
    for h, m, k, lane, register, pair in itertools.product(range(2), range(7), range(4), (0, 5, 30), range(4), (0, 1)):
        column = 16 * m + lane // 4 + 8 * (register % 2)
        dim = 16 * k + lane % 4 * 2 + 8 * (register // 2) + pair
        coordinate = made[h].orders(0, 112)[column]
        expected = basis[h, coordinate, dim] if coordinate >= 0 else 0.0
        assert found[h, m, k, lane, register, pair] == np.float16(expected)


def test_layouts_with_too_many_columns_go_another_way():
    keys, values = (doctor.quantizer(64, 2, 3.0, seed) for seed in (0, 1))
    made = columns.every_head(keys, values)
    program, table, _ = columns.chosen(keys, values)
    assert np.array_equal(columns.column_table(keys, values, made, program.most), table)
    assert (program.warps, program.groups) == (10, 2)
    assert columns.column_table(keys, values, made, 48) is None
    case = doctor.Case(bits=3.0)
    held = doctor.snapshot(case)
    queries = mx.zeros((1, 8, 1, 64), mx.float16)
    for place, dtype, taken in (("cuda", mx.float16, True), ("cuda", mx.float32, False), ("metal", mx.float16, False)):
        plan, _ = steps.step(held, queries.astype(dtype), 1.0, None, None, place)
        assert bool(plan.shape.program) == taken


@pytest.mark.parametrize(
    ("planes", "packed", "exact", "expected"),
    [
        (8, 131072, 4, (1, 32, 126, 64, 33)),  # that of exact tokens takes fewer of the packed ones
        (8, 32768, 4, (2, 31, 33, 1, 32)),
        (8, 8192, 4, (4, 26, 10, 0, 26)),  # all of them, which take as long as a tile
        (64, 32768, 4, (1, 3, 266, 226, 4)),
        (8, 131072, 0, (0, 33, 125, 0, 33)),
        (400, 1000, 4, (4, 1, 32, 0, 1)),  # as many as there are, after the others
    ],
)
def test_groups_fill_the_machine(planes, packed, exact, expected):
    """Two on each multiprocessor where there are tokens enough, all of them ready at once."""
    program = columns.Program(160, 120, 10, 2)
    shape = steps.Shape("cuda", mx.float16, planes // 4, 4, 4, 1, 128, 128, program, None)
    rows = doctor.rows_of((0,) * (planes // 4), (0,) * (planes // 4), 64 * exact, (packed,) * (planes // 4))
    plan, params = steps._numbers(shape, rows, 256, ((packed, packed),), (0, 0, 0, 0, 0), False)
    numbers, (exact_groups, alone, each, besides, splits) = np.array(params), expected
    assert numbers[[16, 17, 8, 18, 5]].tolist() == [*expected]
    assert (plan.splits, plan.groups, numbers[4]) == (exact + splits, alone + exact_groups, exact)
    whole = alone * each + (splits - alone) * besides
    assert whole - (besides or each) < -(-packed // columns.TOKENS) <= whole


@pytest.mark.parametrize("exact", [1, 500, 700, 1000, steps.launches.MOST_SPLITS - 1])
def test_there_are_no_more_splits_than_are_merged(exact):
    shape = steps.Shape("cuda", mx.float16, 1, 1, 1, 1, 128, 128, columns.Program(160, 120, 10, 2), None)
    rows = doctor.rows_of((0,), (0,), 64 * exact, (1 << 20,))
    plan, params = steps._numbers(shape, rows, 64 * exact, ((1 << 20, 1 << 20),), (0, 0, 0, 0, 0), False)
    assert exact < plan.splits <= launches.MOST_SPLITS
    assert plan.splits == exact + np.array(params)[5]


def test_rings_that_fill_words_lie_behind_all_that_is_multiplied_with_a_tile():
    """Products take 32 columns at a time, or what is left of the row."""
    ring = tuple(range(32))
    for tile, rings, most in ((112, 2, 192), (128, 1, 160), (160, 0, 160), (176, 0, 176), (80, 2, 160)):
        found = columns.HeadColumns((), (0,) * tile, tile - 8, (ring,) * rings)
        assert found.fits(most)
        assert not found.fits(most - 16)


@pytest.mark.parametrize(
    ("bits", "dims", "expected"),
    [(1.0, 128, (120, 10, 2)), (2.0, 128, (120, 10, 2)), (3.0, 128, (152, 8, 2)), (4.0, 128, (152, 5, 3)),
     (6.0, 128, (168, 6, 2)), (1.0, 256, (120, 8, 2)), (7.5, 256, (280, 6, 1))],
)  # fmt: skip
def test_shared_memory_is_shared_out(bits, dims, expected):
    """All groups fit a multiprocessor, and each has what it needs; fewer warps where words or columns are many."""
    keys, values = (doctor.quantizer(dims, 2, bits, seed) for seed in (0, 1))
    made = columns.every_head(keys, values)
    (most, row, warps, groups), *_ = columns.chosen(keys, values)
    numbers = max(len(made[0][h].numbers) + len(made[1][h].numbers) for h in (0, 1))
    words = launches.head_words(keys, values)
    needed = columns.least_bytes(most, row, dims, words, numbers, warps)
    assert (row, warps, groups) == expected
    assert all(own.written <= row <= most - 8 for part in made for own in part)
    assert needed <= columns.shared_bytes(groups)
    assert groups * (columns.shared_bytes(groups) + kernels.GROUP_BYTES) <= kernels.SHARED_BYTES
    assert 32 * warps * groups <= kernels.MOST_THREADS
    assert warps * groups <= (columns.NARROW_WARPS if most <= columns.NARROW else columns.WIDE_WARPS)


def of_widths(*parts):
    """Quantizers of keys and of values of two heads."""
    return [
        SpectralQuantizer.stack(
            [SpectralQuantizer.from_transform(np.full(64, 0.5), np.eye(64), np.ones(64), np.array(w)) for w in part]
        )
        for part in parts
    ]


def test_keys_without_codes_are_attended_by_their_mean(monkeypatch):
    pair = of_widths([[0] * 64] * 2, [[2] * 64] * 2)
    monkeypatch.setattr(doctor, "quantizer", lambda dims, heads, bits, seed: pair[seed])
    case = doctor.Case(heads=2)
    error, own = doctor.compare(case, "host", lambda launch, place: host_kernels.run(launch))
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize(("dtype", "size"), [(mx.bfloat16, 2.0**-40), (mx.bfloat16, 2.0**40), (mx.float16, 2.0**8)])
def test_queries_may_be_of_any_size(dtype, size):
    """Also those that half precision, in which they are folded, does not hold."""
    held = doctor.snapshot(doctor.Case(dtype=dtype))
    queries = mx.random.normal((1, 8, 1, 64), key=mx.random.key(0)).astype(dtype)
    queries[:, 3] *= 2.0**-4
    queries[:, 4], queries[:, 5] = 0.0, -mx.abs(queries[:, 5])
    found = [
        attend_codes(held, queries * own, 0.125 / own, None, None, "host", lambda launch, _: host_kernels.run(launch))
        for own in (1.0, size)
    ]
    assert mx.isfinite(found[0]).all().item()
    assert mx.array_equal(*found).item()


def test_the_least_shared_memory_suffices(monkeypatch):
    """Also for a head without words of values, of which nothing but the end of its list is read ahead."""
    pair = of_widths([[8] * 48 + [0] * 16, [2] * 64], [[0] * 64, [1] * 64])
    monkeypatch.setattr(doctor, "quantizer", lambda dims, heads, bits, seed: pair[seed])
    made = columns.every_head(*pair)
    numbers = max(len(own.numbers) + len(other.numbers) for own, other in zip(*made, strict=True))

    def run(launch, place):
        if launch.body.name == "columns":
            told = dict(launch.template)
            words = launches.head_words(*pair)
            least = columns.least_bytes(told["MC"], told["ROW"], 64, words, numbers, told["WARPS"])
            launch = doctor.dataclasses.replace(launch, shared=least)
        return host_kernels.run(launch)

    case = doctor.Case(heads=2)
    error, own = doctor.compare(case, "host", run, columns.Program(96, 88, 1, 1))  # the last warp has a tile
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize("dims", launches.HEAD_DIMS)
@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0, 6.0, 7.5])
def test_the_program_that_is_to_be_used_is_the_one_that_is_checked(bits, dims, monkeypatch):
    keys, values = (doctor.quantizer(dims, 8, bits, seed) for seed in (0, 1))
    program = steps.program_of(keys, values, False, "cuda")
    asked, ran = [], []
    held = doctor.snapshot(doctor.Case(dims, dims, heads=8, bits=bits))
    monkeypatch.setattr(attention, "trusted", lambda *variant: asked.append(variant) or False)
    attention._trusts(held, "cuda")
    assert asked == [("cuda", dims, dims, mx.float16, program)]
    monkeypatch.setattr(doctor, "attend_codes", lambda *operands: ran.append(operands) or operands[1])
    doctor.first_wrong("cuda", dims, dims, mx.float16, program)
    held, queries, scale, mask, sinks, place, _, given = ran[0]
    assert given == program
    plan, _ = steps.step(held, queries, scale, mask, sinks, place, program)
    assert plan.shape.program == program


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


def test_a_trace_is_given_the_chunks_that_there_are(monkeypatch):
    """As many arrays as a plan may have of chunks: another number of them is another trace."""
    monkeypatch.setattr(steps, "attend_by", lambda run, plan, o: o.queries * len(o.words))
    monkeypatch.setattr(steps, "_traced", launches.kept_by_thread(2)(steps._traced.__wrapped__))
    queries = mx.ones((1, 8, 1, 64), mx.float16)
    plan, operands = steps.step(doctor.snapshot(doctor.Case(bits=2.25)), queries, 0.5, None, None, "cuda")
    assert len(operands.words) == 3
    for count in (3, 1, 2, 3):
        assert steps.attend(plan, operands._replace(words=operands.words[:count]))[0, 0, 0, 0].item() == count


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
    for wide in (False, True):
        steps.program_of(keys, values, wide, "cuda")
    launches.word_table(keys)
    alive = weakref.ref(keys)
    del keys, values
    gc.collect()
    assert alive() is None


def test_what_is_kept_is_not_found_by_another_with_the_same_id():
    class Named:
        def __init__(self, name):
            self.name = name

    find = launches.kept_with_keys(lambda keys: keys.name)
    first = Named("first")
    assert find(first) == "first"
    place, others = id(first), []
    del first
    while not others or id(others[-1]) != place:
        others.append(Named(len(others)))
    assert find(others[-1]) == len(others) - 1


def test_more_exact_tokens_than_splits_go_another_way(monkeypatch):
    monkeypatch.setattr(attention, "trusted", lambda *variant: True)
    held = doctor.snapshot(doctor.Case(bits=2.25))
    assert attention._kernels_attend(held, mx.float16, "cuda")
    assert not attention._kernels_attend(held, mx.bfloat16, "cuda")
    wide = doctor.rows_of((4,), (4,), 70_000, (256,))
    assert not attention._kernels_attend(doctor.dataclasses.replace(held, layout=wide), mx.float16, "cuda")
