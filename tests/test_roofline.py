"""What is predicted for Apple's chips rests on counts: they must be those of the kernel text's own lines."""

import json
import sys

import numpy as np
import pytest
import report
import roofline
import speed
import speed_tables

from vq_kvcache.spectral.packing import Layout


class Counted(int):
    """A word whose operations are counted, as an instruction of a lane does them."""

    done, shifted = 0, 0

    def _count(self, value, shifts=0):
        Counted.done += 1
        Counted.shifted += shifts
        return Counted(value & 0xFFFFFFFF)

    def __and__(self, other):
        return self._count(int(self) & int(other))

    def __or__(self, other):
        return self._count(int(self) | int(other))

    def __xor__(self, other):
        return self._count(int(self) ^ int(other))

    def __lshift__(self, by):
        return self._count(int(self) << by, 1)

    def __rshift__(self, by):
        return self._count(int(self) >> by, 1)


def counted(call):
    Counted.done = Counted.shifted = 0
    result = call()
    return result, roofline.Work(Counted.done, Counted.shifted)


def turned(x, width, slots):
    """vq_turn of helpers.h, line by line; what is the same for all words is folded."""
    low = sum(1 << s * width for s in range(32 // width))
    even_low = sum(1 << s * width for s in range(0, 32 // width, 2))
    odd_low, mask, whole = low & ~even_low, (1 << width) - 1, width * slots
    f = x & ((1 << whole) - 1)
    one, two = f << width | f >> (whole - width), f << 2 * width | f >> (whole - 2 * width)
    t = f ^ (two & low)
    return (t << 1 & even_low * mask << 1) | (one & even_low), (t & odd_low * mask) | (one & odd_low) >> 1


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5])
def test_a_ring_is_turned_by_as_many_instructions_as_are_counted(width):
    """And the lines that are counted give the indices of README's byte format."""
    slots = 32 // width
    word = int(np.random.default_rng(width).integers(0, 1 << 32))
    (even, odd), work = counted(lambda: turned(Counted(word), width, slots))
    codes = [word >> s * width & (1 << width) - 1 for s in range(slots)]
    for s in range(slots):
        index = 2 * (codes[s] ^ (codes[s - 2] & 1)) + (codes[s - 1] & 1)
        assert (odd if s % 2 else even) >> (s * width - s % 2) & (2 << width) - 1 == index
    assert work == roofline.TURN


@pytest.mark.parametrize(("width", "position"), [(2, 0), (2, 4), (2, 9), (2, 17), (2, 24), (4, 11), (1, 3)])
def test_a_pair_of_codes_is_decoded_by_as_many_instructions_as_are_counted(width, position):
    """vq_pair and vq_centred: what their integer lines do to two words, and the operations on half2 behind them."""
    bits, byte = width + 1, min(position // 8, 2)
    offset = position - 8 * byte
    a, b = (Counted(w) for w in (0x9E3779B9, 0x7F4A7C15))

    def integers():
        if byte == 2:  # shifts by 16 leave nothing to mask, and up and down again is a mask
            pair = a >> 16 | (b & 0xFFFF0000)
        elif byte == 1:
            pair = (a >> 8 & 0xFFFF) | b >> 8 << 16
        else:
            pair = (a & 0xFFFF) | b << 16
        moved = offset + bits > 10
        k = 0 if moved else offset
        mask = ((1 << bits) - 1) << k
        return ((pair >> offset if moved else pair) & (mask | mask << 16)) | 0x64006400, k

    (half, k), work = counted(integers)
    found = [(int(half) >> shift & 0x3FF) >> k for shift in (0, 16)]
    assert found == [int(w) >> position & (1 << bits) - 1 for w in (a, b)]
    terms = {1: 2, 2: 2, 4: 3}[width]
    halves = 2 * ((2 if k == 0 else 1) + terms + 1)  # to [-1, 1]; the polynomial
    store = 1
    assert roofline.level_pair(width, True, position) == work.plus(roofline.Work(halves + store))


def test_words_cost_what_their_slots_do_and_more_in_two_passes():
    one, two = (roofline.word_pair(2, True, 16, passes, passes > 1) for passes in (1, 2))
    levels = sum(roofline.level_pair(2, True, s // 2 * 4 + s % 2).issued for s in range(16))
    assert one.issued == levels + 9 + 2 * 17 + 16
    assert two.issued == levels + 2 * (9 + 2 * 17 + 16 * 6)
    short = roofline.word_pair(2, True, 15, 1, False)
    assert short.issued == 7 * roofline.level_pair(2, True, 1).issued + 8 * (
        roofline.level_pair(2, True, 0).issued + 7
    ) + (9 + 2 * 17 + 15)


def test_the_slowest_pipe_decides_a_prediction():
    work = roofline.Work(10.0, 1.0)
    full = {name: row["full_us"] for name, row in roofline.predict(work, 2.0, 16, 88).items()}
    numbers = 2 * 8 * 128 * 131072
    assert full["M1 Max"] == pytest.approx(numbers * (10 + roofline.products(16)) / (32 * 128 * 1296))
    shifts = roofline.predict(roofline.Work(40.0, 40.0), 2.0, 16, 88)["M1 Max"]
    assert shifts["full_us"] == pytest.approx(numbers * 40 / (32 * 32 * 1296))
    memory = roofline.predict(roofline.Work(), 400.0, 8, 88)["M4 Pro"]
    assert memory["full_us"] == memory["latency_us"] == pytest.approx(numbers * 50 / 273e3)
    waiting = roofline.predict(work, 2.0, 16, 4)["M1 Max"]
    assert waiting["latency_us"] == pytest.approx(1.79 * full["M1 Max"])
    assert roofline.products(16) - roofline.products(8) == pytest.approx(8 * 128 / 102 / 2 + 8 / 256 + 7 * 8 / 256)
    scored = (8 + 1 + 4 + 2 - 1) / 2  # products with four queries, their load, what comes from halves; less the store
    spread = (2 * 8 + 2 * 8) / 256
    assert roofline.products(8) == pytest.approx((scored + spread + 8 * 128 / 102 + 1) / 2 + 7 * 8 / 256)


def test_widths_of_a_plan_are_counted_by_its_layouts():
    plan = speed.random_plan(speed.SMALL | {"num_hidden_layers": 2}, 2.0)
    each, bits, widths = roofline.by_width(plan, 1)
    assert bits == 2.0
    assert sum(widths.values()) == 2 * 2 * 2 * 64  # layers, parts, heads, dims
    stored = {int(name.split()[0]): 0 for name in widths}
    for name, count in widths.items():
        stored[int(name.split()[0])] += count
    flat = [w for layer in plan.layers.values() for q in (layer.keys, layer.values) for h in q.widths for w in h]
    assert stored == {w: flat.count(w) for w in stored}
    assert each.issued > each.shifts > 0
    assert roofline.by_width(plan, 8)[0].issued > each.issued


def test_a_segment_is_decoded_in_the_passes_that_have_rows_of_it():
    layout = Layout([[2] * 32 + [1] * 32], trellis=True)
    for rows, passes in ((64, [1, 1]), (32, [1, 1]), (16, [2, 2]), (48, [1, 2])):
        assert [own for *_, own in roofline.segments(layout, rows)] == passes


def test_counts_in_another_text_are_refused_and_named_stale(monkeypatch):
    monkeypatch.setattr(roofline, "COUNTED", {"metal.h": ("no such line",)})
    monkeypatch.setattr(sys, "argv", ["roofline.py"])
    with pytest.raises(SystemExit, match=r"the kernel text has no 'no such line'; expected"):
        roofline.main()
    kept = json.loads((report.RESULTS / "roofline.json").read_text())
    assert "nothing in this table was ever measured on a Mac" in speed_tables.roofline(kept)
    kept["text"]["metal.h"] = "another"
    assert speed_tables.roofline(kept).endswith(" The kernel text has changed since it was counted.")
