// Threads and scratch memory for the kernels, without torch's headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pynlp {

int64_t thread_count();  // torch.get_num_threads()

// Work of fewer operations stays on the calling thread: to wake another one takes as long, and on a busy machine it may
// have to wait for the scheduler.
constexpr int64_t WORTH_SHARING = 1 << 19;

// Calls work(context, task) for each task of 0 .. tasks - 1 on torch's threads. Tasks are taken in rising order, so a
// task may wait for a lower one; a result must not depend on which thread takes which. `operations` are those of all
// tasks, roughly: multiply-adds, or values that are read and written.
void run_tasks(int64_t tasks, int64_t operations, void (*work)(void* context, int64_t task), void* context);

// The same with a member function: kernel->work(task) for each task.
template <auto work, class Kernel>
void run_tasks(int64_t tasks, int64_t operations, Kernel* kernel) {
  run_tasks(
      tasks, operations, [](void* k, int64_t task) { (static_cast<Kernel*>(k)->*work)(task); },
      const_cast<void*>(static_cast<const void*>(kernel)));
}

void yield_thread();  // lets another thread run

// 64-byte aligned memory, in huge pages where it is large: fresh pages of 4 KiB cost as much as to fill them thrice.
void* allocate(size_t bytes);
void release(void* memory);

// 64-byte aligned memory of the calling thread, valid until its next call; its content is undefined.
void* thread_scratch(size_t bytes);

}  // namespace pynlp
