// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A SavedModel given to a module: everything is checked and made first, then put in place.
#include <ATen/ops/as_strided.h>
#include <fourfold/weights/parameter_ties.hpp>  // extent
#include <fourfold/weights/saved_model.hpp>

namespace fourfold::inline v0::detail {

template <class = void>
NamedTensors with_prefix(const NamedTensors& parameters, const NamedTensors& buffers) {
  NamedTensors all;
  for (const auto& [name, tensor] : parameters)
    all.emplace_back("parameter '" + name + "'", tensor);
  for (const auto& [name, tensor] : buffers) all.emplace_back("buffer '" + name + "'", tensor);
  return all;
}

template <class = void>
std::string title(const SavedEntry& entry) {
  return (entry.buffer ? "buffer '" : "parameter '") + entry.name + "'";
}

constexpr const char* kLeftAsItWas = ". The module was left as it was";

/// Each entry's tensor in the model, in the order of the entries.
template <class = void>
std::vector<at::Tensor> match(const NamedTensors& model, const SavedModel& saved,
                              const std::string& what) {
  std::unordered_map<std::string, at::Tensor> by_name(model.begin(), model.end());
  std::vector<at::Tensor> targets;
  for (const SavedEntry& entry : saved.entries) {
    const auto found = by_name.find(title(entry));
    TORCH_CHECK(found != by_name.end(), what, " is of another model: it has ", title(entry),
                ", which this one has not", kLeftAsItWas);
    const at::Tensor& target = found->second;
    TORCH_CHECK(target.sizes() == at::IntArrayRef(entry.sizes), what,
                " is of another model: ", title(entry), " has sizes ", at::IntArrayRef(entry.sizes),
                " there and ", target.sizes(), " here", kLeftAsItWas);
    targets.push_back(target);
    by_name.erase(found);
  }
  for (const auto& [name, tensor] : model)
    TORCH_CHECK(!by_name.contains(name), what, " is of another model: it has no ", name,
                ", which this one has", kLeftAsItWas);
  return targets;
}

template <class = void>
void check_dtype(const SavedEntry& entry, at::ScalarType saved, const at::Tensor& target,
                 const std::string& what) {
  TORCH_CHECK(saved == target.scalar_type(), what, ": ", title(entry), " is ", c10::toString(saved),
              " there and ", c10::toString(target.scalar_type()),
              " here; convert the model with to(dtype) first", kLeftAsItWas);
}

/// The payload of the file, on the model's device, its buffers of the shapes that its codec makes.
template <class = void>
std::shared_ptr<const Payload> restore(const SavedPayload& saved, const at::Tensor& target,
                                       const std::string& what) {
  const std::optional<PayloadFormat> format = registered_codec(saved.codec);
  TORCH_CHECK(format.has_value(), what, " holds parameters packed by ", saved.codec,
              ", which this program has not used; name it: fourfold::load<C>(model, ...)",
              kLeftAsItWas);
  const std::shared_ptr<const Payload> sample =
      format->compress(at::zeros(saved.sizes, at::TensorOptions(saved.dtype)));
  bool fits = sample->buffers().size() == saved.buffers.size();
  for (std::size_t i = 0; fits && i < saved.buffers.size(); ++i)
    fits = sample->buffers()[i].sizes() == saved.buffers[i].sizes() &&
           sample->buffers()[i].scalar_type() == saved.buffers[i].scalar_type();
  TORCH_CHECK(fits, what, " is damaged: a parameter packed by ", saved.codec,
              " has not the codes that its sizes ", at::IntArrayRef(saved.sizes), " need",
              kLeftAsItWas);
  return format->restore(saved.buffers, saved.sizes, saved.dtype)->to(target.device(), saved.dtype);
}

/// The holder that all of a payload's targets share in the same way, or null: they are all plain.
template <class = void>
door::PackedHolder* common_holder(const SavedModel& saved, const std::vector<at::Tensor>& targets,
                                  std::uint64_t index, const std::string& what) {
  door::PackedHolder* common = nullptr;
  bool first = true;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const SavedEntry& entry = saved.entries[i];
    if (!entry.packed || entry.index != index) continue;
    door::PackedHolder* holder = door::packed_holder(targets[i]);
    const bool same = holder == nullptr ||
                      (holder->payload()->codec() == saved.payloads[index].codec &&
                       targets[i].strides() == at::IntArrayRef(entry.strides) &&
                       targets[i].storage_offset() == entry.offset &&
                       holder->payload()->sizes() == at::IntArrayRef(saved.payloads[index].sizes));
    TORCH_CHECK(same && (first || holder == common), what, ": ", title(entry), " is packed by ",
                saved.payloads[index].codec, " there and ",
                holder ? "by " + holder->payload()->codec() : std::string("not packed"),
                " here, or tied to others differently; call fourfold::decompress(module) first",
                kLeftAsItWas);
    common = holder, first = false;
  }
  return common;
}

template <class = void>
void load_model(const NamedTensors& parameters, const NamedTensors& buffers,
                const SavedModel& saved, const std::string& what) {
  const at::NoGradGuard no_grad;
  const PlaceGuard place(Place::kWeights);
  door::open_parameters_door();
  const std::vector<at::Tensor> targets = match(with_prefix(parameters, buffers), saved, what);

  std::vector<std::shared_ptr<const Payload>> payloads(saved.payloads.size());
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const SavedEntry& entry = saved.entries[i];
    const std::size_t held = entry.packed ? saved.payloads.size() : saved.tensors.size();
    TORCH_CHECK(entry.index < held, what, " is damaged: ", title(entry), " points past its end",
                kLeftAsItWas);
    if (!entry.packed) {
      const at::Tensor& tensor = saved.tensors[entry.index];
      TORCH_CHECK(tensor.sizes() == at::IntArrayRef(entry.sizes), what,
                  " is damaged: ", title(entry), " has two sizes", kLeftAsItWas);
      TORCH_CHECK(!door::is_packed(targets[i]), what, ": ", title(entry),
                  " is plain there and packed "
                  "here (",
                  door::payload_of(targets[i])->codec(),
                  "); call fourfold::decompress(module) first", kLeftAsItWas);
      check_dtype(entry, tensor.scalar_type(), targets[i], what);
      continue;
    }
    const SavedPayload& payload = saved.payloads[entry.index];
    check_dtype(entry, payload.dtype, targets[i], what);
    bool inside = entry.strides.size() == entry.sizes.size() && entry.offset >= 0;
    std::int64_t last = entry.offset;
    for (std::size_t d = 0; inside && d < entry.sizes.size(); ++d) {
      std::int64_t step = 0;
      inside = entry.strides[d] >= 0 &&
               !__builtin_mul_overflow(std::max<std::int64_t>(entry.sizes[d] - 1, 0),
                                       entry.strides[d], &step) &&
               !__builtin_add_overflow(last, step, &last);
    }
    TORCH_CHECK(inside && (targets[i].numel() == 0 || last < c10::multiply_integers(payload.sizes)),
                what, " is damaged: ", title(entry), " reaches past its values", kLeftAsItWas);
    common_holder(saved, targets, entry.index, what);
    if (!payloads[entry.index]) payloads[entry.index] = restore(payload, targets[i], what);
  }

  // Nothing below fails.
  std::vector<at::Tensor> made(payloads.size());
  std::unordered_set<std::uint64_t> replaced;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    const SavedEntry& entry = saved.entries[i];
    at::Tensor target = targets[i];
    if (!entry.packed) {
      target.copy_(saved.tensors[entry.index]);
      continue;
    }
    const std::shared_ptr<const Payload>& payload = payloads[entry.index];
    if (door::PackedHolder* holder = door::packed_holder(target);
        holder && !made[entry.index].defined()) {
      if (replaced.insert(entry.index).second)
        door::PackedWrites::replace(target, holder->payload(), payload);
      continue;
    }
    at::Tensor& whole = made[entry.index];
    if (!whole.defined()) {
      if (payload->factorised())
        for (at::Tensor factor : payload->buffers())
          factor.set_requires_grad(target.requires_grad());
      whole = door::packed_tensor(payload, target.is_inference());
    }
    door::PackedHolder* holder = door::packed_holder(whole);
    holder->was_trainable = holder->was_trainable || target.requires_grad();
    door::swap_in_place(target, whole.as_strided(entry.sizes, entry.strides, entry.offset));
  }
}

}  // namespace fourfold::inline v0::detail
