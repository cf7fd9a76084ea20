// SPDX-License-Identifier: Apache-2.0
#include <fourfold/optim/adafactor.hpp>
#include <fourfold/optim/adamw.hpp>
#include <fourfold/optim/lion.hpp>
#include <fourfold/optim/scale.hpp>
#include <fourfold/optim/schedulers.hpp>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include "tests/reference/schedules.hpp"

#include <cmath>
#include <sstream>

namespace {

using namespace fourfold::optim;
namespace reference = fourfold::reference;
using testing::HasSubstr, testing::ElementsAre;
using torch::optim::OptimizerParamGroup, torch::optim::SGD, torch::optim::SGDOptions;

/// Two groups of rates 0.1 and 0.003, as schedules.py has them.
template <class Options>
std::vector<OptimizerParamGroup> groups(const Options& options) {
  std::vector<OptimizerParamGroup> all;
  for (const double lr : {0.1, 3e-3})
    all.emplace_back(std::vector<torch::Tensor>{torch::zeros({1}).requires_grad_()},
                     std::make_unique<Options>(Options(options).lr(lr)));
  return all;
}
SGD sgd(double momentum = 0) {
  const auto options = SGDOptions(1).momentum(momentum);
  return SGD(groups(options), options);
}
std::vector<double> rates(torch::optim::Optimizer& optimizer) {
  std::vector<double> all;
  for (auto& group : optimizer.param_groups()) all.push_back(group.options().get_lr());
  return all;
}
double momentum_of(torch::optim::OptimizerOptions& options) {
  double momentum = NAN;
  fourfold::optim::detail::visit_momentum(options, [&](double value) { momentum = value; });
  return momentum;
}
std::string message(const std::function<void()>& f) {
  try {
    f();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}
struct How {
  int every = 1;                          ///< a row of the table is that many epochs
  std::function<void(int)> between = {};  ///< before the step after this epoch
};
/// The optimizer's rates, and momenta where the table has them, are the table's to the last bit.
template <std::size_t rows, std::size_t columns>
void expect_schedule(const double (&table)[rows][columns], torch::optim::Optimizer& optimizer,
                     const std::vector<torch::optim::LRScheduler*>& schedulers,
                     const How& how = {}) {
  const int epochs = static_cast<int>(rows - 1) * how.every;
  for (int epoch = 0; epoch <= epochs; ++epoch) {
    if (epoch % how.every == 0) {
      std::vector<double> now = rates(optimizer);
      if (columns == 4)
        for (auto& group : optimizer.param_groups()) now.push_back(momentum_of(group.options()));
      const auto& row = table[epoch / how.every];
      ASSERT_EQ(now, std::vector<double>(row, row + columns))
          << std::hexfloat << "epoch " << epoch << ", group 0: " << now[0] << " and not " << row[0];
    }
    if (epoch == epochs) break;
    if (how.between) how.between(epoch);
    for (auto* scheduler : schedulers) scheduler->step();
  }
}
template <class Scheduler, class Options, class Table>
void expect_schedule_of(const Options& options, const Table& table, const How& how = {}) {
  auto optimizer = sgd();
  Scheduler scheduler(optimizer, options);
  expect_schedule(table, optimizer, {&scheduler}, how);
  EXPECT_EQ(scheduler.get_last_lr(), rates(optimizer));
  EXPECT_THAT(scheduler.base_lrs(), ElementsAre(0.1, 3e-3));
}
template <class Scheduler, class... Args>
std::shared_ptr<Scheduler> part(Args&&... args) {
  return std::make_shared<Scheduler>(std::forward<Args>(args)...);
}
double power(std::int64_t epoch) { return std::pow(0.95, static_cast<double>(epoch)); }

TEST(Schedulers, LinearIsPythonsToTheLastBit) {
  using Options = LinearLROptions;
  expect_schedule_of<LinearLR>(Options{.start_factor = 0.1, .total_iters = 7}, reference::kLinear);
  expect_schedule_of<LinearLR>(Options{}, reference::kLinearDefaults);
  expect_schedule_of<LinearLR>(Options{.start_factor = 1, .end_factor = 0, .total_iters = 6},
                               reference::kLinearDown);
  expect_schedule_of<LinearLR>(Options{.start_factor = 1e-3, .total_iters = 900},
                               reference::kLinearLong, {.every = 50});
}
TEST(Schedulers, CosineIsPythonsToTheLastBit) {
  using Options = CosineAnnealingLROptions;
  expect_schedule_of<CosineAnnealingLR>(Options{.T_max = 10, .eta_min = 1e-5}, reference::kCosine);
  expect_schedule_of<CosineAnnealingLR>(Options{.T_max = 1, .eta_min = 1e-3},
                                        reference::kCosineOfOne);
  expect_schedule_of<CosineAnnealingLR>(Options{.T_max = 1000}, reference::kCosineLong,
                                        {.every = 100});
}
TEST(Schedulers, PolynomialIsPythonsToTheLastBit) {
  using Options = PolynomialLROptions;
  expect_schedule_of<PolynomialLR>(Options{.total_iters = 7}, reference::kPolynomial);
  expect_schedule_of<PolynomialLR>(Options{.total_iters = 9, .power = 2},
                                   reference::kPolynomialSquared);
  expect_schedule_of<PolynomialLR>(Options{.total_iters = 300, .power = 0.9},
                                   reference::kPolynomialRoot, {.every = 20});
}
TEST(Schedulers, LambdaIsPythonsToTheLastBit) {
  auto optimizer = sgd();
  LambdaLR scheduler(
      optimizer, std::vector<LambdaLR::Function>{
                     power, [](std::int64_t e) { return 1 / (1 + static_cast<double>(e / 3)); }});
  expect_schedule(reference::kLambda, optimizer, {&scheduler});
}
TEST(Schedulers, WarmupStableDecayIsTransformersToTheLastBit) {
  using Options = WarmupStableDecayLROptions;
  using enum WarmupStableDecayShape;
  Options options{.num_warmup_steps = 6, .num_stable_steps = 7, .num_decay_steps = 9};
  expect_schedule_of<WarmupStableDecayLR>(options, reference::kWsd);
  options.warmup_type = kCosine, options.decay_type = kLinear, options.min_lr_ratio = 0.1;
  expect_schedule_of<WarmupStableDecayLR>(options, reference::kWsdLinear);
  options.warmup_type = kOneMinusSqrt, options.decay_type = kOneMinusSqrt;
  options.min_lr_ratio = 0.01;
  expect_schedule_of<WarmupStableDecayLR>(options, reference::kWsdRoot);
  expect_schedule_of<WarmupStableDecayLR>(Options{.num_stable_steps = 4, .num_decay_steps = 6},
                                          reference::kWsdNoWarmup);
}

TEST(Schedulers, OneCycleIsPythonsToTheLastBit) {
  {
    auto optimizer = sgd(0.9);
    OneCycleLR scheduler(optimizer, {.max_lr = {0.5, 0.02}, .total_steps = 20});
    expect_schedule(reference::kOneCycle, optimizer, {&scheduler});
    EXPECT_THAT(message([&] { scheduler.step(); }),
                HasSubstr("was stepped 21 times, and its total_steps is 20; give as many as"));
    EXPECT_EQ(scheduler.last_epoch(), 20);
  }
  {
    auto optimizer = sgd();
    OneCycleLR scheduler(optimizer, {.max_lr = 0.3,
                                     .total_steps = 25,
                                     .pct_start = 0.4,
                                     .anneal_strategy = AnnealStrategy::kLinear,
                                     .cycle_momentum = false,
                                     .three_phase = true});
    expect_schedule(reference::kOneCycleLinear, optimizer, {&scheduler});
  }
  {
    auto optimizer = sgd(0.5);
    OneCycleLR scheduler(optimizer, {.max_lr = 0.3, .total_steps = 23, .three_phase = true});
    expect_schedule(reference::kOneCycleThreePhases, optimizer, {&scheduler});
  }
  {
    auto optimizer = sgd();
    OneCycleLR scheduler(
        optimizer, {.max_lr = 0.3, .total_steps = 8, .pct_start = 0, .cycle_momentum = false});
    expect_schedule(reference::kOneCycleDownOnly, optimizer, {&scheduler});
  }
}
/// Adam's, AdamW's and our optimizers' beta1, RMSprop's momentum; beta2 is left alone.
TEST(Schedulers, OneCycleFindsMomentumInAnyOptimizer) {
  const auto cycle = [](auto& optimizer) {
    OneCycleLR scheduler(optimizer, {.max_lr = 0.01,
                                     .epochs = 6,
                                     .steps_per_epoch = 5,
                                     .pct_start = 0.25,
                                     .base_momentum = {0.8, 0.7},
                                     .max_momentum = {0.9, 0.99},
                                     .div_factor = 10,
                                     .final_div_factor = 300});
    expect_schedule(reference::kOneCycleBetas, optimizer, {&scheduler});
  };
  const auto adamw = torch::optim::AdamWOptions(1);
  torch::optim::AdamW theirs(groups(adamw), adamw);
  AdamWOf<Fp32> ours(groups(adamw), adamw);
  torch::optim::Adam adam(groups(torch::optim::AdamOptions(1)));
  torch::optim::RMSprop rmsprop(groups(torch::optim::RMSpropOptions(1)));
  cycle(theirs), cycle(ours), cycle(adam), cycle(rmsprop);
  EXPECT_EQ(std::get<1>(
                static_cast<torch::optim::AdamOptions&>(adam.param_groups()[1].options()).betas()),
            0.999);

  torch::optim::Adagrad none(groups(torch::optim::AdagradOptions(1)));
  EXPECT_THAT(message([&] { cycle(none); }),
              HasSubstr("a group's options have neither betas nor momentum that it knows; give "
                        "set_momentum, or cycle_momentum = false"));
  EXPECT_THAT(rates(none), ElementsAre(0.1, 3e-3));
  double momentum = 0;
  OneCycleLR by_hand(none, {.max_lr = 0.1,
                            .total_steps = 10,
                            .set_momentum = [&](auto&, double value) { momentum = value; }});
  EXPECT_EQ(momentum, 0.95);
}

TEST(Schedulers, ARateSetByHandIsGoneOnFrom) {
  const auto halved = [](auto make, const auto& table) {
    auto optimizer = sgd();
    const auto scheduler = make(optimizer);
    const auto halve = [&](int epoch) {
      if (epoch != 4) return;
      for (auto& group : optimizer.param_groups())
        group.options().set_lr(group.options().get_lr() * 0.5);
    };
    expect_schedule(table, optimizer, {scheduler.get()}, {.between = halve});
  };
  halved(
      [](auto& o) {
        return part<LinearLR>(o, LinearLROptions{0.1, 1, 7});
      },
      reference::kLinearHalved);
  halved([](auto& o) { return part<CosineAnnealingLR>(o, CosineAnnealingLROptions{10}); },
         reference::kCosineHalved);
}
TEST(Schedulers, ChainAsPythonsDo) {
  auto optimizer = sgd();
  LinearLR warm_up(optimizer, {.start_factor = 0.1, .total_iters = 4});
  CosineAnnealingLR cosine(optimizer, {.T_max = 6, .eta_min = 1e-4});
  EXPECT_THAT(cosine.base_lrs(), ElementsAre(0.1, 3e-3));  // from before the warm-up
  expect_schedule(reference::kChained, optimizer, {&warm_up, &cosine});
}
TEST(Schedulers, SchedulersOfAnotherOptimizerOrTimeStartAnew) {
  auto optimizer = sgd(), other = sgd();
  { const LinearLR gone(optimizer, {.start_factor = 0.5}); }
  const CosineAnnealingLR cosine(optimizer, {.T_max = 6});
  EXPECT_THAT(cosine.base_lrs(), ElementsAre(0.05, 1.5e-3));
  const PolynomialLR polynomial(other);
  EXPECT_THAT(polynomial.base_lrs(), ElementsAre(0.1, 3e-3));
}

TEST(Schedulers, SequentialIsPythonsToTheLastBit) {
  const auto cycle = OneCycleLROptions{.max_lr = 0.4, .total_steps = 13, .cycle_momentum = false};
  const auto expect = [](const auto& table, std::vector<std::int64_t> milestones, auto... makes) {
    auto optimizer = sgd();
    std::vector<std::shared_ptr<Scheduler>> parts;
    (parts.push_back(makes(optimizer)), ...);
    SequentialLR scheduler(optimizer, parts, std::move(milestones));
    expect_schedule(table, optimizer, {&scheduler});
    EXPECT_EQ(scheduler.get_last_lr(), rates(optimizer));
  };
  const auto linear = [](LinearLROptions options) {
    return [=](auto& o) { return part<LinearLR>(o, options); };
  };
  const auto cosine = [](CosineAnnealingLROptions options) {
    return [=](auto& o) { return part<CosineAnnealingLR>(o, options); };
  };
  const auto polynomial = [](PolynomialLROptions options) {
    return [=](auto& o) { return part<PolynomialLR>(o, options); };
  };
  const auto powers = [](auto& o) { return part<LambdaLR>(o, LambdaLR::Function(power)); };
  const auto one_cycle = [&](auto& o) { return part<OneCycleLR>(o, cycle); };

  expect(reference::kWarmUpCosine, {5}, linear({.start_factor = 0.01, .total_iters = 5}),
         cosine({.T_max = 20, .eta_min = 1e-4}));
  expect(reference::kFourParts, {4, 10, 22}, powers, linear({.start_factor = 0.5}),
         polynomial({.total_iters = 9, .power = 1.5}), cosine({.T_max = 6, .eta_min = 1e-4}));
  expect(reference::kPartLeftOut, {5, 5}, linear({.start_factor = 0.2}), powers,
         polynomial({.total_iters = 6}));
  expect(reference::kIntoRoundedCosine, {2}, powers, cosine({.T_max = 5, .eta_min = 0.011}));
  expect(reference::kIntoOneCycle, {6}, linear({.start_factor = 0.5}), one_cycle);
  expect(reference::kOneCycleFirst, {13}, one_cycle, cosine({.T_max = 5}));
}
TEST(Schedulers, SequentialRefusesWhatItCannotRun) {
  auto optimizer = sgd(), other = sgd();
  const auto linear = part<LinearLR>(optimizer), second = part<LinearLR>(optimizer);
  const auto words = [&](std::vector<std::shared_ptr<Scheduler>> parts,
                         std::vector<std::int64_t> milestones) {
    return message([&] { SequentialLR(optimizer, std::move(parts), std::move(milestones)); });
  };
  EXPECT_THAT(words({}, {}), HasSubstr("got no scheduler; give one at least"));
  EXPECT_THAT(words({linear, nullptr}, {3}), HasSubstr("scheduler 1 is null"));
  EXPECT_THAT(words({linear, part<LinearLR>(other)}, {3}),
              HasSubstr("scheduler 1, a LinearLR, belongs to another optimizer; build it for"));
  EXPECT_THAT(words({linear, linear}, {3}), HasSubstr("scheduler 1, a LinearLR, is given twice"));
  EXPECT_THAT(words({linear, second}, {3, 4}),
              HasSubstr("got 2 schedulers and 2 milestones; give one milestone fewer"));
  EXPECT_THAT(words({linear, second}, {0}),
              HasSubstr("milestone 0 is below 1; give epochs in ascending order"));
  const auto inner = part<SequentialLR>(optimizer, std::vector<std::shared_ptr<Scheduler>>{second},
                                        std::vector<std::int64_t>{});
  EXPECT_THAT(words({linear, inner}, {3}),
              HasSubstr("scheduler 1 is a SequentialLR itself; give its parts and milestones"));
}

TEST(Schedulers, BadOptionsAreNamedAndChangeNothing) {
  auto optimizer = sgd();
  const auto words = [&]<class S, class Options>(std::type_identity<S>, const Options& options) {
    const std::string text = message([&] { S(optimizer, options); });
    EXPECT_THAT(rates(optimizer), ElementsAre(0.1, 3e-3));
    return text;
  };
  const auto linear = [&](LinearLROptions o) { return words(std::type_identity<LinearLR>{}, o); };
  EXPECT_THAT(linear({.start_factor = 0}), HasSubstr("start_factor is 0; give a factor above 0"));
  EXPECT_THAT(linear({.start_factor = NAN}), HasSubstr("start_factor is nan"));
  EXPECT_THAT(linear({.end_factor = 1.5}), HasSubstr("end_factor is 1.5; give a factor from 0"));
  EXPECT_THAT(linear({.total_iters = 0}), HasSubstr("total_iters is 0; give a number of epochs"));

  const auto cosine = [&](CosineAnnealingLROptions o) {
    return words(std::type_identity<CosineAnnealingLR>{}, o);
  };
  EXPECT_THAT(cosine({}), HasSubstr("T_max is 0; give the number of epochs until the rate is"));
  EXPECT_THAT(cosine({.T_max = 3, .eta_min = -1}), HasSubstr("eta_min is -1; give the least rate"));

  const auto polynomial = [&](PolynomialLROptions o) {
    return words(std::type_identity<PolynomialLR>{}, o);
  };
  EXPECT_THAT(polynomial({.total_iters = -1}), HasSubstr("total_iters is -1; give a number"));
  EXPECT_THAT(polynomial({.power = -1}), HasSubstr("power is -1; give an exponent, 0 or more"));

  const auto stable = [&](WarmupStableDecayLROptions o) {
    return words(std::type_identity<WarmupStableDecayLR>{}, o);
  };
  EXPECT_THAT(stable({}), HasSubstr("all three numbers of steps are 0; give the epochs"));
  EXPECT_THAT(stable({.num_decay_steps = -2}), HasSubstr("num_decay_steps is -2; give a number"));
  EXPECT_THAT(stable({.num_stable_steps = 1, .min_lr_ratio = 2}),
              HasSubstr("min_lr_ratio is 2; give a factor from 0 to 1"));

  const auto cycle = [&](OneCycleLROptions o) {
    return words(std::type_identity<OneCycleLR>{}, o);
  };
  EXPECT_THAT(cycle({.max_lr = 1}),
              HasSubstr("total_steps is 0, epochs 0 and steps_per_epoch 0; give total_steps, or"));
  EXPECT_THAT(cycle({.max_lr = {1, 2, 3}, .total_steps = 9}),
              HasSubstr("max_lr has 3 values, and the optimizer has 2 parameter groups"));
  EXPECT_THAT(cycle({.total_steps = 9}), HasSubstr("max_lr is 0; give the highest rate, above 0"));
  EXPECT_THAT(cycle({.max_lr = 1, .total_steps = 9, .pct_start = 1.5}),
              HasSubstr("pct_start is 1.5; give the part of the steps that go up"));
  EXPECT_THAT(cycle({.max_lr = 1, .total_steps = 9, .base_momentum = 2}),
              HasSubstr("a momentum is 2; give base_momentum and max_momentum from 0 to 1"));
  EXPECT_THAT(cycle({.max_lr = 1, .total_steps = 9, .div_factor = 0}),
              HasSubstr("div_factor is 0; give what max_lr is divided by"));
  EXPECT_THAT(cycle({.max_lr = 1, .total_steps = 10, .pct_start = 0.1}),
              HasSubstr("pct_start 0.1 of 10 steps is one step, and a rise of one step has no"));

  EXPECT_THAT(message([&] { LambdaLR(optimizer, std::vector<LambdaLR::Function>{power}); }),
              HasSubstr("got 1 functions, and the optimizer has 2 parameter groups"));
  EXPECT_THAT(message([&] { LambdaLR(optimizer, LambdaLR::Function()); }),
              HasSubstr("got an empty function; give one from an epoch to a factor"));

  PolynomialLR scheduler(optimizer);
  optimizer.add_param_group(OptimizerParamGroup({torch::zeros({1})}));
  EXPECT_THAT(
      message([&] { scheduler.step(); }),
      HasSubstr("PolynomialLR was built for 2 parameter groups, and the optimizer has 3 now; "
                "add groups before building schedulers"));
}

std::string saved(const auto& what) {
  std::ostringstream out;
  torch::save(what, out);
  return out.str();
}
void load(auto& what, const std::string& bytes) {
  std::istringstream in(bytes);
  torch::load(what, in);
}
/// Stops after five epochs, goes on with a new optimizer and a new scheduler that was built with
/// other options: the same rates as without stopping.
void expect_resumed(const std::function<std::shared_ptr<Scheduler>(SGD&, bool other)>& make) {
  auto whole = sgd(0.9), first = sgd(0.9), second = sgd(0.9);
  const auto all = make(whole, false), before = make(first, false), after = make(second, true);
  for (int epoch = 0; epoch < 5; ++epoch) all->step(), before->step();
  const std::string optimizer_file = saved(first), file = saved(*before);
  load(second, optimizer_file), load(*after, file);
  EXPECT_EQ(after->last_epoch(), 5);
  EXPECT_EQ(after->get_last_lr(), all->get_last_lr());
  EXPECT_EQ(after->base_lrs(), all->base_lrs());
  for (int epoch = 5; epoch < 14; ++epoch) {
    all->step(), after->step();
    EXPECT_EQ(rates(second), rates(whole)) << all->name() << ", epoch " << epoch;
    for (std::size_t g = 0; g < 2; ++g)
      EXPECT_EQ(momentum_of(second.param_groups()[g].options()),
                momentum_of(whole.param_groups()[g].options()));
  }
}
TEST(Schedulers, AResumedScheduleIsTheSame) {
  expect_resumed([](SGD& o, bool other) {
    return part<LinearLR>(o, other ? LinearLROptions{} : LinearLROptions{0.1, 0.9, 8});
  });
  expect_resumed([](SGD& o, bool other) {
    return part<CosineAnnealingLR>(o, CosineAnnealingLROptions{other ? 3 : 7, other ? 0 : 1e-4});
  });
  expect_resumed([](SGD& o, bool other) {
    return part<PolynomialLR>(o, PolynomialLROptions{9, other ? 2.0 : 0.7});
  });
  expect_resumed([](SGD& o, bool) { return part<LambdaLR>(o, LambdaLR::Function(power)); });
  expect_resumed([](SGD& o, bool other) {
    using enum WarmupStableDecayShape;
    return part<WarmupStableDecayLR>(
        o, WarmupStableDecayLROptions{.num_warmup_steps = 3,
                                      .num_stable_steps = other ? 0 : 4,
                                      .num_decay_steps = 4,
                                      .decay_type = other ? kLinear : kOneMinusSqrt});
  });
  expect_resumed([](SGD& o, bool other) {
    return part<OneCycleLR>(
        o, other ? OneCycleLROptions{.max_lr = 1, .total_steps = 3, .pct_start = 0}
                 : OneCycleLROptions{.max_lr = {0.3, 0.2}, .total_steps = 15, .three_phase = true});
  });
  expect_resumed([](SGD& o, bool other) {
    return part<SequentialLR>(
        o,
        std::vector<std::shared_ptr<Scheduler>>{
            part<LinearLR>(o),
            part<CosineAnnealingLR>(o, CosineAnnealingLROptions{.T_max = other ? 2 : 8})},
        std::vector<std::int64_t>{other ? 1 : 4});
  });
}
TEST(Schedulers, WhatAFileLacksIsNamedAndChangesNothing) {
  auto optimizer = sgd();
  CosineAnnealingLR scheduler(optimizer, {.T_max = 9});
  scheduler.step();
  const std::string before = saved(scheduler);
  const auto refused = [&](const std::string& bytes) {
    const std::string words = message([&] { load(scheduler, bytes); });
    EXPECT_EQ(saved(scheduler), before);
    return words;
  };
  const auto file = [&](const std::vector<std::pair<std::string, c10::IValue>>& changes) {
    torch::serialize::OutputArchive archive;
    std::map<std::string, c10::IValue> values{{"fourfold_scheduler", std::int64_t{1}},
                                              {"name", std::string("CosineAnnealingLR")},
                                              {"last_epoch", std::int64_t{3}},
                                              {"base_lrs", std::vector<double>{1, 2}},
                                              {"last_lrs", std::vector<double>{1, 2}},
                                              {"T_max", std::int64_t{4}},
                                              {"eta_min", 0.0}};
    for (const auto& [key, value] : changes) values[key] = value;
    for (const auto& [key, value] : values)
      if (!value.isNone()) archive.write(key, value);
    std::ostringstream out;
    archive.save_to(out);
    return out.str();
  };
  EXPECT_THAT(refused(saved(optimizer)),
              HasSubstr("does not hold the state of a fourfold scheduler; give it the archive"));
  EXPECT_THAT(refused(file({{"fourfold_scheduler", std::int64_t{2}}})),
              HasSubstr("has format version 2, and this fourfold reads versions 1 to 1; update"));
  EXPECT_THAT(refused(file({{"name", std::string("LinearLR")}})),
              HasSubstr("holds the state of a LinearLR, and this is a CosineAnnealingLR; load it"));
  EXPECT_THAT(refused(file({{"last_epoch", c10::IValue()}})),
              HasSubstr("has no 'last_epoch': it is damaged"));
  EXPECT_THAT(refused(file({{"last_epoch", std::int64_t{-1}}})), HasSubstr("says epoch -1"));
  EXPECT_THAT(refused(file({{"T_max", 3.5}})),
              HasSubstr("'T_max' in the file of a scheduler is Double and not a whole number"));
  EXPECT_THAT(refused(file({{"T_max", std::int64_t{0}}})), HasSubstr("T_max is 0; give"));
  EXPECT_THAT(refused(file({{"base_lrs", std::vector<double>{1}}})),
              HasSubstr("'base_lrs' in the file of a scheduler is for 1 parameter groups, and this "
                        "optimizer has 2; load it for an optimizer with the groups"));
  EXPECT_THAT(refused(file({{"last_lrs", std::vector<double>{1, NAN}}})),
              HasSubstr("'last_lrs' in the file of a scheduler holds nan: the file is damaged"));
  EXPECT_NE(refused(before.substr(0, before.size() / 2)), "no error");
  EXPECT_NE(refused("garbage"), "no error");
  load(scheduler, file({}));
  EXPECT_EQ(scheduler.last_epoch(), 3);
  EXPECT_EQ(scheduler.options().T_max, 4);

  // Of a sequence, no part changes before all have been read.
  const auto sequence = [&](std::int64_t length) {
    return part<SequentialLR>(
        optimizer,
        std::vector<std::shared_ptr<Scheduler>>{
            part<PolynomialLR>(optimizer, PolynomialLROptions{.total_iters = length}),
            length == 2 ? std::shared_ptr<Scheduler>(part<LinearLR>(optimizer))
                        : part<LambdaLR>(optimizer, LambdaLR::Function(power))},
        std::vector<std::int64_t>{3});
  };
  const auto one = sequence(2), another = sequence(5);
  const std::string one_before = saved(*one);
  EXPECT_THAT(message([&] { load(*one, saved(*another)); }),
              HasSubstr("holds the state of a LambdaLR, and this is a LinearLR"));
  EXPECT_EQ(saved(*one), one_before);
}

/// What a user derives outside the library runs like ours, in a sequence too.
class Halving final : public Scheduler {
 public:
  explicit Halving(torch::optim::Optimizer& optimizer) : Scheduler(optimizer) { start(); }
  [[nodiscard]] std::string name() const override { return "Halving"; }

 private:
  Lrs next(std::int64_t epoch, const Lrs& current) override {
    Lrs lrs = epoch == 0 ? base_lrs() : current;
    if (epoch > 0)
      for (double& lr : lrs) lr /= 2;
    return lrs;
  }
};
TEST(Schedulers, AScheduleOfOnesOwnIsAPart) {
  auto optimizer = sgd();
  SequentialLR scheduler(optimizer, {part<PolynomialLR>(optimizer), part<Halving>(optimizer)}, {2});
  for (int epoch = 0; epoch < 4; ++epoch) scheduler.step();
  EXPECT_THAT(rates(optimizer), ElementsAre(0.025, 7.5e-4));
}

TEST(Schedulers, AFileThatCyclesMomentumIsForAnOptimizerThatHasOne) {
  torch::optim::SGD sgd({torch::ones({2})}, torch::optim::SGDOptions(1).momentum(0.5));
  torch::optim::Adagrad adagrad({torch::ones({2})}, torch::optim::AdagradOptions(1));
  OneCycleLR from(sgd, {.max_lr = 0.1, .total_steps = 10});
  OneCycleLR to(adagrad, {.max_lr = 0.1, .total_steps = 10, .cycle_momentum = false});
  EXPECT_THAT(message([&] { load(to, saved(from)); }),
              HasSubstr("a group's options have neither betas nor momentum that it knows"));
  EXPECT_FALSE(to.options().cycle_momentum);
}

template <class Optimizer, class Options>
double momentum_at_the_top(const Options& options) {
  Optimizer optimizer(groups(options), options);
  OneCycleLR schedule(optimizer, {.max_lr = 0.1, .total_steps = 10, .base_momentum = 0.8});
  double least = 1;
  for (int i = 0; i < 9; ++i, optimizer.step(), schedule.step())
    least = std::min(least, momentum_of(optimizer.param_groups()[0].options()));
  return least;
}
TEST(OneCycle, CyclesTheMomentumOfOurOptions) {
  EXPECT_NEAR((momentum_at_the_top<LionOf<Fp32>>(LionOptions())), 0.8, 0.02);
  EXPECT_NEAR((momentum_at_the_top<ScaleOf<Fp32>>(ScaleOptions())), 0.8, 0.02);  // betas of vectors
  EXPECT_NEAR((momentum_at_the_top<ScaleOf<Fp32>>(ScaleOptions().momentum(0.9))), 0.8, 0.02);
  EXPECT_NEAR((momentum_at_the_top<AdamWOf<Fp32>>(torch::optim::AdamWOptions())), 0.8, 0.02);
}
TEST(OneCycle, OptionsWithoutMomentumAreNamed) {
  Adafactor<> optimizer(groups(AdafactorOptions()), AdafactorOptions());
  EXPECT_THAT(message([&] { OneCycleLR(optimizer, {.max_lr = 0.1, .total_steps = 10}); }),
              HasSubstr("neither betas nor momentum that it knows; give set_momentum"));
}

}  // namespace
