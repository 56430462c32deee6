// Prelude for a C++ compiler, so that the tests run the very text that GPUs get. They provide VqFibers, the lanes of a
// thread group that take turns at every barrier. Not fast, and not meant to be.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define VQ_FN static inline
#define VQ_IN(T) const T*
#define VQ_OUT(T) T*
#define VQ_SHARED(T) T*
#define VQ_THREAD
#define VQ_DEVICE(T) T*
#define VQ_UNROLL
#define VQ_UNROLL_BY(n)
#define VQ_LOOP
#define VQ_STAGED 1
#define VQ_SYNC_GROUP() VqFibers::current->wait(false)
#define VQ_SYNC_WARP() VqFibers::current->wait(true)
enum { VQ_TOKENS = 64, VQ_STRIDE = 72, VQ_PAD = 8 };
#define VQ_SCRATCH(E) (16 * VQ_TOKENS)

typedef unsigned int uint;
typedef _Float16 vq_half;
struct vq_half2 {
  vq_half x, y;
};

#define VQ_ROW(lane) ((lane) / 4)
#define VQ_COL(lane) ((lane) % 4 * 2)
#define VQ_ROW_A 1
#define VQ_ROW_B 2

struct vq_bfloat16 {
  uint16_t bits;
};

VQ_FN float vq_float(float x) { return x; }
VQ_FN float vq_float(vq_half x) { return (float)x; }
VQ_FN float vq_float(vq_bfloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
VQ_FN void vq_set(float& to, float x) { to = x; }
VQ_FN void vq_set(vq_half& to, float x) { to = (vq_half)x; }
VQ_FN void vq_set(vq_bfloat16& to, float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to.bits = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

VQ_FN float vq_exp2(float x) { return exp2f(x); }
VQ_FN float vq_max(float a, float b) { return a > b ? a : b; }
VQ_FN float vq_fma(float a, float b, float c) { return a * b + c; }
VQ_FN vq_half2 vq_as_half2(uint x) {
  vq_half2 y;
  memcpy(&y, &x, 4);
  return y;
}
VQ_FN float vq_low(vq_half2 x) { return (float)x.x; }
VQ_FN float vq_high(vq_half2 x) { return (float)x.y; }
VQ_FN vq_half2 vq_pack(float a, float b) { return {(vq_half)a, (vq_half)b}; }
VQ_FN vq_half2 vq_splat(float x) { return vq_pack(x, x); }
VQ_FN vq_half2 vq_fma(vq_half2 a, vq_half2 b, vq_half2 c) {  // rounded once, as the hardware does
  return vq_pack((float)a.x * (float)b.x + (float)c.x, (float)a.y * (float)b.y + (float)c.y);
}
VQ_FN vq_half2 vq_mul(vq_half2 a, vq_half2 b) { return {(vq_half)(a.x * b.x), (vq_half)(a.y * b.y)}; }
VQ_FN vq_half2 vq_sub(vq_half2 a, vq_half2 b) { return {(vq_half)(a.x - b.x), (vq_half)(a.y - b.y)}; }
VQ_FN uint vq_pair(uint a, uint b, int byte) { return (a >> 8 * byte & 0xffff) | b >> 8 * byte << 16; }
VQ_FN void vq_load2(const uint* from, uint& a, uint& b) { a = from[0], b = from[1]; }

VQ_FN void vq_stage(uint* to, const uint* from, int capacity, int left, int words, int lane) {
  for (int i = lane; i < words * VQ_TOKENS; i += 32)
    if (i % VQ_TOKENS < left) to[i] = from[(size_t)(i / VQ_TOKENS) * capacity + i % VQ_TOKENS];
}
VQ_FN void vq_stage_nothing() {}
VQ_FN void vq_stage_wait() {}

VQ_FN float vq_shuffle_xor(float x, uint bit) { return VqFibers::current->shuffle_xor(x, bit); }
