// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Offload<>: what autograd saves goes to a file, from a GPU to the host's pinned memory, and comes
/// back for backward. Bit-equal.
///
///   #include <fourfold/activations/offload.hpp>
///   using Pipeline = CompressionPipeline<Recompute<CheapOps>, Offload<>>;
///
///   struct ToScratch {
///     static fourfold::OffloadOptions options() {
///       return {.directory = "/scratch", .bytes_in_flight = 256_MiB};
///     }
///   };
///   using Elsewhere = CompressionPipeline<Activations<Int4>, Offload<ToScratch>>;
///
/// Offloaded is what else would be held: values as they are, and beside Activations<Codec> the
/// codes; not what is computed again, has an exact code, is smaller than `min_bytes`, or is held by
/// somebody anyway (parameters, a batch). The file has no name, so nothing is left of it whatever
/// ends the process; a full disk costs no step, since what does not fit stays in memory (one
/// warning). What is saved last is not written (offloader.hpp). From a GPU, whose bytes_in_flight are
/// its own, copies run beside the program, in both directions (detail/host_offloader.hpp).
///
/// Beside Budget<> it is one more choice for each storage: exact, no memory, at the time that
/// writing and reading were measured to take. What a plan offloads is written before the forward
/// goes on, and read when it is asked for, so that the plan's bytes are those of the step.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <fourfold/activations/detail/host_offloader.hpp>
#include <fourfold/activations/offloader.hpp>
#include <fourfold/activations/offloading.hpp>
#include <fourfold/core/payload.hpp>
#include <fourfold/core/policy.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace fourfold::inline v0 {
namespace detail {

/// A payload of which some buffers, or all of its values, are elsewhere.
class OffloadedPayload : public Payload {
 public:
  void decode(std::int64_t begin, std::int64_t end, float* out) const override {
    restored()->decode(begin, end, out);
  }
  std::shared_ptr<const Payload> compress(const at::Tensor& values) const override {
    return restored()->compress(values);
  }
  std::shared_ptr<const Payload> to(at::Device device, at::ScalarType dtype) const override {
    return restored()->to(device, dtype);
  }
  std::shared_ptr<const Payload> with_buffers(std::vector<at::Tensor> buffers) const override {
    return restored()->with_buffers(std::move(buffers));
  }

 protected:
  [[nodiscard]] virtual std::shared_ptr<const Payload> restored() const = 0;
};

/// Codes, the larger of their buffers elsewhere.
class OffloadedCodes final : public OffloadedPayload {
 public:
  using Pieces = std::vector<std::shared_ptr<HeldElsewhere>>;  // by buffer; null: in memory
  OffloadedCodes(std::shared_ptr<const Payload> rest, Pieces pieces)
      : rest_(std::move(rest)), pieces_(std::move(pieces)) {}

  at::Tensor decompress() const override { return restored()->decompress(); }
  at::IntArrayRef sizes() const override { return rest_->sizes(); }
  at::ScalarType dtype() const override { return rest_->dtype(); }
  at::Device device() const override { return rest_->device(); }
  std::int64_t nbytes() const override { return rest_->nbytes(); }
  std::string codec() const override { return rest_->codec(); }
  bool factorised() const override { return rest_->factorised(); }
  const std::vector<at::Tensor>& buffers() const override { return rest_->buffers(); }

 private:
  std::shared_ptr<const Payload> restored() const override {
    std::vector<at::Tensor> buffers = rest_->buffers();
    for (std::size_t i = 0; i < buffers.size(); ++i)
      if (pieces_[i] != nullptr) buffers[i] = pieces_[i]->get();
    return rest_->with_buffers(std::move(buffers));
  }

  const std::shared_ptr<const Payload> rest_;  // empty buffers where a piece has them
  const Pieces pieces_;
};

/// Values as they are, elsewhere.
class OffloadedValues final : public Payload {
 public:
  OffloadedValues(std::shared_ptr<HeldElsewhere> piece, const at::Tensor& values)
      : piece_(std::move(piece)),
        sizes_(values.sizes().vec()),
        dtype_(values.scalar_type()),
        device_(values.device()) {}

  at::Tensor decompress() const override { return piece_->get().view(sizes_); }
  void decode(std::int64_t, std::int64_t, float*) const override { refuse(); }
  std::shared_ptr<const Payload> compress(const at::Tensor&) const override { refuse(); }
  std::shared_ptr<const Payload> to(at::Device, at::ScalarType) const override { refuse(); }
  at::IntArrayRef sizes() const override { return sizes_; }
  at::ScalarType dtype() const override { return dtype_; }
  at::Device device() const override { return device_; }
  std::int64_t nbytes() const override { return 0; }
  std::string codec() const override { return "Offload"; }
  bool factorised() const override { return false; }
  const std::vector<at::Tensor>& buffers() const override { return none_; }
  void before_source_changes() const override { piece_->before_write(); }

 private:
  [[noreturn]] void refuse() const {
    TORCH_CHECK(false, codec(), " holds values as they are; decompress() them first");
  }
  const std::shared_ptr<HeldElsewhere> piece_;
  const std::vector<std::int64_t> sizes_;
  const at::ScalarType dtype_;
  const at::Device device_;
  const std::vector<at::Tensor> none_;
};

class FileOffloading final : public Offloading {
 public:
  /// `planned`: a plan counts on the memory at once, so nothing waits in it or is read ahead, and
  /// codes stay.
  explicit FileOffloading(OffloadOptions options, bool planned = false)
      : planned_(planned),
        offloader_(planned ? at_once(std::move(options)) : std::move(options)),
        host_(offloader_.options().bytes_in_flight) {}

  std::shared_ptr<const Payload> offload(const at::Tensor& values,
                                         const at::Tensor& source) override {
    if (!goes(values)) return nullptr;
    const at::Tensor dense = values.contiguous();
    const bool own = dense.storage().is_alias_of(source.storage());
    return std::make_shared<OffloadedValues>(put(dense, own ? source : at::Tensor()), dense);
  }
  std::shared_ptr<const Payload> offload(std::shared_ptr<const Payload> codes) override {
    if (planned_) return codes;
    std::vector<at::Tensor> buffers = codes->buffers();
    OffloadedCodes::Pieces pieces(buffers.size());
    bool any = false;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      if (!goes(buffers[i]) || !buffers[i].is_contiguous() || buffers[i].dim() != 1) continue;
      pieces[i] = put(buffers[i]);
      buffers[i] = at::empty({0}, buffers[i].options());
      any = true;
    }
    if (!any) return codes;
    return std::make_shared<OffloadedCodes>(codes->with_buffers(std::move(buffers)),
                                            std::move(pieces));
  }
  double cost_ms(std::int64_t bytes) override {
    constexpr std::int64_t kProbe = std::int64_t{1} << 22;
    if (bytes < offloader_.options().min_bytes) return -1;
    OffloadCounts counts = offloader_.counts();
    if (counts.written == 0 || counts.read == 0) {
      const auto piece = offloader_.put(at::zeros({kProbe}, at::kByte));
      offloader_.settle();
      static_cast<void>(piece->get());
      counts = offloader_.counts();
    }
    if (counts.written == 0 || counts.read == 0) return -1;  // the disk is full
    return static_cast<double>(bytes) *
           (counts.write_ms / static_cast<double>(counts.written_bytes) +
            counts.read_ms / static_cast<double>(counts.read_bytes));
  }
  void settle() noexcept override {
    try {
      host_.settle();
      offloader_.settle();
    } catch (const std::exception&) {  // a warning that was made an error
    }
  }
  [[nodiscard]] std::string note() const override {
    if (!offloader_.in_memory()) return {};
    return "Offload<>: '" + offloader_.options().directory +
           "' is memory itself (tmpfs), so what is offloaded there saves none and is not counted; "
           "name a directory on a disk in OffloadOptions::directory, or by TMPDIR";
  }
  [[nodiscard]] OffloadCounts counts() const { return offloader_.counts(); }
  /// Of what lay on a GPU.
  [[nodiscard]] OffloadCounts host_counts() const { return host_.counts(); }

 private:
  std::shared_ptr<HeldElsewhere> put(const at::Tensor& dense, const at::Tensor& source = {}) {
    if (dense.is_cuda()) return host_.put(dense, source);
    return offloader_.put(dense, source);
  }
  [[nodiscard]] bool goes(const at::Tensor& values) const {
    return (values.is_cpu() || values.is_cuda()) && values.numel() > 0 &&
           static_cast<std::int64_t>(values.nbytes()) >= offloader_.options().min_bytes;
  }
  static OffloadOptions at_once(OffloadOptions options) {
    options.bytes_in_flight = std::min<std::int64_t>(options.bytes_in_flight, 0);
    return options;
  }
  const bool planned_;
  Offloader offloader_;
  HostOffloader host_;
};

}  // namespace detail

struct DefaultOffload {
  static OffloadOptions options() { return {}; }
};

/// `Where::options()` is asked once, when a pipeline is made. A directory that cannot be written to
/// is an error then.
template <class Where = DefaultOffload>
struct Offload {
  static constexpr Role role = Role::kOffload;
  /// `planned`: a budget decides what is offloaded.
  [[nodiscard]] static std::shared_ptr<Offloading> make(bool planned) {
    return std::make_shared<detail::FileOffloading>(Where::options(), planned);
  }
};
static_assert(Policy<Offload<>>, "Offload must stay a policy");

}  // namespace fourfold::inline v0
