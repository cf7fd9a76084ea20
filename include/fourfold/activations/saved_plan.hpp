// SPDX-License-Identifier: Apache-2.0
#pragma once
/// Who decides how each storage is held, where an ActivationStore does not do it by its options
/// alone (plan/budget.hpp). It is asked about storages that could be held in more than one way,
/// and told what became of them.
#include <ATen/core/Tensor.h>
#include <fourfold/core/payload.hpp>
#include <fourfold/core/random.hpp>  // Key

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace fourfold::inline v0 {

/// Packs values, rounded stochastically. A plain function, so that stores are not templates.
using PackFunction = std::shared_ptr<const Payload> (*)(const at::Tensor& values, Key key);

enum class StoredAs { kKept, kPacked, kMask, kRebuilt, kOffloaded };

/// A storage that a forward saves. The same each time that the same forward runs, however its
/// storages are held.
struct SavedStorage {
  std::uint64_t forward = 0;    ///< as forward_began() was told
  std::uint64_t operation = 0;  ///< number of the operator that made it, else of who saves it
  std::uint64_t place = 0;      ///< among that operator's results, else among its arguments
  bool made = false;            ///< by an operator of this forward
  std::string_view producer{};  ///< that operator's name
  std::string_view saver{};     ///< the operator that saves it
  std::int64_t bytes = 0;       ///< of the whole storage
  bool sensitive = false;       ///< held by `pack_sensitive`, if it is packed
  bool packable = false;        ///< a codec would hold it, were there no other way
  const at::Tensor* values = nullptr;  ///< what is saved of it
};

/// A storage from which another one is computed again.
struct RebuildSource {
  std::uint32_t item = 0;
  bool even_kept = true;  ///< also where it is kept: writing to it before backward is an error then
};

/// Told what happens to one storage, on any thread.
class StoredWatch {
 public:
  virtual ~StoredWatch() = default;
  /// It is held so, in `bytes` of its own (those of a storage that is kept are not).
  virtual void held(std::uint32_t item, StoredAs kind, std::int64_t bytes, std::int64_t values) = 0;
  /// It is not held, but computed again from these items: told after held().
  virtual void rebuilt_from(std::uint32_t item, const std::vector<RebuildSource>& sources) {
    static_cast<void>(item), static_cast<void>(sources);
  }
  /// Its values are about to be made again, and were: `dense` is the copy.
  virtual void decoding(std::uint32_t item) noexcept = 0;
  virtual void decoded(std::uint32_t item, const c10::Storage& dense) noexcept = 0;
  /// It is about to be read in pieces, and was. The result, of so many bytes, takes the memory of the
  /// gradient that came in, as that of LibTorch's own operators does not; 0: it has its own.
  virtual void reading(std::uint32_t item, std::int64_t overwritten) noexcept {
    static_cast<void>(item), static_cast<void>(overwritten);
  }
  virtual void read(std::uint32_t) noexcept {}
  /// Another operator saves the same values.
  virtual void again(std::uint32_t) noexcept {}
  /// Nothing holds it any more.
  virtual void released(std::uint32_t item) noexcept = 0;
};

/// An operator of a forward that saved what is rounded, when it has run.
struct SavingOperator {
  struct Saved {
    std::uint32_t item = 0;                ///< as the watch knows it
    std::vector<std::uint32_t> rounded{};  ///< items that its values come from, itself among them
  };
  std::uint64_t forward = 0;
  std::string_view name{};               ///< "aten::addmm"
  bool multiplies = false;               ///< a matrix product or a convolution
  at::ArrayRef<at::Tensor> arguments{};  ///< its tensors
  const at::Tensor* result = nullptr;    ///< its first, in the graph
  at::ArrayRef<Saved> saved{};
};

/// What becomes of a block (blocks.hpp).
struct BlockChoice {
  bool recompute = false;
  bool reference = false;         ///< CheckpointOptions::reference_recomputed
  std::shared_ptr<void> token{};  ///< to live as long as backward may need the block
};

class SavedPlan {
 public:
  struct Choice {
    bool keep = false;            ///< as it is
    bool code = false;            ///< packed, also where it could be computed again
    bool offload = false;         ///< as it is, but not in memory
    PackFunction pack = nullptr;  ///< where it is packed and not sensitive; null: by `pack`
    bool even_sensitive = false;  ///< `pack` holds for what is sensitive, too
    std::shared_ptr<StoredWatch> watch{};  ///< may be null
    std::uint32_t item = 0;                ///< what the watch knows it by
  };

  virtual ~SavedPlan() = default;
  /// Forwards are numbered; those of several threads may run at once.
  virtual void forward_began(std::uint64_t forward) = 0;
  virtual void forward_ended(std::uint64_t forward) noexcept = 0;
  /// An error that it throws ends the forward.
  [[nodiscard]] virtual Choice choose(const SavedStorage& storage) = 0;
  /// A block begins; `look`: a hash of its inputs' sizes and dtypes; `inputs` are those that a
  /// checkpoint of it would ask about. Between these two calls no other of the same forward begins.
  [[nodiscard]] virtual BlockChoice block_began(std::uint64_t forward, std::uint64_t look,
                                                const std::vector<SavedStorage>& inputs) {
    static_cast<void>(forward), static_cast<void>(look), static_cast<void>(inputs);
    return {.recompute = true};
  }
  virtual void block_ended(std::uint64_t) noexcept {}

  /// Whether it is to be told of the operators of a forward that has begun, and of them.
  [[nodiscard]] virtual bool listens(std::uint64_t forward) const {
    static_cast<void>(forward);
    return false;
  }
  virtual void ran(const SavingOperator& one) { static_cast<void>(one); }
  /// What a report says of it, if anything.
  [[nodiscard]] virtual std::string explain() const { return {}; }
};

/// Whom block() asks, where it is not always recomputed (detail/planned_blocks.hpp).
class BlockPlan {
 public:
  virtual ~BlockPlan() = default;
  [[nodiscard]] virtual BlockChoice began(const std::vector<at::Tensor>& inputs) = 0;
  virtual void ended() noexcept = 0;
};

}  // namespace fourfold::inline v0
