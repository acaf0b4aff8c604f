// kl_div with the gradient of its input in the same pass, on Hopper: the loads are the copy engine's.
//
// Every block has a ring of slots in shared memory, a chunk of input and target in each, filled in order in long copies;
// the last warp to take its packs from a slot has it filled again. What is on its way does not depend on how far the
// arithmetic is, and takes no registers. Bytes moved: two reads and one write an element.
#pragma once

#include "kl_div_pack.cuh"
#include "sm90.cuh"

namespace fxfuse {

template <typename T, bool LOG_INPUT, int THREADS, int BLOCKS, int PACKS, int SLOTS>
__global__ void __launch_bounds__(THREADS, BLOCKS) kl_div_ring_kernel(KlDivArgs a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int N = Pack<T>::N, kWarps = THREADS / kWarp, kPacks = THREADS * PACKS, kChunk = kPacks * N;
  extern __shared__ __align__(128) uint4 ring[];  // SLOTS of kPacks of the input, then of the target
  __shared__ alignas(8) uint64_t landed[SLOTS];
  __shared__ int takers[SLOTS];
  __shared__ double shared[kWarps];
  const T* const input = static_cast<const T*>(a.input);
  const T* const target = static_cast<const T*>(a.target);
  T* const grad_input = static_cast<T*>(a.grad_input);
  const float g = range_as<T>(a.factor);
  const int64_t chunks = a.n / kChunk;
  const auto fill = [&](int slot, int64_t chunk) {
    mbarrier_expect(&landed[slot], 2 * kPacks * 16);
    bulk_load(ring + slot * 2 * kPacks, input + chunk * kChunk, kPacks * 16, &landed[slot]);
    bulk_load(ring + slot * 2 * kPacks + kPacks, target + chunk * kChunk, kPacks * 16, &landed[slot]);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(&landed[i], 1);
      takers[i] = 0;
    }
    mbarrier_init_fence();
    for (int i = 0; i < SLOTS; ++i)
      if (blockIdx.x + int64_t(i) * gridDim.x < chunks) fill(i, blockIdx.x + int64_t(i) * gridDim.x);
  }
  __syncthreads();

  double sum = 0;
  int slot = 0, parity = 0;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    Pack<T> x[PACKS], t[PACKS];
    mbarrier_wait(&landed[slot], parity);
    const Pack<T>* const from = reinterpret_cast<const Pack<T>*>(ring + slot * 2 * kPacks);
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      x[p] = from[p * THREADS + threadIdx.x];
      t[p] = from[kPacks + p * THREADS + threadIdx.x];
    }
    __syncwarp();  // in registers
    const int64_t next = c + int64_t(SLOTS) * gridDim.x;
    if (threadIdx.x % kWarp == 0 && last_to_take(&takers[slot], kWarps) && next < chunks) fill(slot, next);
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
    float part = 0;
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {
      float loss;
      Pack<T> grad;
      if (kl_div_fast<T, LOG_INPUT, true>(x[p], t[p], g, loss, grad)) x[p] = grad;
      else loss = long_road_grads<T, LOG_INPUT>(x[p], t[p], g);
      part += loss;
      st_stream(grad_input + c * kChunk + (p * THREADS + threadIdx.x) * N, x[p]);
    }
    sum += double(part);
  }

  // Less than a chunk is left: one element a thread, spread over the grid.
  for (int64_t i = chunks * kChunk + int64_t(blockIdx.x) * THREADS + threadIdx.x; i < a.n;
       i += int64_t(gridDim.x) * THREADS) {
    const Point r = point<T, false, LOG_INPUT>(ld_one(input + i), ld_one(target + i), g);
    sum += double(r.loss);
    st_one(grad_input + i, r.grad_input);
  }
  sum = block_sum<THREADS>(sum, shared);
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
#endif
}

}  // namespace fxfuse
