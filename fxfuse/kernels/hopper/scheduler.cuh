// Which tile a cluster computes next: a persistent grid walks the tiles in an order that keeps operands in L2.
#pragma once

#include <cstdint>

namespace fxfuse::hopper {

// A tile of a cluster: `m` counts in rows of clusters, `n` in tiles.
struct Tile {
  int m, n;
};

// Tiles in bands of `band` rows of clusters: down a band first, then one column on. Clusters that run at the same time then
// cover a nearly square part of the result, and read the fewest distinct rows of A and B.
//
// With `wide` >= 0 the bands are columns, taken row by row, so that whole columns of the result are complete long before the
// end: the first `wide` bands have `band` columns, the others one less. Every other band goes upwards: what it reads of A
// first is what the one before read last.
struct TileOrder {
  int rows, columns;  // of cluster tiles
  int band;
  int wide = -1;

  // Columns in as few bands as `most` columns each allow, of nearly the same width.
  __host__ void by_columns(int most) {
    const int bands = (columns + most - 1) / most;
    band = columns / bands + 1;
    wide = columns % bands;
  }
  __host__ __device__ int64_t count() const { return int64_t(rows) * columns; }
  __device__ __forceinline__ Tile at(int index) const {
    if (wide < 0) {
      const int per_band = band * columns;
      const int first = index / per_band * band;
      const int inside = index % per_band;
      const int height = min(band, rows - first);
      return {first + inside % height, inside / height};
    }
    const int before = wide * band * rows;  // tiles of the wide bands
    const int width = index < before ? band : band - 1;
    const int from = index < before ? index : index - before;
    const int turn = from / (width * rows), inside = from % (width * rows);
    const int n = (index < before ? 0 : wide * band) + turn * width + inside % width;
    const int m = inside / width;
    return {(index < before ? turn : wide + turn) % 2 == 0 ? m : rows - 1 - m, n};
  }
};

}  // namespace fxfuse::hopper
