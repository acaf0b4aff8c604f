// What the blocks of a GEMM know: the problem, by value in constant memory, and the layout of their shared memory.
#pragma once

#include "behind.cuh"
#include "scheduler.cuh"

namespace fxfuse::hopper {

constexpr int kThreads = 3 * kWarpgroup;
constexpr int kColumnThreads = kWarpgroup - kWarp;
constexpr int64_t kMostTrainRows = int64_t(1) << 30;  // whose numbers are exact enough, and ints
constexpr int kBehindBand = 3;  // columns of tiles, where all of them are normalised behind
constexpr int kLongProduct = 64;  // blocks of K; of measured ones 64 pay, 16 do not

template <typename Mainloop, typename Writer, typename Epilogue>
struct SharedLayout {
  static constexpr int kStaging = Mainloop::kSharedBytes;  // after the stages
  static constexpr int kColumns = kStaging + Mainloop::kConsumers * Writer::kSharedBytes;
  static constexpr int kBarriers = kColumns + Mainloop::kBlockN * int(sizeof(float2));  // a column's two numbers
  static constexpr int kColumnsFull = kBarriers + Mainloop::Pipeline::kBarrierBytes;  // mbarriers: the numbers are there
  static constexpr int kColumnsEmpty = kColumnsFull + 8;  // and have been read
  static constexpr int kThrough = kColumnsEmpty + 8;      // the consumers' warps that read no more counters
  static constexpr int kLaid = kThrough + 8;              // those whose rows of the last tile are in shared memory
  static constexpr int kBehind = kLaid + 8;
  static constexpr int kBytes = kBehind + int(sizeof(BehindState));
  static_assert(kBytes <= 227 * 1024, "more shared memory than a block can have");
};

// Numbers that every block needs, by value in constant memory.
template <typename Mainloop, typename Epilogue>
struct Problem {
  TileOrder order;
  int rows;      // M
  int columns;   // N
  int k_blocks;  // of Mainloop::kBlockK
  int behind;    // the statistics of tiles under this one are merged behind the tensor cores (behind.cuh)
  const void* acc;  // where those are read, and where they go
  void* out;
  typename Epilogue::Params epilogue;
  typename Mainloop::Params mainloop;
};

}  // namespace fxfuse::hopper
