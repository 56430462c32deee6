// attend.h for half precision where fragments of the matrix units are known (CUDA, and the host that does as they do):
// eight queries are the columns of both products, scores [tokens, 8] and weighted sums [columns, 8].
//
// A warp takes 32 packed tokens at a time, and waits for no other: each lane turns the words of one token (lookup.h), and
// the warp multiplies with the rows. Keys and values go through the same tile [32, columns], one after the other.

enum { VQ_QUERIES = 8 };
#define VQ_LEEWAY 8.0f  // bits by which a score may be beyond what weights are relative to

// A layer's table, columns.py. An entry: where its list begins (lookup.h), numbers of it, words of the head, the first of
// them, columns, and which head it is of.
enum { VQ_FOLD_EXPONENT = 6, VQ_COLUMN_ENTRY = 16 };

// Eight queries in the basis of the codes -> folded, eight rows of MC columns in their order, MC + 8 apart, and the share of
// the keys' mean in every score. fragments [heads, MC / 16, DK / 16, 32 lanes, 4]: the basis as the first factor of a
// product, in half precision, divided by 2^exponent. space: for the queries, which are read once, each divided by a power
// of two; eight rows of DK halves, DK + 8 apart, eight halves, and eight floats.
template <typename T, int DK, int MC, int WARPS>
VQ_FN void vq_fold_columns(VQ_SHARED(vq_half) folded, VQ_SHARED(float) mean_score, VQ_SHARED(vq_half) space, VQ_IN(T) q,
                           VQ_IN(uint) fragments, VQ_IN(float) mean, int exponent, float scale,
                           VQ_THREAD const VqPlace& at) {
  enum { STEPS = DK / 16, PARTS = (DK + 31) / 32, STRIDE = DK + 8 };
  VQ_SHARED(float) sizes = (VQ_SHARED(float))(space + VQ_QUERIES * STRIDE + 8);
  VQ_IN(uint) own = fragments + ((size_t)(at.head * (MC / 16) + at.warp) * STEPS * 32 + at.lane) * 4;
  uint a[STEPS][4];
  VQ_UNROLL
  for (int k = 0; k < STEPS; ++k)
    if (at.warp < MC / 16) vq_load4(a[k], own + k * 32 * 4);
  float centre[PARTS];
  VQ_UNROLL
  for (int k = 0; k < PARTS; ++k) centre[k] = k * 32 + at.lane < DK ? mean[at.head * DK + k * 32 + at.lane] : 0.0f;
  VQ_LOOP
  for (int r = at.warp; r < VQ_QUERIES; r += WARPS) {
    VQ_IN(T) query = q + (vq_first_query(at) + (r < at.rows ? r : 0)) * DK;
    float x[PARTS], sum = 0.0f, largest = 0.0f;
    VQ_UNROLL
    for (int k = 0; k < PARTS; ++k) x[k] = k * 32 + at.lane < DK ? vq_float(query[k * 32 + at.lane]) : 0.0f;
    VQ_UNROLL
    for (int k = 0; k < PARTS; ++k) {
      if (r >= at.rows) x[k] = 0.0f;
      sum = vq_fma(x[k], centre[k], sum);
      largest = vq_max(largest, x[k] < 0.0f ? -x[k] : x[k]);
    }
    VQ_UNROLL
    for (uint bit = 16; bit; bit /= 2) {
      sum += vq_shuffle_xor(sum, bit);
      largest = vq_max(largest, vq_shuffle_xor(largest, bit));
    }
    const float size = vq_power(vq_max(largest, 1e-30f)), inverse = 1.0f / size;
    VQ_UNROLL
    for (int k = 0; k < PARTS; ++k)
      if (k * 32 + at.lane < DK) vq_set(space[r * STRIDE + k * 32 + at.lane], x[k] * inverse);
    if (at.lane == 0) mean_score[r] = sum * scale, sizes[r] = size;
  }
  VQ_SYNC_GROUP();
  const float factor = scale * vq_exp2((float)exponent);
  const float factors[2] = {factor * sizes[at.lane % 4 * 2], factor * sizes[at.lane % 4 * 2 + 1]};
  VQ_SHARED(const vq_half) rows = space + at.lane % 8 * STRIDE + at.lane / 8 * 8;
  VQ_LOOP
  for (int m = at.warp; m < MC / 16; m += WARPS) {
    float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    VQ_UNROLL
    for (int k = 0; k < STEPS; k += 2) {
      uint b[4];
      vq_ldmatrix(b, rows + k * 16);
      vq_mma(c, a[k], b[0], b[1]);
      if (k + 1 < STEPS) vq_mma(c, a[k + 1], b[2], b[3]);
    }
    VQ_SHARED(vq_half) out = folded + at.lane % 4 * 2 * (MC + 8) + m * 16 + at.lane / 4;
    VQ_UNROLL
    for (int e = 0; e < 4; ++e) vq_set(out[e % 2 * (MC + 8) + e / 2 * 8], c[e] * factors[e % 2]);
    own += WARPS * STEPS * 32 * 4;
    VQ_UNROLL
    for (int k = 0; k < STEPS; ++k)
      if (m + WARPS < MC / 16) vq_load4(a[k], own + k * 32 * 4);
  }
}

// What a lane keeps while it walks over the tokens: of queries 2 (lane % 4) and the next the maximum and its part of
// the sum of weights, and its fragments of the weighted sums [MC, 8].
template <int MC>
struct VqColumnSums {
  float top[2], sum[2], output[MC / 16][4];
};

// Fragments of 32 columns, from `k` on, of a tile: of 16 tokens and 16 columns each.
template <int ROW, bool TURNED>
VQ_FN void vq_load_columns(VQ_THREAD uint (&a)[2][2][4], VQ_SHARED(const vq_half) tile, int k) {
  VQ_UNROLL
  for (int half = 0; half < 2 && k + half * 16 < ROW + 8; ++half) {
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      if (TURNED) {
        vq_ldmatrix_turned(a[half][m], tile + m * 16 * ROW + k + half * 16);
      } else {
        vq_ldmatrix(a[half][m], tile + m * 16 * ROW + k + half * 16);
      }
    }
  }
}

// s [tokens, 8] = tile [tokens, columns] q^T; q is zero from there up to a multiple of 32.
template <int MC, int ROW>
VQ_FN void vq_score_tokens(VQ_THREAD float (&s)[2][4], VQ_SHARED(const vq_half) q, VQ_SHARED(const vq_half) tile,
                           int columns, int lane) {
  VQ_UNROLL
  for (int m = 0; m < 2; ++m) {
    VQ_UNROLL
    for (int e = 0; e < 4; ++e) s[m][e] = 0.0f;
  }
  q += lane % 8 * (MC + 8) + lane / 8 * 8;
  tile += lane % 16 * ROW + lane / 16 * 8;
  uint a[2][2][4], b[4];
  VQ_UNROLL
  for (int k = 0; k < ROW + 8; k += 32) {
    if (k >= columns) break;
    vq_ldmatrix(b, q + k);
    vq_load_columns<ROW, false>(a, tile, k);
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      vq_mma(s[m], a[0][m], b[0], b[1]);
      if (k + 16 < ROW + 8) vq_mma(s[m], a[1][m], b[2], b[3]);
    }
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

// Scores of one tile, in place, to weights. These are 2^(score - top) with a top that is only brought to the maximum, and
// with it the running sums, when a score is beyond it by VQ_LEEWAY bits: half precision holds such weights as well.
template <int MC>
VQ_FN void vq_soften_tokens(VQ_THREAD float (&s)[2][4], VQ_THREAD VqColumnSums<MC>& running) {
  float top[2];
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) top[e] = vq_max(vq_max(s[0][e], s[0][e + 2]), vq_max(s[1][e], s[1][e + 2]));
  if (vq_any(vq_max(top[0] - running.top[0], top[1] - running.top[1]) > VQ_LEEWAY)) {
    VQ_UNROLL
    for (int e = 0; e < 2; ++e) {
      VQ_UNROLL
      for (uint bit = 4; bit <= 16; bit *= 2) top[e] = vq_max(top[e], vq_shuffle_xor(top[e], bit));
      top[e] = vq_max(top[e], running.top[e]);
      const float change = vq_exp2(running.top[e] - top[e]);
      running.top[e] = top[e], running.sum[e] *= change;
      VQ_UNROLL
      for (int n = 0; n < MC / 16; ++n) running.output[n][e] *= change, running.output[n][e + 2] *= change;
    }
  }
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const float seen = vq_max(running.top[e], 0.5f * VQ_LOWEST);  // so that hidden scores have no weight where all are hidden
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      VQ_UNROLL
      for (int i = e; i < 4; i += 2) {
        s[m][i] = vq_exp2(s[m][i] - seen);
        running.sum[e] += s[m][i];
      }
    }
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
template <int MC, int ROW>
VQ_FN void vq_add_tokens(VQ_THREAD float (&output)[MC / 16][4], VQ_THREAD const uint (&b)[2][2],
                         VQ_SHARED(const vq_half) tile, int columns, int lane) {
  tile += (lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 8;
  uint a[2][2][4];
  VQ_UNROLL
  for (int k = 0; k < ROW + 8; k += 32) {
    if (k >= columns) break;
    vq_load_columns<ROW, true>(a, tile, k);
    VQ_UNROLL
    for (int m = 0; m < 2; ++m) {
      vq_mma(output[k / 16], a[0][m], b[m][0], b[m][1]);
      if (k + 16 < ROW + 8) vq_mma(output[k / 16 + 1], a[1][m], b[m][0], b[m][1]);
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

// The running sums of all warps of the group -> the outputs of this split, from `base` on.
template <int MC, int WARPS>
VQ_FN void vq_gather_columns(VQ_THREAD VqColumnSums<MC>& running, VQ_SHARED(const float) mean_score, int base,
                             VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared,
                             VQ_THREAD const VqPlace& at) {
  enum { WIDTH = MC + 4 };  // so that lanes' numbers lie in different memory banks
  VQ_SHARED(float) tops = shared + WARPS * VQ_QUERIES * WIDTH;  // after the outputs: [warps, 8] tops, then sums
  VQ_SYNC_GROUP();
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) {
    const int query = at.lane % 4 * 2 + e, row = at.warp * VQ_QUERIES + query;
    float sum = running.sum[e];
    VQ_UNROLL
    for (uint bit = 4; bit <= 16; bit *= 2) sum += vq_shuffle_xor(sum, bit);
    tops[row] = running.top[e];
    tops[WARPS * VQ_QUERIES + row] = sum;
    if (query >= at.rows) continue;
    VQ_UNROLL
    for (int n = 0; n < MC / 16; ++n) {
      VQ_SHARED(float) out = shared + row * WIDTH + n * 16 + at.lane / 4;
      out[0] = running.output[n][e], out[8] = running.output[n][e + 2];
    }
  }
  VQ_SYNC_GROUP();
  VQ_LOOP
  for (int i = at.warp * 32 + at.lane; i < at.rows * MC; i += WARPS * 32) {
    const int row = i / MC, n = i % MC;
    float own[WARPS], top = VQ_LOWEST, sum = 0.0f, out = 0.0f;
    VQ_UNROLL
    for (int w = 0; w < WARPS; ++w) own[w] = tops[w * VQ_QUERIES + row], top = vq_max(top, own[w]);
    VQ_UNROLL
    for (int w = 0; w < WARPS; ++w) {
      const float share = vq_exp2(own[w] - top);
      sum += share * tops[(WARPS + w) * VQ_QUERIES + row];
      out += share * shared[(w * VQ_QUERIES + row) * WIDTH + n];
    }
    outputs[(base + row) * MC + n] = out;
    if (n == 0) sums[2 * (base + row)] = top + mean_score[row], sums[2 * (base + row) + 1] = sum;
  }
}

// Where things lie in shared memory, in floats: the mean's scores, chunks, entries, levels, folded queries, lists of keys
// and then of values, and for each warp a tile [32, ROW], and words of keys and then of values. ROW is an odd multiple of
// eight, so that eight rows lie in different memory banks: products of 32 columns may read eight numbers behind a row, for
// columns of queries that are zero, or of sums that nobody reads. The first tile holds the queries while they are folded.
template <int MC, int ROW>
struct VqColumnSpace {
  enum {
    query_stride = MC + 8, chunks = 8, entries = 24, lookup = entries + 2 * 8,
    folded = lookup + VQ_LOOKUP, lists = folded + VQ_QUERIES * query_stride / 2,
    numbers = VQ_COLUMN_TOKENS * ROW + 8,  // halves of a tile
    staged = numbers / 2,
  };
};

// One or the other, field by field, so that all of them stay in registers.
VQ_FN VqKinds vq_either(bool values, VQ_THREAD const VqKinds& k, VQ_THREAD const VqKinds& v) {
  const VqKinds own = {{values ? v.counts[0] : k.counts[0], values ? v.counts[1] : k.counts[1]},
                       values ? v.first : k.first, values ? v.whole : k.whole};
  return own;
}

// The words of a head, of a tile -> `to` [words, tokens], while other things are done. Each lane copies four tokens of every
// fourth word: `from` and `to` are of those of the word lane / 8.
VQ_FN void vq_fetch_words(VQ_SHARED(uint) to, VQ_IN(uint) from, int words, uint capacity, int lane) {
  const int own = words - lane / 8;
  if (own > 0) vq_fetch4(to, from);
  if (own > 4) vq_fetch4(to + 4 * VQ_COLUMN_TOKENS, from + 4 * capacity);
  VQ_LOOP
  for (int first = 8; first < words; first += 4)
    if (own > first) vq_fetch4(to + first * VQ_COLUMN_TOKENS, from + first * capacity);
}

// So many numbers, a multiple of four -> `to`, while other things are done.
template <int THREADS>
VQ_FN void vq_fetch_ints(VQ_SHARED(int) to, VQ_IN(int) from, int count, int worker) {
  VQ_LOOP
  for (int k = 4 * worker; k < count; k += 4 * THREADS)
    vq_fetch4((VQ_SHARED(uint))to + k, (VQ_IN(uint))from + k);
}

// A tile that was found, as all lanes know it but for `words`: those of its head's keys that this lane copies first. Others
// behind it may be stepped to while t.token is less than t.tokens; beyond a chunk's capacity nothing is read.
VQ_FN void vq_know_tile(VQ_THREAD VqTile& t, uint first_word, int lane) {
  t.capacity = vq_uniform(t.capacity), t.first = vq_uniform(t.first);
  t.token = vq_uniform(t.token), t.valid = vq_uniform(t.valid);
  const int left = t.capacity - t.token, own = lane % 8 * 4;
  t.tokens = vq_uniform(t.tokens < t.capacity - VQ_COLUMN_TOKENS + 1 ? t.tokens : t.capacity - VQ_COLUMN_TOKENS + 1);
  t.words += (size_t)(first_word + (uint)lane / 8) * t.capacity + (own < left ? own : 0);
}

// What a group loads first, all at once, to hide the latency of memory: numbers of `params` and `table`, and one number for
// each of the first threads of the entries of keys and values, and of the chunks.
struct VqWork {
  int exact, alone, tiles, each, besides, packed, chunks, mask, total_words, exponent, entry, chunk;
};

// head: of the packed tokens, whose turn it is.
VQ_FN VqWork vq_work(VQ_IN(int) params, VQ_IN(int) table, int head, int heads, int worker) {
  VqWork work;
  work.exact = vq_uniform(params[VQ_EXACT_SPLITS]), work.packed = vq_uniform(params[VQ_PACKED_SPLITS]);
  work.tiles = vq_uniform(params[VQ_TILES]), work.each = vq_uniform(params[VQ_TILES_PER_SPLIT]);
  work.alone = vq_uniform(params[VQ_ALONE_GROUPS]), work.besides = vq_uniform(params[VQ_TILES_BESIDES]);
  work.chunks = vq_uniform(params[VQ_CHUNKS]), work.mask = vq_uniform(params[VQ_MASK_KIND]);
  work.total_words = vq_uniform(table[VQ_TOTAL_WORDS]), work.exponent = vq_uniform(table[VQ_FOLD_EXPONENT]);
  work.entry = work.chunk = 0;
  if (worker < 16) {
    if (worker % 8 < VQ_HEAD_INTS)
      work.entry = table[VQ_COLUMN_ENTRY + (worker / 8 * heads + head) * VQ_HEAD_INTS + worker % 8];
    if (worker < 2 * work.chunks) work.chunk = params[VQ_CHUNK_TABLE + worker];
  }
  return work;
}

// Packed tokens. at.head: whose turn it is, by the order of entries.
template <typename T, int DK, int MC, int ROW, int WARPS>
VQ_FN void vq_attend_columns_packed(VQ_IN(T) q, VQ_CHUNK_ARGUMENTS, VqRows held, VQ_IN(uint) fold, VQ_IN(float) mean,
                                    VQ_IN(int) table, VQ_IN(int) lookup_in, VQ_IN(int) params, float scale,
                                    VQ_IN(unsigned char) hidden, VQ_IN(float) added, VQ_OUT(float) sums,
                                    VQ_OUT(float) outputs, VQ_SHARED(float) shared, VQ_THREAD const VqWork& work,
                                    VqPlace at) {
  typedef VqColumnSpace<MC, ROW> Space;
  enum { THREADS = WARPS * 32 };
  VQ_SHARED(int) chunks = (VQ_SHARED(int))(shared + Space::chunks);
  VQ_SHARED(uint) lookup = (VQ_SHARED(uint))(shared + Space::lookup);
  VQ_SHARED(int) lists = (VQ_SHARED(int))(shared + Space::lists);
  VQ_SHARED(vq_half) folded = (VQ_SHARED(vq_half))(shared + Space::folded);
  const int worker = at.warp * 32 + at.lane;
  VQ_SHARED(int) key_entry = (VQ_SHARED(int))(shared + Space::entries);
  VQ_SHARED(int) value_entry = key_entry + 8;
  vq_fetch_ints<THREADS>((VQ_SHARED(int))lookup, lookup_in, VQ_LOOKUP, worker);
  if (worker < 16) key_entry[worker] = work.entry, chunks[worker] = work.chunk;
  const bool masked = work.mask != VQ_NO_MASK;
  const int behind = at.split - work.exact - work.alone, own_tiles = behind < 0 ? work.each : work.besides;
  const int first_tile = work.alone * work.each + behind * own_tiles;
  int last_tile = first_tile + own_tiles, i = first_tile + at.warp;
  if (last_tile > work.tiles) last_tile = work.tiles;
  i = vq_uniform(i), last_tile = vq_uniform(last_tile);
  VQ_SYNC_GROUP();
  const int value_list = key_entry[1], value_words = key_entry[2] * VQ_COLUMN_TOKENS;  // where they begin
  const int warp_floats = Space::staged + value_words + value_entry[2] * VQ_COLUMN_TOKENS;
  VQ_SHARED(float) warps = shared + Space::lists + value_list + value_entry[1];
  VQ_SHARED(vq_half) tile = (VQ_SHARED(vq_half))(warps + at.warp * warp_floats);
  VQ_SHARED(uint) staged = (VQ_SHARED(uint))tile + Space::staged;
  const uint key_count = vq_uniform(key_entry[2]), value_count = vq_uniform(value_entry[2]);
  const uint first_word = vq_uniform(key_entry[3]), to_values = vq_uniform(value_entry[3]) - first_word;
  VQ_SHARED(uint) own_words = vq_kept(staged + at.lane, at.lane);
  VQ_SHARED(vq_half) own_row = vq_kept(tile + at.lane * ROW, at.lane);
  vq_fetch_ints<THREADS>(lists, table + key_entry[0], value_list, worker);
  vq_fetch_ints<THREADS>(lists + value_list, table + value_entry[0], value_entry[1], worker);
  vq_stage_nothing();
  VqTile t;
  if (i < last_tile) {
    t = vq_find_tile<VQ_COLUMN_TOKENS>(chunks, work.chunks, VQ_CHUNK_NAMES, i, held.packed, work.total_words, at.batch);
    vq_know_tile(t, first_word, at.lane);
    vq_fetch_words(own_words + 3 * at.lane, t.words, key_count, t.capacity, at.lane);
  }
  vq_stage_nothing();
  at.head = vq_uniform(key_entry[5]);
  const int base = vq_partial(at, work.exact + work.packed);
  vq_fold_columns<T, DK, MC, WARPS>(folded, shared, (VQ_SHARED(vq_half))warps, q, fold, mean, work.exponent, scale, at);
  vq_stage_wait();  // for the lists, not for the words
  VQ_SYNC_GROUP();
  // What is never written must not be NaN.
  const uint zeros[4] = {0u, 0u, 0u, 0u};
  for (int k = 8 * at.lane; k < Space::numbers; k += 8 * 32) vq_put8(tile + k, zeros);
  const VqKinds key_kinds = vq_kinds((VQ_SHARED(const uint))lists);
  const VqKinds value_kinds = vq_kinds((VQ_SHARED(const uint))lists + value_list);
  VqColumnSums<MC> running;
  VQ_UNROLL
  for (int e = 0; e < 2; ++e) running.top[e] = VQ_LOWEST, running.sum[e] = 0.0f;
  VQ_UNROLL
  for (int n = 0; n < MC / 16; ++n) {
    VQ_UNROLL
    for (int k = 0; k < 4; ++k) running.output[n][k] = 0.0f;
  }
  VQ_LOOP
  while (i < last_tile) {
    uint weights[2][2];
    VQ_LOOP
    for (int part = 0; part < 2; ++part) {  // keys, then values: a loop, so that the decoder is in the program once
      const VqKinds kinds = vq_either(part, key_kinds, value_kinds);
      // Meanwhile the next words come: of values, or of the next tile's keys.
      if (part == 0) {
        vq_fetch_words(own_words + 3 * at.lane + value_words, t.words + to_values * (uint)t.capacity, value_count,
                       t.capacity, at.lane);
      } else {
        i += WARPS;
        if (i < last_tile) {
          if (t.token + WARPS * VQ_COLUMN_TOKENS < t.tokens) {
            t.words += WARPS * VQ_COLUMN_TOKENS, t.first += WARPS * VQ_COLUMN_TOKENS;
            t.token += WARPS * VQ_COLUMN_TOKENS, t.valid -= WARPS * VQ_COLUMN_TOKENS;
          } else {
            t = vq_find_tile<VQ_COLUMN_TOKENS>(chunks, work.chunks, VQ_CHUNK_NAMES, i, held.packed, work.total_words, at.batch);
            vq_know_tile(t, first_word, at.lane);
          }
          vq_fetch_words(own_words + 3 * at.lane, t.words, key_count, t.capacity, at.lane);
        }
      }
      vq_stage_nothing();
      vq_stage_wait();
      VQ_SYNC_WARP();
      VQ_SHARED(const uint) list = (VQ_SHARED(const uint))lists + (part ? value_list : 0) + VQ_LIST_HEADER;
      VQ_SHARED(const uint) words = staged + (part ? value_words : 0);
      vq_put_levels(kinds, list, own_words + (part ? value_words : 0), lookup, own_row);
      VQ_SYNC_WARP();
      const int rings = kinds.whole & 255;
      words += (kinds.whole >> 8 & 255) * VQ_COLUMN_TOKENS;
      if (part == 0) {
        float s[2][4];
        vq_score_tokens<MC, ROW>(s, folded, tile, key_entry[4], at.lane);
        vq_score_rings<MC>(s, folded, words, rings, lookup, at.lane);
        vq_hide_tokens(s, t, held, masked, params, hidden, added, at);
        vq_soften_tokens<MC>(s, running);
        vq_turn_weights(weights, s);
      } else {
        vq_add_tokens<MC, ROW>(running.output, weights, tile, value_entry[4], at.lane);
        vq_add_rings<MC>(running.output, weights, words, rings, lookup, at.lane);
      }
      VQ_SYNC_WARP();
    }
  }
  vq_gather_columns<MC, WARPS>(running, shared, base, sums, outputs, warps, at);
}

// One thread group: y head (of packed tokens, whose turn it is) and batch row, z eight queries of a group of query heads.
// x: each takes a split of packed tokens, and the last few before it the splits of exact tokens, which are short, in turn.
template <typename T, int DK, int DV, int MC, int ROW, int WARPS>
VQ_FN void vq_attend_columns(VQ_IN(T) q, VQ_IN(T) keys, VQ_IN(T) values, VQ_CHUNK_ARGUMENTS, VQ_IN(int) rows,
                             VQ_IN(uint) fold, VQ_IN(float) mean, VQ_IN(int) table, VQ_IN(int) lookup,
                             VQ_IN(int) params, VQ_IN(float) scale, VQ_IN(unsigned char) hidden, VQ_IN(float) added,
                             VQ_OUT(float) sums, VQ_OUT(float) outputs, VQ_SHARED(float) shared, int x, int y, int z,
                             int worker) {
  VqPlace at = vq_place<VQ_QUERIES>(params, x, y, z, worker);
  const VqWork work = vq_work(params, table, at.head, at.heads, worker);
  at.lane = vq_held_lane(at.lane), at.warp = vq_uniform(at.warp);
  const VqRows held = vq_rows(rows, at.batch);
  if (x >= work.alone) {
    VQ_LOOP
    for (at.split = x - work.alone; at.split < work.exact; at.split += params[VQ_EXACT_GROUPS]) {
      vq_attend_exact<T, DK, DV, VQ_QUERIES>(q, keys, values, held, params, table[VQ_OUTPUT_WIDTH], scale[0], hidden,
                                             added, sums, outputs, shared, at, WARPS * 32);
    }
    if (x >= work.packed) return;
    VQ_SYNC_GROUP();
  }
  at.split = work.exact + x;
  vq_attend_columns_packed<T, DK, MC, ROW, WARPS>(q, VQ_CHUNK_NAMES, held, fold, mean, table, lookup, params, scale[0],
                                                  hidden, added, sums, outputs, shared, work, at);
}
