// From packed words to levels in half precision, a token a row: the levels of a ring lie side by side in the token's
// row of a tile [tokens, columns]. A warp takes one ring of all tokens, or eight codes alone: that is a task, whose numbers
// columns.py has worked out. For compilers with a byte permutation (CUDA, and the host's): it looks up four indices at
// once.

enum {
  VQ_ALONE = 32,       // in `lookup`, 32-bit words: levels of codes alone; before them four words for each width of rings
  VQ_LOOKUP = 288,
  VQ_LANE_TOKENS = 4,  // neighbours, of a word that a lane turns
  VQ_COLUMN_TOKENS = 32 * VQ_LANE_TOKENS,
  VQ_HALF_RING = 16,
};

// what: width of the ring, with VQ_HALF_RING where half of its columns suffice, or 0 for codes alone; from bit 8 on the
// word. columns: first of eight or more, and from bit 16 on of a pair.
// shifts: of a ring, bits: shift | (bits - width) << 8 | (bits - 2 width) << 16 of all its bits, and `mask` of these.
// Codes alone are told of by the next four numbers, 16 bits each: word | turn << 6 | width << 11.
struct VqTask {
  uint what, columns, shifts, mask;
};

VQ_FN VqTask vq_task(VQ_SHARED(const uint) at) {
  uint x[4];
  vq_load4_shared(x, at);
  const VqTask task = {x[0], x[1], x[2], x[3]};
  return task;
}

// The codes of a ring, each with its neighbours' bits: indices of W + 1 bits. That of an even slot s stands at bit
// s W + RAISE, that of the odd slot s + 1 there in `odd`. to_one, to_two: bits of the ring less W, and less 2 W.
template <int W, int RAISE>
VQ_FN void vq_indices(uint f, uint to_one, uint to_two, VQ_THREAD uint& even, VQ_THREAD uint& odd) {
  const uint one = f << W | f >> to_one, two = f << 2 * W | f >> to_two;
  const uint turned = f ^ (two & VqFields<W>::low);
  const uint lows = VqFields<W>::even << RAISE, codes = VqFields<W>::even * VqFields<W>::mask << (1 + RAISE);
  even = (turned << (1 + RAISE) & codes) | (one << RAISE & lows);
  odd = (turned >> (W - 1 - RAISE) & codes) | (one >> (W - RAISE) & lows);
}

// The levels of the indices in the low four nibbles, in two pairs. book: low bytes of eight levels, then high ones.
VQ_FN void vq_four(VQ_THREAD const uint (&book)[4], uint nibbles, VQ_THREAD uint& a, VQ_THREAD uint& b) {
  const uint low = vq_permute(book[0], book[1], nibbles), high = vq_permute(book[2], book[3], nibbles);
  a = vq_permute(low, high, 0x5140), b = vq_permute(low, high, 0x7362);
}

// Half-precision numbers as bits: 2 / 2^(bits + raise), and -(2 ^ (11 - bits - raise) + 1 - 1 / 2^bits).
#define VQ_SCALE_BITS(bits, raise) ((uint)(16 - (bits) - (raise)) << 10)
#define VQ_OFFSET_BITS(bits, raise) \
  (0x8000u | (uint)(26 - (bits) - (raise)) << 10 | ((1u << ((bits) + (raise) - 1)) - (1u << ((raise) - 1))))

// The level of the index of BITS bits at bit LOW of x, and of the one at bit 16 + HIGH: the index stands in the
// mantissa of 1024, so no integer is converted, and the polynomial is that of trellis.py. LOW, HIGH: 1 .. 10 - BITS.
template <int BITS, int LOW, int HIGH>
VQ_FN uint vq_two(uint x, VQ_THREAD const uint (&book)[4]) {
  const vq_half2 c[3] = {vq_as_half2(book[0]), vq_as_half2(book[1]), vq_as_half2(book[2])};
  const uint mask = ((1u << BITS) - 1u) << LOW | ((1u << BITS) - 1u) << (16 + HIGH);
  const vq_half2 t = vq_fma(vq_as_half2((x & mask) | 0x64006400u),
                            vq_as_half2(VQ_SCALE_BITS(BITS, LOW) | VQ_SCALE_BITS(BITS, HIGH) << 16),
                            vq_as_half2(VQ_OFFSET_BITS(BITS, LOW) | VQ_OFFSET_BITS(BITS, HIGH) << 16));
  return vq_bits(vq_polynomial<3>(t, c));
}

// The levels of a ring of width W, of one token -> its row. f: the ring's bits.
template <int W>
struct VqRing;

// An index is a window of three bits, those of the code and of the two before it: no bit is moved to another.
template <>
struct VqRing<1> {
  template <bool HALF>
  VQ_FN void put(uint f, uint, uint to_two, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    const uint from_two = f << 2 | f >> to_two, above = f >> 30;
    VQ_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint first = vq_funnel(from_two, above, i) & 0x77777777u;
      const uint second = vq_funnel(from_two, above, i + 1) & 0x77777777u;
      uint r[4];
      vq_four(book, first, r[0], r[1]), vq_four(book, second, r[2], r[3]);
      vq_put8(at + 4 * i, r);
      if (HALF) continue;
      vq_four(book, first >> 16, r[0], r[1]), vq_four(book, second >> 16, r[2], r[3]);
      vq_put8(at + 16 + 4 * i, r);
    }
  }
};

template <>
struct VqRing<2> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd, r[4];
    vq_indices<2, 0>(f, to_one, to_two, even, odd);
    vq_four(book, even, r[0], r[1]), vq_four(book, odd, r[2], r[3]);
    vq_put8(at, r);
    if (HALF) return;
    vq_four(book, even >> 16, r[0], r[1]), vq_four(book, odd >> 16, r[2], r[3]);
    vq_put8(at + 8, r);
  }
};

template <>
struct VqRing<3> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at,
                 VQ_SHARED(vq_half) tail) {
    uint even, odd;
    vq_indices<3, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<4, 1, 3>(even, book), vq_two<4, 1, 3>(even >> 6, book),
                       vq_two<4, 1, 3>(odd, book), vq_two<4, 1, 3>(odd >> 6, book)};
    vq_put8(at, r);
    if (!HALF) vq_put2(tail, vq_two<4, 1, 1>((even >> 12 & 0xffffu) | odd >> 12 << 16, book));
  }
};

template <>
struct VqRing<4> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<4, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<5, 1, 1>(even, book), vq_two<5, 1, 1>(even >> 8, book),
                       vq_two<5, 1, 1>(odd, book), vq_two<5, 1, 1>(odd >> 8, book)};
    vq_put8(at, r);
  }
};

template <>
struct VqRing<5> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<5, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<6, 1, 1>((even & 0xffffu) | even >> 20 << 16, book),
                       vq_two<6, 1, 1>((odd & 0xffffu) | odd >> 20 << 16, book),
                       vq_two<6, 1, 1>((even >> 10 & 0xffffu) | odd >> 10 << 16, book), 0u};
    vq_put8(at, r);
  }
};

// A ring of this lane's tokens, into their rows of a tile: `row` is the first, the others are 32 rows apart. staged: words,
// from this lane's first token on.
template <int W, bool HALF, int STRIDE>
VQ_FN void vq_put_ring(VQ_THREAD const VqTask& p, VQ_SHARED(const uint) staged, VQ_SHARED(const uint) lookup,
                       VQ_SHARED(vq_half) row) {
  uint book[4];
  vq_load4_shared(book, lookup + 4 * (W - 1));
  VQ_SHARED(const uint) words = staged + (p.what >> 8) * VQ_COLUMN_TOKENS;
  VQ_SHARED(vq_half) at = row + (p.columns & 0xffff);
  VQ_SHARED(vq_half) tail = row + (p.columns >> 16);
  const uint shift = p.shifts & 255, to_one = p.shifts >> 8 & 255, to_two = p.shifts >> 16;
  VQ_LOOP  // or so much would be kept in registers that some is spilled
  for (int i = 0; i < VQ_LANE_TOKENS; i += 2) {
    uint x[2];
    vq_load2(words + i, x[0], x[1]);
    VQ_UNROLL
    for (int r = 0; r < 2; ++r)
      VqRing<W>::template put<HALF>(x[r] >> shift & p.mask, to_one, to_two, book, at + r * 32 * STRIDE,
                                    tail + r * 32 * STRIDE);
    at += 64 * STRIDE, tail += 64 * STRIDE;
  }
}

// Eight codes alone. Levels of codes of n bits begin at byte 2^(n + 1).
template <int STRIDE>
VQ_FN void vq_put_alone(VQ_THREAD const VqTask& p, VQ_SHARED(const uint) told, VQ_SHARED(const uint) staged,
                        VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  uint codes[4], r[VQ_LANE_TOKENS][4];
  vq_load4_shared(codes, told);
  VQ_SHARED(const char) levels = (VQ_SHARED(const char))(lookup + VQ_ALONE);
  VQ_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint code = codes[i / 2] >> i % 2 * 16, turn = code >> 6 & 31, first = 2u << (code >> 11 & 15);
    uint x[VQ_LANE_TOKENS];
    vq_load4_shared(x, staged + (code & 63) * VQ_COLUMN_TOKENS);
    VQ_UNROLL
    for (int t = 0; t < VQ_LANE_TOKENS; ++t) {
      const uint level =
          *(VQ_SHARED(const unsigned short))(levels + ((vq_funnel(x[t], x[t], turn) & (first - 2)) | first));
      r[t][i / 2] = i % 2 ? r[t][i / 2] | level << 16 : level;
    }
  }
  VQ_UNROLL
  for (int t = 0; t < VQ_LANE_TOKENS; ++t) vq_put8(row + (p.columns & 0xffff) + t * 32 * STRIDE, r[t]);
}

// The task at `told`; where the next one is.
template <int STRIDE>
VQ_FN VQ_SHARED(const uint) vq_put_task(VQ_SHARED(const uint) told, VQ_SHARED(const uint) staged,
                                        VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  const VqTask p = vq_task(told);
  told += 4;
  switch (p.what & 255) {
    case 0: vq_put_alone<STRIDE>(p, told, staged, lookup, row); return told + 4;
    case 1: vq_put_ring<1, false, STRIDE>(p, staged, lookup, row); break;
    case 2: vq_put_ring<2, false, STRIDE>(p, staged, lookup, row); break;
    case 3: vq_put_ring<3, false, STRIDE>(p, staged, lookup, row); break;
    case 4: vq_put_ring<4, false, STRIDE>(p, staged, lookup, row); break;
    case 5: vq_put_ring<5, false, STRIDE>(p, staged, lookup, row); break;
    case VQ_HALF_RING + 1: vq_put_ring<1, true, STRIDE>(p, staged, lookup, row); break;
    case VQ_HALF_RING + 2: vq_put_ring<2, true, STRIDE>(p, staged, lookup, row); break;
    case VQ_HALF_RING + 3: vq_put_ring<3, true, STRIDE>(p, staged, lookup, row); break;
  }
  return told;
}
