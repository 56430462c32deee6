// Prelude for a C++ compiler, so that the tests run the very text that GPUs get. They provide VqFibers, the lanes of a
// thread group that take turns at every barrier. Not fast, and not meant to be.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

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
#define VQ_DIRECT 0  // keys go through a tile, as the matrix units take it
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
VQ_FN float vq_power(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits &= 0x7f800000u;
  memcpy(&x, &bits, 4);
  return x;
}
VQ_FN float vq_max(float a, float b) { return a > b ? a : b; }
VQ_FN float vq_fma(float a, float b, float c) { return a * b + c; }
VQ_FN vq_half2 vq_as_half2(uint x) {
  vq_half2 y;
  memcpy(&y, &x, 4);
  return y;
}
VQ_FN uint vq_bits(vq_half2 x) {
  uint y;
  memcpy(&y, &x, 4);
  return y;
}
VQ_FN uint vq_permute(uint a, uint b, uint which) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint x = 0;
  for (int i = 0; i < 4; ++i) x |= (uint)(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
  return x;
}
VQ_FN uint vq_funnel(uint a, uint b, uint n) { return (uint)(((uint64_t)b << 32 | a) >> (n & 31)); }
VQ_FN const void* vq_aligned(const void* p, size_t bytes) {  // GPUs read and write nothing else
  if ((uintptr_t)p % bytes) abort();
  return p;
}
VQ_FN void vq_load4_shared(uint (&to)[4], const uint* from) { memcpy(to, vq_aligned(from, 16), 16); }
VQ_FN void vq_load4(uint (&to)[4], const uint* from) { memcpy(to, vq_aligned(from, 16), 16); }
VQ_FN void vq_put8(vq_half* at, const uint (&x)[4]) { memcpy((void*)vq_aligned(at, 16), x, 16); }
VQ_FN void vq_put2(vq_half* at, uint x) { memcpy((void*)vq_aligned(at, 4), &x, 4); }
VQ_FN int vq_held_lane(int lane) { return lane; }
template <typename T>
VQ_FN T* vq_kept(T* p, int) {
  return p;
}
VQ_FN uint vq_uniform(uint x) { return x; }
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
VQ_FN void vq_load2(const uint* from, uint& a, uint& b) {
  vq_aligned(from, 8);
  a = from[0], b = from[1];
}

template <int TOKENS>
VQ_FN void vq_stage(uint* to, const uint* from, int capacity, int left, int words, int lane) {
  for (int i = lane; i < words * TOKENS; i += 32)
    if (i % TOKENS < left) to[i] = from[(size_t)(i / TOKENS) * capacity + i % TOKENS];
}

// Copies arrive when their lane waits for them, and not before. That lanes wait for each other's is seen so, but not that
// they wait before a tile is read or written anew: they meet in every product.
struct VqCopies {
  struct Copy {
    uint* to;
    const uint* from;
  };
  std::vector<Copy> asked, sent, older;  // not a group yet, the newest group, and those before it
};
VQ_FN VqCopies& vq_copies() {
  static std::vector<VqCopies> all(1024);
  return all[VqFibers::current->lane()];
}
VQ_FN void vq_fetch4(uint* to, const uint* from) {
  vq_aligned(from, 16);
  memset((void*)vq_aligned(to, 16), 0xa5, 16);
  vq_copies().asked.push_back({to, from});
}
VQ_FN void vq_stage_nothing() {
  VqCopies& own = vq_copies();
  own.older.insert(own.older.end(), own.sent.begin(), own.sent.end());
  own.sent.swap(own.asked);
  own.asked.clear();
}
VQ_FN void vq_stage_wait() {
  for (const VqCopies::Copy& copy : vq_copies().older) memcpy(copy.to, copy.from, 16);
  vq_copies().older.clear();
}

VQ_FN float vq_shuffle_xor(float x, uint bit) { return VqFibers::current->shuffle_xor(x, bit); }
VQ_FN bool vq_any(bool x) {
  const float* all = VqFibers::current->exchange(x, 0.0f, 0.0f, 0.0f);
  for (int lane = 0; lane < 32; ++lane)
    if (all[4 * lane] != 0.0f) return true;
  return false;
}

// What PTX says of ldmatrix (.x4), movmatrix and mma.m16n8k16, lane by lane.
struct VqGiven {  // by a lane: a pointer or four registers
  uint r[4];
};
VQ_FN const VqGiven* vq_given(const VqGiven& own) {
  float x[4];
  memcpy(x, &own, 16);
  return (const VqGiven*)VqFibers::current->exchange(x[0], x[1], x[2], x[3]);
}
VQ_FN uint vq_two_halves(vq_half a, vq_half b) { return vq_bits({a, b}); }
VQ_FN void vq_load_matrices(uint (&r)[4], const vq_half* p, bool turned) {
  VqGiven own = {};
  vq_aligned(p, 16);
  memcpy(&own, &p, sizeof p);
  const VqGiven* all = vq_given(own);
  const int lane = VqFibers::current->lane() % 32, row = lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const vq_half* rows[8];
    for (int k = 0; k < 8; ++k) memcpy(&rows[k], &all[8 * i + k], sizeof p);
    r[i] = turned ? vq_two_halves(rows[column][row], rows[column + 1][row])
                  : vq_two_halves(rows[row][column], rows[row][column + 1]);
  }
}
VQ_FN void vq_ldmatrix(uint (&r)[4], const vq_half* p) { vq_load_matrices(r, p, false); }
VQ_FN void vq_ldmatrix_turned(uint (&r)[4], const vq_half* p) { vq_load_matrices(r, p, true); }
VQ_FN uint vq_turned(uint x) {
  const VqGiven* all = vq_given({{x, 0, 0, 0}});
  const int lane = VqFibers::current->lane() % 32, row = lane / 4, column = lane % 4 * 2;
  vq_half half[2];
  for (int i = 0; i < 2; ++i) {
    const vq_half2 pair = vq_as_half2(all[4 * (column + i) + row / 2].r[0]);
    half[i] = row % 2 ? pair.y : pair.x;
  }
  return vq_two_halves(half[0], half[1]);
}
VQ_FN void vq_mma(float (&c)[4], const uint (&a)[4], uint b0, uint b1) {
  VqGiven own;
  memcpy(&own, a, 16);
  const int lane = VqFibers::current->lane() % 32, row = lane / 4, column = lane % 4 * 2;
  float rows[2][16];  // read before the next exchange
  const VqGiven* all = vq_given(own);
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 16; k += 2) {
      const vq_half2 x = vq_as_half2(all[4 * row + k % 8 / 2].r[i + k / 8 * 2]);
      rows[i][k] = (float)x.x, rows[i][k + 1] = (float)x.y;
    }
  }
  all = vq_given({{b0, b1, 0, 0}});
  for (int i = 0; i < 4; ++i) {
    float sum = c[i];
    for (int k = 0; k < 16; k += 2) {
      const vq_half2 y = vq_as_half2(all[4 * (column + i % 2) + k % 8 / 2].r[k / 8]);
      sum += rows[i / 2][k] * (float)y.x + rows[i / 2][k + 1] * (float)y.y;
    }
    c[i] = sum;
  }
}
