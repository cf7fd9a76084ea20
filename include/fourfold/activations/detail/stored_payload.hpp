// SPDX-License-Identifier: Apache-2.0
#pragma once
/// What is stored, as the payload of a packed tensor: a backward operator that knows how reads it in
/// pieces (torch/packed_backward.hpp).
#include <fourfold/activations/detail/storage_index.hpp>
#include <fourfold/torch/packed_backward.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0::detail {

template <class = void>
class BasicStoredPayload final : public door::SavedPayload {
 public:
  explicit BasicStoredPayload(std::shared_ptr<Stored> stored)
      : stored_(std::move(stored)), sizes_{stored_->extent().span} {}

  at::Tensor decompress() const override {
    return run_of(stored_->storage(), 0, sizes_[0], dtype());
  }
  at::Tensor decompress(std::int64_t begin, std::int64_t end) const override {
    return stored_->piece(begin, end);
  }
  std::int64_t granule() const override { return stored_->granule(); }
  bool exact() const override { return stored_->exact(); }
  void reading(std::int64_t overwritten) const override { stored_->note_reading(overwritten); }
  void read() const noexcept override { stored_->note_read(); }
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    const at::Tensor values = decompress().narrow(0, begin, end - begin).to(at::kFloat);
    std::copy_n(values.const_data_ptr<float>(), end - begin, out);
  }
  std::shared_ptr<const Payload> compress(const at::Tensor&) const override { return refuse(); }
  std::shared_ptr<const Payload> to(at::Device, at::ScalarType) const override { return refuse(); }
  at::IntArrayRef sizes() const override { return sizes_; }
  at::ScalarType dtype() const override { return stored_->dtype(); }
  at::Device device() const override { return stored_->device(); }
  std::int64_t nbytes() const override { return stored_->own_bytes(); }
  std::string codec() const override { return "saved for backward"; }
  bool factorised() const override { return false; }
  const std::vector<at::Tensor>& buffers() const override {
    static const std::vector<at::Tensor> none;
    return none;
  }

 private:
  [[noreturn]] static std::shared_ptr<const Payload> refuse() {
    TORCH_CHECK(false, "a tensor that autograd saved is for reading; clone its plain values first");
  }

  const std::shared_ptr<Stored> stored_;
  const std::vector<std::int64_t> sizes_;
};

/// Its values, still packed where reading them in pieces saves memory. What is held exactly is kept,
/// and comes back as LibTorch's own kernels take it; but for masks, which have fewer bits. On a CPU:
/// a GPU would wait for the launches of many small kernels.
template <class = void>
at::Tensor packed_or_plain(const std::shared_ptr<Stored>& stored, const StorageView& view) {
  const std::int64_t piece = door::parameters_state().piece;
  const bool coded = !stored->exact() || stored->kind() == StoredAs::kMask;
  if (!coded || view.numel() < 2 * piece || !stored->device().is_cpu() || stored->granule() == 0)
    return stored->view(view);
  return door::packed_saved_tensor(std::make_shared<BasicStoredPayload<>>(stored), view.sizes,
                                   view.strides, view.offset - stored->first());
}

}  // namespace fourfold::inline v0::detail
