// attend.h for half precision where fragments of the matrix units are known (CUDA, and the host that does as they do):
// eight queries are the columns of both products, scores [tokens, 8] and weighted sums [columns, 8].
//
// A warp takes 32 ROWS packed tokens at a time; each lane writes the levels of ROWS tokens into their rows of a tile
// [tokens, columns] that only this warp sees (lookup.h). Keys and values go through the same tile, one after the other.

enum { VQ_QUERIES = 8 };

// A layer's table, columns.py. An entry: first run, runs, 0, first word, words, columns.
enum { VQ_KEY_ORDER = 6, VQ_COLUMN_ENTRY = 16 };

// Queries in the basis of the codes, once for all splits: folded [planes, tiles of 8 queries, 8, MC], in the order of the
// columns, and the share of the keys' mean in every score, mean_score [planes, tiles, 8]. x: 32 columns.
template <typename T, int DK, int MC>
VQ_FN void vq_fold_columns(VQ_IN(T) q, VQ_IN(float) fold, VQ_IN(float) mean, VQ_IN(int) table, VQ_IN(int) params,
                           VQ_IN(float) scale, VQ_OUT(vq_half) folded, VQ_OUT(float) mean_score, int x, int y, int z,
                           int tiles, int worker, int threads) {
  const int heads = params[VQ_H], parts = (DK + 31) / 32, left = params[VQ_G] * params[VQ_L] - z * VQ_QUERIES;
  const VqPlace at = {0, y % heads, y / heads, z * VQ_QUERIES, left < VQ_QUERIES ? left : VQ_QUERIES, worker / 32,
                      worker % 32};
  float own[VQ_QUERIES][parts];
  VQ_UNROLL
  for (int r = 0; r < VQ_QUERIES; ++r) {
    VQ_UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = i * 32 + at.lane;
      own[r][i] = r < at.rows && d < DK ? vq_query<T, DK>(q, params, at, at.first + r, d) * scale[0] : 0.0f;
    }
  }
  VQ_IN(int) order = table + table[VQ_KEY_ORDER] + at.head * MC;
  VQ_IN(float) basis = fold + at.head * table[VQ_KEY_ROWS] * DK;
  const int until = x * 32 + 32 < MC ? x * 32 + 32 : MC, warps = threads / 32;
  VQ_LOOP
  for (int n = x * 32 + at.warp; n <= until; n += warps) {  // one more for the mean, by the first 32 columns
    if (n == until && x > 0) return;
    const int coordinate = n < until ? order[n] : 0;
    VQ_IN(float) row = n < until ? basis + coordinate * DK : mean + at.head * DK;
    float sum[VQ_QUERIES];
    VQ_UNROLL
    for (int r = 0; r < VQ_QUERIES; ++r) sum[r] = 0.0f;
    if (coordinate >= 0) {
      VQ_UNROLL
      for (int i = 0; i < parts; ++i) {
        const float y_i = i * 32 + at.lane < DK ? row[i * 32 + at.lane] : 0.0f;
        VQ_UNROLL
        for (int r = 0; r < VQ_QUERIES; ++r) sum[r] = vq_fma(own[r][i], y_i, sum[r]);
      }
      VQ_UNROLL
      for (uint bit = 16; bit; bit /= 2) {
        VQ_UNROLL
        for (int r = 0; r < VQ_QUERIES; ++r) sum[r] += vq_shuffle_xor(sum[r], bit);
      }
    }
    const int base = (y * tiles + z) * VQ_QUERIES;
    VQ_UNROLL
    for (int r = 0; r < VQ_QUERIES; ++r) {
      if (at.lane != r) continue;
      if (n < until) {
        vq_set(folded[(base + r) * MC + n], sum[r]);
      } else {
        mean_score[base + r] = sum[r];
      }
    }
  }
}

// What a lane keeps while it walks over the tokens: of queries 2 (lane % 4) and the next the maximum and its part of the
// sum of weights, and its fragments of the weighted sums [MC, 8].
template <int MC>
struct VqColumnSums {
  float top[2], sum[2], output[MC / 16][4];
};

// s [tokens, 8] = tile [tokens, columns] q^T.
template <int ROWS, int STRIDE>
VQ_FN void vq_score_tokens(VQ_THREAD float (&s)[2 * ROWS][4], VQ_SHARED(const vq_half) q,
                           VQ_SHARED(const vq_half) tile, int columns, int lane) {
  VQ_UNROLL
  for (int m = 0; m < 2 * ROWS; ++m) s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0.0f;
  q += lane % 8 * STRIDE + lane / 8 * 8;
  tile += lane % 16 * STRIDE + lane / 16 * 8;
  VQ_LOOP
  for (int k = 0; k < columns; k += 32) {
    uint b[4];
    vq_ldmatrix(b, q + k);
    VQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (k + 16 * half >= columns) break;
      VQ_UNROLL
      for (int m = 0; m < 2 * ROWS; ++m) {
        uint a[4];
        vq_ldmatrix(a, tile + m * 16 * STRIDE + k + half * 16);
        vq_mma(s[m], a, b[2 * half], b[2 * half + 1]);
      }
    }
  }
}

// Hide the scores of positions that this row does not hold or the mask hides.
template <int ROWS>
VQ_FN void vq_hide_tokens(VQ_THREAD float (&s)[2 * ROWS][4], VQ_THREAD const VqTile& t, VqRows held,
                          VQ_IN(int) params, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                          VQ_THREAD const VqPlace& at) {
  const int length = held.sinks + held.packed + held.end - held.start;
  const bool masked = params[VQ_MASK_KIND] != VQ_NO_MASK;
  if (!masked && t.valid >= 32 * ROWS) return;
  VQ_UNROLL
  for (int m = 0; m < 2 * ROWS; ++m) {
    VQ_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int token = m * 16 + at.lane / 4 + e / 2 * 8, query = at.lane % 4 * 2 + e % 2;
      if (token >= t.valid) {
        s[m][e] = VQ_LOWEST;
      } else if (masked && query < at.rows) {
        s[m][e] = vq_masked(s[m][e], params, hidden, added, at, at.first + query, held.sinks + t.first + token, length);
      }
    }
  }
}

// Scores of one tile, in place, to weights; the running sums are brought to the new maximum.
template <int MC, int ROWS>
VQ_FN void vq_soften_tokens(VQ_THREAD float (&s)[2 * ROWS][4], VQ_THREAD VqColumnSums<MC>& running) {
  float change[2];
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    float top = running.top[e];
    VQ_UNROLL
    for (int m = 0; m < 2 * ROWS; ++m) top = vq_max(top, vq_max(s[m][e], s[m][e + 2]));
    VQ_UNROLL
    for (uint bit = 4; bit <= 16; bit *= 2) top = vq_max(top, vq_shuffle_xor(top, bit));
    change[e] = vq_exp2(running.top[e] - top);
    float sum = running.sum[e] * change[e];
    VQ_UNROLL
    for (int m = 0; m < 2 * ROWS; ++m) {
      VQ_UNROLL
      for (int i = e; i < 4; i += 2) {
        s[m][i] = vq_weight(s[m][i], top);
        sum += s[m][i];
      }
    }
    running.top[e] = top, running.sum[e] = sum;
  }
  if (!vq_any(change[0] != 1.0f || change[1] != 1.0f)) return;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) {
    VQ_UNROLL
    for (int i = 0; i < 4; ++i) running.output[n][i] *= change[i % 2];
  }
}

// output [columns, 8] += tile^T [columns, tokens] weights [tokens, 8].
template <int MC, int ROWS, int STRIDE>
VQ_FN void vq_add_tokens(VQ_THREAD float (&output)[MC / 16][4], VQ_THREAD const float (&s)[2 * ROWS][4],
                         VQ_SHARED(const vq_half) tile, int columns, int lane) {
  uint b[2 * ROWS][2];
  VQ_UNROLL
  for (int m = 0; m < 2 * ROWS; ++m) {
    b[m][0] = vq_turned(vq_bits(vq_pack(s[m][0], s[m][1])));
    b[m][1] = vq_turned(vq_bits(vq_pack(s[m][2], s[m][3])));
  }
  tile += (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) {
    if (n * 16 >= columns) break;
    VQ_UNROLL
    for (int m = 0; m < 2 * ROWS; ++m) {
      uint a[4];
      vq_ldmatrix_turned(a, tile + m * 16 * STRIDE + n * 16);
      vq_mma(output[n], a, b[m][0], b[m][1]);
    }
  }
}

// The running sums of all warps of the group -> the outputs of this split.
template <int MC>
VQ_FN void vq_gather_columns(VQ_THREAD VqColumnSums<MC>& running, VQ_SHARED(const float) mean_score, VQ_IN(int) table,
                             VQ_IN(int) params, VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared,
                             VQ_THREAD const VqPlace& at, int columns, int warps) {
  VQ_SHARED(float) tops = shared + warps * VQ_QUERIES * MC;  // after the outputs: [warps, 8] tops, then sums
  VQ_SYNC_GROUP();
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int row = at.warp * VQ_QUERIES + at.lane % 4 * 2 + e;
    float sum = running.sum[e];
    VQ_UNROLL
    for (uint bit = 4; bit <= 16; bit *= 2) sum += vq_shuffle_xor(sum, bit);
    tops[row] = running.top[e];
    tops[warps * VQ_QUERIES + row] = sum;
    VQ_UNROLL
    for (int n = 0; n < MC / 16; ++n) {
      VQ_SHARED(float) out = shared + row * MC + n * 16 + at.lane / 4;
      out[0] = running.output[n][e], out[8] = running.output[n][e + 2];
    }
  }
  VQ_SYNC_GROUP();
  const int base = vq_partial(params, at), width = table[VQ_OUTPUT_WIDTH];
  for (int i = at.warp * 32 + at.lane; i < at.rows * columns; i += warps * 32) {
    const int row = i / columns, n = i % columns;
    float top = VQ_LOWEST, sum = 0.0f, out = 0.0f;
    for (int w = 0; w < warps; ++w) top = vq_max(top, tops[w * VQ_QUERIES + row]);
    for (int w = 0; w < warps; ++w) {
      const float share = vq_exp2(tops[w * VQ_QUERIES + row] - top);
      sum += share * tops[(warps + w) * VQ_QUERIES + row];
      out += share * shared[(w * VQ_QUERIES + row) * MC + n];
    }
    outputs[(base + row) * width + n] = out;
    if (n == 0) sums[2 * (base + row)] = top + mean_score[row], sums[2 * (base + row) + 1] = sum;
  }
}

// Where things lie in shared memory, in floats: the mean's scores, chunks, levels, runs of keys and of values, folded
// queries, and then for each warp staged words and a tile.
template <int MC, int ROWS, int STAGE>
struct VqColumnSpace {
  enum {
    stride = MC + 8, chunks = 8, lookup = 24, runs = lookup + VQ_LOOKUP, folded = runs + 2 * VQ_MOST_PIECES * VQ_RUN_INTS,
    warps = folded + VQ_QUERIES * stride / 2, tile = STAGE * 32 * ROWS, warp = tile + 32 * ROWS * stride / 2,
  };
};

// Packed tokens. STAGE: words of keys and values of a head that a warp fetches ahead.
template <int MC, int WARPS, int ROWS, int STAGE>
VQ_FN void vq_attend_columns_packed(VQ_IN(vq_half) folded_in, VQ_IN(float) mean_in, VQ_CHUNK_ARGUMENTS, VqRows held,
                                    VQ_IN(int) table, VQ_IN(int) lookup_in, VQ_IN(int) params,
                                    VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums,
                                    VQ_OUT(float) outputs, VQ_SHARED(float) shared, VQ_THREAD const VqPlace& at,
                                    int query_tile) {
  typedef VqColumnSpace<MC, ROWS, STAGE> Space;
  enum { TOKENS = 32 * ROWS, STRIDE = Space::stride, THREADS = WARPS * 32 };
  VQ_SHARED(int) chunks = (VQ_SHARED(int))(shared + Space::chunks);
  VQ_SHARED(uint) lookup = (VQ_SHARED(uint))(shared + Space::lookup);
  VQ_SHARED(int) runs = (VQ_SHARED(int))(shared + Space::runs);
  VQ_SHARED(vq_half) folded = (VQ_SHARED(vq_half))(shared + Space::folded);
  VQ_SHARED(uint) staged = (VQ_SHARED(uint))(shared + Space::warps + at.warp * Space::warp);
  VQ_SHARED(vq_half) tile = (VQ_SHARED(vq_half))(staged + Space::tile);
  const int worker = at.warp * 32 + at.lane, heads = params[VQ_H];
  VQ_IN(int) key_entry = table + VQ_COLUMN_ENTRY + at.head * VQ_HEAD_INTS;
  VQ_IN(int) value_entry = key_entry + heads * VQ_HEAD_INTS;
  const int key_words = key_entry[4], total_words = table[VQ_TOTAL_WORDS], count = params[VQ_CHUNKS];
  const int first_tile = (at.split - params[VQ_EXACT_SPLITS]) * params[VQ_TILES_PER_SPLIT];
  int last_tile = first_tile + params[VQ_TILES_PER_SPLIT];
  if (last_tile > params[VQ_TILES]) last_tile = params[VQ_TILES];
  if (worker < 16) chunks[worker] = worker < 2 * count ? params[VQ_CHUNK_TABLE + worker] : 0;
  for (int i = worker; i < VQ_LOOKUP; i += THREADS) lookup[i] = lookup_in[i];
  for (int part = 0; part < 2; ++part) {
    VQ_IN(int) entry = part ? value_entry : key_entry;
    for (int i = worker; i < entry[1] * VQ_RUN_INTS; i += THREADS)
      runs[part * VQ_MOST_PIECES * VQ_RUN_INTS + i] = table[entry[0] + i];
  }
  const int own = (at.batch * heads + at.head) * ((params[VQ_G] * params[VQ_L] + VQ_QUERIES - 1) / VQ_QUERIES) + query_tile;
  for (int i = worker; i < VQ_QUERIES * MC; i += THREADS)
    folded[i / MC * STRIDE + i % MC] = folded_in[own * VQ_QUERIES * MC + i];
  if (worker < VQ_QUERIES) shared[worker] = mean_in[own * VQ_QUERIES + worker];
  // What is never written must not be NaN.
  for (int i = at.lane; i < TOKENS * STRIDE; i += 32) vq_set(tile[i], 0.0f);
  VQ_SYNC_GROUP();
  VqColumnSums<MC> running;
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) running.top[e] = VQ_LOWEST, running.sum[e] = 0.0f;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) running.output[n][0] = running.output[n][1] = running.output[n][2] = running.output[n][3] = 0.0f;
  VqTile t, next;
  int i = first_tile + at.warp;
  if (i < last_tile) {
    t = vq_find_tile<TOKENS>(chunks, count, VQ_CHUNK_NAMES, i, held.packed, total_words, at.batch);
    vq_stage<TOKENS>(staged, t.words + (size_t)key_entry[3] * t.capacity, t.capacity, t.capacity - t.token, key_words, at.lane);
    vq_stage<TOKENS>(staged + key_words * TOKENS, t.words + (size_t)value_entry[3] * t.capacity, t.capacity,
                     t.capacity - t.token, value_entry[4], at.lane);
  }
  VQ_LOOP
  for (; i < last_tile; i += WARPS, t = next) {
    const bool more = i + WARPS < last_tile;
    if (more) next = vq_find_tile<TOKENS>(chunks, count, VQ_CHUNK_NAMES, i + WARPS, held.packed, total_words, at.batch);
    float s[2 * ROWS][4];
    VQ_LOOP
    for (int part = 0; part < 2; ++part) {  // keys, then values: a loop, so that the decoder is in the program once
      VQ_IN(int) entry = part ? value_entry : key_entry;
      VQ_SHARED(uint) source = staged + (part ? key_words * TOKENS : 0);
      vq_stage_wait();
      VQ_SYNC_WARP();
      vq_put_rows<ROWS, STRIDE>(runs + part * VQ_MOST_PIECES * VQ_RUN_INTS, entry[1], source + at.lane, lookup,
                                tile + at.lane * STRIDE);
      VQ_SYNC_WARP();
      // The staged words of this part are used up: fetch those of the next tile while the products run.
      if (more) {
        vq_stage<TOKENS>(source, next.words + (size_t)entry[3] * next.capacity, next.capacity,
                         next.capacity - next.token, entry[4], at.lane);
      } else {
        vq_stage_nothing();
      }
      if (part == 0) {
        vq_score_tokens<ROWS, STRIDE>(s, folded, tile, entry[5], at.lane);
        vq_hide_tokens<ROWS>(s, t, held, params, hidden, added, at);
        vq_soften_tokens<MC, ROWS>(s, running);
      } else {
        vq_add_tokens<MC, ROWS, STRIDE>(running.output, s, tile, entry[5], at.lane);
      }
      VQ_SYNC_WARP();
    }
  }
  vq_gather_columns<MC>(running, shared, table, params, sums, outputs, shared + Space::warps, at, value_entry[5], WARPS);
}

// One thread group: x the split, y head and batch row, z eight queries of a group of query heads.
template <typename T, int DK, int DV, int MC, int WARPS, int ROWS, int STAGE>
VQ_FN void vq_attend_columns(VQ_IN(T) q, VQ_IN(T) keys, VQ_IN(T) values, VQ_CHUNK_ARGUMENTS, VQ_IN(int) rows,
                             VQ_IN(vq_half) folded, VQ_IN(float) mean_score, VQ_IN(int) table, VQ_IN(int) lookup,
                             VQ_IN(int) params, VQ_IN(float) scale, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                             VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared, int x, int y, int z,
                             int worker) {
  const int heads = params[VQ_H], left = params[VQ_G] * params[VQ_L] - z * VQ_QUERIES;
  const VqPlace at = {x, y % heads, y / heads, z * VQ_QUERIES, left < VQ_QUERIES ? left : VQ_QUERIES, worker / 32,
                      worker % 32};
  const VqRows held = vq_rows(rows, at.batch);
  if (x < params[VQ_EXACT_SPLITS]) {
    vq_attend_exact<T, DK, DV, VQ_QUERIES>(q, keys, values, held, params, table[VQ_OUTPUT_WIDTH], scale[0], hidden,
                                           added, sums, outputs, shared, at, WARPS * 32);
  } else {
    vq_attend_columns_packed<MC, WARPS, ROWS, STAGE>(folded, mean_score, VQ_CHUNK_NAMES, held, table, lookup, params,
                                                     hidden, added, sums, outputs, shared, at, z);
  }
}
