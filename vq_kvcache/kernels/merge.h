// The outputs of attend.h's splits, of one query -> its attention. One thread group a query, one thread or more a dim.
// shared: [DV].
template <typename T, int DV>
VQ_FN void vq_merge(VQ_IN(float) sums, VQ_IN(float) outputs, VQ_IN(float) unfold, VQ_IN(float) mean,
                    VQ_IN(float) sink_logits, VQ_IN(int) table, VQ_IN(int) params, VQ_OUT(T) result,
                    VQ_SHARED(float) shared, int query, int plane, int thread, int threads) {
  const int exact = params[VQ_EXACT_SPLITS], splits = exact + params[VQ_PACKED_SPLITS];
  const int queries = params[VQ_G] * params[VQ_L], head = plane % params[VQ_H], length = params[VQ_L];
  const float logit = params[VQ_SINKS] ? sink_logits[head * params[VQ_G] + query / length] * 1.44269504f : VQ_LOWEST;
  float top = logit;
  for (int s = 0; s < splits; ++s) top = vq_max(top, sums[2 * ((plane * splits + s) * queries + query)]);
  float total = params[VQ_SINKS] ? vq_exp2(logit - top) : 0.0f, packed_total = 0.0f;
  for (int s = 0; s < splits; ++s) {
    const int i = 2 * ((plane * splits + s) * queries + query);
    const float part = sums[i + 1] * vq_exp2(sums[i] - top);
    total += part;
    if (s >= exact) packed_total += part;
  }
  for (int n = thread; n < DV; n += threads) {
    float packed = 0.0f;
    for (int s = exact; s < splits; ++s) {
      const int i = (plane * splits + s) * queries + query;
      packed = vq_fma(outputs[i * DV + n], vq_exp2(sums[2 * i] - top), packed);
    }
    shared[n] = packed;
  }
  VQ_SYNC_GROUP();
  for (int d = thread; d < DV; d += threads) {
    float x = packed_total * mean[head * DV + d];
    for (int s = 0; s < exact; ++s) {
      const int i = (plane * splits + s) * queries + query;
      x = vq_fma(outputs[i * DV + d], vq_exp2(sums[2 * i] - top), x);
    }
    const int stored = table[VQ_VALUE_ROWS];
    VQ_IN(float) column = unfold + head * stored * DV + d;
    for (int n = 0; n < stored; ++n) x = vq_fma(shared[n], column[n * DV], x);
    vq_set(result[(plane * queries + query) * DV + d], total > 0.0f ? x / total : 0.0f);
  }
}
