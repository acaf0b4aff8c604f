// Packs of 16 bytes: their extremes, and access that may be unaligned.
#pragma once

#include "numerics.cuh"

namespace fxfuse {

// The larger (smaller) of two packs, place by place, and the largest (smallest) of one. Two elements an instruction in
// half types. NaN is passed over: the sums show it.
__device__ __forceinline__ float max_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float min_of(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ __half2 max_of(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ __forceinline__ __half2 min_of(__half2 a, __half2 b) { return __hmin2(a, b); }
__device__ __forceinline__ __nv_bfloat162 max_of(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ __forceinline__ __nv_bfloat162 min_of(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmin2(a, b); }
__device__ __forceinline__ float largest(float a) { return a; }
__device__ __forceinline__ float smallest(float a) { return a; }
template <typename V>
__device__ __forceinline__ float largest(V a) { return fmaxf(to_float(a.x), to_float(a.y)); }
template <typename V>
__device__ __forceinline__ float smallest(V a) { return fminf(to_float(a.x), to_float(a.y)); }

template <typename T> struct Word { using type = float; };  // what fills 32 bits of a pack
template <> struct Word<__half> { using type = __half2; };
template <> struct Word<__nv_bfloat16> { using type = __nv_bfloat162; };

// The largest (LARGEST) or smallest of the packs taken so far, place by place until it is asked for.
template <typename T, bool LARGEST>
struct PackExtreme {
  using W = typename Word<T>::type;
  W best[4];

  __device__ __forceinline__ static W of(W a, W b) {
    if constexpr (LARGEST) return max_of(a, b);
    else return min_of(a, b);
  }
  __device__ __forceinline__ PackExtreme() {
    Pack<T> none;
#pragma unroll
    for (int i = 0; i < Pack<T>::N; ++i) none.set(i, LARGEST ? -kInf : kInf);
    take_first(none);
  }
  __device__ __forceinline__ explicit PackExtreme(const Pack<T>& first) { take_first(first); }
  __device__ __forceinline__ void take(const Pack<T>& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = of(best[i], reinterpret_cast<const W*>(&v.raw)[i]);
  }
  __device__ __forceinline__ float get() const {
    const W w = of(of(best[0], best[1]), of(best[2], best[3]));
    if constexpr (LARGEST) return largest(w);
    else return smallest(w);
  }

 private:
  __device__ __forceinline__ void take_first(const Pack<T>& v) {
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = reinterpret_cast<const W*>(&v.raw)[i];
  }
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* p, bool aligned) {
  if (aligned) return ld_stream(p);
  Pack<T> v;
#pragma unroll
  for (int i = 0; i < Pack<T>::N; ++i) v.at[i] = p[i];
  return v;
}
template <typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& v, bool aligned) {
  if (aligned) return st_stream(p, v);
#pragma unroll
  for (int i = 0; i < Pack<T>::N; ++i) p[i] = v.at[i];
}

}  // namespace fxfuse
