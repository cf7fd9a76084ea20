// SPDX-License-Identifier: Apache-2.0
#pragma once
/// A model's tensors apart from the model: gathered from one, written, read, and given to another
/// in two steps, of which the first may fail and the second changes it.
#include <ATen/ops/zeros.h>
#include <fourfold/core/pointer_map.hpp>
#include <fourfold/torch/parameters.hpp>
#include <fourfold/weights/module_tensors.hpp>
#include <fourfold/weights/payload_formats.hpp>
#include <fourfold/weights/save_format.hpp>

#include <sstream>
#include <unordered_set>

namespace fourfold::inline v0::detail {

struct SavedEntry {
  bool buffer = false;
  std::string name;
  bool packed = false;
  std::uint64_t index = 0;  ///< into payloads or tensors; tied entries have the same
  std::vector<std::int64_t> sizes, strides;
  std::int64_t offset = 0;
};

struct SavedPayload {
  std::string codec;
  at::ScalarType dtype = at::kFloat;
  std::vector<std::int64_t> sizes;
  std::vector<at::Tensor> buffers;
};

struct SavedModel {
  std::vector<SavedEntry> entries;
  std::vector<SavedPayload> payloads;
  std::vector<at::Tensor> tensors;
};

template <class = void>
SavedModel gather(const NamedTensors& parameters, const NamedTensors& buffers) {
  SavedModel saved;
  PointerMap<std::uint64_t> seen;  // payload or TensorImpl -> index
  const auto add = [&](bool buffer, const std::string& name, const at::Tensor& tensor) {
    SavedEntry entry{buffer, name, door::is_packed(tensor), 0, tensor.sizes().vec(), {}, 0};
    if (entry.packed) {
      const auto payload = door::payload_of(tensor);
      const std::uint64_t* known = seen.find(payload.get());
      entry.index = known ? *known : seen.put(payload.get(), saved.payloads.size());
      if (entry.index == saved.payloads.size())
        saved.payloads.push_back(
            {payload->codec(), payload->dtype(), payload->sizes().vec(), payload->buffers()});
      entry.strides = tensor.strides().vec();
      entry.offset = tensor.storage_offset();
    } else {
      TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_meta(),
                  "fourfold::save writes packed and dense tensors, but '", name, "' has layout ",
                  tensor.layout(), " and device ", tensor.device(), "; convert it first");
      const std::uint64_t* known = seen.find(tensor.unsafeGetTensorImpl());
      entry.index = known ? *known : seen.put(tensor.unsafeGetTensorImpl(), saved.tensors.size());
      if (entry.index == saved.tensors.size()) saved.tensors.push_back(tensor);
    }
    saved.entries.push_back(std::move(entry));
  };
  for (const auto& [name, tensor] : parameters) add(false, name, tensor);
  for (const auto& [name, tensor] : buffers) add(true, name, tensor);
  return saved;
}

template <class = void>
void write_body(SaveWriter& out, const SavedModel& saved) {
  out.number(std::uint64_t{saved.entries.size()});
  for (const SavedEntry& entry : saved.entries) {
    out.number(static_cast<std::uint8_t>(entry.buffer));
    out.text(entry.name);
    out.number(static_cast<std::uint8_t>(entry.packed));
    out.number(entry.index);
    out.list(entry.sizes);
    out.list(entry.strides);
    out.number(entry.offset);
  }
  out.number(std::uint64_t{saved.payloads.size()});
  for (const SavedPayload& payload : saved.payloads) {
    out.text(payload.codec);
    out.number(static_cast<std::uint8_t>(payload.dtype));
    out.list(payload.sizes);
    out.number(std::uint64_t{payload.buffers.size()});
    for (const at::Tensor& buffer : payload.buffers) out.tensor(buffer);
  }
  out.number(std::uint64_t{saved.tensors.size()});
  for (const at::Tensor& tensor : saved.tensors) out.tensor(tensor);
}

template <class = void>
void write_model(std::ostream& out, const SavedModel& saved) {
  SaveWriter measure(nullptr);
  write_body(measure, saved);
  out.write(kSaveMagic.data(), static_cast<std::streamsize>(kSaveMagic.size()));
  const std::uint64_t length = measure.written();
  out.write(reinterpret_cast<const char*>(&kSaveVersion), sizeof kSaveVersion);
  out.write(reinterpret_cast<const char*>(&length), sizeof length);
  SaveWriter body(&out);
  write_body(body, saved);
  const std::uint64_t sum = body.checksum();
  out.write(reinterpret_cast<const char*>(&sum), sizeof sum);
  out.flush();
}

template <class = void>
SavedModel read_body(SaveReader& in) {
  SavedModel saved;
  saved.entries.resize(in.count(2 + 5 * 8));
  for (SavedEntry& entry : saved.entries) {
    entry.buffer = in.number<std::uint8_t>() != 0;
    entry.name = in.text();
    entry.packed = in.number<std::uint8_t>() != 0;
    entry.index = in.number<std::uint64_t>();
    entry.sizes = in.sizes();
    entry.strides = in.list();
    entry.offset = in.number<std::int64_t>();
  }
  saved.payloads.resize(in.count(1 + 3 * 8));
  for (SavedPayload& payload : saved.payloads) {
    payload.codec = in.text();
    payload.dtype = in.dtype();
    payload.sizes = in.sizes();
    payload.buffers.resize(in.count(1 + 8));
    for (at::Tensor& buffer : payload.buffers) buffer = in.tensor();
  }
  saved.tensors.resize(in.count(1 + 8));
  for (at::Tensor& tensor : saved.tensors) tensor = in.tensor();
  return saved;
}

/// Reads and checks everything that can be checked without a model.
template <class = void>
SavedModel read_model(std::istream& in, const std::string& what) {
  std::string magic(kSaveMagic.size(), '\0');
  std::uint32_t version = 0;
  std::uint64_t length = 0, sum = 0;
  in.read(magic.data(), static_cast<std::streamsize>(magic.size()));
  magic.resize(static_cast<std::size_t>(in.gcount()));
  const auto read = [&](auto& number) {
    in.read(reinterpret_cast<char*>(&number), sizeof number);
    return in.gcount() == static_cast<std::streamsize>(sizeof number);
  };
  TORCH_CHECK(kSaveMagic.starts_with(magic), what,
              " is not a file of fourfold::save (it does not begin with ", kSaveMagic,
              "); a file of torch::save is loaded by torch::load");
  TORCH_CHECK(read(version), what, " is damaged: it ends too early; load another copy of the file");
  TORCH_CHECK(version >= 1 && version <= kSaveVersion, what, " has version ", version,
              " of the format, and this fourfold reads versions 1 to ", kSaveVersion,
              "; load it with a newer fourfold, or save it again with this one");
  TORCH_CHECK(read(length), what, " is damaged: it ends too early; load another copy of the file");
  SaveReader reader(in, what, length);
  std::istringstream whole;
  const auto here = in.tellg();
  if (here != std::istream::pos_type(-1)) {
    in.seekg(0, std::ios::end);
    const auto rest = static_cast<std::uint64_t>(in.tellg() - here);
    in.seekg(here);
    if (rest < sizeof sum || rest - sizeof sum < length) reader.damaged("it ends too early");
  } else {
    in.clear();  // cannot seek: a length that is a lie must not be allocated
    std::string text, piece(std::size_t{1} << 20, '\0');
    while (in.read(piece.data(), static_cast<std::streamsize>(piece.size())), in.gcount() > 0)
      text.append(piece.data(), static_cast<std::size_t>(in.gcount()));
    if (text.size() < sizeof sum || text.size() - sizeof sum < length)
      reader.damaged("it ends too early");
    whole.str(std::move(text));
  }
  std::istream& body = here != std::istream::pos_type(-1) ? in : whole;
  SaveReader from(body, what, length);
  SavedModel saved = read_body(from);
  if (from.left() != 0) from.damaged("it holds more than it counts");
  body.read(reinterpret_cast<char*>(&sum), sizeof sum);
  if (body.gcount() != static_cast<std::streamsize>(sizeof sum)) from.damaged("it ends too early");
  if (sum != from.checksum()) from.damaged("its checksum does not fit its contents");
  return saved;
}

}  // namespace fourfold::inline v0::detail
