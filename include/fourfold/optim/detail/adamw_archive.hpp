// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The file format of optimizer states, version 1. An archive holds
///   fourfold_optimizer (int, the version), rule, first, second (names of the codecs), seed, groups
///   group<g>: LibTorch's options, parameters (int)
///   group<g>/parameter<i>: sizes, strides, step; if it has a state: first, second, each with
///   packed (bool)
///                          and buffers 0, 1, ...
/// Everything is read and checked before anything is changed.
#include <c10/util/Exception.h>
#include <fourfold/optim/detail/adamw_step.hpp>

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <memory>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

inline constexpr std::int64_t kFormatVersion = 1;
using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

inline c10::IValue read_value(InputArchive& archive, const std::string& key) {
  c10::IValue value;
  TORCH_CHECK(archive.try_read(key, value), "the file of optimizer states has no '", key,
              "': it is damaged, or was written by another program; save it again");
  return value;
}
inline std::int64_t read_int(InputArchive& archive, const std::string& key) {
  const c10::IValue value = read_value(archive, key);
  TORCH_CHECK(value.isInt(), "'", key, "' in the file of optimizer states is ", value.tagKind(),
              " and no number: the file is damaged; save it again");
  return value.toInt();
}
inline std::vector<std::int64_t> read_ints(InputArchive& archive, const std::string& key) {
  const c10::IValue value = read_value(archive, key);
  TORCH_CHECK(value.isIntList(), "'", key, "' in the file of optimizer states is ", value.tagKind(),
              " and no list of numbers: the file is damaged; save it again");
  return value.toIntVector();
}
inline InputArchive read_part(InputArchive& archive, const std::string& key) {
  InputArchive part;
  TORCH_CHECK(archive.try_read(key, part), "the file of optimizer states has no '", key,
              "': it is damaged or cut off; save it again");
  return part;
}

template <class C>
void save_moment(OutputArchive& archive, const std::string& key, const Moment<C>& moment) {
  OutputArchive part(archive.compilation_unit());
  part.write("packed", c10::IValue(moment.packed()));
  for (std::size_t i = 0; i < moment.buffers().size(); ++i)
    part.write(std::to_string(i), moment.buffers()[i], /*is_buffer=*/true);
  archive.write(key, part);
}

/// A moment of n values as the file has it; fp32 from a file goes into codes if `pack`.
template <class C>
Moment<C> load_moment(InputArchive& archive, const std::string& key, std::int64_t n,
                      const std::string& saved_codec, bool pack, const std::string& where) {
  InputArchive part = read_part(archive, key);
  const c10::IValue packed = read_value(part, "packed");
  TORCH_CHECK(packed.isBool(), "'packed' of ", where, " is no truth value: the file is damaged");
  TORCH_CHECK(!packed.toBool() || saved_codec == C::name(), "the ", key, " moments were saved as ",
              saved_codec, ", but this optimizer holds them as ", C::name(),
              "; load them into an optim::AdamW of ", saved_codec, ", or begin with new states");
  Moment<C> moment(n, packed.toBool());
  std::vector<at::Tensor> buffers(moment.buffers().size());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const at::Tensor& wanted = moment.buffers()[i];
    TORCH_CHECK(part.try_read(std::to_string(i), buffers[i], /*is_buffer=*/true), "the ", key,
                " moment of ", where, " lacks buffer ", i,
                ": the file is damaged or cut off; save it again");
    TORCH_CHECK(
        buffers[i].scalar_type() == wanted.scalar_type() && buffers[i].sizes() == wanted.sizes(),
        "buffer ", i, " of the ", key, " moment of ", where, " is ", buffers[i].scalar_type(), " ",
        buffers[i].sizes(), ", but ", wanted.scalar_type(), " ", wanted.sizes(),
        " was wanted: the file is damaged; save it again");
  }
  if (packed.toBool() || !pack || saved_codec != "Fp32") {
    moment.adopt(buffers);
    return moment;
  }
  Moment<C> coded(n, true);
  coded.assign(buffers[0].to(at::kCPU).contiguous());
  return coded;
}

template <class First, class Second>
void save_states(OutputArchive& archive,
                 const std::vector<::torch::optim::OptimizerParamGroup>& groups, std::uint64_t seed,
                 const auto& state_of) {
  archive.write("fourfold_optimizer", c10::IValue(kFormatVersion));
  archive.write("rule", c10::IValue(std::string("AdamW")));
  archive.write("first", c10::IValue(First::name()));
  archive.write("second", c10::IValue(Second::name()));
  archive.write("seed", c10::IValue(static_cast<std::int64_t>(seed)));
  archive.write("groups", c10::IValue(static_cast<std::int64_t>(groups.size())));
  for (std::size_t g = 0; g < groups.size(); ++g) {
    OutputArchive group(archive.compilation_unit()), options(archive.compilation_unit());
    groups[g].options().serialize(options);
    group.write("options", options);
    group.write("parameters", c10::IValue(static_cast<std::int64_t>(groups[g].params().size())));
    for (std::size_t i = 0; i < groups[g].params().size(); ++i) {
      const at::Tensor& p = groups[g].params()[i];
      OutputArchive one(archive.compilation_unit());
      const AdamWState<First, Second>* state = state_of(p);
      one.write("sizes", c10::IValue(p.sizes().vec()));
      one.write("strides",
                c10::IValue(state == nullptr ? std::vector<std::int64_t>() : state->strides));
      one.write("step", c10::IValue(state == nullptr ? std::int64_t{0} : state->step));
      one.write("state", c10::IValue(state != nullptr));
      if (state != nullptr) {
        save_moment(one, "first", state->first);
        save_moment(one, "second", state->second);
      }
      group.write("parameter" + std::to_string(i), one);
    }
    archive.write("group" + std::to_string(g), group);
  }
}

/// What a file holds, checked against the parameters of the optimizer that will take it.
template <class First, class Second>
struct LoadedStates {
  struct Group {
    std::unique_ptr<::torch::optim::OptimizerOptions> options;
    std::vector<std::unique_ptr<AdamWState<First, Second>>> states;  ///< null: no step yet
  };
  std::uint64_t seed = 0;
  std::vector<Group> groups;

  LoadedStates(InputArchive& archive, const std::vector<::torch::optim::OptimizerParamGroup>& ours,
               std::int64_t min_packed_elements) {
    c10::IValue version;
    TORCH_CHECK(
        archive.try_read("fourfold_optimizer", version) && version.isInt(),
        "this file does not hold states of a fourfold optimizer; those of torch::optim::AdamW are "
        "loaded by torch::optim::AdamW");
    TORCH_CHECK(version.toInt() <= kFormatVersion,
                "this file of optimizer states has format version ", version.toInt(),
                ", and this fourfold reads versions up to ", kFormatVersion,
                "; build with the fourfold that wrote it, or a newer one");
    const auto name = [&](const char* key) {
      const c10::IValue value = read_value(archive, key);
      TORCH_CHECK(value.isString(), "'", key,
                  "' in the file of optimizer states is no name: the file is damaged");
      return value.toStringRef();
    };
    TORCH_CHECK(name("rule") == "AdamW", "this file holds states of ", name("rule"),
                ", and this optimizer is AdamW; load it into an optimizer of its own rule");
    const std::string first = name("first"), second = name("second");
    seed = static_cast<std::uint64_t>(read_int(archive, "seed"));
    const std::int64_t count = read_int(archive, "groups");
    TORCH_CHECK(count == static_cast<std::int64_t>(ours.size()), "this file holds ", count,
                " parameter groups, and this optimizer has ", ours.size(),
                "; build it with the groups it was saved with");
    for (std::size_t g = 0; g < ours.size(); ++g) {
      InputArchive part = read_part(archive, "group" + std::to_string(g));
      InputArchive options = read_part(part, "options");
      Group& group = groups.emplace_back();
      group.options = ours[g].options().clone();
      group.options->serialize(options);
      const std::int64_t parameters = read_int(part, "parameters");
      TORCH_CHECK(parameters == static_cast<std::int64_t>(ours[g].params().size()), "group ", g,
                  " of this file has ", parameters, " parameters, and that of this optimizer ",
                  ours[g].params().size(), "; build it with the parameters it was saved with");
      for (std::size_t i = 0; i < ours[g].params().size(); ++i) {
        const std::string where =
            "parameter " + std::to_string(i) + " of group " + std::to_string(g);
        InputArchive one = read_part(part, "parameter" + std::to_string(i));
        group.states.push_back(
            load_one(one, ours[g].params()[i], first, second, min_packed_elements, where));
      }
    }
  }

 private:
  static std::unique_ptr<AdamWState<First, Second>> load_one(InputArchive& one, const at::Tensor& p,
                                                             const std::string& first,
                                                             const std::string& second,
                                                             std::int64_t min_packed_elements,
                                                             const std::string& where) {
    const std::vector<std::int64_t> sizes = read_ints(one, "sizes"),
                                    strides = read_ints(one, "strides");
    TORCH_CHECK(p.sizes() == sizes, where, " is ", p.sizes(), ", and in this file ",
                at::IntArrayRef(sizes), "; load the states of the same model");
    const c10::IValue present = read_value(one, "state");
    TORCH_CHECK(present.isBool(), "'state' of ", where, " is no truth value: the file is damaged");
    if (!present.toBool()) return nullptr;
    TORCH_CHECK(same_order(sizes, strides, moment_strides(p)), where, " has strides ", p.strides(),
                ", and in this file ", at::IntArrayRef(strides),
                "; bring it into the memory format that it was saved in");
    auto state = std::make_unique<AdamWState<First, Second>>();
    state->sizes = sizes, state->strides = strides;
    state->step = read_int(one, "step");
    TORCH_CHECK(state->step >= 0, where, " has made ", state->step,
                " steps: the file is damaged; save it again");
    const bool pack = p.numel() >= min_packed_elements;
    state->first = load_moment<First>(one, "first", p.numel(), first, pack, where);
    state->second = load_moment<Second>(one, "second", p.numel(), second, pack, where);
    return state;
  }
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0
