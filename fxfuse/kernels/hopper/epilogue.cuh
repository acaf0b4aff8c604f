// From accumulators to memory: a function of each column's numbers, then 128-byte wide chunks through shared memory.
#pragma once

#include "../common.cuh"
#include "tma.cuh"
#include "wgmma.cuh"
#include "words.cuh"

namespace fxfuse::hopper {

// An epilogue says with kColumns that it needs two numbers for each column, computed while the tensor cores work (`column`),
// and hands a function of an accumulator and those numbers to `body` (`with`). With kStatistics it also gets each 64 rows' column
// statistics, at Params::partials; with kBatch the whole batch's (batch.cuh). This one is the product itself.
struct Identity {
  static constexpr bool kColumns = false, kStatistics = false, kBatch = false;
  struct Params {};
  struct Apply {
    __device__ __forceinline__ float operator()(float x, float2) const { return x; }
  };
  template <typename Body>
  static __device__ __forceinline__ void with(const Params&, Body&& body) { body(Apply{}); }
};

// Writes a warpgroup's 64 x BN tile, each warp its 16 rows, with nobody to wait for. Chunks of 16 rows by 128 bytes go through
// the warp's BUFFERS buffers of shared memory; the copy engine writes one out while the next is filled, and clips what lies
// outside the matrix.
template <typename Out, int BN, int BUFFERS>
struct TileWriter {
  static constexpr int kRows = kInstructionM / 4;
  static constexpr int kChunkBytes = kRows * kRowBytes;
  static constexpr int kChunkColumns = kRowBytes / int(sizeof(Out));
  static constexpr int kChunks = BN / kChunkColumns;
  static constexpr int kWarpBytes = BUFFERS * kChunkBytes, kSharedBytes = 4 * kWarpBytes;  // of a warp, of a warpgroup
  static_assert(kChunks % BUFFERS == 0, "a tile starts with the first buffer");

  // `shared`: this warpgroup's buffers. `columns`: shared memory with a float2 for each column of the tile (read only if
  // COLUMNS). `thread` in the warpgroup. The first lane of each warp issues its stores, and waits for them.
  template <bool COLUMNS, typename Apply>
  static __device__ __forceinline__ void write(const Apply& apply, float (&acc)[BN / 2], const float2* columns,
                                               uint32_t shared, const CUtensorMap* map, int m, int n, int thread) {
    const int warp = thread / kWarp, lane = thread % kWarp;
#pragma unroll
    for (int i = 0; i < BN / 8; ++i) {
      float2 c0{}, c1{};
      if constexpr (COLUMNS) {
        const float4 c = *reinterpret_cast<const float4*>(columns + 8 * i + 2 * (lane % 4));
        c0 = {c.x, c.y};
        c1 = {c.z, c.w};
      }
      acc[4 * i] = apply(acc[4 * i], c0);
      acc[4 * i + 1] = apply(acc[4 * i + 1], c1);
      acc[4 * i + 2] = apply(acc[4 * i + 2], c0);
      acc[4 * i + 3] = apply(acc[4 * i + 3], c1);
      constexpr int kPerChunk = kChunkColumns / 8;
      if ((i + 1) % kPerChunk == 0) {
        const int chunk = i / kPerChunk;
        const uint32_t buffer = shared + warp * kWarpBytes + chunk % BUFFERS * kChunkBytes;
        if (lane == 0) tma_store_wait_read<BUFFERS - 1>();  // the buffer is free
        __syncwarp();
        fill(acc, chunk * kPerChunk, buffer, lane);
        fence_async_proxy();
        __syncwarp();
        if (lane == 0) tma_store(map, buffer, n + chunk * kChunkColumns, m + warp * kRows);
      }
    }
  }

  // The tile as it is into `shared`, room for all chunks: [warp][chunk][row], each warp its own rows.
  static __device__ __forceinline__ void lay(const float (&acc)[BN / 2], uint32_t shared, int thread) {
    static_assert(BUFFERS == kChunks, "room for a part of the tile only");
    const int warp = thread / kWarp, lane = thread % kWarp;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      fill(acc, chunk * (kChunkColumns / 8), shared + warp * kWarpBytes + chunk * kChunkBytes, lane);
  }
  // A tile that was laid out, to (m, n). By one thread.
  static __device__ __forceinline__ void store(uint32_t shared, const CUtensorMap* map, int m, int n) {
#pragma unroll 1
    for (int i = 0; i < 4 * kChunks; ++i)
      tma_store(map, shared + i * kChunkBytes, n + i % kChunks * kChunkColumns, m + i / kChunks * kRows);
  }

 private:
  // Accumulators of the column groups of eight from `group` on into a chunk.
  static __device__ __forceinline__ void fill(const float (&acc)[BN / 2], int group, uint32_t buffer, int lane) {
    if constexpr (sizeof(Out) == 2) {
      const int row = lane % 16;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const float* d = acc + 4 * (group + j);
        const uint32_t address = buffer + row * kRowBytes + ((j + lane / 16) ^ (row % 8)) * kUnitBytes;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                     "r"(pack_pair<Out>(d[0], d[1])), "r"(pack_pair<Out>(d[2], d[3])), "r"(pack_pair<Out>(d[4], d[5])),
                     "r"(pack_pair<Out>(d[6], d[7]))
                     : "memory");
      }
    } else {
      // Odd rows write groups j and j + 2 in the other order: with the swizzle the 16 lanes of a half warp then cover
      // all 32 banks.
      const int row = lane / 4;
      const bool odd = row & 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* low = acc + 4 * (group + j);
        const float* high = acc + 4 * (group + j + 2);
#pragma unroll
        for (int turn = 0; turn < 2; ++turn) {
          const bool take_high = odd != (turn == 1);
          const int unit = 2 * (j + (take_high ? 2 : 0)) + lane % 4 / 2;
          const uint32_t address = buffer + row * kRowBytes + (unit ^ (row % 8)) * kUnitBytes + lane % 2 * 8;
          store_pair(address, take_high ? high[0] : low[0], take_high ? high[1] : low[1]);
          store_pair(address + 8 * kRowBytes, take_high ? high[2] : low[2], take_high ? high[3] : low[3]);
        }
      }
    }
  }
  static __device__ __forceinline__ void store_pair(uint32_t address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
  }
};

}  // namespace fxfuse::hopper
