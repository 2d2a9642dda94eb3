// What PyTorch's dispatcher sees: schemas, argument checks, allocation. Everything is checked before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "batch_norm.h"
#include "layout.h"

namespace batchnorm::ops {
namespace {

using Optional = std::optional<Tensor>;
using torch::headeronly::ScalarType;

void check_like(const Optional& tensor, const Tensor& x, const char* name) {
  if (!tensor) return;
  const auto a = tensor->sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, " must have the input's shape");
  STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), name, " must have the input's dtype ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor->scalar_type()));
  STD_TORCH_CHECK(tensor->is_cpu(), name, " must be on the CPU, as the input is");
}

const double* doubles(const Tensor& values, int64_t channels, const char* name) {
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Double && values.dim() == 1 && values.size(0) == channels &&
                      values.is_contiguous() && values.is_cpu(),
                  name, " must be float64, contiguous, with one value for each of ", channels, " channels");
  return static_cast<const double*>(values.const_data_ptr());
}
const double* doubles(const Optional& values, int64_t channels, const char* name) {
  return values ? doubles(*values, channels, name) : nullptr;
}

double* out(const Tensor& channels) { return static_cast<double*>(channels.mutable_data_ptr()); }

Tensor zeros(const Tensor& x) {
  const Tensor values = empty_channels(x);
  std::fill_n(out(values), x.size(1), 0.0);
  return values;
}

// A call's arguments, checked and turned into a problem; its outputs are added by the operator.
struct Call {
  Call(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual, int64_t activation,
       double slope, const Optional& mask = std::nullopt, const Optional& dy = std::nullopt,
       const Optional& y = std::nullopt)
      : x(x) {
    STD_TORCH_CHECK(x.is_cpu(), "the input must be on the CPU");
    STD_TORCH_CHECK(0 <= activation && activation < activation_count, "there is no activation number ", activation);
    check_like(residual, x, "residual");
    check_like(dy, x, "the gradient");
    check_like(y, x, "y");
    problem.type = type_of(x);
    problem.shape = shape_of(x);
    problem.weight = channel_values(weight, channels(), "weight");
    problem.bias = channel_values(bias, channels(), "bias");
    problem.activation = static_cast<Activation>(activation);
    problem.slope = slope;
    if (empty()) return;
    problem.x = operands.add(x);
    problem.residual = operands.add(residual);
    problem.dy = operands.add(dy);
    problem.y = operands.add(y);
    problem.mask = operands.add_mask(mask, x);
  }
  Call(const Call&) = delete;

  int64_t channels() const { return problem.shape.channels; }
  bool empty() const { return problem.shape.values() == 0; }

  Tensor output(Operand& operand) {
    Tensor tensor = empty_like(x, problem.shape);
    if (!empty()) operand = operands.add(tensor);
    return tensor;
  }
  Tensor output_if(bool wanted, Operand& operand) {
    if (wanted) return output(operand);
    const int64_t none = 0;
    return torch::stable::new_empty(x, {&none, 1});
  }

  const Tensor& x;
  Problem problem;
  Operands operands{problem.shape};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, Optional residual,
                                                   double eps, int64_t activation, double slope) {
  Call call(x, weight, bias, residual, activation, slope);
  const Tensor y = call.output(call.problem.y), mean = zeros(x), m2 = zeros(x), rstd = zeros(x);
  if (!call.empty()) batchnorm::forward(call.problem, eps, out(mean), out(m2), out(rstd));
  else std::fill_n(out(rstd), call.channels(), 1 / std::sqrt(eps));
  return {y, mean, m2, rstd};
}

std::tuple<Tensor, Tensor, Tensor> infer(Tensor x, Tensor running_mean, Tensor running_var, Optional weight,
                                         Optional bias, Optional residual, double eps, int64_t activation, double slope) {
  Call call(x, weight, bias, residual, activation, slope);
  const std::vector<double> means = channel_values(running_mean, call.channels(), "running_mean");
  const std::vector<double> variances = channel_values(running_var, call.channels(), "running_var");
  const Tensor y = call.output(call.problem.y), mean = empty_channels(x), rstd = empty_channels(x);
  std::copy(means.begin(), means.end(), out(mean));
  std::transform(variances.begin(), variances.end(), out(rstd), [&](double v) { return 1 / std::sqrt(v + eps); });
  if (!call.empty()) batchnorm::normalize(call.problem, out(mean), out(rstd));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> measure(Tensor x, Optional mask) {
  Call call(x, {}, {}, {}, 0, 0, mask);
  const Tensor mean = zeros(x), m2 = zeros(x);
  const Tensor count = torch::stable::new_empty(x, {}, ScalarType::Long);
  int64_t& n = *static_cast<int64_t*>(count.mutable_data_ptr());
  n = 0;
  if (!call.empty()) batchnorm::measure(call.problem, n, out(mean), out(m2));
  else if (call.channels() == 0) n = call.problem.shape.batch * call.problem.shape.space;
  return {count, mean, m2};
}

Tensor normalize(Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias, Optional residual, Optional mask,
                 int64_t activation, double slope) {
  Call call(x, weight, bias, residual, activation, slope, mask);
  const double *means = doubles(mean, call.channels(), "mean"), *rstds = doubles(rstd, call.channels(), "rstd");
  const Tensor y = call.output(call.problem.y);
  if (!call.empty()) batchnorm::normalize(call.problem, means, rstds);
  return y;
}

std::tuple<Tensor, Tensor> reduce(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
                                  Optional residual, Optional y, Optional mask, int64_t activation, double slope) {
  Call call(x, weight, bias, residual, activation, slope, mask, dy, y);
  const double *means = doubles(mean, call.channels(), "mean"), *rstds = doubles(rstd, call.channels(), "rstd");
  const Tensor sum_dz = zeros(x), sum_dz_xhat = zeros(x);
  if (!call.empty()) batchnorm::reduce(call.problem, means, rstds, out(sum_dz), out(sum_dz_xhat));
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> apply(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Optional weight, Optional bias,
                                 Optional residual, Optional y, Optional mask, Optional mean_dz, Optional mean_dz_xhat,
                                 int64_t activation, double slope, bool need_dx, bool need_dresidual) {
  Call call(x, weight, bias, residual, activation, slope, mask, dy, y);
  const double *means = doubles(mean, call.channels(), "mean"), *rstds = doubles(rstd, call.channels(), "rstd");
  const double* mean_dzs = doubles(mean_dz, call.channels(), "mean_dz");
  const double* mean_dz_xhats = doubles(mean_dz_xhat, call.channels(), "mean_dz_xhat");
  const Tensor dx = call.output_if(need_dx, call.problem.dx);
  const Tensor dresidual = call.output_if(need_dresidual, call.problem.dresidual);
  call.problem.through_mean = mean_dzs || mean_dz_xhats;
  if (!call.empty() && (need_dx || need_dresidual)) batchnorm::apply(call.problem, means, rstds, mean_dzs, mean_dz_xhats);
  return {dx, dresidual};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Optional weight,
                                                    Optional bias, Optional residual, Optional y, int64_t activation,
                                                    double slope, bool training, bool need_dx, bool need_dresidual) {
  Call call(x, weight, bias, residual, activation, slope, std::nullopt, dy, y);
  const double *means = doubles(mean, call.channels(), "mean"), *rstds = doubles(rstd, call.channels(), "rstd");
  const Tensor dx = call.output_if(need_dx, call.problem.dx);
  const Tensor dresidual = call.output_if(need_dresidual, call.problem.dresidual);
  const Tensor sum_dz = zeros(x), sum_dz_xhat = zeros(x);
  call.problem.through_mean = training;
  if (!call.empty()) batchnorm::backward(call.problem, means, rstds, out(sum_dz), out(sum_dz_xhat));
  return {dx, dresidual, sum_dz, sum_dz_xhat};
}

template <class T>
void move_towards(const Tensor& running, double momentum, const double* values, double scale) {
  T* data = static_cast<T*>(running.mutable_data_ptr());
  const int64_t stride = running.stride(0);
  for (int64_t c = 0; c < running.size(0); ++c) {
    T& value = data[c * stride];
    value = static_cast<T>((1 - momentum) * static_cast<double>(value) + momentum * (values[c] * scale));
  }
}

void check_running(const Optional& running, int64_t channels, const char* name) {
  if (!running) return;
  STD_TORCH_CHECK(running->dim() == 1 && running->size(0) == channels, name, " must have one value for each of ", channels,
                  " channels");
  STD_TORCH_CHECK(running->is_cpu() && (running->scalar_type() == ScalarType::Float ||
                                        running->scalar_type() == ScalarType::Double),
                  name, " must be float32 or float64, on the CPU");
}

void move_towards(const Optional& running, double momentum, const double* values, double scale) {
  if (!running) return;
  if (running->scalar_type() == ScalarType::Float) move_towards<float>(*running, momentum, values, scale);
  else move_towards<double>(*running, momentum, values, scale);
}

// What was not measured moves nothing: no value has no mean, and one value has no unbiased variance.
void update_running(Optional running_mean, Optional running_var, Tensor count, Tensor mean, Tensor m2, double momentum) {
  const int64_t channels = mean.numel();
  const double *means = doubles(mean, channels, "mean"), *m2s = doubles(m2, channels, "m2");
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == 1, "count must be one int64");
  check_running(running_mean, channels, "running_mean");
  check_running(running_var, channels, "running_var");
  const int64_t n = *static_cast<const int64_t*>(count.const_data_ptr());
  if (n == 0) return;
  move_towards(running_mean, momentum, means, 1);
  if (n > 1) move_towards(running_var, momentum, m2s, 1 / static_cast<double>(n - 1));
}

int64_t vector_bytes() { return batchnorm::vector_bytes(); }

}  // namespace
}  // namespace batchnorm::ops

STABLE_TORCH_LIBRARY(batchnorm, library) {
  library.def(
      "forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int act, float slope) -> "
      "(Tensor y, Tensor mean, Tensor m2, Tensor rstd)");
  library.def(
      "infer(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
      "int act, float slope) -> (Tensor y, Tensor mean, Tensor rstd)");
  library.def("measure(Tensor x, Tensor? mask) -> (Tensor count, Tensor mean, Tensor m2)");
  library.def(
      "normalize(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "int act, float slope) -> Tensor");
  library.def(
      "reduce(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, "
      "Tensor? mask, int act, float slope) -> (Tensor sum_dz, Tensor sum_dz_xhat)");
  library.def(
      "apply(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, "
      "Tensor? mask, Tensor? mean_dz, Tensor? mean_dz_xhat, int act, float slope, bool need_dx, bool need_dresidual) -> "
      "(Tensor dx, Tensor dresidual)");
  library.def(
      "backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? y, "
      "int act, float slope, bool training, bool need_dx, bool need_dresidual) -> "
      "(Tensor dx, Tensor dresidual, Tensor sum_dz, Tensor sum_dz_xhat)");
  library.def(
      "update_running_(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor count, Tensor mean, Tensor m2, "
      "float momentum) -> ()");
  library.def("vector_bytes() -> int");  // of the registers in use
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CompositeExplicitAutograd, library) {
  library.impl("vector_bytes", TORCH_BOX(&batchnorm::ops::vector_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, library) {
  library.impl("forward", TORCH_BOX(&batchnorm::ops::forward));
  library.impl("infer", TORCH_BOX(&batchnorm::ops::infer));
  library.impl("measure", TORCH_BOX(&batchnorm::ops::measure));
  library.impl("normalize", TORCH_BOX(&batchnorm::ops::normalize));
  library.impl("reduce", TORCH_BOX(&batchnorm::ops::reduce));
  library.impl("apply", TORCH_BOX(&batchnorm::ops::apply));
  library.impl("backward", TORCH_BOX(&batchnorm::ops::backward));
  library.impl("update_running_", TORCH_BOX(&batchnorm::ops::update_running));
}
