// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Checkpointing: a block keeps its inputs alone, and runs again when backward needs the rest.
///
///   auto y = fourfold::checkpoint([&](const torch::Tensor& x) { return block->forward(x); }, x);
///   auto y = fourfold::checkpoint(block, x);          // a ModuleHolder or shared_ptr
///   auto y = fourfold::checkpoint({.early_stop = false}, fn, x, mask, 3);
///
/// Losses and gradients are bit-equal to those of the plain call where the block does the same each
/// time: random state, autocast, device and what the block wrote beside its result (running
/// statistics, counters) are restored around the second run. Within a SavedTensorsScope the inputs,
/// and the tensors of the second run until they are used, are held by its packer: under
/// Activations<Int4> inputs are held in 8 bits, and the second run starts from the decoded ones.
/// Outside every scope they are referenced.
///
/// Blocks nest; backward inside a block, double backward, retain_graph and a partial backward work;
/// a backward of any thread may run the block. Chen et al., "Training deep nets with sublinear
/// memory cost" (2016); the rules stand in checkpoint_frame.hpp.
#include <fourfold/activations/detail/checkpoint_frame.hpp>
#include <fourfold/core/void_of.hpp>

#include <array>
#include <concepts>
#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace torch::nn {
class Module;
}

namespace fourfold::inline v0 {

/// Whether this thread is running a block for the second time: for whatever must happen once a step
/// (counters, prints). Buffers written in place need no such care: checkpoint() puts them back.
template <class = void>
bool is_recomputing() {
  auto* const engine = door::detail::installed_saved_tensors_engine();
  return engine != nullptr && engine->recomputing() > 0;
}

namespace detail {

template <class T>
concept OptionalLike = requires(T& value) {
  typename T::value_type;
  { value.has_value() } -> std::same_as<bool>;
  { *value } -> std::same_as<typename T::value_type&>;
};
template <class T>
concept TupleLike = requires {
  std::tuple_size<T>::value;
};
template <class T>
concept Sequence = requires(T& value) {
  { *value.begin() } -> std::same_as<typename T::value_type&>;
  value.end();
};

template <class T>  // torch::nn::AnyValue
concept AnyValueLike = requires(T& value) {
  { value.template try_get<at::Tensor>() } -> std::same_as<at::Tensor*>;
};

/// Calls visit(tensor&) on each tensor in `value`: a tensor, or optionals, sequences, arrays, pairs
/// and tuples of what holds tensors; anything else has none. Of what a torch::nn::AnyValue may
/// hold, those that LibTorch's own modules take.
template <class T, class Visit>
void for_each_tensor(T& value, const Visit& visit) {
  if constexpr (std::is_base_of_v<at::Tensor, T>) {
    visit(static_cast<at::Tensor&>(value));
  } else if constexpr (OptionalLike<T>) {
    if (value.has_value()) for_each_tensor(*value, visit);
  } else if constexpr (TupleLike<T>) {
    std::apply([&](auto&... each) { (for_each_tensor(each, visit), ...); }, value);
  } else if constexpr (AnyValueLike<T>) {
    const auto try_each = [&]<class... Held>(std::type_identity<Held>...) {
      const auto try_one = [&](auto* held) {
        return held && (for_each_tensor(*held, visit), true);
      };
      static_cast<void>((try_one(value.template try_get<Held>()) || ...));
    };
    using Pair = std::tuple<at::Tensor, at::Tensor>;
    try_each(std::type_identity<at::Tensor>{}, std::type_identity<std::optional<at::Tensor>>{},
             std::type_identity<std::vector<at::Tensor>>{}, std::type_identity<Pair>{},
             std::type_identity<std::optional<Pair>>{},
             std::type_identity<std::tuple<at::Tensor, Pair>>{});
  } else if constexpr (Sequence<T>) {
    if constexpr (!std::is_arithmetic_v<typename T::value_type>)
      for (auto& each : value) for_each_tensor(each, visit);
  }
}

/// A stored copy, handed over as what it was copied from: by reference or to be moved from.
template <class As, class T>
constexpr decltype(auto) forward_as(T& stored) {
  if constexpr (std::is_lvalue_reference_v<As>) {
    return (stored);
  } else {
    return std::move(stored);
  }
}

/// fn(inputs...), or the forward of what `fn` is or points to.
template <class Fn, class... Inputs>
decltype(auto) call_block(Fn&& fn, Inputs&&... inputs) {
  if constexpr (std::is_invocable_v<Fn, Inputs...>) {
    return std::invoke(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
  } else if constexpr (requires { fn->forward(std::forward<Inputs>(inputs)...); }) {
    return fn->forward(std::forward<Inputs>(inputs)...);
  } else if constexpr (requires { fn.get().forward(std::forward<Inputs>(inputs)...); }) {
    return fn.get().forward(std::forward<Inputs>(inputs)...);
  } else {
    static_assert(
        std::is_invocable_v<Fn, Inputs...>,
        "checkpoint(fn, inputs...): fn cannot be called with these inputs; give a callable, a "
        "module's holder or its shared_ptr (forward(inputs...) is called)");
  }
}

template <class Fn, class... Inputs>
using BlockResult =
    std::decay_t<decltype(call_block(std::declval<Fn&>(), std::declval<Inputs>()...))>;

}  // namespace detail

/// fn(inputs...), whose saved tensors are dropped and computed again in backward.
///
/// `inputs`: any mixture of tensors (also within optionals, vectors, arrays, pairs and tuples) and
/// values; all are copied (tensors by reference), so `fn` and they must be copyable. What `fn`
/// captures is kept alive until the graph goes, and is not packed: give tensors as inputs. What
/// `fn` refers to must live until backward. The result is what `fn` returns, of any type.
///
/// `fn` must do the same each time it runs. Where it saves other sizes, dtypes, devices or numbers
/// of tensors, backward throws, naming the index, what came and what was expected. Inputs that are
/// referenced must not be written to in place before backward (LibTorch's error), not even by `fn`.
/// Without gradients (NoGrad, InferenceMode) fn(inputs...) simply runs.
template <class Fn, class... Inputs>
auto checkpoint(const CheckpointOptions& options, Fn&& fn, Inputs&&... inputs)
    -> detail::BlockResult<Fn, Inputs...> {
  using StoredFn = std::decay_t<Fn>;
  using StoredInputs = std::tuple<std::decay_t<Inputs>...>;
  static_assert(!std::is_base_of_v<torch::nn::Module, StoredFn>,
                "checkpoint(module, ...) would copy the module: give its holder, its shared_ptr or "
                "std::ref(module)");
  static_assert(
      std::is_copy_constructible_v<StoredFn> &&
          (std::is_copy_constructible_v<std::decay_t<Inputs>> && ...),
      "checkpoint(fn, inputs...) runs fn again in backward: fn and inputs must be copyable");
  if (!at::GradMode::is_enabled())
    return detail::call_block(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);

  struct Block {
    StoredFn fn;
    StoredInputs inputs;  // its tensors are undefined: the frame has them
  };
  auto block = std::make_shared<Block>(Block{fn, StoredInputs(inputs...)});
  std::vector<at::Tensor> tensors;
  detail::for_each_tensor(block->inputs, [&](at::Tensor& tensor) {
    tensors.push_back(std::move(tensor));
    tensor = at::Tensor();
  });
  using Frame = detail::CheckpointFrame<typename VoidOf<Fn>::Type>;
  const auto frame =
      std::make_shared<Frame>(options, tensors, [block](const std::vector<at::Tensor>& unpacked) {
        Block again = *block;  // a function with state of its own starts from where it started
        auto next = unpacked.begin();
        detail::for_each_tensor(again.inputs, [&](at::Tensor& tensor) { tensor = *next++; });
        std::apply(
            [&](auto&... each) {
              static_cast<void>(detail::call_block(again.fn, detail::forward_as<Inputs>(each)...));
            },
            again.inputs);
      });
  const typename Frame::FirstRun first_run(frame, tensors);
  return detail::call_block(std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
}

template <class Fn, class... Inputs>
requires(!std::same_as<std::remove_cvref_t<Fn>, CheckpointOptions>) auto checkpoint(
    Fn&& fn, Inputs&&... inputs) {
  return checkpoint(CheckpointOptions{}, std::forward<Fn>(fn), std::forward<Inputs>(inputs)...);
}

}  // namespace fourfold::inline v0
