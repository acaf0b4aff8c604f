// Mainloop policies: how a block's product of a tile of A (M x K) and a tile of B (N x K) comes about.
//
// A policy owns its shared-memory stages and all sides of the ring: `produce` (one thread), `consume` (a warpgroup) and,
// where kPrepares, `prepare` (the producer's other three warps). A consumer warpgroup has kHalves times 64 rows of the tile,
// those from `row` on. `repair` may replace accumulators in the end. The kernel around a policy knows neither the arithmetic
// nor the layout, so another arithmetic is another policy.
#pragma once

#include "ring.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

#include <type_traits>

namespace fxfuse::hopper {

// One product. Leading dimensions in elements. The caller has checked alignment (16-byte bases and pitches).
struct Operands {
  const void *a, *b;
  void* out;
  int64_t m, n, k;
  int64_t pitch_a, pitch_b, pitch_out;
  void* kept = nullptr;  // the bare product, as out, where the epilogue keeps it
};

// What a consumer has to do while a product is under way: here, nothing.
struct Nothing {
  __device__ __forceinline__ void operator()() const {}
};

template <typename Element> struct TensorMapType;
template <> struct TensorMapType<__nv_bfloat16> {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static constexpr int kBytes = 2;
};
template <> struct TensorMapType<__half> {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static constexpr int kBytes = 2;
};
template <> struct TensorMapType<float> {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  static constexpr int kBytes = 4;
};
template <> struct TensorMapType<TF32> {  // the copy engine rounds to nearest on the way in
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  static constexpr int kBytes = 4;
};

// One tensor-core product per step, accumulated in place over the whole of K.
//
// ELEMENT: __nv_bfloat16, __half or TF32. A block's tile is 128 x BN, 64 rows for each of two consumer warpgroups; a stage
// holds 128 bytes of K. CLUSTER blocks below each other share their tile of B: each loads its part and multicasts it.
//
// A_ALONG_M: A lies as [K, M] in memory; B_ALONG_N: B as [K, N]. Of 16-bit elements only.
//
// The second warpgroup starts STAGGER stages after the first and stays behind: while one writes its tile, the other still
// feeds the tensor cores.
template <typename ELEMENT, int BN, int STAGES, int CLUSTER, bool A_ALONG_M = false, bool B_ALONG_N = false,
          int STAGGER = 0>
struct DirectMainloop {
  using Element = ELEMENT;
  struct Params {};
  static constexpr int kHalves = 1;
  static constexpr bool kPrepares = false;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;  // of 64,512 for 128 and 256 threads
  static constexpr int kBlockM = 128, kBlockN = BN, kConsumers = 2, kCluster = CLUSTER;
  static constexpr int kElementBytes = TensorMapType<Element>::kBytes, kInstructionK = kInstructionBytes / kElementBytes;
  static constexpr int kBlockK = kRowBytes / kElementBytes;
  static constexpr int kBoxRowsA = kBlockM, kBoxRowsB = BN / CLUSTER;
  static constexpr int kBoxColumns = kBlockK, kBoxBytes = kBlockK * kRowBytes;  // of an operand that lies along M or N
  static constexpr int kStepA = A_ALONG_M ? kInstructionK * kRowBytes : kInstructionBytes;  // in a stage, of an instruction
  static constexpr int kStepB = B_ALONG_N ? kInstructionK * kRowBytes : kInstructionBytes;
  static constexpr int kBytesA = kBlockM * kRowBytes, kBytesB = BN * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kBytesB;
  static constexpr int kSharedBytes = STAGES * kStageBytes;
  static constexpr int kAccumulators = BN / 2;  // per thread
  static constexpr int kStages = STAGES, kStaggerBarrier = 3;
  static constexpr int kSoon = 8;  // blocks of K after which a tile's stores have long arrived
  using Pipeline = Ring<STAGES, kConsumers, CLUSTER>;

  static cudaError_t tensor_maps(CUtensorMap* a, CUtensorMap* b, const Operands& p) {
    using In = TensorMapType<Element>;
    const cudaError_t error = A_ALONG_M ? make_tensor_map(a, In::kType, In::kBytes, p.a, p.k, p.m, p.pitch_a, kBlockK)
                                        : make_tensor_map(a, In::kType, In::kBytes, p.a, p.m, p.k, p.pitch_a, kBoxRowsA);
    if (error != cudaSuccess) return error;
    return B_ALONG_N ? make_tensor_map(b, In::kType, In::kBytes, p.b, p.k, p.n, p.pitch_b, kBlockK)
                     : make_tensor_map(b, In::kType, In::kBytes, p.b, p.n, p.k, p.pitch_b, kBoxRowsB);
  }
  static Params params(const Operands&) { return {}; }
  static __device__ __forceinline__ int row(int consumer, int) { return consumer * kInstructionM; }
  static __device__ __forceinline__ void repair(const Params&, float (&)[1][kAccumulators], int, int, int, int) {}

  // Has the copy engine bring every K block of rows m.. of A and n.. of B.
  static __device__ __forceinline__ void produce(Pipeline& ring, uint32_t shared, const CUtensorMap* a, const CUtensorMap* b,
                                                 int m, int n, int blocks, uint32_t rank) {
#pragma unroll 1
    for (int k = 0; k < blocks; ++k, ring.advance()) {
      const uint32_t full = ring.acquire(kStageBytes);
      const uint32_t stage = shared + ring.stage() * kStageBytes;
      if constexpr (A_ALONG_M) {
#pragma unroll
        for (int i = 0; i < kBlockM / kBoxColumns; ++i) tma_load(stage + i * kBoxBytes, a, full, m + i * kBoxColumns, k * kBlockK);
      } else {
        tma_load(stage, a, full, k * kBlockK, m);
      }
      const int first = int(rank) * kBoxRowsB;  // of the block's part of B
      const auto load_b = [&](int at, int column, int row) {
        if constexpr (CLUSTER == 1) tma_load(stage + kBytesA + at, b, full, column, row);
        else tma_load_multicast(stage + kBytesA + at, b, full, column, row, uint16_t((1 << CLUSTER) - 1));
      };
      if constexpr (B_ALONG_N) {
#pragma unroll
        for (int i = 0; i < kBoxRowsB; i += kBoxColumns) load_b((first + i) * kRowBytes, n + first + i, k * kBlockK);
      } else {
        load_b(first * kRowBytes, k * kBlockK, n + first);
      }
    }
  }

  // acc = this warpgroup's 64 rows of the tile; `first` at a block's first tile. A stage is let go of one step late, so that
  // the tensor cores always have the next batch waiting. `meanwhile` is called once, a few blocks into the product.
  template <typename Meanwhile>
  static __device__ __forceinline__ void consume(const Params&, Pipeline& ring, uint32_t shared,
                                                 float (&accumulators)[1][kAccumulators], int, int, int blocks,
                                                 int warpgroup, int thread, bool first, const Meanwhile& meanwhile) {
    float(&acc)[kAccumulators] = accumulators[0];
    const int start_other = STAGGER > 0 && first ? (blocks < STAGGER ? blocks : STAGGER) - 1 : -1;
    if (STAGGER > 0 && first && warpgroup == 1) named_barrier<2 * kWarpgroup>(kStaggerBarrier);
    const auto describe = [](uint32_t at, bool across) {
      return across ? matrix_descriptor_across(at, kBlockK) : matrix_descriptor(at);
    };
    const uint64_t a = describe(shared + warpgroup * kInstructionM * kRowBytes, A_ALONG_M);
    const uint64_t b = describe(shared + kBytesA, B_ALONG_N);
    int previous = 0;
    const auto multiply = [&](int from, int to) {
#pragma unroll 2
      for (int k = from; k < to; ++k, ring.advance()) {
        const uint64_t offset = ring.stage() * (kStageBytes >> 4);
        ring.wait_filled();
        wgmma_pin(acc);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRowBytes / kInstructionBytes; ++step) {
          const uint64_t at_a = a + offset + step * (kStepA >> 4), at_b = b + offset + step * (kStepB >> 4);
          Wgmma<Element>::template multiply<A_ALONG_M, B_ALONG_N>(acc, at_a, at_b, k > 0 || step > 0);
        }
        wgmma_commit();
        wgmma_pin(acc);
        wgmma_wait<1>();
        if (STAGGER > 0 && k == start_other && warpgroup == 0) named_barrier_arrive<2 * kWarpgroup>(kStaggerBarrier);
        if (k > 0) ring.release(previous, thread);
        previous = ring.stage();
      }
    };
    if constexpr (std::is_same_v<Meanwhile, Nothing>) {
      multiply(0, blocks);
    } else {
      const int soon = min(kSoon, blocks);
      multiply(0, soon);
      meanwhile();
      multiply(soon, blocks);
    }
    wgmma_wait<0>();
    wgmma_pin(acc);
    ring.release(previous, thread);
  }
};

}  // namespace fxfuse::hopper
