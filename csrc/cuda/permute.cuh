// permute_index: a stable counting sort of the choices by expert, in three launches.
//
// The choices are cut into slices of whole tiles. (1) Each block counts its slice's choices per expert. (2) Each warp
// turns one expert's counts into the number of its choices in earlier slices. (3) Each block ranks its slice's choices
// tile by tile, in order. Every number is an integer and every place is computed, none is claimed by an atomic, so the
// result is the one stable order on every run.
//
// Buckets are the N experts and, last, one for choices outside [0, N).
#pragma once

#include "block.cuh"

namespace libmoe_fast::cuda {

constexpr int kItems = 4;  // choices per thread and tile
constexpr int64_t kTile = kThreads * kItems;
constexpr int64_t kMaxSlices = 1024;  // bounds the table of counts; longer inputs get longer slices

struct Slices {
  int64_t choices, count, length;  // length: a multiple of kTile

  explicit Slices(int64_t total) : choices(total) {
    const int64_t tiles = total > 0 ? ceil_div(total, kTile) : 1;
    const int64_t tiles_per_slice = ceil_div(tiles, kMaxSlices);
    count = ceil_div(tiles, tiles_per_slice);
    length = tiles_per_slice * kTile;
  }

  __device__ int64_t begin() const { return blockIdx.x * length; }
  __device__ int64_t end() const { return begin() + length < choices ? begin() + length : choices; }
};

__device__ inline int bucket_of(int64_t expert, int num_experts) {
  return static_cast<uint64_t>(expert) < static_cast<uint64_t>(num_experts) ? static_cast<int>(expert) : num_experts;
}

// counts[bucket * slices.count + slice] = choices of the slice in the bucket
__global__ void __launch_bounds__(kThreads)
    count_choices(const int64_t* __restrict__ index, Slices slices, int num_experts, int64_t* __restrict__ counts) {
  int* const count = reinterpret_cast<int*>(libmoe_fast_shared);  // [N+1]
  for (int bucket = threadIdx.x; bucket <= num_experts; bucket += kThreads) count[bucket] = 0;
  __syncthreads();
  for (int64_t i = slices.begin() + threadIdx.x; i < slices.end(); i += kThreads) {
    atomicAdd(&count[bucket_of(index[i], num_experts)], 1);
  }
  __syncthreads();
  for (int bucket = threadIdx.x; bucket <= num_experts; bucket += kThreads) {
    counts[bucket * slices.count + blockIdx.x] = count[bucket];
  }
}

inline int64_t count_choices_shared(int num_experts) { return (num_experts + 1) * sizeof(int); }

// One warp per bucket. counts becomes the bucket's choices in earlier slices; totals [N+1] those in all slices.
__global__ void __launch_bounds__(kThreads)
    sum_slices(int64_t* __restrict__ counts, int64_t slices, int buckets, int64_t* __restrict__ totals) {
  const int bucket = blockIdx.x * kWarps + warp_id();
  if (bucket >= buckets) return;
  int64_t* const row = counts + bucket * slices;
  int64_t before = 0;
  for (int64_t first = 0; first < slices; first += kLanes) {
    const int64_t slice = first + lane_id();
    const int64_t count = slice < slices ? row[slice] : 0;
    const int64_t through = warp_prefix_sum(count);
    if (slice < slices) row[slice] = before + through - count;
    before += __shfl_sync(kAllLanes, through, kLanes - 1);
  }
  if (lane_id() == 0) totals[bucket] = before;
}

// place [buckets] in shared memory = sum of totals before the bucket. warp_sums [kWarps]: scratch in shared memory.
__device__ inline void first_places(const int64_t* __restrict__ totals, int buckets, int64_t* place,
                                    int64_t* warp_sums) {
  const int per_thread = (buckets + kThreads - 1) / kThreads;
  const int begin = threadIdx.x * per_thread;
  const int end = begin + per_thread < buckets ? begin + per_thread : buckets;
  int64_t sum = 0;
  for (int bucket = begin; bucket < end; ++bucket) sum += totals[bucket];
  const int64_t through = warp_prefix_sum(sum);
  if (lane_id() == kLanes - 1) warp_sums[warp_id()] = through;
  __syncthreads();
  int64_t before = through - sum;
  for (int warp = 0; warp < warp_id(); ++warp) before += warp_sums[warp];
  for (int bucket = begin; bucket < end; ++bucket) {
    place[bucket] = before;
    before += totals[bucket];
  }
  __syncthreads();
}

// counts, totals: from sum_slices. A warp ranks kItems * 32 successive choices, 32 at a time: lanes with the same
// bucket find each other by __match_any_sync.
__global__ void __launch_bounds__(kThreads)
    place_choices(const int64_t* __restrict__ index, Slices slices, int num_experts,
                  const int64_t* __restrict__ counts, const int64_t* __restrict__ totals, int64_t* __restrict__ order,
                  int64_t* __restrict__ inverse, int64_t* __restrict__ offsets) {
  const int buckets = num_experts + 1;
  int64_t* const place = reinterpret_cast<int64_t*>(libmoe_fast_shared);  // [N+1] place of the tile's first choice
  int64_t* const warp_sums = place + buckets;                            // [kWarps]
  int* const seen = reinterpret_cast<int*>(warp_sums + kWarps);           // [kWarps + 1, N+1] choices of each warp,
  int* const seen_by_tile = seen + kWarps * buckets;                      // then of the warps before; last row: of all
  int* const seen_by_warp = seen + warp_id() * buckets;

  first_places(totals, buckets, place, warp_sums);
  for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
    if (blockIdx.x == 0) offsets[bucket] = place[bucket];
    place[bucket] += counts[bucket * slices.count + blockIdx.x];
    seen_by_tile[bucket] = 0;
  }

  for (int64_t tile = slices.begin(); tile < slices.end(); tile += kTile) {
    // A bucket is always the same thread's, here and below.
    for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
      place[bucket] += seen_by_tile[bucket];
      for (int warp = 0; warp < kWarps; ++warp) seen[warp * buckets + bucket] = 0;
    }
    __syncthreads();

    int bucket[kItems], rank[kItems];  // rank: choices of the bucket before this one, in the tile, by this warp
    const int64_t first = tile + warp_id() * (kItems * kLanes) + lane_id();
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const int64_t i = first + item * kLanes;
      bucket[item] = i < slices.end() ? bucket_of(index[i], num_experts) : buckets;  // buckets: no choice
    }
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const unsigned peers = __match_any_sync(kAllLanes, bucket[item]);
      const int before = __popc(peers & ((1u << lane_id()) - 1));
      const int already = bucket[item] < buckets ? seen_by_warp[bucket[item]] : 0;
      rank[item] = already + before;
      __syncwarp();
      if (before == 0 && bucket[item] < buckets) seen_by_warp[bucket[item]] = already + __popc(peers);
      __syncwarp();
    }
    __syncthreads();

    for (int bucket = threadIdx.x; bucket < buckets; bucket += kThreads) {
      int before = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        const int count = seen[warp * buckets + bucket];
        seen[warp * buckets + bucket] = before;
        before += count;
      }
      seen_by_tile[bucket] = before;
    }
    __syncthreads();

#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      if (bucket[item] == buckets) continue;
      const int64_t i = first + item * kLanes;
      const int64_t position = place[bucket[item]] + seen_by_warp[bucket[item]] + rank[item];
      order[position] = i;
      inverse[i] = position;
    }
    __syncthreads();
  }
}

inline int64_t place_choices_shared(int num_experts) {
  const int64_t buckets = num_experts + 1;
  return (buckets + kWarps) * sizeof(int64_t) + (kWarps + 1) * buckets * sizeof(int);
}

}  // namespace libmoe_fast::cuda
