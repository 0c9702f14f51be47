// Memory of a kernel: a thread's pieces, and what all tasks share.
#pragma once

#include "../common/parallel.h"
#include "vector.h"

namespace pynlp {
namespace {

// Cuts one thread's scratch memory into aligned pieces; with no base it only counts bytes.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * sizeof(T), 64);
    return piece;
  }
};

// A kernel's pieces of the calling thread's memory, valid until the thread's next ones.
template <class Scratch, class Kernel>
Scratch take_scratch(const Kernel& kernel) {
  Arena sizes{nullptr};
  Scratch(kernel, sizes);
  Arena arena{static_cast<char*>(thread_scratch(sizes.used))};
  return Scratch(kernel, arena);
}

// Memory that all tasks share.
struct Buffer {
  explicit Buffer(int64_t bytes) : data(allocate(bytes)) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { release(data); }
  float* floats() const { return static_cast<float*>(data); }
  void* data;
};

}  // namespace
}  // namespace pynlp
