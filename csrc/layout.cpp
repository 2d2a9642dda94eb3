// Strides: which layouts a pointer and two strides can describe, and which have to be copied.
#include "layout.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace batchnorm {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

constexpr int64_t most_dims = 64;        // torch's own limit
constexpr int64_t huge_bytes = 4 << 20;  // an output this large is advised to have huge pages

// torch's own rule for suggest_memory_format(), ambiguous cases included.
bool is_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  if (dims != 4 && dims != 5) return false;
  const auto sizes = x.sizes(), strides = x.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

MemoryFormat format(const Shape& shape, int64_t dims) {
  if (!shape.channels_last) return MemoryFormat::Contiguous;
  return dims == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// The one stride that walks dimensions `first`, 2, 3, ... in order (batch, space or space alone), if there is one. `inner` is
// the stride to use if all of them have one element.
std::optional<int64_t> common_stride(const Tensor& x, bool with_batch, int64_t inner) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::optional<int64_t> stride;
  int64_t walked = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1 || (d == 0 && !with_batch) || sizes[d] == 1) continue;
    if (!stride) stride = strides[d];
    else if (strides[d] != *stride * walked) return std::nullopt;
    walked *= sizes[d];
  }
  return stride.value_or(inner);
}

bool is_expanded(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  for (int64_t d = 0; d < x.dim(); ++d)
    if (sizes[d] != 1 && strides[d] != 0) return false;
  return true;
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), like.get_device_index(), &handle));
  return Tensor(handle);
}

// Large memory comes fresh from the system on every call, and the system clears it page by page as it is written; with pages of
// 2 MiB this takes a third of the time. It is only advice: if the system ignores it, nothing else changes.
void advise_huge_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t page = 2 << 20;
  if (bytes < huge_bytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
void widen(const Tensor& from, std::vector<double>& to) {
  const T* values = static_cast<const T*>(values_of(from, "a vector of the channels"));
  const int64_t stride = from.stride(0);
  if (stride == 1) std::transform(values, values + to.size(), to.begin(), [](T v) { return static_cast<double>(v); });
  else for (size_t c = 0; c < to.size(); ++c) to[c] = static_cast<double>(values[static_cast<int64_t>(c) * stride]);
}

}  // namespace

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "batch norm takes float32, float64, bfloat16 or float16, got ",
                  torch::headeronly::toString(x.scalar_type()), "; convert the input first");
}

const void* values_of(const Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = tensor.storage_offset(), storage_bytes = 0;
  bool empty = false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    empty |= sizes[d] == 0;
    last += (sizes[d] - 1) * strides[d];
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
  STD_TORCH_CHECK(empty || (last + 1) * static_cast<int64_t>(tensor.element_size()) <= storage_bytes, name,
                  " has no memory behind it: its storage of ", storage_bytes, " bytes was freed, or resized");
  return tensor.const_data_ptr();
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, "batch norm takes (N, C, *), got ", x.dim(), " dimension(s)");
  Shape shape;
  shape.batch = x.size(0);
  shape.channels = x.size(1);
  for (int64_t d = 2; d < x.dim(); ++d) shape.space *= x.size(d);
  shape.channels_last = is_channels_last(x);
  return shape;
}

Tensor empty_like(const Tensor& x, const Shape& shape) {
  const int64_t dims = x.dim();
  const auto sizes = x.sizes();
  std::array<int64_t, most_dims> strides;
  STD_TORCH_CHECK(dims <= most_dims, "batch norm takes up to ", most_dims, " dimensions, got ", dims);
  int64_t stride = 1;
  if (shape.channels_last) strides[1] = 1, stride = sizes[1];
  for (int64_t d = dims - 1; d >= 0; --d) {
    if (shape.channels_last && d == 1) continue;
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  const Tensor tensor = empty_strided(sizes.data(), strides.data(), dims, x.scalar_type(), x);
  advise_huge_pages(tensor.mutable_data_ptr(), shape.values() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

Tensor empty_contiguous(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  std::array<int64_t, 3> strides{1, 1, 1};
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes.begin()[d], 1);
  return empty_strided(sizes.begin(), strides.data(), static_cast<int64_t>(sizes.size()), type, like);
}

std::vector<double> channel_values(const std::optional<Tensor>& values, int64_t channels, const char* name) {
  if (!values) return {};
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels, name, " must have one value a channel: expected (",
                  channels, ",), got ", values->numel(), " value(s) in ", values->dim(), " dimension(s)");
  STD_TORCH_CHECK(values->is_cpu(), name, " must be on the CPU, as the input is");
  std::vector<double> out(channels);
  switch (type_of(*values)) {
    case Type::float32: widen<float>(*values, out); break;
    case Type::float64: widen<double>(*values, out); break;
    case Type::bfloat16: widen<torch::headeronly::BFloat16>(*values, out); break;
    case Type::float16: widen<torch::headeronly::Half>(*values, out);
  }
  return out;
}

std::vector<double> parameter_values(const std::optional<Tensor>& values, const Tensor& x, const char* name) {
  const bool low = type_of(x) == Type::bfloat16 || type_of(x) == Type::float16;
  STD_TORCH_CHECK(!values || values->scalar_type() == x.scalar_type() || (low && values->scalar_type() == ScalarType::Float),
                  name, " must have the input's dtype, or be float32 beside one of 16 bits");
  return channel_values(values, x.size(1), name);
}

Operand Operands::add(const Tensor& tensor) {
  // The first operand is x, and only its strides decide how the work is cut: the other operands must not change the bits of
  // its statistics.
  const auto served = view(tensor);
  if (served && first_) shape_.adjacent = adjacent(*served);
  first_ = false;
  if (served && (!shape_.adjacent || adjacent(*served))) return *served;
  if (const auto sample = one_sample(tensor)) return *sample;
  kept_.push_back(torch::stable::contiguous(tensor, format(shape_, tensor.dim())));
  return *view(kept_.back());
}

std::optional<Operand> Operands::view(const Tensor& tensor) const {
  Operand operand;
  operand.data = static_cast<char*>(const_cast<void*>(values_of(tensor, "the input, or a tensor like it,")));
  if (shape_.channels_last || shape_.space == 1) {
    const auto row = common_stride(tensor, /*with_batch=*/true, shape_.channels);
    if (!row || (tensor.stride(1) != 1 && shape_.channels != 1)) return std::nullopt;
    operand.row_stride = *row;
    operand.channel_stride = 1;
  } else {
    if (common_stride(tensor, /*with_batch=*/false, 1) != 1) return std::nullopt;
    operand.row_stride = shape_.batch == 1 ? shape_.channels * shape_.space : tensor.stride(0);
    operand.channel_stride = shape_.channels == 1 ? shape_.space : tensor.stride(1);
  }
  return operand;
}

// A value expanded over the whole tensor, as .sum() gives its gradient: one row of it serves for all.
std::optional<Operand> Operands::one_sample(const Tensor& tensor) {
  if (!is_expanded(tensor) || tensor.size(0) < 2) return std::nullopt;
  const bool rows = shape_.channels_last || shape_.space == 1;
  if (rows && shape_.channels < max_width / 2) return std::nullopt;  // rows are joined there, and must follow each other
  Tensor view = tensor;
  const Tensor sample = torch::stable::contiguous(torch::stable::narrow(view, 0, 0, 1), format(shape_, tensor.dim()));
  Operand operand{static_cast<char*>(const_cast<void*>(sample.const_data_ptr())), 0, rows ? 1 : shape_.space};
  kept_.push_back(sample);
  return operand;
}

bool Operands::adjacent(const Operand& operand) const {
  const bool rows = shape_.channels_last || shape_.space == 1;
  return rows ? operand.row_stride == shape_.channels : operand.channel_stride == shape_.space;
}

const bool* Operands::add_mask(const std::optional<Tensor>& mask, const Tensor& x) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool, got ",
                  torch::headeronly::toString(mask->scalar_type()), "; True marks the samples that count");
  STD_TORCH_CHECK(mask->is_cpu(), "mask must be on the CPU, as the input is");
  std::vector<int64_t> sizes{x.size(0)};
  for (int64_t d = 2; d < x.dim(); ++d) sizes.push_back(x.size(d));
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(*mask),
      torch::stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size())),
      torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  values_of(*mask, "mask");
  kept_.push_back(torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0])));
  shape_.masked = true;
  first_ = false;  // what is masked is served, or copied, as if its rows followed each other
  // A tensor that was viewed as bool may have bytes other than 0 and 1. They are True, but would be counted more than once.
  const auto* bytes = static_cast<const uint8_t*>(kept_.back().const_data_ptr());
  const int64_t samples = shape_.batch * shape_.space;
  uint8_t all = 0;
  for (int64_t i = 0; i < samples; ++i) all |= bytes[i];
  if (all > 1) {
    const Tensor flags = empty_contiguous(x, {samples}, ScalarType::Bool);
    std::transform(bytes, bytes + samples, static_cast<uint8_t*>(flags.mutable_data_ptr()),
                   [](uint8_t byte) { return static_cast<uint8_t>(byte != 0); });
    kept_.push_back(flags);
  }
  return static_cast<const bool*>(kept_.back().const_data_ptr());
}

}  // namespace batchnorm
