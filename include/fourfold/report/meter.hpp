// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The meter: bytes of tensors, counted as they come and go, and of the process, as the system
/// says.
///
///   int main() {
///     fourfold::Meter meter;                      // as the first line: everything is counted
///     ...
///     meter.adopt(model->parameters(), fourfold::Place::kWeights);  // made late: counts these too
///     std::cout << meter.ledger();
///
/// The count is the process's: all meters read the same one, and restart_peak() restarts it for
/// all, as the CUDA allocator's statistics have it. A meter is a handle and may die; counting goes
/// on.
#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fourfold/core/peak_bytes.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/report/ledger.hpp>
#include <fourfold/torch/allocator.hpp>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <string_view>

namespace fourfold::inline v0 {

template <class = void>
class BasicMeter {
 public:
  /// From here on CPU tensors are counted. Throws where another CPU allocator cannot be replaced.
  BasicMeter() { door::install_allocator(); }

  /// Counts what `tensors` stand on to `place`. Storages older than the counting are taken in and
  /// followed by weak references, so a meter made late agrees with one made as the first line of
  /// main (about what it has adopted). One storage counts once, however many tensors share it.
  /// Returns how many of `tensors` are counted now: those on other devices, empty ones and ones
  /// without storage are not.
  std::int64_t adopt(at::TensorList tensors, Place place) const {
    std::int64_t counted = 0;
    for (const at::Tensor& tensor : tensors) counted += door::adopt(tensor, place) ? 1 : 0;
    return counted;
  }

  /// CPU tensors, all places.
  [[nodiscard]] PeakBytes bytes() const { return door::counters().read().all; }
  /// CPU tensors of one place; `peak` is the place's own.
  [[nodiscard]] PeakBytes bytes(Place place) const {
    const door::ByteCount count = door::counters().read();
    const auto at = static_cast<std::size_t>(place);
    return {.current = count.now[at], .peak = count.own_peak[at], .total = count.total[at]};
  }
  /// Tensors on a device. For CUDA the caching allocator's own statistics; zeros where it has not
  /// started, or was not built.
  [[nodiscard]] PeakBytes bytes(at::Device device) const {
    if (device.is_cpu()) return bytes();
    c10::DeviceAllocator* const allocator = started(device);
    if (!allocator) return {};
    const auto stats = allocator->getDeviceStats(index_of(device));
    const auto& stat = stats.allocated_bytes[kAggregate];
    return {.current = stat.current, .peak = stat.peak, .total = stat.allocated};
  }

  /// The peaks start again from what lives now, on the CPU and on every CUDA device; totals go on.
  void restart_peak() const {
    door::counters().restart_peak();
    for (c10::DeviceIndex i = 0; i < cuda_devices(); ++i)
      if (auto* allocator = started(at::Device(at::kCUDA, i))) allocator->resetPeakStats(i);
  }

  /// Gives the free blocks that the CPU allocator keeps for the next ones back to the system.
  static void release_free_blocks() { door::counting_allocator().arena().release(); }

  /// Bytes that the process holds in memory now, and the most it ever did: VmRSS and VmHWM of
  /// /proc/self/status, libraries' scratch and code included. 0 where there is no such file.
  [[nodiscard]] static std::int64_t resident() { return status_bytes("VmRSS:"); }
  [[nodiscard]] static std::int64_t resident_peak() { return status_bytes("VmHWM:"); }
  /// Starts VmHWM again from now (Linux, proc(5), clear_refs); false where the system forbids it.
  static bool restart_resident_peak() {
    std::FILE* const file = std::fopen("/proc/self/clear_refs", "w");
    if (!file) return false;
    const bool written = std::fputs("5", file) >= 0;
    return std::fclose(file) == 0 && written;
  }

  /// All of it as one value. What was saved for backward is not the meter's to know.
  [[nodiscard]] Ledger ledger() const {
    const door::ByteCount count = door::counters().read();
    Ledger out;
    out.bytes = count.all;
    for (std::size_t i = 0; i < kPlaces; ++i)
      out.places[i] = {
          .now = count.now[i], .at_peak = count.at_peak[i], .own_peak = count.own_peak[i]};
    for (c10::DeviceIndex i = 0; i < cuda_devices(); ++i)
      out.cuda.push_back(bytes(at::Device(at::kCUDA, i)));
    out.resident_bytes = resident();
    out.resident_peak_bytes = resident_peak();
    return out;
  }

 private:
  static constexpr auto kAggregate =
      static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE);

  static c10::DeviceIndex cuda_devices() {
    if (!c10::impl::hasDeviceGuardImpl(at::kCUDA)) return 0;
    return c10::impl::getDeviceGuardImpl(at::kCUDA)->deviceCount();
  }
  static c10::DeviceIndex index_of(at::Device device) {
    return device.has_index() ? device.index()
                              : c10::impl::getDeviceGuardImpl(device.type())->getDevice().index();
  }
  /// Null where the device's allocator is not there, or has not handed out anything yet.
  static c10::DeviceAllocator* started(at::Device device) {
    if (!device.is_cuda() || cuda_devices() == 0) return nullptr;
    auto* const allocator = dynamic_cast<c10::DeviceAllocator*>(c10::GetAllocator(device.type()));
    return allocator && allocator->initialized() ? allocator : nullptr;
  }

  /// "VmRSS:     1234 kB" -> 1234 * 1024
  static std::int64_t status_bytes(std::string_view field) {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);)
      if (std::string_view(line).substr(0, field.size()) == field)
        return std::stoll(line.substr(field.size())) * 1024;
    return 0;
  }
};
using Meter = BasicMeter<>;

}  // namespace fourfold::inline v0
