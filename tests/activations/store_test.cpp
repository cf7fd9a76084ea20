// SPDX-License-Identifier: Apache-2.0
#include <fourfold/activations/activations.hpp>
#include <fourfold/activations/checkpoint.hpp>
#include <fourfold/torch/node.hpp>

#include <ATen/autocast_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/within.hpp"

namespace {

using fourfold::ActivationOptions;
using fourfold::Activations;
using fourfold::ActivationStore;
using fourfold::Int4;
using fourfold::Int8;
using ::testing::HasSubstr;
namespace door = fourfold::door;
namespace nn = torch::nn;

using Store = std::shared_ptr<ActivationStore>;

Store int4(ActivationOptions options = {}) {
  Activations<Int4>::configure(options);
  return ActivationStore::make(std::move(options));
}

std::string error_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "";
}

/// What `tensor` becomes: packed as autograd does it, and unpacked.
at::Tensor round_trip(ActivationStore& store, const at::Tensor& tensor) {
  return door::detail::unpack_from(*door::detail::pack_with(store, tensor));
}

/// In the middle of a graph, with these values.
torch::Tensor made(const torch::Tensor& values) {
  return values.detach().clone().requires_grad_() * 1;
}

void expect_same_look(const at::Tensor& back, const at::Tensor& tensor) {
  EXPECT_EQ(back.sizes(), tensor.sizes());
  EXPECT_EQ(back.strides(), tensor.strides());
  EXPECT_EQ(back.scalar_type(), tensor.scalar_type());
  EXPECT_EQ(back.device(), tensor.device());
  EXPECT_EQ(back.layout(), tensor.layout());
}

/// Stochastic rounding in groups of a contiguous tensor: within a step of 15 of the range of all.
void expect_near(const at::Tensor& back, const at::Tensor& tensor, double steps = 15) {
  const auto range = (tensor.max() - tensor.min()).to(torch::kDouble).item<double>();
  const double half = tensor.scalar_type() == at::kFloat ? 1e-6 : 8e-3;  // the dtype's own rounding
  EXPECT_LE((back - tensor).abs().max().to(torch::kDouble).item<double>(),
            range / steps * 1.0001 + half * tensor.abs().max().item<double>());
}

TEST(ActivationStore, PacksWithSizesStridesDtypeAndOffset) {
  torch::manual_seed(0);
  const auto base = torch::randn({64, 96});
  const std::vector<std::function<torch::Tensor(torch::Tensor)>> views{
      [](torch::Tensor x) { return x; },
      [](torch::Tensor x) { return x.t(); },
      [](torch::Tensor x) { return x.chunk(3, 1)[1]; },
      [](torch::Tensor x) {
        return x.view({4, 16, 6, 16}).transpose(1, 2);
      },
      [](torch::Tensor x) { return x.slice(0, 0, 64, 2); },
      [](torch::Tensor x) { return x.slice(0, 13, 57); },
      [](torch::Tensor x) {
        return x.select(1, 5).unsqueeze(1).expand({64, 32});
      },
      [](torch::Tensor x) { return x.flatten().unfold(0, 128, 64); },
      [](torch::Tensor x) {
        return x.unsqueeze(0).expand({5, 64, 96});
      }};
  for (const auto dtype : {torch::kFloat, torch::kBFloat16, torch::kHalf})
    for (std::size_t i = 0; i < views.size(); ++i) {
      SCOPED_TRACE(i);
      const Store store = int4({.min_numel = 1, .min_bytes = 1});
      const auto view = within(store, [&] {
        const auto view = views[i](made(base.to(dtype)));
        const auto saved = door::detail::pack_with(*store, view);
        const at::Tensor back = door::detail::unpack_from(*saved);
        EXPECT_EQ(store->counts().packed, 1) << store->explain();
        expect_same_look(back, view);
        EXPECT_TRUE(torch::equal(back, door::detail::unpack_from(*saved)));
        const torch::NoGradGuard no_grad;
        expect_near(back, view);
        return view;
      });
      if (view.numel() == base.numel() && view.is_non_overlapping_and_dense()) {
        const auto whole = within(store, [&] { return round_trip(*store, views[i](made(base))); });
        EXPECT_EQ(whole.storage_offset(), view.storage_offset());
      }
    }
}

TEST(ActivationStore, OnePayloadForOneStorage) {
  const Store store = int4();
  within(store, [&] {
    const auto qkv = made(torch::randn({8, 64, 192}));
    const auto parts = qkv.chunk(3, -1);
    std::vector<std::shared_ptr<door::Saved>> saved;
    for (const auto& part : parts)
      saved.push_back(door::detail::pack_with(*store, part.view({8, 64, 4, 16}).transpose(1, 2)));
    saved.push_back(door::detail::pack_with(*store, qkv));
    EXPECT_EQ(store->counts().packed, 4);
    EXPECT_EQ(store->counts().payloads, 1);
    EXPECT_EQ(store->plain_bytes().current, qkv.nbytes());
    // 4.5 bits a value, and room for the codec's words of a last group
    EXPECT_LE(store->held_bytes().current, qkv.numel() * 9 / 16 + 64);
    // q, k and v share one dense copy while any of it lives
    const auto q = saved[0]->unpack(), k = saved[1]->unpack();
    EXPECT_EQ(q.storage().unsafeGetStorageImpl(), k.storage().unsafeGetStorageImpl());
  });
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(store->plain_bytes().current, 0);
}

TEST(ActivationStore, DecompressedCopyGoesWithItsLastReader) {
  const Store store = int4();
  within(store, [&] {
    const auto saved = door::detail::pack_with(*store, made(torch::randn({64, 64})));
    c10::weak_intrusive_ptr<c10::StorageImpl> dense = [&] {
      const auto one = saved->unpack(), two = saved->unpack();
      EXPECT_EQ(one.data_ptr(), two.data_ptr());
      return one.storage().getWeakStorageImpl();
    }();
    EXPECT_TRUE(dense.expired());
  });
}

TEST(ActivationStore, WhatWasDecodedIsNotRoundedAgain) {
  torch::manual_seed(15);
  const auto store = int4();
  const auto x = made(torch::randn({64, 64}));
  const auto saved = door::detail::pack_with(*store, x);
  const std::int64_t held = store->held_bytes().current;
  auto back = door::detail::unpack_from(*saved);
  {
    const auto again = door::detail::pack_with(*store, back.t().slice(0, 3, 60));
    const auto expected = back.t().slice(0, 3, 60).clone();
    EXPECT_EQ(store->held_bytes().current, held);
    back.reset();
    EXPECT_TRUE(torch::equal(door::detail::unpack_from(*again), expected));
  }
  back = door::detail::unpack_from(*saved);
  {  // by a version counter of its own, too
    const auto written = within(store, [&] {
      back.data().mul_(3);
      return door::detail::pack_with(*store, back);
    });
    const auto expected = back.clone();
    back.reset();
    expect_near(door::detail::unpack_from(*written), expected);
  }
  back = door::detail::unpack_from(*saved);
  back.mul_(3);  // other values: a payload of their own
  const auto other = door::detail::pack_with(*store, back);
  EXPECT_GT(store->held_bytes().current, held);
  expect_near(door::detail::unpack_from(*other), back);
}

TEST(ActivationStore, ABlocksInputIsRoundedOnceInEightBits) {
  torch::manual_seed(16);
  const auto leaf = torch::randn({256, 128}).requires_grad_();
  nn::Linear linear(128, 64);
  const auto dy = torch::randn({256, 64});
  const auto gradient = [&](bool packed) {
    const auto run = [&] { return fourfold::checkpoint(linear, leaf * 1); };
    const auto y = packed ? within(int4(), run) : run();
    return torch::autograd::grad({y}, {linear->weight}, {dy})[0];
  };
  // A value is off by a step, twice the bound of the nearest; sums of 256 in another order.
  const auto x = leaf.detach();
  const auto bound =
      dy.abs().t().mm(2 * Int8{}.error_bound(x)) + 256 * 0x1p-23 * dy.abs().t().mm(x.abs());
  const auto difference = (gradient(true) - gradient(false)).abs();
  EXPECT_GT(difference.max().item<double>(), 0);
  EXPECT_TRUE((difference <= bound).all().item<bool>());
}

TEST(ActivationStore, ExpandedAndSlicedTensorsHoldTheirOwnValuesOnly) {
  const Store store = int4();
  within(store, [&] {
    const auto row = made(torch::randn({1, 4096}));
    const auto one = door::detail::pack_with(*store, row.expand({256, 4096}));
    EXPECT_LE(store->held_bytes().current, 4096 * 9 / 16 + 64);
    const auto large = made(torch::randn({64, 4096}));
    const std::int64_t before = store->held_bytes().current;
    const auto two = door::detail::pack_with(*store, large.slice(0, 7, 9));
    EXPECT_LE(store->held_bytes().current - before, 2 * 4096 * 9 / 16 + 64);
    const std::int64_t sliced = store->held_bytes().current;
    const auto three = door::detail::pack_with(*store, large.select(1, 5));  // 64 values
    EXPECT_LE(store->held_bytes().current - sliced, 64 * 4);
    EXPECT_TRUE(torch::equal(three->unpack(), large.select(1, 5)));
    EXPECT_EQ(three->unpack().strides(), large.select(1, 5).strides());
  });
}

TEST(ActivationStore, WhatWasNeverWrittenSpoilsNoScale) {
  const Store store = int4();
  within(store, [&] {
    auto cache = torch::empty({8, 128, 64});
    cache.fill_(std::numeric_limits<float>::quiet_NaN());
    auto buffer = torch::empty_like(cache);
    buffer.copy_(cache);
    const auto values = torch::randn({8, 60, 64}).requires_grad_();
    buffer.narrow(1, 0, 60).copy_(values);
    const auto view = buffer.narrow(1, 0, 60);
    const auto back = round_trip(*store, view);
    EXPECT_EQ(store->counts().packed, 1);
    expect_near(back, values.detach());
  });
}

TEST(ActivationStore, OddKindsComeBackAsTheyWere) {
  const Store store = int4({.min_numel = 1, .min_bytes = 1});
  within(store, [&] {
    const auto big = torch::randn({64, 64});
    const std::vector<torch::Tensor> odd{
        torch::arange(4096),
        big > 0,
        torch::complex(big, big),
        big.to_sparse(),
        at::quantize_per_tensor(big, 0.1, 0, at::kQInt8),
        big.to(at::kDouble),
        torch::tensor(3.0),
        torch::empty({0, 5}),
        torch::complex(big, big).conj(),
    };
    for (const auto& tensor : odd) {
      const auto back = round_trip(*store, tensor);
      expect_same_look(back, tensor);
      if (tensor.is_sparse()) {
        EXPECT_TRUE(torch::equal(back.to_dense(), tensor.to_dense()));
      } else if (tensor.is_quantized()) {
        EXPECT_TRUE(torch::equal(back.int_repr(), tensor.int_repr()));
      } else {
        EXPECT_TRUE(torch::equal(back, tensor)) << tensor.scalar_type();
      }
    }
    const auto meta = torch::empty({64, 64}, torch::kMeta);
    expect_same_look(round_trip(*store, meta), meta);
  });
  EXPECT_EQ(store->counts().packed, 0);
}

TEST(ActivationStore, ParametersAreKnownByStorage) {
  const Store store = int4();
  nn::Linear linear(256, 256);
  const auto x = torch::randn({16, 256}).requires_grad_();
  within(store, [&] { return linear(linear(x)).square().sum(); }).backward();
  const auto counts = store->counts();
  EXPECT_GE(counts.parameters, 3);  // x, and the weight for each of two inputs' gradients
  EXPECT_EQ(counts.payloads, 2);    // between the layers, and before the square
}

TEST(ActivationStore, NamedStoragesAndWhatIsMadeOfThemAloneStayExact) {
  const Store store = int4();
  const auto buffer = torch::randn({64, 64}), weight = torch::randn({64, 64}).requires_grad_();
  store->keep_storages({buffer, weight});
  const auto x = torch::randn({64, 64}).requires_grad_();
  within(store, [&] {
    const auto h = x * 2;
    // a weight normalised by its rows, as weight_norm does it
    const auto normed = weight / weight.norm(2, {1}, true);
    auto loss = (h.mm(normed) * buffer).sum();
    EXPECT_EQ(store->counts().payloads, 1) << store->explain();  // h
    return loss;
  }).backward();
}

TEST(ActivationStore, CastsOfWeightsUnderAutocastStayExact) {
  const auto run = [](const Store& store) {
    torch::manual_seed(0);
    nn::Linear first(128, 128), second(128, 128);
    const auto x = torch::randn({64, 128});
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::increment_nesting();
    const auto forward = [&] { return second(torch::relu(first(x))).to(torch::kFloat).sum(); };
    const auto loss = store ? within(store, forward) : forward();
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, false);
    loss.backward();
    return std::pair(first->bias.grad().clone(), store ? store->counts().payloads : 0);
  };
  const Store store = int4();
  const auto [gradient, payloads] = run(store);
  EXPECT_EQ(payloads, 3) << store->explain();  // x and relu's result in bf16, and relu's signs
  EXPECT_GT(store->counts().parameters, 0);
}

TEST(ActivationStore, ConstantsAndStatisticsAreHeldAsTheyAre) {
  const Store store = int4();
  const auto table = torch::randn({64, 256});  // rotary cosines, say
  nn::LayerNorm norm(nn::LayerNormOptions({256}));
  const auto x = torch::randn({2048, 256}).requires_grad_();
  within(store, [&] {
    const auto h = x * 1;
    const auto normed = norm(h);
    const auto y = normed.view({32, 64, 256}) * table;
    EXPECT_EQ(store->counts().payloads, 1) << store->explain();  // h: mean and rstd are 8 KiB each
    return y.sum();
  }).backward();
}

TEST(ActivationStore, KeepIsAsked) {
  ActivationOptions options;
  options.keep = [](const at::Tensor& tensor) { return tensor.size(0) == 64; };
  const Store store = int4(options);
  within(store, [&] {
    const auto a = made(torch::randn({64, 64})), b = made(torch::randn({65, 64}));
    EXPECT_TRUE(torch::equal(round_trip(*store, a), a));
    EXPECT_FALSE(torch::equal(round_trip(*store, b), b));
  });
}

TEST(ActivationStore, APackedParametersDenseCopyIsHeldByItsPayload) {
  const auto weight = torch::randn({64, 64});
  const auto payload = fourfold::make_payload<Int8>(weight);
  const auto dense = payload->decompress();
  ActivationOptions options;
  options.payload_of = [&](const at::Tensor& tensor) {
    return tensor.storage().unsafeGetStorageImpl() == dense.storage().unsafeGetStorageImpl()
               ? payload
               : nullptr;
  };
  const Store store = int4(options);
  within(store, [&] {
    const auto saved = door::detail::pack_with(*store, dense.t());
    EXPECT_EQ(store->held_bytes().current, 0);
    EXPECT_TRUE(torch::equal(saved->unpack(), dense.t()));
    EXPECT_EQ(saved->unpack().strides(), dense.t().strides());
  });
}

TEST(ActivationStore, SoftmaxResultsHaveEightBits) {
  const Store store = int4();
  within(store, [&] {
    const auto scores = made(torch::randn({64, 64}));
    const auto p = torch::softmax(scores, -1);
    const auto back = round_trip(*store, p);
    EXPECT_GT(store->counts().packed, 0);
    expect_near(back, p.detach(), 255);
  });
}

TEST(ActivationStore, ReluIsExactAndItsResultPacked) {
  const auto gradient = [](const Store& store, bool in_place, bool leaky) {
    torch::manual_seed(3);
    const auto x = torch::randn({64, 64}).requires_grad_(), w = torch::randn({64, 64});
    const auto forward = [&] {
      auto h = x * 1;
      const auto y = leaky      ? torch::leaky_relu(h, 0.2)
                     : in_place ? torch::relu_(h)
                                : torch::relu(h);
      return y.mm(w).sum();
    };
    (store ? within(store, forward) : forward()).backward();
    return x.grad();
  };
  for (const bool in_place : {false, true})
    for (const bool leaky : {false, true}) {
      const Store store = int4();
      EXPECT_TRUE(
          torch::equal(gradient(store, in_place, leaky), gradient(nullptr, in_place, leaky)));
      EXPECT_EQ(store->counts().masks, 1);
    }
}

TEST(ActivationStore, MasksTakeOneBitAndAreExact) {
  for (const Store& store : {int4(), ActivationStore::make([] {
                               ActivationOptions options;
                               options.recompute = {"gelu"};
                               return options;
                             }())}) {
    const auto gradient = [](const Store& store) {
      torch::manual_seed(3);
      const auto x = torch::randn({64, 64}).requires_grad_();
      const auto forward = [&] {
        const auto h = torch::dropout(x, 0.3, true);
        return h.masked_fill(h > 1, 2).sum();
      };
      (store ? within(store, forward) : forward()).backward();
      return x.grad();
    };
    EXPECT_TRUE(torch::equal(gradient(store), gradient(nullptr)));
    EXPECT_EQ(store->counts().masks, 2) << store->explain();
    EXPECT_LE(store->held_bytes().peak, 2 * (64 * 64 / 8 + 64));
  }
}

// Trap: rrelu saves its noise before it is filled (pytorch#193671).
TEST(ActivationStore, NoiseThatIsFilledAfterItWasSaved) {
  const auto run = [](const Store& store) {
    torch::manual_seed(3);
    const auto x = torch::randn({64, 64}).requires_grad_();
    const auto forward = [&] { return torch::rrelu(x * 1, 0.1, 0.4, /*training=*/true).sum(); };
    (store ? within(store, forward) : forward()).backward();
    return x.grad();
  };
  EXPECT_TRUE(torch::equal(run(int4()), run(nullptr)));
}

// Trap: hooks switch LibTorch's check of versions off.
TEST(ActivationStore, WritingInPlaceAfterSavingIsLibTorchsError) {
  const auto x = torch::randn({64, 64}).requires_grad_();
  const auto run = [&](const Store& store) {
    const auto forward = [&] {
      auto h = x * 2;
      const auto y = h.square();
      h.add_(1);
      return y.sum();
    };
    const auto loss = store ? within(store, forward) : forward();
    return error_of([&] { loss.backward(); });
  };
  const std::string plain = run(nullptr);
  // up to the node's name: LibTorch asks when it unpacks, and the write has made another one
  const std::string words = plain.substr(0, plain.find(", which is"));
  EXPECT_THAT(words, HasSubstr("modified by an inplace operation: [CPUFloatType [64, 64]]"));
  const std::string versions = "is at version 1; expected version 0 instead";
  EXPECT_THAT(plain, HasSubstr(versions));
  for (const Store& store : {int4(), ActivationStore::make()})
    EXPECT_THAT(run(store), ::testing::AllOf(HasSubstr(words), HasSubstr(versions)));
}

TEST(ActivationStore, SavedAgainAfterAWriteIsTheNewValue) {
  const Store store = int4();
  within(store, [&] {
    auto h = made(torch::randn({64, 64}));
    const auto before = h.detach().clone();
    const auto one = door::detail::pack_with(*store, h);
    h.mul_(100);
    const auto two = door::detail::pack_with(*store, h);
    expect_near(one->unpack(), before);
    expect_near(two->unpack(), h.detach());
    // through .data(), which has a version of its own
    h.variable_data().mul_(0.001);
    expect_near(door::detail::pack_with(*store, h)->unpack(), h.detach());
    EXPECT_EQ(store->counts().payloads, 3);
  });
}

/// The pipeline's parts in small: GELU, LayerNorm, Linear.
struct Mlp {
  explicit Mlp(int width = 64)
      : up(width, 2 * width), down(2 * width, width), norm(nn::LayerNormOptions({width})) {}
  torch::Tensor operator()(const torch::Tensor& x) {
    return (x + down(torch::gelu(up(norm(x))))).square().mean();
  }
  std::vector<torch::Tensor> parameters() {
    return {up->weight, up->bias, down->weight, down->bias, norm->weight, norm->bias};
  }
  nn::Linear up, down;
  nn::LayerNorm norm;
};

TEST(ActivationStore, NothingLeaks) {
  const Store store = int4();
  Mlp mlp;
  const auto x = torch::randn({64, 64});
  std::optional<door::WeakNodePtr> node;
  {
    const auto loss = within(store, [&] { return mlp(made(x)); });
    node.emplace(loss.grad_fn());
    EXPECT_GT(store->held_bytes().current, 0);
  }  // dropped without backward
  EXPECT_TRUE(node->expired());
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_THROW(within(store,
                      [&] {
                        const auto loss = mlp(made(x));
                        EXPECT_GT(store->held_bytes().current, 0);
                        static_cast<void>(loss.mm(loss));  // in the middle of a forward
                      }),
               c10::Error);
  EXPECT_EQ(store->held_bytes().current, 0);
  within(store, [&] { return mlp(made(x)); }).backward();
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(store->plain_bytes().current, 0);
  EXPECT_FALSE(c10::impl::tls_is_dispatch_key_included(door::kOperatorsKey));
}

TEST(ActivationStore, GraphsOutliveTheirStoreAndRunOnAnyThread) {
  Mlp mlp;
  const auto x = torch::randn({64, 64});
  const auto gradients = [&](bool elsewhere) {
    torch::manual_seed(0);
    for (auto& parameter : mlp.parameters()) parameter.mutable_grad() = torch::Tensor();
    torch::Tensor loss;
    std::weak_ptr<ActivationStore> gone;
    {
      const Store store = int4();
      gone = store;
      loss = within(store, [&] { return mlp(made(x)); });
    }
    EXPECT_TRUE(gone.expired());
    if (elsewhere) {
      std::thread([&] { loss.backward(); }).join();
    } else {
      loss.backward();
    }
    return mlp.up->weight.grad().clone();
  };
  EXPECT_TRUE(torch::equal(gradients(false), gradients(true)));
}

TEST(ActivationStore, RepeatsBitForBitAndDrawsAnew) {
  Mlp mlp;
  const auto x = torch::randn({64, 64});
  const auto gradient = [&](const Store& store) {
    mlp.up->weight.mutable_grad() = torch::Tensor();
    within(store, [&] { return mlp(made(x)); }).backward();
    return mlp.up->weight.grad().clone();
  };
  torch::manual_seed(5);
  const Store store = int4();
  const auto first = gradient(store), second = gradient(store);
  EXPECT_FALSE(torch::equal(first, second));  // another forward
  const auto drawn = torch::rand({4});
  torch::manual_seed(5);
  EXPECT_TRUE(torch::equal(drawn, torch::rand({4})));  // the generator was not advanced
  torch::manual_seed(5);
  const Store again = int4();
  EXPECT_TRUE(torch::equal(first, gradient(again)));
  EXPECT_TRUE(torch::equal(second, gradient(again)));
  torch::manual_seed(6);
  EXPECT_FALSE(torch::equal(first, gradient(int4())));
  torch::manual_seed(5);
  const Store later = int4();
  later->set_step(1);
  EXPECT_FALSE(torch::equal(first, gradient(later)));
}

TEST(ActivationStore, RetainedGraphsAndSecondBackwardsReadTheSame) {
  const Store store = int4();
  Mlp mlp;
  const auto loss = within(store, [&] { return mlp(made(torch::randn({64, 64}))); });
  loss.backward({}, /*retain_graph=*/true);
  const auto once = mlp.up->weight.grad().clone();
  loss.backward();
  EXPECT_TRUE(torch::equal(mlp.up->weight.grad(), 2 * once));
  EXPECT_THAT(error_of([&] { loss.backward(); }), HasSubstr("second time"));
}

// dW of a linear is linear in its saved input: the mean over keys is exact. z over all elements of
// dW has mean 0; their squares have mean 1, within 4 standard errors of a mean of n squares of
// (nearly) normal variables: sqrt(2 / n).
TEST(ActivationStore, GradientsAreUnbiased) {
  torch::manual_seed(0);
  const int draws = 400;
  const auto w = torch::randn({16, 64}, torch::kDouble);
  const auto x = torch::randn({32, 64}), cotangent = torch::randn({32, 16});
  nn::Linear linear(nn::LinearOptions(64, 16).bias(false));
  const auto exact = cotangent.t().mm(x).to(torch::kDouble);
  const Store store = int4();
  auto sum = torch::zeros_like(exact), squares = torch::zeros_like(exact);
  for (int i = 0; i < draws; ++i) {
    linear->weight.mutable_grad() = torch::Tensor();
    within(store, [&] { return (linear(made(x)) * cotangent).sum(); }).backward();
    const auto error = linear->weight.grad().to(torch::kDouble) - exact;
    sum += error, squares += error.square();
  }
  EXPECT_EQ(store->counts().payloads, draws);
  const auto mean = sum / draws;
  const auto variance = (squares - sum.square() / draws) / (draws - 1);
  EXPECT_GT(variance.min().item<double>(), 0);
  const auto z = mean / (variance / draws).sqrt();
  const double n = static_cast<double>(z.numel());
  EXPECT_LT(std::abs(z.mean().item<double>()), 4 / std::sqrt(n));
  EXPECT_LT(z.square().mean().item<double>(), 1 + 4 * std::sqrt(2 / n));
}

TEST(ActivationStore, TwoTensorsOfAStepDoNotShareNoise) {
  torch::manual_seed(0);
  const Store store = int4();
  within(store, [&] {
    const auto values = torch::randn({256, 256});
    const auto a = made(values), b = made(values);
    const auto ea = (round_trip(*store, a) - values).flatten().to(torch::kDouble);
    const auto eb = (round_trip(*store, b) - values).flatten().to(torch::kDouble);
    const double n = static_cast<double>(ea.numel());
    const double r = (ea * eb).sum().item<double>() / (ea.norm() * eb.norm()).item<double>();
    EXPECT_LT(std::abs(r), 0.5);  // the same noise would give 1
    // both errors are -f or 1 - f of the same f: independent draws correlate not at all
    EXPECT_LT(std::abs(r), 4 / std::sqrt(n));
  });
}

TEST(ActivationStore, ObservingChangesNothingAndCounts) {
  Mlp mlp;
  const auto x = torch::randn({64, 64});
  const auto run = [&](const Store& store) {
    mlp.up->weight.mutable_grad() = torch::Tensor();
    const auto forward = [&] { return mlp(made(x)); };
    const auto loss = store ? within(store, forward) : forward();
    if (store) {
      EXPECT_FALSE(c10::impl::tls_is_dispatch_key_included(door::kOperatorsKey));
      // x twice; the norm's result; mean and rstd; up, gelu, the square's input
      const std::int64_t row = 64 * 4, tensor = 64 * row;
      EXPECT_EQ(store->plain_bytes().current, 2 * tensor + 2 * row + 4 * tensor + tensor);
      EXPECT_EQ(store->held_bytes().current, store->plain_bytes().current);
    }
    loss.backward();
    return mlp.up->weight.grad().clone();
  };
  const Store store = ActivationStore::make();
  EXPECT_TRUE(torch::equal(run(store), run(nullptr)));
  EXPECT_EQ(store->held_bytes().peak, store->plain_bytes().peak);
  EXPECT_EQ(store->counts().packed + store->counts().recomputed, 0);
}

TEST(ActivationStore, BackwardAndStepWithinTheScope) {
  const Store store = int4();
  Mlp mlp;
  torch::optim::SGD optimizer(mlp.parameters(), 0.1);
  const auto x = torch::randn({64, 64});
  const door::SavedTensorsScope scope(store);
  const auto active = store->activate();
  for (int i = 0; i < 3; ++i) {
    optimizer.zero_grad();
    mlp(made(x)).backward();
    optimizer.step();
    EXPECT_EQ(store->held_bytes().current, 0);
  }
}

TEST(ActivationStore, TwoThreadsShareAStore) {
  const Store store = int4();
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i)
    threads.emplace_back([&] {
      Mlp mlp;
      for (int step = 0; step < 20; ++step)
        within(store, [&] { return mlp(made(torch::randn({64, 64}))); }).backward();
      EXPECT_TRUE(mlp.up->weight.grad().isfinite().all().item<bool>());
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(store->held_bytes().current, 0);
  EXPECT_EQ(store->plain_bytes().current, 0);
}

TEST(ActivationStore, ExplainsWhyNothingWasSaved) {
  const Store store = int4();
  EXPECT_THAT(store->explain(), HasSubstr("no tensor passed: forward ran outside the scope, on "
                                          "another thread, or without gradients"));
  EXPECT_THAT(store->explain(), HasSubstr("no scope was ever entered"));
  within(store, [&] {
    const torch::NoGradGuard no_grad;
    return torch::ones({64, 64}).square();
  });
  EXPECT_THAT(store->explain(), HasSubstr("without gradients"));
  within(store, [&] { return torch::ones({4}).requires_grad_().square().square(); });
  EXPECT_THAT(store->explain(), HasSubstr("nothing was packed"));
}

}  // namespace
