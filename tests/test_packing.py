import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache.spectral.bit_allocator import gaussian_costs
from vq_kvcache.spectral.packing import Layout, allocate_words, fill_words, pack_reference

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
SPECTRA = {
    **{f"exp(-i/{s})": lambda d, s=s: np.exp(-np.arange(d) / s) for s in (3, 10, 16, 40, 64, 1000)},
    **{f"(1+i)^-{p}": lambda d, p=p: (1.0 + np.arange(d)) ** -p for p in (0.25, 0.5, 1, 1.5, 2, 3)},
    "flat": np.ones,
}


@st.composite
def width_tables(draw, max_heads=3, max_dims=70):
    """Widths [H, D] of any mix, ragged D, at least one above 0."""
    heads, dims = draw(st.integers(1, max_heads)), draw(st.integers(1, max_dims))
    row = st.lists(st.integers(0, 8), min_size=dims, max_size=dims)
    table = draw(st.lists(row, min_size=heads, max_size=heads))
    if not any(map(any, table)):
        table[-1][-1] = draw(st.integers(1, 8))
    return table


def random_codes(layout, tokens, seed=0, lead=()):
    """Codes uint32 [..., H, N, T] in storage order, each within its width; 0 beyond a head's own."""
    top = np.zeros((layout.heads, layout.stored, 1), dtype=np.int64)
    for h, order in enumerate(layout.order):
        top[h, : len(order), 0] = 2 ** layout.widths[h][order] - 1
    generator = np.random.default_rng(seed)
    return generator.integers(0, top + 1, (*lead, layout.heads, layout.stored, tokens), dtype=np.int64)


def packed(layout, codes):
    return layout.pack(layout.split(mx.array(codes.astype(np.uint32))))


def head_words(layout, words, head):
    return np.array(words)[..., layout.first_words[head] : layout.first_words[head + 1], :]


@given(width_tables(), st.sampled_from([1, 2, 7]), st.sampled_from([(), (2,), (2, 1)]), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_unpack_after_pack_is_the_identity(table, tokens, lead, seed):
    layout = Layout(table)
    codes = random_codes(layout, tokens, seed, lead)
    words = packed(layout, codes)
    assert words.dtype == mx.uint32
    assert words.shape == (*lead, layout.words, tokens)
    expected = layout.split(mx.array(codes.astype(np.uint32)))
    found = layout.unpack(words)
    assert [g.width for g in layout.groups] == sorted({b for row in table for b in row if b}, reverse=True)
    assert len(found) == len(expected)
    assert all((a == b).all().item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 31, 257, 1000])
def test_every_number_of_tokens_survives_at_all_widths(tokens):
    layout = Layout([[b % 9 for b in range(80)]])
    codes = random_codes(layout, tokens)
    decoded = oracle.unpack(np.array(packed(layout, codes))[:, :50], layout.widths[0])[:, layout.order[0]].T
    assert (codes[0][:, :50] == decoded).all()
    for found, rows in zip(layout.unpack(packed(layout, codes)), layout.split(mx.array(codes)), strict=True):
        assert (found == rows).all().item()


@given(width_tables(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_pack_agrees_with_the_reference_and_with_the_oracles_decoder(table, seed):
    layout = Layout(table)
    codes = random_codes(layout, 2, seed)
    words = packed(layout, codes)
    for t in range(2):
        assert np.array(words)[:, t].tolist() == pack_reference(codes[:, :, t], layout).tolist()
    for h, widths in enumerate(table):
        decoded = oracle.unpack(head_words(layout, words, h), widths)
        assert (codes[h, : len(layout.order[h])] == decoded[:, layout.order[h]].T).all()


@given(width_tables())
@settings(deadline=None, max_examples=50)
def test_segments_are_the_documented_ones_and_no_code_straddles_a_word(table):
    layout = Layout(table)
    for h, widths in enumerate(table):
        segments = layout.segments[h]
        rows = [(s.width, s.shift, s.first_word, s.words, s.slots, s.first) for s in segments]
        assert rows == oracle.segment_table(widths)
        assert all(s.shift + s.slots * s.width <= 32 for s in segments)
        assert sum(s.count for s in segments) == sum(b > 0 for b in widths)
        assert layout.order[h] == oracle.storage_order(widths, rows)
        assert layout.first_words[h + 1] - layout.first_words[h] == oracle.words_of(rows)
    assert layout.words == layout.first_words[-1]
    assert layout.stored == max(sum(b > 0 for b in widths) for widths in table)
    assert layout.padding_bits == 32 * layout.words - sum(map(sum, table))


@given(width_tables(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_unpacked_levels_are_those_of_the_codes_and_zero_beyond_a_heads_own(table, seed):
    layout = Layout(table)
    codes = random_codes(layout, 3, seed)
    found = np.array(layout.unpack_levels(packed(layout, codes)))
    assert found.shape == (layout.heads, layout.stored, 3)
    for h, order in enumerate(layout.order):
        for i, dimension in enumerate(order):
            assert found[h, i] == pytest.approx(oracle.levels(table[h][dimension])[codes[h, i]], abs=4e-6)
        assert (found[h, len(order) :] == 0).all()


def test_heads_of_different_words_lie_one_after_the_other():
    tables = [[8] * 12, [0] * 12, [3] * 11 + [1]]
    layout = Layout(tables)
    codes = random_codes(layout, 4)
    words = packed(layout, codes)
    assert layout.first_words == [0, 3, 3, 5]
    for h in (0, 2):
        own = packed(Layout(tables[h]), codes[h : h + 1, : len(layout.order[h])])
        assert (head_words(layout, words, h) == np.array(own)).all()


@pytest.mark.parametrize(
    ("widths", "contents"),
    [
        ([3] * 10 + [2], [{3: 10, 2: 1}]),
        ([4] * 8 + [4], [{4: 8}, {4: 1}]),
        ([3] * 8 + [4] * 8, [{4: 2, 3: 8}, {4: 6}]),
        ([8] * 5 + [0] * 3, [{8: 4}, {8: 1}]),
        ([7, 6, 5, 4, 3, 2, 1], [{7: 1, 6: 1, 5: 1, 4: 1, 3: 1, 2: 1, 1: 1}]),
        ([5] * 24, [{5: 6}] * 4),
    ],
)
def test_words_are_filled_as_full_as_can_be(widths, contents):
    assert fill_words(np.bincount(widths, minlength=9).tolist()) == [dict(c) for c in contents]


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 4])
@pytest.mark.parametrize("dims", HEAD_DIMS)
def test_less_than_three_percent_of_the_stored_bits_are_padding(dims, bits):
    words = int(bits * dims // 32)
    for name, spectrum in SPECTRA.items():
        layout = Layout(allocate_words(gaussian_costs(spectrum(dims)), words))
        assert layout.words == words, name
        assert layout.padding_bits < 0.03 * 32 * words, name


def cost_of_best_uniform_width(costs, words):
    fitting = [b for b in range(9) if b == 0 or -(-len(costs) // (32 // b)) <= words]
    return min(costs[:, b].sum() for b in fitting)


@given(st.lists(st.floats(1e-4, 1e2), min_size=1, max_size=80), st.integers(0, 24))
@settings(deadline=None, max_examples=50)
def test_allocated_words_are_never_exceeded_nor_beaten_by_one_width_for_all(spectrum, words):
    costs = gaussian_costs(sorted(spectrum, reverse=True))
    widths = allocate_words(costs, words)
    assert len(fill_words(np.bincount(widths, minlength=9).tolist())) <= words
    assert costs[np.arange(len(costs)), widths].sum() <= cost_of_best_uniform_width(costs, words) * (1 + 1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("dims", [64, 80, 128])
def test_decaying_spectra_never_do_worse_than_one_width_for_all(dims, bits):
    for name, spectrum in SPECTRA.items():
        costs = gaussian_costs(spectrum(dims))
        widths = allocate_words(costs, bits * dims // 32)
        cost = costs[np.arange(dims), widths].sum()
        assert cost <= cost_of_best_uniform_width(costs, bits * dims // 32) * (1 + 1e-9), name


def test_no_further_bit_fits_into_the_words():
    costs = gaussian_costs(np.exp(-np.arange(96) / 20))
    widths = allocate_words(costs, 9)
    for i in range(96):
        more = widths.copy()
        more[i] += 1
        assert len(fill_words(np.bincount(more, minlength=9).tolist())) > 9


@pytest.mark.parametrize("widths", [[[9]], [[-1, 2]], [[]], [[[1]]]])
def test_widths_out_of_range_are_refused(widths):
    with pytest.raises(ValueError, match=r"widths of shape \(.*\); expected integers \[H, D\] in 0\.\.8"):
        Layout(widths)


def test_words_of_another_layout_are_refused():
    layout = Layout([4] * 16)
    with pytest.raises(ValueError, match=r"3 words of mlx.core.uint32; expected 2 of uint32; wrong codec"):
        layout.unpack(mx.zeros((3, 5), mx.uint32))
    with pytest.raises(ValueError, match=r"2 words of mlx.core.int32; expected 2 of uint32; wrong codec"):
        layout.unpack_levels(mx.zeros((2, 5), mx.int32))


def test_nothing_to_pack_is_refused():
    with pytest.raises(ValueError, match="nothing is stored at these widths; expected a width above 0"):
        Layout([0] * 8).pack([])
