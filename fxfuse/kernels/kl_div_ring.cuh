// kl_div with the gradient of its input in the same pass, on Hopper: the loads are the copy engine's.
//
// Every block has a ring of slots in shared memory, a chunk of input and target in each, filled in order; the last warp
// to take its packs from a slot has it filled again. What is on its way does not depend on how far the arithmetic is,
// and takes no registers. Bytes moved: two reads and one write an element.
#pragma once

#include "kl_div_pack.cuh"
#include "sm90.cuh"

namespace fxfuse {

// Many warps and short rings: more on its way than this makes reads and writes disturb each other in memory.
constexpr int kKlRingThreads = 256;
constexpr int kKlRingBlocks = 6;  // an SM
constexpr int kKlRingSlots = 2;

// The gradient of an input whose logarithm is taken, for an incoming gradient of 1. A chunk is one pack a thread.
template <typename T>
__global__ void __launch_bounds__(kKlRingThreads, kKlRingBlocks) kl_div_ring_kernel(KlDivArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int N = Pack<T>::N, kThreads = kKlRingThreads, kWarps = kThreads / kWarp, kChunk = kThreads * N;
  __shared__ __align__(128) Pack<T> ring[kKlRingSlots][2][kThreads];  // of the input, of the target
  __shared__ alignas(8) uint64_t landed[kKlRingSlots];
  __shared__ int takers[kKlRingSlots];
  __shared__ double shared[kWarps];
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  T* const grad_input = static_cast<T*>(a.grad_input);
  const float g = range_as<T>(a.factor);
  const int64_t chunks = a.n / kChunk;
  const auto fill = [&](int slot, int64_t chunk) {
    mbarrier_expect(&landed[slot], int(sizeof(ring[slot])));
    bulk_load(ring[slot][0], input + chunk * kChunk, int(sizeof(ring[slot][0])), &landed[slot]);
    bulk_load(ring[slot][1], target + chunk * kChunk, int(sizeof(ring[slot][1])), &landed[slot]);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kKlRingSlots; ++i) {
      mbarrier_init(&landed[i], 1);
      takers[i] = 0;
    }
    mbarrier_init_fence();
    for (int i = 0; i < kKlRingSlots; ++i)
      if (blockIdx.x + int64_t(i) * gridDim.x < chunks) fill(i, blockIdx.x + int64_t(i) * gridDim.x);
  }
  __syncthreads();

  double sum = 0;
  int slot = 0, parity = 0;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    mbarrier_wait(&landed[slot], parity);
    Pack<T> x = ring[slot][0][threadIdx.x], t = ring[slot][1][threadIdx.x], grad;
    __syncwarp();  // in registers
    const int64_t next = c + int64_t(kKlRingSlots) * gridDim.x;
    if (threadIdx.x % kWarp == 0 && last_to_take(&takers[slot], kWarps) && next < chunks) fill(slot, next);
    if (++slot == kKlRingSlots) {
      slot = 0;
      parity ^= 1;
    }
    float loss;
    if (!kl_div_fast<T, true, true>(x, t, g, loss, grad)) {
      loss = long_road_grads<T, true>(x, t, g);
      grad = x;
    }
    st_stream(grad_input + c * kChunk + threadIdx.x * N, grad);
    sum += double(loss);
  }

  // Less than a chunk is left: one element a thread, spread over the grid.
  for (int64_t i = chunks * kChunk + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.n;
       i += int64_t(gridDim.x) * kThreads) {
    const Point r = point<T, false, true>(ld_one(input + i), ld_one(target + i), g);
    sum += double(r.loss);
    st_one(grad_input + i, r.grad_input);
  }
  sum = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
#endif
}

}  // namespace fxfuse
