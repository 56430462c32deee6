// From packed words to levels in half precision, a token a row: the levels of a word lie side by side in the token's
// row of a tile [tokens, columns]. A warp takes one word of many tokens, so that all its lanes do the same and what depends
// on the word alone is done once. columns.py says which column is which coordinate. For compilers with a byte
// permutation (CUDA, and the host's): it looks up four small indices at once.

enum {
  VQ_ALONE_LEVELS = 16,  // in `lookup`: levels of codes alone, in halves, width by width; before them tables of rings
  VQ_LOOKUP = 272,       // 32-bit words of `lookup`
  VQ_LANE_TOKENS = 4,    // neighbours, of a word that a lane turns
};

// A ring in a word, and the columns that it fills: eights from `column` on, a pair from `tail` on.
struct VqRun {
  int width, slots, shift, column, tail;
};

VQ_FN VqRun vq_run(VQ_SHARED(const int) at) {
  const int a = at[0], b = at[1];
  const VqRun p = {a & 255, a >> 8 & 255, a >> 16, b & 0xffff, b >> 16};
  return p;
}

// The codes of a ring, each with its neighbours' bits: indices of W + 1 bits. That of an even slot s stands at bit
// s W + RAISE, that of the odd slot s + 1 there in `odd`. FULL: as many slots as a word holds.
template <int W, int RAISE, bool FULL>
VQ_FN void vq_indices(uint x, int slots, VQ_THREAD uint& even, VQ_THREAD uint& odd) {
  const int whole = FULL ? 32 / W * W : W * slots;
  const uint f = whole == 32 ? x : x & (0xffffffffu >> (32 - whole));
  const uint one = f << W | f >> (whole - W), two = f << 2 * W | f >> (whole - 2 * W);
  const uint turned = f ^ (two & VqFields<W>::low);
  const uint lows = VqFields<W>::even << RAISE, codes = VqFields<W>::even * VqFields<W>::mask << (1 + RAISE);
  even = (turned << (1 + RAISE) & codes) | (one << RAISE & lows);
  odd = (turned >> (W - 1 - RAISE) & codes) | (one >> (W - RAISE) & lows);
}

// The levels of an index of at most three bits, in bytes: the low ones of all levels, then the high ones.
struct VqBytes {
  uint low[2], high[2];
};

// The levels of the indices in the low four nibbles, in two pairs.
VQ_FN void vq_four(VQ_THREAD const VqBytes& t, uint nibbles, VQ_THREAD uint& a, VQ_THREAD uint& b) {
  const uint low = vq_permute(t.low[0], t.low[1], nibbles), high = vq_permute(t.high[0], t.high[1], nibbles);
  a = vq_permute(low, high, 0x5140), b = vq_permute(low, high, 0x7362);
}

// Half-precision numbers as bits: 2 / 2^(bits + raise), and -(2 ^ (11 - bits - raise) + 1 - 1 / 2^bits).
#define VQ_SCALE_BITS(bits, raise) ((uint)(16 - (bits) - (raise)) << 10)
#define VQ_OFFSET_BITS(bits, raise) \
  (0x8000u | (uint)(26 - (bits) - (raise)) << 10 | ((1u << ((bits) + (raise) - 1)) - (1u << ((raise) - 1))))

// The level of the index of BITS bits at bit LOW of x, and of the one at bit 16 + HIGH: the index stands in the
// mantissa of 1024, so no integer is converted, and the polynomial is that of trellis.py. LOW, HIGH: 1 .. 10 - BITS.
template <int BITS, int LOW, int HIGH>
VQ_FN uint vq_two(uint x, VQ_THREAD const vq_half2 (&c)[3]) {
  const uint mask = ((1u << BITS) - 1u) << LOW | ((1u << BITS) - 1u) << (16 + HIGH);
  const vq_half2 t = vq_fma(vq_as_half2((x & mask) | 0x64006400u),
                            vq_as_half2(VQ_SCALE_BITS(BITS, LOW) | VQ_SCALE_BITS(BITS, HIGH) << 16),
                            vq_as_half2(VQ_OFFSET_BITS(BITS, LOW) | VQ_OFFSET_BITS(BITS, HIGH) << 16));
  return vq_bits(vq_polynomial<3>(t, c));
}

// What runs of rings of one width look up or compute with.
struct VqRingBook {
  VqBytes bytes;
  vq_half2 c[3];
};

// The levels of one word of one token, which is a ring of width W -> its row.
template <int W>
struct VqRing;

template <>
struct VqRing<1> {
  template <bool FULL>
  VQ_FN void put(uint x, int slots, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<1, 0, FULL>(x, slots, even, odd);
    const uint first = even & 0x33333333u, second = even >> 2 & 0x33333333u;
    const uint third = odd & 0x33333333u, fourth = odd >> 2 & 0x33333333u;
    uint r[4];
    vq_four(book.bytes, first, r[0], r[1]), vq_four(book.bytes, second, r[2], r[3]);
    vq_put8(at, r);
    vq_four(book.bytes, third, r[0], r[1]), vq_four(book.bytes, fourth, r[2], r[3]);
    vq_put8(at + 8, r);
    if (!FULL && slots <= 16) return;
    vq_four(book.bytes, first >> 16, r[0], r[1]), vq_four(book.bytes, second >> 16, r[2], r[3]);
    vq_put8(at + 16, r);
    vq_four(book.bytes, third >> 16, r[0], r[1]), vq_four(book.bytes, fourth >> 16, r[2], r[3]);
    vq_put8(at + 24, r);
  }
};

template <>
struct VqRing<2> {
  template <bool FULL>
  VQ_FN void put(uint x, int slots, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd, r[4];
    vq_indices<2, 0, FULL>(x, slots, even, odd);
    vq_four(book.bytes, even, r[0], r[1]), vq_four(book.bytes, odd, r[2], r[3]);
    vq_put8(at, r);
    if (!FULL && slots <= 8) return;
    vq_four(book.bytes, even >> 16, r[0], r[1]), vq_four(book.bytes, odd >> 16, r[2], r[3]);
    vq_put8(at + 8, r);
  }
};

template <>
struct VqRing<3> {
  template <bool FULL>
  VQ_FN void put(uint x, int slots, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half) tail) {
    uint even, odd;
    vq_indices<3, 1, FULL>(x, slots, even, odd);
    const uint r[4] = {vq_two<4, 1, 3>(even, book.c), vq_two<4, 1, 3>(even >> 6, book.c),
                       vq_two<4, 1, 3>(odd, book.c), vq_two<4, 1, 3>(odd >> 6, book.c)};
    vq_put8(at, r);
    vq_put2(tail, vq_two<4, 1, 1>((even >> 12 & 0xffffu) | odd >> 12 << 16, book.c));
  }
};

template <>
struct VqRing<4> {
  template <bool FULL>
  VQ_FN void put(uint x, int slots, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<4, 1, FULL>(x, slots, even, odd);
    const uint r[4] = {vq_two<5, 1, 1>(even, book.c), vq_two<5, 1, 1>(even >> 8, book.c),
                       vq_two<5, 1, 1>(odd, book.c), vq_two<5, 1, 1>(odd >> 8, book.c)};
    vq_put8(at, r);
  }
};

template <>
struct VqRing<5> {
  template <bool FULL>
  VQ_FN void put(uint x, int slots, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<5, 1, FULL>(x, slots, even, odd);
    const uint r[4] = {vq_two<6, 1, 1>((even & 0xffffu) | even >> 20 << 16, book.c),
                       vq_two<6, 1, 1>((odd & 0xffffu) | odd >> 20 << 16, book.c),
                       vq_two<6, 1, 1>((even >> 10 & 0xffffu) | odd >> 10 << 16, book.c), 0u};
    vq_put8(at, r);
  }
};

// A ring of a word, x of this lane's tokens, into their rows of a tile: `row` is the first, the others are 32 rows
// apart.
template <int W, int STRIDE>
VQ_FN void vq_put_ring(VQ_THREAD const VqRun& p, VQ_THREAD const uint (&x)[VQ_LANE_TOKENS],
                       VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  VqRingBook book;
  VQ_SHARED(const uint) own = lookup + (W == 1 ? 0 : W == 2 ? 2 : 3 * W - 3);
  if (W == 1) book.bytes.low[0] = book.bytes.low[1] = own[0], book.bytes.high[0] = book.bytes.high[1] = own[1];
  if (W == 2) book.bytes.low[0] = own[0], book.bytes.low[1] = own[1];
  if (W == 2) book.bytes.high[0] = own[2], book.bytes.high[1] = own[3];
  if (W > 2) {
    VQ_UNROLL
    for (int i = 0; i < 3; ++i) book.c[i] = vq_as_half2(own[i]);
  }
  VQ_SHARED(vq_half) at = row + p.column;
  VQ_SHARED(vq_half) tail = row + p.tail;
  if (p.slots == 32 / W) {  // loops, or so much would be kept in registers that some is spilled
    VQ_LOOP
    for (int h = 0; h < 2; ++h) {
      VQ_UNROLL
      for (int r = 0; r < 2; ++r)
        VqRing<W>::template put<true>(h ? x[2 + r] : x[r], p.slots, book, at + r * 32 * STRIDE, tail + r * 32 * STRIDE);
      at += 64 * STRIDE, tail += 64 * STRIDE;
    }
  } else {
    VQ_LOOP
    for (int r = 0; r < VQ_LANE_TOKENS; ++r) {
      const uint word = r & 2 ? (r & 1 ? x[3] : x[2]) : (r & 1 ? x[1] : x[0]);
      VqRing<W>::template put<false>(word >> p.shift, p.slots, book, at, tail);
      at += 32 * STRIDE, tail += 32 * STRIDE;
    }
  }
}

// A code alone: `told` is its shift, width and column.
template <int STRIDE>
VQ_FN void vq_put_alone(int told, VQ_THREAD const uint (&x)[VQ_LANE_TOKENS], VQ_SHARED(const uint) lookup,
                        VQ_SHARED(vq_half) row) {
  const int shift = told & 31, width = told >> 8 & 255;
  const uint mask = (1u << width) - 1u;
  VQ_SHARED(const unsigned short) levels = (VQ_SHARED(const unsigned short))(lookup + VQ_ALONE_LEVELS) + mask - 1;
  VQ_SHARED(unsigned short) at = (VQ_SHARED(unsigned short))(row + (told >> 16));
  VQ_UNROLL
  for (int r = 0; r < VQ_LANE_TOKENS; ++r) at[r * 32 * STRIDE] = levels[x[r] >> shift & mask];
}

// All of a word: told[0] its place and rings, told[1] where they begin in `runs`, and how many codes alone follow them.
template <int STRIDE>
VQ_FN void vq_put_word(VQ_SHARED(const int) told, VQ_SHARED(const int) runs, VQ_THREAD const uint (&x)[VQ_LANE_TOKENS],
                       VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  const int rings = told[0] >> 16, alone = told[1] >> 16;
  runs += told[1] & 0xffff;
  VQ_LOOP
  for (int i = 0; i < rings; ++i, runs += 2) {
    const VqRun p = vq_run(runs);
    switch (p.width) {
      case 1: vq_put_ring<1, STRIDE>(p, x, lookup, row); break;
      case 2: vq_put_ring<2, STRIDE>(p, x, lookup, row); break;
      case 3: vq_put_ring<3, STRIDE>(p, x, lookup, row); break;
      case 4: vq_put_ring<4, STRIDE>(p, x, lookup, row); break;
      case 5: vq_put_ring<5, STRIDE>(p, x, lookup, row); break;
    }
  }
  VQ_LOOP
  for (int i = 0; i < alone; ++i) vq_put_alone<STRIDE>(runs[i], x, lookup, row);
}
