// Mean and sum of squared distances (M2) of every column over a warpgroup's 64 rows, from its tile in shared memory.
//
// A block's last tile is measured with nothing beside it, so all of it counts: this is a loop down the columns, in half the
// time of ColumnStatistics' thousand instructions and shuffles.
#pragma once

#include "epilogue.cuh"
#include "words.cuh"

namespace fxfuse::hopper {

// Of a tile as Writer::lay leaves it. A warp takes every fourth strip of chunks, a lane 32 bits of it, all rows down.
template <typename Out, typename Writer>
struct TileStatistics {
  using Word = WordOf<Out>;

  // Of the first `count` rows and `columns` columns. Sums are taken from the first row's value, so that nothing cancels for
  // columns whose mean dwarfs their spread.
  static __device__ __forceinline__ void write(const uint8_t* tile, float2* statistics, int count, int columns, int thread) {
    constexpr int kEach = Word::kValues, kUnroll = 16;
    const int warp = thread / kWarp, lane = thread % kWarp;
    if (count <= 0) return;
#pragma unroll 1
    for (int chunk = warp; chunk < Writer::kChunks; chunk += kWarpgroup / kWarp) {
      const uint8_t* const strip = tile + chunk * Writer::kChunkBytes + lane % 4 * int(sizeof(uint32_t));
      const auto first_of = [&](int row) { return strip + row / Writer::kRows * Writer::kWarpBytes + row % Writer::kRows * kRowBytes; };
      const auto word = [&](const uint8_t* row, int swizzle) {
        return *reinterpret_cast<const uint32_t*>(row + (lane / 4 ^ swizzle) * kUnitBytes);
      };
      float shift[kEach], sum[kEach] = {}, squares[kEach] = {};
      Word::get(word(strip, 0), shift);
      const auto add = [&](uint32_t bits) {
        float x[kEach];
        Word::get(bits, x);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const float d = x[i] - shift[i];
          sum[i] += d;
          squares[i] = fmaf(d, d, squares[i]);
        }
      };
      int row = 0;
#pragma unroll 1
      for (; row + kUnroll <= count; row += kUnroll) {
        uint32_t bits[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) bits[i] = word(first_of(row) + i * kRowBytes, i % 8);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) add(bits[i]);
      }
#pragma unroll 1
      for (; row < count; ++row) add(word(first_of(row), row % 8));
      const int column = (chunk * kWarp + lane) * kEach;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float mean = __fdividef(sum[i], float(count));
        if (column + i < columns) statistics[column + i] = {shift[i] + mean, fmaxf(fmaf(-mean, sum[i], squares[i]), 0.f)};
      }
    }
  }
};

}  // namespace fxfuse::hopper
