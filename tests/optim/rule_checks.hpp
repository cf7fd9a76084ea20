// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What every rule is held to.
#include <fourfold/optim/optimizer.hpp>
#include <tests/optim/oracle.hpp>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <sstream>
#include <vector>

/// Tensors are small here: one thread, so that a loaded machine does not wait for the others.
class OneThread : public testing::Test {
 protected:
  void SetUp() override { at::set_num_threads(1); }
  void TearDown() override { at::set_num_threads(before_); }

 private:
  int before_ = at::get_num_threads();
};

template <class Optimizer>
auto make(typename Optimizer::Options options, fourfold::optim::StateOptions states = {}) {
  return [=](const std::vector<at::Tensor>& p) {
    return std::make_unique<Optimizer>(p, options, states);
  };
}
/// One optimizer on a whole tensor in any order of memory, dtype and number of threads.
template <class Optimizer>
void expect_the_same_from_any_memory(typename Optimizer::Options options) {
  const auto after = [&](const std::function<at::Tensor(at::Tensor)>& lay, int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    auto p = lay(oracle::start({40, 12, 10, 15}, at::kFloat)).requires_grad_();
    Optimizer optimizer({p}, options);
    for (int step = 1; step <= 3; ++step) {
      p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
    at::set_num_threads(before);
    return p.detach().clone(torch::MemoryFormat::Contiguous);
  };
  const auto as_is = [](at::Tensor p) { return p; };
  const auto expected = after(as_is, 1);
  EXPECT_TRUE(after(as_is, 2).equal(expected));
  // rows lie elsewhere: a step copies
  const auto transposed = [](at::Tensor p) {
    return p.permute({3, 2, 1, 0}).contiguous().permute({3, 2, 1, 0});
  };
  EXPECT_TRUE(after(transposed, 1).equal(expected));
  // columns are permuted within a row: sums of squares are added in another order
  const auto last = [](at::Tensor p) { return p.contiguous(torch::MemoryFormat::ChannelsLast); };
  EXPECT_TRUE(torch::allclose(after(last, 1), expected, 1e-6, 1e-7));
}
template <class Optimizer>
void expect_equal_bits_on_every_path(typename Optimizer::Options options) {
  using Rule = typename Optimizer::RuleType;
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf})
    for (const auto& sizes :
         std::vector<std::vector<std::int64_t>>{{1, 1}, {3, 500}, {130, 33}, {70}}) {
      const auto after = [&](fourfold::Isa isa) {
        auto p = oracle::start(sizes, dtype).requires_grad_();
        typename Optimizer::State state(p, true);
        for (int step = 1; step <= 4; ++step) {
          const bool fresh = state.template make<Rule>(p, options, 0);
          Rule::step(p, oracle::gradient(p, step), state, options, {step, fresh},
                     fourfold::optim::detail::StepKeys(1, step, 2, true), step == 3, isa);
        }
        return p.detach().clone();
      };
      const auto expected = after(fourfold::Isa::kScalar);
      for (const fourfold::Isa isa : fourfold::available_isas())
        EXPECT_TRUE(after(isa).equal(expected)) << name(isa) << ", " << sizes.size() << dtype;
    }
}
template <class Optimizer>
void expect_resumed_training_to_be_bit_equal(typename Optimizer::Options options) {
  const auto train = [](Optimizer& optimizer, std::vector<at::Tensor>& all, int from, int to) {
    for (int step = from; step < to; ++step) {
      for (at::Tensor& p : all) p.mutable_grad() = oracle::gradient(p, step);
      optimizer.step();
    }
  };
  const auto begin = [] {
    return std::vector<at::Tensor>{oracle::start({90, 70}, at::kFloat).requires_grad_(),
                                   oracle::start({5000}, at::kFloat).requires_grad_()};
  };
  auto whole = begin(), parted = begin();
  Optimizer one(whole, options), first(parted, options), second(parted, options);
  train(one, whole, 1, 9);
  train(first, parted, 1, 5);
  std::stringstream file;
  torch::save(first, file);
  torch::load(second, file);
  EXPECT_EQ(second.state_bytes(), first.state_bytes());
  train(second, parted, 5, 9);
  for (std::size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(parted[i].equal(whole[i])) << i;
}
/// After 400 steps of a small regression that begins at 1.5.
template <class Make>
double final_loss(const Make& make) {
  torch::manual_seed(5);
  torch::nn::Sequential net(torch::nn::Linear(16, 64), torch::nn::Tanh(), torch::nn::Linear(64, 64),
                            torch::nn::Tanh(), torch::nn::Linear(64, 1));
  const auto x = torch::randn({128, 16});
  const auto y = (x.select(1, 0) * x.select(1, 1) + x.select(1, 2).sin()).unsqueeze(1);
  auto optimizer = make(net->parameters());
  double loss = 0;
  for (int step = 0; step < 400; ++step) {
    optimizer->zero_grad();
    auto value = torch::mse_loss(net->forward(x), y);
    value.backward();
    optimizer->step();
    loss = value.template item<double>();
  }
  return loss;
}
