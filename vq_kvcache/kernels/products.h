// The products of a tile in plain loops, for tiles of numbers that the matrix units do not take (float32 on CUDA) and
// for compilers without any (the host). Fragments and signatures as in cuda.h; lanes share `p` through `scratch`
// [16, 64].

// In parts, so that fewer numbers are added one after another: each would round what was added before.
template <int ROWS, typename E>
VQ_FN void vq_scores(float (&s)[8][4], VQ_SHARED(const E) q, int stride, VQ_SHARED(const E) tile, uint lane) {
  VQ_LOOP
  for (int first = 0; first < ROWS; first += 8) {
    float part[8][4] = {};
    VQ_UNROLL
    for (int k = first; k < first + 8; ++k) {
      const float a = vq_float(q[VQ_ROW(lane) * stride + k]), b = vq_float(q[(VQ_ROW(lane) + 8) * stride + k]);
      VQ_UNROLL
      for (int n = 0; n < 8; ++n) {
        const float x = vq_float(tile[k * VQ_STRIDE + n * 8 + VQ_COL(lane)]);
        const float y = vq_float(tile[k * VQ_STRIDE + n * 8 + VQ_COL(lane) + 1]);
        part[n][0] = vq_fma(a, x, part[n][0]), part[n][1] = vq_fma(a, y, part[n][1]);
        part[n][2] = vq_fma(b, x, part[n][2]), part[n][3] = vq_fma(b, y, part[n][3]);
      }
    }
    VQ_UNROLL
    for (int n = 0; n < 8; ++n) {
      VQ_UNROLL
      for (int i = 0; i < 4; ++i) s[n][i] += part[n][i];
    }
  }
}

template <int ROWS, int N, typename E>
VQ_FN void vq_accumulate(float (&o)[N][4], int first, const float (&p)[8][4], VQ_SHARED(const E) tile, VQ_SHARED(float) scratch,
                         uint lane) {
  VQ_UNROLL
  for (int n = 0; n < 8; ++n) {
    VQ_UNROLL
    for (int i = 0; i < 4; ++i) {
      E rounded;  // the weights in the precision that the matrix units would get
      vq_set(rounded, p[n][i]);
      scratch[(VQ_ROW(lane) + i / 2 * 8) * VQ_TOKENS + n * 8 + VQ_COL(lane) + i % 2] = vq_float(rounded);
    }
  }
  VQ_SYNC_WARP();
  for (int t = 0; t < VQ_TOKENS; ++t) {
    const float a = scratch[VQ_ROW(lane) * VQ_TOKENS + t], b = scratch[(VQ_ROW(lane) + 8) * VQ_TOKENS + t];
    VQ_UNROLL
    for (int n = 0; n < ROWS / 8; ++n) {
      const float x = vq_float(tile[(n * 8 + VQ_COL(lane)) * VQ_STRIDE + t]);
      const float y = vq_float(tile[(n * 8 + VQ_COL(lane) + 1) * VQ_STRIDE + t]);
      o[first + n][0] = vq_fma(a, x, o[first + n][0]), o[first + n][1] = vq_fma(a, y, o[first + n][1]);
      o[first + n][2] = vq_fma(b, x, o[first + n][2]), o[first + n][3] = vq_fma(b, y, o[first + n][3]);
    }
  }
  VQ_SYNC_WARP();
}
