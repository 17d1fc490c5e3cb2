// Backward in tiles. Per group of whole experts, rounds of tasks: pack the rows; then for each slice of the hidden columns
// g = dys W2 and everything made from it, and what needs all rows of that: the slice's part of dx and of the weight
// gradients. Slices bound the memory, and keep it in cache.
#include <algorithm>
#include <vector>

#include "experts.h"
#include "panels.h"
#include "scratch.h"

namespace libmoe_fast {

namespace {

// What a slice keeps of g: dz twice, packed and not, and a. Not too many: each adds its part to the sums of dx, which with
// many rows are in no cache. One, which needs no sums, where it fits: with few rows per expert that is worth 3%.
constexpr int64_t kOneSliceBytes = int64_t{14} << 20, kSliceBytes = int64_t{8} << 20, kMostSlices = 4;

// Slices are whole strips of dW1 as well: multiples of so many panels.
int64_t whole_strips() {
  static_assert(7 * kTileColumns % kTileRows == 0 && 3 * kTileColumns % kNarrowRows == 0);
  return strip_rows() == kTileRows ? 7 : 3;
}

// Of the sum of a weight gradient over an expert's rows, done at a time: their panels stay in the second-level cache.
constexpr int64_t kMostRowSteps = 1024;

// Weight gradients above this size are written past the caches; smaller ones are still there when the optimizer reads them.
constexpr int64_t kCachedBytes = int64_t{16} << 20;

// Hidden panels [first, last).
struct Slice {
  int64_t first, last;

  int64_t panels() const { return last - first; }
  int64_t begin() const { return first * kTileColumns; }  // of its columns
  int64_t columns(int64_t hidden) const { return std::min(hidden, last * kTileColumns) - begin(); }
};

template <typename T>
class Backward {
 public:
  Backward(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients)
      : in_(inputs),
        dy_(dy),
        z_(z),
        out_(gradients),
        groups_(make_groups(inputs.offsets, inputs.experts, (inputs.out + inputs.up) * packed_bytes<T>(), false)),
        hidden_panels_(panels_of(inputs.hidden)),
        in_panels_(panels_of(inputs.in)),
        dy_steps_(steps_of<T>(inputs.out)),
        sides_(inputs.gated ? 2 : 1),
        streams_(inputs.experts * (inputs.up * inputs.in + inputs.out * inputs.hidden) * sizeof(T) > kCachedBytes),
        slice_panels_(panels_per_slice()),
        scratch_(plan()) {}

  void run() {
    for (const Group& group : groups_) {
      list_rows(group);
      pack_rows(group);
      for (int64_t first = 0; first < hidden_panels_; first += slice_panels_) {
        const Slice slice{first, std::min(hidden_panels_, first + slice_panels_)};
        hidden_gradients(group, slice);
        remaining_gradients(group, slice);
      }
    }
  }

 private:
  // ----------------------------------------------------------------------------------------------------------- memory

  bool weight_grads() const { return out_.dw1 != nullptr; }
  bool sliced() const { return slice_panels_ < hidden_panels_; }
  int64_t dz_width() const { return sides_ * slice_panels_ * kTileColumns; }  // of a row of dz in a slice
  int64_t dz_steps(const Slice& slice) const { return sides_ * slice.panels() * panel_steps<T>(); }

  // Slices of about the same size.
  int64_t panels_per_slice() const {
    const int64_t rows = largest(groups_, [](const Group& group) { return group.padded_rows; });
    const int64_t value_bytes = sides_ * (packed_bytes<T>() + static_cast<int64_t>(sizeof(T))) + packed_bytes<T>();
    const int64_t bytes = rows * hidden_panels_ * kTileColumns * value_bytes;
    const int64_t slices = bytes <= kOneSliceBytes ? 1 : std::min(divide_up(bytes, kSliceBytes), kMostSlices);
    const int64_t panels = divide_up(hidden_panels_, slices);
    return std::min(hidden_panels_, divide_up(panels, whole_strips()) * whole_strips());
  }

  ScratchPlan plan() {
    ScratchPlan plan;
    const int64_t most_steps = dz_steps({0, slice_panels_});
    const int64_t strips = largest(groups_, [](const Group& group) { return group.strips; });
    const int64_t rows = largest(groups_, [](const Group& group) { return group.rows; });
    const int64_t padded = largest(groups_, [](const Group& group) { return group.padded_rows; });
    const int64_t units = largest(groups_, [](const Group& group) { return group.units.size(); });
    const int64_t workers = torch::stable::get_num_threads();
    const int64_t kept = weight_grads() ? padded : 0;
    dys_ = plan.add<uint32_t>(strip_words(strips * dy_steps_));
    dz_left_ = plan.add<uint32_t>(strip_words(strips * most_steps));
    dz_ = plan.add<T>((weight_grads() ? rows : 0) * dz_width());
    a_right_ = plan.add<uint32_t>(kept / per_word<T>() * slice_panels_ * kTileColumns);
    dx_sums_ = plan.add<float>((sliced() ? rows : 0) * in_.in);
    xs_right_ = plan.add<uint32_t>(kept / per_word<T>() * in_panels_ * kTileColumns);
    dots_ = plan.add<float>(hidden_panels_ * rows);
    totals_ = plan.add<float>(rows);
    sums_ = plan.add<float>(units * hidden_panels_ * 2 * kTileColumns);
    dy_rows_ = plan.add<const T*>(padded);
    x_rows_ = plan.add<const T*>(padded);
    dz_rows_ = plan.add<const T*>(padded);
    const int64_t row_steps = std::min(kMostRowSteps, padded / per_word<T>());
    local_stride_ = operand_words(std::max(std::max(dy_steps_, most_steps) * kTileColumns, strip_words(row_steps)));
    local_ = plan.add<uint32_t>(local_stride_ * workers);
    const bool in_parts = weight_grads() && padded / per_word<T>() > kMostRowSteps;
    tile_sums_stride_ = in_parts ? kMostPanels * std::max(in_panels_, slice_panels_) * kTileSize : 0;
    tile_sums_ = plan.add<float>(tile_sums_stride_ * workers);
    local_rows_stride_ = std::max(dy_steps_, most_steps) * per_word<T>();
    local_rows_ = plan.add<const T*>(local_rows_stride_ * workers);
    return plan;
  }

  template <typename Value>
  Value* at(size_t offset) const {
    return scratch_.template at<Value>(offset);
  }

  uint32_t* local(int64_t worker) const { return at<uint32_t>(local_) + worker * local_stride_; }
  const T** local_rows(int64_t worker) const { return at<const T*>(local_rows_) + worker * local_rows_stride_; }

  // One expert's part of a right operand that sums over its rows, of `panels` panels.
  static int64_t span_steps(const ExpertSpan& span) { return span.padded_rows() / per_word<T>(); }
  uint32_t* right_of(size_t offset, const ExpertSpan& span, int64_t panels) const {
    return at<uint32_t>(offset) + span.padded_row / per_word<T>() * panels * kTileColumns;
  }

  // ----------------------------------------------------------------------------------------------------- rows, packed

  // Where each padded row of the group lies in dy, x and dz; null for padding.
  void list_rows(const Group& group) {
    for (const ExpertSpan& span : group.spans) {
      for (int64_t i = 0; i < span.padded_rows(); ++i) {
        const bool padding = i >= span.rows;
        const int64_t place = span.padded_row + i, row = span.row + i;
        at<const T*>(dy_rows_)[place] = padding ? nullptr : in_.row_of(dy_, in_.out, row);
        at<const T*>(x_rows_)[place] = padding ? nullptr : in_.row_of(in_.x, in_.in, row);
        at<const T*>(dz_rows_)[place] = padding ? nullptr : at<T>(dz_) + (row - group.row) * dz_width();
      }
    }
  }

  void pack_rows(const Group& group) {
    TaskRound round;
    add_strips(round, group, [this](const Unit& unit, int64_t strip) {
      pack_unit_strip<T>(in_, unit, strip, dy_, in_.out, at<uint32_t>(dys_));
    });
    const int64_t blocks = weight_grads() ? divide_up(in_panels_, kMostPanels) : 0;
    round.add(group.spans.size() * blocks, [&](int64_t task, int64_t, const auto&) {
      const ExpertSpan& span = group.spans[task / blocks];
      const int64_t panel = task % blocks * kMostPanels, column = panel * kTileColumns, steps = span_steps(span);
      pack_panels_across<T>(at<const T*>(x_rows_) + span.padded_row, column,
                            std::min(kMostPanels * kTileColumns, in_.in - column), steps,
                            right_of(xs_right_, span, in_panels_) + panel * steps * kTileColumns);
    });
    round.run();
  }

  // ----------------------------------------------------------------------------------- g, and everything made from it

  void hidden_gradients(const Group& group, const Slice& slice) {
    const PanelBlocks blocks(group.units.size(), slice.panels(), dy_steps_ * kTileColumns);
    TaskRound round;
    blocks.add_to(round, [&](PanelBlock block, PanelBlock next, int64_t worker) {
      for (PanelBlock* panels : {&block, &next}) {
        panels->first += slice.first;
        panels->last += slice.first;
      }
      const Unit& unit = group.units[block.unit];
      const T* const* rows = unpacked(list_w2(unit.expert, worker), dy_steps_, in_.hidden, block, worker);
      float* sums = at<float>(sums_) + block.unit * hidden_panels_ * 2 * kTileColumns;
      std::fill(sums + block.first * 2 * kTileColumns, sums + block.last * 2 * kTileColumns, 0.0f);
      const NextOperand ahead = columns_of(in_.second_weight(group.units[next.unit].expert), in_.out, in_.hidden, next);
      hidden_gradient_tiles(group, slice, block, rows, local(worker), sums, ahead);
    });
    round.run();
  }

  // The columns of a matrix [rows, width] that a block is made of.
  static NextOperand columns_of(const T* matrix, int64_t rows, int64_t width, const PanelBlock& block) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t begin = block.first * kTileColumns, end = std::min(width, block.last * kTileColumns);
    return {matrix + begin, rows, width * kSize, std::max<int64_t>(0, end - begin) * kSize};
  }

  const T* const* list_w2(int64_t expert, int64_t worker) {
    const T** rows = local_rows(worker);
    const T* weight = in_.second_weight(expert);
    for (int64_t i = 0; i < dy_steps_ * per_word<T>(); ++i) rows[i] = i < in_.out ? weight + i * in_.hidden : nullptr;
    return rows;
  }

  // The rows of a block's weight, for its first strip to pack. Null if they had to be packed before, because something is
  // filled up with zeros: the last row, or columns.
  const T* const* unpacked(const T* const* rows, int64_t steps, int64_t width, const PanelBlock& block, int64_t worker) {
    const int64_t column = block.first * kTileColumns, columns = std::min(width, block.last * kTileColumns) - column;
    const bool whole = columns == (block.last - block.first) * kTileColumns &&
                       std::find(rows, rows + steps * per_word<T>(), nullptr) == rows + steps * per_word<T>();
    if (whole) return rows;
    pack_panels_across<T>(rows, column, columns, steps, local(worker));
    return nullptr;
  }

  void hidden_gradient_tiles(const Group& group, const Slice& slice, const PanelBlock& block, const T* const* rows,
                             uint32_t* right, float* sums, const NextOperand& next) {
    const Unit& unit = group.units[block.unit];
    HiddenGradients<T> tile;
    const ExpertSpan& span = span_of(group, unit.expert);
    multiply_unit<T>(unit, dy_steps_, at<uint32_t>(dys_), right, block, in_.hidden, tile.g,
                     [&](const TilePlace& place, int64_t strip, int64_t panel) {
      float* panel_sums = sums + panel * 2 * kTileColumns;
      tile.finish(in_, place, z_, panel_sums, panel_sums + kTileColumns);
      std::copy_n(tile.dots, place.rows, at<float>(dots_) + panel * group.rows + place.row - group.row);
      keep_dz(group, slice, place, unit.strip + strip, panel, 0, tile.g);
      if (in_.gated) keep_dz(group, slice, place, unit.strip + strip, panel, 1, tile.up);
      if (!weight_grads()) return;
      const int64_t step = (unit.expert_strip + strip) * unit.height / per_word<T>(), steps = span_steps(span);
      pack_tile_in_panel<T>(tile.value, place.rows, step, steps,
                            right_of(a_right_, span, slice.panels()) + (panel - slice.first) * steps * kTileColumns);
    }, next, rows);
  }

  static const ExpertSpan& span_of(const Group& group, int64_t expert) {
    return *std::find_if(group.spans.begin(), group.spans.end(),
                         [&](const ExpertSpan& span) { return span.expert == expert; });
  }

  // A tile of dz: packed for dx, and as it is for dW1. Side 0 is the gradient by z, or if gated by gate, side 1 by up.
  void keep_dz(const Group& group, const Slice& slice, const TilePlace& place, int64_t strip, int64_t panel,
               int64_t side, const float* dz) {
    const int64_t step = (side * slice.panels() + panel - slice.first) * panel_steps<T>();
    pack_tile_in_strip<T>(dz, place.rows, step, dz_steps(slice),
                          at<uint32_t>(dz_left_) + strip_words(strip * dz_steps(slice)));
    if (!weight_grads()) return;
    const int64_t column = side * slice_panels_ * kTileColumns + place.column - slice.begin();
    store_tile<T>(at<T>(dz_) + (place.row - group.row) * dz_width() + column, dz_width(), dz, place.rows,
                  place.columns);
  }

  // -------------------------------------------------------------------------------- what needs all rows of the slice

  void remaining_gradients(const Group& group, const Slice& slice) {
    TaskRound round;  // the longest tasks first
    add_dx(round, group, slice);
    if (weight_grads()) {
      const int64_t begin = slice.begin(), columns = slice.columns(in_.hidden);
      const Strided dw2{out_.dw2 + begin, in_.out * in_.hidden, in_.hidden};
      add_weight_gradient(round, group, {dy_rows_, 0, in_.out, a_right_, columns, dw2});
      for (int64_t side = 0; side < sides_; ++side) {
        const Strided dw1{out_.dw1 + (side * in_.hidden + begin) * in_.in, in_.up * in_.in, in_.in};
        const int64_t left_column = side * slice_panels_ * kTileColumns;
        add_weight_gradient(round, group, {dz_rows_, left_column, columns, xs_right_, in_.in, dw1});
      }
    }
    if (slice.last == hidden_panels_) {
      round.add(group.spans.size(),
                [&](int64_t task, int64_t, const auto&) { small_gradients(group, group.spans[task]); });
    }
    round.run();
  }

  // dxs = dz W1, summed over the slices in float32
  void add_dx(TaskRound& round, const Group& group, const Slice& slice) {
    const PanelBlocks blocks(group.units.size(), in_panels_, dz_steps(slice) * kTileColumns);
    blocks.add_to(round, [this, &group, &slice](const PanelBlock& block, const PanelBlock& next, int64_t worker) {
      dx_tiles(group, slice, block, next, worker);
    });
  }

  void dx_tiles(const Group& group, const Slice& slice, const PanelBlock& block, const PanelBlock& next,
                int64_t worker) {
    const Unit& unit = group.units[block.unit];
    const T* const* rows = unpacked(list_w1(unit.expert, slice, worker), dz_steps(slice), in_.in, block, worker);
    const T* next_weight = in_.first_weight(group.units[next.unit].expert) + slice.begin() * in_.in;
    const NextOperand ahead = columns_of(next_weight, slice.columns(in_.hidden), in_.in, next);
    alignas(64) float tile[kTileSize];
    multiply_unit<T>(unit, dz_steps(slice), at<uint32_t>(dz_left_), local(worker), block, in_.in, tile,
                     [&](const TilePlace& place, int64_t, int64_t) {
      float* sums = at<float>(dx_sums_) + (place.row - group.row) * in_.in + place.column;
      if (slice.first > 0) add_tile(tile, sums, in_.in, place.rows, place.columns);
      if (slice.last < hidden_panels_) {
        store_tile<float>(sums, in_.in, tile, place.rows, place.columns);
      } else {
        store_tile<T>(out_.drows + place.row * in_.in + place.column, in_.in, tile, place.rows, place.columns);
      }
    }, ahead, rows);
  }

  const T* const* list_w1(int64_t expert, const Slice& slice, int64_t worker) {
    const T** rows = local_rows(worker);
    const int64_t columns = slice.columns(in_.hidden), padded = slice.panels() * kTileColumns;  // dz is packed in panels
    for (int64_t side = 0; side < sides_; ++side, rows += padded) {
      const T* weight = in_.first_weight(expert) + (side * in_.hidden + slice.begin()) * in_.in;
      for (int64_t i = 0; i < columns; ++i) rows[i] = weight + i * in_.in;
      std::fill(rows + columns, rows + padded, nullptr);
    }
    return local_rows(worker);
  }

  // Matrices of all experts, in a larger stack.
  struct Strided {
    T* first;
    int64_t expert_size, row_size;
  };

  // An expert's dW [height, width] = left^T right, a sum over its rows: dW2 = dys^T (weight a), dW1 = dz^T xs. left is
  // `height` columns of its rows, from left_column on.
  struct WeightGradient {
    size_t left_rows;
    int64_t left_column, height;
    size_t right;
    int64_t width;
    Strided target;
  };

  void add_weight_gradient(TaskRound& round, const Group& group, const WeightGradient& gradient) {
    int64_t longest = 0;
    for (const ExpertSpan& span : group.spans) longest = std::max(longest, span_steps(span));
    const int64_t most = cached_panels(strip_words(std::min(longest, kMostRowSteps)));
    const std::vector<Share> shares = share_out(group.spans.size(), divide_up(gradient.height, strip_rows()), most);
    round.add(shares.size(), [this, &group, gradient, shares](int64_t task, int64_t worker, const auto&) {
      const Share& share = shares[task];
      weight_tiles(group.spans[share.unit], gradient, share.begin, share.end, worker);
    });
  }

  // Strips [first, last) of one expert's gradient, summed over its rows in equal parts.
  void weight_tiles(const ExpertSpan& span, const WeightGradient& gradient, int64_t first, int64_t last,
                    int64_t worker) {
    const int64_t steps = span_steps(span), part = divide_up(steps, divide_up(steps, kMostRowSteps));
    for (int64_t begin = 0; begin < steps; begin += part) {
      weight_tiles_part(span, gradient, {first, last}, {begin, std::min(steps, begin + part)}, worker);
    }
  }

  struct Range {
    int64_t first, last;
  };

  void weight_tiles_part(const ExpertSpan& span, const WeightGradient& gradient, Range strips, Range part,
                         int64_t worker) {
    const int64_t height = gradient.height, width = gradient.width, steps = span_steps(span);
    const int64_t first_row = strips.first * strip_rows(), last_row = std::min(height, strips.last * strip_rows());
    const int64_t part_steps = part.last - part.first;
    const bool starts = part.first == 0, ends = part.last == steps;
    uint32_t* left = local(worker);
    const T* const* rows = at<const T*>(gradient.left_rows) + span.padded_row + part.first * per_word<T>();
    pack_strips_across<T>(rows, gradient.left_column + first_row, last_row - first_row, part_steps, left);
    const uint32_t* right = right_of(gradient.right, span, panels_of(width));
    const int64_t stride = gradient.target.row_size;
    T* target = gradient.target.first + span.expert * gradient.target.expert_size;
    float* sums = at<float>(tile_sums_) + worker * tile_sums_stride_;
    alignas(64) float tile[kTileSize];
    // As many panels as stay in cache; a strip meets them one after the other, so that its rows of dW, which come from
    // memory, are written along.
    const int64_t panels = panels_of(width);
    const int64_t cached = std::max<int64_t>(1, panel_bytes() / (part_steps * kTileColumns * 4));
    for (int64_t begin = 0; begin < panels; begin += cached) {
      for (int64_t strip = strips.first; strip < strips.last; ++strip) {
        const uint32_t* strip_left = left + strip_words((strip - strips.first) * part_steps);
        const int64_t row = strip * strip_rows();
        const int count = tile_extent(height, row, strip_rows());
        for (int64_t panel = begin; panel < std::min(panels, begin + cached); ++panel) {
          multiply_tile<T>(count, part_steps, strip_left, {right + panel * steps * kTileColumns, steps, part.first}, tile);
          float* sum = sums + ((strip - strips.first) * panels + panel) * kTileSize;
          if (!starts) add_tile(tile, sum, kTileColumns, count, kTileColumns);
          const int64_t column = panel * kTileColumns;
          if (ends) {
            store_gradient(target + row * stride + column, stride, tile, count, tile_extent(width, column, kTileColumns));
          } else {
            std::copy_n(tile, count * kTileColumns, sum);
          }
        }
      }
    }
    if (streams_) finish_streams();
  }

  void store_gradient(T* matrix, int64_t stride, const float* tile, int rows, int columns) const {
    if (streams_) {
      stream_tile<T>(matrix, stride, tile, rows, columns);
    } else {
      store_tile<T>(matrix, stride, tile, rows, columns);
    }
  }

  // The gradients of one expert's gate weights and biases.
  void small_gradients(const Group& group, const ExpertSpan& span) {
    const int64_t begin = span.row - group.row;
    finish_dweights<T>(in_, span.expert, dy_, at<float>(dots_) + begin, span.rows, group.rows, hidden_panels_,
                       at<float>(totals_) + begin, out_.dweights);
    if (out_.db1 != nullptr) first_bias_gradient(group, span.expert);
    if (out_.db2 != nullptr) second_bias_gradient(span);
  }

  void first_bias_gradient(const Group& group, int64_t expert) {
    for (int64_t panel = 0; panel < hidden_panels_; ++panel) {
      float sums[2 * kTileColumns] = {};
      for (size_t unit = 0; unit < group.units.size(); ++unit) {
        if (group.units[unit].expert != expert) continue;
        const float* part = at<float>(sums_) + (unit * hidden_panels_ + panel) * 2 * kTileColumns;
        add_to_sum<float>(sums, part, 1, 2 * kTileColumns);
      }
      store_bias_gradient<T>(in_, expert, panel, sums, out_.db1);
    }
  }

  void second_bias_gradient(const ExpertSpan& span) {
    constexpr int64_t kColumns = 256;
    float sums[kColumns];
    for (int64_t column = 0; column < in_.out; column += kColumns) {
      const int64_t columns = std::min(kColumns, in_.out - column);
      sum_weighted_rows<T>(in_, dy_, span.row, span.rows, column, columns, sums);
      convert_row(out_.db2 + span.expert * in_.out + column, sums, columns);
    }
  }

  const ExpertInputs<T>& in_;
  const T *dy_, *z_;
  ExpertGradients<T> out_;
  std::vector<Group> groups_;
  int64_t hidden_panels_, in_panels_, dy_steps_;
  int64_t sides_;  // of dz: gate and up if gated
  bool streams_;
  int64_t slice_panels_;
  size_t dys_, dz_left_, dz_, a_right_, dx_sums_, xs_right_, dots_, totals_, sums_, dy_rows_, x_rows_, dz_rows_, local_,
      local_rows_, tile_sums_;
  int64_t local_stride_, local_rows_stride_, tile_sums_stride_;
  Scratch scratch_;
};

}  // namespace

template <typename T>
void backward_in_tiles(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients) {
  Backward<T>(inputs, dy, z, gradients).run();
}

template void backward_in_tiles(const ExpertInputs<float>&, const float*, const float*, const ExpertGradients<float>&);
template void backward_in_tiles(const ExpertInputs<BFloat16>&, const BFloat16*, const BFloat16*,
                                const ExpertGradients<BFloat16>&);

}  // namespace libmoe_fast
