#include "row_groups.h"

#include "panels.h"

namespace libmoe_fast {

namespace {

// Packed rows of one group stay in cache between the step that makes them and the steps that read them, also where
// neighbours take their share of the last level: on AVX-512 12 MiB cost up to 30% there, and 6 MiB up to 5% where they were
// one expert's, whose rows all meet each panel of its weights. With 3 MiB the weights are packed more often, which cost 4%.
// Small experts share a group of 6 MiB, since each group begins cold: 1%. A slower multiplication asks less of the caches:
// on AVX2 6 MiB of one expert cost 2%, 12 MiB or more gain half a percent; small experts gain 1% from a group of 12 MiB.
struct Sizes {
  int64_t unit, group;
};
Sizes sizes() { return has_avx512() ? Sizes{4 << 20, 6 << 20} : Sizes{8 << 20, 12 << 20}; }

// Rows that meet one packing of the weights: packing costs about 1 / rows of the multiplication.
constexpr int64_t kMostUnitRows = 1344, kLeastUnitRows = 224;

int64_t rows_in(int64_t bytes, int64_t row_bytes) {
  return std::clamp(bytes / row_bytes, kLeastUnitRows, kMostUnitRows);
}

// Splits rows evenly over the fewest tiles.
int strip_height(int64_t rows) {
  const int64_t even = divide_up(divide_up(rows, divide_up(rows, strip_rows())), 2) * 2;
  return static_cast<int>(even);
}

void append_rows(Group& group, int64_t expert, int64_t row, int64_t rows, int64_t unit_rows) {
  const int height = strip_height(rows);
  const int64_t strips = divide_up(rows, height);
  const int64_t unit_strips = divide_up(strips, divide_up(rows, unit_rows));
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
  group.padded_rows += group.spans.back().padded_rows();
}

}  // namespace

std::vector<Group> make_groups(const int64_t* offsets, int64_t experts, int64_t row_bytes, bool split) {
  const int64_t unit_rows = rows_in(sizes().unit, row_bytes), group_rows = rows_in(sizes().group, row_bytes);
  std::vector<Group> groups;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t rows = offsets[expert + 1] - offsets[expert];
    if (rows == 0) continue;
    const int64_t part = split ? divide_up(divide_up(rows, divide_up(rows, unit_rows)), strip_rows()) * strip_rows() : rows;
    for (int64_t begin = 0; begin < rows; begin += part) {
      const int64_t count = std::min(part, rows - begin);
      if (groups.empty() || groups.back().rows + count > group_rows) groups.emplace_back();
      append_rows(groups.back(), expert, offsets[expert] + begin, count, unit_rows);
    }
  }
  return groups;
}

std::vector<Share> share_out(int64_t units, int64_t panels, int64_t most) {
  const int64_t parts = 2 * torch::stable::get_num_threads();
  std::vector<Share> shares;
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t begin = 0; begin < panels;) {
      const int64_t left = (units - unit) * panels - begin;
      const int64_t size = std::min(std::clamp<int64_t>(left / parts, 1, most), panels - begin);
      shares.push_back({unit, begin, begin + size});
      begin += size;
    }
  }
  return shares;
}

}  // namespace libmoe_fast
