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
struct TileOrder {
  int rows, columns;  // of cluster tiles
  int band;

  __host__ __device__ int64_t count() const { return int64_t(rows) * columns; }
  __device__ __forceinline__ Tile at(int index) const {
    const int per_band = band * columns;
    const int first = index / per_band * band;
    const int inside = index % per_band;
    const int height = min(band, rows - first);
    return {first + inside % height, inside / height};
  }
};

}  // namespace fxfuse::hopper
