// From packed words to levels in half precision, a token a row: a lane turns the words of one token, and the levels of a
// ring, or of eight codes alone, lie side by side in the token's row of a tile [tokens, columns]. Each of these is a task,
// whose numbers columns.py has worked out. Rings that fill a word need none: those of 2 bits are worked off one after
// another, those of 1 bit in columns.h. For compilers with a byte permutation (CUDA, and the host's): it looks up four
// indices at once.

enum {
  VQ_ALONE = 40,  // in `lookup`, 32-bit words: levels of codes alone; before them eight words for each width of rings
  VQ_LOOKUP = 296,
  VQ_COLUMN_TOKENS = 32,  // of a warp
  // A head's list: how many tasks of each kind, a byte each (eight codes alone, rings of 1 to 5 bits, and those of 1 and 2
  // bits of which half of the columns suffice); the first columns of codes alone and, 16 bits up, of what rings of ten
  // leave; how many rings of 1 bit fill a word, the first of these, how many of 2 bits do, and the first of those, a byte
  // each; then the tasks, in that order, and four zeros.
  VQ_LIST_HEADER = 4,
};

// The beginning of a head's list.
struct VqKinds {
  uint counts[2], first, whole;
};

VQ_FN VqKinds vq_kinds(VQ_SHARED(const uint) list) {
  const VqKinds k = {{vq_uniform(list[0]), vq_uniform(list[1])}, vq_uniform(list[2]), vq_uniform(list[3])};
  return k;
}

// A code or a ring begins with `word`: bytes from the first of a lane's words to its own, and in the low five bits by how
// much that is to be turned. A ring goes on with its bits less its width, their mask, and the bits less two widths.
struct VqTask {
  uint word, to_one, mask, to_two;
};

// Tasks from `told` on; of the next one what is told, and its word, are read while one is worked on.
struct VqTasks {
  VQ_SHARED(const uint) told;
  VQ_SHARED(const char) words;  // of this lane's token
  VqTask next;
  uint x;
};

VQ_FN uint vq_word_of(VQ_SHARED(const char) words, uint told) { return *(VQ_SHARED(const uint))(words + (told >> 5)); }

VQ_FN void vq_next(VQ_THREAD VqTasks& tasks) {
  uint x[4];
  vq_load4_shared(x, tasks.told);
  tasks.next.word = x[0], tasks.next.to_one = x[1], tasks.next.mask = x[2], tasks.next.to_two = x[3];
  tasks.x = vq_word_of(tasks.words, x[0]);
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

// Those of the low four nibbles of two words, as a group of eight columns.
VQ_FN void vq_put_nibbles(uint even, uint odd, VQ_THREAD const uint (&book)[4], VQ_SHARED(vq_half) at) {
  uint r[4];
  vq_four(book, even, r[0], r[1]), vq_four(book, odd, r[2], r[3]);
  vq_put8(at, r);
}

// A half-precision number as bits: -(2 ^ (11 - bits - raise) + 1 - 1 / 2^bits).
#define VQ_OFFSET_BITS(bits, raise) \
  (0x8000u | (uint)(26 - (bits) - (raise)) << 10 | ((1u << ((bits) + (raise) - 1)) - (1u << ((raise) - 1))))

// What `lookup` tells of a width: bytes of levels; or coefficients and 1024, each twice, and in `scales` what indices are
// multiplied by. It is read from memory: what the compiler knows it puts into a register anew each time.
struct VqRingBook {
  uint own[4], scales[4];
};

VQ_FN VqRingBook vq_ring_book(VQ_SHARED(const uint) lookup, int width) {
  VqRingBook book;
  vq_load4_shared(book.own, lookup + 8 * (width - 1)), vq_load4_shared(book.scales, lookup + 8 * (width - 1) + 4);
  return book;
}

// The level of the index of BITS bits at bit LOW of x, and of the one at bit 16 + HIGH: the index stands in the
// mantissa of 1024, so no integer is converted, and the polynomial is that of trellis.py. LOW, HIGH: 1 .. 10 - BITS.
// scale: 2 / 2^(BITS + LOW) and 2 / 2^(BITS + HIGH).
template <int BITS, int LOW, int HIGH>
VQ_FN uint vq_two(uint x, VQ_THREAD const VqRingBook& book, uint scale) {
  const vq_half2 c[3] = {vq_as_half2(book.own[0]), vq_as_half2(book.own[1]), vq_as_half2(book.own[2])};
  const uint mask = ((1u << BITS) - 1u) << LOW | ((1u << BITS) - 1u) << (16 + HIGH);
  const vq_half2 t = vq_fma(vq_as_half2((x & mask) | book.own[3]), vq_as_half2(scale),
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
  VQ_FN void put(uint f, uint, uint to_two, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    const uint from_two = f << 2 | f >> to_two, above = f >> 30;
    VQ_UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint first = vq_funnel(from_two, above, i) & 0x77777777u;
      const uint second = vq_funnel(from_two, above, i + 1) & 0x77777777u;
      uint r[4];
      vq_four(book.own, first, r[0], r[1]), vq_four(book.own, second, r[2], r[3]);
      vq_put8(at + 4 * i, r);
      if (HALF) continue;
      vq_four(book.own, first >> 16, r[0], r[1]), vq_four(book.own, second >> 16, r[2], r[3]);
      vq_put8(at + 16 + 4 * i, r);
    }
  }
};

template <>
struct VqRing<2> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<2, 0>(f, to_one, to_two, even, odd);
    vq_put_nibbles(even, odd, book.own, at);
    if (!HALF) vq_put_nibbles(even >> 16, odd >> 16, book.own, at + 8);
  }
};

template <>
struct VqRing<3> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at,
                 VQ_SHARED(vq_half) tail) {
    uint even, odd;
    vq_indices<3, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<4, 1, 3>(even, book, book.scales[0]), vq_two<4, 1, 3>(even >> 6, book, book.scales[0]),
                       vq_two<4, 1, 3>(odd, book, book.scales[0]), vq_two<4, 1, 3>(odd >> 6, book, book.scales[0])};
    vq_put8(at, r);
    vq_put2(tail, vq_two<4, 1, 1>((even >> 12 & 0xffffu) | odd >> 12 << 16, book, book.scales[1]));
  }
};

template <>
struct VqRing<4> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<4, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<5, 1, 1>(even, book, book.scales[1]), vq_two<5, 1, 1>(even >> 8, book, book.scales[1]),
                       vq_two<5, 1, 1>(odd, book, book.scales[1]), vq_two<5, 1, 1>(odd >> 8, book, book.scales[1])};
    vq_put8(at, r);
  }
};

template <>
struct VqRing<5> {
  template <bool HALF>
  VQ_FN void put(uint f, uint to_one, uint to_two, VQ_THREAD const VqRingBook& book, VQ_SHARED(vq_half) at, VQ_SHARED(vq_half)) {
    uint even, odd;
    vq_indices<5, 1>(f, to_one, to_two, even, odd);
    const uint r[4] = {vq_two<6, 1, 1>((even & 0xffffu) | even >> 20 << 16, book, book.scales[1]),
                       vq_two<6, 1, 1>((odd & 0xffffu) | odd >> 20 << 16, book, book.scales[1]),
                       vq_two<6, 1, 1>((even >> 10 & 0xffffu) | odd >> 10 << 16, book, book.scales[1]), 0u};
    vq_put8(at, r);
  }
};

// Rings of 2 bits that fill a word, `count` words one after another.
VQ_FN void vq_put_twos(VQ_SHARED(const uint) words, uint count, VQ_SHARED(const uint) lookup,
                       VQ_THREAD VQ_SHARED(vq_half)& row) {
  if (count == 0) return;
  const uint lows = VqFields<2>::even, codes = 6 * lows;
  const VqRingBook book = vq_ring_book(lookup, 2);
  VQ_LOOP
  do {
    const uint f = *words, one = vq_funnel(f, f, 30), turned = f ^ (vq_funnel(f, f, 28) & VqFields<2>::low);
    const uint even = (turned << 1 & codes) | (one & lows), odd = (turned >> 1 & codes) | (f & lows);
    words += VQ_COLUMN_TOKENS;
    vq_put_nibbles(even, odd, book.own, row), vq_put_nibbles(even >> 16, odd >> 16, book.own, row + 8);
    row += 16;
  } while (--count);
}

// `count` rings of this lane's token, into its row of a tile. COLUMNS: of each; what is left of a ring of ten goes to `tail`.
template <int W, bool HALF, int COLUMNS>
VQ_FN void vq_put_rings(VQ_THREAD VqTasks& tasks, uint count, VQ_SHARED(const uint) lookup,
                        VQ_THREAD VQ_SHARED(vq_half)& row, VQ_THREAD VQ_SHARED(vq_half)& tail) {
  if (count == 0) return;
  const VqRingBook book = vq_ring_book(lookup, W);
  VQ_LOOP
  do {
    const VqTask own = tasks.next;
    const uint f = vq_funnel(tasks.x, tasks.x, own.word) & own.mask;
    tasks.told += 4;
    vq_next(tasks);
    VqRing<W>::template put<HALF>(f, own.to_one, own.to_two, book, row, tail);
    row += COLUMNS;
    if (W == 3) tail += 2;
  } while (--count);
}

// Codes alone, `count` times eight: of each `word`, the mask of its bits, from bit 1 on, and the byte at which levels of its
// width begin, of which those bits are zero.
VQ_FN void vq_put_alone(VQ_THREAD VqTasks& tasks, uint count, VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  VQ_SHARED(const char) levels = (VQ_SHARED(const char))(lookup + VQ_ALONE);
  VQ_LOOP
  for (; count; --count) {
    uint r[4];
    VQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint told[3][4], level[4];
      VQ_UNROLL
      for (int k = 0; k < 3; ++k) vq_load4_shared(told[k], tasks.told + 12 * i + 4 * k);
      VQ_UNROLL
      for (int k = 0; k < 4; ++k) {
        const uint word = told[3 * k / 4][3 * k % 4], x = vq_word_of(tasks.words, word);
        const uint at = (vq_funnel(x, x, word) & told[(3 * k + 1) / 4][(3 * k + 1) % 4]) | told[(3 * k + 2) / 4][(3 * k + 2) % 4];
        level[k] = *(VQ_SHARED(const unsigned short))(levels + at);
      }
      r[2 * i] = level[0] | level[1] << 16, r[2 * i + 1] = level[2] | level[3] << 16;
    }
    vq_put8(row, r);
    tasks.told += 24, row += 8;
  }
}

// Levels of a head, but those of words that are rings of 1 bit, of this lane's token -> its row of a tile. list: behind
// its header, which is `kinds`; words: of that token, VQ_COLUMN_TOKENS apart.
VQ_FN void vq_put_levels(VQ_THREAD const VqKinds& kinds, VQ_SHARED(const uint) list, VQ_SHARED(const uint) words,
                         VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  const uint first = kinds.counts[0], then = kinds.counts[1];
  VQ_SHARED(vq_half) alone = row + (kinds.first & 0xffff);
  VQ_SHARED(vq_half) tail = row + (kinds.first >> 16);  // written after codes alone, whose last eight may leave room
  VqTasks tasks;
  vq_put_twos(words + (kinds.whole >> 24) * VQ_COLUMN_TOKENS, kinds.whole >> 16 & 255, lookup, row);
  tasks.told = list, tasks.words = (VQ_SHARED(const char))words;
  vq_put_alone(tasks, first & 255, lookup, alone);
  vq_next(tasks);
  vq_put_rings<1, false, 32>(tasks, first >> 8 & 255, lookup, row, tail);
  vq_put_rings<2, false, 16>(tasks, first >> 16 & 255, lookup, row, tail);
  vq_put_rings<3, false, 8>(tasks, first >> 24, lookup, row, tail);
  vq_put_rings<4, false, 8>(tasks, then & 255, lookup, row, tail);
  vq_put_rings<5, false, 8>(tasks, then >> 8 & 255, lookup, row, tail);
  vq_put_rings<1, true, 16>(tasks, then >> 16 & 255, lookup, row, tail);
  vq_put_rings<2, true, 8>(tasks, then >> 24, lookup, row, tail);
}

// Of a word that is a ring of 1 bit, the indices (windows of three bits, see VqRing<1>) of codes place, place + 4, ...
VQ_FN uint vq_every_fourth(uint x, int place) { return vq_funnel(x, x, place + 30) & 0x77777777u; }

// Indices of two tokens' codes at bits place, place + 8, ..., in turn.
VQ_FN uint vq_every_eighth(uint x, uint y, int place) {
  return (vq_funnel(x, x, place + 30) & 0x07070707u) | (vq_funnel(y, y, place + 26) & 0x70707070u);
}
