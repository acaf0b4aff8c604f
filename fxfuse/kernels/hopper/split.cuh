// A float32 as the sum of three bf16: x = high + middle + low, exactly wherever low does not underflow.
//
// Each term is the rest of the one before, rounded to nearest: 8 bits of significand and a sign apiece, so that the three
// hold the 24 bits of x and the rests have either sign. |middle| <= 2^-8 |x|, |low| <= 2^-17 |x| (of x's binade). Exact for
// |x| >= 2^-110 (bf16 reaches down to 2^-133) and below FLT_MAX (1 - 2^-9), from where `high` is infinite; x infinite or NaN
// gives NaN.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace fxfuse::hopper {

struct SplitPair {  // of two numbers: the first in the low half of each word
  uint32_t high, middle, low;
};

__device__ __forceinline__ uint32_t bf16_pair(float x, float y) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ SplitPair split_pair(float x, float y) {
  SplitPair s;
  s.high = bf16_pair(x, y);
  x -= __uint_as_float(s.high << 16);
  y -= __uint_as_float(s.high & 0xFFFF0000u);
  s.middle = bf16_pair(x, y);
  x -= __uint_as_float(s.middle << 16);
  y -= __uint_as_float(s.middle & 0xFFFF0000u);
  s.low = bf16_pair(x, y);
  return s;
}

}  // namespace fxfuse::hopper
