// Coordinates of unit variance -> words: one thread a word of a token. Codes alone take the nearest level; codes in
// rings those of least squared error, by Viterbi's algorithm as in trellis.py.

enum { VQ_WORD_HEAD, VQ_WORD_PIECES, VQ_WORD_PIECE = 2, VQ_WORD_PIECE_INTS = 6 };  // width, ring, shift, slots, first, step
enum { VQ_ENCODE_TOKENS, VQ_ENCODE_WORDS, VQ_ENCODE_HEADS, VQ_ENCODE_STORED, VQ_ENCODE_ROW };

template <int W, bool RING>
VQ_FN float vq_level(int j, VQ_IN(float) c) {
  const float scale = 2.0f / (1 << (RING ? W + 1 : W));
  return vq_polynomial<VqTerms<W, RING>::count>(vq_fma((float)j, scale, scale / 2 - 1.0f), c);
}

template <int W>
VQ_FN uint vq_nearest(float z, VQ_IN(float) c) {
  uint code = 0;
  VQ_UNROLL
  for (uint bit = 1u << (W - 1); bit; bit /= 2) {
    const int j = code | bit;
    const float edge = 0.5f * (vq_level<W, false>(j - 1, c) + vq_level<W, false>(j, c));
    if (z > edge) code |= bit;
  }
  return code;
}

// From the state (v, w), lowest bits of the codes one and two back, a code of lowest bit u leads to (u, v); its levels
// are those with j mod 4 = 2 (u ^ w) + v.
template <int W>
VQ_FN uint vq_ring(VQ_IN(float) z, int step, int slots, VQ_IN(float) c) {
  float cost[4][4];
  uint path[4][4];
  VQ_UNROLL
  for (int start = 0; start < 4; ++start) {
    VQ_UNROLL
    for (int state = 0; state < 4; ++state) cost[start][state] = start == state ? 0.0f : 1e30f, path[start][state] = 0;
  }
  for (int k = 0; k < slots; ++k) {
    const float x = z[k * step];
    float error[4];
    uint member[4];
    VQ_UNROLL
    for (int q = 0; q < 4; ++q) {
      error[q] = 1e30f, member[q] = 0;
      for (int m = 0; m < 1 << (W - 1); ++m) {
        const float off = x - vq_level<W, true>(4 * m + q, c);
        if (off * off < error[q]) error[q] = off * off, member[q] = m;
      }
    }
    VQ_UNROLL
    for (int start = 0; start < 4; ++start) {
      float next_cost[4];
      uint next_path[4];
      VQ_UNROLL
      for (int state = 0; state < 4; ++state) {
        const int u = state / 2, v = state % 2;
        const float first = cost[start][2 * v] + error[2 * u + v];
        const float second = cost[start][2 * v + 1] + error[2 * (1 - u) + v];
        const bool other = second < first;
        const uint code = 2 * (other ? member[2 * (1 - u) + v] : member[2 * u + v]) + u;
        next_cost[state] = other ? second : first;
        next_path[state] = (other ? path[start][2 * v + 1] : path[start][2 * v]) | code << (k * W);
      }
      VQ_UNROLL
      for (int state = 0; state < 4; ++state) cost[start][state] = next_cost[state], path[start][state] = next_path[state];
    }
  }
  float best = cost[0][0];
  uint result = path[0][0];
  VQ_UNROLL
  for (int start = 1; start < 4; ++start)
    if (cost[start][start] < best) best = cost[start][start], result = path[start][start];
  return result;
}

template <int W, bool RING>
VQ_FN uint vq_codes(VQ_IN(float) z, int step, int slots, VQ_IN(float) levels) {
  VQ_IN(float) c = levels + ((RING ? 9 : 0) + W) * VQ_COEFFICIENTS;
  if (RING) return vq_ring<RING ? W : 1>(z, step, slots, c);
  uint word = 0;
  for (int k = 0; k < slots; ++k) word |= vq_nearest<W>(z[k * step], c) << (k * W);
  return word;
}

// z [B, H, T, stored] -> words [B, W, T]; `index` counts tokens first, so that the lanes of a warp do the same.
VQ_FN void vq_encode(VQ_IN(float) z, VQ_IN(int) table, VQ_IN(float) levels, VQ_IN(int) params, VQ_OUT(uint) words,
                     int index, int batch) {
  const int count = params[VQ_ENCODE_WORDS], tokens = params[VQ_ENCODE_TOKENS], stored = params[VQ_ENCODE_STORED];
  const int word = index / tokens, token = index % tokens;
  if (word >= count) return;
  VQ_IN(int) row = table + word * params[VQ_ENCODE_ROW];
  VQ_IN(float) at = z + (((size_t)batch * params[VQ_ENCODE_HEADS] + row[VQ_WORD_HEAD]) * tokens + token) * stored;
  uint result = 0;
  for (int i = 0; i < row[VQ_WORD_PIECES]; ++i) {
    VQ_IN(int) p = row + VQ_WORD_PIECE + i * VQ_WORD_PIECE_INTS;
    VQ_IN(float) x = at + p[4];
    const int slots = p[3], step = p[5];
    uint codes = 0;
    switch (p[0] + (p[1] ? 16 : 0)) {
      case 1: codes = vq_codes<1, false>(x, step, slots, levels); break;
      case 2: codes = vq_codes<2, false>(x, step, slots, levels); break;
      case 3: codes = vq_codes<3, false>(x, step, slots, levels); break;
      case 4: codes = vq_codes<4, false>(x, step, slots, levels); break;
      case 5: codes = vq_codes<5, false>(x, step, slots, levels); break;
      case 6: codes = vq_codes<6, false>(x, step, slots, levels); break;
      case 7: codes = vq_codes<7, false>(x, step, slots, levels); break;
      case 8: codes = vq_codes<8, false>(x, step, slots, levels); break;
      case 17: codes = vq_codes<1, true>(x, step, slots, levels); break;
      case 18: codes = vq_codes<2, true>(x, step, slots, levels); break;
      case 19: codes = vq_codes<3, true>(x, step, slots, levels); break;
      case 20: codes = vq_codes<4, true>(x, step, slots, levels); break;
      case 21: codes = vq_codes<5, true>(x, step, slots, levels); break;
    }
    result |= codes << p[2];
  }
  words[((size_t)batch * count + word) * tokens + token] = result;
}
