// The experts in tiles: operands packed once, every intermediate result finished in cache and stored as the next GEMM
// reads it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "expert_tiles.h"
#include "experts.h"
#include "parallel.h"
#include "scratch.h"

namespace libmoe_fast {

namespace {

// Packed rows of one group stay in cache between the step that makes them and the steps that read them, also where
// neighbours take their share of the last level: 12 MiB cost up to 30% there, 3 MiB nothing.
constexpr int64_t kGroupBytes = int64_t{3} << 20;
// Rows that meet one packing of the weights: packing costs about 1 / rows of the multiplication.
constexpr int64_t kMostUnitRows = 1344, kLeastUnitRows = 224;
// Panels of the operand that a task packs for itself stay in the second-level cache.
constexpr int64_t kPanelBytes = 256 << 10;
constexpr int64_t kMostPanels = 8;
constexpr int64_t kMostChained = 8;  // blocks of panels that one thread does in a row, fetching the next meanwhile

int64_t panels_of(int64_t width) { return divide_up(width, kTileColumns); }

// Consecutive rows of one expert, in strips of `height` rows (even: bf16 words may hold two rows).
struct Unit {
  int64_t expert, row, rows;
  int height;
  int64_t strips;
  int64_t strip;         // number of its first strip within the group
  int64_t expert_strip;  // and within the expert's rows of the group
};

// All rows of one expert in a group.
struct ExpertSpan {
  int64_t expert, row, rows;
  int height;
  int64_t strips;
  int64_t padded_row;  // rows of earlier spans of the group, each padded to whole strips

  int64_t padded_rows() const { return strips * height; }
};

struct Group {
  int64_t row = 0, rows = 0, strips = 0, padded_rows = 0;
  std::vector<Unit> units;
  std::vector<ExpertSpan> spans;
};

// Splits rows evenly over the fewest tiles.
int strip_height(int64_t rows) {
  const int64_t even = divide_up(divide_up(rows, divide_up(rows, kTileRows)), 2) * 2;
  return static_cast<int>(even);
}

void append_rows(Group& group, int64_t expert, int64_t row, int64_t rows, int64_t most_rows) {
  const int height = strip_height(rows);
  const int64_t strips = divide_up(rows, height);
  const int64_t unit_strips = divide_up(strips, divide_up(rows, most_rows));
  if (group.rows == 0) group.row = row;
  group.spans.push_back({expert, row, rows, height, strips, group.padded_rows});
  for (int64_t first = 0; first < strips; first += unit_strips) {
    const int64_t count = std::min(unit_strips, strips - first);
    const int64_t begin = first * height;
    group.units.push_back({expert, row + begin, std::min(rows - begin, count * height), height, count,
                           group.strips + first, first});
  }
  group.rows += rows;
  group.strips += strips;
  group.padded_rows += strips * height;
}

// Groups of experts with about kGroupBytes of rows. `split` also divides an expert that has more.
template <typename T>
std::vector<Group> make_groups(const ExpertInputs<T>& inputs, int64_t row_bytes, bool split) {
  const int64_t most_rows = std::clamp(kGroupBytes / row_bytes, kLeastUnitRows, kMostUnitRows);
  std::vector<Group> groups;
  for (int64_t expert = 0; expert < inputs.experts; ++expert) {
    const int64_t rows = inputs.rows_of(expert);
    if (rows == 0) continue;
    const int64_t part = split ? divide_up(divide_up(rows, divide_up(rows, most_rows)), kTileRows) * kTileRows : rows;
    for (int64_t begin = 0; begin < rows; begin += part) {
      const int64_t count = std::min(part, rows - begin);
      if (groups.empty() || groups.back().rows + count > most_rows) groups.emplace_back();
      append_rows(groups.back(), expert, inputs.offsets[expert] + begin, count, most_rows);
    }
  }
  return groups;
}

template <typename Value>
int64_t largest(const std::vector<Group>& groups, const Value& value) {
  int64_t most = 0;
  for (const Group& group : groups) most = std::max<int64_t>(most, value(group));
  return most;
}

// Panels per task: as many as the cache holds, but enough tasks to share out.
int64_t panels_per_task(int64_t panels, int64_t panel_words, int64_t units) {
  const int64_t cached = std::clamp<int64_t>(kPanelBytes / (panel_words * 4), 1, kMostPanels);
  const int64_t shared = panels * units / (4 * torch::stable::get_num_threads());
  return std::clamp<int64_t>(shared, 1, cached);
}

// Words of the widest task-local operand of `width` words per step.
int64_t local_words(int64_t steps, int width) { return kMostPanels * steps * width; }

template <typename T>
constexpr int64_t kPanelSteps = kTileColumns / kPerWord<T>;  // steps that a panel of results makes in the next sum

template <typename T>
int64_t steps_of(int64_t elements) {
  return divide_up(elements, kPerWord<T>);
}

// The rows of a tile kept in T, as packing wants them.
template <typename T>
struct RoundedTile {
  alignas(64) T values[kTileSize];
  const T* rows[kTileRows];

  void set(const Accumulator<T>* tile, int count) {
    store_tile<T>(values, kTileColumns, tile, count, kTileColumns);
    for (int i = 0; i < kTileRows; ++i) rows[i] = i < count ? values + i * kTileColumns : nullptr;
  }
};

// Packs `panels` panels of 32 weight rows each, whose elements follow each other in the sum.
template <typename T>
void pack_weight_rows(const T* weight, int64_t rows, int64_t width, int64_t first_row, int64_t steps, uint32_t* packed) {
  const T* pointers[kTileColumns] = {};
  const int count = tile_extent(rows, first_row, kTileColumns);
  for (int i = 0; i < count; ++i) pointers[i] = weight + (first_row + i) * width;
  pack_along<T>(pointers, count, width, steps, kTileColumns, packed);
}

// Weights that are packed next.
template <typename T>
struct NextWeights {
  const T* data = nullptr;
  int64_t count = 0;
};

// Calls finish(place, strip, panel) for every tile of a unit's rows and the panels [first, last).
template <typename T, typename Finish>
void multiply_unit(const Unit& unit, int64_t steps, const uint32_t* left, const uint32_t* right, int64_t first,
                   int64_t last, int64_t width, float* tile, const Finish& finish, NextWeights<T> next = {}) {
  const int64_t all_steps = unit.strips * (last - first) * steps;
  Ahead ahead{reinterpret_cast<const char*>(next.data),
              std::min<int64_t>(64, divide_up(next.count * sizeof(T), all_steps))};
  for (int64_t strip = 0; strip < unit.strips; ++strip) {
    const int rows = tile_extent(unit.rows, strip * unit.height, unit.height);
    const uint32_t* strip_left = left + (unit.strip + strip) * steps * kTileRows;
    for (int64_t panel = first; panel < last; ++panel) {
      multiply_tile<T>(rows, steps, strip_left, right + (panel - first) * steps * kTileColumns, tile, ahead);
      ahead.data += ahead.bytes_per_step * steps;
      const int64_t column = panel * kTileColumns;
      const TilePlace place{unit.expert, unit.row + strip * unit.height, column, rows,
                            tile_extent(width, column, kTileColumns)};
      finish(place, strip, panel);
    }
  }
}

// Calls body(unit, strip, row, rows) for every strip of the group.
template <typename Body>
void for_each_strip(const Group& group, const Body& body) {
  constexpr int64_t kStripsPerTask = 8;
  std::vector<std::pair<const Unit*, int64_t>> tasks;
  for (const Unit& unit : group.units) {
    for (int64_t strip = 0; strip < unit.strips; strip += kStripsPerTask) tasks.emplace_back(&unit, strip);
  }
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t task, int64_t) {
    const auto [unit, first] = tasks[task];
    for (int64_t strip = first; strip < std::min(unit->strips, first + kStripsPerTask); ++strip) {
      body(*unit, strip, unit->row + strip * unit->height, tile_extent(unit->rows, strip * unit->height, unit->height));
    }
  });
}

// ------------------------------------------------------------------------------------------------------------- forward

template <typename T>
class Forward {
 public:
  Forward(const ExpertInputs<T>& inputs, T* z, T* y)
      : in_(inputs),
        z_(z),
        y_(y),
        groups_(make_groups(inputs, (inputs.in + inputs.hidden) * sizeof(T), true)),
        in_steps_(steps_of<T>(inputs.in)),
        hidden_steps_(panels_of(inputs.hidden) * kPanelSteps<T>),
        scratch_(plan()) {}

  void run() {
    for (const Group& group : groups_) {
      pack_tokens(group);
      hidden_layer(group);
      output_layer(group);
    }
    combine_rows<T>(scratch_.template at<T>(outputs_), in_.inverse, in_.weights, y_, in_.tokens, in_.out, in_.top_k);
  }

 private:
  ScratchPlan plan() {
    ScratchPlan plan;
    const int64_t strips = largest(groups_, [](const Group& group) { return group.strips; });
    tokens_ = plan.add<uint32_t>(strips * in_steps_ * kTileRows);
    activations_ = plan.add<uint32_t>(strips * hidden_steps_ * kTileRows);
    outputs_ = plan.add<T>(in_.choices * in_.out);
    local_stride_ = local_words(std::max(in_steps_ * (in_.gated ? 2 : 1), hidden_steps_), kTileColumns);
    local_ = plan.add<uint32_t>(local_stride_ * torch::stable::get_num_threads());
    return plan;
  }

  uint32_t* local(int64_t worker) const { return scratch_.template at<uint32_t>(local_) + worker * local_stride_; }

  void pack_tokens(const Group& group) {
    auto* packed = scratch_.template at<uint32_t>(tokens_);
    for_each_strip(group, [&](const Unit& unit, int64_t strip, int64_t row, int rows) {
      const T* pointers[kTileRows];
      for (int i = 0; i < rows; ++i) pointers[i] = in_.row_of(in_.x, in_.in, row + i);
      pack_along<T>(pointers, rows, in_.in, in_steps_, kTileRows,
                    packed + (unit.strip + strip) * in_steps_ * kTileRows);
    });
  }

  // Calls body(unit, first, last, end, worker) for blocks of panels; [last, end) is what the same thread does next.
  template <typename Body>
  static void for_each_block(const Group& group, int64_t panels, int64_t panel_words, const Body& body) {
    const int64_t units = group.units.size(), per_block = panels_per_task(panels, panel_words, units);
    const int64_t blocks = divide_up(panels, per_block);
    const int64_t chain = std::clamp<int64_t>(blocks * units / (4 * torch::stable::get_num_threads()), 1, kMostChained);
    const int64_t chains = divide_up(blocks, chain);
    for_each_task(chains * units, [&](int64_t task, int64_t worker) {
      const int64_t begin = task % chains * chain * per_block, end = std::min(panels, begin + chain * per_block);
      for (int64_t first = begin; first < end; first += per_block) {
        body(group.units[task / chains], first, std::min(end, first + per_block), std::min(end, first + 2 * per_block),
             worker);
      }
    });
  }

  // The rows of a weight that panels [first, last) are made of.
  static NextWeights<T> rows_of(const T* weight, int64_t rows, int64_t width, int64_t first, int64_t last) {
    const int64_t begin = std::min(rows, first * kTileColumns), end = std::min(rows, last * kTileColumns);
    return {weight + begin * width, (end - begin) * width};
  }

  void hidden_layer(const Group& group) {
    const int64_t panel_words = in_steps_ * kTileColumns, sides = in_.gated ? 2 : 1;
    for_each_block(group, panels_of(in_.hidden), panel_words * sides,
                   [&](const Unit& unit, int64_t first, int64_t last, int64_t end, int64_t worker) {
      uint32_t* gate_right = local(worker);
      uint32_t* up_right = gate_right + (last - first) * panel_words;
      const T* weight = in_.w1 + unit.expert * in_.up * in_.in;
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t row = panel * kTileColumns, offset = (panel - first) * panel_words;
        pack_weight_rows(weight, in_.hidden, in_.in, row, in_steps_, gate_right + offset);
        if (in_.gated) {
          pack_weight_rows(weight + in_.hidden * in_.in, in_.hidden, in_.in, row, in_steps_, up_right + offset);
        }
      }
      hidden_tiles(unit, gate_right, up_right, first, last, rows_of(weight, in_.hidden, in_.in, last, end));
    });
  }

  void hidden_tiles(const Unit& unit, const uint32_t* gate_right, const uint32_t* up_right, int64_t first, int64_t last,
                    NextWeights<T> next) {
    alignas(64) float gate[kTileSize], up[kTileSize], value[kTileSize];
    RoundedTile<T> rounded;
    const auto* tokens = scratch_.template at<uint32_t>(tokens_);
    auto* activations = scratch_.template at<uint32_t>(activations_);
    multiply_unit<T>(unit, in_steps_, tokens, gate_right, first, last, in_.hidden, gate,
                     [&](const TilePlace& place, int64_t strip, int64_t panel) {
      const int64_t number = unit.strip + strip;
      if (in_.gated) {
        multiply_tile<T>(place.rows, in_steps_, tokens + number * in_steps_ * kTileRows,
                         up_right + (panel - first) * in_steps_ * kTileColumns, up);
      }
      finish_hidden<T>(in_, place, z_, gate, up, value);
      rounded.set(value, place.rows);
      pack_along<T>(rounded.rows, place.rows, kTileColumns, kPanelSteps<T>, kTileRows,
                    activations + (number * hidden_steps_ + panel * kPanelSteps<T>) * kTileRows);
    }, next);
  }

  void output_layer(const Group& group) {
    const int64_t panel_words = hidden_steps_ * kTileColumns;
    for_each_block(group, panels_of(in_.out), panel_words,
                   [&](const Unit& unit, int64_t first, int64_t last, int64_t end, int64_t worker) {
      uint32_t* right = local(worker);
      const T* weight = in_.w2 + unit.expert * in_.out * in_.hidden;
      for (int64_t panel = first; panel < last; ++panel) {
        pack_weight_rows(weight, in_.out, in_.hidden, panel * kTileColumns, hidden_steps_,
                         right + (panel - first) * panel_words);
      }
      output_tiles(unit, right, first, last, rows_of(weight, in_.out, in_.hidden, last, end));
    });
  }

  void output_tiles(const Unit& unit, const uint32_t* right, int64_t first, int64_t last, NextWeights<T> next) {
    alignas(64) float tile[kTileSize];
    T* outputs = scratch_.template at<T>(outputs_);
    const T* bias = in_.second_bias(unit.expert);
    multiply_unit<T>(unit, hidden_steps_, scratch_.template at<uint32_t>(activations_), right, first, last, in_.out, tile,
                     [&](const TilePlace& place, int64_t, int64_t) {
      if (bias != nullptr) add_bias<T>(tile, bias + place.column, place.rows, place.columns);
      store_tile<T>(outputs + place.row * in_.out + place.column, in_.out, tile, place.rows, place.columns);
    }, next);
  }

  const ExpertInputs<T>& in_;
  T *z_, *y_;
  std::vector<Group> groups_;
  int64_t in_steps_, hidden_steps_;
  size_t tokens_, activations_, outputs_, local_;
  int64_t local_stride_;
  Scratch scratch_;
};

// ------------------------------------------------------------------------------------------------------------ backward
//
// Per group of whole experts, three rounds of tasks: pack; g and everything made from it; the three remaining products.

template <typename T>
class Backward {
 public:
  Backward(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients)
      : in_(inputs),
        dy_(dy),
        z_(z),
        out_(gradients),
        groups_(make_groups(inputs, (inputs.out + inputs.up) * sizeof(T), false)),
        hidden_panels_(panels_of(inputs.hidden)),
        in_panels_(panels_of(inputs.in)),
        dy_steps_(steps_of<T>(inputs.out)),
        dz_steps_(hidden_panels_ * kPanelSteps<T> * (inputs.gated ? 2 : 1)),
        scratch_(plan()) {}

  void run() {
    for (const Group& group : groups_) {
      list_rows(group);
      pack(group);
      hidden_gradients(group);
      remaining_gradients(group);
    }
  }

 private:
  bool weight_grads() const { return out_.dw1 != nullptr; }

  template <typename Value>
  Value* at(size_t offset) const {
    return scratch_.template at<Value>(offset);
  }

  uint32_t* local(int64_t worker) const { return at<uint32_t>(local_) + worker * local_stride_; }
  const T** local_rows(int64_t worker) const { return at<const T*>(local_rows_) + worker * local_rows_stride_; }

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
    const int64_t row_steps = padded / kPerWord<T>;
    local_stride_ = std::max(local_words(std::max(dy_steps_, dz_steps_), kTileColumns), local_words(row_steps, kTileRows));
    local_ = plan.add<uint32_t>(local_stride_ * workers);
    local_rows_stride_ = std::max(dy_steps_, dz_steps_) * kPerWord<T>;
    local_rows_ = plan.add<const T*>(local_rows_stride_ * workers);
    return plan;
  }

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

  // Words of one expert's right operands, and where they begin.
  static int64_t span_steps(const ExpertSpan& span) { return span.padded_rows() / kPerWord<T>; }
  uint32_t* right_of(size_t offset, const ExpertSpan& span, int64_t panels) const {
    return at<uint32_t>(offset) + span.padded_row / kPerWord<T> * panels * kTileColumns;
  }

  void pack(const Group& group) {
    for_each_strip(group, [&](const Unit& unit, int64_t strip, int64_t row, int rows) {
      const T* pointers[kTileRows];
      for (int i = 0; i < rows; ++i) pointers[i] = in_.row_of(dy_, in_.out, row + i);
      pack_along<T>(pointers, rows, in_.out, dy_steps_, kTileRows,
                    at<uint32_t>(dys_) + (unit.strip + strip) * dy_steps_ * kTileRows);
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

  const ExpertSpan& span_of(const Group& group, int64_t expert) const {
    return *std::find_if(group.spans.begin(), group.spans.end(),
                         [&](const ExpertSpan& span) { return span.expert == expert; });
  }

  void hidden_gradients(const Group& group) {
    const int64_t panel_words = dy_steps_ * kTileColumns;
    const int64_t per_task = panels_per_task(hidden_panels_, panel_words, group.units.size());
    const int64_t blocks = divide_up(hidden_panels_, per_task);
    for_each_task(blocks * group.units.size(), [&](int64_t task, int64_t worker) {
      const int64_t number = task / blocks;
      const Unit& unit = group.units[number];
      const int64_t first = task % blocks * per_task, last = std::min(hidden_panels_, first + per_task);
      const T** rows = local_rows(worker);
      const T* weight = in_.w2 + unit.expert * in_.out * in_.hidden;
      for (int64_t i = 0; i < dy_steps_ * kPerWord<T>; ++i) rows[i] = i < in_.out ? weight + i * in_.hidden : nullptr;
      const int64_t column = first * kTileColumns;
      pack_across<T>(rows, column, std::min(in_.hidden, last * kTileColumns) - column, dy_steps_, kTileColumns,
                     local(worker));
      float* sums = at<float>(sums_) + number * hidden_panels_ * 2 * kTileColumns;
      std::fill(sums + first * 2 * kTileColumns, sums + last * 2 * kTileColumns, 0.0f);
      hidden_gradient_tiles(group, unit, span_of(group, unit.expert), local(worker), first, last, sums);
    });
  }

  void hidden_gradient_tiles(const Group& group, const Unit& unit, const ExpertSpan& span, const uint32_t* right,
                             int64_t first, int64_t last, float* sums) {
    HiddenGradients<T> tile;
    RoundedTile<T> rounded;
    const int64_t up_steps = hidden_panels_ * kPanelSteps<T>;
    multiply_unit<T>(unit, dy_steps_, at<uint32_t>(dys_), right, first, last, in_.hidden, tile.g,
                     [&](const TilePlace& place, int64_t strip, int64_t panel) {
      float* panel_sums = sums + panel * 2 * kTileColumns;
      tile.finish(in_, place, z_, panel_sums, panel_sums + kTileColumns);
      std::copy_n(tile.dots, place.rows, at<float>(dots_) + panel * group.rows + place.row - group.row);

      const auto keep_dz = [&](const float* gradient, int64_t column, int64_t steps_before) {
        rounded.set(gradient, place.rows);
        uint32_t* left = at<uint32_t>(dz_left_) +
                         ((unit.strip + strip) * dz_steps_ + steps_before + panel * kPanelSteps<T>) * kTileRows;
        pack_along<T>(rounded.rows, place.rows, kTileColumns, kPanelSteps<T>, kTileRows, left);
        if (weight_grads()) {
          store_tile<T>(at<T>(dz_) + (place.row - group.row) * in_.up + column, in_.up, gradient, place.rows,
                        place.columns);
        }
      };
      keep_dz(tile.g, place.column, 0);
      if (in_.gated) keep_dz(tile.up, in_.hidden + place.column, up_steps);

      if (!weight_grads()) return;
      rounded.set(tile.value, place.rows);
      const int64_t steps = unit.height / kPerWord<T>;
      pack_across<T>(rounded.rows, 0, kTileColumns, steps, kTileColumns,
                     right_of(a_right_, span, hidden_panels_) +
                         (panel * span_steps(span) + (unit.expert_strip + strip) * steps) * kTileColumns);
    });
  }

  // Products that need all of g, and the sums over it: all tasks in one round, the long ones first.
  void remaining_gradients(const Group& group) {
    const int64_t units = group.units.size(), spans = group.spans.size();
    const int64_t per_task = panels_per_task(in_panels_, dz_steps_ * kTileColumns, units);
    const int64_t dx_blocks = divide_up(in_panels_, per_task);
    const int64_t longest = largest({group}, [](const Group& g) {
      int64_t most = 1;
      for (const ExpertSpan& span : g.spans) most = std::max(most, span_steps(span));
      return most;
    });
    const int64_t out_strips = divide_up(in_.out, kTileRows), up_strips = divide_up(in_.up, kTileRows);
    const int64_t out_per_task = panels_per_task(out_strips, longest * kTileRows, spans);
    const int64_t up_per_task = panels_per_task(up_strips, longest * kTileRows, spans);
    const int64_t out_blocks = weight_grads() ? divide_up(out_strips, out_per_task) : 0;
    const int64_t up_blocks = weight_grads() ? divide_up(up_strips, up_per_task) : 0;
    const int64_t dx_end = units * dx_blocks, dw2_end = dx_end + spans * out_blocks;
    const int64_t dw1_end = dw2_end + spans * up_blocks;
    for_each_task(dw1_end + spans, [&](int64_t task, int64_t worker) {
      if (task < dx_end) {
        const int64_t first = task % dx_blocks * per_task;
        dx_tiles(group.units[task / dx_blocks], first, std::min(in_panels_, first + per_task), worker);
      } else if (task < dw2_end) {
        const ExpertSpan& span = group.spans[(task - dx_end) / out_blocks];
        const int64_t first = (task - dx_end) % out_blocks * out_per_task;
        weight_tiles(span, dy_rows_, in_.out, first, std::min(out_strips, first + out_per_task),
                     right_of(a_right_, span, hidden_panels_), in_.hidden,
                     out_.dw2 + span.expert * in_.out * in_.hidden, worker);
      } else if (task < dw1_end) {
        const ExpertSpan& span = group.spans[(task - dw2_end) / up_blocks];
        const int64_t first = (task - dw2_end) % up_blocks * up_per_task;
        weight_tiles(span, dz_rows_, in_.up, first, std::min(up_strips, first + up_per_task),
                     right_of(xs_right_, span, in_panels_), in_.in, out_.dw1 + span.expert * in_.up * in_.in, worker);
      } else {
        small_gradients(group, group.spans[task - dw1_end]);
      }
    });
  }

  void dx_tiles(const Unit& unit, int64_t first, int64_t last, int64_t worker) {
    const T** rows = local_rows(worker);
    const T* weight = in_.w1 + unit.expert * in_.up * in_.in;
    const int64_t half = hidden_panels_ * kTileColumns;  // dz is packed in whole panels, gate and up each
    for (int64_t begin = 0; begin < dz_steps_ * kPerWord<T>; begin += half, weight += in_.hidden * in_.in) {
      for (int64_t i = 0; i < in_.hidden; ++i) rows[begin + i] = weight + i * in_.in;
      std::fill(rows + begin + in_.hidden, rows + begin + half, nullptr);
    }
    uint32_t* right = local(worker);
    const int64_t column = first * kTileColumns;
    pack_across<T>(rows, column, std::min(in_.in, last * kTileColumns) - column, dz_steps_, kTileColumns, right);
    alignas(64) float tile[kTileSize];
    multiply_unit<T>(unit, dz_steps_, at<uint32_t>(dz_left_), right, first, last, in_.in, tile,
                     [&](const TilePlace& place, int64_t, int64_t) {
      store_tile<T>(out_.drows + place.row * in_.in + place.column, in_.in, tile, place.rows, place.columns);
    });
  }

  // Strips [first, last) of one expert's weight gradient [height, width] = rows^T right, summed over the expert's rows.
  void weight_tiles(const ExpertSpan& span, size_t rows, int64_t height, int64_t first, int64_t last,
                    const uint32_t* right, int64_t width, T* gradient, int64_t worker) {
    const int64_t steps = span_steps(span);
    uint32_t* left = local(worker);
    const int64_t row = first * kTileRows;
    pack_across<T>(at<const T*>(rows) + span.padded_row, row, std::min(height, last * kTileRows) - row, steps, kTileRows,
                   left);
    alignas(64) float tile[kTileSize];
    for (int64_t panel = 0; panel < panels_of(width); ++panel) {
      const int64_t column = panel * kTileColumns;
      for (int64_t strip = first; strip < last; ++strip) {
        const int64_t row = strip * kTileRows;
        const int count = tile_extent(height, row, kTileRows);
        multiply_tile<T>(count, steps, left + (strip - first) * steps * kTileRows,
                         right + panel * steps * kTileColumns, tile);
        store_tile<T>(gradient + row * width + column, width, tile, count, tile_extent(width, column, kTileColumns));
      }
    }
  }

  // The gradients of one expert's gate weights and biases.
  void small_gradients(const Group& group, const ExpertSpan& span) {
    const int64_t begin = span.row - group.row;
    finish_dweights<T>(in_, span.expert, dy_, at<float>(dots_) + begin, span.rows, group.rows, hidden_panels_,
                       at<float>(totals_) + begin, out_.dweights);
    if (out_.db1 != nullptr) {
      for (int64_t panel = 0; panel < hidden_panels_; ++panel) {
        float sums[2 * kTileColumns] = {};
        for (size_t unit = 0; unit < group.units.size(); ++unit) {
          if (group.units[unit].expert != span.expert) continue;
          const float* part = at<float>(sums_) + (unit * hidden_panels_ + panel) * 2 * kTileColumns;
          add_to_sum<float>(sums, part, 1, 2 * kTileColumns);
        }
        store_bias_gradient<T>(in_, span.expert, panel, sums, out_.db1);
      }
    }
    if (out_.db2 != nullptr) {
      constexpr int64_t kColumns = 256;
      float sums[kColumns];
      for (int64_t column = 0; column < in_.out; column += kColumns) {
        const int64_t columns = std::min(kColumns, in_.out - column);
        sum_weighted_rows<T>(in_, dy_, span.row, span.rows, column, columns, sums);
        store_sum<T>(out_.db2 + span.expert * in_.out + column, sums, columns);
      }
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
void forward_in_tiles(const ExpertInputs<T>& inputs, T* z, T* y) {
  Forward<T>(inputs, z, y).run();
}

template <typename T>
void backward_in_tiles(const ExpertInputs<T>& inputs, const T* dy, const T* z, const ExpertGradients<T>& gradients) {
  Backward<T>(inputs, dy, z, gradients).run();
}

template void backward_in_tiles(const ExpertInputs<float>&, const float*, const float*, const ExpertGradients<float>&);
template void backward_in_tiles(const ExpertInputs<BFloat16>&, const BFloat16*, const BFloat16*,
                                const ExpertGradients<BFloat16>&);
template void forward_in_tiles(const ExpertInputs<float>&, float*, float*);
template void forward_in_tiles(const ExpertInputs<BFloat16>&, BFloat16*, BFloat16*);

}  // namespace libmoe_fast
