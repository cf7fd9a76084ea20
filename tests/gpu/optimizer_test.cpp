// SPDX-License-Identifier: Apache-2.0
/// Optimizers of CUDA parameters: their steps have the bits of a CPU's, and their states lie beside the
/// parameters.
#include <fourfold/fourfold.hpp>
#include <fourfold/gradients/release.hpp>
#include <fourfold/optim/optim.hpp>
#include "tests/gpu/on_gpu.hpp"

#include <torch/torch.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace fourfold;
using fourfold::tests::same_bits;
using torch::optim::AdamWOptions;

/// A matrix, one with channels last, a vector whose states are fp32, one value, and a view that
/// starts where eight values cannot move at once.
std::vector<at::Tensor> parameters(at::Device device, at::ScalarType dtype) {
  torch::manual_seed(3);
  std::vector<at::Tensor> made{
      torch::randn({300, 70}),
      torch::randn({16, 32, 3, 3}).contiguous(at::MemoryFormat::ChannelsLast), torch::randn({100}),
      torch::randn({}), torch::randn({5001})};
  for (at::Tensor& p : made) p = p.to(device, dtype);
  made.back() = made.back().slice(0, 1);
  for (at::Tensor& p : made) p = p.detach().requires_grad_();
  return made;
}
/// The same for both, those of the first one with other strides than its parameter.
void set_gradients(const std::vector<at::Tensor>& all, int step) {
  torch::manual_seed(100 + step);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const at::Tensor& p = all[i];
    auto grad = (torch::randn(p.sizes()) * torch::exp(torch::randn(p.sizes())));
    if (i == 0) grad = torch::randn({p.size(1), p.size(0)}).t();
    p.mutable_grad() = grad.to(p.device(), p.scalar_type());
  }
}

template <class Optimizer>
class GpuOptimizer : public tests::OnGpu {};
template <class First, class Second, class Master = optim::RoundNearest>
using AdamW = optim::AdamW<First, Second, Master>;
using Optimizers = testing::Types<
    optim::AdamWOf<optim::Fp32>, optim::AdamWOf<optim::BFloat16>, optim::AdamWOf<Int8>,
    optim::AdamWOf<Int4>, optim::AdamOf<Int8>, optim::SGDOf<Int8>, optim::LionOf<Int4>,
    optim::AdamWOf<Int4, optim::RoundStochastic>, optim::AdamWOf<Int4, optim::ErrorCorrection<8>>,
    optim::AdamWOf<Int8, optim::ErrorCorrection<16>>, optim::AdamWOf<Int8, optim::Kahan>,
    optim::AdamWOf<Int8, optim::Fp32>, optim::AdamW<optim::Normal4, optim::Factored>,
    optim::Adafactor<>>;
TYPED_TEST_SUITE(GpuOptimizer, Optimizers);

template <class Optimizer>
typename Optimizer::Options options() {
  typename Optimizer::Options chosen(1e-2);
  if constexpr (std::is_same_v<typename Optimizer::RuleType, optim::SGDRule>) chosen.momentum(0.9);
  return chosen;
}

TYPED_TEST(GpuOptimizer, StepsAsTheCpuBitForBit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const auto here = parameters(at::kCPU, dtype), there = parameters(at::kCUDA, dtype);
    TypeParam cpu(here, options<TypeParam>()), gpu(there, options<TypeParam>());
    for (int step = 0; step < 4; ++step) {
      set_gradients(here, step), set_gradients(there, step);
      cpu.step(), gpu.step();
      for (std::size_t i = 0; i < here.size(); ++i)
        ASSERT_TRUE(same_bits(here[i], there[i]))
            << dtype << ", step " << step << ", parameter " << i;
    }
    EXPECT_EQ(cpu.state_bytes(), gpu.state_bytes());
  }
}

TYPED_TEST(GpuOptimizer, SavedOnAGpuItGoesOnOnACpu) {
  const auto here = parameters(at::kCPU, at::kFloat), there = parameters(at::kCUDA, at::kFloat);
  TypeParam cpu(here, options<TypeParam>()), gpu(there, options<TypeParam>());
  set_gradients(there, 0), gpu.step();
  std::stringstream file;
  torch::save(gpu, file);
  {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < here.size(); ++i) here[i].copy_(there[i]);
  }
  torch::load(cpu, file);
  set_gradients(here, 1), set_gradients(there, 1);
  cpu.step(), gpu.step();
  for (std::size_t i = 0; i < here.size(); ++i)
    EXPECT_TRUE(same_bits(here[i], there[i])) << "parameter " << i;
}

class GpuOptimizerStates : public tests::OnGpu {};

TEST_F(GpuOptimizerStates, LieBesideTheirParameterAndFollowIt) {
  using Optimizer = optim::AdamWOf<Int8>;
  const auto fixed = parameters(at::kCUDA, at::kFloat), moved = parameters(at::kCUDA, at::kFloat);
  Optimizer one(fixed, 1e-2), other(moved, 1e-2);
  const auto device = [](Optimizer& of, const at::Tensor& p) {
    return static_cast<Optimizer::State&>(*of.state().at(p.unsafeGetTensorImpl())).device;
  };
  for (int step = 0; step < 4; ++step) {
    set_gradients(fixed, step), set_gradients(moved, step);
    one.step(), other.step();
    EXPECT_TRUE(device(one, fixed[0]).is_cuda());
    EXPECT_EQ(device(other, moved[0]).is_cuda(), step % 2 == 0);
    for (const at::Tensor& p : moved) {
      p.mutable_grad().reset();
      p.set_data(p.detach().to(step % 2 == 0 ? at::kCPU : at::kCUDA));
    }
  }
  for (std::size_t i = 0; i < fixed.size(); ++i)
    EXPECT_TRUE(same_bits(fixed[i], moved[i])) << "parameter " << i;
}

TEST_F(GpuOptimizerStates, ReleasedGradientsStepInBackwardAsStepDoes) {
  const auto make = [] {
    torch::manual_seed(1);
    torch::nn::Sequential net(torch::nn::Linear(64, 128), torch::nn::GELU(),
                              torch::nn::Linear(128, 64));
    net->to(at::kCUDA);
    return net;
  };
  auto plain = make(), released = make();
  optim::AdamWOf<Int8> by_hand(plain->parameters(), 1e-2), inside(released->parameters(), 1e-2);
  const GradientRelease release(inside);
  for (int step = 0; step < 3; ++step) {
    const auto x = torch::randn({32, 64}, at::kCUDA);
    by_hand.zero_grad();
    plain->forward(x).square().mean().backward();
    by_hand.step();
    released->forward(x).square().mean().backward();
  }
  const auto a = plain->parameters(), b = released->parameters();
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(same_bits(a[i], b[i])) << "parameter " << i;
    EXPECT_FALSE(b[i].grad().defined());
  }
}

}  // namespace
