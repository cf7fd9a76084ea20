// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Parameters held packed, in place, in any module.
///
///   auto packed = fourfold::compress_weights<Int8>(*model);          // AllMatrices
///   auto packed = fourfold::compress_weights<Nf4>(*model, filter);   // filter(name, parameter)
///   fourfold::compress_weights<LowRank<64>>(*model);                 // trained by its factors
///   optimizer(fourfold::factors(*model));
///   fourfold::decompress(*model);                                    // the one way back
///
/// The module keeps its classes, names and forward; every alias of a parameter (member, dictionary,
/// user's own copy of the at::Tensor) sees the packed one. A view made before keeps the plain
/// values that it saw, apart from the module's. Packed parameters are frozen: requires_grad is off,
/// gradients flow through to inputs and to all other parameters. A tied parameter is packed once.
///
/// Errors name the parameter and leave the module as it was: a module without parameters, a filter
/// that chose none, a parameter that is packed already, is not Float, BFloat16, Half or Double, is
/// not dense, holds a NaN or an infinity, or shares a part of its values with one that stays.
#include <ATen/ops/as_strided.h>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/parameters.hpp>
#include <fourfold/weights/module_tensors.hpp>
#include <fourfold/weights/parameter_ties.hpp>
#include <fourfold/weights/payload_formats.hpp>
#include <fourfold/weights/weights.hpp>

#include <functional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// What compress_weights did. Bytes of the packed tensors alone; tied ones count once.
struct CompressedWeights {
  std::vector<std::string> names;  ///< in the module's order, ties under their first name
  std::int64_t values = 0;
  std::int64_t bytes_before = 0;
  std::int64_t bytes_after = 0;

  [[nodiscard]] double ratio() const {
    return bytes_after > 0 ? static_cast<double>(bytes_before) / static_cast<double>(bytes_after)
                           : 1;
  }
};

namespace detail {

using ParameterChoice = std::function<bool(const std::string&, const at::Tensor&)>;

template <class = void>
void check_packable(const std::string& what, const std::string& name, const at::Tensor& parameter) {
  TORCH_CHECK(
      !door::is_packed(parameter), what, ": parameter '", name, "' is packed already (",
      door::payload_of(parameter)->codec(),
      "); call fourfold::decompress(module) first to pack it anew, or leave it out by a filter");
  const at::ScalarType dtype = parameter.scalar_type();
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
      what, ": parameter '", name, "' is ", c10::toString(dtype),
      ", but weights are packed from Float, BFloat16, Half or Double; leave it out by a filter");
  TORCH_CHECK(parameter.layout() == at::kStrided && !parameter.is_meta() &&
                  parameter.has_storage() && !parameter.is_mkldnn(),
              what, ": parameter '", name, "' is not a dense tensor with values (layout ",
              parameter.layout(), ", device ", parameter.device(), "); leave it out by a filter");
  TORCH_CHECK(
      parameter.is_leaf(), what, ": parameter '", name,
      "' is computed by autograd from others, so packing it would cut the graph; pack what it "
      "is computed from");
}

template <class = void>
CompressedWeights compress_parameters(const NamedTensors& parameters, const ParameterChoice& choice,
                                      const PayloadFormat& format) {
  const std::string what = "compress_weights<" + format.codec + ">";
  TORCH_CHECK(
      !parameters.empty(), what,
      ": the module has no parameters, so there is nothing to pack; hand over the module that "
      "holds them, after they are registered");
  NamedTensors chosen, staying;
  PointerSet seen;
  for (const auto& [name, parameter] : parameters) {
    if (seen.find(parameter.unsafeGetTensorImpl()) != nullptr) continue;
    const bool is_chosen = choice(name, parameter);
    // A tied parameter is packed if any of its names is chosen.
    if (is_chosen) {
      check_packable(what, name, parameter);
      seen.insert(parameter.unsafeGetTensorImpl());
      chosen.emplace_back(name, parameter);
    }
  }
  for (const auto& [name, parameter] : parameters)
    if (seen.insert(parameter.unsafeGetTensorImpl())) staying.emplace_back(name, parameter);
  TORCH_CHECK(!chosen.empty(), what, ": the filter chose none of the ", staying.size(),
              " parameters (the default takes floating tensors of 2 dimensions and ",
              AllMatrices::kFewest, " values or more); pass a filter that chooses some");

  // First everything that can fail.
  const at::NoGradGuard no_grad;
  const PlaceGuard place(Place::kWeights);
  const std::vector<TiedParameters> ties = tied_parameters(what, chosen, staying);
  door::open_parameters_door();
  std::vector<std::shared_ptr<const Payload>> payloads;
  CompressedWeights done;
  for (const TiedParameters& tie : ties) {
    const auto& [name, owner] = tie.owner;
    try {
      payloads.push_back(format.compress(owner.detach()));
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, what, ": parameter '", name, "' (sizes ", owner.sizes(),
                  "): ", error.what_without_backtrace(),
                  ". The module was left as it was; mend the parameter, or leave it out by the "
                  "filter");
    }
    if (format.factorised)
      for (at::Tensor factor : payloads.back()->buffers())
        factor.set_requires_grad(tie.trainable());
    done.names.push_back(name);
    done.values += owner.numel();
    done.bytes_before += static_cast<std::int64_t>(owner.nbytes());
    done.bytes_after += payloads.back()->nbytes();
  }
  // Then what cannot.
  for (std::size_t i = 0; i < ties.size(); ++i) {
    const at::Tensor whole =
        door::packed_tensor(std::move(payloads[i]), ties[i].owner.second.is_inference());
    door::packed_holder(whole)->was_trainable = ties[i].trainable();
    for (const TiedParameters::View& view : ties[i].views) {
      // Codes are in row-major order, whatever the owner's strides were.
      const at::IntArrayRef strides = view.whole ? whole.strides() : view.parameter.strides();
      door::swap_in_place(view.parameter,
                          whole.as_strided(view.parameter.sizes(), strides, view.offset));
    }
    door::swap_in_place(ties[i].owner.second, whole);
  }
  // A neighbour in a flat buffer would keep the whole buffer alive.
  NamedTensors neighbours;
  for (const auto& one : staying)
    if (shares_storage_with_packed(ties, one.second)) neighbours.push_back(one);
  move_to_own_storage(neighbours);
  return done;
}

}  // namespace detail

/// Packs what `filter` chooses, in place. Returns what was done; throws with nothing done.
template <Codec C, ModuleLike M, ParameterFilter Filter = AllMatrices>
CompressedWeights compress_weights(M&& model, const Filter& filter = {}) {
  register_codecs<C>();
  return detail::compress_parameters(
      parameters_of(model, "compress_weights"),
      [&](const std::string& name, const at::Tensor& parameter) { return filter(name, parameter); },
      payload_format<C>());
}

/// Plain parameters again, in place; they require gradients where they did before. Nothing to do
/// where nothing is packed.
template <ModuleLike M>
void decompress(M&& model) {
  const at::NoGradGuard no_grad;
  PointerMap<at::Tensor> plain;
  for (const auto& [name, parameter] : parameters_of(model, "decompress")) {
    const door::PackedHolder* holder = door::packed_holder(parameter);
    if (holder == nullptr) continue;
    at::Tensor& values = plain[parameter.storage().unsafeGetStorageImpl()];
    if (!values.defined()) values = holder->payload()->decompress().detach();
    const bool trainable = holder->was_trainable;
    door::swap_in_place(parameter, values.as_strided(parameter.sizes(), parameter.strides(),
                                                     parameter.storage_offset()));
    parameter.set_requires_grad(trainable);
  }
}

/// The trainable factors of what compress_weights<LowRank<R>> packed: for an optimizer. Leaves;
/// each once. They are also what zero_grad must reach: Module::zero_grad does not know them.
template <ModuleLike M>
[[nodiscard]] std::vector<at::Tensor> factors(M&& model) {
  std::vector<at::Tensor> found;
  PointerSet seen;
  for (const auto& [name, parameter] : parameters_of(model, "factors")) {
    const auto payload = door::payload_of(parameter);
    if (payload && payload->factorised() && seen.insert(payload.get()))
      found.insert(found.end(), payload->buffers().begin(), payload->buffers().end());
  }
  return found;
}

}  // namespace fourfold::inline v0
