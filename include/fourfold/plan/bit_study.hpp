// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What one step shows of how far the rounding of each saved storage reaches: who read it, how large
/// the gradients were that came to them, and what rounding does to its values.
///
/// For a matrix product or a convolution y = x * W with a parameter W, rounding x with independent
/// errors of variance v adds to W's gradient alone
///   sum over x_i of v_i * (sum of dy^2 over the places where x_i was used)
///     ~ (sum of v) * mean(dy^2) * (multiplications / values of x),
/// which is ActNN's formula (arXiv:2104.14129: K / groups * |dy|^2 * R^2 / pixels for a
/// convolution, |dy|^2 * R^2 / rows for a linear), with the codec's own noise in place of R^2 / 4.
/// Exact where v and dy^2 are not correlated over the places.
///
/// Where x is computed again from another storage, that one's noise is x's, as a share of the power
/// of its values about their mean (a norm and what scales it keep that share). An operator that is
/// not linear in what it saved passes the noise on to its input's gradient, in the same share, and
/// so to the product that made its input; beyond that one it is one summand among many, and left
/// out. Of what comes after the last product (a loss) it reaches all products, since all gradients
/// come from there. A norm's reaches its input's gradient through sums over many values alone, and
/// is left out, too. What nobody is seen to read (the input of a block that is computed again)
/// counts by its share of noise itself.
#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <fourfold/activations/saved_plan.hpp>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/plan/bit_assignment.hpp>
#include <fourfold/plan/record.hpp>  // StorageId
#include <fourfold/plan/rounding_noise.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold::inline v0::plan {

/// Not thread-safe: BitPlanner calls it under its lock.
class BitStudy {
 public:
  struct Storage {
    StorageId id;
    std::string producer, saver;
    std::vector<std::int64_t> sizes;
    std::int64_t bytes = 0;
    bool chosen = false;  ///< its bits are for us to choose
    bool packed = false;  ///< it was rounded
    RoundingNoise noise{};
  };
  /// A product with a parameter, whose gradient bears the noise of what it saved.
  struct Product {
    std::uint32_t item = 0;
    std::vector<std::uint32_t> rounded{};
    std::optional<std::size_t> parameter{};
    double outputs = 0, multiplications = 0;  ///< values of y; what it takes to make them
    double gradient = 0;                      ///< |dy|^2, once it is known
  };

  /// A storage is about to be held; its number.
  template <class = void>
  std::uint32_t saving(const SavedStorage& storage, bool chosen,
                       const std::array<PackFunction, kBits.size()>& packs) {
    const auto item = static_cast<std::uint32_t>(storages_.size());
    storages_.push_back(
        {.id = {.operation = storage.operation, .place = storage.place, .made = storage.made},
         .producer = std::string(storage.producer),
         .saver = std::string(storage.saver),
         .sizes = storage.values->sizes().vec(),
         .bytes = storage.bytes,
         .chosen = chosen,
         .noise = rounding_noise(*storage.values, packs, Key{.storage = item})});
    return item;
  }
  void held(std::uint32_t item, StoredAs kind) {
    if (item < storages_.size() && kind == StoredAs::kPacked) storages_[item].packed = true;
  }

  /// An operator ran; the products that it is, whose result's gradient is asked for. `parameter`:
  /// whose number its arguments' storages have.
  template <class ParameterOf>
  std::vector<std::size_t> ran(const SavingOperator& one, const ParameterOf& parameter_of) {
    std::vector<std::size_t> made;
    for (const SavingOperator::Saved& saved : one.saved) {
      if (saved.rounded.empty() || saved.item >= storages_.size()) continue;
      if (one.multiplies) {
        if (!storages_[saved.item].chosen && storages_[saved.item].packed) continue;  // 8 bits
        Product product{.item = saved.item, .rounded = saved.rounded};
        for (const at::Tensor& argument : factors(one))
          if (!product.parameter) product.parameter = parameter_of(argument);
        product.outputs = static_cast<double>(one.result->numel());
        product.multiplications = multiplications(one);
        made.push_back(products_.size());
        const c10::Storage& result = one.result->storage();
        by_result_.put(result.unsafeGetStorageImpl(),
                       MadeBy{result.getWeakStorageImpl(), products_.size()});
        products_.push_back(std::move(product));
      } else if (one.name.find("norm") == one.name.npos && !one.arguments.empty()) {
        const MadeBy* const before =
            by_result_.find(one.arguments.front().storage().unsafeGetStorageImpl());
        passed_.push_back(
            {.rounded = saved.rounded,
             .product = before != nullptr ? std::optional(before->product) : std::nullopt,
             .before = products_.size()});
      }
    }
    return made;
  }
  void forward_ended() {
    by_result_.erase_if([](const MadeBy&) { return true; });
  }
  void gradient(std::size_t product, double squares) { products_[product].gradient += squares; }

  [[nodiscard]] bool complete() const {
    return products_.empty() || std::any_of(products_.begin(), products_.end(),
                                            [](const Product& one) { return one.gradient > 0; });
  }
  [[nodiscard]] const std::vector<Storage>& storages() const { return storages_; }
  [[nodiscard]] const std::vector<Product>& products() const { return products_; }

  /// What noise as strong as x itself about its mean adds to the variance of a weight's gradient.
  [[nodiscard]] double variance_of_power(const Product& one) const {
    return variance_of(one, storages_[one.item].noise.power);
  }
  /// The gradient's own variance over the rows of this batch, about.
  [[nodiscard]] double variance_over_rows(const Product& one) const {
    return variance_of(one, storages_[one.item].noise.square);
  }

  /// The items to choose bits for, by storages, and the number of gradients; `own(product)` is the
  /// variance that its gradient has.
  template <class Own>
  [[nodiscard]] std::pair<std::vector<BitItem>, std::size_t> items(const Own& own) const {
    std::vector<BitItem> out(storages_.size());
    std::size_t gradients = products_.size();
    const auto add = [&](std::uint32_t item, std::size_t gradient, double variance) {
      BitEffect effect{.gradient = static_cast<std::uint32_t>(gradient)};
      for (std::size_t i = 0; i < kBits.size(); ++i)
        effect.share[i] = variance * storages_[item].noise.share(i);
      out[item].effects.push_back(effect);
    };
    for (std::size_t p = 0; p < products_.size(); ++p)
      if (const double variance = own(products_[p]); variance > 0)
        for (const std::uint32_t item : products_[p].rounded)
          if (mine(item)) add(item, p, variance_of_power(products_[p]) / variance);
    for (const Passed& one : passed_)
      for (std::size_t p = 0; p < products_.size(); ++p) {
        if (one.before != products_.size() && one.product != p) continue;
        if (const double variance = own(products_[p]); variance > 0)
          for (const std::uint32_t item : one.rounded)
            if (mine(item)) add(item, p, variance_over_rows(products_[p]) / variance);
      }
    for (std::uint32_t item = 0; item < out.size(); ++item)
      if (mine(item)) {
        out[item].values = storages_[item].noise.numel;
        if (out[item].effects.empty()) add(item, gradients++, 1);
      }
    return {std::move(out), gradients};
  }

 private:
  struct MadeBy {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;  ///< so that its address is nobody else's
    std::size_t product;
  };

  /// Noise that an operator passes on to its input's gradient.
  struct Passed {
    std::vector<std::uint32_t> rounded;
    std::optional<std::size_t> product;  ///< which made its input
    std::size_t before;                  ///< products that ran before it
  };

  static double variance_of(const Product& one, double mean_square) {
    return one.gradient / one.outputs * one.multiplications * mean_square;
  }
  [[nodiscard]] bool mine(std::uint32_t item) const {
    return item < storages_.size() && storages_[item].chosen && storages_[item].packed &&
           storages_[item].noise.numel > 0;
  }
  /// What y is the product of: a convolution's first two arguments, a matrix product's last two.
  static at::ArrayRef<at::Tensor> factors(const SavingOperator& one) {
    const std::size_t two = std::min<std::size_t>(2, one.arguments.size());
    return is_convolution(one) ? one.arguments.slice(0, two)
                               : one.arguments.slice(one.arguments.size() - two, two);
  }
  static bool is_convolution(const SavingOperator& one) {
    return one.name.find("convolution") != one.name.npos;
  }
  template <class = void>
  static double multiplications(const SavingOperator& one) {
    const auto results = static_cast<double>(one.result->numel());
    const at::ArrayRef<at::Tensor> both = factors(one);
    if (both.size() < 2 || both[0].dim() == 0 || both[1].dim() == 0) return results;
    if (!is_convolution(one)) return results * static_cast<double>(both[0].size(-1));
    const at::Tensor &x = both[0], &weight = both[1];
    const bool transposed = one.result->size(1) != weight.size(0);
    return static_cast<double>(weight.numel()) / static_cast<double>(weight.size(0)) *
           (transposed ? static_cast<double>(x.numel()) : results);
  }

  std::vector<Storage> storages_;
  std::vector<Product> products_;
  std::vector<Passed> passed_;
  PointerMap<MadeBy> by_result_;  ///< products, while this forward runs
};

}  // namespace fourfold::inline v0::plan
