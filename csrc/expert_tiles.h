// The work between the experts' GEMMs, one tile at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "experts.h"
#include "tiles.h"

namespace libmoe_fast {

inline int64_t divide_up(int64_t total, int64_t part) { return (total + part - 1) / part; }

inline int tile_extent(int64_t total, int64_t begin, int64_t limit) {
  return static_cast<int>(std::min(limit, total - begin));
}

// A tile's place: `rows` sorted rows from `row` on, `columns` hidden columns from `column` on.
struct TilePlace {
  int64_t expert, row, column;
  int rows, columns;
};

// gate, and up if gated: tiles of xs W1^T. Adds the bias, keeps z if wanted, and leaves a in gate.
template <typename T>
void finish_hidden(const ExpertInputs<T>& inputs, const TilePlace& place, T* z, Accumulator<T>* gate,
                   Accumulator<T>* up) {
  const T* bias = inputs.first_bias(place.expert);
  const auto add_and_keep = [&](Accumulator<T>* tile, int64_t column) {
    add_bias<T>(tile, bias == nullptr ? nullptr : bias + column, place.rows, place.columns);
    if (z != nullptr) store_tile<T>(z + place.row * inputs.up + column, inputs.up, tile, place.rows, place.columns);
  };
  add_and_keep(gate, place.column);
  activate(inputs.activation, gate, place.rows * kTileColumns);
  if (!inputs.gated) return;
  add_and_keep(up, inputs.hidden + place.column);
  if (inputs.activation == Activation::kGptOss) {
    apply_gate<true>(gate, up, place.rows);
  } else {
    apply_gate<false>(gate, up, place.rows);
  }
}

// What backward makes of a tile of g = dys W2.
template <typename T>
struct HiddenGradients {
  using Real = Accumulator<T>;
  alignas(64) Real g[kTileSize];      // in: g; out: the gradient by gate, or by z if not gated
  alignas(64) Real up[kTileSize];     // out, if gated: the gradient by up
  alignas(64) Real value[kTileSize];  // out: weight * a
  alignas(64) Real slope[kTileSize];
  Real dots[kTileRows];               // out: <g, a> over these columns

  // sums and up_sums [kTileColumns]: the columns of the gradients are added to them.
  void finish(const ExpertInputs<T>& inputs, const TilePlace& place, const T* z, Real* sums, Real* up_sums) {
    Real weights[kTileRows];
    for (int i = 0; i < place.rows; ++i) weights[i] = inputs.weight_of(place.row + i);
    const T* z_tile = z + place.row * inputs.up + place.column;
    load_tile<T>(value, z_tile, inputs.up, place.rows, place.columns);
    activate_with_slopes(inputs.activation, value, slope, place.rows * kTileColumns);
    if (inputs.gated) {
      load_tile<T>(up, z_tile + inputs.hidden, inputs.up, place.rows, place.columns);
      if (inputs.activation == Activation::kGptOss) {
        gated_gradients<true>(g, up, value, slope, weights, dots, sums, up_sums, place.rows);
      } else {
        gated_gradients<false>(g, up, value, slope, weights, dots, sums, up_sums, place.rows);
      }
    } else {
      activation_gradients(g, value, slope, weights, dots, sums, place.rows);
    }
  }
};

// dweights of an expert's rows: the panels' dots [panels, rows] with this stride, added up in order, plus <dy, b2>.
// total [rows] is room to work in.
template <typename T>
void finish_dweights(const ExpertInputs<T>& inputs, int64_t expert, const T* dy, const Accumulator<T>* dots,
                     int64_t rows, int64_t stride, int64_t panels, Accumulator<T>* total, Accumulator<T>* dweights) {
  const T* bias = inputs.second_bias(expert);
  const int64_t row = inputs.offsets[expert];
  std::fill_n(total, rows, Accumulator<T>(0));
  for (int64_t panel = 0; panel < panels; ++panel) add_to_sum<Accumulator<T>>(total, dots + panel * stride, 1, rows);
  for (int64_t i = 0; i < rows; ++i) {
    if (bias != nullptr) total[i] += dot_row<T>(inputs.row_of(dy, inputs.out, row + i), bias, inputs.out);
    dweights[inputs.order[row + i]] = total[i];
  }
}

// db1 of one panel from its column sums: [gate or z, kTileColumns], then [up, kTileColumns].
template <typename T>
void store_bias_gradient(const ExpertInputs<T>& inputs, int64_t expert, int64_t panel, const Accumulator<T>* sums,
                         T* db1) {
  const int64_t column = panel * kTileColumns;
  const int columns = tile_extent(inputs.hidden, column, kTileColumns);
  T* target = db1 + expert * inputs.up + column;
  convert_row(target, sums, columns);
  if (inputs.gated) convert_row(target + inputs.hidden, sums + kTileColumns, columns);
}

// sum [columns] = weighted sum over rows of dy's columns from `column` on: db2.
template <typename T>
void sum_weighted_rows(const ExpertInputs<T>& inputs, const T* dy, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, Accumulator<T>* sum) {
  constexpr int64_t kPart = 16, kColumns = 256;  // sums of sums lose less than one long sum
  Accumulator<T> part[kColumns];
  for (int64_t begin = 0; begin < columns; begin += kColumns) {
    const int64_t count = std::min(kColumns, columns - begin);
    std::fill_n(sum + begin, count, Accumulator<T>(0));
    for (int64_t first = row; first < row + rows; first += kPart) {
      std::fill_n(part, count, Accumulator<T>(0));
      for (int64_t i = first; i < std::min(row + rows, first + kPart); ++i) {
        add_to_sum<T>(part, inputs.row_of(dy, inputs.out, i) + column + begin, inputs.weight_of(i), count);
      }
      add_to_sum<Accumulator<T>>(sum + begin, part, 1, count);
    }
  }
}

}  // namespace libmoe_fast
