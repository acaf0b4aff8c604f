// Statistics and normalisation behind the tensor cores: while a block computes its next tiles, three warps beside them work
// on the ones that it has written; when its last tile is done, which it keeps in its accumulators, all warps help.
//
//   consumers   a tile of acc goes to memory, and nothing else
//   any warp    kPartialRows rows of a tile in memory: their columns' statistics to `partials`; an arrival at the column of tiles
//   any warp    a column with all arrivals: merges the block's share of its columns, writes their maps; an arrival again
//   any warp    a column with all shares merged: out = acc * slope + shift, kRows rows at a time
//
// Each element of acc is read twice more, first from L2 and then from L2 or memory, and one of out written: more bytes than
// passes of their own would move, at a time when the memory has little else to do.
//
// A block takes work only once it can be done, so none holds up another but by being late. At the end blocks wait for each
// other's arrivals, so all of them must run: the launch is cooperative.
#pragma once

#include "../batchnorm_columns.cuh"
#include "barrier.cuh"
#include "scheduler.cuh"
#include "words.cuh"

#include <type_traits>

namespace fxfuse::hopper {

constexpr int kPartialRows = 64;  // rows of an entry of `partials`

// Of 64,512 registers for 128 threads of the producer's and 256 of the consumers'.
constexpr int kBehindProducerRegisters = 120, kBehindConsumerRegisters = 192;

// In shared memory, counted in the block's own turns: how much of each kind of work is taken, how much may be, and whether a
// warp is looking for more. `stored`: arrivals of the consumers' warps whose rows of a tile are in memory.
struct BehindState {
  int measured, merged, normalised;
  int stored, mergeable, normalisable;
  int looking;
};

__device__ __forceinline__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
// By one thread, after a barrier among those whose writes it stands for.
__device__ __forceinline__ void arrive_release(int* p) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p) : "memory");
}

// Counters of the columns of tiles, and of the blocks that are through. All are zero before a launch, and again after it.
struct BatchCounters {
  static constexpr int kEach = 2;
  int* first;  // 1 + kEach a column

  __device__ __forceinline__ int* arrived(int n) const { return first + 1 + kEach * n; }  // whose partials are there
  __device__ __forceinline__ int* merged(int n) const { return first + 2 + kEach * n; }   // whose share of the maps is there
  // By a warp of a block that reads none of them any more: the last one sets everything back.
  __device__ __forceinline__ void leave(int columns, int lane) const {
    int left = 0;
    if (lane == 0) left = atomicAdd(first, 1) + 1;
    if (__shfl_sync(0xffffffffu, left, 0) < int(gridDim.x)) return;
    for (int i = lane; i < 1 + kEach * columns; i += kWarp) first[i] = 0;
  }
};

// What the warps of a block work on: its tiles cluster, cluster + clusters, .. under `end`, and its shares of the columns of
// those under `share_end`.
struct BehindTiles {
  TileOrder order;
  int end, share_end, cluster, clusters, rank, cluster_size, rows, columns;

  __device__ __forceinline__ int tile(int turn) const { return cluster + turn * clusters; }
  __device__ __forceinline__ int blocks() const { return order.rows * cluster_size; }  // of a column of tiles
};

// Tiles of BM x BN, each written by CONSUMERS warpgroups of 64 rows.
template <typename Out, int BM, int BN, int CONSUMERS>
class Behind {
 public:
  // By the thread of a consumer's warp that has waited for its stores of a tile.
  static __device__ __forceinline__ void stored(BehindState* state) {
    fence_async_proxy_global();
    __threadfence_block();
    atomicAdd_block(&state->stored, 1);
  }

  // Works until all there is to merge and to normalise is taken. By whole warps, in any number. NAP: ns between looks for
  // work; MEASURE, NORMALISE: accesses of a lane under way at once.
  // Params: TrainState state, partials [ceil(rows / 64), columns], maps [columns], BatchCounters counters.
  template <unsigned NAP, int MEASURE, int NORMALISE, typename Params>
  static __device__ __forceinline__ void run(const BehindTiles& tiles, const Params& p, const Out* acc, Out* out,
                                             BehindState* state, int lane) {
    Columns columns;
    for (;;) {
      int work = 0;
      if (lane == 0) work = take(tiles, state);
      work = __shfl_sync(0xffffffffu, work, 0);
      __syncwarp();  // what lane 0 has seen done, all lanes may read
      const int index = work / kKinds;
      switch (work % kKinds) {
        case kDone: return;
        case kMeasure: {
          const Tile tile = tiles.order.at(tiles.tile(index / CONSUMERS));
          measure<MEASURE / kSpans>(tiles, acc, p.partials, first_row(tiles, tile) + index % CONSUMERS * kPartialRows, tile.n * BN, lane);
          __syncwarp();
          if (lane == 0) arrive_release(p.counters.arrived(tile.n));
          break;
        }
        case kMerge: {
          const Tile tile = tiles.order.at(tiles.tile(index));
          merge_share(tiles, p, tile, lane);
          __syncwarp();
          if (lane == 0) arrive_release(p.counters.merged(tile.n));
          break;
        }
        case kNormalise: normalise<NORMALISE / kSpans>(tiles, p.maps, acc, out, columns, index, lane); break;
        case kLook:
          if (look(tiles, p.counters, state, lane)) break;
        default: __nanosleep(NAP);
      }
    }
  }

  // Normalises beside the warps that `run` until all of it is taken: what is left at a block's end, with little to find out.
  template <unsigned NAP, int NORMALISE>
  static __device__ __forceinline__ void help(const BehindTiles& tiles, const float2* maps, const Out* acc, Out* out,
                                              BehindState* state, int lane) {
    Columns columns;
    for (;;) {
      int work = 0;
      if (lane == 0) {
        const int unit = load_shared(&state->normalised), turn = unit / kUnits;
        if (tiles.tile(turn) >= tiles.end) work = kDone;
        else if (turn < load_shared(&state->normalisable) && claim(&state->normalised, unit)) work = unit * kKinds + kNormalise;
        else work = kNap;
      }
      work = __shfl_sync(0xffffffffu, work, 0);
      __syncwarp();
      if (work == kDone) return;
      if (work == kNap) __nanosleep(NAP);
      else normalise<NORMALISE / kSpans>(tiles, maps, acc, out, columns, work / kKinds, lane);
    }
  }

 private:
  enum Kind { kMeasure, kMerge, kNormalise, kLook, kNap, kDone, kKinds };

  using Unit = uint4;  // what a lane reads or writes at once

  static constexpr int kRows = 16;  // of a unit of normalisation
  static constexpr int kUnits = BM / kRows;
  static constexpr int kWide = 16 / int(sizeof(Out));  // elements of an access
  static constexpr int kLanes = BN / kWide < kWarp ? BN / kWide : kWarp;  // along a row
  static constexpr int kSpans = BN / (kWide * kLanes);  // accesses of a lane along a row
  static constexpr int kStep = kWarp / kLanes;          // rows of a warp's access
  static constexpr int kTogether = 8;                   // partials that a lane loads at once
  static constexpr int kAhead = 4;                      // columns of tiles that are looked at together
  static_assert(BM == CONSUMERS * kPartialRows);

  static __device__ __forceinline__ int first_row(const BehindTiles& tiles, const Tile& tile) {
    return (tile.m * tiles.cluster_size + tiles.rank) * BM;
  }
  static __device__ __forceinline__ int column(int n, int span, int lane) { return n + (span * kLanes + lane % kLanes) * kWide; }
  static __device__ __forceinline__ int load_shared(const int* p) {
    int x;
    asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];" : "=r"(x) : "r"(shared_address(p)) : "memory");
    return x;
  }
  static __device__ __forceinline__ bool claim(int* counter, int seen) {
    return atomicCAS_block(counter, seen, seen + 1) == seen;
  }

  // By one lane: the next piece of work, index * kKinds + kind. What others wait for comes first. One warp of a block looks
  // for more at a time: at the end all blocks look at the same counters.
  static __device__ __forceinline__ int take(const BehindTiles& tiles, BehindState* state) {
    const int unit = load_shared(&state->normalised), turn = unit / kUnits;
    const int share = load_shared(&state->merged);
    if (tiles.tile(turn) >= tiles.end && tiles.tile(share) >= tiles.share_end) return kDone;
    const int ready = load_shared(&state->stored) / (CONSUMERS * kWarpgroup / kWarp), part = load_shared(&state->measured);
    if (part / CONSUMERS < ready && tiles.tile(part / CONSUMERS) < tiles.end) {
      if (claim(&state->measured, part)) return part * kKinds + kMeasure;
    } else if (share < load_shared(&state->mergeable)) {
      if (claim(&state->merged, share)) return share * kKinds + kMerge;
    } else if (turn < min(ready, load_shared(&state->normalisable))) {
      if (claim(&state->normalised, unit)) return unit * kKinds + kNormalise;
    } else {
      if (!expects(tiles, state, part) || atomicCAS_block(&state->looking, 0, 1) != 0) return kNap;
      __threadfence_block();  // and what the one before has found
      return kLook;
    }
    return kNap;
  }

  // Whether there may be more to merge or to normalise: not before this block's own part of the next column is measured.
  static __device__ __forceinline__ bool expects(const BehindTiles& tiles, const BehindState* state, int measured) {
    const int share = load_shared(&state->mergeable), turn = load_shared(&state->normalisable);
    if (turn < share && tiles.tile(turn) < tiles.end) return true;
    return tiles.tile(share) < tiles.share_end && (measured >= (share + 1) * CONSUMERS || tiles.tile(share) >= tiles.end);
  }

  // By the warp that holds `looking`: how many of the next columns have all partials, and how many all maps. Whether any.
  static __device__ __forceinline__ bool look(const BehindTiles& tiles, const BatchCounters& counters, BehindState* state, int lane) {
    const int share = load_shared(&state->mergeable), turn = load_shared(&state->normalisable);
    const bool merge = lane < kWarp / 2;
    const int index = (merge ? share : turn) + lane % (kWarp / 2), tile = tiles.tile(index);
    bool there = false;
    if (lane % (kWarp / 2) < kAhead && tile < (merge ? tiles.share_end : min(tiles.end, tiles.tile(share)))) {
      const int n = tiles.order.at(tile).n;
      there = load_acquire(merge ? counters.arrived(n) : counters.merged(n)) >= tiles.blocks() * (merge ? CONSUMERS : 1);
    }
    const unsigned found = __ballot_sync(0xffffffffu, there);
    const int shares = __ffs(~found) - 1, turns = __ffs(~(found >> kWarp / 2)) - 1;
    __syncwarp();
    if (lane == 0) {
      __threadfence_block();  // what any lane has seen comes first
      if (shares > 0) atomicAdd_block(&state->mergeable, shares);
      if (turns > 0) atomicAdd_block(&state->normalisable, turns);
      __threadfence_block();
      atomicExch_block(&state->looking, 0);
    }
    return shares + turns > 0;
  }

  // Columns n.. of kPartialRows rows. Sums are taken from the first row's value, so that nothing cancels for columns whose
  // mean dwarfs their spread.
  template <int TOGETHER>
  static __device__ __forceinline__ void measure(const BehindTiles& tiles, const Out* acc, float2* partials, int first, int n,
                                                 int lane) {
    const int last = min(tiles.rows, first + kPartialRows);
    if (first >= last) return;
    float shift[kSpans * kWide], sum[kSpans * kWide], squares[kSpans * kWide];
#pragma unroll
    for (int i = 0; i < kSpans * kWide; ++i) sum[i] = squares[i] = 0.f;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      Unit v{};
      if (column(n, s, lane) < tiles.columns) v = load(acc + int64_t(first) * tiles.columns + column(n, s, lane));
      values(v, [&](int j, float& x) { shift[s * kWide + j] = x; });
    }
    walk<TOGETHER>(tiles, acc, first + lane / kLanes, last, n, lane, [&](Unit& v, int span, int64_t) {
      values(v, [&](int j, float& x) {
        const int at = span * kWide + j;
        const float d = x - shift[at];
        sum[at] += d;
        squares[at] = fmaf(d, d, squares[at]);
      });
    });
    const float count = float(last - first);
#pragma unroll
    for (int i = 0; i < kSpans * kWide; ++i) {
#pragma unroll
      for (int step = kLanes; step < kWarp; step *= 2) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
        squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], step);
      }
      const float mean = sum[i] / count;
      const int c = column(n, i / kWide, lane) + i % kWide;
      if (lane < kLanes && c < tiles.columns)
        partials[int64_t(first / kPartialRows) * tiles.columns + c] = {shift[i] + mean, fmaxf(fmaf(-mean, sum[i], squares[i]), 0.f)};
    }
  }

  // Of the partials number b, b + step, .. of a column, kTogether at most: all loads at once, then the mean, then squared
  // distances from it.
  static __device__ __forceinline__ Moments moments(const BehindTiles& tiles, const float2* column, bool inside, int b, int step,
                                                    int partials) {
    const float whole = float(tiles.rows) / kPartialRows;  // partials, and a part of one
    float2 part[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = b + i * step;
      part[i] = inside && at < partials ? __ldcg(column + int64_t(at) * tiles.columns) : make_float2(0.f, 0.f);
    }
    Moments m{0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float share = __saturatef(whole - float(b + i * step));
      m.count += share;
      m.mean = fmaf(share, part[i].x, m.mean);
    }
    m.mean = m.count > 0.f ? m.mean / m.count : 0.f;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float delta = part[i].x - m.mean;
      m.m2 += fmaf(delta * delta, kPartialRows * __saturatef(whole - float(b + i * step)), part[i].y);
    }
    m.count *= kPartialRows;
    return m;
  }

  // Each block of a column of tiles merges the same number of its columns: their maps, and the record of them. Lanes lie
  // along the columns first, what is left of them along the partials.
  template <typename Params>
  static __device__ __forceinline__ void merge_share(const BehindTiles& tiles, const Params& p, const Tile& tile, int lane) {
    const int blocks = tiles.blocks(), share = (BN + blocks - 1) / blocks, n = tile.n * BN;
    const int first = n + (tile.m * tiles.cluster_size + tiles.rank) * share;
    const int last = min(min(tiles.columns, n + BN), first + share);
    const int partials = (tiles.rows + kPartialRows - 1) / kPartialRows;
    int width = kWarp;
    while (width > 1 && width / 2 >= last - first) width /= 2;
    for (int base = first; base < last; base += width) {
      const int c = base + lane % width;
      TrainState::Known known{};
      TrainState::Before before{};
      if (lane < width && c < last) {  // loads overlap
        known = p.state.known(c);
        before = p.state.before(c);
      }
      Moments m{0.f, 0.f, 0.f};
#pragma unroll 1
      for (int b = lane / width; b < partials; b += kTogether * (kWarp / width))
        m = merge(m, moments(tiles, p.partials + c, c < last, b, kWarp / width, partials));
      for (int step = width; step < kWarp; step *= 2) {
        const Moments other{__shfl_xor_sync(0xffffffffu, m.count, step), __shfl_xor_sync(0xffffffffu, m.mean, step),
                            __shfl_xor_sync(0xffffffffu, m.m2, step)};
        m = merge(m, other);
      }
      if (lane < width && c < last) {
        const ColumnMap map = p.state.map(known, m);
        p.maps[c] = {map.g, fmaf(map.e, map.g, map.b)};
        p.state.record(c, known, before, m);
      }
    }
  }

  // A lane's columns of the tile that it normalised last.
  struct Columns {
    int turn = -1, m = 0, n = 0;
    float2 maps[kSpans * kWide];
  };

  // Unit number `unit`, kRows rows of a tile.
  template <int TOGETHER>
  static __device__ __forceinline__ void normalise(const BehindTiles& tiles, const float2* merged, const Out* acc, Out* out,
                                                   Columns& columns, int unit, int lane) {
    if (unit / kUnits != columns.turn) {
      columns.turn = unit / kUnits;
      const Tile tile = tiles.order.at(tiles.tile(columns.turn));
      columns.m = first_row(tiles, tile);
      columns.n = tile.n * BN;
#pragma unroll
      for (int i = 0; i < kSpans * kWide; ++i) {
        const int c = column(columns.n, i / kWide, lane) + i % kWide;
        columns.maps[i] = c < tiles.columns ? __ldcg(merged + c) : make_float2(0.f, 0.f);
      }
    }
    const int first = columns.m + unit % kUnits * kRows, n = columns.n;
    const int last = min(tiles.rows, first + kRows);
    walk<TOGETHER>(tiles, acc, first + lane / kLanes, last, n, lane, [&](Unit& v, int span, int64_t at) {
      values(v, [&](int j, float& x) {
        const float2 map = columns.maps[span * kWide + j];
        x = fmaf(x, map.x, map.y);
      });
      *reinterpret_cast<Unit*>(out + at) = v;
    });
  }

  // Hands this lane's units of rows `row`, row + kStep, .. under `last`, each with its span of columns and its place in the
  // matrix, to `body`; those of TOGETHER rows are under way at once. The loop is short: it runs beside the tensor cores.
  template <int TOGETHER, typename Body>
  static __device__ __forceinline__ void walk(const BehindTiles& tiles, const Out* acc, int row, int last, int n, int lane,
                                              const Body& body) {
    const int64_t step = int64_t(kStep) * tiles.columns;
    int64_t at = int64_t(row) * tiles.columns + column(n, 0, lane);
    bool inside[kSpans];
#pragma unroll
    for (int s = 0; s < kSpans; ++s) inside[s] = column(n, s, lane) < tiles.columns;
    const auto rows = [&](auto together) {
      constexpr int kEach = decltype(together)::value;
      Unit v[kEach * kSpans];
#pragma unroll
      for (int i = 0; i < kEach * kSpans; ++i)
        if (inside[i % kSpans]) v[i] = load(acc + at + i / kSpans * step + i % kSpans * kLanes * kWide);
#pragma unroll
      for (int i = 0; i < kEach * kSpans; ++i)
        if (inside[i % kSpans]) body(v[i], i % kSpans, at + i / kSpans * step + i % kSpans * kLanes * kWide);
      row += kEach * kStep;
      at += kEach * step;
    };
#pragma unroll 1
    while (row + (TOGETHER - 1) * kStep < last) rows(std::integral_constant<int, TOGETHER>{});
#pragma unroll 1
    while (row < last) rows(std::integral_constant<int, 1>{});
  }

  // From L2: another multiprocessor's, or the copy engine's, writes.
  static __device__ __forceinline__ Unit load(const Out* p) { return __ldcg(reinterpret_cast<const Unit*>(p)); }

  // Hands each value of a unit, with its number, to `body`, which may change it.
  template <typename Body>
  static __device__ __forceinline__ void values(Unit& v, const Body& body) {
    using Word = WordOf<Out>;
    uint32_t* const words[] = {&v.x, &v.y, &v.z, &v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float x[Word::kValues];
      Word::get(*words[w], x);
#pragma unroll
      for (int j = 0; j < Word::kValues; ++j) body(w * Word::kValues + j, x[j]);
      *words[w] = Word::put(x);
    }
  }
};

}  // namespace fxfuse::hopper
