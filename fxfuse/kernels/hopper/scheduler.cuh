// Which tile a cluster computes next: a persistent grid walks the tiles in an order that keeps operands in L2.
#pragma once

#include <cstdint>

namespace fxfuse::hopper {

// A tile of a cluster: `m` counts in rows of clusters, `n` in tiles.
struct Tile {
  int m, n;
};

// n / divisor for 0 <= n < 2^31, in two instructions (Granlund, Montgomery 1994): every warp of a block asks for tiles, and
// the hardware's division takes twenty.
struct Divider {
  int divisor = 1;
  uint32_t factor = 1u << 31;
  int shift = 31;

  Divider() = default;
  __host__ explicit Divider(int by) : divisor(by) {
    while ((int64_t(1) << (shift - 31)) < by) ++shift;
    factor = uint32_t(((uint64_t(1) << shift) + by - 1) / by);
  }
  __device__ __forceinline__ int operator()(int n) const { return int(uint64_t(uint32_t(n)) * factor >> shift); }
};

// The result in bands of lines, which are rows of clusters or columns of tiles: a band's lines one after the other, then one
// tile on along them. Clusters that run at the same time then cover a nearly square part of the result, and read the fewest
// distinct rows of A and B.
//
// With columns, whole columns of the result are complete long before the end. Every other band then goes upwards: what it
// reads of A first is what the one before read last.
class TileOrder {
 public:
  int rows = 0, columns = 0;  // of cluster tiles

  TileOrder() = default;
  // Bands of `most` rows; the last has what is left.
  static __host__ TileOrder by_rows(int rows, int columns, int most) {
    return TileOrder(rows, columns, false, {most, rows / most}, rows % most);
  }
  // Columns in as few bands as `most` columns each allow, of nearly the same width, the wide ones first. LAST_ALONE: the last
  // column is a band by itself, so that all others are complete well before the end.
  static __host__ TileOrder by_columns(int rows, int columns, int most, bool last_alone = false) {
    const int others = last_alone && columns > 1 ? columns - 1 : columns, bands = (others + most - 1) / most;
    TileOrder order(rows, columns, true, {others / bands + 1, others % bands}, others / bands);
    if (others < columns) order.alone_ = {others * rows, bands};
    return order;
  }

  __host__ __device__ int64_t count() const { return int64_t(rows) * columns; }
  __device__ __forceinline__ Tile at(int index) const {
    if (index >= alone_.tiles) return {alone_.bands % 2 == 0 ? index - alone_.tiles : rows - 1 - (index - alone_.tiles), columns - 1};
    const bool late = index >= early_.tiles;
    const Bands bands = late ? late_ : early_;
    const int from = late ? index - early_.tiles : index, turn = bands.band(from), inside = from - turn * bands.band.divisor;
    const int along = bands.line(inside), line = bands.first + turn * bands.line.divisor + inside - along * bands.line.divisor;
    if (!upright_) return {line, along};
    return {(bands.turns_before + turn) % 2 == 0 ? along : rows - 1 - along, line};
  }

 private:
  struct Width {
    int lines, bands;
  };
  // Bands of one width: those of the larger, then those of the smaller.
  struct Bands {
    Divider band, line;  // tiles of a band, lines of one
    int tiles = 0, first = 0, turns_before = 0;
  };
  __host__ TileOrder(int rows, int columns, bool upright, Width early, int late) : rows(rows), columns(columns), upright_(upright) {
    const int length = upright ? rows : columns;  // of a line
    early_ = {Divider(early.lines * length), Divider(early.lines), early.bands * early.lines * length, 0, 0};
    if (late > 0) late_ = {Divider(late * length), Divider(late), 0, early.bands * early.lines, early.bands};
  }

  struct Before {
    int tiles = 0x7fffffff, bands = 0;
  };

  bool upright_ = false;
  Bands early_, late_;
  Before alone_;  // what precedes the column that is by itself
};

}  // namespace fxfuse::hopper
