// Memory for intermediate values of a kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace csikernels::cpu {

// `count` values, not initialised, on a cache line's boundary.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new(sizeof(T) * count, kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace csikernels::cpu
