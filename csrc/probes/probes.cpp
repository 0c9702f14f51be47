#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/isa.h"
#include "table.h"

namespace pynlp {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// avx512_vnni before avx512_bf16: a CPU with both takes int8_dot from the first; bf16_dot, null there, from the second.
constexpr Variant<ProbeLoops> VARIANTS[] = {
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
    {&probes_amx_int8, &Features::amx_int8},
    {&probes_amx_bf16, &Features::amx_bf16},
#endif
#if defined(__x86_64__)
    {&probes_avx512_vnni, &Features::avx512_vnni},
    {&probes_avx512_bf16, &Features::avx512_bf16},
    {&probes_avx512, &Features::avx512},
#endif
#if PYNLP_COMPILES_AMX_AND_AVX_VNNI
    {&probes_avx_vnni, &Features::avx_vnni},
#endif
#if defined(__x86_64__)
    {&probes_avx2, &Features::avx2},
#endif
    {&probes_portable},
};

// Where all threads meet; they yield meanwhile, as there may be more of them than cores.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads), missing_(threads) {}
  void wait() {
    const int64_t meeting = meeting_.load();
    if (missing_.fetch_sub(1) == 1) {
      missing_.store(threads_);
      meeting_.fetch_add(1);
    } else {
      while (meeting_.load() == meeting) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> missing_;
  std::atomic<int64_t> meeting_{0};
};

// The highest rate of run(thread), which returns its amount of work, over repeated runs of all threads at once.
double best_rate(int threads, double seconds, const std::function<double(int)>& run) {
  struct alignas(64) Lap {  // a cache line each
    Clock::time_point start, end;
    double amount;
  };
  std::vector<Lap> laps(threads);
  Barrier barrier(threads);
  std::atomic<bool> done{false};
  double best = 0;
  const Clock::time_point begin = Clock::now();
  auto repeat = [&](int thread) {
    while (!done.load()) {
      barrier.wait();
      Lap& lap = laps[thread];
      lap.start = Clock::now();
      lap.amount = run(thread);
      lap.end = Clock::now();
      barrier.wait();
      if (thread == 0) {
        Clock::time_point start = lap.start, end = lap.end;
        double amount = 0;
        for (const Lap& l : laps) {
          start = std::min(start, l.start);
          end = std::max(end, l.end);
          amount += l.amount;
        }
        best = std::max(best, amount / seconds_between(start, end));
        done.store(seconds_between(begin, Clock::now()) >= seconds);
      }
      barrier.wait();
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(repeat, thread);
  repeat(0);
  for (std::thread& other : others) other.join();
  return best;
}

double peak(double (*ProbeLoops::*rounds)(int64_t), int threads, double seconds) {
  const auto loop = pick(VARIANTS, rounds);
  if (loop == nullptr) return 0;
  constexpr int64_t ROUNDS = 200000;  // about 2 ms: long beside the barrier, short beside a scheduler's slice
  return best_rate(threads, seconds, [&](int) { return loop(ROUNDS); });
}

// Pages as large as the system gives, each first touched here.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, ALIGNMENT))) {
#if defined(__linux__)
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    std::fill_n(data_, bytes, char{1});
  }
  ~Buffer() { ::operator delete(data_, ALIGNMENT); }
  Buffer(const Buffer&) = delete;
  char* data() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{size_t{2} << 20};
  char* const data_;
};

size_t share(size_t bytes, int threads) { return std::max<size_t>(bytes / threads / 1024, 1) * 1024; }

}  // namespace

double peak_fma(int threads, double seconds) { return peak(&ProbeLoops::fma, threads, seconds); }
double peak_bf16_dot(int threads, double seconds) { return peak(&ProbeLoops::bf16_dot, threads, seconds); }
double peak_int8_dot(int threads, double seconds) { return peak(&ProbeLoops::int8_dot, threads, seconds); }
double peak_bf16_tile(int threads, double seconds) { return peak(&ProbeLoops::bf16_tile, threads, seconds); }
double peak_int8_tile(int threads, double seconds) { return peak(&ProbeLoops::int8_tile, threads, seconds); }

double read_bandwidth(int threads, double seconds, size_t bytes) {
  const size_t part = share(bytes, threads);
  const Buffer from(part * threads);
  return best_rate(threads, seconds, [&, read = pick(VARIANTS, &ProbeLoops::read)](int thread) {
    read(from.data() + thread * part, static_cast<int64_t>(part));
    return static_cast<double>(part);
  });
}

double copy_bandwidth(int threads, double seconds, size_t bytes) {
  const size_t part = share(bytes, threads);
  const Buffer from(part * threads), to(part * threads);
  return best_rate(threads, seconds, [&, copy = pick(VARIANTS, &ProbeLoops::copy)](int thread) {
    copy(from.data() + thread * part, to.data() + thread * part, static_cast<int64_t>(part));
    return 2.0 * static_cast<double>(part);
  });
}

}  // namespace pynlp
