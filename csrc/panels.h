// Operands in panels of 32 columns, and the products of a unit's rows with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "packing.h"
#include "row_groups.h"

namespace libmoe_fast {

// Panels of the operand that a task packs for itself stay in the second-level cache, which is smaller where there is no
// AVX-512, and keep half of it free for what is fetched ahead.
inline int64_t panel_bytes() { return int64_t{has_avx512() ? 256 : 128} << 10; }
constexpr int64_t kMostPanels = 8;

inline int64_t panels_of(int64_t width) { return divide_up(width, kTileColumns); }

// Steps that a panel of results makes in the next sum.
template <typename T>
int64_t panel_steps() {
  return kTileColumns / per_word<T>();
}

template <typename T>
int64_t steps_of(int64_t elements) {
  return divide_up(elements, per_word<T>());
}

// Panels that a task can pack and keep in cache.
inline int64_t cached_panels(int64_t panel_words) {
  return std::clamp<int64_t>(panel_bytes() / (panel_words * 4), 1, kMostPanels);
}

// A part of one unit's panels (or strips), for one task.
struct Share {
  int64_t unit, begin, end;
};

// Shares out the panels of all units, at most `most` at a time, and less towards the end, so that all threads end at
// about the same time.
std::vector<Share> share_out(int64_t units, int64_t panels, int64_t most);

// Words of as many, and of any narrower ones.
inline int64_t operand_words(int64_t panel_words) { return std::max(panel_bytes() / 4, panel_words); }

// Packs a strip of a unit: its rows of x or dy as the left operand.
template <typename T>
void pack_unit_strip(const ExpertInputs<T>& inputs, const Unit& unit, int64_t strip, const T* matrix, int64_t width,
                uint32_t* packed) {
  const int64_t row = unit.row_of(strip), steps = steps_of<T>(width);
  const int rows = unit.rows_of(strip);
  const T* pointers[kTileRows];
  for (int i = 0; i < rows; ++i) pointers[i] = inputs.row_of(matrix, width, row + i);
  pack_strip<T>(pointers, rows, width, steps, packed + strip_words((unit.strip + strip) * steps));
}

// Panels [first, last) of a unit, packed and multiplied together.
struct PanelBlock {
  int64_t unit, first, last;  // last = first: none
};

// All panels of all units in blocks, and these in chains, which one thread does in a row: it fetches a block while it
// multiplies the one before.
class PanelBlocks {
 public:
  PanelBlocks(int64_t units, int64_t panels, int64_t panel_words)
      : per_block_(std::min(cached_panels(panel_words), divide_up(panels, 8))),
        chains_(share_out(units, panels, kMostChained * per_block_)) {}

  // Tasks that call body(block, next, worker) for all blocks. next comes after it, as far as that is known.
  template <typename Body>
  void add_to(TaskRound& round, const Body& body) const {
    const PanelBlocks& blocks = *this;
    round.add(chains_.size(), [blocks, body](int64_t task, int64_t worker, const TaskRound::Claim& claim) {
      const Share& chain = blocks.chains_[task];
      for (int64_t first = chain.begin; first < chain.end; first += blocks.per_block_) {
        const int64_t next = first + blocks.per_block_;
        body(blocks.block(chain, first), next < chain.end ? blocks.block(chain, next) : blocks.first_of(claim()), worker);
      }
    });
  }

 private:
  static constexpr int64_t kMostChained = 8;

  PanelBlock block(const Share& chain, int64_t first) const {
    return {chain.unit, first, std::min(chain.end, first + per_block_)};
  }
  PanelBlock first_of(int64_t chain) const {
    return chain < 0 ? PanelBlock{0, 0, 0} : block(chains_[chain], chains_[chain].begin);
  }

  int64_t per_block_;
  std::vector<Share> chains_;
};

// A part of a matrix that is packed next: `bytes` of each of some rows.
struct NextOperand {
  const void* data = nullptr;
  int64_t rows = 0, row_bytes = 0, bytes = 0;

  // What to fetch during one of `calls` multiplications, a cache line at every step.
  Ahead during(int64_t call, int64_t calls, int64_t steps) const {
    if (rows == 0 || bytes == 0) return {};
    const int64_t runs = divide_up(rows, steps), parts = divide_up(bytes, kCacheLine) * runs, part = call * parts / calls;
    const int64_t first = divide_up(part * calls, parts), end = std::max(first + 1, divide_up((part + 1) * calls, parts));
    return {static_cast<const char*>(data) + part % runs * steps * row_bytes + part / runs * kCacheLine, row_bytes,
            call - first, end - first};
  }
};

// Calls finish(place, strip, panel) for every tile of a unit's rows and a block of panels, while the next one is fetched.
// With `rows`, `right` is not packed yet: the first strip packs it from them, as pack_panels_across would.
template <typename T, typename Finish>
void multiply_unit(const Unit& unit, int64_t steps, const uint32_t* left, uint32_t* right, const PanelBlock& block,
                   int64_t width, float* tile, const Finish& finish, const NextOperand& next,
                   const T* const* rows = nullptr) {
  const int64_t calls = unit.strips * (block.last - block.first);
  int64_t call = 0;
  for (int64_t strip = 0; strip < unit.strips; ++strip) {
    const uint32_t* strip_left = left + strip_words((unit.strip + strip) * steps);
    for (int64_t panel = block.first; panel < block.last; ++panel) {
      const int64_t column = panel * kTileColumns;
      const TilePlace place{unit.expert, unit.row_of(strip), column, unit.rows_of(strip),
                            tile_extent(width, column, kTileColumns)};
      uint32_t* panel_right = right + (panel - block.first) * steps * kTileColumns;
      const Ahead ahead = next.during(call++, calls, steps);
      if (strip == 0 && rows != nullptr) {
        multiply_tile_packing<T>(place.rows, steps, strip_left, rows, column, panel_right, tile, ahead);
      } else {
        multiply_tile<T>(place.rows, steps, strip_left, {panel_right, steps}, tile, ahead);
      }
      finish(place, strip, panel);
    }
  }
}

}  // namespace libmoe_fast
