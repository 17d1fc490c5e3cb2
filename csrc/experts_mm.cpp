// The experts with torch's mm, expert by expert: for the dtypes and machines that tiles are not for. Results of mm are
// finished tile by tile, with the same code.
#include <algorithm>
#include <type_traits>

#include "expert_tiles.h"
#include "experts.h"
#include "instructions.h"
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

// Rows of one expert, copied into its order, in M.
template <typename T, typename M>
void copy_rows(const ExpertInputs<T>& inputs, const T* matrix, int64_t width, int64_t row, int64_t rows, M* out) {
  parallel_rows(rows, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* source = inputs.row_of(matrix, width, row + i);
      if constexpr (std::is_same_v<T, M>) {
        std::copy_n(source, width, out + i * width);
      } else {
        convert_row(out + i * width, source, width);
      }
    }
  });
}

template <typename From, typename To>
void convert(const From* matrix, int64_t rows, int64_t width, To* out) {
  parallel_rows(rows, width, [=](int64_t begin, int64_t end) {
    convert_row(out + begin * width, matrix + begin * width, (end - begin) * width);
  });
}

// Room for values in M, none where they are in T anyway.
template <typename T, typename M>
size_t add_room(ScratchPlan& plan, int64_t count) {
  return plan.add<M>(std::is_same_v<T, M> ? 0 : count);
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

// One expert's weight in M: where it lies, or converted into `room`.
template <typename M, typename T>
Matrix<M> weight(const T* stacked, int64_t expert, int64_t rows, int64_t columns, M* room) {
  const T* own = stacked + expert * rows * columns;
  if constexpr (std::is_same_v<T, M>) {
    return {own, rows, columns};
  } else {
    convert(own, rows, columns, room);
    return {room, rows, columns};
  }
}

// out, in T, = left * right, by way of `room`
template <typename T, typename M>
void product_in(T* out, const Matrix<M>& left, const Matrix<M>& right, M* room) {
  if constexpr (std::is_same_v<T, M>) {
    torch_mm(out, left, right);
  } else {
    torch_mm(room, left, right);
    const int64_t rows = left.transposed ? left.columns : left.rows;
    convert(room, rows, right.transposed ? right.rows : right.columns, out);
  }
}

// M: what torch multiplies in, T or fp32.
template <typename T, typename M>
void forward_in(const ExpertInputs<T>& in, T* z, T* y) {
  using Real = Accumulator<T>;
  const int64_t most = most_rows(in);
  ScratchPlan plan;
  const size_t xs_at = plan.add<M>(most * in.in), product_at = plan.add<M>(most * in.up);
  const size_t a_at = plan.add<M>(most * in.hidden), ys_at = plan.add<T>(in.choices * in.out);
  const size_t weight_at = add_room<T, M>(plan, std::max(in.up * in.in, in.out * in.hidden));
  const size_t out_at = add_room<T, M>(plan, most * in.out);
  const Scratch scratch(plan);
  M *xs = scratch.at<M>(xs_at), *product = scratch.at<M>(product_at), *a = scratch.at<M>(a_at);
  M *room = scratch.at<M>(weight_at), *out_room = scratch.at<M>(out_at);
  T* ys = scratch.at<T>(ys_at);

  for (int64_t expert = 0; expert < in.experts; ++expert) {
    const int64_t row = in.offsets[expert], rows = in.rows_of(expert);
    if (rows == 0) continue;
    copy_rows(in, in.x, in.in, row, rows, xs);
    torch_mm(product, Matrix<M>{xs, rows, in.in}, weight(in.w1, expert, in.up, in.in, room).t());
    for_each_tile(expert, row, rows, in.hidden, [&](const TilePlace& place, int64_t) {
      alignas(64) Real gate[kTileSize], up[kTileSize];
      const M* source = product + (place.row - row) * in.up + place.column;
      load_tile<M>(gate, source, in.up, place.rows, place.columns);
      if (in.gated) load_tile<M>(up, source + in.hidden, in.up, place.rows, place.columns);
      finish_hidden<T>(in, place, z, gate, up);
      store_tile<M>(a + (place.row - row) * in.hidden + place.column, in.hidden, gate, place.rows, place.columns);
    });
    const Matrix<M> second = weight(in.w2, expert, in.out, in.hidden, room).t(), left{a, rows, in.hidden};
    const T* bias = in.second_bias(expert);
    if (bias == nullptr) {
      product_in(ys + row * in.out, left, second, out_room);
      continue;
    }
    M* outs = out_room;
    if constexpr (std::is_same_v<T, M>) outs = ys + row * in.out;
    torch_mm(outs, left, second);
    for_each_tile(expert, row, rows, in.out, [&](const TilePlace& place, int64_t) {
      alignas(64) Real tile[kTileSize];
      load_tile<M>(tile, outs + (place.row - row) * in.out + place.column, in.out, place.rows, place.columns);
      add_bias<T>(tile, bias + place.column, place.rows, place.columns);
      store_tile<T>(ys + place.row * in.out + place.column, in.out, tile, place.rows, place.columns);
    });
  }
  zero_rest(in, ys, in.out);
  combine_rows<T>(ys, in.inverse, in.weights, y, in.tokens, in.out, in.top_k);
}

template <typename T, typename M>
void backward_in(const ExpertInputs<T>& in, const T* dy, const T* z, const ExpertGradients<T>& gradients) {
  using Real = Accumulator<T>;
  const int64_t most = most_rows(in), panels = divide_up(in.hidden, kTileColumns);
  ScratchPlan plan;
  const size_t xs_at = plan.add<M>(most * in.in), dys_at = plan.add<M>(most * in.out);
  const size_t g_at = plan.add<M>(most * in.hidden), a_at = plan.add<M>(most * in.hidden);
  const size_t dz_at = plan.add<M>(most * in.up);
  const size_t weight_at = add_room<T, M>(plan, std::max(in.up * in.in, in.out * in.hidden));
  const size_t drows_at = add_room<T, M>(plan, most * in.in);
  const size_t dots_at = plan.add<Real>(panels * most), sums_at = plan.add<Real>(panels * 2 * kTileColumns);
  const size_t row_sums_at = plan.add<Real>(std::max(in.out, most));
  const Scratch scratch(plan);
  M *xs = scratch.at<M>(xs_at), *dys = scratch.at<M>(dys_at), *g = scratch.at<M>(g_at), *a = scratch.at<M>(a_at);
  M *dz = scratch.at<M>(dz_at), *room = scratch.at<M>(weight_at), *drows_room = scratch.at<M>(drows_at);
  Real *dots = scratch.at<Real>(dots_at), *sums = scratch.at<Real>(sums_at), *total = scratch.at<Real>(row_sums_at);

  for (int64_t expert = 0; expert < in.experts; ++expert) {
    const int64_t row = in.offsets[expert], rows = in.rows_of(expert);
    if (rows == 0) continue;
    copy_rows(in, dy, in.out, row, rows, dys);
    torch_mm(g, Matrix<M>{dys, rows, in.out}, weight(in.w2, expert, in.out, in.hidden, room));
    std::fill_n(sums, panels * 2 * kTileColumns, Real(0));
    for_each_tile(expert, row, rows, in.hidden, [&](const TilePlace& place, int64_t panel) {
      HiddenGradients<T> tile;
      const int64_t first = place.row - row;
      load_tile<M>(tile.g, g + first * in.hidden + place.column, in.hidden, place.rows, place.columns);
      Real* panel_sums = sums + panel * 2 * kTileColumns;
      tile.finish(in, place, z, panel_sums, panel_sums + kTileColumns);
      std::copy_n(tile.dots, place.rows, dots + panel * rows + first);
      M* target = dz + first * in.up + place.column;
      store_tile<M>(target, in.up, tile.g, place.rows, place.columns);
      if (in.gated) store_tile<M>(target + in.hidden, in.up, tile.up, place.rows, place.columns);
      store_tile<M>(a + first * in.hidden + place.column, in.hidden, tile.value, place.rows, place.columns);
    });
    const Matrix<M> first{dz, rows, in.up};
    product_in(gradients.drows + row * in.in, first, weight(in.w1, expert, in.up, in.in, room), drows_room);
    finish_dweights(in, expert, dy, dots, rows, rows, panels, total, gradients.dweights);
    if (gradients.dw1 == nullptr) continue;
    copy_rows(in, in.x, in.in, row, rows, xs);
    product_in(gradients.dw1 + expert * in.up * in.in, first.t(), Matrix<M>{xs, rows, in.in}, room);
    product_in(gradients.dw2 + expert * in.out * in.hidden, Matrix<M>{dys, rows, in.out}.t(),
               Matrix<M>{a, rows, in.hidden}, room);
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

// Calls body.operator()<M>() with what torch multiplies fastest in: without instructions for 16 bits its mm takes many
// times as long as in fp32.
template <typename T, typename Body>
void in_fastest(const Body& body) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
    const bool slow = std::is_same_v<T, BFloat16> ? !mm_has_bf16() : !mm_has_fp16();
    if (slow) return body.template operator()<float>();
  }
  body.template operator()<T>();
}

}  // namespace

template <typename T>
void forward_with_mm(const ExpertInputs<T>& inputs, T* z, T* y) {
  in_fastest<T>([&]<typename M>() { forward_in<T, M>(inputs, z, y); });
}

template <typename T>
void backward_with_mm(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients) {
  in_fastest<T>([&]<typename M>() { backward_in<T, M>(inputs, dy, z, gradients); });
}

#define LIBMOE_FAST_INSTANTIATE(T)                                   \
  template void forward_with_mm(const ExpertInputs<T>&, T*, T*);     \
  template void backward_with_mm(const ExpertInputs<T>&, const T*, const T*, const ExpertGradients<T>&);
LIBMOE_FAST_INSTANTIATE(float)
LIBMOE_FAST_INSTANTIATE(double)
LIBMOE_FAST_INSTANTIATE(BFloat16)
LIBMOE_FAST_INSTANTIATE(Half)

}  // namespace libmoe_fast
