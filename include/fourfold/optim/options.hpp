// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Options of rules that LibTorch lacks, in the manner of LibTorch's: chained setters, cloning,
/// files, and the learning rate where schedulers look for it. `Derived` names its options once:
///   template <class Archive> void each(Archive&& archive) { archive("lr", lr()); ... }
#include <fourfold/optim/detail/cycled_momentum.hpp>
#include <fourfold/torch/archive.hpp>

#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

namespace fourfold::inline v0 {
namespace optim::detail {

template <class Derived>
struct OptionsOf : ::torch::optim::OptimizerCloneableOptions<Derived>, CycledMomentum {
  double get_lr() const override { return static_cast<const Derived&>(*this).lr(); }
  void set_lr(const double lr) override { static_cast<Derived&>(*this).lr(lr); }
  /// The momentum where there is one, else the first of the betas.
  double* cycled_momentum() override {
    Derived& self = static_cast<Derived&>(*this);
    if constexpr (requires { self.momentum(); })
      if (self.momentum() > 0) return &self.momentum();
    if constexpr (requires { self.betas(); }) return &std::get<0>(self.betas());
    if constexpr (requires { self.momentum(); }) return &self.momentum();
    return nullptr;
  }

  void serialize(::torch::serialize::OutputArchive& archive) const override {
    auto copy = static_cast<const Derived&>(*this);
    copy.each([&]<class T>(const char* key, const T& value) {
      if constexpr (std::is_same_v<T, std::tuple<double, double>>)
        archive.write(key,
                      c10::IValue(std::vector<double>{std::get<0>(value), std::get<1>(value)}));
      else
        archive.write(key, c10::IValue(value));
    });
  }
  void serialize(::torch::serialize::InputArchive& archive) override {
    const door::ArchiveReader file(archive, "the file of an optimizer's options");
    static_cast<Derived&>(*this).each([&]<class T>(const char* key, T& value) {
      if constexpr (std::is_same_v<T, bool>) {
        value = file.read_bool(key);
      } else if constexpr (std::is_same_v<T, double>) {
        value = file.read_double(key);
      } else if constexpr (std::is_same_v<T, std::int64_t>) {
        value = file.read_int(key);
      } else {
        const std::vector<double> both = file.read_doubles(key);
        TORCH_CHECK(both.size() == 2, "'", key, "' holds ", both.size(),
                    " numbers and not 2: the file is damaged; save it again");
        value = {both[0], both[1]};
      }
    });
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0
