// Gives the kernels torch's threads, and scratch memory.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

#include "../common/parallel.h"

namespace pynlp {

int64_t thread_count() { return torch::stable::get_num_threads(); }

void run_tasks(int64_t tasks, int64_t operations, void (*work)(void*, int64_t), void* context) {
  if (operations < WORTH_SHARING) {
    for (int64_t task = 0; task < tasks; ++task) work(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, thread_count());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    // One range may stand for several workers; whoever comes later finds nothing left.
    for (int64_t task = next++; task < tasks; task = next++) work(context, task);
  });
}

void yield_thread() { std::this_thread::yield(); }

void* allocate(size_t bytes) {
  constexpr size_t HUGE_PAGE = size_t{1} << 21;
  const size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (!memory && bytes) throw std::bad_alloc();
#if defined(__linux__)
  if (alignment == HUGE_PAGE) madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: a refusal does not matter
#endif
  return memory;
}

void release(void* memory) { std::free(memory); }

void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> buffer;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    buffer.reset();
    capacity = (bytes + 4095) / 4096 * 4096;
    buffer.reset(std::aligned_alloc(4096, capacity));
    if (!buffer) {
      capacity = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.get();
}

}  // namespace pynlp
