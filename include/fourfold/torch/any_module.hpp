// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A torch::nn::AnyModule whose forward goes through a function of ours: how the children of a
/// Sequential are reached without touching the model.
///
/// AnyModule keeps a private AnyModulePlaceholder. Ours stands in its place and forwards
/// everything; it begins with the same bytes as the one it replaces (the module's shared_ptr,
/// whatever its type), since AnyModule::get<T>() casts to AnyModuleHolder<T, ...> by type_info and
/// reads that pointer.
#include <torch/nn/modules/container/any.h>

#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace fourfold::door {

using AnyArguments = std::vector<torch::nn::AnyValue>;
/// Calls the module with any signature.
using AnyForward = std::function<torch::nn::AnyValue(AnyArguments arguments)>;
/// Given the module's forward and its arguments, returns its result.
using AnyInterceptor =
    std::function<torch::nn::AnyValue(const AnyForward& forward, AnyArguments arguments)>;

namespace detail {

/// An explicit instantiation may name a private member.
std::unique_ptr<torch::nn::AnyModulePlaceholder>& content_of(torch::nn::AnyModule& module);
template <auto Content>
struct ExposeContent {
  friend std::unique_ptr<torch::nn::AnyModulePlaceholder>& content_of(
      torch::nn::AnyModule& module) {
    return module.*Content;
  }
};
template struct ExposeContent<&torch::nn::AnyModule::content_>;

/// Every AnyModuleHolder has this shape; the arguments of its forward are types only.
struct AnyShape : torch::nn::AnyModulePlaceholder {
  using AnyModulePlaceholder::AnyModulePlaceholder;
  std::shared_ptr<void> module;  // stands where AnyModuleHolder<T, ...>::module does
};
struct ShapeProbe : torch::nn::Module {
  int forward(int x) { return x; }
};
static_assert(sizeof(AnyShape) == sizeof(torch::nn::AnyModuleHolder<ShapeProbe, int>) &&
                  sizeof(std::shared_ptr<void>) == sizeof(std::shared_ptr<ShapeProbe>),
              "torch::nn::AnyModuleHolder has changed: see how AnyModule::get<T>() reads it");

template <class = void>
class BasicInterceptedModule final : public AnyShape {
 public:
  BasicInterceptedModule(std::shared_ptr<AnyModulePlaceholder> inner, AnyInterceptor interceptor)
      : AnyShape(inner->type_info), inner_(std::move(inner)), interceptor_(std::move(interceptor)) {
    void* raw = nullptr;  // what the replaced holder's shared_ptr points to: a T*, not a Module*
    std::memcpy(&raw, reinterpret_cast<const char*>(inner_.get()) + sizeof(AnyModulePlaceholder),
                sizeof(raw));
    module = std::shared_ptr<void>(inner_, raw);
  }
  torch::nn::AnyValue forward(AnyArguments&& arguments) override {
    return interceptor_(
        [inner = inner_](AnyArguments again) { return inner->forward(std::move(again)); },
        std::move(arguments));
  }
  std::shared_ptr<torch::nn::Module> ptr() override { return inner_->ptr(); }
  /// A copy of the handle to the same module goes the same way; a clone of the module does not.
  std::unique_ptr<AnyModulePlaceholder> copy() const override {
    return std::make_unique<BasicInterceptedModule>(inner_, interceptor_);
  }
  std::unique_ptr<AnyModulePlaceholder> clone_module(
      std::optional<at::Device> device) const override {
    return inner_->clone_module(device);
  }
  [[nodiscard]] const AnyModulePlaceholder& inner() const { return *inner_; }

 private:
  std::shared_ptr<AnyModulePlaceholder> inner_;
  AnyInterceptor interceptor_;
};
using InterceptedModule = BasicInterceptedModule<>;

}  // namespace detail

/// From now on `module`'s forward goes through `interceptor`. Its name, its type, ptr(), get<T>()
/// and clone() are as before. Does nothing, and returns false, where it does so already or is
/// empty.
template <class = void>
bool intercept(torch::nn::AnyModule& module, AnyInterceptor interceptor) {
  auto& content = detail::content_of(module);
  if (content == nullptr || dynamic_cast<detail::InterceptedModule*>(content.get()) != nullptr)
    return false;
  content = std::make_unique<detail::InterceptedModule>(std::move(content), std::move(interceptor));
  return true;
}

/// Takes it back; false where there was none.
template <class = void>
bool release(torch::nn::AnyModule& module) {
  auto& content = detail::content_of(module);
  const auto* ours = dynamic_cast<detail::InterceptedModule*>(content.get());
  if (ours == nullptr) return false;
  content = ours->inner().copy();
  return true;
}

}  // namespace fourfold::door
