// Prelude for CUDA (NVRTC or nvcc, sm_80 and later): what the shared text needs from the compiler.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define VQ_FN static __device__ __forceinline__
#define VQ_IN(T) const T* __restrict__
#define VQ_OUT(T) T* __restrict__
#define VQ_SHARED(T) T*
#define VQ_THREAD
#define VQ_DEVICE(T) T*
#define VQ_UNROLL _Pragma("unroll")
#define VQ_UNROLL_BY(n) _Pragma(VQ_TEXT(unroll n))
#define VQ_TEXT(x) #x
#define VQ_LOOP _Pragma("unroll 1")
#define VQ_SYNC_GROUP() __syncthreads()
#define VQ_SYNC_WARP() __syncwarp()
// Rows of a tile and of the folded queries are so far apart that eight of them lie in different memory banks.
enum { VQ_TOKENS = 64, VQ_STRIDE = 72, VQ_PAD = 8 };
#define VQ_SCRATCH(E) (sizeof(E) == 4 ? 16 * VQ_TOKENS : 0)

typedef unsigned int uint;
typedef __half vq_half;
typedef __half2 vq_half2;

// A fragment of 16 x 8 numbers: lane holds rows VQ_ROW, VQ_ROW + 8 and columns VQ_COL, VQ_COL + 1; lanes of one row
// differ in the bits VQ_ROW_A and VQ_ROW_B.
#define VQ_ROW(lane) ((lane) / 4)
#define VQ_COL(lane) ((lane) % 4 * 2)
#define VQ_ROW_A 1
#define VQ_ROW_B 2

VQ_FN float vq_float(float x) { return x; }
VQ_FN float vq_float(__half x) { return __half2float(x); }
VQ_FN float vq_float(__nv_bfloat16 x) { return __bfloat162float(x); }
VQ_FN void vq_set(VQ_THREAD float& to, float x) { to = x; }
VQ_FN void vq_set(__half& to, float x) { to = __float2half_rn(x); }
VQ_FN void vq_set(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

VQ_FN float vq_exp2(float x) {  // what is no normal number counts as nothing
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VQ_FN float vq_power(float x) { return __uint_as_float(__float_as_uint(x) & 0x7f800000u); }  // of two, at most x
VQ_FN float vq_max(float a, float b) { return fmaxf(a, b); }
VQ_FN float vq_fma(float a, float b, float c) { return fmaf(a, b, c); }
VQ_FN float vq_shuffle_xor(float x, uint bit) { return __shfl_xor_sync(0xffffffffu, x, bit); }

VQ_FN float vq_low(vq_half2 x) { return __low2float(x); }
VQ_FN float vq_high(vq_half2 x) { return __high2float(x); }
VQ_FN vq_half2 vq_as_half2(uint x) { return *reinterpret_cast<vq_half2*>(&x); }
VQ_FN uint vq_bits(vq_half2 x) { return *reinterpret_cast<uint*>(&x); }
VQ_FN vq_half2 vq_splat(float x) { return __float2half2_rn(x); }
VQ_FN vq_half2 vq_pack(float a, float b) { return __floats2half2_rn(a, b); }
VQ_FN vq_half2 vq_fma(vq_half2 a, vq_half2 b, vq_half2 c) { return __hfma2(a, b, c); }
VQ_FN vq_half2 vq_mul(vq_half2 a, vq_half2 b) { return __hmul2(a, b); }
VQ_FN vq_half2 vq_sub(vq_half2 a, vq_half2 b) { return __hsub2(a, b); }

// Four bytes of the eight of a and b, by the low four nibbles of `which`, each below eight: __byte_perm would mask them.
VQ_FN uint vq_permute(uint a, uint b, uint which) {
  uint x;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(which));
  return x;
}
VQ_FN void vq_put8(vq_half* at, const uint (&x)[4]) {
  *reinterpret_cast<uint4*>(at) = make_uint4(x[0], x[1], x[2], x[3]);
}
// The low 32 bits of the 64 of b and a, shifted right by the low five bits of n.
VQ_FN uint vq_funnel(uint a, uint b, uint n) { return __funnelshift_r(a, b, n); }
VQ_FN void vq_load4_shared(uint (&to)[4], const uint* from) {
  const uint4 x = *reinterpret_cast<const uint4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
VQ_FN void vq_load4(uint (&to)[4], const uint* __restrict__ from) {
  const uint4 x = __ldg(reinterpret_cast<const uint4*>(from));
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
VQ_FN void vq_put2(vq_half* at, uint x) { *reinterpret_cast<uint*>(at) = x; }
VQ_FN bool vq_any(bool x) { return __any_sync(0xffffffffu, x); }
// Bytes `byte` and `byte` + 1 of a, and of b above them.
VQ_FN uint vq_pair(uint a, uint b, int byte) { return __byte_perm(a, b, 0x5410 + byte * 0x1111); }
VQ_FN void vq_load2(const uint* from, uint& a, uint& b) {
  const uint2 x = *reinterpret_cast<const uint2*>(from);
  a = x.x, b = x.y;
}

VQ_FN uint vq_address(const void* p) { return static_cast<uint>(__cvta_generic_to_shared(p)); }
// The same memory at an address that the compiler does not know, and so keeps: it would ask the hardware for it again and
// again, some thirty cycles each time.
VQ_FN float* vq_held(void* p) {
  uint address = vq_address(p);
  asm volatile("" : "+r"(address));
  return static_cast<float*>(__cvta_shared_to_generic(address));
}
VQ_FN int vq_held_lane(int lane) { return __shfl_sync(0xffffffffu, lane, lane) & 31; }  // likewise
// The same place in shared memory, as an address that is kept, not worked out anew wherever it is needed.
template <typename T>
VQ_FN T* vq_kept(T* p, int lane) {
  return static_cast<T*>(__cvta_shared_to_generic(__shfl_sync(0xffffffffu, vq_address(p), lane)));
}
// A number that all lanes of the warp know: it is kept, and worked with, once for all of them.
VQ_FN uint vq_uniform(uint x) { return __reduce_or_sync(0xffffffffu, x); }
VQ_FN void vq_fetch4(uint* to, const uint* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(vq_address(to)), "l"(from));
}

// Words of a tile, fetched ahead: `words` rows of TOKENS tokens; `left` tokens exist, a multiple of four. Each call is
// one group of copies; vq_stage_wait leaves the newest group under way.
#define VQ_STAGED 1
#define VQ_DIRECT 0  // keys go through a tile, as the matrix units take it
template <int TOKENS>
VQ_FN void vq_stage(uint* to, const uint* from, int capacity, int left, int words, int lane) {
  for (int i = lane; i < words * (TOKENS / 4); i += 32) {
    const int word = i / (TOKENS / 4), token = i % (TOKENS / 4) * 4;
    if (token < left) vq_fetch4(to + word * TOKENS + token, from + (size_t)word * capacity + token);
  }
  asm volatile("cp.async.commit_group;");
}
VQ_FN void vq_stage_nothing() { asm volatile("cp.async.commit_group;"); }
VQ_FN void vq_stage_wait() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

VQ_FN void vq_ldmatrix(uint (&r)[4], const vq_half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(vq_address(p)) : "memory");
}
VQ_FN void vq_ldmatrix_turned(uint (&r)[4], const vq_half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(vq_address(p)) : "memory");
}
// Pairs of a matrix [8, 8] -> those of its transpose; lane 4 r + c has columns 2 c and 2 c + 1 of row r.
VQ_FN uint vq_turned(uint x) {
  uint y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
VQ_FN void vq_mma(float (&c)[4], const uint (&a)[4], uint b0, uint b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// s[16, 64] += q[16, ROWS] tile[ROWS, 64]; q row-major of stride `stride`, tile of stride VQ_STRIDE.
template <int ROWS>
VQ_FN void vq_scores(float (&s)[8][4], const vq_half* q, int stride, const vq_half* tile, uint lane) {
  VQ_UNROLL
  for (int k = 0; k < ROWS; k += 16) {
    uint a[4];
    vq_ldmatrix(a, q + (lane % 16) * stride + k + lane / 16 * 8);
    VQ_UNROLL
    for (int n = 0; n < 8; n += 2) {
      uint b[4];
      vq_ldmatrix_turned(b, tile + (k + lane % 16) * VQ_STRIDE + n * 8 + lane / 16 * 8);
      vq_mma(s[n], a, b[0], b[1]);
      vq_mma(s[n + 1], a, b[2], b[3]);
    }
  }
}

// o[16, ROWS] += p[16, 64] tile[ROWS, 64]^T; from fragment `first` of o on.
template <int ROWS, int N>
VQ_FN void vq_accumulate(float (&o)[N][4], int first, const float (&p)[8][4], const vq_half* tile, VQ_SHARED(float), uint lane) {
  VQ_UNROLL
  for (int k = 0; k < 4; ++k) {
    const uint a[4] = {vq_bits(vq_pack(p[2 * k][0], p[2 * k][1])), vq_bits(vq_pack(p[2 * k][2], p[2 * k][3])),
                       vq_bits(vq_pack(p[2 * k + 1][0], p[2 * k + 1][1])),
                       vq_bits(vq_pack(p[2 * k + 1][2], p[2 * k + 1][3]))};
    VQ_UNROLL
    for (int n = 0; n < ROWS / 8; n += 2) {
      uint b[4];
      vq_ldmatrix(b, tile + (n * 8 + lane / 16 * 8 + lane % 8) * VQ_STRIDE + k * 16 + lane / 8 % 2 * 8);
      vq_mma(o[first + n], a, b[0], b[1]);
      vq_mma(o[first + n + 1], a, b[2], b[3]);
    }
  }
}
