// The outputs of the splits of attend.h or columns.h, of one query -> its attention. One thread group a query: DV
// threads of each of PARTS parts, which share the splits and then the coordinates.
// shared: [VQ_MOST_SPLITS] shares of the splits, [PARTS, DV] sums in the basis of the codes, then of the values,
// [2] totals.

// What is loaded before anything is waited for: outputs of so many packed splits, of a part, in 2 DV columns, and sums of so
// many splits, of a lane. Loops go on behind these.
enum { VQ_MOST_SPLITS = 1024, VQ_MERGE_AHEAD = 9, VQ_SUMS_AHEAD = 2 };

template <typename T, int DV, int PARTS>
VQ_FN void vq_merge(VQ_IN(float) sums, VQ_IN(float) outputs, VQ_IN(float) unfold, VQ_IN(float) mean,
                    VQ_IN(float) sink_logits, VQ_IN(int) table, VQ_IN(int) params, VQ_OUT(T) result,
                    VQ_SHARED(float) shared, int query, int plane, int worker) {
  const int exact = params[VQ_EXACT_SPLITS], splits = exact + params[VQ_PACKED_SPLITS];
  const int queries = params[VQ_G] * params[VQ_L], head = plane % params[VQ_H], lane = worker % 32;
  const int width = table[VQ_OUTPUT_WIDTH], stored = table[VQ_VALUE_ROWS], orders = table[VQ_VALUE_ORDER];
  VQ_SHARED(float) shares = shared;
  VQ_SHARED(float) folded = shared + VQ_MOST_SPLITS;
  VQ_SHARED(float) totals = folded + PARTS * DV;
  VQ_IN(float) own = sums + 2 * (plane * splits * queries + query);
  const bool sinks = params[VQ_SINKS];
  const float logit = sinks ? sink_logits[head * params[VQ_G] + query / params[VQ_L]] * 1.44269504f : VQ_LOWEST;
  const int d = worker % DV, part = worker / DV;
  // A part's share of the basis.
  const int share = (DV + PARTS - 1) / PARTS, first = part * share;
  VQ_IN(float) column = unfold + (head * stored + first) * DV + d;
  const int ahead = share < 32 ? share : 32;
  float basis[ahead];
  VQ_UNROLL
  for (int n = 0; n < ahead; ++n) basis[n] = first + n < stored ? column[n * DV] : 0.0f;
  VQ_IN(int) order = table + orders + head * width;
  const bool ordered = orders > 0;
  VQ_IN(float) out = outputs + (plane * splits * queries + query) * width;
  const int columns = ordered ? width : stored;
  float packed_ahead[2][VQ_MERGE_AHEAD];
  VQ_UNROLL
  for (int block = 0; block < 2; ++block) {
    VQ_UNROLL
    for (int i = 0; i < VQ_MERGE_AHEAD; ++i) {
      const int s = exact + part + i * PARTS, n = d + block * DV;  // before their coordinates are known
      packed_ahead[block][i] = s < splits && n < columns ? out[s * queries * width + n] : 0.0f;
    }
  }
  int coordinates[2];
  VQ_UNROLL
  for (int block = 0; block < 2; ++block) {
    const int n = d + block * DV;
    coordinates[block] = n >= columns ? -1 : ordered ? order[n] : n;
  }
  const float exact_ahead = part < exact ? out[part * queries * width + d] : 0.0f;
  float tops[VQ_SUMS_AHEAD], totals_ahead[VQ_SUMS_AHEAD];
  VQ_UNROLL
  for (int i = 0; i < VQ_SUMS_AHEAD; ++i) {
    const int s = lane + 32 * i;
    const bool there = worker < 32 && s < splits;
    tops[i] = there ? own[2 * s * queries] : VQ_LOWEST, totals_ahead[i] = there ? own[2 * s * queries + 1] : 0.0f;
  }
  if (worker < 32) {  // one warp finds what each split counts for
    float top = logit, total = 0.0f, packed_total = 0.0f;
    VQ_UNROLL
    for (int i = 0; i < VQ_SUMS_AHEAD; ++i) top = vq_max(top, tops[i]);
    for (int s = lane + 32 * VQ_SUMS_AHEAD; s < splits; s += 32) top = vq_max(top, own[2 * s * queries]);
    VQ_UNROLL
    for (uint bit = 16; bit; bit /= 2) top = vq_max(top, vq_shuffle_xor(top, bit));
    VQ_UNROLL
    for (int i = 0; i < VQ_SUMS_AHEAD; ++i) {
      const int s = lane + 32 * i;
      const float weight = vq_exp2(tops[i] - top), sum = totals_ahead[i] * weight;
      if (s < splits) shares[s] = weight;
      total += sum;
      if (s >= exact) packed_total += sum;
    }
    for (int s = lane + 32 * VQ_SUMS_AHEAD; s < splits; s += 32) {
      const float weight = vq_exp2(own[2 * s * queries] - top), sum = own[2 * s * queries + 1] * weight;
      shares[s] = weight;
      total += sum;
      if (s >= exact) packed_total += sum;
    }
    VQ_UNROLL
    for (uint bit = 16; bit; bit /= 2) {
      total += vq_shuffle_xor(total, bit);
      packed_total += vq_shuffle_xor(packed_total, bit);
    }
    if (lane == 0) totals[0] = total + (sinks ? vq_exp2(logit - top) : 0.0f), totals[1] = packed_total;
  }
  folded[worker] = 0.0f;
  VQ_SYNC_GROUP();
  VQ_UNROLL
  for (int block = 0; block < 2; ++block) {
    if (coordinates[block] < 0) continue;
    float packed = 0.0f;
    VQ_UNROLL
    for (int i = 0; i < VQ_MERGE_AHEAD; ++i) {
      const int s = exact + part + i * PARTS;
      if (s < splits) packed = vq_fma(packed_ahead[block][i], shares[s], packed);
    }
    VQ_UNROLL_BY(8)
    for (int s = exact + part + VQ_MERGE_AHEAD * PARTS; s < splits; s += PARTS)
      packed = vq_fma(out[s * queries * width + d + block * DV], shares[s], packed);
    folded[part * DV + coordinates[block]] = packed;
  }
  for (int n = d + 2 * DV; n < columns; n += DV) {
    const int coordinate = ordered ? order[n] : n;
    if (coordinate < 0) continue;
    float packed = 0.0f;
    VQ_UNROLL_BY(8)
    for (int s = exact + part; s < splits; s += PARTS) packed = vq_fma(out[s * queries * width + n], shares[s], packed);
    folded[part * DV + coordinate] = packed;
  }
  VQ_SYNC_GROUP();
  if (part == 0) {
    VQ_UNROLL
    for (int p = 1; p < PARTS; ++p) folded[d] += folded[p * DV + d];
  }
  VQ_SYNC_GROUP();
  float x = 0.0f;
  VQ_UNROLL
  for (int n = 0; n < ahead; ++n) x = vq_fma(first + n < DV ? folded[first + n] : 0.0f, basis[n], x);
  VQ_UNROLL_BY(16)
  for (int n = ahead; n < share && first + n < stored; ++n) x = vq_fma(folded[first + n], column[n * DV], x);
  if (part < exact) x = vq_fma(exact_ahead, shares[part], x);
  VQ_UNROLL_BY(4)
  for (int s = part + PARTS; s < exact; s += PARTS) x = vq_fma(out[s * queries * width + d], shares[s], x);
  VQ_SYNC_GROUP();
  folded[worker] = x;
  VQ_SYNC_GROUP();
  if (part == 0) {
    x = totals[1] * mean[head * DV + d];
    VQ_UNROLL
    for (int p = 0; p < PARTS; ++p) x += folded[p * DV + d];
    vq_set(result[(plane * queries + query) * DV + d], totals[0] == 0.0f ? 0.0f : x / totals[0]);
  }
}
