// Tiles beside sums in double, for every number of rows and an odd depth, packed along, across and on the way: exit
// code 1 and a line for each that is wrong. Compiled for ARM and run in an emulator by test_arm.py, and here as well.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "packing.h"
#include "tile_gemm.h"

using namespace libmoe_fast;

namespace {

int wrong = 0;

template <typename T>
void check(const char* what, int rows, int64_t depth, const std::vector<T>& left, const std::vector<T>& right,
           const float* tile) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < kTileColumns; ++j) {
      double exact = 0, size = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = double(float(left[i * depth + k])) * double(float(right[k * kTileColumns + j]));
        exact += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(tile[i * kTileColumns + j] - exact);
      // A sum of n terms in float32: sqrt(n) roundings of half a unit, in a chain of at most 512; with a margin of 2.8.
      if (!(error <= 2.8 * std::sqrt(512.0) * size * 0x1p-24)) {
        std::printf("%s: rows %d, depth %d, at %d, %d: %g, expected %g\n", what, rows, int(depth), i, j,
                    double(tile[i * kTileColumns + j]), exact);
        ++wrong;
        return;
      }
    }
  }
}

template <typename T>
void products(const char* name, int rows, int64_t depth) {
  std::mt19937 random(rows * 1000 + depth);
  std::normal_distribution<float> normal;
  std::vector<T> left(rows * depth), right(depth * kTileColumns);
  for (T& value : left) value = T(normal(random));
  for (T& value : right) value = T(normal(random));
  const int64_t steps = (depth + per_word<T>() - 1) / per_word<T>();

  std::vector<const T*> left_rows, right_rows(steps * per_word<T>() + kRowsAhead, nullptr);
  for (int i = 0; i < rows; ++i) left_rows.push_back(&left[i * depth]);
  for (int64_t k = 0; k < depth; ++k) right_rows[k] = &right[k * kTileColumns];
  std::vector<uint32_t> packed_left(strip_words(steps) + 16), packed(steps * kTileColumns + 16), on_the_way(packed.size());
  pack_strip<T>(left_rows.data(), rows, depth, steps, packed_left.data());
  pack_panels_across<T>(right_rows.data(), 0, kTileColumns, steps, packed.data());

  alignas(64) float tile[kTileRows * kTileColumns];
  multiply_tile<T>(rows, steps, packed_left.data(), {packed.data(), steps}, tile);
  check(name, rows, depth, left, right, tile);
  if (depth % per_word<T>() == 0) {  // rows that are packed on the way are there
    multiply_tile_packing<T>(rows, steps, packed_left.data(), right_rows.data(), 0, on_the_way.data(), tile);
    check(name, rows, depth, left, right, tile);
    if (packed != on_the_way) std::printf("%s: packed on the way, other words\n", name), ++wrong;
  }

  // The same in two parts: the steps before `half` and those after it, of a panel that is packed whole.
  const int64_t half = steps / 2;
  if (half > 0) {
    alignas(64) float part[kTileRows * kTileColumns];
    std::vector<const T*> rest;
    for (const T* row : left_rows) rest.push_back(row + half * per_word<T>());
    std::vector<uint32_t> before(strip_words(half) + 16), after(strip_words(steps - half) + 16);
    pack_strip<T>(left_rows.data(), rows, half * per_word<T>(), half, before.data());
    pack_strip<T>(rest.data(), rows, depth - half * per_word<T>(), steps - half, after.data());
    multiply_tile<T>(rows, half, before.data(), {packed.data(), steps}, tile);
    multiply_tile<T>(rows, steps - half, after.data(), {packed.data(), steps, half}, part);
    for (int i = 0; i < rows * kTileColumns; ++i) tile[i] += part[i];
    check(name, rows, depth, left, right, tile);
  }

  // The finished tile as the next left operand: over its columns, times the first kTileColumns rows of `right`.
  if (depth < kTileColumns) return;
  std::vector<T> result(rows * kTileColumns);
  for (int i = 0; i < rows * kTileColumns; ++i) result[i] = T(tile[i]);
  const int64_t columns = kTileColumns / per_word<T>();
  std::vector<uint32_t> along(strip_words(columns) + 16);
  pack_tile_in_strip<T>(tile, rows, 0, columns, along.data());
  alignas(64) float next[kTileRows * kTileColumns];
  multiply_tile<T>(rows, columns, along.data(), {packed.data(), steps}, next);
  check(name, rows, kTileColumns, result, std::vector<T>(right.begin(), right.begin() + kTileColumns * kTileColumns), next);

  // And as the next right operand, summed over its rows: the transposed left times it.
  std::vector<T> turned(strip_rows() * (rows + rows % 2));
  std::vector<const T*> turned_rows;
  std::vector<T> result_rows((rows + rows % 2) * kTileColumns);
  std::copy(result.begin(), result.end(), result_rows.begin());
  for (int i = 0; i < strip_rows(); ++i) {
    for (int k = 0; k < rows; ++k) turned[i * (rows + rows % 2) + k] = T(normal(random));
    turned_rows.push_back(&turned[i * (rows + rows % 2)]);
  }
  const int64_t pairs = (rows + rows % 2) / per_word<T>();
  std::vector<uint32_t> across((rows + 2) * kTileColumns + 16), short_left(strip_words(pairs) + 16);
  pack_tile_in_panel<T>(tile, rows, 0, pairs, across.data());
  pack_strip<T>(turned_rows.data(), strip_rows(), rows + rows % 2, pairs, short_left.data());
  multiply_tile<T>(strip_rows(), pairs, short_left.data(), {across.data(), pairs}, next);
  check(name, strip_rows(), rows + rows % 2, turned, result_rows, next);
}

}  // namespace

int main() {
  for (int rows = 1; rows <= strip_rows(); ++rows) {
    for (int64_t depth : {1, 2, 7, 8, 33, 64, 301, 1024}) {
      products<float>("float32", rows, depth);
      products<BFloat16>("bfloat16", rows, depth);
    }
  }
  if (wrong == 0) std::printf("right: tiles of up to %d rows\n", strip_rows());
  return wrong == 0 ? 0 : 1;
}
