// Host side of colsum.cuh: which stripes and row ranges a matrix is cut into, and the launches.
#pragma once

#include "colsum.cuh"

namespace fxfuse {

// How a [rows, cols] matrix is summed. Where rows are contiguous but not a multiple of 16 bytes long, `merged` rows are
// read as one long row of merged * cols elements, which is; the partial sums of a long row are those of its rows. Others
// are read in phases (colsum.cuh), or element by element.
struct ColsumPlan {
  int vec, lanes;
  int64_t merged, tail;    // rows per long row; rows left over, added by fold_kernel
  int64_t stripes, splits;
  int phases = 0;          // 0: not in phases
  bool pairs = false;      // two blocks share a multiprocessor
  int64_t long_rows(int64_t rows) const {  // that a column of one range of rows or phase can have
    return phases > 0 ? ceil_div(rows, int64_t(phases)) : rows / merged;
  }
  int64_t partials() const { return splits * merged; }  // rows of [cols] that fold_kernel adds
  bool folded() const { return partials() > 1 || tail > 0; }
  int64_t scratch(int64_t cols) const { return folded() ? partials() * cols : 0; }  // float64 elements
};

constexpr double kPairBytes = 512 << 20;  // of a matrix; larger ones are read by pairs of blocks
constexpr double kBytesPerUs = 4.2e6;  // of an H200's memory; only ratios between plans matter much

inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// Stripe width and row ranges of the least estimated time, into `plan`; returns the time in microseconds.
inline double cut(const DeviceProps& props, int64_t rows, int64_t cols, int element, ColsumPlan& plan) {
  const int64_t phases = max(plan.phases, 1), sms = props.sm_count * (plan.pairs ? 2 : 1);
  const int64_t columns = plan.merged * cols + (plan.phases > 0 ? plan.vec - 1 : 0);
  const int64_t least_splits = ceil_div(max(plan.long_rows(rows), int64_t(1)), int64_t(1) << 30);  // rows fit an int
  const double narrow = plan.vec == 1 ? 3.0 : 1.0;  // single elements keep less memory in flight
  double least = -1;
  for (const int lanes : {16, 32, 8}) {
    if ((plan.vec == 1 && lanes != 32) || (plan.pairs && lanes == 8)) continue;
    const int64_t stripes = ceil_div(max(columns, int64_t(1)), int64_t(lanes) * plan.vec);
    const int64_t unroll = plan.pairs ? kPairUnroll : kColsumUnroll;
    const int64_t batch = unroll * (kColsumThreads / lanes);  // rows that a block has in flight
    const int64_t most = max(int64_t(1), min(int64_t(sms), plan.long_rows(rows) / batch));
    for (int64_t ranges = least_splits; ranges <= max(least_splits, most); ++ranges) {
      const int64_t splits = ranges * phases, blocks = stripes * splits;
      // Multiprocessors (or halves) share the memory evenly, and the last has most blocks; 7 of 8 saturate it.
      const double rounds = double(ceil_div(blocks, sms) * sms) / double(blocks);
      const double waste = blocks <= sms ? max(1.0, 0.875 * rounds) : rounds;
      const double read_us = double(rows) * double(cols) * element / kBytesPerUs * waste * narrow +
                             double(ceil_div(blocks, sms));  // and a microsecond for each block's start and end
      const bool folded = splits * plan.merged + plan.tail > 1;
      const double fold_us = folded ? 2.0 + double(splits) * double(columns) * 16 / kBytesPerUs : 0;
      if (least < 0 || read_us + fold_us < 0.98 * least) {
        least = read_us + fold_us;
        plan.lanes = lanes, plan.stripes = stripes, plan.splits = splits;
      }
      if (blocks > 16 * sms) break;
    }
  }
  return least;
}

// `element` is the size of T in bytes. A weighted sum keeps to one row at a time: the weight is one per access.
inline ColsumPlan plan_colsum(const DeviceProps& props, const void* a, int64_t rows, int64_t cols, int64_t ld,
                              int element, bool weighted) {
  constexpr int64_t kNarrow = 64;  // accesses per row under which rows are merged, so that lanes are not idle
  ColsumPlan plan = {16 / element, 16, 1, 0, 1, 1};
  const bool whole = ld == cols && !weighted;
  if (whole && aligned16(a)) {
    const int64_t period = plan.vec / gcd(cols, plan.vec);
    plan.merged = period;
    if (period * cols < kNarrow * plan.vec) plan.merged *= ceil_div(kNarrow * plan.vec, period * cols);
    if (plan.merged > rows) plan.merged = period <= rows ? rows / period * period : 1;
  }
  if (!aligned16(a) || (plan.merged * ld) % plan.vec != 0 || (plan.merged * cols) % plan.vec != 0) {
    plan.vec = 1;
    plan.merged = 1;
  }
  const bool pieces = plan.vec > 1;
  plan.tail = rows % plan.merged;
  plan.pairs = pieces && double(rows) * double(cols) * element > kPairBytes;
  const double time = cut(props, rows, cols, element, plan);
  if (!pieces) {
    ColsumPlan phased = {16 / element, 16, 1, 0, 1, 1};
    phased.phases = phased.vec / int(gcd(ld, phased.vec));
    if (cut(props, rows, cols, element, phased) < time) return phased;
  }
  if (plan.merged > 1) {  // a small matrix is sooner done element by element than merged and folded
    ColsumPlan single = {1, 32, 1, 0, 1, 1};
    if (cut(props, rows, cols, element, single) < time) return single;
  }
  return plan;
}

template <typename T, int VEC, int LANES, int UNROLL, bool WEIGHTED, bool PHASED>
inline cudaError_t launch_colsum_kernel(const DeviceProps& props, const ColsumArgs<T>& args, unsigned grid,
                                        cudaStream_t stream) {
  constexpr auto kKernel = colsum_kernel<T, VEC, LANES, UNROLL, WEIGHTED, PHASED>;
  const cudaError_t error = prepare_shared_memory<kKernel>(0);
  if (error != cudaSuccess) return error;
  return launch(props, true, kKernel, grid, kColsumThreads, 0, stream, args);
}

template <typename T, bool WEIGHTED, bool PHASED>
inline cudaError_t launch_colsum_lanes(const DeviceProps& props, const ColsumPlan& plan, const ColsumArgs<T>& args,
                                       unsigned grid, cudaStream_t stream) {
  constexpr int kVec = Pack<T>::N, kOne = kColsumUnroll, kTwo = kPairUnroll;
  if constexpr (!PHASED) {
    if (plan.pairs && plan.lanes == 16)
      return launch_colsum_kernel<T, kVec, 16, kTwo, WEIGHTED, false>(props, args, grid, stream);
    if (plan.pairs) return launch_colsum_kernel<T, kVec, 32, kTwo, WEIGHTED, false>(props, args, grid, stream);
  }
  if (plan.lanes == 8) return launch_colsum_kernel<T, kVec, 8, kOne, WEIGHTED, PHASED>(props, args, grid, stream);
  if (plan.lanes == 16) return launch_colsum_kernel<T, kVec, 16, kOne, WEIGHTED, PHASED>(props, args, grid, stream);
  return launch_colsum_kernel<T, kVec, 32, kOne, WEIGHTED, PHASED>(props, args, grid, stream);
}

// Fills `args` from the plan and launches; `partial` holds plan.scratch(cols) elements. rows may be 0. `lead` is the
// part of the matrix, from 0 to 1, that is still to be read when the next kernel may start.
template <typename T, bool WEIGHTED>
inline cudaError_t launch_colsum(const DeviceProps& props, const ColsumPlan& plan, ColsumArgs<T> args, double lead,
                                 double* partial, cudaStream_t stream) {
  const int64_t rows = args.rows, cols = args.cols;
  float* out = args.out;
  args.phases = max(plan.phases, 1);
  args.rows = plan.phases > 0 ? rows : plan.long_rows(rows);
  args.cols = cols * plan.merged;
  args.ld *= plan.merged;
  args.rows_per_split = int(ceil_div(max(plan.long_rows(rows), int64_t(1)), plan.splits / args.phases));
  args.release_rows = int(lead * args.rows_per_split);
  args.stripes = cols > 0 ? unsigned(plan.stripes) : 0;
  args.splits = unsigned(plan.splits);
  args.out = plan.folded() ? nullptr : out;
  args.partial = partial;
  const unsigned grid = args.stripes * args.splits + (args.extra_sum != nullptr);
  if (grid == 0) return cudaSuccess;
  cudaError_t error;
  constexpr int kSingles = 2 * kColsumUnroll;
  if (plan.vec == 1) error = launch_colsum_kernel<T, 1, 32, kSingles, WEIGHTED, false>(props, args, grid, stream);
  else if (plan.phases > 0) error = launch_colsum_lanes<T, WEIGHTED, true>(props, plan, args, grid, stream);
  else error = launch_colsum_lanes<T, WEIGHTED, false>(props, plan, args, grid, stream);
  if (error != cudaSuccess || !plan.folded() || cols == 0) return error;
  const T* tail = args.a + (rows - plan.tail) * cols;
  return launch(props, true, fold_kernel<T>, unsigned(ceil_div(cols, int64_t(kWarp))), 1024, 0, stream,
                static_cast<const double*>(partial), plan.partials(), cols, tail, int(plan.tail), args.scale, out);
}

}  // namespace fxfuse
