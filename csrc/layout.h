// Tensors as operands: which strides are served as they are, and the copies for those that are not.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "batch_norm.h"

namespace batchnorm {

using torch::stable::Tensor;

Type type_of(const Tensor& x);
// Where its values are; raises if its storage was freed, or cut shorter than its strides reach.
const void* values_of(const Tensor& tensor, const char* name);
Shape shape_of(const Tensor& x);

// An uninitialized tensor like x, in the memory format torch suggests for it: channels last if x is, else contiguous.
Tensor empty_like(const Tensor& x, const Shape& shape);
Tensor empty_contiguous(const Tensor& like, std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type);
std::vector<double> channel_values(const std::optional<Tensor>& values, int64_t channels, const char* name);
std::vector<double> parameter_values(const std::optional<Tensor>& values, const Tensor& x, const char* name);

// Turns tensors, which outlive it, into operands, and keeps copies alive where some had to be made.
class Operands {
 public:
  explicit Operands(Shape& shape) : shape_(shape) {}
  Operand add(const Tensor& tensor);
  Operand add(const std::optional<Tensor>& tensor) { return tensor ? add(*tensor) : Operand{}; }
  const bool* add_mask(const std::optional<Tensor>& mask, const Tensor& x);

 private:
  std::optional<Operand> view(const Tensor& tensor) const;
  std::optional<Operand> one_sample(const Tensor& tensor);
  bool adjacent(const Operand& operand) const;

  Shape& shape_;
  bool first_ = true;
  std::vector<Tensor> kept_;
};

}  // namespace batchnorm
