"""The kernels' text against plain operations and a float64 oracle: on this machine by g++, with the host's prelude and
with Metal's against a shim of its library; on a GPU by MLX."""

import dataclasses
from concurrent import futures

import host_kernels
import metal_kernels
import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import numpy

from vq_kvcache import doctor, kernels, storage, trust
from vq_kvcache.attention import attend_codes
from vq_kvcache.chunks import Packed
from vq_kvcache.kernels import launches, steps

ON_CPU = mx.default_device().type == mx.DeviceType.cpu
PLACES = ("host", "metal") if ON_CPU else (kernels.backend(),)
PLACE = PLACES[0]


def run(launch, place):
    if not ON_CPU:
        return kernels.run(launch, place)
    return {"host": host_kernels.run, "metal": metal_kernels.run}[place](launch)


def shifting(body):
    """`run` with the numbers that this kernel writes in wrong places."""

    def wrong(launch, place):
        result = run(launch, place)
        return [mx.roll(r, 1, axis=-1) for r in result] if launch.body.name == body else result

    return wrong


def cases():
    """(place, case) of everything that the kernels take."""
    return [(place, case) for place in PLACES for case in doctor.table(place)]


@pytest.mark.parametrize(("place", "case"), cases(), ids=str)
def test_attention_is_as_close_to_float64_as_mlx_own(place, case):
    error, own = doctor.compare(case, place, run)
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize("tokens", [1100, 1140])
def test_a_warp_goes_from_tile_to_tile_and_reads_nothing_behind_a_chunk(tokens):
    """Chunks of 11 or 12 tiles, the last of them not full, for ten warps, of which some take two."""
    case = doctor.Case(heads=8, tokens=tokens, bits=2.0)
    error, own = doctor.compare(case, PLACE, run)
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize(
    "case", [doctor.Case(sinks=True), doctor.Case(96, 64, length=3, mask="causal", bits=5.0)], ids=str
)
def test_what_is_compared_with_is_the_attention_of_the_oracle_over_the_decoded_arrays(case):
    p = doctor.problem(dataclasses.replace(case, dtype=mx.float32))
    keys, values = p.held.decoded()
    sinks = None if p.sinks is None else numpy(p.sinks)
    expected = oracle.attention(*(numpy(x) for x in (p.queries, keys, values)), p.scale, p.mask, sinks)
    assert np.abs(p.expected - expected).max() < 1e-5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 3.0, 4.25, 5.5, 7.0])
def test_encoding_writes_the_words_of_plain_operations(bits, place):
    quantizer = doctor.quantizer(96, 2, bits, 0)
    x = mx.random.normal((2, 2, 70, 96), key=mx.random.key(0)) * 2 + quantizer.mean
    (found,) = run(launches.encode(quantizer, x), place)
    expected = quantizer.encode_words(x)
    # Sums differ in their last bits, so a number on an edge may fall to either side.
    a, b = quantizer.decode_words(found), quantizer.decode_words(expected)
    assert mx.mean((a - b) ** 2).item() <= 1e-5 * mx.mean((x - b) ** 2).item()
    assert np.mean(np.array(found) == np.array(expected)) > (0.998 if ON_CPU else 0.9)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bits", [1.0, 2.5, 4.0, 7.0])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=["float16", "float32"])
def test_decoding_gives_the_levels_of_plain_operations(bits, dtype, place):
    held = doctor.snapshot(doctor.Case(bits=bits, tokens=523, heads=3))
    for part, quantizer in enumerate((held.key_quantizer, held.value_quantizer)):
        expected = quantizer.decode_levels(held.words(0, held.packed_tokens)[part])[:, 1:]
        (found,) = run(launches.decode(held, part, 1, 2, dtype), place)
        error = np.abs(numpy(found[..., : held.packed_tokens]) - numpy(expected)).max()
        assert error <= (4e-3 if dtype == mx.float16 else 1e-5)


def test_a_tile_may_hold_a_part_of_the_dims(monkeypatch):
    monkeypatch.setattr(launches, "group_of", lambda key_dims, value_dims, *rest: (key_dims // 2, value_dims // 2, 1))
    case = doctor.Case(128, 64, bits=3.25, length=2, mask="causal", dtype=mx.float32)  # codes of no other test
    plans = []
    monkeypatch.setattr(
        steps, "attend_by", lambda run, plan, o, own=steps.attend_by: plans.append(plan) or own(run, plan, o)
    )
    error, own = doctor.compare(case, PLACE, run)
    assert error <= doctor.allowed(case, own)
    assert [plan.shape.group[:3] for plan in plans] == [(64, 32, 1)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [1, 2, 16])
def test_coordinates_that_no_code_has_count_for_nothing(length, place):
    """Their rows of a tile are never written, but for other things that lie there meanwhile."""
    case = doctor.Case(bits=0.5, length=length, tokens=420)
    widths = doctor.quantizer(64, 2, 0.5, 1).widths
    assert min(np.count_nonzero(np.array(w)) for w in widths) < 32
    error, own = doctor.compare(case, place, lambda launch, _: run(launch, place))
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize(
    ("place", "group", "length", "expected"),
    [("metal", 4, 1, 4), ("metal", 5, 1, 8), ("metal", 4, 2, 8), ("metal", 3, 3, 16), ("metal", 8, 16, 16),
     ("cuda", 4, 1, 16)],
)  # fmt: skip
def test_a_group_takes_no_more_queries_than_there_are(place, group, length, expected):
    """On Metal, of 4, 8 or 16; what CUDA multiplies takes sixteen."""
    held, queries = doctor.snapshot(doctor.Case()), mx.zeros((1, 2 * group, length, 64))
    plan, operands = steps.step(held, queries, 1.0, None, None, place)
    assert plan.shape.group[4] == dict(steps.parts_launch(plan, operands).template)["QUERIES"] == expected
    assert plan.shape.row_tiles == -(-group * length // expected)


def test_what_is_tried_before_use_is_of_every_number_of_queries():
    """Or a program would be used that nobody tried."""
    tried = [doctor.Case(**own) for own in doctor.FIRST]
    assert {launches.queries_of(case.group * case.length, "metal") for case in tried} == set(launches.QUERIES)


@pytest.mark.parametrize(
    ("dims", "queries", "expected", "of_a_core"),
    [(64, 4, (32, 32, 4), 8), (128, 4, (32, 32, 4), 8), (128, 16, (32, 32, 2), 6), (80, 8, (80, 80, 2), 4),
     (112, 4, (112, 112, 1), 2), (256, 8, (32, 32, 2), 6)],
)  # fmt: skip
def test_as_many_warps_as_a_core_of_metal_has_room_for(dims, queries, expected, of_a_core):
    """With tiles of 32 rows or more: lower ones are passed too often."""
    rows, _, warps = found = launches.group_of(dims, dims, 2, 0, queries, "metal")
    needed = launches.shared_bytes(dims, dims, rows, 2, warps, 0, queries, "metal")
    assert found == expected
    assert needed <= launches.METAL_BYTES
    assert launches.METAL_CORE_BYTES // needed * warps == of_a_core


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("group", "length"), [(1, 1), (3, 1), (5, 1), (7, 1), (4, 2), (3, 3), (7, 4)])
def test_groups_of_every_size(group, length, place):
    case = doctor.Case(96, 64, heads=2, group=group, length=length, bits=2.5, mask="causal")
    error, own = doctor.compare(case, place, lambda launch, _: run(launch, place))
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize("case", [doctor.Case(), doctor.Case(bits=0.5, dtype=mx.float32)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_number_is_not_taken_for_nothing(place, case):
    """A query of NaN gives NaN, and to others nothing; a row of which nothing is visible gives zero."""
    p = doctor.problem(dataclasses.replace(case, length=2, batch=2))
    queries = mx.array(p.queries)
    queries[0, 3, 1, 5] = float("nan")
    mask = mx.ones((2, 1, 2, p.held.length), mx.bool_)
    mask[1] = False
    found = numpy(attend_codes(p.held, queries, p.scale, mask, None, place, run))
    assert np.isnan(found[0, 3, 1]).all()
    assert np.isnan(found).sum() == found.shape[-1]
    assert not found[1].any()


@pytest.fixture
def _planned_anew():
    steps._numbers.cache_clear()
    yield
    steps._numbers.cache_clear()


@pytest.mark.usefixtures("_planned_anew")
@pytest.mark.parametrize("besides", [0, 1, 3])
@pytest.mark.parametrize("mask", ["none", "added"])
def test_a_group_may_take_several_splits(mask, besides, monkeypatch):
    """Two groups those of exact tokens in turn, and of packed ones 1 and 1 tile, 3 and 2, or none, as is left by three
    alone."""

    def split(exact, in_turn, tiles, *_):
        if not in_turn:
            return steps.Split(exact, 1, tiles, 0)
        alone = 3 if besides else 1
        left = {0: 0, 1: 2, 3: 5}[besides]
        return steps.Split(2, alone, -(-(tiles - left) // alone), besides)

    monkeypatch.setattr(steps, "_split", split)
    case = doctor.Case(96, 64, bits=3.25, batch=2, mask=mask, tokens=600, window=300)
    held = doctor.snapshot(case)
    plan, _ = steps.step(held, mx.zeros((2, 8, 1, 96), mx.float16), 1.0, None, None, PLACE)
    assert plan.groups < plan.splits or not plan.shape.program
    error, own = doctor.compare(case, PLACE, run)
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("exact", "packed", "dims", "width"),
    [
        (0, 1, 64, 0),
        (1, 36, 64, 0),  # all of them read ahead; 0: in the order of the coordinates
        (3, 37, 64, 128),
        (5, 60, 64, 144),  # more columns than are read ahead, and more splits than two for each lane
        (2, 150, 80, 176),
        (70, 3, 64, 160),
        (3, 40, 192, 400),  # two parts
    ],
)
def test_splits_are_merged_however_many_there_are(exact, packed, dims, width, sinks, place):
    """Also those beyond what is read before anything is waited for."""
    heads, group, length, parts = 2, 2, 1, 4 if dims <= 128 else 2
    rng, splits, rows, stored = np.random.default_rng(exact), exact + packed, group * length, dims - 3
    sums = rng.normal(size=(heads, splits, rows, 2)) * [5, 1]
    sums[..., 1] = np.exp2(sums[..., 1])
    sums[0, :, 0] = -1e30, 0.0  # a query of which nothing is visible
    sums[1, :, :, 0] -= 300.0  # too small for float32, unless relative to the maximum
    sums[1, -1, 1, 0] += 600.0  # too large, unless it is found in the last split
    outputs = rng.normal(size=(heads, splits, rows, width or dims))
    unfold, mean = rng.normal(size=(heads, stored, dims)), rng.normal(size=(heads, dims))
    order = np.full((heads, width), -1)
    for h in range(heads if width else 0):
        order[h, rng.permutation(width)[:stored]] = rng.permutation(stored)
    table = np.concatenate([[0, 0, 0, stored, width or dims, 16 if width else 0, *[0] * 10], order.ravel()])
    params = [1, heads, group, length, exact, packed, *[0] * 9, int(sinks), *[0] * 5]
    logits = rng.normal(size=heads * group)
    launch = kernels.Launch(
        kernels.MERGE,
        [mx.array(x.astype(np.float32)) for x in (sums, outputs, unfold, mean, logits)]
        + [mx.array(np.array(x, np.int32)) for x in (table, params)],
        [(1, heads * group, length, dims)],
        [mx.float32],
        (rows, heads, 1),
        parts * dims,
        4 * (launches.MOST_SPLITS + parts * dims + 2),
        (("T", mx.float32), ("DV", dims), ("PARTS", parts)),
    )
    found = numpy(run(launch, place)[0]).reshape(heads, rows, dims)
    weights = np.exp2(sums[..., 0])
    for h in range(heads):
        for r in range(rows):
            codes = weights[h, exact:, r] @ outputs[h, exact:, r]
            folded = codes[:stored]
            if width:
                folded = np.zeros(stored)
                folded[order[h][order[h] >= 0]] = codes[order[h] >= 0]
            own = weights[h, :exact, r] @ outputs[h, :exact, r, :dims] + folded @ unfold[h]
            each = weights[h, :, r] * sums[h, :, r, 1]
            total = each.sum() + (np.exp(logits[h * group + r]) if sinks else 0.0)
            expected = (own + each[exact:].sum() * mean[h]) / total if total else np.zeros(dims)
            np.testing.assert_allclose(found[h, r], expected, atol=1e-4 * (1 + np.abs(expected).max()))


def alone(held):
    """The same cache with no number in the columns of no exact token."""
    columns, rows = np.arange(held.exact_keys.shape[2])[None], held.layout
    sinks, start = (np.array(x)[:, None] for x in (rows.held_sinks, rows.window_start))
    there = mx.array((columns < sinks) | ((columns >= start) & (columns < rows.window_end)))[:, None, :, None]
    exact = [mx.where(there, x, mx.array(float("nan"), x.dtype)) for x in (held.exact_keys, held.exact_values)]
    return dataclasses.replace(held, exact_keys=exact[0], exact_values=exact[1])


@pytest.mark.usefixtures("_planned_anew")
@pytest.mark.parametrize("left", [20, 0])
@pytest.mark.parametrize("window", [300, 250])
@pytest.mark.parametrize(("dims", "length"), [((96, 64), 3), ((64, 128), 1), ((192, 192), 2), ((256, 256), 1)])
def test_exact_tokens_in_turn_where_a_row_has_few_of_them(dims, length, window, left, monkeypatch):
    """One group takes all splits of exact tokens, and then packed ones; of a row most of these splits are empty, or
    all. Two threads share a coordinate of the values, or (more of those than half the threads) one has several."""

    def split(exact, in_turn, tiles, *_):
        return steps.Split(1, 1, -(-tiles // 2), tiles // 2) if in_turn else steps.Split(exact, 1, tiles, 0)

    monkeypatch.setattr(steps, "_split", split)
    case = doctor.Case(*dims, bits=2.25, batch=2, mask="causal", tokens=600, window=window, length=length)
    held = doctor.snapshot(case)
    packed = held.layout.packed_tokens
    layout = doctor.rows_of((4, 4 if left else 0), (4, 4 + window - left), 4 + window, packed)
    held = alone(dataclasses.replace(held, layout=layout))
    monkeypatch.setattr(doctor, "snapshot", lambda case: held)
    error, own = doctor.compare(case, PLACE, run)
    assert error <= doctor.allowed(case, own)


@pytest.mark.usefixtures("_planned_anew")
@pytest.mark.parametrize("warps", [2, 4, 5, 6])
@pytest.mark.parametrize(("dims", "length"), [((64, 64), 5), ((80, 80), 1), ((64, 96), 3)])
def test_float32_of_more_warps_than_one(dims, length, warps, monkeypatch):
    """As on CUDA: sixteen queries, and where there are threads enough two for a coordinate of exact values."""
    monkeypatch.setattr(launches, "group_of", lambda key_dims, value_dims, *rest: (key_dims, value_dims, warps))
    case = doctor.Case(*dims, bits=1.75 + warps / 64, length=length, mask="causal", dtype=mx.float32, window=100)
    error, own = doctor.compare(case, PLACE, run)
    assert error <= doctor.allowed(case, own)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dims", "window"), [((64, 64), 33), ((64, 128), 56), ((256, 256), 77)])
def test_columns_of_no_exact_token_are_not_read(dims, window, place, monkeypatch):
    """They may hold anything: what is read of a token besides counts for nothing, unless it is no number."""
    case = doctor.Case(*dims, bits=2.25, batch=2, length=3, mask="causal", window=window)
    held = alone(doctor.snapshot(case))
    monkeypatch.setattr(doctor, "snapshot", lambda case: held)
    error, own = doctor.compare(case, place, run)
    assert error <= doctor.allowed(case, own)


def test_a_back_end_that_is_not_here_is_refused(monkeypatch):
    other = "cuda" if kernels.backend() == "metal" else "metal"
    monkeypatch.setenv(kernels.VARIABLE, other)
    with pytest.raises(RuntimeError, match=f"VQ_KVCACHE_BACKEND='{other}', but the default device is"):
        kernels.backend()


def test_plain_operations_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "ops")
    assert kernels.backend() == "ops"


@pytest.fixture
def _nothing_tried():
    for known in (trust.trusted, trust.trusted_codes, trust.trusted_arrays):
        known.cache_clear()
    yield
    for known in (trust.trusted, trust.trusted_codes, trust.trusted_arrays):
        known.cache_clear()


@pytest.mark.usefixtures("_nothing_tried")
class TestTrust:
    def test_kernels_that_are_wrong_are_not_used_and_it_is_said(self, monkeypatch):
        monkeypatch.setattr(doctor, "attend_codes", lambda held, queries, *rest: mx.zeros_like(queries))
        with pytest.warns(UserWarning, match=r"the metal kernels do not work here .*error .*plain operations are used"):
            assert not trust.trusted("metal", 64, 64, mx.float16)

    def test_kernels_that_were_asked_for_by_name_and_are_wrong_are_an_error(self, monkeypatch):
        monkeypatch.setattr(doctor, "attend_codes", lambda held, queries, *rest: mx.zeros_like(queries))
        monkeypatch.setenv(kernels.VARIABLE, "metal")
        with pytest.raises(RuntimeError, match=r"kernels do not work here .*, but VQ_KVCACHE_BACKEND asks for them"):
            trust.trusted("metal", 64, 64, mx.float16)

    @pytest.mark.parametrize("place", PLACES)
    def test_kernels_that_are_right_are_used(self, place, monkeypatch):
        monkeypatch.setattr(kernels, "run", run)
        monkeypatch.setattr(launches, "run", run)
        monkeypatch.setattr(
            doctor, "compare", lambda case, place, program, own=doctor.compare: own(case, place, run, program)
        )
        pair = [doctor.quantizer(64, 2, 2.0, seed) for seed in (0, 1)]
        assert trust.trusted(place, 64, 64, mx.float16, steps.program_of(*pair, False, place))
        assert trust.trusted_codes(place)
        assert trust.trusted_arrays(place, 64, 96, mx.float16)

    @pytest.mark.parametrize(("body", "told"), [("encode", "encoding: error"), ("decode", "decoding: levels off by")])
    def test_codes_that_are_wrong_are_not_trusted(self, body, told, monkeypatch):
        monkeypatch.setattr(kernels, "run", shifting(body))
        with pytest.warns(UserWarning, match=f"the {PLACE} kernels do not work here .{told}"):
            assert not trust.trusted_codes(PLACE)

    @pytest.mark.parametrize(("body", "told"), [("restore", "prompts off by"), ("decode", "prompts off by")])
    def test_arrays_that_are_wrong_are_not_trusted(self, body, told, monkeypatch):
        monkeypatch.setattr(launches, "run", shifting(body))
        with pytest.warns(UserWarning, match=f"the {PLACE} kernels do not work here .*{told}"):
            assert not trust.trusted_arrays(PLACE, 64, 96, mx.bfloat16)

    def test_arrays_may_be_as_coarse_as_mlx_own_products(self, monkeypatch):
        """Those of float32 have ten bits where a GPU has TF32."""
        monkeypatch.setattr(launches, "run", run)

        def coarse(*rest, own=launches._turned):
            product, factor = own(*rest)
            return (product.view(mx.uint32) & ~mx.array(0x1FFF, mx.uint32)).view(mx.float32), factor

        monkeypatch.setattr(launches, "_turned", coarse)
        assert trust.trusted_arrays(PLACE, 64, 64, mx.float32)

    def test_wrong_kernels_encode_nothing(self, monkeypatch):
        quantizer = doctor.quantizer(64, 2, 3.5, 0)
        x = mx.random.normal((1, 2, 40, 64), key=mx.random.key(0))
        monkeypatch.setattr(kernels, "backend", lambda: "metal")
        monkeypatch.setattr(doctor, "wrong_codes", lambda place: "encoding")
        with pytest.warns(UserWarning, match=r"the metal kernels do not work here \(encoding\)"):
            words = trust.encode_words(quantizer, x)
        assert mx.array_equal(words, quantizer.encode_words(x)).item()


def test_what_decoding_packs_is_traced_once_for_all_layers(monkeypatch):
    """And the words are those of a launch of its own."""
    traced = []

    def noting(launch, place):
        traced.append(launch.inputs[0].shape[2])
        return [launch.inputs[0].swapaxes(-1, -2).flatten(1, 2).astype(mx.uint32)[:, : launch.output_shapes[0][1]]]

    monkeypatch.setattr(launches, "run", noting)
    monkeypatch.setattr(launches, "_encoding", launches.kept_by_thread(1)(launches._encoding.__wrapped__))
    layers = [doctor.quantizer.__wrapped__(64, 2, 2.25, seed) for seed in range(3)]
    for tokens, times in ((64, 1), (128, 1), (192, 3)):
        traced.clear()
        x = 50 + mx.random.normal((1, 2, tokens, 64), key=mx.random.key(tokens))
        found = [launches.encoded(q, x, PLACE) for q in layers]
        assert traced == [tokens] * times
        for words, q in zip(found, layers, strict=True):
            (expected,) = noting(launches.encode(q, x), PLACE)
            assert mx.array_equal(words, expected).item()


@pytest.mark.parametrize(
    ("error", "codes", "status"), [(0.0, "", 0), (9.0, "", 1), (0.0, "encoding: error 2", 1)],
    ids=["right", "a case is wrong", "codes are wrong"],
)  # fmt: skip
def test_doctor_fails_when_anything_is_wrong(error, codes, status, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "backend", lambda: "metal")
    monkeypatch.setattr(doctor, "wrong_codes", lambda place: codes)
    monkeypatch.setattr(doctor, "wrong_arrays", lambda *rest: "")
    monkeypatch.setattr(doctor, "compare", lambda case, place: (error, 0.0))
    assert doctor.main(["--only", "head_dim 192/128"]) == status
    told = capsys.readouterr().out
    assert f"codes: {codes or 'right'}" in told
    assert f"{int(error == 0)} of 1 cases right" in told


def test_doctor_tells_of_kernels_that_do_not_build(monkeypatch, capsys):
    def failing(*launch, **options):
        raise RuntimeError("no compiler here\nand more of it")

    monkeypatch.setattr(kernels, "backend", lambda: "metal")
    monkeypatch.setattr(kernels, "run", failing)
    monkeypatch.setattr(doctor, "compare", failing)
    assert doctor.main(["--only", "head_dim 192/128"]) == 1
    told = capsys.readouterr().out
    assert "codes: no compiler here\n" in told
    assert "0 of 1 cases right" in told


def test_doctor_says_where_it_is(capsys):
    assert doctor.main(["--only", "head_dim 64 heads 8/2 queries 2 batch 1 tokens 260"]) == 0
    told = capsys.readouterr().out
    assert ("no kernels here" in told) == (kernels.backend() == "ops")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("batch", "dims", "first"), [(1, (96, 96), (0,)), (2, (96, 64), (3, 0))], ids=["alike", "odd"])
@pytest.mark.parametrize("prompt", [False, True], ids=["handles", "prompt"])
def test_arrays_restored_by_the_kernels_are_those_of_plain_operations(
    prompt, batch, dims, first, dtype, place, monkeypatch
):
    held = doctor.snapshot(doctor.Case(*dims, bits=3.0, dtype=dtype, batch=batch, tokens=333))
    columns = held.length + max(first)
    expected = held.decoded(first, columns)
    again, calls = dataclasses.replace(held, packed=Packed(held.packed)), []
    monkeypatch.setattr(storage, "backend", lambda: place)
    monkeypatch.setattr(storage, "trusted_codes", lambda place: True)
    monkeypatch.setattr(storage, "trusted_arrays", lambda *variant: True)
    monkeypatch.setattr(storage.mx, "compile", lambda function: function)
    monkeypatch.setattr(launches, "run", lambda launch, at: calls.append(launch.body.name) or run(launch, at))
    unit = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2.0**-20}[dtype]
    if prompt:
        exact = held.exact_keys, held.exact_values
        rows, start = held.layout.flat, launches.ints(first)
        restored = launches.restore(*again.codes, rows, *exact, start, columns, place, prompt=True)
    else:
        restored = again.decoded(first, columns)
    for found, plain in zip(restored, expected, strict=True):
        assert found.dtype == dtype
        for row, (start, tokens) in enumerate(zip(first, held.layout.lengths, strict=True)):
            a, b = (numpy(x)[row, :, start : start + tokens] for x in (found, plain))
            assert np.abs(a - b).max() <= 2 * unit * np.abs(b).max()
    assert calls == ["decode", *["decode"] * prompt, "restore"]


def test_the_cuda_source_is_short_and_named_after_the_whole_text(monkeypatch):
    """MLX hashes it at every evaluation, and keeps what it compiled by name."""
    made = []
    for text, gpu in (("", "sm_90"), ("// changed", "sm_90"), ("", "sm_100")):
        monkeypatch.setattr(kernels, "header", lambda place, text=text: text)
        monkeypatch.setattr(kernels.mx, "device_info", lambda gpu=gpu: {"architecture": gpu})
        made.append(kernels.parts.__wrapped__(kernels.MERGE, "cuda", 0, 128))
    names, tops, sources = zip(*made, strict=True)
    assert len(tops[0]) + len(sources[0]) < 2500
    assert [line.split('"')[1] for line in tops[0].splitlines() if "#include" in line] == [
        str(kernels.FOLDER / name) for name in ("cuda.h", *kernels.TEXTS)
    ]
    assert len(set(tops)) == len(set(sources)) == 1
    assert len(set(names)) == 3  # programs are kept by name, also where there are two kinds of GPUs


def test_what_is_kept_by_thread_is_made_again_in_another():
    made = []
    function = launches.kept_by_thread(2)(lambda key: made.append(key) or object())
    own = function(1)
    assert function(1) is own
    with futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(function, 1).result() is not own
        for key in (2, 3):
            pool.submit(function, key).result()
    assert function(1) is own  # what another thread lets go is not this one's
    assert made == [1, 1, 2, 3]
