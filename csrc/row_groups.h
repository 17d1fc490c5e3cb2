// The rows of all experts, divided: into groups that stay in cache from the step that packs them to the last that reads
// them, and a group into units, which one packing of an expert's weights meets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "expert_tiles.h"
#include "parallel.h"

namespace libmoe_fast {

// Consecutive rows of one expert, in strips of `height` rows (even: bf16 words may hold two rows).
struct Unit {
  int64_t expert, row, rows;
  int height;
  int64_t strips;
  int64_t strip;         // number of its first strip within the group
  int64_t expert_strip;  // and within the expert's rows of the group

  int64_t row_of(int64_t strip) const { return row + strip * height; }
  int rows_of(int64_t strip) const { return tile_extent(rows, strip * height, height); }
};

// All rows of one expert in a group.
struct ExpertSpan {
  int64_t expert, row, rows;
  int height;
  int64_t strips;
  int64_t padded_row;  // padded rows of earlier spans of the group

  // Rows in sums over them: an even number, as bf16 words hold two.
  int64_t padded_rows() const { return divide_up(rows, 2) * 2; }
};

struct Group {
  int64_t row = 0, rows = 0, strips = 0, padded_rows = 0;
  std::vector<Unit> units;
  std::vector<ExpertSpan> spans;
};

// Groups of the experts' rows, expert e's being offsets[e] to offsets[e + 1], where a row needs row_bytes of cache. An
// expert with more rows than fit is a group of its own, or with `split` several.
std::vector<Group> make_groups(const int64_t* offsets, int64_t experts, int64_t row_bytes, bool split);

template <typename Value>
int64_t largest(const std::vector<Group>& groups, const Value& value) {
  int64_t most = 0;
  for (const Group& group : groups) most = std::max<int64_t>(most, value(group));
  return most;
}

// Tasks that call body(unit, strip) for every strip of the group.
template <typename Body>
void add_strips(TaskRound& round, const Group& group, const Body& body) {
  constexpr int64_t kStripsPerTask = 8;
  std::vector<std::pair<const Unit*, int64_t>> tasks;
  for (const Unit& unit : group.units) {
    for (int64_t strip = 0; strip < unit.strips; strip += kStripsPerTask) tasks.emplace_back(&unit, strip);
  }
  round.add(static_cast<int64_t>(tasks.size()), [tasks, body](int64_t task, int64_t, const auto&) {
    const auto [unit, first] = tasks[task];
    for (int64_t strip = first; strip < std::min(unit->strips, first + kStripsPerTask); ++strip) body(*unit, strip);
  });
}

}  // namespace libmoe_fast
