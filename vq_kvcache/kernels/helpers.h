// From packed words to levels: shared by all kernels and all compilers. See packing.py for the layout and trellis.py
// for rings.

enum {
  // In a layer's table: W, rows of the keys' basis, rows of `unfold`, floats of a split's output, and where the order of a
  // head's outputs begins, 0 when it is that of the coordinates.
  VQ_TOTAL_WORDS = 1, VQ_KEY_ROWS = 2, VQ_VALUE_ROWS = 3, VQ_OUTPUT_WIDTH = 4, VQ_VALUE_ORDER = 5,
  VQ_HEAD_TABLE = 16,  // where its heads begin: of keys, then of values
  VQ_HEAD_INTS = 6,    // first piece, pieces, stored coordinates, first word, words, 0
  VQ_PIECE_INTS = 8,
  VQ_COEFFICIENTS = 8,  // floats kept for each polynomial
  VQ_LEVELS = 2 * 9 * VQ_COEFFICIENTS,
  VQ_MOST_PIECES = 32,  // of a head's keys, or values
  VQ_BOOK = VQ_LEVELS + VQ_MOST_PIECES * VQ_PIECE_INTS,  // 32-bit words of VqBook's memory
};

// A run of codes of one width in each of `words` words: a segment of packing.py.
struct VqPiece {
  int width, ring, shift, slots, words, first_word, first;
};

// The polynomials and a head's pieces, copied to shared memory: tiles ask for them again and again.
struct VqBook {
  VQ_SHARED(const float) levels;
  VQ_SHARED(const int) pieces;
  int count;
};

VQ_FN VqBook vq_open(VQ_IN(int) table, int entry, VQ_IN(float) levels, VQ_SHARED(float) space, int worker,
                     int threads) {
  const int first = table[entry], count = table[entry + 1];
  VQ_SHARED(int) pieces = (VQ_SHARED(int))(space + VQ_LEVELS);
  for (int i = worker; i < VQ_LEVELS; i += threads) space[i] = levels[i];
  for (int i = worker; i < count * VQ_PIECE_INTS; i += threads) pieces[i] = table[first + i];
  const VqBook book = {space, pieces, count};
  return book;
}

VQ_FN VqPiece vq_piece(VQ_SHARED(const int) at) {
  VqPiece p;
  p.width = at[0], p.ring = at[1], p.shift = at[2], p.slots = at[3], p.words = at[4], p.first_word = at[5], p.first = at[6];
  return p;
}

// One bit at the start of each W-bit field; of the even fields alone.
template <int W>
struct VqFields {
  enum : uint {
    low = W == 1 ? 0xffffffffu : W == 2 ? 0x55555555u : W == 3 ? 0x09249249u : W == 4 ? 0x11111111u : 0x02108421u,
    even = W == 1 ? 0x55555555u : W == 2 ? 0x11111111u : W == 3 ? 0x01041041u : W == 4 ? 0x01010101u : 0x00100401u,
    mask = (1u << W) - 1u,
  };
};

// The codes of a ring, each with its neighbours' bits: indices of W + 1 bits, those of even slots s at bit s * W, those
// of odd ones at bit s * W - 1.
template <int W>
VQ_FN void vq_turn(uint x, int slots, VQ_THREAD uint& even, VQ_THREAD uint& odd) {
  const int whole = W * slots;
  const uint f = x & (0xffffffffu >> (32 - whole));
  const uint one = f << W | f >> (whole - W), two = f << 2 * W | f >> (whole - 2 * W);
  const uint turned = f ^ (two & VqFields<W>::low);
  const uint even_low = VqFields<W>::even, odd_low = VqFields<W>::low & ~even_low;
  even = (turned << 1 & even_low * VqFields<W>::mask << 1) | (one & even_low);
  odd = (turned & odd_low * VqFields<W>::mask) | (one & odd_low) >> 1;
}

// Level of t: c0 t + c1 t^3 + ..., N terms.
template <int N, typename C>
VQ_FN float vq_polynomial(float t, C c) {
  const float square = t * t;
  float r = c[N - 1];
  VQ_UNROLL
  for (int i = N - 2; i >= 0; --i) r = vq_fma(r, square, c[i]);
  return r * t;
}
template <int N>
VQ_FN vq_half2 vq_polynomial(vq_half2 t, VQ_THREAD const vq_half2* c) {
  const vq_half2 square = vq_mul(t, t);
  vq_half2 r = c[N - 1];
  VQ_UNROLL
  for (int i = N - 2; i >= 0; --i) r = vq_fma(r, square, c[i]);
  return vq_mul(r, t);
}

// The index j of `bits` bits from bit `pos` on, of a and of b -> t = (2 j + 1) / 2^bits - 1, exact in half precision.
// The index is put into the mantissa of 1024, so no integer is converted. `bits` and `pos` are constants when inlined.
VQ_FN vq_half2 vq_centred(uint a, uint b, int bits, int pos) {
  const int byte = pos / 8 < 2 ? pos / 8 : 2, offset = pos - 8 * byte;
  const int k = offset + bits > 10 ? 0 : offset;
  const uint mask = ((1u << bits) - 1u) << k;
  uint x = vq_pair(a, b, byte);
  if (k != offset) x >>= offset;
  const vq_half2 h = vq_as_half2((x & (mask | mask << 16)) | 0x64006400u);
  const float scale = 2.0f / (1 << (bits + k));
  // Half of an odd number is no half-precision number beyond 1024, unless the index stands a bit higher.
  if (k == 0) return vq_fma(vq_sub(h, vq_splat(1024.0f + (1 << (bits - 1)))), vq_splat(scale), vq_splat(scale / 2));
  return vq_fma(h, vq_splat(scale), vq_splat(-(1024.0f + 0.5f * mask) * scale));
}

// Terms of the polynomial of each width, in rings (trellis.py) and alone (codebook.py).
template <int W, bool RING>
struct VqTerms {
  enum { count = RING ? (W < 3 ? 2 : 3) : (W == 1 ? 1 : W < 4 ? 2 : W == 4 ? 3 : W == 5 ? 4 : W == 6 ? 5 : 6) };
};

// Where levels of two neighbouring tokens go: half of them at a time, or float32.
VQ_FN void vq_put(VQ_SHARED(vq_half) at, vq_half2 pair) { *(VQ_SHARED(vq_half2))at = pair; }
VQ_FN void vq_put(VQ_SHARED(float) at, float a, float b) { at[0] = a, at[1] = b; }

// Levels of one code of each of two tokens are two halves, or, where all is float32, these.
struct VqFloats {
  float a, b;
};
template <bool WIDE>
struct VqKind {};

// A tile [dims, tokens] that levels are written to: rows first .. first + rows - 1, or all when PASSES is 1.
template <typename P, bool WIDE, int PASSES>
struct VqTarget {
  typedef P Place;
  typedef VqKind<WIDE> Kind;
  enum { passes = PASSES };
  P at;
  int stride, first, rows;
};
template <typename P, int PASSES>
VQ_FN void vq_take(VQ_THREAD VqTarget<P, false, PASSES>&, P at, vq_half2 levels) { vq_put(at, levels); }
template <typename P, int PASSES>
VQ_FN void vq_take(VQ_THREAD VqTarget<P, true, PASSES>&, P at, VqFloats levels) { vq_put(at, levels.a, levels.b); }

// Levels of the code at bit `pos` of a, and of b. h: the polynomial in half precision.
template <int W, bool RING>
VQ_FN vq_half2 vq_level_pair(uint a, uint b, int pos, VQ_SHARED(const float) c, VQ_THREAD const vq_half2* h, VqKind<false>) {
  const vq_half2 t = vq_centred(a, b, RING ? W + 1 : W, pos);
  if (W < 5 || RING) return vq_polynomial<VqTerms<W, RING>::count>(t, h);
  // The long polynomials of wide codes cancel too much for half precision.
  return vq_pack(vq_polynomial<VqTerms<W, RING>::count>(vq_low(t), c), vq_polynomial<VqTerms<W, RING>::count>(vq_high(t), c));
}
template <int W, bool RING>
VQ_FN VqFloats vq_level_pair(uint a, uint b, int pos, VQ_SHARED(const float) c, VQ_THREAD const vq_half2*, VqKind<true>) {
  const int bits = RING ? W + 1 : W;
  const uint mask = (1u << bits) - 1u;
  const float scale = 2.0f / (1 << bits), offset = scale / 2 - 1.0f;
  const VqFloats levels = {
      vq_polynomial<VqTerms<W, RING>::count>(vq_fma((float)(a >> pos & mask), scale, offset), c),
      vq_polynomial<VqTerms<W, RING>::count>(vq_fma((float)(b >> pos & mask), scale, offset), c)};
  return levels;
}

// One word of each of two neighbouring tokens -> their levels, to rows row, row + step, ... FULL: as many slots as the
// word holds, so all positions are constants; else a short loop, which keeps the program small.
template <int W, bool RING, bool FULL, typename To>
VQ_FN void vq_word(uint a, uint b, int slots, VQ_SHARED(const float) c, VQ_THREAD const vq_half2* h,
                   VQ_THREAD To& to, int row, int step) {
  uint ea = a, eb = b, oa = a >> W, ob = b >> W;
  if (RING) vq_turn<W>(a, slots, ea, oa), vq_turn<W>(b, slots, eb, ob);
  const int odd = RING ? W - 1 : 0;  // where odd codes begin
  typename To::Place at = to.at + (row - to.first) * to.stride;
  const typename To::Kind kind = {};
  const int next = step * to.stride;
  if (FULL) {
    VQ_UNROLL
    for (int s = 0; s < 32 / W; ++s) {
      if (To::passes == 1 || (row >= to.first && row < to.first + to.rows))
        vq_take(to, at,
                vq_level_pair<W, RING>(s % 2 ? oa : ea, s % 2 ? ob : eb, s / 2 * 2 * W + (s % 2 ? odd : 0), c, h, kind));
      at += next;
      if (To::passes > 1) row += step;
    }
  } else {
    VQ_LOOP
    for (int s = 0; s < slots; s += 2) {
      if (To::passes == 1 || (row >= to.first && row < to.first + to.rows))
        vq_take(to, at, vq_level_pair<W, RING>(ea, eb, 0, c, h, kind));
      if (s + 1 < slots && (To::passes == 1 || (row + step >= to.first && row + step < to.first + to.rows)))
        vq_take(to, at + next, vq_level_pair<W, RING>(oa, ob, odd, c, h, kind));
      ea = ea >> 2 * W, eb = eb >> 2 * W, oa = oa >> 2 * W, ob = ob >> 2 * W;
      at += 2 * next;
      if (To::passes > 1) row += 2 * step;
    }
  }
}

// The words of a piece, of this lane's two tokens (the first is even, so that both are one load). words: rows of
// `stride`, from the first token on. `held`: whether they exist.
template <int W, bool RING, bool FULL, typename Q, typename To>
VQ_FN void vq_decode_words(VQ_THREAD const VqPiece& p, Q words, int stride, bool held, VQ_SHARED(const float) levels,
                           VQ_THREAD To& to) {
  VQ_SHARED(const float) c = levels + ((RING ? 9 : 0) + W) * VQ_COEFFICIENTS;
  vq_half2 h[3];
  VQ_UNROLL
  for (int i = 0; i < 3; ++i) h[i] = vq_splat(c[i]);
  words += p.first_word * stride;
  uint a = 0, b = 0, next_a = 0, next_b = 0;
  if (held) vq_load2(words, a, b);
  VQ_LOOP
  for (int w = 0; w < p.words; ++w) {
    words += stride;
    if (held && w + 1 < p.words) vq_load2(words, next_a, next_b);
    vq_word<W, RING, FULL>(a >> p.shift, b >> p.shift, p.slots, c, h, to, p.first + w, p.words);
    a = next_a, b = next_b;
  }
}

template <int W, typename Q, typename To>
VQ_FN void vq_decode_rings(VQ_THREAD const VqPiece& p, Q words, int stride, bool held,
                           VQ_SHARED(const float) levels, VQ_THREAD To& to) {
  if (p.slots == 32 / W) {
    vq_decode_words<W, true, true>(p, words, stride, held, levels, to);
  } else {
    vq_decode_words<W, true, false>(p, words, stride, held, levels, to);
  }
}

// All pieces of a head into a tile, or what else takes levels. words: of this batch row, from its first word and this lane's
// first token on.
template <typename Q, typename To>
VQ_FN void vq_decode_tile(VQ_THREAD const VqBook& book, Q words, int stride, bool held, VQ_THREAD To& to) {
  VQ_SHARED(const float) levels = book.levels;
  VQ_LOOP
  for (int i = 0; i < book.count; ++i) {
    const VqPiece p = vq_piece(book.pieces + i * VQ_PIECE_INTS);
    if (To::passes > 1 && (p.first >= to.first + to.rows || p.first + p.slots * p.words <= to.first)) continue;
    switch (p.width + (p.ring ? 16 : 0)) {
      case 1: vq_decode_words<1, false, false>(p, words, stride, held, levels, to); break;
      case 2: vq_decode_words<2, false, false>(p, words, stride, held, levels, to); break;
      case 3: vq_decode_words<3, false, false>(p, words, stride, held, levels, to); break;
      case 4: vq_decode_words<4, false, false>(p, words, stride, held, levels, to); break;
      case 5: vq_decode_words<5, false, false>(p, words, stride, held, levels, to); break;
      case 6: vq_decode_words<6, false, false>(p, words, stride, held, levels, to); break;
      case 7: vq_decode_words<7, false, false>(p, words, stride, held, levels, to); break;
      case 8: vq_decode_words<8, false, false>(p, words, stride, held, levels, to); break;
      case 17: vq_decode_rings<1>(p, words, stride, held, levels, to); break;
      case 18: vq_decode_rings<2>(p, words, stride, held, levels, to); break;
      case 19: vq_decode_rings<3>(p, words, stride, held, levels, to); break;
      case 20: vq_decode_rings<4>(p, words, stride, held, levels, to); break;
      case 21: vq_decode_rings<5>(p, words, stride, held, levels, to); break;
    }
  }
}

#define VQ_CHUNK_ARGUMENTS \
  VQ_IN(uint) w0, VQ_IN(uint) w1, VQ_IN(uint) w2, VQ_IN(uint) w3, VQ_IN(uint) w4, VQ_IN(uint) w5, VQ_IN(uint) w6, \
      VQ_IN(uint) w7
#define VQ_CHUNK_NAMES w0, w1, w2, w3, w4, w5, w6, w7

// Where a tile of packed tokens of one batch row lies, and how many of them the row holds.
struct VqTile {
  VQ_IN(uint) words;
  int capacity, tokens, first, token, valid;
};

// `chunks`: tokens and capacity of each chunk. total_words: of keys and values of all heads.
template <int TOKENS>
VQ_FN VqTile vq_find_tile(VQ_SHARED(const int) chunks, int count, VQ_CHUNK_ARGUMENTS, int tile, int packed, int total_words,
                          int batch) {
  VqTile t;
  int chunk = 0, first = 0;
  for (; chunk < count - 1; ++chunk) {
    const int tokens = chunks[2 * chunk], tiles = (tokens + TOKENS - 1) / TOKENS;
    if (tile < tiles) break;
    tile -= tiles, first += tokens;
  }
  const int tokens = chunks[2 * chunk], token = tile * TOKENS;
  const int until = packed - first < tokens ? packed - first : tokens;
  VQ_IN(uint) words = chunk < 4 ? (chunk < 2 ? (chunk ? w1 : w0) : (chunk == 2 ? w2 : w3))
                                : (chunk < 6 ? (chunk == 4 ? w4 : w5) : (chunk == 6 ? w6 : w7));
  t.capacity = chunks[2 * chunk + 1];
  t.words = words + (size_t)batch * total_words * t.capacity + token;
  t.tokens = tokens, t.token = token, t.first = first + token, t.valid = until - token;
  return t;
}
