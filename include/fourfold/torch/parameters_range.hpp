// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A run of values of a payload, as a payload: rows of a matrix, one matrix of a batch, one tile of
/// output channels. It shares the codes.
#include <fourfold/torch/parameters_tensor.hpp>

#include <ATen/ops/empty.h>

#include <memory>
#include <utility>
#include <vector>

namespace fourfold::door {

template <class = void>
class BasicPayloadRange final : public Payload {
 public:
  BasicPayloadRange(std::shared_ptr<const Payload> whole, std::int64_t offset,
                    std::vector<std::int64_t> sizes)
      : whole_(std::move(whole)), offset_(offset), sizes_(std::move(sizes)) {
    if (!whole_->factorised()) return;
    // Whole rows only: payload_range looks after that.
    const at::Tensor &left = whole_->buffers()[0], &right = whole_->buffers()[1];
    factors_ = {
        left.narrow(0, offset_ / right.size(1), c10::multiply_integers(sizes_) / right.size(1)),
        right};
  }

  at::Tensor decompress() const override {
    const std::int64_t n = c10::multiply_integers(sizes_);
    if (!whole_->device().is_cpu() || whole_->factorised())
      return whole_->decompress().view(-1).narrow(0, offset_, n).clone().view(sizes_);
    const at::Tensor values = at::empty(sizes_, at::kFloat);
    whole_->decode(offset_, offset_ + n, values.data_ptr<float>());
    return values.to(whole_->dtype());
  }
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    whole_->decode(offset_ + begin, offset_ + end, out);
  }
  std::shared_ptr<const Payload> compress(const at::Tensor&) const override {
    TORCH_INTERNAL_ASSERT(false, "a range of a payload is for reading");
  }
  std::shared_ptr<const Payload> to(at::Device device, at::ScalarType dtype) const override {
    return std::make_shared<BasicPayloadRange>(whole_->to(device, dtype), offset_, sizes_);
  }
  at::IntArrayRef sizes() const override { return sizes_; }
  at::ScalarType dtype() const override { return whole_->dtype(); }
  at::Device device() const override { return whole_->device(); }
  std::int64_t nbytes() const override { return whole_->nbytes(); }
  std::string codec() const override { return whole_->codec(); }
  bool factorised() const override { return whole_->factorised(); }
  const std::vector<at::Tensor>& buffers() const override {
    return whole_->factorised() ? factors_ : whole_->buffers();
  }

 private:
  std::shared_ptr<const Payload> whole_;
  std::int64_t offset_;
  std::vector<std::int64_t> sizes_;
  std::vector<at::Tensor> factors_;
};
using PayloadRange = BasicPayloadRange<>;

/// Values [offset, offset + numel(sizes)) of `whole` in row-major order, seen with `sizes`; `whole`
/// itself where that is all of it; null where it cuts through the rows of a factorised one.
template <class = void>
std::shared_ptr<const Payload> payload_range(const std::shared_ptr<const Payload>& whole,
                                             std::int64_t offset, std::vector<std::int64_t> sizes) {
  if (offset == 0 && whole->sizes() == at::IntArrayRef(sizes)) return whole;
  if (whole->factorised()) {
    const std::int64_t row = whole->buffers()[1].size(1);
    if (offset % row != 0 || sizes.size() != 2 || sizes[1] != row) return nullptr;
  }
  return std::make_shared<PayloadRange>(whole, offset, std::move(sizes));
}

}  // namespace fourfold::door
