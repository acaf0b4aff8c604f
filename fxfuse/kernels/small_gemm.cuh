// Products of few rows, with everything that stands behind them, in one launch.
//
// acc[m, n] = sum_k x[m, k] W[n, k], then an epilogue on acc while it is in shared memory; out is written once. Bytes
// moved: W once for each block row, x once for each block column (from L2), out once. What such a product takes is
// latency, not work, so
//   - tiles are narrow: many blocks, each with little to fetch;
//   - the warps of a block share out K (WK of them) besides rows and columns; their sums meet in shared memory and are
//     added in a fixed order, so the same input gives the same bits;
//   - rows come by cp.async, several stages ahead, and the columns' numbers are fetched under the first of them.
// Rows lie 16 bytes apart from a multiple of 128 in shared memory, which keeps both ldmatrix and 16-byte reads free of
// bank conflicts. A step of K is 32 bytes for the tensor cores, 16 of float16 or bfloat16 and 8 of TF32: ldmatrix moves
// bytes, so the fragments of all three lie alike. float32 proper takes multiply-adds on the ordinary pipes.
#pragma once

#include "pdl.cuh"
#include "sm90.cuh"

#include <type_traits>

namespace fxfuse::small {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// x[m, k] and weight[n, k] with rows pitch elements apart, K contiguous; out[m, n] contiguous.
struct Operands {
  const void *x, *weight;
  void* out;
  int64_t m, n, k, pitch_x, pitch_w;
  int out_code;  // DType of out
};

// How numbers multiply: Stored is what lies in memory.
struct Half {
  using Stored = __half;
  static constexpr bool kTensor = true, kFast = true;
  static __device__ __forceinline__ uint32_t operand(uint32_t x) { return x; }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct BFloat {
  using Stored = __nv_bfloat16;
  static constexpr bool kTensor = true, kFast = true;
  static __device__ __forceinline__ uint32_t operand(uint32_t x) { return x; }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct Tf32 {
  using Stored = float;
  static constexpr bool kTensor = true, kFast = true;
  static __device__ __forceinline__ uint32_t operand(uint32_t x) {  // to nearest: the tensor core would cut off
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
    return y;
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct Ieee {
  using Stored = float;
  static constexpr bool kTensor = false, kFast = false;
};

// A block's BM x BN results, computed by WM x WN x WK warps; a stage holds KB bytes of each row for each of the WK.
template <int BM_, int BN_, int WM_, int WN_, int WK_, int KB_, int STAGES_>
struct Tile {
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, WK = WK_, KB = KB_, STAGES = STAGES_;
  static constexpr int kRow = KB * WK, kPitch = kRow + 16, kStage = (BM + BN) * kPitch;  // bytes
  static constexpr int kWarpM = BM / WM, kWarpN = BN / WN;
  static constexpr int kSumPitch = BN + 1;  // floats
  static constexpr int kSums = WK * BM * kSumPitch * 4;
  static constexpr int kBytes = STAGES * kStage > kSums ? STAGES * kStage : kSums;
  static constexpr int kRows = BM * BN / kThreads;   // results of a thread, all of one column,
  static constexpr int kRowStep = kThreads / BN;     // so many rows apart
  static_assert(WM * WN * WK == kWarps && kWarpM % 16 == 0 && kWarpN % 16 == 0 && KB % 32 == 0 && kRow % 128 == 0);
};

// The results a thread finishes: rows first + i * Tile::kRowStep of one column.
struct Place {
  int64_t column;
  int lane;      // of the block's columns
  int first;     // row within the block
  int rows;      // of the block that exist
  bool inside;   // whether the column does
};

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// 16 bytes to shared memory of which the first `bytes` come from global memory and the others are 0.
__device__ __forceinline__ void async_load(uint32_t shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Fetches a stage: rows of x, then rows of W, `Tile::kRow` bytes of each.
template <typename Tile, typename T>
struct Loader {
  static constexpr int kChunks = Tile::kRow / 16, kAtOnce = kThreads / kChunks;
  static constexpr int kSteps = (Tile::BM + Tile::BN + kAtOnce - 1) / kAtOnce;
  static constexpr int kEach = 16 / int(sizeof(T));
  const T* row[kSteps];  // null: outside the matrix
  const void* base;
  int64_t k;
  int first;             // element of this thread's chunk within a stage
  uint32_t shared;
  char* generic;
  bool aligned;

  __device__ __forceinline__ Loader(const Operands& o, char* memory, int64_t m0, int64_t n0, bool aligned_)
      : base(o.x), k(o.k), aligned(aligned_) {
    const int chunk = threadIdx.x % kChunks, r0 = threadIdx.x / kChunks;
    first = chunk * kEach;
    generic = memory + r0 * Tile::kPitch + chunk * 16;
    shared = shared_address(generic);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int r = r0 + i * kAtOnce;
      const int64_t m = m0 + r, n = n0 + r - Tile::BM;
      row[i] = nullptr;
      if (r < Tile::BM) {
        if (m < o.m) row[i] = static_cast<const T*>(o.x) + m * o.pitch_x;
      } else if (r < Tile::BM + Tile::BN && n < o.n) {
        row[i] = static_cast<const T*>(o.weight) + n * o.pitch_w;
      }
    }
  }

  __device__ __forceinline__ void fetch(int64_t step, int slot) const {
    const int64_t at = step * (Tile::kRow / int(sizeof(T))) + first;
    const int64_t left = k - at;
    const int count = left <= 0 ? 0 : left < kEach ? int(left) : kEach;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if ((i + 1) * kAtOnce > Tile::BM + Tile::BN && threadIdx.x / kChunks + i * kAtOnce >= Tile::BM + Tile::BN) continue;
      const int offset = slot * Tile::kStage + i * kAtOnce * Tile::kPitch;
      const int elements = row[i] == nullptr ? 0 : count;
      if (aligned) {
        const void* const from = elements == 0 ? base : row[i] + at;  // an address that exists, read or not
        async_load(shared + offset, from, elements * int(sizeof(T)));
      } else {
        Pack<T> v;
        v.raw = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (j < elements) v.at[j] = row[i][at + j];
        *reinterpret_cast<uint4*>(generic + offset) = v.raw;
      }
    }
  }
};

// A warp's accumulators over its share of K, by the tensor cores or by multiply-adds.
template <typename Tile, typename Kind, bool TENSOR = Kind::kTensor>
struct Accumulators {
  static constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
  float d[kM][kN][4] = {};

  // a, b: shared addresses of the warp's first row of x and of W in this stage, at its share of K.
  __device__ __forceinline__ void add(const char* a, const char* b) {
    const int lane = threadIdx.x % kWarp;
    const uint32_t left = shared_address(a) + (lane % 16) * Tile::kPitch + lane / 16 * 16;
    const uint32_t right = shared_address(b) + (lane % 8 + lane / 16 * 8) * Tile::kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < Tile::KB; k += 32) {
      uint32_t x[kM][4], w[kN / 2][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) load_matrices(x[i], left + i * 16 * Tile::kPitch + k);
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) load_matrices(w[j], right + j * 16 * Tile::kPitch + k);
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) x[i][r] = Kind::operand(x[i][r]);
#pragma unroll
      for (int j = 0; j < kN / 2; ++j) {
        const uint32_t low[2] = {Kind::operand(w[j][0]), Kind::operand(w[j][1])};
        const uint32_t high[2] = {Kind::operand(w[j][2]), Kind::operand(w[j][3])};
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          Kind::mma(d[i][2 * j], x[i], low);
          Kind::mma(d[i][2 * j + 1], x[i], high);
        }
      }
    }
  }
  __device__ __forceinline__ void store(float* sums) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          sums[(16 * i + lane / 4 + 8 * (r / 2)) * Tile::kSumPitch + 8 * j + 2 * (lane % 4) + r % 2] = d[i][j][r];
  }
};

template <typename Tile, typename Kind>
struct Accumulators<Tile, Kind, false> {  // lanes: 8 rows x 4 columns, each with every eighth row and every fourth column
  static constexpr int kM = Tile::kWarpM / 8, kN = Tile::kWarpN / 4;
  float d[kM][kN] = {};

  // A stage is summed by itself, in small tiles along four chains: as exact as a library's product of one row, which
  // hundreds of threads share out.
  static constexpr int kChains = kM * kN <= 8 ? 4 : 1;

  __device__ __forceinline__ void add(const char* a, const char* b) {
    float part[kM][kN][kChains] = {};
    const int lane = threadIdx.x % kWarp;
    const char* left = a + lane / 4 * Tile::kPitch;
    const char* right = b + lane % 4 * Tile::kPitch;
#pragma unroll 2
    for (int k = 0; k < Tile::KB; k += 16) {
      float4 x[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) x[i] = *reinterpret_cast<const float4*>(left + i * 8 * Tile::kPitch + k);
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const float4 w = *reinterpret_cast<const float4*>(right + j * 4 * Tile::kPitch + k);
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          part[i][j][0 % kChains] = fmaf(x[i].x, w.x, part[i][j][0 % kChains]);
          part[i][j][1 % kChains] = fmaf(x[i].y, w.y, part[i][j][1 % kChains]);
          part[i][j][2 % kChains] = fmaf(x[i].z, w.z, part[i][j][2 % kChains]);
          part[i][j][3 % kChains] = fmaf(x[i].w, w.w, part[i][j][3 % kChains]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if constexpr (kChains == 4) d[i][j] += (part[i][j][0] + part[i][j][1]) + (part[i][j][2] + part[i][j][3]);
        else d[i][j] += part[i][j][0];
      }
  }
  __device__ __forceinline__ void store(float* sums) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j) sums[(8 * i + lane / 4) * Tile::kSumPitch + 4 * j + lane % 4] = d[i][j];
  }
};

// Epilogue::Column column(n) is fetched early; finish<Tile>(v, column, place, shared) turns a thread's sums into results.
template <typename Tile, typename Kind, typename Epilogue>
__global__ void __launch_bounds__(kThreads) small_gemm_kernel(const Operands o, const Epilogue epilogue, const bool aligned) {
  using T = typename Kind::Stored;
  extern __shared__ __align__(128) char memory[];
  const int64_t n0 = int64_t(blockIdx.x) * Tile::BN, m0 = int64_t(blockIdx.y) * Tile::BM;
  const int warp = threadIdx.x / kWarp;
  const int wk = warp % Tile::WK, wn = warp / Tile::WK % Tile::WN, wm = warp / Tile::WK / Tile::WN;
  const Loader<Tile, T> loader(o, memory, m0, n0, aligned);
  const int64_t steps = ceil_div<int64_t>(o.k, Tile::kRow / int(sizeof(T)));

#pragma unroll
  for (int s = 0; s < Tile::STAGES - 1; ++s) {
    if (s < steps) loader.fetch(s, s);
    async_commit();
  }
  Place place;
  place.lane = threadIdx.x % Tile::BN;
  place.column = n0 + place.lane;
  place.first = threadIdx.x / Tile::BN;
  place.rows = int(min(int64_t(Tile::BM), o.m - m0));
  place.inside = place.column < o.n;
  typename Epilogue::Column column{};
  if (place.inside) column = epilogue.column(place.column);

  Accumulators<Tile, Kind> acc;
  int slot = 0, next = Tile::STAGES - 1;
  for (int64_t s = 0; s < steps; ++s) {
    async_wait<Tile::STAGES - 2>();
    __syncthreads();
    if (s + Tile::STAGES - 1 < steps) loader.fetch(s + Tile::STAGES - 1, next);
    async_commit();
    const char* stage = memory + slot * Tile::kStage + wk * Tile::KB;
    acc.add(stage + wm * Tile::kWarpM * Tile::kPitch, stage + (Tile::BM + wn * Tile::kWarpN) * Tile::kPitch);
    if (++slot == Tile::STAGES) slot = 0;
    if (++next == Tile::STAGES) next = 0;
  }
  async_wait<0>();
  __syncthreads();

  float* sums = reinterpret_cast<float*>(memory);
  acc.store(sums + (wk * Tile::BM + wm * Tile::kWarpM) * Tile::kSumPitch + wn * Tile::kWarpN);
  __syncthreads();
  float v[Tile::kRows];
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const float* at = sums + (place.first + i * Tile::kRowStep) * Tile::kSumPitch + place.lane;
    v[i] = at[0];
#pragma unroll
    for (int w = 1; w < Tile::WK; ++w) v[i] += at[w * Tile::BM * Tile::kSumPitch];
  }
  epilogue.template finish<Tile>(v, column, place, sums);
  if (!place.inside) return;
#pragma unroll
  for (int i = 0; i < Tile::kRows; ++i) {
    const int row = place.first + i * Tile::kRowStep;
    if (row >= place.rows) break;
    const int64_t at = (m0 + row) * o.n + place.column;
    if (sizeof(T) == 2 && o.out_code == kFloat32) static_cast<float*>(o.out)[at] = v[i];
    else st_one(static_cast<T*>(o.out) + at, v[i]);
  }
}

template <typename Tile, typename Kind, typename Epilogue>
cudaError_t launch_tile(const Operands& o, const Epilogue& epilogue, cudaStream_t stream) {
  using T = typename Kind::Stored;
  constexpr int kEach = 16 / int(sizeof(T));
  const bool aligned = aligned16(o.x) && aligned16(o.weight) && (o.m <= 1 || o.pitch_x % kEach == 0) &&
                       (o.n <= 1 || o.pitch_w % kEach == 0);
  const int64_t across = ceil_div<int64_t>(o.n, Tile::BN), down = ceil_div<int64_t>(o.m, Tile::BM);
  if (across > 0x7fffffff || down > 65535) return cudaErrorInvalidValue;
  const cudaError_t error = prepare_shared_memory<&small_gemm_kernel<Tile, Kind, Epilogue>>(Tile::kBytes);
  if (error != cudaSuccess) return error;
  small_gemm_kernel<Tile, Kind, Epilogue>
      <<<dim3(unsigned(across), unsigned(down)), kThreads, Tile::kBytes, stream>>>(o, epilogue, aligned);
  return cudaGetLastError();
}

//                     rows columns  warps: m n k   K bytes, stages
using Few = Tile<16, 16, 1, 1, 8, 64, 4>;
using Narrow = Tile<32, 16, 1, 1, 8, 64, 4>;
using Some = Tile<32, 32, 1, 1, 8, 64, 4>;
// Multiply-adds want longer stages: their sums are taken stage by stage.
template <typename Kind>
using Many = std::conditional_t<Kind::kTensor, Tile<64, 32, 2, 1, 4, 64, 4>, Tile<64, 32, 2, 1, 4, 128, 3>>;
template <typename Kind>
using Square = std::conditional_t<Kind::kTensor, Tile<64, 64, 2, 2, 2, 64, 4>, Tile<64, 64, 2, 2, 2, 128, 4>>;
// All rows of the batch in one block, for statistics of whole columns.
using Rows64 = Tile<64, 16, 2, 1, 4, 64, 4>;
using Rows128 = Tile<128, 16, 4, 1, 2, 64, 4>;
using Rows256 = Tile<256, 16, 8, 1, 1, 128, 4>;
using Rows256Wide = Tile<256, 32, 8, 1, 1, 128, 4>;
constexpr int64_t kMostRows = 256;

// The smallest tile of which all run at once: a block takes as long as its own rows take to come, so smaller tiles end
// sooner, but not where some have to wait. small_rule.py repeats this choice to tell how long it takes.
template <typename Kind, typename Epilogue>
cudaError_t launch_any(const Operands& o, const Epilogue& epilogue, int sm_count, cudaStream_t stream) {
  const auto at_once = [&](int rows, int columns) {
    return ceil_div<int64_t>(o.m, rows) * ceil_div<int64_t>(o.n, columns) <= sm_count;
  };
  if (o.m <= Few::BM) return launch_tile<Few, Kind>(o, epilogue, stream);
  if (at_once(Narrow::BM, Narrow::BN)) return launch_tile<Narrow, Kind>(o, epilogue, stream);
  if (o.m <= Some::BM || at_once(Some::BM, Some::BN)) return launch_tile<Some, Kind>(o, epilogue, stream);
  if (at_once(Many<Kind>::BM, Many<Kind>::BN)) return launch_tile<Many<Kind>, Kind>(o, epilogue, stream);
  return launch_tile<Square<Kind>, Kind>(o, epilogue, stream);
}
template <typename Kind, typename Epilogue>
cudaError_t launch_all_rows(const Operands& o, const Epilogue& epilogue, int sm_count, cudaStream_t stream) {
  if (o.m > kMostRows) return cudaErrorInvalidValue;
  if (o.m <= Few::BM) return launch_tile<Few, Kind>(o, epilogue, stream);
  if (o.m <= Rows64::BM) return launch_tile<Rows64, Kind>(o, epilogue, stream);
  if (o.m <= Rows128::BM) return launch_tile<Rows128, Kind>(o, epilogue, stream);
  if (o.n >= int64_t(sm_count) * 12) return launch_tile<Rows256Wide, Kind>(o, epilogue, stream);
  return launch_tile<Rows256, Kind>(o, epilogue, stream);
}

// Calls `body` with Half, BFloat, Tf32 or Ieee.
template <typename Body>
cudaError_t with_kind(int dtype, bool ieee, Body&& body) {
  switch (dtype) {
    case kFloat32: return ieee ? body(Ieee{}) : body(Tf32{});
    case kFloat16: return body(Half{});
    case kBFloat16: return body(BFloat{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace fxfuse::small
