// Backward in tiles. Per group of whole experts, three rounds of tasks: pack the rows; g = dys W2 and everything made
// from it; and what needs all of g: dx, the weight gradients, and the sums.
#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "experts.h"
#include "panels.h"
#include "scratch.h"

namespace libmoe_fast {

namespace {

// Tasks of several kinds, taken in this order: no thread waits where one kind ends and the next begins.
class TaskRound {
 public:
  using Body = std::function<void(int64_t task, int64_t worker)>;

  void add(int64_t tasks, Body body) {
    kinds_.emplace_back(tasks, std::move(body));
    tasks_ += tasks;
  }

  void run() const {
    for_each_task(tasks_, [&](int64_t task, int64_t worker) {
      auto kind = kinds_.begin();
      for (; task >= kind->first; ++kind) task -= kind->first;
      kind->second(task, worker);
    });
  }

 private:
  std::vector<std::pair<int64_t, Body>> kinds_;
  int64_t tasks_ = 0;
};

template <typename T>
class Backward {
 public:
  Backward(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients)
      : in_(inputs),
        dy_(dy),
        z_(z),
        out_(gradients),
        groups_(make_groups(inputs.offsets, inputs.experts, (inputs.out + inputs.up) * sizeof(T), false)),
        hidden_panels_(panels_of(inputs.hidden)),
        in_panels_(panels_of(inputs.in)),
        dy_steps_(steps_of<T>(inputs.out)),
        dz_steps_(hidden_panels_ * kPanelSteps<T> * (inputs.gated ? 2 : 1)),
        scratch_(plan()) {}

  void run() {
    for (const Group& group : groups_) {
      list_rows(group);
      pack_rows(group);
      hidden_gradients(group);
      remaining_gradients(group);
    }
  }

 private:
  // ----------------------------------------------------------------------------------------------------------- memory

  bool weight_grads() const { return out_.dw1 != nullptr; }

  ScratchPlan plan() {
    ScratchPlan plan;
    const int64_t strips = largest(groups_, [](const Group& group) { return group.strips; });
    const int64_t rows = largest(groups_, [](const Group& group) { return group.rows; });
    const int64_t padded = largest(groups_, [](const Group& group) { return group.padded_rows; });
    const int64_t units = largest(groups_, [](const Group& group) { return group.units.size(); });
    const int64_t workers = torch::stable::get_num_threads();
    const int64_t kept = weight_grads() ? padded : 0;
    dys_ = plan.add<uint32_t>(strips * dy_steps_ * kTileRows);
    dz_left_ = plan.add<uint32_t>(strips * dz_steps_ * kTileRows);
    dz_ = plan.add<T>((weight_grads() ? rows : 0) * in_.up);
    a_right_ = plan.add<uint32_t>(kept / kPerWord<T> * hidden_panels_ * kTileColumns);
    xs_right_ = plan.add<uint32_t>(kept / kPerWord<T> * in_panels_ * kTileColumns);
    dots_ = plan.add<float>(hidden_panels_ * rows);
    totals_ = plan.add<float>(rows);
    sums_ = plan.add<float>(units * hidden_panels_ * 2 * kTileColumns);
    dy_rows_ = plan.add<const T*>(padded);
    x_rows_ = plan.add<const T*>(padded);
    dz_rows_ = plan.add<const T*>(padded);
    const int64_t weight_words = local_words(std::max(dy_steps_, dz_steps_), kTileColumns);
    local_stride_ = std::max(weight_words, local_words(padded / kPerWord<T>, kTileRows));
    local_ = plan.add<uint32_t>(local_stride_ * workers);
    local_rows_stride_ = std::max(dy_steps_, dz_steps_) * kPerWord<T>;
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
  static int64_t span_steps(const ExpertSpan& span) { return span.padded_rows() / kPerWord<T>; }
  uint32_t* right_of(size_t offset, const ExpertSpan& span, int64_t panels) const {
    return at<uint32_t>(offset) + span.padded_row / kPerWord<T> * panels * kTileColumns;
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
        at<const T*>(dz_rows_)[place] = padding ? nullptr : at<T>(dz_) + (row - group.row) * in_.up;
      }
    }
  }

  void pack_rows(const Group& group) {
    for_each_strip(group, [&](const Unit& unit, int64_t strip) {
      pack_strip<T>(in_, unit, strip, dy_, in_.out, at<uint32_t>(dys_));
    });
    if (!weight_grads()) return;
    const int64_t blocks = divide_up(in_panels_, kMostPanels);
    for_each_task(group.spans.size() * blocks, [&](int64_t task, int64_t) {
      const ExpertSpan& span = group.spans[task / blocks];
      const int64_t panel = task % blocks * kMostPanels, column = panel * kTileColumns, steps = span_steps(span);
      pack_across<T>(at<const T*>(x_rows_) + span.padded_row, column,
                     std::min(kMostPanels * kTileColumns, in_.in - column), steps, kTileColumns,
                     right_of(xs_right_, span, in_panels_) + panel * steps * kTileColumns);
    });
  }

  // ----------------------------------------------------------------------------------- g, and everything made from it

  void hidden_gradients(const Group& group) {
    const int64_t panel_words = dy_steps_ * kTileColumns;
    const int64_t per_task = panels_per_task(hidden_panels_, panel_words, group.units.size());
    const int64_t blocks = divide_up(hidden_panels_, per_task);
    for_each_task(blocks * group.units.size(), [&](int64_t task, int64_t worker) {
      const int64_t number = task / blocks;
      const Unit& unit = group.units[number];
      const int64_t first = task % blocks * per_task, last = std::min(hidden_panels_, first + per_task);
      pack_w2(unit.expert, first, last, worker);
      float* sums = at<float>(sums_) + number * hidden_panels_ * 2 * kTileColumns;
      std::fill(sums + first * 2 * kTileColumns, sums + last * 2 * kTileColumns, 0.0f);
      hidden_gradient_tiles(group, unit, local(worker), first, last, sums);
    });
  }

  void pack_w2(int64_t expert, int64_t first, int64_t last, int64_t worker) {
    const T** rows = local_rows(worker);
    const T* weight = in_.w2 + expert * in_.out * in_.hidden;
    for (int64_t i = 0; i < dy_steps_ * kPerWord<T>; ++i) rows[i] = i < in_.out ? weight + i * in_.hidden : nullptr;
    const int64_t column = first * kTileColumns;
    pack_across<T>(rows, column, std::min(in_.hidden, last * kTileColumns) - column, dy_steps_, kTileColumns,
                   local(worker));
  }

  void hidden_gradient_tiles(const Group& group, const Unit& unit, const uint32_t* right, int64_t first, int64_t last,
                             float* sums) {
    HiddenGradients<T> tile;
    RoundedTile<T> rounded;
    const ExpertSpan& span = span_of(group, unit.expert);
    multiply_unit<T>(unit, dy_steps_, at<uint32_t>(dys_), right, first, last, in_.hidden, tile.g,
                     [&](const TilePlace& place, int64_t strip, int64_t panel) {
      float* panel_sums = sums + panel * 2 * kTileColumns;
      tile.finish(in_, place, z_, panel_sums, panel_sums + kTileColumns);
      std::copy_n(tile.dots, place.rows, at<float>(dots_) + panel * group.rows + place.row - group.row);
      keep_dz(group, place, unit.strip + strip, panel, 0, tile.g, rounded);
      if (in_.gated) keep_dz(group, place, unit.strip + strip, panel, 1, tile.up, rounded);
      if (!weight_grads()) return;
      rounded.set(tile.value, place.rows);
      const int64_t steps = unit.height / kPerWord<T>;
      pack_across<T>(rounded.rows, 0, kTileColumns, steps, kTileColumns,
                     right_of(a_right_, span, hidden_panels_) +
                         (panel * span_steps(span) + (unit.expert_strip + strip) * steps) * kTileColumns);
    });
  }

  static const ExpertSpan& span_of(const Group& group, int64_t expert) {
    return *std::find_if(group.spans.begin(), group.spans.end(),
                         [&](const ExpertSpan& span) { return span.expert == expert; });
  }

  // A tile of dz: packed for dx, and as it is for dW1. Side 0 is the gradient by z, or if gated by gate, side 1 by up.
  void keep_dz(const Group& group, const TilePlace& place, int64_t strip, int64_t panel, int64_t side, const float* dz,
               RoundedTile<T>& rounded) {
    rounded.set(dz, place.rows);
    const int64_t step = (side * hidden_panels_ + panel) * kPanelSteps<T>;
    pack_along<T>(rounded.rows, place.rows, kTileColumns, kPanelSteps<T>, kTileRows,
                  at<uint32_t>(dz_left_) + (strip * dz_steps_ + step) * kTileRows);
    if (!weight_grads()) return;
    store_tile<T>(at<T>(dz_) + (place.row - group.row) * in_.up + side * in_.hidden + place.column, in_.up, dz,
                  place.rows, place.columns);
  }

  // ---------------------------------------------------------------------------------------------- what needs all of g

  void remaining_gradients(const Group& group) {
    TaskRound round;  // the longest tasks first
    add_dx(round, group);
    if (weight_grads()) {
      add_weight_gradient(round, group, {dy_rows_, in_.out, a_right_, in_.hidden, out_.dw2});
      add_weight_gradient(round, group, {dz_rows_, in_.up, xs_right_, in_.in, out_.dw1});
    }
    round.add(group.spans.size(), [&](int64_t task, int64_t) { small_gradients(group, group.spans[task]); });
    round.run();
  }

  // dxs = dz W1
  void add_dx(TaskRound& round, const Group& group) {
    const int64_t units = group.units.size();
    const int64_t per_task = panels_per_task(in_panels_, dz_steps_ * kTileColumns, units);
    const int64_t blocks = divide_up(in_panels_, per_task);
    round.add(units * blocks, [this, &group, per_task, blocks](int64_t task, int64_t worker) {
      const int64_t first = task % blocks * per_task;
      dx_tiles(group.units[task / blocks], first, std::min(in_panels_, first + per_task), worker);
    });
  }

  void dx_tiles(const Unit& unit, int64_t first, int64_t last, int64_t worker) {
    pack_w1(unit.expert, first, last, worker);
    alignas(64) float tile[kTileSize];
    multiply_unit<T>(unit, dz_steps_, at<uint32_t>(dz_left_), local(worker), first, last, in_.in, tile,
                     [&](const TilePlace& place, int64_t, int64_t) {
      store_tile<T>(out_.drows + place.row * in_.in + place.column, in_.in, tile, place.rows, place.columns);
    });
  }

  void pack_w1(int64_t expert, int64_t first, int64_t last, int64_t worker) {
    const T** rows = local_rows(worker);
    const T* weight = in_.w1 + expert * in_.up * in_.in;
    const int64_t half = hidden_panels_ * kTileColumns;  // dz is packed in whole panels, gate and up each
    for (int64_t begin = 0; begin < dz_steps_ * kPerWord<T>; begin += half, weight += in_.hidden * in_.in) {
      for (int64_t i = 0; i < in_.hidden; ++i) rows[begin + i] = weight + i * in_.in;
      std::fill(rows + begin + in_.hidden, rows + begin + half, nullptr);
    }
    const int64_t column = first * kTileColumns;
    pack_across<T>(rows, column, std::min(in_.in, last * kTileColumns) - column, dz_steps_, kTileColumns,
                   local(worker));
  }

  // An expert's dW [height, width] = left^T right, a sum over its rows: dW2 = dys^T (weight a), dW1 = dz^T xs.
  struct WeightGradient {
    size_t left_rows;
    int64_t height;
    size_t right;
    int64_t width;
    T* stacked;  // [N, height, width]
  };

  void add_weight_gradient(TaskRound& round, const Group& group, const WeightGradient& gradient) {
    int64_t longest = 0;
    for (const ExpertSpan& span : group.spans) longest = std::max(longest, span_steps(span));
    const int64_t spans = group.spans.size(), strips = divide_up(gradient.height, kTileRows);
    const int64_t per_task = panels_per_task(strips, longest * kTileRows, spans);
    const int64_t blocks = divide_up(strips, per_task);
    round.add(spans * blocks, [this, &group, gradient, strips, per_task, blocks](int64_t task, int64_t worker) {
      const int64_t first = task % blocks * per_task;
      weight_tiles(group.spans[task / blocks], gradient, first, std::min(strips, first + per_task), worker);
    });
  }

  // Strips [first, last) of one expert's gradient.
  void weight_tiles(const ExpertSpan& span, const WeightGradient& gradient, int64_t first, int64_t last,
                    int64_t worker) {
    const int64_t steps = span_steps(span), height = gradient.height, width = gradient.width;
    const int64_t begin = first * kTileRows, end = std::min(height, last * kTileRows);
    uint32_t* left = local(worker);
    pack_across<T>(at<const T*>(gradient.left_rows) + span.padded_row, begin, end - begin, steps, kTileRows, left);
    const uint32_t* right = right_of(gradient.right, span, panels_of(width));
    T* target = gradient.stacked + span.expert * height * width;
    alignas(64) float tile[kTileSize];
    for (int64_t panel = 0; panel < panels_of(width); ++panel) {
      const int64_t column = panel * kTileColumns;
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t row = strip * kTileRows;
        const int count = tile_extent(height, row, kTileRows);
        multiply_tile<T>(count, steps, left + (strip - first) * steps * kTileRows,
                         right + panel * steps * kTileColumns, tile);
        store_tile<T>(target + row * width + column, width, tile, count, tile_extent(width, column, kTileColumns));
      }
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
      store_sum<T>(out_.db2 + span.expert * in_.out + column, sums, columns);
    }
  }

  const ExpertInputs<T>& in_;
  const T *dy_, *z_;
  ExpertGradients<T> out_;
  std::vector<Group> groups_;
  int64_t hidden_panels_, in_panels_, dy_steps_, dz_steps_;
  size_t dys_, dz_left_, dz_, a_right_, xs_right_, dots_, totals_, sums_, dy_rows_, x_rows_, dz_rows_, local_,
      local_rows_;
  int64_t local_stride_, local_rows_stride_;
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
