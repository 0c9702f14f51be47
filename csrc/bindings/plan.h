// A call of a native kernel, kept to be made again with other tensors of the same dtypes, shapes and strides.
// No torch here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace pynlp {

// A field of a problem that one of the op's tensors fills.
struct Place {
  enum Kind {
    input,
    seed,      // the input's value, an int64, instead of its address
    output,
    optional,  // an output that the kernel leaves out where the address is null
  };
  const void* field;
  Kind kind;
  bool given = true;  // whether the call has this tensor
};

class Plan {
 public:
  // The plan that calls on this thread fill in, or null.
  static Plan*& recording() {
    thread_local Plan* plan = nullptr;
    return plan;
  }

  template <auto kernel, class Problem>
  void fill(const Problem& problem, const std::vector<Place>& places) {
    static_assert(sizeof(Problem) <= MOST_BYTES && std::is_trivially_copyable_v<Problem>);
    const auto* bytes = reinterpret_cast<const std::byte*>(&problem);
    calls_ += 1;
    problem_.assign(bytes, bytes + sizeof(Problem));
    kernel_ = [](const std::byte* filled) { kernel(*reinterpret_cast<const Problem*>(filled)); };
    fields_.clear();
    for (const Place& place : places) {
      if (!place.given) continue;
      const auto offset = static_cast<size_t>(static_cast<const std::byte*>(place.field) - bytes);
      uint64_t value;
      std::memcpy(&value, place.field, sizeof value);
      const bool is_needed = place.kind == Place::seed || (place.kind == Place::input && value);
      fields_.push_back({offset, place.kind, is_needed});
    }
  }

  // Whether the call ran one kernel by run(), which must then be all that it did: see CONTRIBUTING.md.
  bool is_whole() const { return calls_ == 1; }

  size_t count() const { return fields_.size(); }
  bool is_optional(size_t i) const { return fields_[i].kind == Place::optional; }

  // Makes the call with these addresses, one for each given tensor in the order of the op's arguments and results. Where
  // an input has none now and had one then, it does nothing and returns false.
  bool run(const uintptr_t* addresses) const {
    alignas(64) std::byte problem[MOST_BYTES];
    std::memcpy(problem, problem_.data(), problem_.size());
    for (size_t i = 0; i < fields_.size(); ++i) {
      if (fields_[i].is_needed && !addresses[i]) return false;
      const void* from = fields_[i].kind == Place::seed ? reinterpret_cast<const void*>(addresses[i]) : &addresses[i];
      std::memcpy(problem + fields_[i].offset, from, sizeof(uint64_t));
    }
    kernel_(problem);
    return true;
  }

 private:
  static constexpr size_t MOST_BYTES = 1024;
  struct Field {
    size_t offset;
    Place::Kind kind;
    bool is_needed;
  };

  int calls_ = 0;
  std::vector<std::byte> problem_;
  std::vector<Field> fields_;
  void (*kernel_)(const std::byte*) = nullptr;
};

// Runs a kernel on a filled problem. `places` gives the fields of all of the op's tensors, in the order of its arguments
// and results; it is asked where a plan is made.
template <auto kernel, class Problem, class Places>
void run(const Problem& problem, const Places& places) {
  if (Plan* plan = Plan::recording()) plan->fill<kernel>(problem, places());
  kernel(problem);
}

}  // namespace pynlp
