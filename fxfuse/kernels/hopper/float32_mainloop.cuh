// Mainloop policy: float32 products on the tensor cores, as exact as float32 arithmetic.
//
// With each operand split in three bf16 (split.cuh), x w = hh + (hm + mh) + (mm + hl + lh) + terms under 2^-24 |x w|: six
// bf16 products. A tensor core truncates what it adds to its accumulator, by up to one unit in the last place each time, so
// it adds for 32 of K only: first the five small products, while the accumulator is small, then hh, whose products have 16
// bits and mostly fit. Those sums are added in true float32 registers, rounded to nearest.
//
// Per 32 of K a block of 256 x 128 keeps the tensor cores busy for 3072 clocks and shared memory, at 128 bytes a clock, for
// 2496: wgmma reads B's planes 1536, A comes and is read 256 + 256, B 128 + 128, its planes are written 192.
//
//   copy engine -> A, B in float32 -> three warps split B into three planes -> wgmma, A split into registers by its reader
//
// Every 2048 of K those sums are added to the ones before, which wait in the result's own memory: the rounding of a long row
// of additions then grows as that of a tree.
//
// A consumer's rows come in halves of 64 that share the temporary accumulators: 128 + 64 of them, and 24 registers of A.
//
// A narrow tile, 128 x 64, is for products of which all tiles run at once. Its registers hold the sums of every 512 of K and
// two blocks' temporary accumulators, of which one is added while the tensor cores fill the other.
#pragma once

#include "float32_repair.cuh"
#include "mainloop.cuh"
#include "split.cuh"

namespace fxfuse::hopper {

// A is [M, K], or [K, M] where A_ALONG_M; B is [N, K], or [K, N] where B_ALONG_N. HALVES times 128 rows a tile, of BLOCK_N
// columns. INTERVAL: of K, in the tensor core. OUTER: of K, between sums that wait: in the result's memory, or in registers
// where a narrow tile has room for them.
template <bool A_ALONG_M, bool B_ALONG_N, int HALVES = 2, int INTERVAL = 32, int OUTER = 2048, int STAGES_A = 4,
          int STAGES_RAW = 2, int STAGES_B = 3, int BLOCK_N = 128>
struct Float32Mainloop {
  using Params = Float32Operands;
  static constexpr int kBlockM = 128 * HALVES, kBlockN = BLOCK_N, kBlockK = 32, kConsumers = 2, kCluster = 1, kHalves = HALVES;
  static constexpr int kAccumulators = kBlockN / 2;
  static constexpr bool kPrepares = true;
  static constexpr bool kNarrow = HALVES == 1 && BLOCK_N == 64;
  static constexpr int kProducerRegisters = kNarrow ? 56 : 40, kConsumerRegisters = kNarrow ? 224 : 232;
  static constexpr int kSteps = kBlockK / 16;
  static constexpr int kBytesA = 128 * kBlockK * 4;      // of one half
  static constexpr int kBytesRaw = kBlockN * kBlockK * 4;
  static constexpr int kGroups = kBlockN / 32, kBytesGroup = kBytesRaw / kGroups;  // of columns, where B lies along N
  static constexpr int kPlaneRow = kBlockK * 2, kPlane = kBlockN * kPlaneRow, kBytesB = 3 * kPlane;
  static constexpr int kRaw = STAGES_A * kBytesA, kPlanes = kRaw + STAGES_RAW * kBytesRaw;
  static constexpr int kSharedBytes = kPlanes + STAGES_B * kBytesB;
  static constexpr int kConsumerWarps = kConsumers * kWarpgroup / kWarp, kSplitters = 3;
  static constexpr int kOuter = OUTER / kBlockK;
  static_assert(HALVES == 1 || INTERVAL == kBlockK, "the halves share temporary accumulators");
  static constexpr int kTogether = kNarrow ? 1 : kSplitters;  // warps that split a block of B
  static_assert(kTogether == 1 ? STAGES_B % kSplitters == 0 : STAGES_B <= kSplitters, "a warp finds its work from the stage");
  static_assert(INTERVAL % kBlockK == 0 && OUTER % INTERVAL == 0 && !(A_ALONG_M && !B_ALONG_N));

  struct Pipeline {
    using RingA = Ring<STAGES_A, kConsumerWarps, 1>;
    using RingRaw = Ring<STAGES_RAW, kTogether, 1>;
    using RingB = Ring<STAGES_B, kConsumerWarps, 1, kTogether>;
    static constexpr int kBarrierBytes = RingA::kBarrierBytes + RingRaw::kBarrierBytes + RingB::kBarrierBytes;
    RingA a;
    RingRaw raw;
    RingB b;
    __device__ __forceinline__ explicit Pipeline(uint32_t barriers)
        : a(barriers), raw(barriers + RingA::kBarrierBytes),
          b(barriers + RingA::kBarrierBytes + RingRaw::kBarrierBytes) {}
    __device__ __forceinline__ void initialise() const {
      a.initialise();
      raw.initialise();
      b.initialise();
    }
  };

  static cudaError_t tensor_maps(CUtensorMap* a, CUtensorMap* b, const Operands& p) {
    using In = TensorMapType<float>;
    const cudaError_t error =
        A_ALONG_M ? make_tensor_map(a, In::kType, In::kBytes, p.a, p.k, p.m, p.pitch_a, kBlockK)
                  : make_tensor_map(a, In::kType, In::kBytes, p.a, p.m, p.k, p.pitch_a, 128, 64);
    if (error != cudaSuccess) return error;
    return B_ALONG_N ? make_tensor_map(b, In::kType, In::kBytes, p.b, p.k, p.n, p.pitch_b, kBlockK)
                     : make_tensor_map(b, In::kType, In::kBytes, p.b, p.n, p.k, p.pitch_b, kBlockN);
  }
  static Params params(const Operands& p) {
    return {static_cast<const float*>(p.a), static_cast<const float*>(p.b),
            A_ALONG_M ? 1 : p.pitch_a,      A_ALONG_M ? p.pitch_a : 1,
            B_ALONG_N ? 1 : p.pitch_b,      B_ALONG_N ? p.pitch_b : 1,
            int(p.m),                       int(p.n),
            int(p.k),                       static_cast<float*>(p.out),
            p.pitch_out};
  }
  static __device__ __forceinline__ int row(int consumer, int half) { return 128 * half + kInstructionM * consumer; }

  static __device__ __forceinline__ void repair(const Params& p, float (&acc)[HALVES][kAccumulators], int m, int n,
                                                int consumer, int thread) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
      float32_repair<kBlockN>(p, acc[half], m + row(consumer, half), n, thread);
  }

  // --- the copy engine ------------------------------------------------------------------------------------------------

  static __device__ __forceinline__ void produce(Pipeline& ring, uint32_t shared, const CUtensorMap* a, const CUtensorMap* b,
                                                 int m, int n, int blocks, uint32_t) {
    constexpr int kAhead = kNarrow ? kSplitters : 0;  // blocks that B, which has to be split, comes before A
    for (int i = 0; i < blocks + kAhead; ++i) {
      if (i < blocks) {
        const int k = i * kBlockK;
        const uint32_t full = ring.raw.acquire(kBytesRaw);
        const uint32_t raw = shared + kRaw + ring.raw.stage() * kBytesRaw;
        if constexpr (B_ALONG_N) {
#pragma unroll
          for (int g = 0; g < kGroups; ++g) tma_load(raw + g * kBytesGroup, b, full, n + 32 * g, k);
        } else {
          tma_load(raw, b, full, k, n);
        }
        ring.raw.advance();
      }
      if (i < kAhead) continue;
      const int k = (i - kAhead) * kBlockK;
#pragma unroll
      for (int half = 0; half < HALVES; ++half, ring.a.advance()) {
        const uint32_t full = ring.a.acquire(kBytesA);
        const uint32_t stage = shared + ring.a.stage() * kBytesA;
        if constexpr (A_ALONG_M) {
#pragma unroll
          for (int g = 0; g < 4; ++g) tma_load(stage + g * (kBytesA / 4), a, full, m + 128 * half + 32 * g, k);
        } else {
#pragma unroll
          for (int step = 0; step < kSteps; ++step)
            tma_load(stage + step * (kBytesA / kSteps), a, full, k + 16 * step, m + 128 * half);
        }
      }
    }
  }

  // --- B into planes ----------------------------------------------------------------------------------------------------
  // All three warps split a block together, in turns. These are no multiple of three, so who begins changes, with the stage. A
  // narrow tile's blocks are shorter than what it takes to wait for one and to hand it on: a warp has every third one. Either
  // way a row of a stage is always the same warp's (racecheck does not see that the consumers stand between two writers).
  //
  // Row n of a plane: 32 bf16. Where A lies along K, a reader of A takes four neighbours of K at once; those are then the
  // columns 2q, 2q + 1, 2q + 8, 2q + 9 of an instruction's sixteen, in the planes too.

  static __device__ __forceinline__ uint32_t plane_address(uint32_t planes, int row, int unit) {
    return planes + row * kPlaneRow + ((unit ^ (row / 2 % 4)) * kUnitBytes);
  }

  static __device__ __forceinline__ void prepare(Pipeline& ring, uint32_t shared, int blocks, int thread) {
    const int lane = thread % kWarp, warp = thread / kWarp;
    for (int i = 0; i < blocks; ++i, ring.raw.advance(), ring.b.advance()) {
      const int stage = ring.b.stage();
      int first = 0;
      if constexpr (kTogether == kSplitters) first = warp < stage ? warp + kSplitters - stage : warp - stage;
      else if (stage % kSplitters != warp) continue;
      const uint32_t raw = shared + kRaw + ring.raw.stage() * kBytesRaw;
      const uint32_t planes = shared + kPlanes + stage * kBytesB;
      ring.b.wait_free();
      ring.raw.wait_filled();
      if constexpr (B_ALONG_N) split_along_n(raw, planes, first, lane);
      else split_along_k(raw, planes, first, lane);
      fence_async_proxy();
      ring.raw.release_by_warp(lane);
      if (lane == 0) ring.b.filled();
    }
  }

  // Eight rows a turn, four lanes to a row. A lane has eight neighbours; every other pair of them is the half of a unit.
  static __device__ __forceinline__ void split_along_k(uint32_t raw, uint32_t planes, int turn, int lane) {
    constexpr int kRows = 8, kTurns = kBlockN / kRows, kAtOnce = kNarrow ? 2 : 1;  // turns whose numbers a lane loads at once
    const int r = lane / 4, c = lane % 4;
    const uint32_t swizzled = raw + (kRows * turn + r) * kRowBytes + ((2 * c) ^ r) * kUnitBytes;
    uint32_t from = swizzled, to = plane_address(planes, kRows * turn + r, c / 2 * 2) + c % 2 * 8;
    const uint32_t other = ((2 * c + 1) ^ r) * kUnitBytes - ((2 * c) ^ r) * kUnitBytes;
    const uint32_t second = plane_address(0, r, c / 2 * 2 + 1) - plane_address(0, r, c / 2 * 2);
    static_assert(kAtOnce == 1 || kTurns % (kAtOnce * kTogether) == 0);
#pragma unroll 1
    for (; turn < kTurns; turn += kAtOnce * kTogether) {
      float4 x[kAtOnce], y[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t place = from + j * (kTogether * kRows * kRowBytes);
        x[j] = load4(place), y[j] = load4(place + other);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const uint32_t place = to + j * (kTogether * kRows * kPlaneRow), next = place + second;
        const SplitPair s = split_pair(x[j].x, x[j].y), t = split_pair(y[j].x, y[j].y);
        store2(place, s.high, t.high), store2(place + kPlane, s.middle, t.middle), store2(place + 2 * kPlane, s.low, t.low);
        const SplitPair u = split_pair(x[j].z, x[j].w), v = split_pair(y[j].z, y[j].w);
        store2(next, u.high, v.high), store2(next + kPlane, u.middle, v.middle), store2(next + 2 * kPlane, u.low, v.low);
      }
      from += kAtOnce * kTogether * kRows * kRowBytes;
      to += kAtOnce * kTogether * kRows * kPlaneRow;
    }
  }

  // A lane has one row, and of it one unit of eight a turn.
  static __device__ __forceinline__ void split_along_n(uint32_t raw, uint32_t planes, int turn, int lane) {
#pragma unroll 1
    for (; turn < 4 * kGroups; turn += kTogether) {
      const int group = turn % kGroups, unit = turn / kGroups, row = 32 * group + lane;
      uint32_t high[4], middle[4], low[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int k = A_ALONG_M ? 8 * unit + 2 * pair : 16 * (unit / 2) + 4 * pair + 2 * (unit % 2);
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
          x[j] = load(raw + group * kBytesGroup + (k + j) * kRowBytes + ((lane / 4) ^ ((k + j) % 8)) * kUnitBytes +
                      lane % 4 * 4);
        const SplitPair s = split_pair(x[0], x[1]);
        high[pair] = s.high, middle[pair] = s.middle, low[pair] = s.low;
      }
      const uint32_t address = plane_address(planes, row, unit);
      store4(address, high), store4(address + kPlane, middle), store4(address + 2 * kPlane, low);
    }
  }

  // --- the products -----------------------------------------------------------------------------------------------------

  struct Fragment {  // of A: 64 x 16
    uint32_t high[4], middle[4], low[4];
  };

  // Where in a stage of A a thread's first element lies.
  static __device__ __forceinline__ uint32_t corner(int warpgroup, int thread) {
    const int lane = thread % kWarp, q = lane % 4;
    const int r = warpgroup * kInstructionM + 16 * (thread / kWarp) + lane / 4;
    return A_ALONG_M ? r / 32 * (kBytesA / 4) + 2 * q * kRowBytes + ((r % 32 / 4) ^ (2 * q)) * kUnitBytes + r % 4 * 4
                     : r * 64 + q * kUnitBytes;
  }
  // The fragment of a step in the order of the instruction's registers, two floats each.
  static __device__ __forceinline__ void load_a(float (&x)[8], uint32_t stage, uint32_t corner, int step) {
    if constexpr (A_ALONG_M) {  // of the other elements, the swizzle turns single bits of the address
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int lower = i / 2 % 2, odd = i % 2, k = 16 * step + odd + i / 4 * 8;
        x[i] = load(stage + k * kRowBytes + (corner ^ (lower * 2 * kUnitBytes) ^ (odd * kUnitBytes)));
      }
    } else {
      const uint32_t address = stage + step * (kBytesA / kSteps) + corner;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[0]), "=f"(x[1]), "=f"(x[4]), "=f"(x[5])
                   : "r"(address)
                   : "memory");
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[2]), "=f"(x[3]), "=f"(x[6]), "=f"(x[7])
                   : "r"(address + 8 * 64)
                   : "memory");
    }
  }
  static __device__ __forceinline__ void split(Fragment& f, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const SplitPair s = split_pair(x[2 * i], x[2 * i + 1]);
      f.high[i] = s.high, f.middle[i] = s.middle, f.low[i] = s.low;
    }
  }
  // The five small products, smallest first.
  static __device__ __forceinline__ void small_products(float (&d)[kAccumulators], const Fragment& f, uint32_t b,
                                                        int accumulate) {
    constexpr int kNext = kPlane >> 4;
    wgmma_bf16(d, f.low, b, accumulate);
    wgmma_bf16(d, f.high, b + 2 * kNext, 1);
    wgmma_bf16(d, f.middle, b + kNext, 1);
    wgmma_bf16(d, f.middle, b, 1);
    wgmma_bf16(d, f.high, b + kNext, 1);
  }

  // The sums so far of 64 rows from (m, n) on: `add` what waits in the result's memory, and `put` them there, to begin again
  // from zero. They wait in any order, each where the same thread finds it: a warp fills 16 rows, one at a time.
  static __device__ __forceinline__ void carry(const Params& p, float (&acc)[kAccumulators], int m, int n, int thread,
                                               bool add, bool put) {
    asm volatile("" : "+r"(m), "+r"(n));  // or every address below would be kept in registers through the products
    const int lane = thread % kWarp, warp = thread / kWarp;
    if (m + kInstructionM <= p.rows && n + kBlockN <= p.columns) {
      float* const place = p.out + (m + 16 * warp) * p.out_row + n + 4 * lane;
      constexpr int kTogether = 4;
#pragma unroll
      for (int i = 0; i < kAccumulators / 4; i += kTogether) {
        if (add) {
          float4 before[kTogether];
#pragma unroll
          for (int j = 0; j < kTogether; ++j) before[j] = load_waiting(place + (i + j) * p.out_row);
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            float* const x = acc + 4 * (i + j);
            x[0] += before[j].x, x[1] += before[j].y, x[2] += before[j].z, x[3] += before[j].w;
          }
        }
        if (put) {
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            float* const x = acc + 4 * (i + j);
            store_waiting(place + (i + j) * p.out_row, x[0], x[1], x[2], x[3]);
            x[0] = x[1] = x[2] = x[3] = 0.f;
          }
        }
      }
      return;
    }
    // At the edge each number waits in its own place.
    const int row = m + 16 * warp + lane / 4, column = n + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 2) {
      const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8;
      if (r >= p.rows || c >= p.columns) continue;
      float* const place = p.out + r * p.out_row + c;
      if (add) {
        const float2 before = load_result(place);
        acc[i] += before.x, acc[i + 1] += before.y;
      }
      if (put) {
        store_result(place, acc[i], acc[i + 1]);
        acc[i] = acc[i + 1] = 0.f;
      }
    }
  }

  static __device__ __forceinline__ void consume(const Params& p, Pipeline& ring, uint32_t shared,
                                                 float (&acc)[HALVES][kAccumulators], int m, int n, int blocks,
                                                 int warpgroup, int thread, bool, Nothing) {
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) acc[half][i] = 0.f;
    if constexpr (kNarrow) wait_in_registers(ring, shared, acc, blocks, warpgroup, thread);
    else wait_in_result(p, ring, shared, acc, m, n, blocks, warpgroup, thread);
  }

  // acc = all products, by way of registers. One block of K is added while the tensor cores work on the next.
  static __device__ __forceinline__ void wait_in_registers(Pipeline& ring, uint32_t shared,
                                                           float (&acc)[HALVES][kAccumulators], int blocks, int warpgroup,
                                                           int thread) {
    float even[kAccumulators], odd[kAccumulators], waiting[kAccumulators] = {};
    Fragment even_terms[kSteps], odd_terms[kSteps];
    const uint32_t planes = uint32_t(matrix_descriptor_64(shared + kPlanes));
    const int lane = thread % kWarp;
    uint32_t mine = corner(warpgroup, thread);
    asm volatile("" : "+r"(mine));  // or it is computed again at every turn
    typename Pipeline::RingB read = ring.b;  // a stage behind
    const auto begin = [&](float(&sum)[kAccumulators], Fragment(&terms)[kSteps]) {
      const uint32_t b = planes + ring.b.stage() * (kBytesB >> 4), stage = shared + ring.a.stage() * kBytesA;
      float x[8], y[8];
      ring.a.wait_filled();
      load_a(x, stage, mine, 0);
      split(terms[0], x);
      ring.b.wait_filled();
      wgmma_pin(sum);
      wgmma_fence();
      small_products(sum, terms[0], b, 0);
      load_a(y, stage, mine, 1);  // and split while the tensor cores work
      ring.a.release_by_warp(lane);
      split(terms[1], y);
      wgmma_fence();
      small_products(sum, terms[1], b + (kInstructionBytes >> 4), 1);
      wgmma_bf16(sum, terms[0].high, b, 1);
      wgmma_bf16(sum, terms[1].high, b + (kInstructionBytes >> 4), 1);
      wgmma_commit();
      ring.a.advance();
      ring.b.advance();
    };
    const auto end = [&](float(&sum)[kAccumulators], int done) {
      wgmma_pin(sum);
      read.release_by_warp(lane);
      read.advance();
#pragma unroll
      for (int i = 0; i < kAccumulators; ++i) acc[0][i] += sum[i];
      if (done % kOuter == 0) {
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) {
          waiting[i] += acc[0][i];
          acc[0][i] = 0.f;
        }
      }
    };
    if (blocks == 0) return;
    begin(even, even_terms);
    int k = 1;
    for (; k + 1 < blocks; k += 2) {
      begin(odd, odd_terms);
      wgmma_wait<1>();
      end(even, k);
      begin(even, even_terms);
      wgmma_wait<1>();
      end(odd, k + 1);
    }
    if (k < blocks) {
      begin(odd, odd_terms);
      wgmma_wait<1>();
      end(even, k);
      wgmma_wait<0>();
      end(odd, k + 1);
    } else {
      wgmma_wait<0>();
      end(even, k);
    }
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[0][i] += waiting[i];
  }

  // The same by way of memory. Where several pieces are needed, neighbouring tiles begin with a piece of another length, so
  // that not all blocks are at the result's memory at once.
  static __device__ __forceinline__ void wait_in_result(const Params& p, Pipeline& ring, uint32_t shared,
                                                        float (&acc)[HALVES][kAccumulators], int m, int n, int blocks,
                                                        int warpgroup, int thread) {
    const int first = blocks <= kOuter ? blocks : kOuter / 4 * (1 + (m / kBlockM + n / kBlockN) % 4);
    for (int done = 0, piece = first; done < blocks; done += piece, piece = kOuter) {
      const int next = min(done + piece, blocks);
      accumulate(ring, shared, acc, next - done, warpgroup, thread);
      if (first == blocks) return;
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        carry(p, acc[half], m + row(warpgroup, half), n, thread, done > 0, next < blocks);
    }
    fence_async_proxy_global();
  }

  // acc += the products of `blocks` blocks of K.
  static __device__ __forceinline__ void accumulate(Pipeline& ring, uint32_t shared, float (&acc)[HALVES][kAccumulators],
                                                    int blocks, int warpgroup, int thread) {
    float sum[kAccumulators];
    const uint32_t planes = uint32_t(matrix_descriptor_64(shared + kPlanes));
    const int lane = thread % kWarp;
    uint32_t mine = corner(warpgroup, thread);
    asm volatile("" : "+r"(mine));  // or it is computed again at every turn
    for (int k = 0; k < blocks; ++k) {
      const uint32_t b = planes + ring.b.stage() * (kBytesB >> 4);
      const bool first = k % (INTERVAL / kBlockK) == 0, last = (k + 1) % (INTERVAL / kBlockK) == 0 || k + 1 == blocks;
      ring.b.wait_filled();
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const uint32_t stage = shared + ring.a.stage() * kBytesA;
        float x[8], y[8];
        Fragment f, g;
        ring.a.wait_filled();
        load_a(x, stage, mine, 0);
        split(f, x);
        wgmma_pin(sum);
        wgmma_fence();
        small_products(sum, f, b, !first);
        wgmma_commit();
        load_a(y, stage, mine, 1);  // and split while the tensor cores work
        ring.a.release_by_warp(lane);
        ring.a.advance();
        split(g, y);
        wgmma_fence();
        small_products(sum, g, b + (kInstructionBytes >> 4), 1);
        wgmma_bf16(sum, f.high, b, 1);
        wgmma_bf16(sum, g.high, b + (kInstructionBytes >> 4), 1);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(sum);
        if (half == HALVES - 1) {
          ring.b.release_by_warp(lane);
          ring.b.advance();
        }
        if (INTERVAL == kBlockK || last) {
#pragma unroll
          for (int i = 0; i < kAccumulators; ++i) acc[half][i] += sum[i];
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float4 load_waiting(const float* place) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(place)
                 : "memory");
    return x;
  }
  static __device__ __forceinline__ void store_waiting(float* place, float x, float y, float z, float w) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(place), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
  }
  static __device__ __forceinline__ float load(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
  }
  static __device__ __forceinline__ float4 load4(uint32_t address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
  }
  static __device__ __forceinline__ void store2(uint32_t address, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
  }
  static __device__ __forceinline__ void store4(uint32_t address, const uint32_t (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
};

}  // namespace fxfuse::hopper
