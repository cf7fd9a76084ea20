// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The file format of optimizer states, version 2. An archive holds
///   fourfold_optimizer (int, the version), rule, first, second, master (names), seed, groups
///   group<g>: LibTorch's options, parameters (int)
///   group<g>/parameter<i>: sizes, strides, step, state (bool); if it has one: first, second, each
///       with packed (bool) and buffers 0, 1, ...; master and extra, each with count and buffers
/// Version 1, which is read too, had neither master nor extra. Everything is read and checked before
/// anything is changed.
#include <c10/util/Exception.h>
#include <fourfold/optim/detail/step_by_kernel.hpp>
#include <fourfold/torch/archive.hpp>

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <memory>
#include <string>
#include <vector>

namespace fourfold::inline v0 {
namespace optim::detail {

using StateMap = ska::flat_hash_map<void*, std::unique_ptr<::torch::optim::OptimizerParamState>>;

template <class State>
State* find_state(const StateMap& states, void* parameter) {
  const auto found = states.find(parameter);
  return found == states.end() ? nullptr : static_cast<State*>(found->second.get());
}
template <class State>
const State* find_state(const StateMap& states, const at::Tensor& p) {
  return find_state<State>(states, p.unsafeGetTensorImpl());
}

inline constexpr std::int64_t kFormatVersion = 2;
inline constexpr const char* kFile = "the file of optimizer states";
using ::torch::serialize::InputArchive;
using ::torch::serialize::OutputArchive;

template <class = void>
void save_buffers(OutputArchive& part, const std::vector<at::Tensor>& buffers) {
  for (std::size_t i = 0; i < buffers.size(); ++i)
    part.write(std::to_string(i), buffers[i].cpu(),
               /*is_buffer=*/true);  // for a machine without a GPU
}
template <class C>
void save_moment(OutputArchive& archive, const std::string& key, const Moment<C>& moment) {
  OutputArchive part(archive.compilation_unit());
  part.write("packed", c10::IValue(moment.packed()));
  save_buffers(part, moment.buffers());
  archive.write(key, part);
}
template <class = void>
void save_list(OutputArchive& archive, const std::string& key,
               const std::vector<at::Tensor>& buffers) {
  OutputArchive part(archive.compilation_unit());
  part.write("count", c10::IValue(static_cast<std::int64_t>(buffers.size())));
  save_buffers(part, buffers);
  archive.write(key, part);
}

template <class = void>
at::Tensor load_buffer(InputArchive& part, std::size_t i, const std::string& what) {
  at::Tensor buffer;
  TORCH_CHECK(part.try_read(std::to_string(i), buffer, /*is_buffer=*/true), what, " lacks buffer ",
              i, ": the file is damaged or cut off; save it again");
  return buffer;
}
/// Buffers of the shapes and dtypes of `wanted`.
template <class = void>
std::vector<at::Tensor> load_buffers(InputArchive& part, const std::vector<at::Tensor>& wanted,
                                     const std::string& what) {
  std::vector<at::Tensor> buffers(wanted.size());
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    buffers[i] = load_buffer(part, i, what);
    TORCH_CHECK(buffers[i].scalar_type() == wanted[i].scalar_type() &&
                    buffers[i].sizes() == wanted[i].sizes(),
                "buffer ", i, " of ", what, " is ", buffers[i].scalar_type(), " ",
                buffers[i].sizes(), ", but ", wanted[i].scalar_type(), " ", wanted[i].sizes(),
                " was wanted: the file is damaged; save it again");
  }
  return buffers;
}

/// A moment of n values from a file that has it in `saved_codec`; packed if `pack` where it must be
/// coded anew, and otherwise as it was.
template <class C>
Moment<C> load_moment(InputArchive& archive, const std::string& key, std::int64_t n,
                      const std::string& saved_codec, bool pack, const std::string& where) {
  if (n == 0) return {};
  InputArchive part;
  door::ArchiveReader(archive, kFile).read_part(key, part);
  const bool packed = door::ArchiveReader(part, kFile).read_bool("packed");
  const std::string what = "the " + key + " moment of " + where;
  std::optional<Moment<C>> loaded;
  const auto as = [&]<class Saved>(std::type_identity<Saved>) {
    Moment<Saved> saved(n, packed);
    TORCH_CHECK(saved.packed() == packed, what, " is marked as packed, and ", saved_codec,
                " does not pack: the file is damaged; save it again");
    saved.adopt(load_buffers(part, saved.buffers(), what));
    if constexpr (std::is_same_v<Saved, C>) {
      loaded.emplace(std::move(saved));
    } else {
      loaded.emplace(n, pack);
      loaded->assign(saved);
    }
  };
  if (saved_codec == C::name() && (packed || !pack || std::is_same_v<C, Fp32>))
    as(std::type_identity<C>{});
  else
    visit_state_codec(saved_codec, as);
  return *std::move(loaded);
}

template <class Rule, class State>
void save_states(OutputArchive& archive,
                 const std::vector<::torch::optim::OptimizerParamGroup>& groups, std::uint64_t seed,
                 const StateMap& states) {
  archive.write("fourfold_optimizer", c10::IValue(kFormatVersion));
  archive.write("rule", c10::IValue(std::string(Rule::name())));
  archive.write("first", c10::IValue(State::First::name()));
  archive.write("second", c10::IValue(State::Second::name()));
  archive.write("master", c10::IValue(State::MasterCodec::name()));
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
      const State* state = find_state<State>(states, p);
      one.write("sizes", c10::IValue(p.sizes().vec()));
      one.write("strides",
                c10::IValue(state == nullptr ? std::vector<std::int64_t>() : state->strides));
      one.write("step", c10::IValue(state == nullptr ? std::int64_t{0} : state->step));
      one.write("state", c10::IValue(state != nullptr));
      if (state != nullptr) {
        save_moment(one, "first", state->first);
        save_moment(one, "second", state->second);
        save_list(one, "master", state->master.buffers());
        save_list(one, "extra", state->extra);
      }
      group.write("parameter" + std::to_string(i), one);
    }
    archive.write("group" + std::to_string(g), group);
  }
}

/// What a file holds, checked against the parameters of the optimizer that will take it.
template <class Rule, class State>
struct LoadedStates {
  using Options = typename Rule::Options;
  struct Group {
    std::unique_ptr<::torch::optim::OptimizerOptions> options;
    std::vector<std::unique_ptr<State>> states;  ///< null: no step yet
  };
  std::uint64_t seed = 0;
  std::vector<Group> groups;

  LoadedStates(InputArchive& archive, const std::vector<::torch::optim::OptimizerParamGroup>& ours,
               std::int64_t min_packed_elements, bool on_host)
      : min_packed_elements_(min_packed_elements), on_host_(on_host) {
    const door::ArchiveReader file(archive, kFile);
    version_ = file.read_version(
        "fourfold_optimizer", kFormatVersion,
        "states of a fourfold optimizer (torch::optim's are loaded by torch::optim's)");
    const std::string rule = file.read_string("rule");
    TORCH_CHECK(rule == Rule::name(), "this file holds states of ", rule,
                ", and this optimizer is ", Rule::name(),
                "; load it into an optimizer of its own rule");
    first_ = file.read_string("first"), second_ = file.read_string("second");
    if (version_ > 1) master_ = file.read_string("master");
    seed = static_cast<std::uint64_t>(file.read_int("seed"));
    const std::int64_t count = file.read_int("groups");
    TORCH_CHECK(count == static_cast<std::int64_t>(ours.size()), "this file holds ", count,
                " parameter groups, and this optimizer has ", ours.size(),
                "; build it with the groups it was saved with");
    for (std::size_t g = 0; g < ours.size(); ++g) load_group(file, g, ours[g]);
  }

 private:
  void load_group(const door::ArchiveReader& file, std::size_t g,
                  const ::torch::optim::OptimizerParamGroup& ours) {
    InputArchive part, options;
    file.read_part("group" + std::to_string(g), part);
    const door::ArchiveReader reader(part, kFile);
    reader.read_part("options", options);
    Group& group = groups.emplace_back();
    group.options = ours.options().clone();
    group.options->serialize(options);
    Rule::check(static_cast<const Options&>(*group.options),
                "group " + std::to_string(g) + " of the file");
    const std::int64_t parameters = reader.read_int("parameters");
    TORCH_CHECK(parameters == static_cast<std::int64_t>(ours.params().size()), "group ", g,
                " of this file has ", parameters, " parameters, and that of this optimizer ",
                ours.params().size(), "; build it with the parameters it was saved with");
    for (std::size_t i = 0; i < ours.params().size(); ++i) {
      InputArchive one;
      reader.read_part("parameter" + std::to_string(i), one);
      group.states.push_back(
          load_one(one, ours.params()[i], static_cast<const Options&>(*group.options),
                   "parameter " + std::to_string(i) + " of group " + std::to_string(g)));
    }
  }

  std::unique_ptr<State> load_one(InputArchive& one, const at::Tensor& p, const Options& options,
                                  const std::string& where) const {
    const door::ArchiveReader reader(one, kFile);
    const std::vector<std::int64_t> sizes = reader.read_ints("sizes");
    const std::vector<std::int64_t> strides = reader.read_ints("strides");
    TORCH_CHECK(p.sizes() == sizes, where, " is ", p.sizes(), ", and in this file ",
                at::IntArrayRef(sizes), "; load the states of the same model");
    if (!reader.read_bool("state")) return nullptr;
    const at::Device device = state_device<Rule, State>(p, on_host_);
    auto state = std::make_unique<State>(p, kByRows<Rule>, device);
    TORCH_CHECK(same_order(sizes, strides, state->strides), where, " has strides ", p.strides(),
                ", and in this file ", at::IntArrayRef(strides),
                "; bring it into the memory format that it was saved in");
    state->strides = strides;
    state->step = reader.read_int("step");
    TORCH_CHECK(state->step >= 0, where, " has made ", state->step,
                " steps: the file is damaged; save it again");
    const MomentSizes n = Rule::moments(p, options);
    state->extra = make_extra<Rule>(p, options);
    const auto pack = [&](std::int64_t values) { return values >= min_packed_elements_; };
    state->first =
        load_moment<typename State::First>(one, "first", n.first, first_, pack(n.first), where);
    state->second = load_moment<typename State::Second>(one, "second", n.second, second_,
                                                        pack(n.second), where);
    state->first.to(device), state->second.to(device);
    if (version_ > 1) {
      load_master(reader, state->master, where);
      InputArchive more;
      reader.read_part("extra", more);
      state->extra = load_buffers(more, state->extra, "'extra' of " + where);
    }
    return state;
  }

  /// What another codec kept of a weight is left aside where ours keeps nothing.
  void load_master(const door::ArchiveReader& reader, Master<typename State::MasterCodec>& master,
                   const std::string& where) const {
    InputArchive part;
    reader.read_part("master", part);
    const std::int64_t kept = door::ArchiveReader(part, kFile).read_int("count");
    const std::string ours = State::MasterCodec::name();
    if (master.buffers().empty() || kept == 0) return;
    TORCH_CHECK(master_ == ours, "this file keeps weights by ", master_, ", and this optimizer by ",
                ours, "; load it into an optimizer of ", master_,
                ", or into one of RoundNearest, which leaves aside what was kept");
    master.adopt(load_buffers(part, master.buffers(), "the master of " + where));
  }

  std::int64_t min_packed_elements_;
  bool on_host_;
  std::int64_t version_ = 1;
  std::string first_, second_, master_;
};

}  // namespace optim::detail
}  // namespace fourfold::inline v0
