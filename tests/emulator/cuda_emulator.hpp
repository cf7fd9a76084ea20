// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Runs CUDA kernels on the CPU, block after block, a block's threads as fibers that meet at
/// __syncthreads and in warp shuffles. It knows what the kernels of kernels/ use, no more, and it
/// is strict where a GPU is silent: threads that miss a barrier or a shuffle which names them, and
/// kernels that never end, are reported. Tensor-core instructions are not emulated.
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FOURFOLD_FIBER_SANITIZER 1
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other: one copy serves them all

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

class Block {
 public:
  Block(const dim3& block, const std::function<void()>& body)
      : body_(body), threads_(block.x * block.y * block.z), warps_((threads_.size() + 31) / 32) {
    for (std::size_t i = 0; i < threads_.size(); ++i) {
      threads_[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      prepare(threads_[i]);
    }
  }

  void run() {
    current_block = this;
    std::size_t left = threads_.size();
    while (left > 0) {
      progress_ = false;
      for (std::size_t i = 0; i < threads_.size(); ++i) {
        if (threads_[i].done) continue;
        running_ = i;
        threadIdx = threads_[i].index;
        switch_to(threads_[i].context, main_, threads_[i].stack.get(), kStackBytes, false);
        if (threads_[i].done) --left, progress_ = true;
      }
      if (error_) break;
      if (!progress_) {
        error_ = std::make_exception_ptr(
            std::runtime_error("the kernel hangs: some threads wait at a barrier or a shuffle that "
                               "others never reach"));
        break;
      }
    }
    current_block = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

  void sync_block() {
    const std::uint64_t generation = block_generation_;
    if (++block_arrived_ == threads_.size()) {
      block_arrived_ = 0, ++block_generation_, progress_ = true;
      return;
    }
    while (block_generation_ == generation) yield();
  }

  /// Every lane of `mask` brings 8 bytes; gives back what the lanes of this round brought.
  const std::uint64_t* exchange(unsigned mask, std::uint64_t value) {
    Warp& warp = warps_[running_ / 32];
    const unsigned lane = running_ % 32;
    if ((mask >> lane & 1u) == 0)
      throw std::runtime_error("a lane shuffles that its mask does not name");
    while (warp.leaving != 0) yield();  // the last round's readers first
    if (warp.arrived != 0 && warp.mask != mask)
      throw std::runtime_error("lanes of one warp shuffle with different masks");
    warp.mask = mask;
    warp.values[lane] = value;
    warp.arrived |= 1u << lane;
    if (warp.arrived == mask) warp.leaving = mask, progress_ = true;
    while (warp.leaving == 0) yield();
    std::uint64_t* const out = threads_[running_].exchanged;
    std::copy(std::begin(warp.values), std::end(warp.values), out);
    warp.leaving &= ~(1u << lane);
    if (warp.leaving == 0) warp.arrived = 0;
    progress_ = true;
    return out;
  }

  [[nodiscard]] unsigned lane() const { return running_ % 32; }
  static inline Block* current_block = nullptr;

 private:
  static constexpr std::size_t kStackBytes = 256 * 1024;
  struct Thread {
    dim3 index;
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::uint64_t exchanged[32] = {};
  };
  struct Warp {
    unsigned mask = 0, arrived = 0, leaving = 0;
    std::uint64_t values[32] = {};
  };

  static void prepare(Thread& thread) {
    thread.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
  }

  static void enter() {
    Block& block = *current_block;
#ifdef FOURFOLD_FIBER_SANITIZER
    __sanitizer_finish_switch_fiber(nullptr, &block.main_bottom_, &block.main_size_);
#endif
    try {
      block.body_();
    } catch (...) {
      if (!block.error_) block.error_ = std::current_exception();
    }
    block.threads_[block.running_].done = true;
    block.switch_to(block.main_, block.threads_[block.running_].context, block.main_bottom_,
                    block.main_size_, true);
  }

  void yield() {
    const std::size_t self = running_;
    if (error_) throw std::runtime_error("another thread of the block failed");
    switch_to(main_, threads_[self].context, main_bottom_, main_size_, false);
    running_ = self;
  }

  void switch_to(ucontext_t& to, ucontext_t& from, [[maybe_unused]] const void* bottom,
                 [[maybe_unused]] std::size_t size, [[maybe_unused]] bool last) {
#ifdef FOURFOLD_FIBER_SANITIZER
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, bottom, size);
#endif
    swapcontext(&from, &to);
#ifdef FOURFOLD_FIBER_SANITIZER
    const void* came_from = nullptr;
    std::size_t came_size = 0;
    __sanitizer_finish_switch_fiber(fake, &came_from, &came_size);
    if (&from != &main_) main_bottom_ = came_from, main_size_ = came_size;
#endif
  }

  const std::function<void()>& body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  ucontext_t main_{};
  const void* main_bottom_ = nullptr;
  std::size_t main_size_ = 0;
  std::size_t running_ = 0, block_arrived_ = 0;
  std::uint64_t block_generation_ = 0;
  bool progress_ = false;
  std::exception_ptr error_;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024)
    return cudaErrorInvalidConfiguration;  // as a device would
  gridDim = grid, blockDim = block;
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        Block(block, body).run();
      }
  return cudaSuccess;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* all = Block::current_block->exchange(mask, bits);
  if (source < 32 && (mask >> source & 1u)) std::memcpy(&value, &all[source], sizeof(T));
  return value;
}

}  // namespace emulator

inline void __syncthreads() { emulator::Block::current_block->sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::Block::current_block->exchange(mask, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulator::Block::current_block->lane();
  return emulator::shuffle(mask, value,
                           lane / width * width + static_cast<unsigned>(source) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const unsigned lane = emulator::Block::current_block->lane(),
                 to = lane ^ static_cast<unsigned>(lanes);
  return emulator::shuffle(mask, value, to / width == lane / width ? to : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const unsigned lane = emulator::Block::current_block->lane(), to = lane + by;
  return emulator::shuffle(mask, value, to / width == lane / width ? to : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t* all = emulator::Block::current_block->exchange(mask, predicate != 0 ? 1 : 0);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1u) ballot |= static_cast<unsigned>(all[lane]) << lane;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  *address = std::min(before, value);
  return before;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
