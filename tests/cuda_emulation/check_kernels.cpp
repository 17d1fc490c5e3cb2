// Runs the CUDA launchers in the emulation and compares them with plain loops: `check_kernels permute|rows`.
//
// Prints a line per case, its name and a checksum of the result's bits; exit status 1 at the first wrong result. Every
// buffer is a heap allocation of exactly the needed size, so that address sanitizer sees any access outside.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/launchers.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace {

using libmoe_fast::cuda::Dtype;
namespace cuda = libmoe_fast::cuda;

std::mt19937_64 generator(1);

void require(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "WRONG: %s\n", what.c_str());
  std::exit(1);
}

void launched(const char* error) { require(error == nullptr, error == nullptr ? "" : error); }

// FNV-1a over the bytes of the results of a case.
struct Checksum {
  uint64_t value = 0xcbf29ce484222325;

  template <typename T>
  void add(const std::vector<T>& data) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data.data());
    for (size_t i = 0; i < data.size() * sizeof(T); ++i) value = (value ^ bytes[i]) * 0x100000001b3;
  }
};

void report(const std::string& name, const Checksum& checksum) {
  std::printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(checksum.value));
}

// permute_index ------------------------------------------------------------------------------------------------------

using Choices = std::vector<int64_t>;

Choices random_choices(int64_t count, int64_t num_experts) {
  Choices index(count);
  for (int64_t& expert : index) expert = static_cast<int64_t>(generator() % num_experts);
  return index;
}

// Most choices to few experts: the minimum of several.
Choices skewed_choices(int64_t count, int64_t num_experts) {
  Choices index = random_choices(count, num_experts);
  for (int draw = 0; draw < 4; ++draw) {
    for (int64_t& expert : index) expert = std::min<int64_t>(expert, generator() % num_experts);
  }
  return index;
}

void check_permute(const std::string& name, const Choices& index, int64_t num_experts) {
  const int64_t count = index.size();
  const auto bucket = [&](int64_t expert) { return expert < 0 || expert >= num_experts ? num_experts : expert; };
  Choices expected(count);
  std::iota(expected.begin(), expected.end(), 0);
  std::stable_sort(expected.begin(), expected.end(),
                   [&](int64_t a, int64_t b) { return bucket(index[a]) < bucket(index[b]); });

  std::vector<int64_t> scratch(cuda::permute_index_scratch(count, num_experts), -1);
  Choices order(count, -1), inverse(count, -1), offsets(num_experts + 1, -1);
  launched(cuda::permute_index(index.data(), count, num_experts, scratch.data(), order.data(), inverse.data(),
                               offsets.data(), nullptr));

  require(order == expected, name + ": order is not the stable order");
  for (int64_t place = 0; place < count; ++place) {
    require(inverse[order[place]] == place, name + ": inverse is not order's inverse");
  }
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    const int64_t before = std::count_if(index.begin(), index.end(), [&](int64_t e) { return bucket(e) < expert; });
    require(offsets[expert] == before, name + ": offsets of expert " + std::to_string(expert));
  }
  Checksum checksum;
  checksum.add(order);
  checksum.add(inverse);
  checksum.add(offsets);
  report(name, checksum);
}

void check_all_permutes() {
  check_permute("no choices", {}, 4);
  check_permute("one choice", {0}, 1);
  check_permute("one expert takes all", Choices(1500, 2), 4);
  check_permute("a full tile", random_choices(1024, 4), 4);
  check_permute("one more than a tile", random_choices(1025, 4), 4);
  check_permute("CLIP-L, two images", random_choices(2 * 577 * 2, 4), 4);
  check_permute("skewed, N 64", skewed_choices(5000, 64), 64);
  check_permute("most experts empty", random_choices(40, 1024), 1024);
  check_permute("N 1024", random_choices(6000, 1024), 1024);
  check_permute("N no multiple of a warp", random_choices(2100, 37), 37);
  check_permute("as many buckets as threads", random_choices(1100, 255), 255);
  check_permute("descending", [] {
    Choices index(3000);
    for (size_t i = 0; i < index.size(); ++i) index[i] = 7 - i * 8 / index.size();
    return index;
  }(), 8);
  const int64_t lowest = std::numeric_limits<int64_t>::min(), highest = std::numeric_limits<int64_t>::max();
  check_permute("experts that do not exist", {3, -1, 0, 4, 1, lowest, 2, highest, 0, int64_t{1} << 32}, 4);
}

// gather, weighted_scatter, row_dot ----------------------------------------------------------------------------------

template <typename T>
struct Kind;
template <>
struct Kind<__nv_bfloat16> {
  static constexpr Dtype dtype = Dtype::kBFloat16;
  static constexpr int significand = 8;  // bits, the hidden one too
  using Sum = float;
  static constexpr const char* name = "bf16";
};
template <>
struct Kind<__half> {
  static constexpr Dtype dtype = Dtype::kFloat16;
  static constexpr int significand = 11;
  using Sum = float;
  static constexpr const char* name = "fp16";
};
template <>
struct Kind<float> {
  static constexpr Dtype dtype = Dtype::kFloat32;
  static constexpr int significand = 24;
  using Sum = float;
  static constexpr const char* name = "fp32";
};
template <>
struct Kind<double> {
  static constexpr Dtype dtype = Dtype::kFloat64;
  static constexpr int significand = 53;
  using Sum = double;
  static constexpr const char* name = "fp64";
};

template <typename T>
std::vector<T> normal(int64_t count) {
  std::normal_distribution<double> distribution;
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(static_cast<typename Kind<T>::Sum>(distribution(generator)));
  return values;
}

template <typename T>
long double exact(T value) {
  return static_cast<long double>(static_cast<typename Kind<T>::Sum>(value));
}

// A sum of products, and of their absolute values.
struct Truth {
  long double value = 0, magnitude = 0;
  int terms = 0;

  void add(long double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
};

// `result` is the truth to half a unit of its own type, plus the error of sums in fp32 (fp64 for fp64).
template <typename T>
void require_rounded_once(T result, const Truth& truth, const std::string& name) {
  const int sum_bits = std::numeric_limits<typename Kind<T>::Sum>::digits;
  const long double sums = (truth.terms + 1) * std::ldexp(truth.magnitude, -sum_bits);
  const int exponent = static_cast<int>(std::floor(std::log2(std::max(std::fabs(truth.value), 0x1p-14L))));
  const long double rounding = std::ldexp(1.001L, exponent - Kind<T>::significand);
  require(std::fabs(exact(result) - truth.value) <= rounding + sums, name + ": not the exact value rounded once");
}

struct Shape {
  int64_t tokens, top_k, width;
  bool shifted = false;  // rows that start one element after an aligned address
};

// A random permutation of `count` places, and its inverse.
void permutation(int64_t count, Choices& order, Choices& inverse) {
  order.resize(count);
  inverse.resize(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  for (int64_t i = 0; i < count; ++i) inverse[order[i]] = i;
}

template <typename T>
void check_rows(const Shape& shape, bool weighted) {
  using Sum = typename Kind<T>::Sum;
  const int64_t tokens = shape.tokens, top_k = shape.top_k, width = shape.width, rows = tokens * top_k;
  const std::string name = std::string(Kind<T>::name) + " T " + std::to_string(tokens) + " K " + std::to_string(top_k) +
                           " D " + std::to_string(width) + (shape.shifted ? " shifted" : "") +
                           (weighted ? " weighted" : "");
  const int64_t shift = shape.shifted ? 1 : 0;
  Choices order, inverse;
  permutation(rows, order, inverse);
  const std::vector<T> x = normal<T>(tokens * width + shift), y = normal<T>(rows * width + shift);
  const std::vector<Sum> weights = normal<Sum>(rows);
  const Sum* const given = weighted ? weights.data() : nullptr;
  const auto weight = [&](int64_t choice) { return weighted ? exact(weights[choice]) : 1.0L; };
  const auto x_at = [&](int64_t row, int64_t j) { return exact(x[shift + row * width + j]); };
  const auto y_at = [&](int64_t row, int64_t j) { return exact(y[shift + row * width + j]); };
  Checksum checksum;

  std::vector<T> gathered(rows * width + shift);
  launched(cuda::gather(Kind<T>::dtype, x.data() + shift, order.data(), given, gathered.data() + shift, rows, width,
                        top_k, nullptr));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; ++j) {
      Truth truth;
      truth.add(weight(order[r]) * x_at(order[r] / top_k, j));
      require_rounded_once(gathered[shift + r * width + j], truth, name + ": gather");
    }
  }
  checksum.add(gathered);

  std::vector<T> combined(tokens * width + shift);
  launched(cuda::weighted_scatter(Kind<T>::dtype, y.data() + shift, inverse.data(), given, combined.data() + shift,
                                  tokens, width, top_k, nullptr));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < width; ++j) {
      Truth truth;
      for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) truth.add(weight(i) * y_at(inverse[i], j));
      require_rounded_once(combined[shift + t * width + j], truth, name + ": weighted_scatter");
    }
  }
  checksum.add(combined);

  if (!weighted) {
    std::vector<Sum> dots(rows, -1);
    launched(cuda::row_dot(Kind<T>::dtype, y.data() + shift, x.data() + shift, inverse.data(), dots.data(), tokens,
                           width, top_k, nullptr));
    for (int64_t i = 0; i < rows; ++i) {
      Truth truth;
      for (int64_t j = 0; j < width; ++j) truth.add(y_at(inverse[i], j) * x_at(i / top_k, j));
      require_rounded_once(dots[i], truth, name + ": row_dot");
    }
    checksum.add(dots);
  }
  report(name, checksum);
}

// Places outside the range read nothing, and give NaN in their own rows alone.
void check_places_that_do_not_exist() {
  const int64_t tokens = 3, top_k = 2, width = 8, rows = 6;
  const std::vector<float> x(tokens * width, 1), y(rows * width, 1);
  const std::vector<float> weights(rows, 1);
  const Choices places = {0, 1, -1, 3, 4, rows};
  std::vector<float> gathered(rows * width), combined(tokens * width), dots(rows);
  launched(cuda::gather(Dtype::kFloat32, x.data(), places.data(), weights.data(), gathered.data(), rows, width, top_k,
                        nullptr));
  launched(cuda::weighted_scatter(Dtype::kFloat32, y.data(), places.data(), weights.data(), combined.data(), tokens,
                                  width, top_k, nullptr));
  launched(cuda::row_dot(Dtype::kFloat32, y.data(), x.data(), places.data(), dots.data(), tokens, width, top_k,
                         nullptr));
  for (int64_t r = 0; r < rows; ++r) {
    const bool bad = r == 2 || r == 5;
    require(std::isnan(gathered[r * width]) == bad, "gather: NaN exactly where a place does not exist");
    require(std::isnan(dots[r]) == bad, "row_dot: NaN exactly where a place does not exist");
  }
  for (int64_t t = 0; t < tokens; ++t) {
    require(std::isnan(combined[t * width]) == (t > 0), "weighted_scatter: NaN exactly where a place does not exist");
  }
  std::printf("places that do not exist\n");
}

void check_limits() {
  const float value = 0;
  const int64_t wide = int64_t{65535} * 64 * 4 + 4;
  const char* error = cuda::gather(Dtype::kFloat32, &value, nullptr, nullptr, nullptr, 1, wide, 1, nullptr);
  require(error != nullptr && std::string(error) == "the rows are too wide", "a width over the grid's limit");
  error = cuda::gather(Dtype::kFloat32, &value, nullptr, nullptr, nullptr, int64_t{1} << 35, 4, 1, nullptr);
  require(error != nullptr && std::string(error) == "there are too many rows", "more rows than the grid's limit");
  std::printf("limits\n");
}

void check_all_rows() {
  const Shape shapes[] = {
      {0, 2, 8},            // no tokens
      {3, 2, 0},            // no columns
      {1, 1, 1},            // one of everything
      {5, 3, 7},            // rows that cannot be loaded 16 bytes at a time
      {9, 2, 64},           // more rows than a block has warps
      {4, 4, 96, true},     // rows aligned in size but not in place
      {3, 8, 1040},         // several pieces per row, the last one partial
  };
  for (const Shape& shape : shapes) {
    for (bool weighted : {false, true}) {
      check_rows<__nv_bfloat16>(shape, weighted);
      check_rows<__half>(shape, weighted);
      check_rows<float>(shape, weighted);
      check_rows<double>(shape, weighted);
    }
  }
  check_places_that_do_not_exist();
  check_limits();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count == 2 ? arguments[1] : "";
  require(what == "permute" || what == "rows", "usage: check_kernels permute|rows");
  what == "permute" ? check_all_permutes() : check_all_rows();
  return 0;
}
