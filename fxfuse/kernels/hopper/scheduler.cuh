// Which tile a cluster computes next: a persistent grid walks the tiles in an order that keeps operands in L2.
#pragma once

#include <cstdint>

namespace fxfuse::hopper {

// A tile of a cluster: `m` counts in rows of clusters, `n` in tiles.
struct Tile {
  int m, n;
};

// Tiles in bands of `band` rows of clusters: down a band first, then one column on. Clusters that run at the same time then
// cover a nearly square part of the result, and read the fewest distinct rows of A and B. With `by_columns` the bands are
// columns, taken row by row: whole columns of the result are then complete long before the end.
struct TileOrder {
  int rows, columns;  // of cluster tiles
  int band;
  bool by_columns;

  __host__ __device__ int64_t count() const { return int64_t(rows) * columns; }
  __device__ __forceinline__ Tile at(int index) const {
    const int per_band = band * (by_columns ? rows : columns);
    const int first = index / per_band * band;
    const int inside = index % per_band;
    const int size = min(band, (by_columns ? columns : rows) - first);
    const int across = first + inside % size, along = inside / size;
    return by_columns ? Tile{along, across} : Tile{across, along};
  }
};

}  // namespace fxfuse::hopper
