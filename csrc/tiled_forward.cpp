// Forward in tiles. Per group of rows, two rounds of tasks: the hidden layer, whose activations are packed for the output
// layer while in cache; and the output layer, together with the packing of the next group's x.
#include <algorithm>
#include <vector>

#include "experts.h"
#include "panels.h"
#include "scratch.h"

namespace libmoe_fast {

namespace {

// Packs a panel: 32 weight rows, whose elements follow each other in the sum.
template <typename T>
void pack_weight_rows(const T* weight, int64_t rows, int64_t width, int64_t first_row, int64_t steps,
                      uint32_t* packed) {
  const T* pointers[kTileColumns] = {};
  const int count = tile_extent(rows, first_row, kTileColumns);
  for (int i = 0; i < count; ++i) pointers[i] = weight + (first_row + i) * width;
  pack_panel<T>(pointers, count, width, steps, packed);
}

template <typename T>
class Forward {
 public:
  Forward(const ExpertInputs<T>& inputs, T* z, T* y)
      : in_(inputs),
        z_(z),
        y_(y),
        groups_(make_groups(inputs.offsets, inputs.experts, (inputs.in + inputs.hidden) * packed_bytes<T>(), true)),
        in_steps_(steps_of<T>(inputs.in)),
        hidden_steps_(panels_of(inputs.hidden) * panel_steps<T>()),
        scratch_(plan()) {}

  void run() {
    TaskRound round;
    for (const Group& group : groups_) {
      pack_tokens(round, group);  // in the round that ends the group before: small tasks, for whom it leaves idle
      round.run();
      hidden_layer(group);
      round = TaskRound();
      output_layer(round, group);
    }
    round.run();
    zero_rest(in_, scratch_.template at<T>(outputs_), in_.out);
    combine_rows<T>(scratch_.template at<T>(outputs_), in_.inverse, in_.weights, y_, in_.tokens, in_.out, in_.top_k);
  }

 private:
  ScratchPlan plan() {
    ScratchPlan plan;
    const int64_t strips = largest(groups_, [](const Group& group) { return group.strips; });
    tokens_ = plan.add<uint32_t>(strip_words(strips * in_steps_));
    activations_ = plan.add<uint32_t>(strip_words(strips * hidden_steps_));
    outputs_ = plan.add<T>(in_.choices * in_.out);
    local_stride_ = operand_words(std::max(in_steps_ * (in_.gated ? 2 : 1), hidden_steps_) * kTileColumns);
    local_ = plan.add<uint32_t>(local_stride_ * torch::stable::get_num_threads());
    return plan;
  }

  uint32_t* local(int64_t worker) const { return scratch_.template at<uint32_t>(local_) + worker * local_stride_; }

  void pack_tokens(TaskRound& round, const Group& group) {
    add_strips(round, group, [this](const Unit& unit, int64_t strip) {
      pack_unit_strip<T>(in_, unit, strip, in_.x, in_.in, scratch_.template at<uint32_t>(tokens_));
    });
  }

  // The rows of a weight that a block is made of: they follow each other.
  static NextOperand rows_of(const T* weight, int64_t rows, int64_t width, const PanelBlock& block) {
    const int64_t begin = std::min(rows, block.first * kTileColumns), end = std::min(rows, block.last * kTileColumns);
    const int64_t bytes = (end - begin) * width * static_cast<int64_t>(sizeof(T));
    return {weight + begin * width, bytes / kCacheLine, kCacheLine, kCacheLine};
  }

  const T* w1_of(const Unit& unit) const { return in_.first_weight(unit.expert); }
  const T* w2_of(const Unit& unit) const { return in_.second_weight(unit.expert); }

  void hidden_layer(const Group& group) {
    const int64_t panel_words = in_steps_ * kTileColumns, sides = in_.gated ? 2 : 1;
    const PanelBlocks blocks(group.units.size(), panels_of(in_.hidden), panel_words * sides);
    TaskRound round;
    blocks.add_to(round, [&](const PanelBlock& block, const PanelBlock& next, int64_t worker) {
      const Unit& unit = group.units[block.unit];
      uint32_t* gate_right = local(worker);
      uint32_t* up_right = gate_right + (block.last - block.first) * panel_words;
      const T* weight = w1_of(unit);
      for (int64_t panel = block.first; panel < block.last; ++panel) {
        const int64_t row = panel * kTileColumns, offset = (panel - block.first) * panel_words;
        pack_weight_rows(weight, in_.hidden, in_.in, row, in_steps_, gate_right + offset);
        if (in_.gated) {
          pack_weight_rows(weight + in_.hidden * in_.in, in_.hidden, in_.in, row, in_steps_, up_right + offset);
        }
      }
      const NextOperand ahead = rows_of(w1_of(group.units[next.unit]), in_.hidden, in_.in, next);
      hidden_tiles(unit, gate_right, up_right, block, ahead);
    });
    round.run();
  }

  void hidden_tiles(const Unit& unit, uint32_t* gate_right, const uint32_t* up_right, const PanelBlock& block,
                    const NextOperand& next) {
    alignas(64) float gate[kTileSize], up[kTileSize];
    const auto* tokens = scratch_.template at<uint32_t>(tokens_);
    auto* activations = scratch_.template at<uint32_t>(activations_);
    multiply_unit<T>(unit, in_steps_, tokens, gate_right, block, in_.hidden, gate,
                     [&](const TilePlace& place, int64_t strip, int64_t panel) {
      const int64_t number = unit.strip + strip;
      if (in_.gated) {
        multiply_tile<T>(place.rows, in_steps_, tokens + strip_words(number * in_steps_),
                         {up_right + (panel - block.first) * in_steps_ * kTileColumns, in_steps_}, up);
      }
      finish_hidden<T>(in_, place, z_, gate, up);
      pack_tile_in_strip<T>(gate, place.rows, panel * panel_steps<T>(), hidden_steps_,
                            activations + strip_words(number * hidden_steps_));
    }, next);
  }

  void output_layer(TaskRound& round, const Group& group) {
    const int64_t panel_words = hidden_steps_ * kTileColumns;
    const PanelBlocks blocks(group.units.size(), panels_of(in_.out), panel_words);
    blocks.add_to(round, [this, &group, panel_words](const PanelBlock& block, const PanelBlock& next, int64_t worker) {
      const Unit& unit = group.units[block.unit];
      uint32_t* right = local(worker);
      for (int64_t panel = block.first; panel < block.last; ++panel) {
        pack_weight_rows(w2_of(unit), in_.out, in_.hidden, panel * kTileColumns, hidden_steps_,
                         right + (panel - block.first) * panel_words);
      }
      output_tiles(unit, right, block, rows_of(w2_of(group.units[next.unit]), in_.out, in_.hidden, next));
    });
  }

  void output_tiles(const Unit& unit, uint32_t* right, const PanelBlock& block, const NextOperand& next) {
    alignas(64) float tile[kTileSize];
    T* outputs = scratch_.template at<T>(outputs_);
    const T* bias = in_.second_bias(unit.expert);
    const auto* activations = scratch_.template at<uint32_t>(activations_);
    multiply_unit<T>(unit, hidden_steps_, activations, right, block, in_.out, tile,
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

}  // namespace

template <typename T>
void forward_in_tiles(const ExpertInputs<T>& inputs, T* z, T* y) {
  Forward<T>(inputs, z, y).run();
}

template void forward_in_tiles(const ExpertInputs<float>&, float*, float*);
template void forward_in_tiles(const ExpertInputs<BFloat16>&, BFloat16*, BFloat16*);

}  // namespace libmoe_fast
