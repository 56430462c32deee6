// Prelude for Metal: what the shared text needs from the compiler. Every pointer and reference names its address space.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

using namespace metal;

#define VQ_FN inline __attribute__((always_inline))
#define VQ_IN(T) const device T*
#define VQ_OUT(T) device T*
#define VQ_SHARED(T) threadgroup T*
#define VQ_THREAD thread
#define VQ_DEVICE(T) device T*
#define VQ_UNROLL _Pragma("clang loop unroll(full)")
#define VQ_UNROLL_BY(n) _Pragma(VQ_TEXT(clang loop unroll_count(n)))
#define VQ_TEXT(x) #x
#define VQ_LOOP _Pragma("clang loop unroll(disable)")
#define VQ_SYNC_GROUP() threadgroup_barrier(mem_flags::mem_threadgroup)
#define VQ_SYNC_WARP() simdgroup_barrier(mem_flags::mem_threadgroup)
enum { VQ_TOKENS = 64, VQ_STRIDE = 72, VQ_PAD = 0 };
#define VQ_SCRATCH(E) 0
#define VQ_DIRECT 1  // keys are scored as they come: matrix units do no more a cycle than lanes, and empty rows as well
#define VQ_STAGED 0  // nothing copies to threadgroup memory in the background

typedef half vq_half;
typedef half2 vq_half2;

// Matrices of 8 x 8, rows 0-7 and, if there are so many, 8-15, as a SIMD group holds them: each lane has two neighbours of
// a row.
#define VQ_ROW(lane) (((lane) / 4 & 4) + (lane) / 2 % 4)
#define VQ_COL(lane) (((lane) / 4 & 2) * 2 + (lane) % 2 * 2)
#define VQ_ROW_A 1
#define VQ_ROW_B 8

VQ_FN float vq_float(float x) { return x; }
VQ_FN float vq_float(half x) { return (float)x; }
VQ_FN float vq_float(bfloat16_t x) { return (float)x; }
#define VQ_SET(SPACE, T) \
  VQ_FN void vq_set(SPACE T& to, float x) { to = (T)x; }
VQ_SET(threadgroup, float)
VQ_SET(threadgroup, half)
VQ_SET(device, float)
VQ_SET(device, half)
VQ_SET(device, bfloat16_t)

VQ_FN float vq_exp2(float x) { return fast::exp2(x); }
VQ_FN float vq_max(float a, float b) { return max(a, b); }
VQ_FN float vq_fma(float a, float b, float c) { return fma(a, b, c); }
VQ_FN float vq_shuffle_xor(float x, uint bit) { return simd_shuffle_xor(x, (ushort)bit); }

VQ_FN float vq_low(half2 x) { return (float)x.x; }
VQ_FN float vq_high(half2 x) { return (float)x.y; }
VQ_FN half2 vq_as_half2(uint x) { return as_type<half2>(x); }
VQ_FN half2 vq_splat(float x) { return half2((half)x); }
VQ_FN half2 vq_pack(float a, float b) { return half2((half)a, (half)b); }
VQ_FN half2 vq_fma(half2 a, half2 b, half2 c) { return fma(a, b, c); }
VQ_FN half2 vq_mul(half2 a, half2 b) { return a * b; }
VQ_FN half2 vq_sub(half2 a, half2 b) { return a - b; }

// Bytes `byte` and `byte` + 1 of a, and of b above them.
VQ_FN uint vq_pair(uint a, uint b, int byte) { return (a >> 8 * byte & 0xffffu) | b >> 8 * byte << 16; }
VQ_FN void vq_load2(const device uint* from, thread uint& a, thread uint& b) {
  const uint2 x = *(const device uint2*)from;
  a = x.x, b = x.y;
}
VQ_FN void vq_load_four(const threadgroup half* from, thread float* to) {
  const half4 x = *(const threadgroup half4*)from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
VQ_FN void vq_load_four(const threadgroup float* from, thread float* to) {
  const float4 x = *(const threadgroup float4*)from;
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
// Levels that go to an output; helpers.h has those that go to a tile.
VQ_FN void vq_put(device half* at, half2 pair) { *(device half2*)at = pair; }
VQ_FN void vq_put(device float* at, float a, float b) { at[0] = a, at[1] = b; }

// o[8 BLOCKS, ROWS] += p[8 BLOCKS, 64] tile[ROWS, 64]^T; from fragment `first` of o on. BLOCKS: half of HELD, numbers of a lane
// in every eight columns.
template <int ROWS, int HELD, int N, typename E>
VQ_FN void vq_accumulate(thread float (&o)[N][HELD], int first, thread const float (&p)[8][HELD],
                         const threadgroup E* tile, threadgroup float*, uint) {
  enum { BLOCKS = HELD / 2 };
  simdgroup_matrix<E, 8, 8> weights[BLOCKS][8];
  VQ_UNROLL
  for (int b = 0; b < BLOCKS; ++b) {
    VQ_UNROLL
    for (int k = 0; k < 8; ++k)
      weights[b][k].thread_elements()[0] = (E)p[k][2 * b], weights[b][k].thread_elements()[1] = (E)p[k][2 * b + 1];
  }
  VQ_UNROLL
  for (int n = 0; n < ROWS / 8; ++n) {
    simdgroup_matrix<float, 8, 8> sums[BLOCKS];
    VQ_UNROLL
    for (int b = 0; b < BLOCKS; ++b)
      sums[b].thread_elements()[0] = o[first + n][2 * b], sums[b].thread_elements()[1] = o[first + n][2 * b + 1];
    VQ_UNROLL
    for (int k = 0; k < 8; ++k) {
      simdgroup_matrix<E, 8, 8> values;
      simdgroup_load(values, tile + n * 8 * VQ_STRIDE + k * 8, VQ_STRIDE, ulong2(0, 0), true);
      VQ_UNROLL
      for (int b = 0; b < BLOCKS; ++b) simdgroup_multiply_accumulate(sums[b], weights[b][k], values, sums[b]);
    }
    VQ_UNROLL
    for (int b = 0; b < BLOCKS; ++b)
      o[first + n][2 * b] = sums[b].thread_elements()[0], o[first + n][2 * b + 1] = sums[b].thread_elements()[1];
  }
}
