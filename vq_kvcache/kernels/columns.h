// attend.h for half precision where fragments of the matrix units are known (CUDA, and the host that does as they do):
// eight queries are the columns of both products, scores [tokens, 8] and weighted sums [columns, 8].
//
// A warp takes 32 packed tokens at a time, and waits for no other: each lane turns the words of one token (lookup.h), and
// the warp multiplies with the rows. Keys and values go through the same tile [32, columns], one after the other.

enum { VQ_QUERIES = 8 };

// A layer's table, columns.py. An entry: where its list begins (lookup.h), numbers of it, words of the head, the first of
// them, columns.
enum { VQ_KEY_ORDER = 6, VQ_COLUMN_ENTRY = 16 };

VQ_FN int vq_query_tiles(VQ_IN(int) params) { return (params[VQ_G] * params[VQ_L] + VQ_QUERIES - 1) / VQ_QUERIES; }

// Queries in the basis of the codes, once for all splits: folded [planes, tiles of 8 queries, 8, MC], in the order of
// the columns, and the share of the keys' mean in every score, mean_score [planes, tiles, 8]. x: VQ_FOLDED columns for
// each warp, and after all of them the mean.
enum { VQ_FOLDED = 4 };

template <typename T, int DK, int MC>
VQ_FN void vq_fold_columns(VQ_IN(T) q, VQ_IN(float) fold, VQ_IN(float) mean, VQ_IN(int) table, VQ_IN(int) params,
                           VQ_IN(float) scale, VQ_OUT(vq_half) folded, VQ_OUT(float) mean_score, int x, int y, int z,
                           int worker, int threads) {
  const int parts = (DK + 31) / 32, tiles = vq_query_tiles(params);
  const VqPlace at = vq_place<VQ_QUERIES>(params, 0, y, z, worker);
  const int first = (x * (threads / 32) + at.warp) * VQ_FOLDED, base = (y * tiles + z) * VQ_QUERIES;
  VQ_IN(int) order = table + table[VQ_KEY_ORDER] + at.head * MC;
  float basis[VQ_FOLDED][parts];
  VQ_UNROLL
  for (int k = 0; k < VQ_FOLDED; ++k) {
    const int n = first + k, coordinate = n < MC ? order[n] : n == MC ? 0 : -1;
    VQ_IN(float) row = n < MC ? fold + (at.head * table[VQ_KEY_ROWS] + coordinate) * DK : mean + at.head * DK;
    VQ_UNROLL
    for (int i = 0; i < parts; ++i) {
      const int d = i * 32 + at.lane;
      basis[k][i] = coordinate >= 0 && d < DK ? row[d] : 0.0f;
    }
  }
  VQ_UNROLL
  for (int r = 0; r < VQ_QUERIES; ++r) {
    float sum[VQ_FOLDED];
    VQ_UNROLL
    for (int k = 0; k < VQ_FOLDED; ++k) sum[k] = 0.0f;
    if (r < at.rows) {
      VQ_UNROLL
      for (int i = 0; i < parts; ++i) {
        const int d = i * 32 + at.lane;
        const float own = d < DK ? vq_query<T, DK>(q, params, at, at.first + r, d) * scale[0] : 0.0f;
        VQ_UNROLL
        for (int k = 0; k < VQ_FOLDED; ++k) sum[k] = vq_fma(own, basis[k][i], sum[k]);
      }
      VQ_UNROLL
      for (uint bit = 16; bit; bit /= 2) {
        VQ_UNROLL
        for (int k = 0; k < VQ_FOLDED; ++k) sum[k] += vq_shuffle_xor(sum[k], bit);
      }
    }
    VQ_UNROLL
    for (int k = 0; k < VQ_FOLDED; ++k) {
      if (at.lane != k || first + k > MC) continue;
      if (first + k < MC) {
        vq_set(folded[(base + r) * MC + first + k], sum[k]);
      } else {
        mean_score[base + r] = sum[k];
      }
    }
  }
}

// What a lane keeps while it walks over the tokens: of queries 2 (lane % 4) and the next the maximum and its part of
// the sum of weights, and its fragments of the weighted sums [MC, 8].
template <int MC>
struct VqColumnSums {
  float top[2], sum[2], output[MC / 16][4];
};

// s [tokens, 8] = tile [tokens, columns] q^T; q is zero from there up to a multiple of 32.
template <int MC, int STRIDE>
VQ_FN void vq_score_tokens(VQ_THREAD float (&s)[2][4], VQ_SHARED(const vq_half) q, VQ_SHARED(const vq_half) tile,
                           int columns, int lane) {
  float odd[2][4];  // sums of every other product, so that fewer wait for the one before
  VQ_UNROLL
  for (int m = 0; m < 2; ++m) {
    VQ_UNROLL
    for (int e = 0; e < 4; ++e) s[m][e] = odd[m][e] = 0.0f;
  }
  q += lane % 8 * (MC + 8) + lane / 8 * 8;
  tile += lane % 16 * STRIDE + lane / 16 * 8;
  uint b[4];
  VQ_UNROLL
  for (int k = 0; k < MC; k += 16) {
    if (k % 32 == 0) {
      if (k >= columns) break;
      vq_ldmatrix(b, q + k);  // of this k and the next
    }
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      uint a[4];
      vq_ldmatrix(a, tile + m * 16 * STRIDE + k);
      vq_mma(k % 32 ? odd[m] : s[m], a, b[k % 32 / 8], b[k % 32 / 8 + 1]);
    }
  }
  VQ_UNROLL
  for (int m = 0; m < 2; ++m) {
    VQ_UNROLL
    for (int e = 0; e < 4; ++e) s[m][e] += odd[m][e];
  }
}

// Rings of 1 bit that fill a word go from it to the fragments: fewer instructions, and no way through a tile. Theirs are the
// last columns, 32 each, the first ring's behind the others'. words: of the first of `count` rings.
template <int MC>
VQ_FN void vq_score_rings(VQ_THREAD float (&s)[2][4], VQ_SHARED(const vq_half) q, VQ_SHARED(const uint) words, int count,
                          VQ_SHARED(const uint) lookup, int lane) {
  uint book[4];
  vq_load4_shared(book, lookup);
  q += lane % 8 * (MC + 8) + lane / 8 * 8 + MC - 32;
  words += lane / 4;
  VQ_LOOP
  for (; count > 0; --count) {
    uint b[4];
    vq_ldmatrix(b, q);
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      uint a[2][4];
      VQ_UNROLL
      for (int i = 0; i < 2; ++i) {  // tokens lane / 4 and eight behind
        const uint indices = vq_every_fourth(words[m * 16 + i * 8], lane % 4);
        vq_four(book, indices, a[0][i], a[0][i + 2]);
        vq_four(book, indices >> 16, a[1][i], a[1][i + 2]);
      }
      vq_mma(s[m], a[0], b[0], b[1]);
      vq_mma(s[m], a[1], b[2], b[3]);
    }
    q -= 32, words += VQ_COLUMN_TOKENS;
  }
}

// Hide the scores of positions that this row does not hold or the mask hides.
VQ_FN void vq_hide_tokens(VQ_THREAD float (&s)[2][4], VQ_THREAD const VqTile& t, VqRows held, bool masked,
                          VQ_IN(int) params, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                          VQ_THREAD const VqPlace& at) {
  const int length = held.sinks + held.packed + held.end - held.start;
  if (!masked && t.valid >= VQ_COLUMN_TOKENS) return;
  VQ_UNROLL
  for (int m = 0; m < 2; ++m) {
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
template <int MC>
VQ_FN void vq_soften_tokens(VQ_THREAD float (&s)[2][4], VQ_THREAD VqColumnSums<MC>& running) {
  float change[2];
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    float top = running.top[e];
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) top = vq_max(top, vq_max(s[m][e], s[m][e + 2]));
    VQ_UNROLL
    for (uint bit = 4; bit <= 16; bit *= 2) top = vq_max(top, vq_shuffle_xor(top, bit));
    change[e] = vq_exp2(running.top[e] - top);
    float sum = running.sum[e] * change[e];
    const float seen = vq_max(top, 0.5f * VQ_LOWEST);  // so that hidden scores have no weight where all are hidden
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      VQ_UNROLL
      for (int i = e; i < 4; i += 2) {
        s[m][i] = vq_exp2(s[m][i] - seen);
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

// Weights as fragments of tokens by queries.
VQ_FN void vq_turn_weights(VQ_THREAD uint (&b)[2][2], VQ_THREAD const float (&s)[2][4]) {
  VQ_UNROLL
  for (int m = 0; m < 2; ++m) {
    b[m][0] = vq_turned(vq_bits(vq_pack(s[m][0], s[m][1])));
    b[m][1] = vq_turned(vq_bits(vq_pack(s[m][2], s[m][3])));
  }
}

// output [columns, 8] += tile^T [columns, tokens] weights [tokens, 8].
template <int MC, int STRIDE>
VQ_FN void vq_add_tokens(VQ_THREAD float (&output)[MC / 16][4], VQ_THREAD const uint (&b)[2][2],
                         VQ_SHARED(const vq_half) tile, int columns, int lane) {
  tile += (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) {
    if (n % 2 == 0 && n * 16 >= columns) break;
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      uint a[4];
      vq_ldmatrix_turned(a, tile + m * 16 * STRIDE + n * 16);
      vq_mma(output[n], a, b[m][0], b[m][1]);
    }
  }
}

// The same of rings of 1 bit that fill a word, as vq_score_rings.
template <int MC>
VQ_FN void vq_add_rings(VQ_THREAD float (&output)[MC / 16][4], VQ_THREAD const uint (&b)[2][2], VQ_SHARED(const uint) words,
                        int count, VQ_SHARED(const uint) lookup, int lane) {
  uint book[4];
  vq_load4_shared(book, lookup);
  words += lane % 4 * 2;
  VQ_UNROLL
  for (int r = 0; r < MC / 32; ++r) {
    if (r >= count) break;
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      uint a[2][4];
      VQ_UNROLL
      for (int i = 0; i < 2; ++i) {  // two tokens, and two eight behind
        uint x, y;
        vq_load2(words + m * 16 + i * 8, x, y);
        const uint indices = vq_every_eighth(x, y, lane / 4);
        vq_four(book, indices, a[0][2 * i], a[0][2 * i + 1]);
        vq_four(book, indices >> 16, a[1][2 * i], a[1][2 * i + 1]);
      }
      vq_mma(output[MC / 16 - 2 - 2 * r], a[0], b[m][0], b[m][1]);
      vq_mma(output[MC / 16 - 1 - 2 * r], a[1], b[m][0], b[m][1]);
    }
    words += VQ_COLUMN_TOKENS;
  }
}

// The running sums of all warps of the group -> the outputs of this split.
template <int MC>
VQ_FN void vq_gather_columns(VQ_THREAD VqColumnSums<MC>& running, VQ_SHARED(const float) mean_score, VQ_IN(int) table,
                             VQ_IN(int) params, VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared,
                             VQ_THREAD const VqPlace& at, int warps) {
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
  for (int i = at.warp * 32 + at.lane; i < at.rows * MC; i += warps * 32) {
    const int row = i / MC, n = i % MC;
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

// Where things lie in shared memory, in floats: the mean's scores, chunks, entries, levels, folded queries, lists of keys
// and then of values, and for each warp a tile, and words of keys and then of values. A row holds 8 columns less than MC, so
// that eight rows lie in different memory banks: the last product reads eight numbers behind it, for columns of queries that
// are zero, or of sums that nobody reads.
template <int MC>
struct VqColumnSpace {
  enum {
    stride = MC - 8, query_stride = MC + 8, chunks = 8, entries = 24, lookup = entries + 2 * 8,
    folded = lookup + VQ_LOOKUP, lists = folded + VQ_QUERIES * query_stride / 2,
    numbers = VQ_COLUMN_TOKENS * stride + 8,  // halves of a tile
    staged = numbers / 2,
  };
};

// The words of a head, of a tile -> `to` [words, tokens], while other things are done.
VQ_FN void vq_fetch_words(VQ_SHARED(uint) to, VQ_SHARED(const int) entry, VQ_THREAD const VqTile& t, int lane) {
  const int first = lane / 8, token = lane % 8 * 4;
  if (t.token + token >= t.capacity) return;
  const size_t step = (size_t)4 * t.capacity;
  VQ_IN(uint) from = t.words + (size_t)(entry[3] + first) * t.capacity + token;
  to += first * VQ_COLUMN_TOKENS + token;
  VQ_LOOP
  for (int left = entry[2] - first; left > 0; left -= 4) {
    vq_fetch4(to, from);
    to += 4 * VQ_COLUMN_TOKENS, from += step;
  }
}

// Packed tokens.
template <int MC, int WARPS>
VQ_FN void vq_attend_columns_packed(VQ_IN(vq_half) folded_in, VQ_IN(float) mean_in, VQ_CHUNK_ARGUMENTS, VqRows held,
                                    VQ_IN(int) table, VQ_IN(int) lookup_in, VQ_IN(int) params,
                                    VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums,
                                    VQ_OUT(float) outputs, VQ_SHARED(float) shared, VQ_THREAD const VqPlace& at,
                                    int query_tile) {
  typedef VqColumnSpace<MC> Space;
  enum { STRIDE = Space::stride, QUERY_STRIDE = Space::query_stride, THREADS = WARPS * 32 };
  VQ_SHARED(int) chunks = (VQ_SHARED(int))(shared + Space::chunks);
  VQ_SHARED(uint) lookup = (VQ_SHARED(uint))(shared + Space::lookup);
  VQ_SHARED(int) lists = (VQ_SHARED(int))(shared + Space::lists);
  VQ_SHARED(vq_half) folded = (VQ_SHARED(vq_half))(shared + Space::folded);
  const int worker = at.warp * 32 + at.lane, heads = params[VQ_H];
  VQ_SHARED(int) key_entry = (VQ_SHARED(int))(shared + Space::entries);
  VQ_SHARED(int) value_entry = key_entry + 8;
  if (worker < 16 && worker % 8 < VQ_HEAD_INTS)
    key_entry[worker] = table[VQ_COLUMN_ENTRY + (worker / 8 * heads + at.head) * VQ_HEAD_INTS + worker % 8];
  const int total_words = table[VQ_TOTAL_WORDS], count = params[VQ_CHUNKS];
  const bool masked = params[VQ_MASK_KIND] != VQ_NO_MASK;
  const int first_tile = (at.split - params[VQ_EXACT_SPLITS]) * params[VQ_TILES_PER_SPLIT];
  int last_tile = first_tile + params[VQ_TILES_PER_SPLIT], i = first_tile + at.warp;
  if (last_tile > params[VQ_TILES]) last_tile = params[VQ_TILES];
  if (worker < 16) chunks[worker] = worker < 2 * count ? params[VQ_CHUNK_TABLE + worker] : 0;
  for (int k = worker; k < VQ_LOOKUP; k += THREADS) lookup[k] = lookup_in[k];
  VQ_SYNC_GROUP();
  const int value_list = key_entry[1], value_words = key_entry[2] * VQ_COLUMN_TOKENS;  // where they begin
  for (int part = 0; part < 2; ++part) {
    VQ_SHARED(const int) entry = part ? value_entry : key_entry;
    for (int k = worker; k < entry[1]; k += THREADS) lists[(part ? value_list : 0) + k] = table[entry[0] + k];
  }
  const int own = (at.batch * heads + at.head) * vq_query_tiles(params) + query_tile;
  for (int k = worker; k < VQ_QUERIES * MC; k += THREADS)
    folded[k / MC * QUERY_STRIDE + k % MC] = folded_in[own * VQ_QUERIES * MC + k];
  if (worker < VQ_QUERIES) shared[worker] = mean_in[own * VQ_QUERIES + worker];
  const int warp_floats = Space::staged + value_words + value_entry[2] * VQ_COLUMN_TOKENS;
  VQ_SHARED(float) warps = shared + Space::lists + value_list + value_entry[1];
  VQ_SHARED(vq_half) tile = (VQ_SHARED(vq_half))(warps + at.warp * warp_floats);
  VQ_SHARED(uint) staged = (VQ_SHARED(uint))tile + Space::staged;
  // What is never written must not be NaN.
  const uint zeros[4] = {0u, 0u, 0u, 0u};
  for (int k = 8 * at.lane; k < Space::numbers; k += 8 * 32) vq_put8(tile + k, zeros);
  VQ_SYNC_GROUP();
  VqColumnSums<MC> running;
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) running.top[e] = VQ_LOWEST, running.sum[e] = 0.0f;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) {
    VQ_UNROLL
    for (int k = 0; k < 4; ++k) running.output[n][k] = 0.0f;
  }
  VqTile t;
  if (i < last_tile) {
    t = vq_find_tile<VQ_COLUMN_TOKENS>(chunks, count, VQ_CHUNK_NAMES, i, held.packed, total_words, at.batch);
    vq_fetch_words(staged, key_entry, t, at.lane);
  }
  vq_stage_nothing();
  VQ_LOOP
  for (; i < last_tile; i += WARPS) {
    float s[2][4];
    VqTile next = t;  // until values are decoded
    VQ_LOOP
    for (int part = 0; part < 2; ++part) {  // keys, then values: a loop, so that the decoder is in the program once
      VQ_SHARED(const int) entry = part ? value_entry : key_entry;
      // Meanwhile the next words come: of values, or of the next tile's keys.
      if (part == 1 && i + WARPS < last_tile)
        next = vq_next_tile<VQ_COLUMN_TOKENS, WARPS>(t, chunks, count, VQ_CHUNK_NAMES, i + WARPS, held.packed, total_words,
                                                     at.batch);
      if (part == 0 || i + WARPS < last_tile)
        vq_fetch_words(part ? staged : staged + value_words, part ? key_entry : value_entry, next, at.lane);
      vq_stage_nothing();
      vq_stage_wait();
      VQ_SYNC_WARP();
      VQ_SHARED(const uint) list = (VQ_SHARED(const uint))lists + (part ? value_list : 0);
      VQ_SHARED(const uint) words = staged + (part ? value_words : 0);
      vq_put_levels(list, words + at.lane, lookup, tile + at.lane * STRIDE);
      VQ_SYNC_WARP();
      const int rings = list[VQ_WHOLE_RINGS];
      words += list[VQ_WHOLE_RINGS + 1] * VQ_COLUMN_TOKENS;
      if (part == 0) {
        vq_score_tokens<MC, STRIDE>(s, folded, tile, entry[4], at.lane);
        vq_score_rings<MC>(s, folded, words, rings, lookup, at.lane);
        vq_hide_tokens(s, t, held, masked, params, hidden, added, at);
        vq_soften_tokens<MC>(s, running);
      } else {
        uint weights[2][2];
        vq_turn_weights(weights, s);
        vq_add_tokens<MC, STRIDE>(running.output, weights, tile, entry[4], at.lane);
        vq_add_rings<MC>(running.output, weights, words, rings, lookup, at.lane);
      }
      VQ_SYNC_WARP();
    }
    t = next;
  }
  vq_gather_columns<MC>(running, shared, table, params, sums, outputs, warps, at, WARPS);
}

// One thread group: x the split, y head and batch row, z eight queries of a group of query heads.
template <typename T, int DK, int DV, int MC, int WARPS>
VQ_FN void vq_attend_columns(VQ_IN(T) q, VQ_IN(T) keys, VQ_IN(T) values, VQ_CHUNK_ARGUMENTS, VQ_IN(int) rows,
                             VQ_IN(vq_half) folded, VQ_IN(float) mean_score, VQ_IN(int) table, VQ_IN(int) lookup,
                             VQ_IN(int) params, VQ_IN(float) scale, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                             VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared, int x, int y, int z,
                             int worker) {
  const VqPlace at = vq_place<VQ_QUERIES>(params, x, y, z, worker);
  const VqRows held = vq_rows(rows, at.batch);
  if (x < params[VQ_EXACT_SPLITS]) {
    vq_attend_exact<T, DK, DV, VQ_QUERIES>(q, keys, values, held, params, table[VQ_OUTPUT_WIDTH], scale[0], hidden,
                                           added, sums, outputs, shared, at, WARPS * 32);
  } else {
    vq_attend_columns_packed<MC, WARPS>(folded, mean_score, VQ_CHUNK_NAMES, held, table, lookup, params, hidden, added,
                                        sums, outputs, shared, at, z);
  }
}
