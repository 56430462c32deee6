// Packed tokens of some heads -> levels [B, heads, dims, tokens]: one warp 64 tokens of a head.
// Positions in `params`, int32. VQ_DECODE_STRIDE: tokens between two dims of the result, even.
enum {
  VQ_DECODE_HEADS, VQ_DECODE_FIRST_HEAD, VQ_DECODE_ENTRY, VQ_DECODE_TOKENS, VQ_DECODE_STRIDE, VQ_DECODE_CHUNKS, VQ_DECODE_DIMS,
  VQ_DECODE_TABLE = 8,
};

template <typename E>
VQ_FN void vq_decode(VQ_CHUNK_ARGUMENTS, VQ_IN(int) table, VQ_IN(float) levels, VQ_IN(int) params, VQ_OUT(E) result,
                     VQ_SHARED(float) shared, int tile, int head, int batch, int lane) {
  const int tokens = params[VQ_DECODE_TOKENS], stride = params[VQ_DECODE_STRIDE], dims = params[VQ_DECODE_DIMS];
  const int entry = params[VQ_DECODE_ENTRY] + (params[VQ_DECODE_FIRST_HEAD] + head) * VQ_HEAD_INTS;
  VQ_SHARED(int) chunks = (VQ_SHARED(int))shared;
  if (lane < 16) chunks[lane] = lane < 2 * params[VQ_DECODE_CHUNKS] ? params[VQ_DECODE_TABLE + lane] : 0;
  const VqBook book = vq_open(table, entry, levels, shared + 16, lane, 32);
  VQ_SYNC_GROUP();
  const VqTile t = vq_find_tile<VQ_TOKENS>(chunks, params[VQ_DECODE_CHUNKS], VQ_CHUNK_NAMES, tile, tokens, table[VQ_TOTAL_WORDS],
                                batch);
  if (2 * lane >= t.valid) return;
  VQ_DEVICE(E) at = result + ((size_t)batch * params[VQ_DECODE_HEADS] + head) * dims * stride + t.first + 2 * lane;
  VqTarget<VQ_DEVICE(E), sizeof(E) == 4, 1> to = {at, stride, 0, dims};
  vq_decode_tile(book, t.words + (size_t)table[entry + 3] * t.capacity + 2 * lane, t.capacity, true, to);
  for (int n = table[entry + 2]; n < dims; ++n) at[(size_t)n * stride] = at[(size_t)n * stride + 1] = E(0.0f);
}
