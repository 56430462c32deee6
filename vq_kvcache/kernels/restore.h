// Packed keys and values back among the exact tokens, in the order of the sequence, as a model sees them. `turned`, for
// prompts: what decode.h found is out of the basis of the codes already, but for a factor and the mean. Otherwise, for
// whoever reads a handle as an array, these are levels, of keys and values alike: [B, heads of keys and then of values,
// coordinates, tokens], in place of the packed keys. One thread group: x eight columns of the result, y head and batch row,
// z keys (0) or values.

enum { VQ_RESTORE_TOKENS = 8 };
// Positions in `params`, int32. STRIDE: tokens between two levels of a coordinate. ROWS: coordinates of keys, of values;
// LEVELS: that a head has levels of.
enum {
  VQ_RESTORE_HEADS, VQ_RESTORE_COLUMNS, VQ_RESTORE_CAPACITY, VQ_RESTORE_STRIDE, VQ_RESTORE_ROWS, VQ_RESTORE_TURNED = 6,
  VQ_RESTORE_PACKED, VQ_RESTORE_LEVELS,
};

// basis: [heads, rows, D], or a factor of each head. part: keys (0) or values.
template <typename T, typename E, int D>
VQ_FN void vq_restore_part(VQ_IN(E) z, VQ_IN(T) exact, VQ_IN(float) basis, VQ_IN(float) mean, VqRows held, int part,
                           VQ_IN(int) params, VQ_OUT(T) result, int first, int start, int plane, int d) {
  const int heads = params[VQ_RESTORE_HEADS], head = plane % heads, stride = params[VQ_RESTORE_STRIDE];
  const int rows = params[VQ_RESTORE_ROWS + part], levels = params[VQ_RESTORE_LEVELS];
  const size_t own = (size_t)((plane / heads * 2 + part) * heads + head) * levels;
  const int columns = params[VQ_RESTORE_COLUMNS];
  const size_t place = (size_t)plane * params[VQ_RESTORE_CAPACITY];
  const float own_mean = mean[head * D + d];
  const bool turned = params[VQ_RESTORE_TURNED];
  VQ_UNROLL
  for (int i = 0; i < VQ_RESTORE_TOKENS; ++i) {
    const int token = first + i - start, code = token - held.sinks, e = code - held.packed + held.start;
    if (first + i >= columns) continue;
    VQ_DEVICE(T) to = result + ((size_t)plane * columns + first + i) * D + d;
    if (token >= 0 && code < 0) {
      *to = exact[(place + token) * D + d];
    } else if (code >= held.packed && e < held.end) {
      *to = exact[(place + e) * D + d];
    } else {
      float x = 0.0f;
      if (token >= 0 && code < held.packed) {
        if (turned) {
          x = vq_float(z[((size_t)plane * params[VQ_RESTORE_PACKED] + code) * D + d]) * basis[head] + own_mean;
        } else {
          x = own_mean;
          VQ_LOOP
          for (int n = 0; n < rows; ++n)
            x = vq_fma(vq_float(z[(own + n) * stride + code]), basis[(head * rows + n) * D + d], x);
        }
      }
      vq_set(*to, x);
    }
  }
}

// start: of each batch row, the column of its first token. Columns of no token are zero.
template <typename T, typename E, int DK, int DV>
VQ_FN void vq_restore(VQ_IN(E) packed_keys, VQ_IN(E) packed_values, VQ_IN(T) keys, VQ_IN(T) values, VQ_IN(int) rows,
                      VQ_IN(int) start, VQ_IN(float) key_basis, VQ_IN(float) value_basis, VQ_IN(float) key_mean,
                      VQ_IN(float) value_mean, VQ_IN(int) params, VQ_OUT(T) all_keys, VQ_OUT(T) all_values, int x, int y,
                      int z, int worker) {
  const int batch = y / params[VQ_RESTORE_HEADS], first = x * VQ_RESTORE_TOKENS;
  const VqRows held = vq_rows(rows, batch);
  if (z == 0 && worker < DK)
    vq_restore_part<T, E, DK>(packed_keys, keys, key_basis, key_mean, held, 0, params, all_keys, first, start[batch], y,
                              worker);
  if (z == 1 && worker < DV)
    vq_restore_part<T, E, DV>(params[VQ_RESTORE_TURNED] ? packed_values : packed_keys, values, value_basis, value_mean, held,
                              1, params, all_values, first, start[batch], y, worker);
}
