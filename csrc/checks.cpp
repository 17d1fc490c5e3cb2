#include "checks.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"
#include "tensors.h"

namespace libmoe_fast {

namespace {

std::string sizes_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "]";
  return text.str();
}

std::string sizes_text(std::initializer_list<int64_t> sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (int64_t size : sizes) {
    text << separator << (size < 0 ? "*" : std::to_string(size));
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::string device_text(const Device& device) {
  if (device.is_cpu()) return "the CPU";
  return (device.is_cuda() ? "cuda:" : "another device, ") + std::to_string(device.index());
}

bool matches(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) {
    const int64_t given = tensor.size(d++);
    return size < 0 || size == given;
  });
}

// Position of the first entry outside [0, bound), or `count` if there is none.
int64_t first_outside(const int64_t* entries, int64_t count, int64_t bound) {
  std::atomic<int64_t> first{count};
  parallel_rows(count, 1, [&](int64_t begin, int64_t end) {
    const int64_t* outside = std::find_if(entries + begin, entries + end,
                                          [bound](int64_t entry) { return entry < 0 || entry >= bound; });
    const int64_t position = outside - entries;
    if (position == end) return;
    int64_t seen = first.load();
    while (position < seen && !first.compare_exchange_weak(seen, position)) {
    }
  });
  return first.load();
}

}  // namespace

void ArgumentCheck::shape(const Tensor& tensor, const char* name, const char* letters,
                          std::initializer_list<int64_t> sizes) const {
  const Device given = tensor.device();
  if (!(given.is_cpu() && device_.is_cpu()) && given != device_) {
    fail("expected `", name, "` on ", device_text(device_), ", got a tensor on ", device_text(given));
  }
  if (!matches(tensor, sizes)) {
    fail("expected `", name, "` with shape ", letters, " = ", sizes_text(sizes), ", got ", sizes_text(tensor));
  }
}

void ArgumentCheck::int64(const Tensor& tensor, const char* name) const {
  if (tensor.scalar_type() != ScalarType::Long) {
    fail("expected `", name, "` in int64, got ", dtype_name(tensor.scalar_type()));
  }
}

void ArgumentCheck::floating(const Tensor& tensor, const char* name) const {
  if (!is_row_dtype(tensor.scalar_type())) {
    fail("expected `", name, "` in bfloat16, float16, float32 or float64, got ", dtype_name(tensor.scalar_type()));
  }
}

void ArgumentCheck::same_dtype(const Tensor& tensor, const char* name, const Tensor& other,
                               const char* other_name) const {
  if (tensor.scalar_type() != other.scalar_type()) {
    fail("expected `", name, "` in the dtype of `", other_name, "`, ", dtype_name(other.scalar_type()), ", got ",
         dtype_name(tensor.scalar_type()));
  }
}

void ArgumentCheck::between(int64_t value, const char* name, int64_t lowest, int64_t highest) const {
  if (value < lowest || value > highest) {
    fail("expected `", name, "` from ", lowest, " to ", highest, ", got ", value);
  }
}

void ArgumentCheck::choices(int64_t rows, const char* name, int64_t tokens, int64_t top_k) const {
  if (rows % top_k != 0 || rows / top_k != tokens) {
    fail("expected `", name, "` with T * top_k rows, T = ", tokens, " and top_k = ", top_k, ", got ", rows);
  }
}

void ArgumentCheck::entries(const Tensor& tensor, const char* name, int64_t bound) const {
  const int64_t* values = tensor.const_data_ptr<int64_t>();
  const int64_t position = first_outside(values, tensor.numel(), bound);
  if (position < tensor.numel()) {
    fail("expected every entry of `", name, "` in [0, ", bound, "), got ", values[position], " at position ", position);
  }
}

std::optional<Tensor> ArgumentCheck::weights(const std::optional<Tensor>& weights, int64_t tokens, int64_t top_k,
                                             const Tensor& rows, const char* rows_name) const {
  if (!weights.has_value()) return std::nullopt;
  shape(*weights, "weights", "[T, top_k]", {tokens, top_k});
  if (weights->scalar_type() != ScalarType::Float) same_dtype(*weights, "weights", rows, rows_name);
  // [T, K] is small beside the rows, so widening it here keeps one kernel per row dtype instead of one per pair.
  return as_contiguous(with_dtype(*weights, accumulator_dtype(rows.scalar_type())));
}

}  // namespace libmoe_fast
