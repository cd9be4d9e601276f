#include "cpu/activation_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/accumulate.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

namespace csikernels::cpu {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSmall = size_t{8} << 20;  // below, the allocator keeps the memory itself

struct Block {
  void* data = nullptr;
  size_t bytes = 0;
};

void release(Block block) {
  if (block.data != nullptr) munmap(block.data, block.bytes);
}

// On a huge page's boundary, or the block's two ends would lie on small pages. `bytes` is a multiple of kHugePage.
Block allocate(size_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "csikernels: cannot allocate ", bytes,
                   " bytes for intermediate values; use smaller batches");
  auto* const begin = static_cast<std::byte*>(mapped);
  const size_t before = kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage;  // never 0: one munmap each
  munmap(begin, before);
  std::byte* const data = begin + before;
  if (before < kHugePage) munmap(data + bytes, kHugePage - before);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return {data, bytes};
}

class LastFreed {
 public:
  Block take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (Block& block : blocks_) {
        if (block.bytes >= bytes && block.bytes / 2 <= bytes) return std::exchange(block, {});
      }
    }
    return allocate(bytes);
  }

  void give(Block block) {
#ifdef MADV_FREE
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    {
      const std::lock_guard lock(mutex_);
      // Into a free place, or that of the block freed longest ago.
      auto place = std::find_if(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.data == nullptr; });
      if (place == blocks_.end()) place = blocks_.begin();
      std::swap(block, *place);
      std::rotate(place, place + 1, blocks_.end());
    }
    release(block);
  }

 private:
  std::mutex mutex_;
  std::array<Block, 4> blocks_;
};

// Never destroyed: tensors may outlive static objects.
LastFreed& last_freed() {
  static LastFreed& pool = *new LastFreed;
  return pool;
}

}  // namespace

at::Tensor activation_memory(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t needed = static_cast<size_t>(c10::multiply_integers(sizes)) * sizeof(float);
  if (needed < kSmall) return at::empty(sizes, options);
  const Block block = last_freed().take((needed + kHugePage - 1) / kHugePage * kHugePage);
  return at::from_blob(block.data, sizes, [block](void*) { last_freed().give(block); }, options);
}

}  // namespace csikernels::cpu
