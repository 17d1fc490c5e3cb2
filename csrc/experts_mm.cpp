// The experts with torch's mm, expert by expert: for the dtypes and machines that tiles are not for. Results of mm are
// finished tile by tile, with the same code.
#include <algorithm>

#include "expert_tiles.h"
#include "experts.h"
#include "parallel.h"
#include "scratch.h"
#include "torch_mm.h"

namespace libmoe_fast {

namespace {

template <typename T>
int64_t most_rows(const ExpertInputs<T>& inputs) {
  int64_t most = 0;
  for (int64_t expert = 0; expert < inputs.experts; ++expert) most = std::max(most, inputs.rows_of(expert));
  return most;
}

// Rows of one expert, copied into its order.
template <typename T>
void copy_rows(const ExpertInputs<T>& inputs, const T* matrix, int64_t width, int64_t row, int64_t rows, T* out) {
  parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::copy_n(inputs.row_of(matrix, width, row + i), width, out + i * width);
  });
}

// Calls body(place, panel) for the tiles of [rows, width]; one thread does a panel, from its first row to its last.
template <typename Body>
void for_each_tile(int64_t expert, int64_t row, int64_t rows, int64_t width, const Body& body) {
  for_each_task(divide_up(width, kTileColumns), [&](int64_t panel, int64_t) {
    const int64_t column = panel * kTileColumns;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      body(TilePlace{expert, row + first, column, tile_extent(rows, first, kTileRows),
                     tile_extent(width, column, kTileColumns)},
           panel);
    }
  });
}

template <typename T>
Matrix<T> weight(const T* stacked, int64_t expert, int64_t rows, int64_t columns) {
  return {stacked + expert * rows * columns, rows, columns};
}

}  // namespace

template <typename T>
void forward_with_mm(const ExpertInputs<T>& in, T* z, T* y) {
  using Real = Accumulator<T>;
  const int64_t most = most_rows(in);
  ScratchPlan plan;
  const size_t xs_at = plan.add<T>(most * in.in), product_at = plan.add<T>(most * in.up);
  const size_t a_at = plan.add<T>(most * in.hidden), ys_at = plan.add<T>(in.choices * in.out);
  const Scratch scratch(plan);
  T *xs = scratch.at<T>(xs_at), *product = scratch.at<T>(product_at), *a = scratch.at<T>(a_at);
  T* ys = scratch.at<T>(ys_at);

  for (int64_t expert = 0; expert < in.experts; ++expert) {
    const int64_t row = in.offsets[expert], rows = in.rows_of(expert);
    if (rows == 0) continue;
    copy_rows(in, in.x, in.in, row, rows, xs);
    torch_mm(product, Matrix<T>{xs, rows, in.in}, weight(in.w1, expert, in.up, in.in).t());
    for_each_tile(expert, row, rows, in.hidden, [&](const TilePlace& place, int64_t) {
      alignas(64) Real gate[kTileSize], up[kTileSize];
      const T* source = product + (place.row - row) * in.up + place.column;
      load_tile<T>(gate, source, in.up, place.rows, place.columns);
      if (in.gated) load_tile<T>(up, source + in.hidden, in.up, place.rows, place.columns);
      finish_hidden<T>(in, place, z, gate, up);
      store_tile<T>(a + (place.row - row) * in.hidden + place.column, in.hidden, gate, place.rows, place.columns);
    });
    torch_mm(ys + row * in.out, Matrix<T>{a, rows, in.hidden}, weight(in.w2, expert, in.out, in.hidden).t());
    const T* bias = in.second_bias(expert);
    if (bias == nullptr) continue;
    for_each_tile(expert, row, rows, in.out, [&](const TilePlace& place, int64_t) {
      alignas(64) Real tile[kTileSize];
      T* target = ys + place.row * in.out + place.column;
      load_tile<T>(tile, target, in.out, place.rows, place.columns);
      add_bias<T>(tile, bias + place.column, place.rows, place.columns);
      store_tile<T>(target, in.out, tile, place.rows, place.columns);
    });
  }
  zero_rest(in, ys, in.out);
  combine_rows<T>(ys, in.inverse, in.weights, y, in.tokens, in.out, in.top_k);
}

template <typename T>
void backward_with_mm(const ExpertInputs<T>& in, const T* dy, const T* z, const ExpertGradients<T>& gradients) {
  using Real = Accumulator<T>;
  const int64_t most = most_rows(in), panels = divide_up(in.hidden, kTileColumns);
  ScratchPlan plan;
  const size_t xs_at = plan.add<T>(most * in.in), dys_at = plan.add<T>(most * in.out);
  const size_t g_at = plan.add<T>(most * in.hidden), a_at = plan.add<T>(most * in.hidden);
  const size_t dz_at = plan.add<T>(most * in.up);
  const size_t dots_at = plan.add<Real>(panels * most), sums_at = plan.add<Real>(panels * 2 * kTileColumns);
  const size_t row_sums_at = plan.add<Real>(std::max(in.out, most));
  const Scratch scratch(plan);
  T *xs = scratch.at<T>(xs_at), *dys = scratch.at<T>(dys_at), *g = scratch.at<T>(g_at), *a = scratch.at<T>(a_at);
  T *dz = scratch.at<T>(dz_at);
  Real *dots = scratch.at<Real>(dots_at), *sums = scratch.at<Real>(sums_at), *total = scratch.at<Real>(row_sums_at);

  for (int64_t expert = 0; expert < in.experts; ++expert) {
    const int64_t row = in.offsets[expert], rows = in.rows_of(expert);
    if (rows == 0) continue;
    copy_rows(in, dy, in.out, row, rows, dys);
    torch_mm(g, Matrix<T>{dys, rows, in.out}, weight(in.w2, expert, in.out, in.hidden));
    std::fill_n(sums, panels * 2 * kTileColumns, Real(0));
    for_each_tile(expert, row, rows, in.hidden, [&](const TilePlace& place, int64_t panel) {
      HiddenGradients<T> tile;
      const int64_t first = place.row - row;
      load_tile<T>(tile.g, g + first * in.hidden + place.column, in.hidden, place.rows, place.columns);
      Real* panel_sums = sums + panel * 2 * kTileColumns;
      tile.finish(in, place, z, panel_sums, panel_sums + kTileColumns);
      std::copy_n(tile.dots, place.rows, dots + panel * rows + first);
      T* target = dz + first * in.up + place.column;
      store_tile<T>(target, in.up, tile.g, place.rows, place.columns);
      if (in.gated) store_tile<T>(target + in.hidden, in.up, tile.up, place.rows, place.columns);
      store_tile<T>(a + first * in.hidden + place.column, in.hidden, tile.value, place.rows, place.columns);
    });
    torch_mm(gradients.drows + row * in.in, Matrix<T>{dz, rows, in.up}, weight(in.w1, expert, in.up, in.in));
    finish_dweights(in, expert, dy, dots, rows, rows, panels, total, gradients.dweights);
    if (gradients.dw1 == nullptr) continue;
    copy_rows(in, in.x, in.in, row, rows, xs);
    torch_mm(gradients.dw1 + expert * in.up * in.in, Matrix<T>{dz, rows, in.up}.t(), Matrix<T>{xs, rows, in.in});
    torch_mm(gradients.dw2 + expert * in.out * in.hidden, Matrix<T>{dys, rows, in.out}.t(),
             Matrix<T>{a, rows, in.hidden});
    if (gradients.db1 != nullptr) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        store_bias_gradient(in, expert, panel, sums + panel * 2 * kTileColumns, gradients.db1);
      }
    }
    if (gradients.db2 != nullptr) {
      sum_weighted_rows(in, dy, row, rows, 0, in.out, total);
      convert_row(gradients.db2 + expert * in.out, total, in.out);
    }
  }
}

#define LIBMOE_FAST_INSTANTIATE(T)                                   \
  template void forward_with_mm(const ExpertInputs<T>&, T*, T*);     \
  template void backward_with_mm(const ExpertInputs<T>&, const T*, const T*, const ExpertGradients<T>&);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(double)
LIBMOE_FAST_INSTANTIATE(BFloat16)
LIBMOE_FAST_INSTANTIATE(Half)

}  // namespace libmoe_fast
