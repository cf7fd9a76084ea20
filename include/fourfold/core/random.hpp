// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Counter-based random numbers: what a value draws depends on its index and its tensor's Key
/// alone, never on the thread, the device or the order. Philox4x32-10 of Salmon et al., "Parallel
/// random numbers: as easy as 1, 2, 3" (SC 2011, section 4): 128 random bits from a 128-bit
/// counter.
#include <fourfold/core/host_device.hpp>

#include <array>
#include <cstdint>

namespace fourfold::inline v0 {

/// Names one tensor's noise. No two tensors of a step may share it: a product of two saved tensors
/// with common noise would be biased.
struct Key {
  std::uint64_t seed = 0;     ///< the default generator's seed, read without advancing it
  std::uint64_t step = 0;     ///< optimizer steps so far
  std::uint64_t forward = 0;  ///< scopes entered so far
  std::uint64_t storage = 0;  ///< running number of the storage within its forward
  friend constexpr bool operator==(const Key&, const Key&) = default;
};

/// A Key brought to Philox's shape: a 64-bit key and the upper 64 bits of the counter.
struct PhiloxStream {
  std::uint64_t key = 0;
  std::uint64_t high = 0;
};

/// Bijective finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 15).
FOURFOLD_HOST_DEVICE constexpr std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

FOURFOLD_HOST_DEVICE constexpr PhiloxStream philox_stream(const Key& key) {
  return {mix(mix(key.seed) ^ key.storage), mix(mix(key.step) ^ key.forward)};
}

/// Block `index` of a stream: four 32-bit words. Eight values share a block, 16 bits each, when
/// they are rounded stochastically: value i draws bits (i % 8) of block i / 8, low half-words
/// first.
FOURFOLD_HOST_DEVICE constexpr std::array<std::uint32_t, 4> philox(const PhiloxStream& stream,
                                                                   std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index),
                c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(stream.high);
  std::uint32_t c3 = static_cast<std::uint32_t>(stream.high >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(stream.key);
  std::uint32_t k1 = static_cast<std::uint32_t>(stream.key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * c0, b = std::uint64_t{0xCD9E8D57u} * c2;
    const std::uint32_t next0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    const std::uint32_t next2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(b), c3 = static_cast<std::uint32_t>(a), c0 = next0, c2 = next2;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

/// The 16 random bits of value `index`.
FOURFOLD_HOST_DEVICE constexpr std::uint32_t random_bits16(const PhiloxStream& stream,
                                                           std::uint64_t index) {
  const std::array<std::uint32_t, 4> block = philox(stream, index / 8);
  return (block[(index % 8) / 2] >> (16 * (index % 2))) & 0xFFFFu;
}

/// 16 bits as a uniform number in (0, 1): the middle of its interval, so that the mean is 1/2.
FOURFOLD_HOST_DEVICE constexpr float uniform16(std::uint32_t bits) {
  return (static_cast<float>(bits) + 0.5F) * (1.0F / 65536.0F);
}

}  // namespace fourfold::inline v0
