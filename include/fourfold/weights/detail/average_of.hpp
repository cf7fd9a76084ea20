// SPDX-License-Identifier: Apache-2.0
#pragma once
/// The moving average of one tensor, in codes, on the host or as a plain tensor.
#include <ATen/core/grad_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>
#include <fourfold/codec/detail/coded_values.hpp>
#include <fourfold/core/buffer_holder.hpp>
#include <fourfold/core/parallel.hpp>
#include <fourfold/core/place.hpp>
#include <fourfold/core/visit.hpp>
#include <fourfold/torch/archive.hpp>

#include <torch/serialize/archive.h>
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {

/// An average that is a tensor like the weight, on its device, or on the CPU: Python's bits.
struct OnDevice {};
struct OnHost {};

namespace detail {

/// average += weight * (value - average) for one tensor, held as C says.
template <class C>
class AverageOf {
  static constexpr bool kCodes = kIsGroupInt<C>;
  static constexpr std::int64_t kTile = 1024;
  static constexpr const char* kFile = "the file of an ExponentialMovingAverage";

 public:
  AverageOf(std::string name, const at::Tensor& of, std::int64_t min_packed_elements,
            std::shared_ptr<BufferHolder> holder)
      : name_(std::move(name)), of_(of), strides_(of.strides().vec()), holder_(std::move(holder)) {
    packed_ = kCodes && of.is_floating_point() && of.is_cpu() &&
              of.is_non_overlapping_and_dense() && of.numel() >= min_packed_elements;
  }
  [[nodiscard]] const std::string& name() const { return name_; }
  [[nodiscard]] const at::Tensor& weight() const { return of_; }
  [[nodiscard]] std::int64_t nbytes() const {
    return packed_            ? codes_.nbytes()
           : dense_.defined() ? static_cast<std::int64_t>(dense_.nbytes())
                              : 0;
  }

  /// How averages of C are called in files.
  static std::string code() {
    if constexpr (kCodes)
      return C::name();
    else
      return std::is_same_v<C, OnHost> ? "OnHost" : "OnDevice";
  }
  /// After the first update.
  void save(::torch::serialize::OutputArchive& archive) const {
    archive.write("name", c10::IValue(name_));
    archive.write("packed", c10::IValue(packed_));
    if (packed_) {
      archive.write("codes", codes_.codes, /*is_buffer=*/true);
      archive.write("words", codes_.words, /*is_buffer=*/true);
      archive.write("strides", at::tensor(strides_, at::kLong), /*is_buffer=*/true);
    } else {
      archive.write("dense", dense_, /*is_buffer=*/true);
    }
  }
  /// The same tensor's average, from a file.
  [[nodiscard]] AverageOf loaded(::torch::serialize::InputArchive& archive) const {
    const PlaceGuard place(Place::kWeights);
    const door::ArchiveReader file(archive, kFile);
    const std::string name = file.read_string("name");
    TORCH_CHECK(name == name_, kFile, " has '", name, "' where this model has '", name_,
                "': it is of another model; load it into an average of the model it was saved of");
    TORCH_CHECK(
        file.read_bool("packed") == packed_, kFile, " holds '", name_, "' ",
        packed_ ? "plain, and this average holds codes" : "in codes, and this average does not",
        "; make it with the min_packed_elements that it was saved with");
    AverageOf result(*this);
    const auto read = [&](const char* key, at::IntArrayRef sizes, at::ScalarType dtype) {
      at::Tensor tensor;
      TORCH_CHECK(archive.try_read(key, tensor, /*is_buffer=*/true) && tensor.sizes() == sizes &&
                      tensor.scalar_type() == dtype,
                  kFile, " holds '", name_, "' as ", tensor.defined() ? tensor.sizes() : sizes, " ",
                  tensor.defined() ? toString(tensor.scalar_type()) : "nothing", ", and ", sizes,
                  " ", dtype, " was wanted: it is damaged, or of another model");
      return tensor;
    };
    if constexpr (kCodes)
      if (packed_) {
        const CodedValues like(C::kFormat, of_.numel());
        result.codes_.codes = read("codes", like.codes.sizes(), at::kByte);
        result.codes_.words = read("words", like.words.sizes(), at::kInt);
        const at::Tensor strides = read("strides", {of_.dim()}, at::kLong);
        TORCH_CHECK(strides.equal(at::tensor(strides_, at::kLong)), kFile, " holds '", name_,
                    "' in the memory format of strides ", strides, ", and the weight has ",
                    at::IntArrayRef(strides_),
                    "; give the model that format before it is averaged");
        result.hold();
        return result;
      }
    const at::Device device = std::is_same_v<C, OnHost> ? at::Device(at::kCPU) : of_.device();
    result.dense_ = read("dense", of_.sizes(), held_as()).to(device);
    result.hold();
    return result;
  }

  /// `share` of the weight, 1 takes it whole.
  void update(double share, const Key& key) {
    const c10::NoGradGuard no_grad;
    const PlaceGuard place(Place::kWeights);
    const at::Tensor now = of_.detach();
    if constexpr (kCodes)
      if (packed_) {
        TORCH_CHECK(
            now.is_cpu() && now.strides() == at::IntArrayRef(strides_) && now.is_floating_point(),
            "ExponentialMovingAverage: '", name_, "' is ", now.scalar_type(), " on ", now.device(),
            " with strides ", now.strides(), ", and was on cpu with strides ",
            at::IntArrayRef(strides_),
            " when its average began in codes; make another after the move");
        update_codes(now, share, key);
        return done();
      }
    const at::Tensor here =
        now.to(std::is_same_v<C, OnHost> ? at::Device(at::kCPU) : now.device(), held_as());
    if (!dense_.defined() || !dense_.sizes().equals(here.sizes()) ||
        (!here.is_floating_point() && dense_.device() != here.device()))
      dense_ = here.clone(), hold();
    else if (share == 1 || !here.is_floating_point())
      dense_.copy_(here);
    else
      dense_.lerp_(here, share);
    done();
  }
  /// It will be updated next.
  void read_ahead() {
    if (holder_ != nullptr)
      for (at::Tensor* part : {&codes_.codes, &codes_.words, &dense_})
        if (part->defined()) holder_->will_need(*part);
  }
  /// Like the weight, on its device.
  [[nodiscard]] at::Tensor value() const {
    const c10::NoGradGuard no_grad;
    if constexpr (kCodes)
      if (packed_) {
        const at::Tensor out = at::empty_like(of_.detach());
        visit_float(out.scalar_type(), "ExponentialMovingAverage",
                    [&]<class T>(std::type_identity<T>) {
                      T* to = out.mutable_data_ptr<T>();
                      each_tile(out.numel(), [&](std::int64_t begin, std::int64_t n) {
                        alignas(64) float tile[kTile];
                        codes_.decode(C::kFormat, begin, n, tile, isa());
                        for (std::int64_t i = 0; i < n; ++i)
                          to[begin + i] = static_cast<T>(tile[i]);
                      });
                    });
        return out;
      }
    return dense_.to(of_.device(), of_.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  }

 private:
  void hold() {
    if (holder_ != nullptr)
      for (at::Tensor* part : {&codes_.codes, &codes_.words, &dense_})
        if (part->defined()) *part = holder_->hold(*part);
  }
  void done() {
    if (holder_ != nullptr)
      for (const at::Tensor* part : {&codes_.codes, &codes_.words, &dense_})
        if (part->defined()) holder_->done_with(*part);
  }
  /// Half types are averaged in fp32: a share of a thousandth is less than their rounding.
  [[nodiscard]] at::ScalarType held_as() const {
    return at::isReducedFloatingType(of_.scalar_type()) ? at::kFloat : of_.scalar_type();
  }
  void update_codes(const at::Tensor& now, double share, const Key& key) {
    const bool first = !codes_.codes.defined();
    if (first) codes_ = CodedValues(C::kFormat, now.numel()), hold();
    const auto weight = static_cast<float>(share);
    visit_float(now.scalar_type(), "ExponentialMovingAverage", [&]<class T>(std::type_identity<T>) {
      const T* from = now.const_data_ptr<T>();
      each_tile(now.numel(), [&](std::int64_t begin, std::int64_t n) {
        alignas(64) float tile[kTile] = {};
        const Isa use = isa();
        if (!first) codes_.decode(C::kFormat, begin, n, tile, use);
        for (std::int64_t i = 0; i < n; ++i) {
          const auto value = static_cast<float>(from[begin + i]);
          tile[i] = share == 1 ? value : std::fma(weight, value - tile[i], tile[i]);
        }
        codes_.encode(C::kFormat, begin, n, tile, key, use);
      });
    });
  }
  template <class F>
  static void each_tile(std::int64_t n, const F& f) {
    parallel_for(0, ceil_div(n, kTile), 16, [&](std::int64_t a, std::int64_t b) {
      for (std::int64_t begin = a * kTile; begin < std::min(n, b * kTile); begin += kTile)
        f(begin, std::min(kTile, n - begin));
    });
  }

  std::string name_;
  at::Tensor of_;
  std::vector<std::int64_t> strides_;  // codes lie as the weight did
  bool packed_ = false;
  CodedValues codes_;
  at::Tensor dense_;
  std::shared_ptr<BufferHolder> holder_;
};

}  // namespace detail

}  // namespace fourfold::inline v0
