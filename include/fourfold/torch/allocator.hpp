// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A CPU allocator that counts: every byte that a tensor on the CPU asks for, by the place for
/// which its thread allocated (core/place.hpp). The same bytes a tensor would name by nbytes(), not
/// what the system rounds them to.
///
///   fourfold::door::install_allocator();      // LibTorch allocates here from now on
///   fourfold::door::retag(parameter, fourfold::Place::kWeights);
///   fourfold::door::counters().read().at_peak;                 // adds up to the peak
///
/// Not counted: what LibTorch's libraries take past c10 (scratch of MKL and oneDNN, pinned memory,
/// std::vector, the graph's nodes), and storages made before the allocator was installed unless
/// they are adopted (report/meter.hpp does). So the resident peak is reported beside the counted
/// one.
///
/// Leans on: c10::SetCPUAllocator, and on tensors freed by the deleter they were born with, so
/// blocks of the allocator before and ours may live side by side.
#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Storage.h>
#include <fourfold/core/place.hpp>
#include <fourfold/torch/block_arena.hpp>
#include <fourfold/torch/byte_counters.hpp>
#include <fourfold/torch/door_state.hpp>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <typeinfo>

// A mapped block has no red zones: under AddressSanitizer all blocks come from its malloc.
#if defined(__SANITIZE_ADDRESS__)
#define FOURFOLD_MALLOC_ALL_BLOCKS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FOURFOLD_MALLOC_ALL_BLOCKS 1
#endif
#endif

namespace fourfold::door {

/// One in a process, never destroyed: tensors may outlive main.
template <class = void>
class [[gnu::visibility("default")]] BasicCountingAllocator final : public c10::Allocator {
 public:
  static constexpr std::uint32_t kAbi = 3;  ///< changes with this class, its counters and its arena
  static constexpr const char* kName = "allocator";

  /// From this size on a block is a page range of its own; below it comes from malloc.
#if defined(FOURFOLD_MALLOC_ALL_BLOCKS)
  static constexpr std::size_t kLargeBlock = SIZE_MAX;
#else
  static constexpr std::size_t kLargeBlock = std::size_t{64} << 10;
#endif
  static constexpr std::size_t kAlignment = 64;  // c10::gAlignment: what vector loops count on

  /// Zero bytes are a null pointer, as LibTorch's own allocator has it. Throws c10::Error in
  /// LibTorch's words where the system has no more memory, or where `nbytes` is a negative number
  /// in disguise.
  inline c10::DataPtr allocate(std::size_t nbytes) override;

  c10::DeleterFnPtr raw_deleter() const override { return deleter_; }
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }

  /// Whether this allocator made the block, and still frees it.
  [[nodiscard]] bool owns(const c10::DataPtr& block) const {
    return block.get_context() != nullptr && block.get_deleter() == deleter_;
  }
  /// No-op, and false, where the block is not ours.
  bool retag(const c10::DataPtr& block, Place place) {
    if (!owns(block)) return false;
    Header& header = header_of(block.get_context());
    counters_.move(block.get_context(), header.bytes, header.place, place);
    return true;
  }

  ByteCounters& counters() { return counters_; }
  BlockArena& arena() { return arena_; }

 private:
  struct Header {        // stands right before the data
    std::int64_t bytes;  // as asked for
    std::size_t mapped;  // of the arena's range; 0: from malloc
    void* base;          // what to give back
    std::uint32_t magic;
    Place place;
  };
  static constexpr std::uint32_t kLive = 0xF0F01D5Au, kFreed = 0xDEADF01Du;
  static_assert(sizeof(Header) <= kAlignment && alignof(Header) <= alignof(std::max_align_t));

  static Header& header_of(void* data) {
    auto& header = *reinterpret_cast<Header*>(static_cast<char*>(data) - sizeof(Header));
    TORCH_CHECK(header.magic == kLive, "fourfold: a block at ", data,
                header.magic == kFreed ? " was freed twice"
                                       : " has lost its header: something wrote before it");
    return header;
  }
  static void free_block(void* data);

  // Read, never taken anew: two shared libraries may each have a free_block of their own.
  const c10::DeleterFnPtr deleter_ = &free_block;
  ByteCounters counters_;
  BlockArena arena_;
};
using CountingAllocator = BasicCountingAllocator<>;

/// The one allocator of this process, installed or not.
template <class T = void>
CountingAllocator& counting_allocator() {
  return door_state<BasicCountingAllocator<T>>();
}

template <class T>
c10::DataPtr BasicCountingAllocator<T>::allocate(std::size_t nbytes) {
  const c10::Device cpu(c10::DeviceType::CPU);
  if (nbytes == 0) return {nullptr, nullptr, deleter_, cpu};
  char* base = nullptr;
  std::size_t mapped = 0;
  char* data = nullptr;
  int error = ENOMEM;
  // A size of more than half the address space is a negative number in disguise.
  if (nbytes <= static_cast<std::size_t>(PTRDIFF_MAX) - 2 * BlockArena::page()) {
    if (nbytes >= kLargeBlock) {
      mapped = BlockArena::round_up(nbytes + kAlignment);
      base = static_cast<char*>(arena_.take(mapped));
      if (base) data = base + kAlignment;
    }
    if (!base) {  // small; or the system's count of mappings is spent, while its memory is not
      mapped = 0;
      base = static_cast<char*>(std::malloc(nbytes + sizeof(Header) + kAlignment));
      if (!base) arena_.release();
      if (!base) base = static_cast<char*>(std::malloc(nbytes + sizeof(Header) + kAlignment));
      if (base) {
        const auto first = reinterpret_cast<std::uintptr_t>(base) + sizeof(Header);
        data = base + sizeof(Header) + (kAlignment - first % kAlignment) % kAlignment;
      }
    }
    error = errno;
  }
  if (!base) {
    c10::profiledCPUMemoryReporter().OutOfMemory(nbytes);
    TORCH_CHECK(
        false, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ",
        static_cast<std::int64_t>(nbytes), " bytes. Error code ", error, " (", std::strerror(error),
        "). ", counters_.read().all.current,
        " bytes live in CPU tensors (counted by fourfold); make the batch or the model smaller, "
        "or compress more of it");
  }
  const Place place = current_place();
  new (data - sizeof(Header)) Header{static_cast<std::int64_t>(nbytes), mapped, base, kLive, place};
  counters_.add(data, static_cast<std::int64_t>(nbytes), place);
  c10::profiledCPUMemoryReporter().New(data, nbytes);
  return {data, data, deleter_, cpu};
}

template <class T>
void BasicCountingAllocator<T>::free_block(void* data) {
  if (!data) return;
  CountingAllocator& self = counting_allocator();
  Header& header = header_of(data);
  c10::profiledCPUMemoryReporter().Delete(data);
  self.counters_.subtract(data, header.bytes, header.place);
  header.magic = kFreed;
  if (header.mapped != 0) {
    self.arena_.give(header.base, header.mapped);
  } else {
    std::free(header.base);
  }
}

/// Makes LibTorch allocate here, from now on and for the whole process; once is enough, more does
/// nothing. Not to be called while another thread allocates for the first time (c10::SetAllocator
/// is not thread-safe): the first line of main is the place.
template <class = void>
CountingAllocator& install_allocator() {
  CountingAllocator& ours = counting_allocator();
  c10::Allocator* const before = c10::GetCPUAllocator();
  if (before == &ours) return ours;
  TORCH_CHECK(
      std::strcmp(typeid(*before).name(), typeid(ours).name()) != 0,
      "fourfold: another shared library of this process has installed a counting allocator of "
      "its own, because the loader keeps the two apart; load both with RTLD_GLOBAL, or link "
      "them, so that one count is kept");
  if (before != c10::GetDefaultCPUAllocator()) {
    TORCH_WARN_ONCE(
        "fourfold counts bytes by an allocator of its own; it takes the place of the CPU "
        "allocator that this program had set, whose blocks live on uncounted");
  }
  c10::SetCPUAllocator(&ours);
  TORCH_CHECK(
      c10::GetCPUAllocator() == &ours,
      "fourfold's counting allocator could not be installed: this program has set another CPU "
      "allocator with a higher priority. Call c10::SetCPUAllocator with priority 0 for it, or "
      "make the fourfold::Meter or pipeline first");
  return ours;
}
template <class = void>
[[nodiscard]] bool allocator_installed() {
  return c10::GetCPUAllocator() == &counting_allocator();
}

template <class = void>
ByteCounters& counters() {
  return counting_allocator().counters();
}

namespace detail {

/// `visit` on each storage of a tensor; whether it returned true for one of them.
template <class Visit>
bool any_storage(const at::Tensor& tensor, const Visit& visit) {
  if (!tensor.defined()) return false;
  if (tensor.layout() == c10::kSparse) {
    const bool indices = any_storage(tensor._indices(), visit);
    return any_storage(tensor._values(), visit) || indices;
  }
  const at::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
  return impl->has_storage() && visit(impl->unsafe_storage());
}

}  // namespace detail

/// Counts the storage's bytes to another place from now on. Returns whether it is counted at all:
/// one that is neither ours nor adopted is left alone.
template <class = void>
bool retag(const c10::Storage& storage, Place place) {
  c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
  if (!impl) return false;
  // Without checks: a packed parameter's storage has no data, and reading it would throw.
  const c10::DataPtr& block = impl->_mutable_data_ptr_no_checks();
  CountingAllocator& ours = counting_allocator();
  return ours.retag(block, place) || ours.counters().move_adopted(impl, place);
}
/// Likewise for what a tensor stands on; of a sparse COO tensor its indices and values.
template <class = void>
bool retag(const at::Tensor& tensor, Place place) {
  return detail::any_storage(tensor,
                             [place](const c10::Storage& one) { return retag(one, place); });
}

/// Counts a CPU storage that lived before the allocator was installed, and follows it by a weak
/// reference; one that is counted already is only moved to `place`. Returns whether it is counted:
/// storages elsewhere, and those without data (packed parameters: adopt their payload's buffers),
/// are left alone.
template <class = void>
bool adopt(const c10::Storage& storage, Place place) {
  if (retag(storage, place)) return true;
  c10::StorageImpl* const impl = storage.unsafeGetStorageImpl();
  if (!impl || impl->device_type() != c10::DeviceType::CPU || impl->nbytes() == 0 ||
      !impl->_mutable_data_ptr_no_checks())
    return false;
  counters().adopt(storage.getWeakStorageImpl(), place);
  return true;
}
template <class = void>
bool adopt(const at::Tensor& tensor, Place place) {
  return detail::any_storage(tensor,
                             [place](const c10::Storage& one) { return adopt(one, place); });
}

}  // namespace fourfold::door
