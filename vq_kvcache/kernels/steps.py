"""One attention over a cache as launches: tokens attended to split by split, splits merged.

What is the same in every layer of a decoding step is found once (`_numbers`), and the launches of one plan are traced
once by MLX (`attend`): what Python does for a layer is then little beside the kernels.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from ..chunks import LEAST_INPUT, nothing
from ..rows import Rows
from ..spectral.spectral_quant import SpectralQuantizer
from . import ATTEND, MERGE, MULTIPROCESSORS, Launch, Run, columns, launches, run

if TYPE_CHECKING:
    from ..storage import Snapshot

GROUPS = {"cuda": 264, "metal": 240, "host": 24}  # that fill a GPU: two on each of 132 multiprocessors, six of 40 cores


class Shape(NamedTuple):
    """What the operands of a plan look like, and which kernel takes them: this program of columns.h, or attend.h with
    this group (rows of a tile of keys and of values, warps, words fetched ahead, queries)."""

    place: str
    dtype: mx.Dtype
    batch: int
    heads: int
    group_queries: int
    length: int
    key_dims: int
    value_dims: int
    program: columns.Program | None
    group: tuple[int, int, int, int, int] | None

    @property
    def warps(self) -> int:
        """Of a thread group."""
        if self.program is not None:
            return self.program.warps
        assert self.group is not None  # one of the two kernels takes them
        return self.group[2]

    @property
    def rows(self) -> int:
        """Queries of a KV head."""
        return self.group_queries * self.length

    @property
    def planes(self) -> int:
        """KV heads of all rows of the batch."""
        return self.batch * self.heads

    @property
    def row_tiles(self) -> int:
        """Thread groups that share a split."""
        return -(-self.rows // (self.group[4] if self.group else columns.QUERIES))

    @property
    def tokens(self) -> int:
        """Packed tokens that a warp takes at a time."""
        return columns.TOKENS if self.program else launches.TOKENS


class Plan(NamedTuple):
    """How the work of a shape is split. splits: all of them, those of exact tokens first; groups: of threads, for each
    tile of queries of a plane."""

    shape: Shape
    splits: int
    groups: int


class Operands(NamedTuple):
    """The arrays of one attention."""

    words: list[mx.array]
    queries: mx.array
    exact_keys: mx.array
    exact_values: mx.array
    held: mx.array
    params: mx.array
    scale: mx.array
    hidden: mx.array
    added: mx.array
    table: mx.array
    key_basis: mx.array
    key_mean: mx.array
    value_basis: mx.array
    value_mean: mx.array
    logits: mx.array


@launches.kept_with_keys
def _tables(
    keys: SpectralQuantizer, values: SpectralQuantizer, wide: bool, place: str, program: columns.Program | None
) -> Any:
    """(program, words fetched ahead, table, basis of the keys): which kernel reads these codes, and with what."""
    if not wide and place != "metal":
        chosen = columns.chosen(keys, values, program)
        if chosen is not None:
            own, table, basis = chosen
            return own, 0, table, basis
    stage = 0 if place == "metal" else next(n for n in launches.STAGES if n >= launches.head_words(keys, values))
    return None, stage, launches.layer_table(keys, values), keys.synthesis


class Reader(NamedTuple):
    """What the attention of queries of one shape reads besides them and the exact tokens. tables: the layer's, then
    `key_basis` to `value_mean` of Operands."""

    shape: Shape
    words: list[mx.array]
    chunks: launches.ChunkSizes
    tables: tuple[mx.array, mx.array, mx.array, mx.array, mx.array]


def _reader(
    snapshot: "Snapshot", place: str, dtype: mx.Dtype, queries: tuple[int, ...], program: columns.Program | None
) -> Reader:
    keys, values = launches.spectral(snapshot)
    batch, query_heads, length, key_dims = queries
    _, heads, _, value_dims = snapshot.exact_values.shape
    program, stage, *tables = _tables(keys, values, dtype == mx.float32, place, program)
    together, group = query_heads // heads, None
    if program is None:
        own = launches.queries_of(together * length, place)
        group = (*launches.group_of(key_dims, value_dims, dtype.size, stage, own, place), stage, own)
    shape = Shape(place, dtype, batch, heads, together, length, key_dims, value_dims, program, group)
    codes, chunks = snapshot.codes
    return Reader(shape, codes.words, chunks, (*tables, keys.mean, values.synthesis, values.mean))


class Split(NamedTuple):
    """How the thread groups of a plane and its queries share tokens: `alone` of them take a split of `each` tiles of
    packed tokens; exact_groups take the splits of exact tokens in turn, and then one of `besides` tiles each."""

    exact_groups: int
    alone: int
    each: int
    besides: int

    @property
    def groups(self) -> int:
        """All of them."""
        return self.alone + self.exact_groups

    def packed(self, tiles: int) -> int:
        """Splits of packed tokens, of which none is empty."""
        rest = tiles - self.alone * self.each
        return self.alone + (-(-rest // self.besides) if self.besides and rest > 0 else 0)


def _split(exact: int, in_turn: bool, tiles: int, warps: int, room: int, most: int) -> Split:
    """in_turn: whether a group may take more than one split. warps: tiles that a group works on at once, in a round,
    about as long as a split of exact tokens takes it; room: groups that run at once; most: splits of packed tokens that
    have something to do."""

    def apart(exact_groups: int, groups: int, rounds: int, waiting: int) -> tuple[float, int, Split]:
        each = -(-tiles // groups)
        split = Split(exact_groups, -(-tiles // each), each, 0)
        return max(each / warps, 1.0, rounds) + waiting, split.groups, split

    tried = [apart(exact, max(min(room, most), 1), 0, int(exact > 0))]  # some groups wait for others
    for exact_groups in range(1 if in_turn else max(exact, 1), min(exact, room - 1) + 1):
        rounds = -(-exact // exact_groups)
        tried.append(apart(exact_groups, min(room - exact_groups, most), rounds, 0))
        alone = min(room, most) - exact_groups
        if not in_turn or alone < 1:
            continue
        # So much for the others that all are ready at once.
        each = -(-(tiles + exact_groups * rounds * warps) // (alone + exact_groups))
        besides = -(-(tiles - alone * each) // exact_groups)
        if besides > 0:
            took = max(each / warps, besides / warps + rounds)
            tried.append((took, alone + exact_groups, Split(exact_groups, alone, each, besides)))
    return min(tried)[2]


@functools.lru_cache(maxsize=256)
def _numbers(
    shape: Shape, layout: Rows, capacity: int, chunks: launches.ChunkSizes, mask: tuple[int, ...], sinks: bool
) -> tuple[Plan, mx.array]:
    """The plan and `params`. chunks: tokens and capacity of each; mask: its kind and strides."""
    exact = -(-layout.most_exact // launches.TOKENS)
    tiles = launches.tiles_of(chunks, shape.tokens)
    groups = GROUPS[shape.place]
    if shape.program and shape.place == "cuda":
        groups = MULTIPROCESSORS * shape.program.groups
    together = shape.warps if shape.program else 1  # tiles that a group works on at once
    most = max(min(-(-tiles // shape.warps), launches.MOST_SPLITS - exact), 1)
    room = groups // (shape.planes * shape.row_tiles)
    split = _split(exact, shape.program is not None, tiles, together, room, most)
    packed = split.packed(tiles)
    params = (
        shape.batch, shape.heads, shape.group_queries, shape.length, exact, packed, capacity, tiles, split.each, *mask,
        len(chunks), int(sinks), split.exact_groups, split.alone, split.besides, *sum(chunks, ()),
    )  # fmt: skip
    return Plan(shape, exact + packed, split.groups), launches.ints(params)


def program_of(
    keys: SpectralQuantizer, values: SpectralQuantizer, wide: bool, place: str
) -> columns.Program | None:  # fmt: skip
    """The program of columns.h that reads these codes; None where attend.h does."""
    program: columns.Program | None = _tables(keys, values, wide, place, None)[0]
    return program


def step(
    snapshot: "Snapshot", queries: mx.array, scale: float, mask: Any, sinks: mx.array | None, place: str,
    program: columns.Program | None = None,
) -> tuple[Plan, Operands]:  # fmt: skip
    """How the attention of these queries is launched, and with what; `program` in place of the one for these codes."""
    asked = place, queries.dtype, queries.shape, program
    reader = snapshot.once(asked, lambda: _reader(snapshot, *asked))
    kind, strides, hidden, added = launches.mask_inputs(mask)
    capacity, layout = snapshot.exact_values.shape[2], snapshot.layout
    plan, params = _numbers(reader.shape, layout, capacity, reader.chunks, (kind, *strides), sinks is not None)
    logits = nothing(mx.float32) if sinks is None else sinks.astype(mx.float32)
    return plan, Operands(
        reader.words, queries, snapshot.exact_keys, snapshot.exact_values, layout.flat, params, launches.scale(scale),
        hidden, added, *reader.tables, logits,
    )  # fmt: skip


def _attend_launch(plan: Plan, o: Operands) -> Launch:
    """The launch of attend.h."""
    shape = plan.shape
    assert shape.group is not None
    key_rows, value_rows, warps, stage, queries = shape.group
    every = (shape.planes, plan.splits, shape.rows)
    element = shape.dtype.size
    dims = shape.key_dims, shape.value_dims
    return Launch(
        ATTEND,
        [o.queries, o.exact_keys, o.exact_values, *launches.chunk_inputs(o.words), o.held, o.key_basis, o.key_mean,
         o.table, launches.levels(), o.params, o.scale, o.hidden, o.added],
        [(*every, 2), (*every, shape.value_dims)],
        [mx.float32, mx.float32],
        (plan.splits, shape.planes, shape.row_tiles),
        warps * 32,
        launches.shared_bytes(*dims, max(key_rows, value_rows), element, warps, stage, queries, shape.place),
        (("T", shape.dtype), ("DK", dims[0]), ("DV", dims[1]), ("KROWS", key_rows), ("VROWS", value_rows),
         ("WARPS", warps), ("STAGE", stage), ("QUERIES", queries)),
    )  # fmt: skip


def parts_launch(plan: Plan, o: Operands) -> Launch:
    """The launch that attends, split by split."""
    return columns.attend(plan, o) if plan.shape.program else _attend_launch(plan, o)


def merge_launch(plan: Plan, o: Operands, parts: list[mx.array]) -> Launch:
    """The launch of merge.h."""
    shape = plan.shape
    shares = 4 if shape.value_dims <= 128 else 2
    return Launch(
        MERGE,
        [*parts, o.value_basis, o.value_mean, o.logits, o.table, o.params],
        [(*o.queries.shape[:3], shape.value_dims)],
        [shape.dtype],
        (shape.rows, shape.planes, 1),
        shares * shape.value_dims,
        4 * (launches.MOST_SPLITS + shares * shape.value_dims + 2),
        (("T", shape.dtype), ("DV", shape.value_dims), ("PARTS", shares)),
    )


def attend_by(run: Run, plan: Plan, o: Operands) -> mx.array:
    """The attention [B, Hq, L, Dv], launch by launch through `run`."""
    place = plan.shape.place
    parts = run(parts_launch(plan, o), place)
    return run(merge_launch(plan, o, parts), place)[0]


@launches.kept_by_thread(256)
def _traced(plan: Plan) -> Callable[..., mx.array]:
    def all_launches(words: list[mx.array], *arrays: mx.array) -> mx.array:
        return attend_by(run, plan, Operands(words, *arrays))

    traced: Callable[..., mx.array] = mx.compile(all_launches)
    return traced


def attend(plan: Plan, o: Operands) -> mx.array:
    """The same, traced once for each plan: MLX would otherwise put the kernels' text together at every launch. Not with
    a mask of as many numbers as there are tokens, whose shape, and so the trace, would be another at every step."""
    if o.hidden.size + o.added.size > 2 * LEAST_INPUT:
        return attend_by(run, plan, o)
    return _traced(plan)(*o)
