// Writes of two matrices that hold next to no information, each element once and nothing read but vectors:
//   dx[i, k] = scale * g[i] * v[k]   (rank one)        dw[n, k] = row[k]   (one row, repeated)
//
// Both are contiguous and periodic in k, so the flat matrix is cut into periods of a whole number of rows and of
// 16-byte pieces: a thread keeps the values of one piece in registers and stores it at every period, whatever the row
// length.
#pragma once

#include "pdl.cuh"

namespace fxfuse {

constexpr int kRank1Threads = 256;

template <typename T>
struct Rank1Args {
  int64_t cols;
  int64_t period_rows, period_chunks;  // a period: rows, and 16-byte pieces
  unsigned tiles, dx_groups;           // blocks along a period; blocks (times tiles) that write dx
  int64_t dx_periods, dw_periods;      // periods that a block writes
  float scale;
  T* dx;             // [dx_rows, cols] or null
  int64_t dx_rows;
  const T* g;        // [dx_rows] at g_stride
  int64_t g_stride;
  const float* v;    // [cols]
  T* dw;             // [dw_rows, cols] or null
  int64_t dw_rows;
  const float* row;  // [cols], written by the kernel before
  T* db;             // [dw_rows] or null
  const double* g_sum;  // one number, written by the kernel before
};

// Piece `chunk` of periods [first, last) of a [rows, cols] matrix; value(row) gives the piece of a period that begins
// at `row`.
template <int UNROLL, typename T, typename Value>
__device__ __forceinline__ void write_periods(T* to, int64_t rows, const Rank1Args<T>& args, int64_t chunk,
                                              int64_t first, int64_t last, Value value) {
  constexpr int kVec = Pack<T>::N;
  const int64_t total = rows * args.cols, length = args.period_chunks * kVec;
#pragma unroll UNROLL
  for (int64_t p = first; p < last; ++p) {
    const int64_t at = p * length + chunk * kVec;
    const Pack<T> piece = value(p * args.period_rows);
    if (at + kVec <= total) {
      st_stream(to + at, piece);
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        if (at + j < total) to[at + j] = piece.at[j];
    }
  }
}

// WHOLE: rows are a whole number of pieces, so that a piece lies in one row. A block writes kRank1Threads pieces of a
// few periods of one matrix; the blocks of dx come first and wait for nothing.
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kRank1Threads) rank1_kernel(Rank1Args<T> args) {
  constexpr int kVec = Pack<T>::N;
  const unsigned group = blockIdx.x / args.tiles, tile = blockIdx.x - group * args.tiles;
  const int64_t chunk = int64_t(tile) * kRank1Threads + threadIdx.x;
  const bool mine = chunk < args.period_chunks;
  const int64_t first_row = args.period_rows == 1 ? 0 : chunk * kVec / args.cols;
  int64_t column = chunk * kVec - first_row * args.cols;
  if (group < args.dx_groups) {
    if (!mine) return;
    float v[kVec];
    int row[kVec];  // of each element, past first_row
    int past = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j, ++column) {
      if (!WHOLE && column == args.cols) column = 0, ++past;
      v[j] = args.v[column], row[j] = past;
    }
    const int64_t first = int64_t(group) * args.dx_periods, end = ceil_div(args.dx_rows, args.period_rows);
    const int64_t last = min(first + args.dx_periods, end);
    write_periods<(WHOLE ? 4 : 1)>(args.dx, args.dx_rows, args, chunk, first, last, [&](int64_t begin) {
      Pack<T> piece;
      float g = 0;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (j == 0 || (!WHOLE && row[j] != row[j - 1])) {
          const int64_t i = min(begin + first_row + row[j], args.dx_rows - 1);
          g = args.scale * to_float(args.g[i * args.g_stride]);
        }
        piece.set(j, g * v[j]);
      }
      return piece;
    });
    return;
  }
  pdl_wait();
  if (args.dw != nullptr && mine) {
    Pack<T> piece;
#pragma unroll
    for (int j = 0; j < kVec; ++j, ++column) {
      if (!WHOLE && column == args.cols) column = 0;
      piece.set(j, args.row[column]);
    }
    const int64_t first = int64_t(group - args.dx_groups) * args.dw_periods;
    const int64_t end = ceil_div(args.dw_rows, args.period_rows);
    write_periods<4>(args.dw, args.dw_rows, args, chunk, first, min(first + args.dw_periods, end),
                  [&](int64_t) { return piece; });
  }
  if (args.db != nullptr) {
    const float sum = float(double(args.scale) * *args.g_sum);
    const int64_t begin = int64_t(blockIdx.x - args.dx_groups * args.tiles) * kRank1Threads + threadIdx.x;
    const int64_t stride = int64_t(gridDim.x - args.dx_groups * args.tiles) * kRank1Threads;
    for (int64_t n = begin; n < args.dw_rows; n += stride) st_one(args.db + n, sum);
  }
}

// args.{period_rows, period_chunks, tiles, dx_groups, dx_periods, dw_periods} are set here. The matrices are contiguous
// and 16-byte aligned; cols and the rows of those that are not null are at least 1. `overlap`: the kernel launched just
// before on this stream computes args.row and args.g_sum.
template <typename T>
inline cudaError_t launch_rank1(const DeviceProps& props, Rank1Args<T> args, bool overlap, cudaStream_t stream) {
  constexpr int kVec = Pack<T>::N;
  constexpr int64_t kPeriods = 4;  // of a block, at most: few enough that stores run through memory in order
  args.period_rows = 1;
  while (args.period_rows * args.cols % kVec != 0) args.period_rows *= 2;
  args.period_chunks = args.period_rows * args.cols / kVec;
  if (args.period_chunks < 2 * kRank1Threads) {  // short rows: longer periods keep all lanes busy
    const int64_t more = 4 * kRank1Threads / args.period_chunks;
    args.period_rows *= more;
    args.period_chunks *= more;
  }
  args.tiles = unsigned(ceil_div(args.period_chunks, int64_t(kRank1Threads)));
  const int64_t fill = int64_t(8) * props.sm_count;  // blocks that run at once
  const auto split = [&](int64_t rows, int64_t& periods) {
    const int64_t all = ceil_div(rows, args.period_rows);
    periods = max(int64_t(1), min(kPeriods, all * args.tiles / fill));
    return unsigned(ceil_div(all, periods));
  };
  args.dx_groups = args.dx != nullptr ? split(args.dx_rows, args.dx_periods) : 0;
  unsigned dw_groups = args.dw != nullptr ? split(args.dw_rows, args.dw_periods) : 0;
  if (dw_groups == 0 && args.db != nullptr) dw_groups = 1;
  const unsigned blocks = (args.dx_groups + dw_groups) * args.tiles;
  if (blocks == 0) return cudaSuccess;
  const auto kernel = args.cols % kVec == 0 ? rank1_kernel<T, true> : rank1_kernel<T, false>;
  return launch(props, overlap, kernel, blocks, kRank1Threads, 0, stream, args);
}

}  // namespace fxfuse
