// From packed words to levels in half precision, a token a row: a lane turns the words of one token, and the levels of a
// ring, or of eight codes alone, lie side by side in the token's row of a tile [tokens, columns]. Each of these is a task,
// whose numbers columns.py has worked out; rings of 1 bit that fill a word are none (columns.h). For compilers with a byte
// permutation (CUDA, and the host's): it looks up four indices at once.

enum {
  VQ_ALONE = 32,  // in `lookup`, 32-bit words: levels of codes alone; before them four words for each width of rings
  VQ_LOOKUP = 288,
  VQ_COLUMN_TOKENS = 32,  // of a warp
  // A head's list: how many tasks of each kind, a byte each (eight codes alone, rings of 1 to 5 bits, and those of 1 and 2
  // bits of which half of the columns suffice); the first columns of codes alone and, 16 bits up, of what rings of ten
  // leave; how many rings of 1 bit fill a word and, 16 bits up, the first of these; then the tasks, in that order, and four
  // zeros.
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
    vq_put2(tail, vq_two<4, 1, 1>((even >> 12 & 0xffffu) | odd >> 12 << 16, book));
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

// `count` rings of this lane's token, into its row of a tile. COLUMNS: of each; what is left of a ring of ten goes to `tail`.
template <int W, bool HALF, int COLUMNS>
VQ_FN void vq_put_rings(VQ_THREAD VqTasks& tasks, uint count, VQ_SHARED(const uint) lookup,
                        VQ_THREAD VQ_SHARED(vq_half)& row, VQ_THREAD VQ_SHARED(vq_half)& tail) {
  if (count == 0) return;
  uint book[4];
  vq_load4_shared(book, lookup + 4 * (W - 1));
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

// Codes alone, `count` times eight: of each `word`, and the mask of its bits, from bit 1 on. Levels of its width begin two
// bytes behind as many as the mask is.
VQ_FN void vq_put_alone(VQ_THREAD VqTasks& tasks, uint count, VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  VQ_SHARED(const char) levels = (VQ_SHARED(const char))(lookup + VQ_ALONE) + 2;
  VQ_LOOP
  for (; count; --count) {
    uint r[4];
    VQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint codes[4], level[2];
      vq_load4_shared(codes, tasks.told + 4 * i);
      VQ_UNROLL
      for (int k = 0; k < 2; ++k) {
        const uint x = vq_word_of(tasks.words, codes[2 * k]), mask = codes[2 * k + 1];
        const uint at = (vq_funnel(x, x, codes[2 * k]) & mask) + mask;
        level[k] = *(VQ_SHARED(const unsigned short))(levels + at);
      }
      r[i] = level[0] | level[1] << 16;
    }
    vq_put8(row, r);
    tasks.told += 16, row += 8;
  }
}

// Levels of a head, but those of words that are rings of 1 bit, of this lane's token -> its row of a tile. list: behind
// its header, which is `kinds`; words: of that token, VQ_COLUMN_TOKENS apart.
VQ_FN void vq_put_levels(VQ_THREAD const VqKinds& kinds, VQ_SHARED(const uint) list, VQ_SHARED(const uint) words,
                         VQ_SHARED(const uint) lookup, VQ_SHARED(vq_half) row) {
  const uint first = kinds.counts[0], then = kinds.counts[1];
  VQ_SHARED(vq_half) tail = row + (kinds.first >> 16);  // written after codes alone, whose last eight may leave room
  VqTasks tasks;
  tasks.told = list, tasks.words = (VQ_SHARED(const char))words;
  vq_put_alone(tasks, first & 255, lookup, row + (kinds.first & 0xffff));
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
