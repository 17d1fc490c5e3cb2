// Threads come from torch's own OpenMP pool: torch.set_num_threads and OMP_NUM_THREADS hold here too, a second OpenMP
// runtime never meets torch's in one process, and building needs no OpenMP of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace libmoe_fast {

// Elements below which a further thread costs more than it saves (at::internal::GRAIN_SIZE).
constexpr int64_t kGrainElements = 32768;

// Calls body(begin, end) over contiguous ranges of [0, rows), in parallel when rows * width is worth it. body must not
// throw: an exception cannot leave an OpenMP region.
template <typename Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, body);
}

// Calls body(task, worker, claim) for every task of [0, tasks), worker < get_num_threads(). Threads take the next task when
// they are free, so one that the system delays does not hold up the others; which thread runs a task must change nothing.
// claim() takes the next task early, to prepare for it, and returns it; -1 near the end, where another thread would wait.
template <typename Body>
void for_each_claimed_task(int64_t tasks, const Body& body) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      int64_t claimed = -1;
      const auto claim = [&] {
        if (claimed < 0 && next.load() < tasks - 2 * workers) claimed = next.fetch_add(1);
        return claimed;
      };
      for (int64_t task = next.fetch_add(1); task < tasks; task = claimed < 0 ? next.fetch_add(1) : claimed) {
        claimed = -1;
        body(task, worker, claim);
      }
    }
  });
}

// The same for tasks that need no preparation.
template <typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  for_each_claimed_task(tasks, [&](int64_t task, int64_t worker, const auto&) { body(task, worker); });
}

// Tasks of several kinds, taken in this order: no thread waits where one kind ends and the next begins.
class TaskRound {
 public:
  using Claim = std::function<int64_t()>;  // the next task of this kind, or -1 (see for_each_claimed_task)
  using Body = std::function<void(int64_t task, int64_t worker, const Claim& claim)>;

  void add(int64_t tasks, Body body) {
    kinds_.push_back({tasks_, tasks, std::move(body)});
    tasks_ += tasks;
  }

  void run() const {
    for_each_claimed_task(tasks_, [&](int64_t task, int64_t worker, const auto& claim) {
      auto kind = kinds_.begin();
      while (task >= kind->first + kind->tasks) ++kind;
      kind->body(task - kind->first, worker, [&] {
        const int64_t next = claim() - kind->first;
        return next >= 0 && next < kind->tasks ? next : -1;
      });
    });
  }

 private:
  struct Kind {
    int64_t first, tasks;
    Body body;
  };

  std::vector<Kind> kinds_;
  int64_t tasks_ = 0;
};

}  // namespace libmoe_fast
