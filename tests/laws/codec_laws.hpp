// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What every Codec promises (core/codec.hpp), and a StochasticCodec and a TileCodec beyond that,
/// written once. A codec's own test runs it by
///   INSTANTIATE_TYPED_TEST_SUITE_P(GroupQuantizer, CodecLaws, ::testing::Types<Int8, Int4>);
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "codec_cases.hpp"

namespace fourfold::laws {

/// Bit for bit: NaN equals itself, 0 is not -0.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

template <class Packed>
bool same_codes(const Packed& a, const Packed& b) {
  if (a.sizes != b.sizes || a.dtype != b.dtype || a.buffers.size() != b.buffers.size())
    return false;
  for (std::size_t i = 0; i < a.buffers.size(); ++i)
    if (!same_bits(a.buffers[i], b.buffers[i])) return false;
  return true;
}

/// Whether |values - decoded| <= factor * bound everywhere, in double.
inline ::testing::AssertionResult within(const at::Tensor& values, const at::Tensor& decoded,
                                         const at::Tensor& bound, double factor) {
  const at::Tensor error = (values.detach().to(at::kDouble) - decoded.to(at::kDouble)).abs();
  const at::Tensor allowed = bound.to(at::kDouble) * factor;
  const at::Tensor bad = error.le(allowed).logical_not();  // NaN is bad
  if (!bad.any().item<bool>()) return ::testing::AssertionSuccess();
  const auto at = bad.reshape({-1}).to(at::kByte).argmax().item<std::int64_t>();
  const auto value = [&](const at::Tensor& t) { return t.reshape({-1})[at].item<double>(); };
  return ::testing::AssertionFailure()
         << "value " << at << " is " << value(values.detach()) << ", came back as "
         << value(decoded) << ", error " << value(error) << " above " << value(allowed);
}

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// Threads for a scope.
class ThreadsGuard {
 public:
  explicit ThreadsGuard(int threads) : before_(at::get_num_threads()) {
    at::set_num_threads(threads);
  }
  ~ThreadsGuard() { at::set_num_threads(before_); }
  ThreadsGuard(const ThreadsGuard&) = delete;
  ThreadsGuard& operator=(const ThreadsGuard&) = delete;

 private:
  int before_;
};

}  // namespace fourfold::laws

template <class C>
class CodecLaws : public ::testing::Test {
 protected:
  using Domain = fourfold::laws::CodecDomain<C>;
  static constexpr fourfold::Key kKey{1, 2, 3, 4};

  /// A tensor of about n values in the codec's domain.
  static at::Tensor drawn(std::int64_t n, std::uint64_t seed) {
    const auto side = static_cast<std::int64_t>(std::sqrt(static_cast<double>(n)));
    return Domain::project(Domain::kMatricesOnly ? fourfold::laws::normal({side, side}, seed)
                                                 : fourfold::laws::normal({n}, seed));
  }
};
TYPED_TEST_SUITE_P(CodecLaws);

TYPED_TEST_P(CodecLaws, SizesAndDtypeReturn) {
  for (const auto& c : fourfold::laws::edge_cases<TypeParam>()) {
    const at::Tensor before = c.values.detach().clone();
    const auto packed = TypeParam{}.compress(c.values);
    const at::Tensor again = TypeParam{}.decompress(packed);
    EXPECT_EQ(again.sizes(), c.values.sizes()) << describe(c);
    EXPECT_EQ(again.scalar_type(), c.values.scalar_type()) << describe(c);
    EXPECT_TRUE(again.is_contiguous()) << describe(c);
    EXPECT_FALSE(again.requires_grad()) << describe(c);
    EXPECT_EQ(packed.numel(), c.values.numel()) << describe(c);
    EXPECT_TRUE(fourfold::laws::same_bits(before, c.values.detach())) << describe(c);
  }
}

TYPED_TEST_P(CodecLaws, ErrorStaysWithinTheBound) {
  using Domain = fourfold::laws::CodecDomain<TypeParam>;
  for (const auto& c : fourfold::laws::edge_cases<TypeParam>()) {
    const at::Tensor bound = TypeParam{}.error_bound(c.values);
    EXPECT_EQ(bound.sizes(), c.values.sizes()) << describe(c);
    EXPECT_TRUE(fourfold::laws::within(
        c.values, TypeParam{}.decompress(TypeParam{}.compress(c.values)), bound, 1))
        << describe(c);
    if constexpr (fourfold::StochasticCodec<TypeParam> && Domain::kStochasticWithinTwice) {
      EXPECT_TRUE(fourfold::laws::within(
          c.values, TypeParam{}.decompress(TypeParam{}.compress(c.values, TestFixture::kKey)),
          bound, 2))
          << "stochastic, " << describe(c);
    }
  }
}

TYPED_TEST_P(CodecLaws, BytesAreWhatIsStated) {
  for (const auto& c : fourfold::laws::edge_cases<TypeParam>()) {
    const auto packed = TypeParam{}.compress(c.values);
    std::int64_t bytes = 0;
    for (const at::Tensor& buffer : packed.buffers) {
      bytes += static_cast<std::int64_t>(buffer.nbytes());
      EXPECT_EQ(buffer.storage().nbytes(), buffer.nbytes()) << "a view of more, " << describe(c);
    }
    EXPECT_EQ(packed.nbytes(), bytes) << describe(c);
    const auto stated =
        fourfold::laws::CodecDomain<TypeParam>::nbytes(c.values.numel(), c.values.scalar_type());
    if (stated) {
      EXPECT_EQ(packed.nbytes(), *stated) << describe(c);
    }
  }
}

TYPED_TEST_P(CodecLaws, NonfiniteValuesAreNeverSilentlyChanged) {
  using Domain = fourfold::laws::CodecDomain<TypeParam>;
  for (float strange :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    const std::int64_t n = TestFixture::drawn(2000, 1).numel();
    for (std::int64_t place : {std::int64_t{0}, n / 2 + 1, n - 1}) {
      at::Tensor values = TestFixture::drawn(2000, 1);
      values.view({-1})[place] = strange;
      if (!Domain::kKeepsNonfinite) {
        const std::string words =
            fourfold::laws::error_of([&] { (void)TypeParam{}.compress(values); });
        EXPECT_THAT(words, ::testing::HasSubstr(TypeParam::name()));
        EXPECT_THAT(words, ::testing::HasSubstr(std::to_string(place)));
      } else {
        const at::Tensor again = TypeParam{}.decompress(TypeParam{}.compress(values));
        EXPECT_TRUE(fourfold::laws::same_bits(again, values)) << strange << " at " << place;
      }
      if constexpr (fourfold::StochasticCodec<TypeParam>) {
        const auto packed = TypeParam{}.compress(values, TestFixture::kKey);
        const at::Tensor again = TypeParam{}.decompress(packed);
        EXPECT_TRUE(TypeParam::holds_nan(packed)) << strange << " at " << place;
        EXPECT_FALSE(std::isfinite(again.view({-1})[place].item<float>()))
            << strange << " at " << place;
      }
    }
  }
}

TYPED_TEST_P(CodecLaws, RefusesOtherDtypesByName) {
  for (const at::Tensor& values :
       {at::ones({40, 40}, at::kLong), at::ones({40, 40}, at::kComplexFloat)})
    EXPECT_THAT(fourfold::laws::error_of([&] { (void)TypeParam{}.compress(values); }),
                ::testing::HasSubstr(TypeParam::name()));
}

TYPED_TEST_P(CodecLaws, SameCodesOnAnyNumberOfThreads) {
  const at::Tensor values = TestFixture::drawn(300'000, 2);
  const auto packed = [&](int threads) {
    const fourfold::laws::ThreadsGuard guard(threads);
    return TypeParam{}.compress(values);
  };
  EXPECT_TRUE(fourfold::laws::same_codes(packed(1), packed(2)));
  if constexpr (fourfold::StochasticCodec<TypeParam>) {
    const auto noisy = [&](int threads) {
      const fourfold::laws::ThreadsGuard guard(threads);
      return TypeParam{}.compress(values, TestFixture::kKey);
    };
    EXPECT_TRUE(fourfold::laws::same_codes(noisy(1), noisy(2)));
  }
}

TYPED_TEST_P(CodecLaws, SameKeySameCodesOtherKeyOtherCodes) {
  if constexpr (fourfold::StochasticCodec<TypeParam>) {
    const at::Tensor values = TestFixture::drawn(4000, 3);
    const auto packed = [&](fourfold::Key key) { return TypeParam{}.compress(values, key); };
    EXPECT_FALSE(TypeParam::holds_nan(packed({})));
    const auto first = packed({1, 2, 3, 4});
    EXPECT_TRUE(fourfold::laws::same_codes(first, packed({1, 2, 3, 4})));
    for (fourfold::Key other : {fourfold::Key{2, 2, 3, 4}, fourfold::Key{1, 3, 3, 4},
                                fourfold::Key{1, 2, 4, 4}, fourfold::Key{1, 2, 3, 5}})
      EXPECT_FALSE(fourfold::laws::same_codes(first, packed(other)));
  } else {
    GTEST_SKIP() << TypeParam::name() << " rounds to nearest only";
  }
}

/// Mean of 4096 keys against the value. The allowance is the empirical Bernstein bound (Maurer and
/// Pontil, "Empirical Bernstein bounds and sample variance penalization", COLT 2009, theorem 4),
/// sqrt(2 V ln(2 / d) / n) + 7 b ln(2 / d) / (3 (n - 1)) with ln(2 / d) = 8: four standard errors,
/// and a term in the range b, one step, for values so near a code that they seldom move. On top
/// come the deterministic roundings that codecs state: 2^-13 of a step, and 2^-22 of the value.
TYPED_TEST_P(CodecLaws, TheMeanOverKeysIsTheValue) {
  if constexpr (fourfold::StochasticCodec<TypeParam>) {
    constexpr int kKeys = 4096;
    const at::Tensor values =
        TestFixture::drawn(fourfold::laws::CodecDomain<TypeParam>::kGroup + 7, 4);
    const at::Tensor exact = values.to(at::kDouble);
    at::Tensor sum = at::zeros_like(exact), squares = at::zeros_like(exact);
    for (std::uint64_t i = 0; i < kKeys; ++i) {
      const at::Tensor difference =
          TypeParam{}.decompress(TypeParam{}.compress(values, {7, i, 0, 0})).to(at::kDouble) -
          exact;
      sum += difference, squares += difference * difference;
    }
    const at::Tensor mean = sum / kKeys;
    const at::Tensor variance = (squares / kKeys - mean * mean).clamp_min(0);
    const at::Tensor step = TypeParam{}.error_bound(values).to(at::kDouble) * 2;
    const at::Tensor allowed = (variance * (16.0 / kKeys)).sqrt() +
                               step * (56.0 / (3 * (kKeys - 1)) + 0x1p-13) + exact.abs() * 0x1p-22;
    EXPECT_TRUE(fourfold::laws::within(mean, at::zeros_like(mean), allowed, 1));
    EXPECT_GT(variance.max().template item<double>(), 0) << "no value was rounded at random";
  } else {
    GTEST_SKIP() << TypeParam::name() << " rounds to nearest only";
  }
}

TYPED_TEST_P(CodecLaws, TilesEqualSlicesOfTheWhole) {
  if constexpr (fourfold::TileCodec<TypeParam>) {
    const at::Tensor values = TestFixture::drawn(3000, 5);
    const auto packed = TypeParam{}.compress(values);
    const at::Tensor whole = TypeParam{}.decompress(packed).view({-1});
    const std::int64_t n = whole.numel();
    for (std::int64_t begin : {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{5},
                               std::int64_t{63}, std::int64_t{64}, std::int64_t{127}, n / 2, n})
      for (std::int64_t length : {std::int64_t{0}, std::int64_t{1}, std::int64_t{3},
                                  std::int64_t{16}, std::int64_t{65}, std::int64_t{200}, n}) {
        const std::int64_t end = std::min(n, begin + length);
        at::Tensor tile = at::full({end - begin + 1}, -77.0F);
        TypeParam{}.decode(packed, begin, end, tile.mutable_data_ptr<float>());
        EXPECT_TRUE(fourfold::laws::same_bits(tile.narrow(0, 0, end - begin),
                                              whole.narrow(0, begin, end - begin)))
            << begin << " to " << end;
        EXPECT_EQ(tile[end - begin].template item<float>(), -77.0F) << "written past the end";
      }
    EXPECT_THAT(fourfold::laws::error_of([&] {
                  float one;
                  TypeParam{}.decode(packed, 0, n + 1, &one);
                }),
                ::testing::HasSubstr(TypeParam::name()));
  } else {
    GTEST_SKIP() << TypeParam::name() << " cannot be read tile by tile";
  }
}

REGISTER_TYPED_TEST_SUITE_P(CodecLaws, SizesAndDtypeReturn, ErrorStaysWithinTheBound,
                            BytesAreWhatIsStated, NonfiniteValuesAreNeverSilentlyChanged,
                            RefusesOtherDtypesByName, SameCodesOnAnyNumberOfThreads,
                            SameKeySameCodesOtherKeyOtherCodes, TheMeanOverKeysIsTheValue,
                            TilesEqualSlicesOfTheWhole);
