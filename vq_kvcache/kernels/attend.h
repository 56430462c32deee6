// Attention of a few queries over one cache: exact tokens (sinks and window), and packed codes.
//
// The tokens are split over thread groups; each leaves, for each query, the maximum of its scores, the sum of its
// weights and the weighted sum of its values (in the basis of the codes for packed tokens), and merge.h puts them
// together. Scores are in bits: exp2 is cheaper than exp.
//
// A warp takes 64 packed tokens at a time. Each lane turns the words of two tokens into levels, which lie in a tile
// [dims, tokens] that only this warp sees; scores and weighted sums are products with the tile by the matrix units. Where
// VQ_DIRECT is set, a lane scores levels of keys itself, and only values lie in tiles.

// Positions in `params`, int32.
enum {
  VQ_B, VQ_H, VQ_G, VQ_L, VQ_EXACT_SPLITS, VQ_PACKED_SPLITS, VQ_EXACT_CAPACITY, VQ_TILES, VQ_TILES_PER_SPLIT,
  VQ_MASK_KIND, VQ_MASK_B, VQ_MASK_H, VQ_MASK_L, VQ_MASK_T, VQ_CHUNKS, VQ_SINKS, VQ_EXACT_GROUPS, VQ_ALONE_GROUPS,
  VQ_TILES_BESIDES,
  VQ_CHUNK_TABLE,  // tokens, capacity each
};
enum { VQ_NO_MASK, VQ_CAUSAL, VQ_BOOL_MASK, VQ_ADDED_MASK };

#define VQ_LOWEST -1e30f

// What a thread knows of its place. queries: of each KV head, which follow one another; first, rows: this group's range of
// them.
struct VqPlace {
  int split, head, batch, heads, queries, first, rows, warp, lane;
};

// x the split, y head and batch row, z as many queries of a group of query heads as a thread group takes.
template <int QUERIES>
VQ_FN VqPlace vq_place(VQ_IN(int) params, int x, int y, int z, int worker) {
  const int heads = params[VQ_H], queries = params[VQ_G] * params[VQ_L], left = queries - z * QUERIES;
  const VqPlace at = {x, y % heads, y / heads, heads, queries, z * QUERIES, left < QUERIES ? left : QUERIES,
                      worker >> 5, worker & 31};
  return at;
}

struct VqRows {
  int sinks, start, end, packed;
};

VQ_FN VqRows vq_rows(VQ_IN(int) rows, int batch) {
  VqRows r;
  r.sinks = rows[batch * 4], r.start = rows[batch * 4 + 1], r.end = rows[batch * 4 + 2], r.packed = rows[batch * 4 + 3];
  return r;
}

// The score as the mask leaves it; VQ_LOWEST where the position is hidden. `row` is a query of this KV head: query head
// row / L of the group, query row % L.
VQ_FN float vq_masked(float score, VQ_IN(int) params, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                      VQ_THREAD const VqPlace& at, int row, int position, int length) {
  const int kind = params[VQ_MASK_KIND];
  if (kind == VQ_NO_MASK) return score;
  const int queries = params[VQ_L], query = row % queries;
  if (kind == VQ_CAUSAL) return position <= length - queries + query ? score : VQ_LOWEST;
  const int head = at.head * params[VQ_G] + row / queries;
  const int i = at.batch * params[VQ_MASK_B] + head * params[VQ_MASK_H] + query * params[VQ_MASK_L] +
                position * params[VQ_MASK_T];
  if (kind == VQ_BOOL_MASK) return hidden[i] ? score : VQ_LOWEST;
  return vq_max(score + added[i] * 1.44269504f, VQ_LOWEST);
}

VQ_FN float vq_weight(float score, float top) { return score > 0.5f * VQ_LOWEST ? vq_exp2(score - top) : 0.0f; }

// This group's first query, among all.
VQ_FN int vq_first_query(VQ_THREAD const VqPlace& at) {
  return (at.batch * at.heads + at.head) * at.queries + at.first;
}

// Where the outputs of this split begin; the queries of this group follow one another.
VQ_FN int vq_partial(VQ_THREAD const VqPlace& at, int splits) {
  return ((at.batch * at.heads + at.head) * splits + at.split) * at.queries + at.first;
}

// Of exact tokens: queries that are worked on at once, and values that a thread loads at once, to hide the latency of memory.
enum { VQ_EXACT_ROWS = 4, VQ_EXACT_VALUES = 16 };

// Values of exact tokens from .. until - 1 of `count` of a split, at one coordinate, weighted -> out.
template <int DV, typename T>
VQ_FN void vq_weigh(VQ_THREAD float (&out)[VQ_EXACT_ROWS], VQ_SHARED(const float) weights, VQ_IN(T) values, VqRows held,
                    int first, int from, int until, int count) {
  VQ_UNROLL
  for (int r = 0; r < VQ_EXACT_ROWS; ++r) out[r] = 0.0f;
  VQ_LOOP
  for (int t = from; t < until; t += VQ_EXACT_VALUES) {
    T own[VQ_EXACT_VALUES];
    VQ_UNROLL
    for (int k = 0; k < VQ_EXACT_VALUES; ++k) {
      const int e = first + (t + k < count ? t + k : count - 1);  // clamped: the weight of what is not there is zero
      own[k] = values[(e < held.sinks ? e : held.start + e - held.sinks) * DV];
    }
    VQ_UNROLL
    for (int k = 0; k < VQ_EXACT_VALUES; ++k) {
      VQ_UNROLL
      for (int r = 0; r < VQ_EXACT_ROWS; ++r) out[r] = vq_fma(weights[r * VQ_TOKENS + t + k], vq_float(own[k]), out[r]);
    }
  }
}

// Sinks and window: 64 exact tokens, in float32. shared: [QUERIES, DK] queries, [QUERIES, 64] scores. width: floats of an
// output.
template <typename T, int DK, int DV, int QUERIES>
VQ_FN void vq_attend_exact(VQ_IN(T) q, VQ_IN(T) keys, VQ_IN(T) values, VqRows held, VQ_IN(int) params, int width, float scale,
                           VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums, VQ_OUT(float) outputs,
                           VQ_SHARED(float) shared, VQ_THREAD const VqPlace& at, int threads) {
  const int rows = at.rows;
  const int worker = at.warp * 32 + at.lane, capacity = params[VQ_EXACT_CAPACITY];
  const int exact = held.sinks + held.end - held.start, first = at.split * VQ_TOKENS;
  const int count = exact - first < VQ_TOKENS ? exact - first : VQ_TOKENS;
  VQ_SHARED(float) scores = shared + QUERIES * DK;
  for (int i = worker; i < rows * DK; i += threads)
    shared[i] = vq_float(q[vq_first_query(at) * DK + i]) * scale;
  VQ_SYNC_GROUP();
  const int plane = (at.batch * at.heads + at.head) * capacity;
  for (int i = worker; i < rows * VQ_TOKENS; i += threads) scores[i] = VQ_LOWEST;
  VQ_SYNC_GROUP();
  enum { PARTS = (DK + 31) / 32, KEYS = PARTS <= 4 ? 4 : 2 };  // keys that a warp loads at once
  const int warps = threads / 32;
  VQ_LOOP
  for (int t = at.warp; t < count; t += KEYS * warps) {  // lanes share a key, so that they read it side by side
    float own[KEYS][PARTS];
    VQ_UNROLL
    for (int k = 0; k < KEYS; ++k) {
      const int e = first + (t + k * warps < count ? t + k * warps : t);  // clamped
      VQ_IN(T) key = keys + (plane + (e < held.sinks ? e : held.start + e - held.sinks)) * DK;
      VQ_UNROLL
      for (int i = 0; i < PARTS; ++i) own[k][i] = i * 32 + at.lane < DK ? vq_float(key[i * 32 + at.lane]) : 0.0f;
    }
    VQ_LOOP
    for (int row = 0; row < rows; row += VQ_EXACT_ROWS) {  // whose shuffles follow one another
      float score[KEYS][VQ_EXACT_ROWS];
      VQ_UNROLL
      for (int r = 0; r < VQ_EXACT_ROWS; ++r) {
        VQ_UNROLL
        for (int k = 0; k < KEYS; ++k) score[k][r] = 0.0f;
        VQ_UNROLL
        for (int i = 0; i < PARTS; ++i) {
          const float query = i * 32 + at.lane < DK ? shared[(row + r) * DK + i * 32 + at.lane] : 0.0f;
          VQ_UNROLL
          for (int k = 0; k < KEYS; ++k) score[k][r] = vq_fma(query, own[k][i], score[k][r]);
        }
      }
      VQ_UNROLL
      for (uint bit = 16; bit; bit /= 2) {
        VQ_UNROLL
        for (int k = 0; k < KEYS; ++k) {
          VQ_UNROLL
          for (int r = 0; r < VQ_EXACT_ROWS; ++r) score[k][r] += vq_shuffle_xor(score[k][r], bit);
        }
      }
      float own_score = 0.0f;
      VQ_UNROLL
      for (int k = 0; k < KEYS; ++k) {
        VQ_UNROLL
        for (int r = 0; r < VQ_EXACT_ROWS; ++r) own_score = at.lane == k * VQ_EXACT_ROWS + r ? score[k][r] : own_score;
      }
      const int own_row = row + at.lane % VQ_EXACT_ROWS, column = t + at.lane / VQ_EXACT_ROWS * warps, e = first + column;
      if (at.lane < KEYS * VQ_EXACT_ROWS && own_row < rows && column < count)
        scores[own_row * VQ_TOKENS + column] =
            vq_masked(own_score, params, hidden, added, at, at.first + own_row, e < held.sinks ? e : held.packed + e,
                      held.packed + exact);
    }
  }
  VQ_SYNC_GROUP();
  const int base = vq_partial(at, params[VQ_EXACT_SPLITS] + params[VQ_PACKED_SPLITS]);
  for (int row = at.warp; row < rows; row += threads / 32) {
    VQ_SHARED(float) own = scores + row * VQ_TOKENS + at.lane;
    float top = vq_max(own[0], own[32]);
    VQ_UNROLL
    for (uint bit = 16; bit; bit /= 2) top = vq_max(top, vq_shuffle_xor(top, bit));
    own[0] = vq_weight(own[0], top), own[32] = vq_weight(own[32], top);
    float sum = own[0] + own[32];
    VQ_UNROLL
    for (uint bit = 16; bit; bit /= 2) sum += vq_shuffle_xor(sum, bit);
    if (at.lane == 0) sums[2 * (base + row)] = top, sums[2 * (base + row) + 1] = sum;
  }
  VQ_SYNC_GROUP();
  VQ_LOOP
  for (int row = 0; row < rows; row += VQ_EXACT_ROWS) {
    VQ_SHARED(const float) weights = scores + row * VQ_TOKENS;
    float out[VQ_EXACT_ROWS];
    if (threads >= 2 * DV && DV <= DK) {  // two threads share a coordinate's tokens; their sums meet in the queries' space
      const int part = worker / DV, d = worker % DV, from = part * (VQ_TOKENS / 2), end = from + VQ_TOKENS / 2;
      const int until = end < count ? end : count;
      if (part < 2) vq_weigh<DV>(out, weights, values + plane * DV + d, held, first, from, until, count);
      VQ_UNROLL
      for (int r = 0; r < VQ_EXACT_ROWS; ++r)
        if (part == 1) shared[r * DV + d] = out[r];
      VQ_SYNC_GROUP();
      VQ_UNROLL
      for (int r = 0; r < VQ_EXACT_ROWS; ++r)
        if (part == 0 && row + r < rows) outputs[(base + row + r) * width + d] = out[r] + shared[r * DV + d];
      VQ_SYNC_GROUP();
    } else {
      VQ_LOOP
      for (int d = worker; d < DV; d += threads) {
        vq_weigh<DV>(out, weights, values + plane * DV + d, held, first, 0, count, count);
        VQ_UNROLL
        for (int r = 0; r < VQ_EXACT_ROWS; ++r)
          if (row + r < rows) outputs[(base + row + r) * width + d] = out[r];
      }
    }
  }
}

// The queries of this row tile in the basis of the codes: folded [QUERIES, DK + VQ_PAD], or, where keys are scored as they
// come, [DK, QUERIES], and the share of the keys' mean in every score, constant [QUERIES]. plain: [QUERIES, DK], only for the
// time of this function.
template <typename T, typename E, int DK, int QUERIES>
VQ_FN void vq_fold(VQ_IN(T) q, VQ_IN(float) fold, VQ_IN(float) mean, VQ_IN(int) params, float scale, int stored,
                   int fold_rows, VQ_SHARED(float) plain, VQ_SHARED(E) folded, VQ_SHARED(float) mean_score,
                   VQ_THREAD const VqPlace& at, int threads) {
  const int rows = at.rows;
  const int worker = at.warp * 32 + at.lane;
  for (int i = worker; i < QUERIES * DK; i += threads)
    plain[i] = i / DK < rows ? vq_float(q[vq_first_query(at) * DK + i]) * scale : 0.0f;
  VQ_SYNC_GROUP();
  VQ_LOOP
  for (int first = 0; first < QUERIES; first += 4) {
    const int parts = (DK + 31) / 32;
    float own[4][parts];  // lanes share a coordinate, so that they read its basis vector side by side
    VQ_UNROLL
    for (int r = 0; r < 4; ++r) {
      VQ_UNROLL
      for (int i = 0; i < parts; ++i)
        own[r][i] = i * 32 + at.lane < DK ? plain[(first + r) * DK + i * 32 + at.lane] : 0.0f;
    }
    VQ_UNROLL_BY(4)
    for (int n = at.warp; n < DK; n += threads / 32) {
      float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (first < rows && n < stored) {
        VQ_IN(float) basis = fold + (at.head * fold_rows + n) * DK;
        VQ_UNROLL
        for (int i = 0; i < parts; ++i) {
          const float y = i * 32 + at.lane < DK ? basis[i * 32 + at.lane] : 0.0f;
          VQ_UNROLL
          for (int r = 0; r < 4; ++r) x[r] = vq_fma(own[r][i], y, x[r]);
        }
        VQ_UNROLL
        for (uint bit = 16; bit; bit /= 2) {
          VQ_UNROLL
          for (int r = 0; r < 4; ++r) x[r] += vq_shuffle_xor(x[r], bit);
        }
      }
      VQ_UNROLL
      for (int r = 0; r < 4; ++r)
        if (at.lane == r) vq_set(folded[VQ_DIRECT ? n * QUERIES + first + r : (first + r) * (DK + VQ_PAD) + n], x[r]);
    }
  }
  for (int row = at.warp; row < QUERIES; row += threads / 32) {
    float x = 0.0f;
    for (int d = at.lane; d < DK; d += 32) x += plain[row * DK + d] * mean[at.head * DK + d];
    for (uint bit = 16; bit; bit /= 2) x += vq_shuffle_xor(x, bit);
    if (at.lane == 0) mean_score[row] = x;
  }
  VQ_SYNC_GROUP();
}

// What a lane keeps while it walks over the tokens: of its row of each block of eight queries the maximum and its part of the
// sum of weights, and its fragments of the weighted sums [queries, DV]. HELD: numbers of a lane in eight columns, two for
// each block.
template <int DV, int HELD>
struct VqRunning {
  float top[HELD / 2], sum[HELD / 2], output[DV / 8][HELD];
};

// In place of a tile of keys, scores of this lane's two tokens: each level is multiplied with the queries as it comes. at:
// where those of the first coordinate are.
template <typename E, int QUERIES>
struct VqScores {
  typedef VQ_SHARED(const E) Place;
  typedef VqKind<sizeof(E) == 4> Kind;
  enum { passes = 1 };
  Place at;
  int stride, first, rows;
  float s[QUERIES][2];
};
template <typename E, int QUERIES>
VQ_FN void vq_take(VQ_THREAD VqScores<E, QUERIES>& to, VQ_SHARED(const E) at, VqFloats levels) {
  float q[QUERIES];
  VQ_UNROLL
  for (int r = 0; r < QUERIES; r += 4) vq_load_four(at + r, q + r);
  VQ_UNROLL
  for (int r = 0; r < QUERIES; ++r) {
    to.s[r][0] = vq_fma(q[r], levels.a, to.s[r][0]);
    to.s[r][1] = vq_fma(q[r], levels.b, to.s[r][1]);
  }
}
template <typename E, int QUERIES>
VQ_FN void vq_take(VQ_THREAD VqScores<E, QUERIES>& to, VQ_SHARED(const E) at, vq_half2 levels) {
  const VqFloats own = {vq_low(levels), vq_high(levels)};
  vq_take(to, at, own);
}

// Scores as tokens' lanes have them -> fragments; rows of no query are zero, and so is `space` [QUERIES, VQ_STRIDE] afterwards:
// it is the memory of a tile, and what is never written there must not be NaN.
template <typename E, int QUERIES, int HELD>
VQ_FN void vq_spread(VQ_THREAD float (&s)[8][HELD], VQ_THREAD const VqScores<E, QUERIES>& from, VQ_SHARED(float) space,
                     int lane) {
  VQ_UNROLL
  for (int r = 0; r < QUERIES; ++r) {
    VQ_UNROLL
    for (int i = 0; i < 2; ++i) space[r * VQ_STRIDE + 2 * lane + i] = from.s[r][i];
  }
  VQ_SYNC_WARP();
  VQ_UNROLL
  for (int e = 0; e < HELD; ++e) {
    const int row = VQ_ROW(lane) + e / 2 * 8;
    VQ_UNROLL
    for (int n = 0; n < 8; ++n) s[n][e] = row < QUERIES ? space[row * VQ_STRIDE + n * 8 + VQ_COL(lane) + e % 2] : 0.0f;
  }
  VQ_SYNC_WARP();
  VQ_UNROLL
  for (int r = 0; r < QUERIES; ++r) {
    VQ_UNROLL
    for (int i = 0; i < 2; ++i) space[r * VQ_STRIDE + 2 * lane + i] = 0.0f;
  }
  VQ_SYNC_WARP();
}

// Scores of one tile, in place, to weights; the running sums are brought to the new maximum.
template <int DV, int HELD>
VQ_FN void vq_soften(VQ_THREAD float (&s)[8][HELD], VQ_THREAD VqRunning<DV, HELD>& running) {
  VQ_UNROLL
  for (int side = 0; side < HELD / 2; ++side) {
    float top = running.top[side];
    VQ_UNROLL
    for (int n = 0; n < 8; ++n) top = vq_max(top, vq_max(s[n][2 * side], s[n][2 * side + 1]));
    top = vq_max(top, vq_shuffle_xor(top, VQ_ROW_A));
    top = vq_max(top, vq_shuffle_xor(top, VQ_ROW_B));
    const float change = vq_exp2(running.top[side] - top);
    float sum = running.sum[side] * change;
    VQ_UNROLL
    for (int n = 0; n < 8; ++n) {
      VQ_UNROLL
      for (int i = 2 * side; i < 2 * side + 2; ++i) {
        s[n][i] = vq_weight(s[n][i], top);
        sum += s[n][i];
      }
    }
    running.top[side] = top, running.sum[side] = sum;
    VQ_UNROLL
    for (int n = 0; n < DV / 8; ++n) running.output[n][2 * side] *= change, running.output[n][2 * side + 1] *= change;
  }
}

// Hide the scores of positions that this row does not hold or the mask hides.
template <int HELD>
VQ_FN void vq_hide(VQ_THREAD float (&s)[8][HELD], VQ_THREAD const VqTile& t, VqRows held, VQ_IN(int) params,
                   VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_THREAD const VqPlace& at) {
  const int length = held.sinks + held.packed + held.end - held.start;
  const bool masked = params[VQ_MASK_KIND] != VQ_NO_MASK;
  if (!masked && t.valid >= VQ_TOKENS) return;
  VQ_UNROLL
  for (int n = 0; n < 8; ++n) {
    VQ_UNROLL
    for (int e = 0; e < HELD; ++e) {
      const int column = n * 8 + VQ_COL(at.lane) + e % 2, row = at.first + VQ_ROW(at.lane) + e / 2 * 8;
      if (column >= t.valid) {
        s[n][e] = VQ_LOWEST;
      } else if (masked && row < at.queries) {
        s[n][e] = vq_masked(s[n][e], params, hidden, added, at, row, held.sinks + t.first + column, length);
      }
    }
  }
}

// The running sums of all warps of the group -> the outputs of this split.
template <int DV, int HELD>
VQ_FN void vq_gather(VQ_THREAD VqRunning<DV, HELD>& running, VQ_SHARED(float) mean_score, VQ_IN(int) params,
                     VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared, VQ_THREAD const VqPlace& at,
                     int warps) {
  enum { ROWS = 4 * HELD };
  VQ_SHARED(float) tops = shared + warps * ROWS * DV;  // after the outputs: [warps, ROWS] tops, then sums
  VQ_SYNC_GROUP();
  VQ_UNROLL
  for (int side = 0; side < HELD / 2; ++side) {
    const int row = VQ_ROW(at.lane) + 8 * side;
    float sum = running.sum[side];
    sum += vq_shuffle_xor(sum, VQ_ROW_A);
    sum += vq_shuffle_xor(sum, VQ_ROW_B);
    tops[at.warp * ROWS + row] = running.top[side];
    tops[(warps + at.warp) * ROWS + row] = sum;
    VQ_UNROLL
    for (int n = 0; n < DV / 8; ++n) {
      VQ_SHARED(float) out = shared + (at.warp * ROWS + row) * DV + n * 8 + VQ_COL(at.lane);
      out[0] = running.output[n][2 * side], out[1] = running.output[n][2 * side + 1];
    }
  }
  VQ_SYNC_GROUP();
  const int base = vq_partial(at, params[VQ_EXACT_SPLITS] + params[VQ_PACKED_SPLITS]);
  const int rows = at.rows;
  for (int i = at.warp * 32 + at.lane; i < rows * DV; i += warps * 32) {
    const int row = i / DV;
    float top = VQ_LOWEST, sum = 0.0f, out = 0.0f;
    for (int w = 0; w < warps; ++w) top = vq_max(top, tops[w * ROWS + row]);
    for (int w = 0; w < warps; ++w) {
      const float share = vq_exp2(tops[w * ROWS + row] - top);
      sum += share * tops[(warps + w) * ROWS + row];
      out += share * shared[(w * ROWS + row) * DV + i % DV];
    }
    outputs[base * DV + i] = out;
    if (i % DV == 0) sums[2 * (base + row)] = top + mean_score[row], sums[2 * (base + row) + 1] = sum;
  }
}

// The weighted sums of one pass: `pass` must be a constant where it picks registers.
template <int DV, int VROWS, int HELD, typename E>
VQ_FN void vq_add_values(VQ_THREAD float (&output)[DV / 8][HELD], int pass, VQ_THREAD const float (&s)[8][HELD],
                         VQ_SHARED(const E) tile, VQ_SHARED(float) scratch, int lane) {
  VQ_UNROLL
  for (int p = 0; p < DV / VROWS; ++p)
    if (p == pass) vq_accumulate<VROWS>(output, p * VROWS / 8, s, tile, scratch, lane);
}

// Where things lie in shared memory, in floats: constants of the rows, chunks, two books, folded queries, and then for
// each warp staged words, scratch and a tile, or the scores of its tokens.
template <typename E, int DK, int ROWS, int STAGE, int QUERIES>
struct VqSpace {
  enum {
    levels = ROWS * VQ_STRIDE * (int)sizeof(E) / 4, scores = VQ_DIRECT ? QUERIES * VQ_STRIDE : 0,
    chunks = 16, books = 32, folded = books + 2 * VQ_BOOK, warps = folded + QUERIES * (DK + VQ_PAD) * (int)sizeof(E) / 4,
    tile = STAGE * VQ_TOKENS + VQ_SCRATCH(E), warp = tile + (levels > scores ? levels : scores),
  };
};

// Packed tokens. KROWS, VROWS: dims of keys, if they go through a tile, and of values that it holds at once. STAGE: words of
// keys and values of a head that a warp fetches ahead; 0 for none.
template <typename T, typename E, int DK, int DV, int KROWS, int VROWS, int WARPS, int STAGE, int QUERIES>
VQ_FN void vq_attend_packed(VQ_IN(T) q, VQ_CHUNK_ARGUMENTS, VqRows held, VQ_IN(float) fold, VQ_IN(float) mean,
                            VQ_IN(int) table, VQ_IN(float) levels, VQ_IN(int) params, float scale,
                            VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums,
                            VQ_OUT(float) outputs, VQ_SHARED(float) shared, VQ_THREAD const VqPlace& at) {
  typedef VqSpace<E, DK, (KROWS > VROWS ? KROWS : VROWS), STAGE, QUERIES> Space;
  enum { BLOCKS = (QUERIES + 7) / 8, HELD = 2 * BLOCKS };  // of eight rows
  VQ_SHARED(float) mean_score = shared;
  VQ_SHARED(int) chunks = (VQ_SHARED(int))(shared + Space::chunks);
  VQ_SHARED(E) folded = (VQ_SHARED(E))(shared + Space::folded);
  VQ_SHARED(float) own = shared + Space::warps + at.warp * Space::warp;
  VQ_SHARED(float) scratch = own + STAGE * VQ_TOKENS;
  VQ_SHARED(E) tile = (VQ_SHARED(E))(own + Space::tile);
  const int worker = at.warp * 32 + at.lane;
  const int entries[2] = {VQ_HEAD_TABLE + at.head * VQ_HEAD_INTS,
                          VQ_HEAD_TABLE + (at.heads + at.head) * VQ_HEAD_INTS};
  if (worker < 16) chunks[worker] = worker < 2 * params[VQ_CHUNKS] ? params[VQ_CHUNK_TABLE + worker] : 0;
  const VqBook key_book = vq_open(table, entries[0], levels, shared + Space::books, worker, WARPS * 32);
  const VqBook value_book = vq_open(table, entries[1], levels, shared + Space::books + VQ_BOOK, worker, WARPS * 32);
  const int first_word[2] = {table[entries[0] + 3], table[entries[1] + 3]};
  const int words[2] = {table[entries[0] + 4], table[entries[1] + 4]};
  const int total_words = table[VQ_TOTAL_WORDS], count = params[VQ_CHUNKS];
  vq_fold<T, E, DK, QUERIES>(q, fold, mean, params, scale, table[entries[0] + 2], table[VQ_KEY_ROWS], shared + Space::warps,
                             folded, mean_score, at, WARPS * 32);
  // What is never written must not be NaN.
  for (int i = at.lane; i < (KROWS > VROWS ? KROWS : VROWS) * VQ_STRIDE; i += 32) vq_set(tile[i], 0.0f);
  VQ_SYNC_GROUP();
  VqRunning<DV, HELD> running;
  VQ_UNROLL
  for (int side = 0; side < BLOCKS; ++side) running.top[side] = VQ_LOWEST, running.sum[side] = 0.0f;
  VQ_UNROLL
  for (int n = 0; n < DV / 8; ++n) {
    VQ_UNROLL
    for (int i = 0; i < HELD; ++i) running.output[n][i] = 0.0f;
  }
  const int first_tile = (at.split - params[VQ_EXACT_SPLITS]) * params[VQ_TILES_PER_SPLIT];
  int last_tile = first_tile + params[VQ_TILES_PER_SPLIT];
  if (last_tile > params[VQ_TILES]) last_tile = params[VQ_TILES];
  VqTile t, next;
  int i = first_tile + at.warp;
  if (i < last_tile) t = vq_find_tile<VQ_TOKENS>(chunks, count, VQ_CHUNK_NAMES, i, held.packed, total_words, at.batch);
#if VQ_STAGED
  VQ_SHARED(uint) staged = (VQ_SHARED(uint))own;
  if (i < last_tile) {
    for (int part = 0; part < 2; ++part)
      vq_stage<VQ_TOKENS>(staged + part * words[0] * VQ_TOKENS, t.words + (size_t)first_word[part] * t.capacity, t.capacity,
               t.capacity - t.token, words[part], at.lane);
  }
#endif
  VQ_LOOP
  for (; i < last_tile; i += WARPS, t = next) {
    const bool more = i + WARPS < last_tile;
    if (more) next = vq_find_tile<VQ_TOKENS>(chunks, count, VQ_CHUNK_NAMES, i + WARPS, held.packed, total_words, at.batch);
    float s[8][HELD];
    VQ_UNROLL
    for (int n = 0; n < 8; ++n) {
      VQ_UNROLL
      for (int e = 0; e < HELD; ++e) s[n][e] = 0.0f;
    }
    VQ_LOOP
    // Keys, then values: a loop, so that the decoder is in the program once; twice where VQ_DIRECT.
    for (int part = 0; part < 2; ++part) {
      const VqBook book = part ? value_book : key_book;
      const int rows = part ? VROWS : KROWS, passes = part ? DV / VROWS : VQ_DIRECT ? 0 : DK / KROWS;
#if VQ_STAGED
      VQ_SHARED(const uint) source = staged + (part ? words[0] * VQ_TOKENS : 0) + 2 * at.lane;
      const int stride = VQ_TOKENS;
      const bool loads = true;
      vq_stage_wait();
      VQ_SYNC_WARP();
#else
      VQ_IN(uint) source = t.words + (size_t)first_word[part] * t.capacity + 2 * at.lane;
      const int stride = t.capacity;
      const bool loads = t.token + 2 * at.lane < t.capacity;
#endif
#if VQ_DIRECT
      if (part == 0) {
        VqScores<E, QUERIES> scores;
        scores.at = folded, scores.stride = QUERIES, scores.first = 0, scores.rows = DK;
        VQ_UNROLL
        for (int r = 0; r < QUERIES; ++r) scores.s[r][0] = scores.s[r][1] = 0.0f;
        vq_decode_tile(book, source, stride, loads, scores);
        vq_spread(s, scores, (VQ_SHARED(float))tile, at.lane);
      }
#endif
      VQ_LOOP
      for (int pass = 0; pass < passes; ++pass) {
        VqTarget<VQ_SHARED(E), sizeof(E) == 4, ((DK > KROWS && !VQ_DIRECT) || DV > VROWS) ? 2 : 1> to = {
            tile + 2 * at.lane, VQ_STRIDE, pass * rows, rows};
        vq_decode_tile(book, source, stride, loads, to);
        VQ_SYNC_WARP();
#if VQ_STAGED
        // The staged words of this part are used up: fetch those of the next tile while the products run.
        if (pass == passes - 1) {
          if (more)
            vq_stage<VQ_TOKENS>(staged + (part ? words[0] * VQ_TOKENS : 0),
                     next.words + (size_t)first_word[part] * next.capacity, next.capacity,
                     next.capacity - next.token, words[part], at.lane);
          else
            vq_stage_nothing();
        }
#endif
#if !VQ_DIRECT
        if (part == 0) {
          vq_scores<KROWS>(s, folded + pass * KROWS, DK + VQ_PAD, tile, at.lane);
        } else
#endif
          vq_add_values<DV, VROWS>(running.output, pass, s, tile, scratch, at.lane);
        VQ_SYNC_WARP();
      }
      if (part == 0) {
        vq_hide(s, t, held, params, hidden, added, at);
        vq_soften(s, running);
      }
    }
  }
  vq_gather(running, mean_score, params, sums, outputs, shared + Space::folded, at, WARPS);
}

template <typename T>
struct VqElement {
  typedef vq_half type;
};
template <>
struct VqElement<float> {
  typedef float type;
};

// One thread group: x the split, y head and batch row, z QUERIES queries of a group of query heads.
template <typename T, int DK, int DV, int KROWS, int VROWS, int WARPS, int STAGE, int QUERIES>
VQ_FN void vq_attend(VQ_IN(T) q, VQ_IN(T) keys, VQ_IN(T) values, VQ_CHUNK_ARGUMENTS, VQ_IN(int) rows,
                     VQ_IN(float) fold, VQ_IN(float) mean, VQ_IN(int) table, VQ_IN(float) levels, VQ_IN(int) params,
                     VQ_IN(float) scale, VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums,
                     VQ_OUT(float) outputs, VQ_SHARED(float) shared, int x, int y, int z, int worker) {
  const VqPlace at = vq_place<QUERIES>(params, x, y, z, worker);
  const VqRows held = vq_rows(rows, at.batch);
  if (x < params[VQ_EXACT_SPLITS]) {
    vq_attend_exact<T, DK, DV, QUERIES>(q, keys, values, held, params, DV, scale[0], hidden, added, sums, outputs, shared,
                                        at, WARPS * 32);
  } else {
    vq_attend_packed<T, typename VqElement<T>::type, DK, DV, KROWS, VROWS, WARPS, STAGE, QUERIES>(
        q, VQ_CHUNK_NAMES, held, fold, mean, table, levels, params, scale[0], hidden, added, sums, outputs, shared, at);
  }
}
