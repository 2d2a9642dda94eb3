// The CPU's implementations of the operators that ops/schema.py defines: argument checks, allocation. Everything is checked
// before anything is written.
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

// What is measured, one row each; and what backward reduces.
enum StatisticsRow { count_row, mean_row, m2_row, statistics_rows };
enum SumsRow { dz_row, dz_xhat_row, sums_rows };

void check_like(const Optional& tensor, const Tensor& x, const char* name) {
  if (!tensor) return;
  const auto a = tensor->sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, " must have the input's shape");
  STD_TORCH_CHECK(tensor->scalar_type() == x.scalar_type(), name, " must have the input's dtype ",
                  torch::headeronly::toString(x.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor->scalar_type()));
  STD_TORCH_CHECK(tensor->is_cpu(), name, " must be on the CPU, as the input is");
}

// A call's arguments, checked and turned into a problem; its outputs are added by the operator. The batch may be cut into
// virtual batches of `virtual_batch` items, the last one with the remainder: each is a separate problem.
struct Call {
  Call(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual, const Optional& mask,
       int64_t activation, double slope, int64_t virtual_batch, const Optional& dy = std::nullopt,
       const Optional& y = std::nullopt)
      : x(x) {
    STD_TORCH_CHECK(x.is_cpu(), "the input must be on the CPU");
    STD_TORCH_CHECK(0 <= activation && activation < activation_count, "there is no activation number ", activation);
    STD_TORCH_CHECK(virtual_batch >= 0, "a virtual batch has at least one item, got ", virtual_batch);
    check_like(residual, x, "residual");
    check_like(dy, x, "the gradient");
    check_like(y, x, "y");
    problem.type = type_of(x);
    problem.shape = shape_of(x);
    problem.weight = parameter_values(weight, x, "weight");
    problem.bias = parameter_values(bias, x, "bias");
    problem.activation = static_cast<Activation>(activation);
    problem.slope = slope;
    cut = virtual_batch > 0;
    items = cut ? std::min(virtual_batch, std::max<int64_t>(problem.shape.batch, 1)) : problem.shape.batch;
    groups = cut ? (problem.shape.batch + items - 1) / items : 1;
    // One value has no variance: a remainder of one joins the virtual batch before it.
    if (groups > 1 && items > 1 && problem.shape.batch % items == 1 && problem.shape.space == 1) --groups;
    problem.mask = operands.add_mask(mask, x);
    if (empty()) return;
    problem.x = operands.add(x);
    problem.residual = operands.add(residual);
    problem.dy = operands.add(dy);
    problem.y = operands.add(y);
  }
  Call(const Call&) = delete;

  int64_t channels() const { return problem.shape.channels; }
  bool empty() const { return problem.shape.values() == 0; }
  bool has_lonely_values() const { return channels() > 0 && std::min(items, problem.shape.batch) * problem.shape.space == 1; }

  Tensor output(Operand& operand) {
    Tensor tensor = empty_like(x, problem.shape);
    if (!empty()) operand = operands.add(tensor);
    return tensor;
  }
  Tensor output_if(bool wanted, Operand& operand) { return wanted ? output(operand) : Tensor(); }

  // (rows, C), or (rows, G, C) where the batch is cut; all 0.
  Tensor rows(int64_t count) const {
    Tensor tensor = cut ? empty_contiguous(x, {count, groups, channels()}, ScalarType::Double)
                        : empty_contiguous(x, {count, channels()}, ScalarType::Double);
    std::fill_n(static_cast<double*>(tensor.mutable_data_ptr()), count * groups * channels(), 0.0);
    return tensor;
  }
  const double* rows(const Tensor& tensor, int64_t count, const char* name) const {
    const int64_t dims = cut ? 3 : 2;
    const bool fits = tensor.dim() == dims && tensor.size(0) == count && (!cut || tensor.size(1) == groups) &&
                      tensor.size(dims - 1) == channels();
    STD_TORCH_CHECK(fits && tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.is_cpu(), name,
                    " must be float64, contiguous, with ", count, " rows for each of ", groups, " virtual batch(es) and ",
                    channels(), " channels");
    return static_cast<const double*>(values_of(tensor, name));
  }
  double* rows(const Tensor& tensor) const { return static_cast<double*>(tensor.mutable_data_ptr()); }
  template <class T>
  T* row(T* rows, int64_t row, int64_t group) const {
    return rows + (row * groups + group) * channels();
  }

  // f(one virtual batch's problem, its number).
  template <class F>
  void each_group(F f) const {
    if (empty()) return;
    if (!cut) return f(problem, 0);
    for (int64_t g = 0; g < groups; ++g) f(group(g), g);
  }

  const Tensor& x;
  Problem problem;
  Operands operands{problem.shape};
  bool cut = false;
  int64_t items = 0, groups = 1;

 private:
  Problem group(int64_t g) const {
    Problem part = problem;
    const int64_t first = g * items, space = problem.shape.space;
    part.shape.batch = g + 1 < groups ? items : problem.shape.batch - first;
    const int64_t rows = first * (problem.shape.channels_last ? space : 1);  // of an operand
    const int64_t value_bytes = x.element_size();
    for (Operand* operand : {&part.x, &part.residual, &part.y, &part.dy, &part.dx, &part.dresidual})
      if (operand->data) operand->data += rows * operand->row_stride * value_bytes;
    if (part.mask) part.mask += first * space;
    return part;
  }
};

double count(const Problem& p) {
  const int64_t samples = p.shape.batch * p.shape.space;
  return static_cast<double>(p.mask ? count_set(p.mask, samples) : samples);
}

// 1 / sqrt(variance + eps) of every virtual batch's channels.
std::vector<double> rstds(const Call& call, const double* statistics, double eps) {
  const int64_t values = call.groups * call.channels();
  const double *counts = call.row(statistics, count_row, 0), *m2s = call.row(statistics, m2_row, 0);
  std::vector<double> out(values);
  for (int64_t i = 0; i < values; ++i) out[i] = 1 / std::sqrt(m2s[i] / std::max(counts[i], 1.0) + eps);
  return out;
}

void check_measures(const Call& call, bool masked, double eps) {
  STD_TORCH_CHECK(!(eps <= 0), "eps must be positive where the batch is measured, got ", eps);
  STD_TORCH_CHECK(masked || !call.has_lonely_values(), "one value in a channel has no variance");
}

std::tuple<Tensor, Tensor> measure_and_normalize(Call& call, double eps) {
  const Tensor y = call.output(call.problem.y);
  Tensor statistics = call.rows(statistics_rows);
  double* rows = call.rows(statistics);
  std::vector<double> rstd(call.channels());
  call.each_group([&](const Problem& p, int64_t g) {
    std::fill_n(call.row(rows, count_row, g), call.channels(), count(p));
    batchnorm::forward(p, eps, call.row(rows, mean_row, g), call.row(rows, m2_row, g), rstd.data());
  });
  return {y, statistics};
}

std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, double eps, int64_t activation, double slope,
                                   Optional residual, Optional mask, int64_t virtual_batch) {
  Call call(x, weight, bias, residual, mask, activation, slope, virtual_batch);
  check_measures(call, mask.has_value(), eps);
  return measure_and_normalize(call, eps);
}

std::tuple<Tensor, Tensor> infer(Tensor x, Tensor running_mean, Tensor running_var, Optional weight, Optional bias,
                                 double eps, int64_t activation, double slope, Optional residual, Optional mask, bool keep) {
  Call call(x, weight, bias, residual, mask, activation, slope, 0);
  STD_TORCH_CHECK(!(eps < 0), "eps must not be negative, got ", eps);
  const std::vector<double> mean = channel_values(running_mean, call.channels(), "running_mean");
  std::vector<double> variance = channel_values(running_var, call.channels(), "running_var");
  const Tensor y = call.output(call.problem.y);
  Tensor statistics;
  if (keep) {  // as m2 with a count of 0: see rstds
    statistics = call.rows(statistics_rows);
    std::copy(mean.begin(), mean.end(), call.row(call.rows(statistics), mean_row, 0));
    std::copy(variance.begin(), variance.end(), call.row(call.rows(statistics), m2_row, 0));
  }
  std::transform(variance.begin(), variance.end(), variance.begin(), [&](double v) { return 1 / std::sqrt(v + eps); });
  if (!call.empty()) batchnorm::normalize(call.problem, mean.data(), variance.data());
  return {y, statistics};
}

Tensor measure(Tensor x, Optional mask, int64_t virtual_batch) {
  Call call(x, {}, {}, {}, mask, 0, 0, virtual_batch);
  Tensor statistics = call.rows(statistics_rows);
  double* rows = call.rows(statistics);
  call.each_group([&](const Problem& p, int64_t g) {
    int64_t n = 0;
    batchnorm::measure(p, n, call.row(rows, mean_row, g), call.row(rows, m2_row, g));
    std::fill_n(call.row(rows, count_row, g), call.channels(), static_cast<double>(n));
  });
  return statistics;
}

Tensor normalize(Tensor x, Tensor statistics, Optional weight, Optional bias, double eps, int64_t activation, double slope,
                 Optional residual, Optional mask, int64_t virtual_batch) {
  Call call(x, weight, bias, residual, mask, activation, slope, virtual_batch);
  const double* rows = call.rows(statistics, statistics_rows, "statistics");
  const std::vector<double> rstd = rstds(call, rows, eps);
  const Tensor y = call.output(call.problem.y);
  call.each_group([&](const Problem& p, int64_t g) {
    batchnorm::normalize(p, call.row(rows, mean_row, g), call.row(rstd.data(), 0, g));
  });
  return y;
}

Tensor reduce(Tensor dy, Tensor x, Tensor statistics, Optional weight, Optional bias, double eps, int64_t activation,
              double slope, Optional residual, Optional y, Optional mask, int64_t virtual_batch) {
  Call call(x, weight, bias, residual, mask, activation, slope, virtual_batch, dy, y);
  const double* rows = call.rows(statistics, statistics_rows, "statistics");
  const std::vector<double> rstd = rstds(call, rows, eps);
  Tensor sums = call.rows(sums_rows);
  double* out = call.rows(sums);
  call.each_group([&](const Problem& p, int64_t g) {
    batchnorm::reduce(p, call.row(rows, mean_row, g), call.row(rstd.data(), 0, g), call.row(out, dz_row, g),
                      call.row(out, dz_xhat_row, g));
  });
  return sums;
}

std::tuple<Tensor, Tensor> apply(Tensor dy, Tensor x, Tensor statistics, Optional sums, Optional weight, Optional bias,
                                 double eps, int64_t activation, double slope, Optional residual, Optional y, Optional mask,
                                 int64_t virtual_batch, bool need_dx, bool need_dresidual) {
  Call call(x, weight, bias, residual, mask, activation, slope, virtual_batch, dy, y);
  const double* rows = call.rows(statistics, statistics_rows, "statistics");
  const double* totals = sums ? call.rows(*sums, sums_rows, "sums") : nullptr;
  const std::vector<double> rstd = rstds(call, rows, eps);
  const Tensor dx = call.output_if(need_dx, call.problem.dx);
  const Tensor dresidual = call.output_if(need_dresidual, call.problem.dresidual);
  call.problem.through_mean = sums.has_value();
  if (!need_dx && !need_dresidual) return {dx, dresidual};
  std::vector<double> means(sums_rows * call.channels());
  call.each_group([&](const Problem& p, int64_t g) {
    for (int64_t c = 0; totals && c < call.channels(); ++c) {
      const double n = std::max(call.row(rows, count_row, g)[c], 1.0);
      means[c] = call.row(totals, dz_row, g)[c] / n;
      means[c + call.channels()] = call.row(totals, dz_xhat_row, g)[c] / n;
    }
    batchnorm::apply(p, call.row(rows, mean_row, g), call.row(rstd.data(), 0, g), means.data(),
                     means.data() + call.channels());
  });
  return {dx, dresidual};
}

template <class T>
void sum_groups(const Call& call, const double* sums, SumsRow row, T* out) {
  for (int64_t c = 0; c < call.channels(); ++c) {
    double total = 0;
    for (int64_t g = 0; g < call.groups; ++g) total += call.row(sums, row, g)[c];
    out[c] = static_cast<T>(total);
  }
}

// The parameter's gradient: the sums of all virtual batches, in its dtype.
Tensor gradient_of(const Optional& parameter, const Call& call, const double* sums, SumsRow row) {
  if (!parameter) return Tensor();
  const Tensor out = empty_contiguous(call.x, {call.channels()}, parameter->scalar_type());
  void* data = out.mutable_data_ptr();
  switch (type_of(*parameter)) {
    case Type::float32: sum_groups(call, sums, row, static_cast<float*>(data)); break;
    case Type::float64: sum_groups(call, sums, row, static_cast<double*>(data)); break;
    case Type::bfloat16: sum_groups(call, sums, row, static_cast<torch::headeronly::BFloat16*>(data)); break;
    case Type::float16: sum_groups(call, sums, row, static_cast<torch::headeronly::Half*>(data)); break;
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor statistics, Optional weight, Optional bias,
                                                    double eps, int64_t activation, double slope, Optional residual,
                                                    Optional y, Optional mask, int64_t virtual_batch, bool measured,
                                                    bool need_dx, bool need_dresidual) {
  Call call(x, weight, bias, residual, mask, activation, slope, virtual_batch, dy, y);
  const double* rows = call.rows(statistics, statistics_rows, "statistics");
  const std::vector<double> rstd = rstds(call, rows, eps);
  const Tensor dx = call.output_if(need_dx, call.problem.dx);
  const Tensor dresidual = call.output_if(need_dresidual, call.problem.dresidual);
  std::vector<double> sums(sums_rows * call.groups * call.channels());
  call.problem.through_mean = measured;
  call.each_group([&](const Problem& p, int64_t g) {
    batchnorm::backward(p, call.row(rows, mean_row, g), call.row(rstd.data(), 0, g), call.row(sums.data(), dz_row, g),
                        call.row(sums.data(), dz_xhat_row, g));
  });
  return {dx, dresidual, gradient_of(weight, call, sums.data(), dz_xhat_row), gradient_of(bias, call, sums.data(), dz_row)};
}

void check_running(const Tensor& running, int64_t channels, const char* name) {
  STD_TORCH_CHECK(running.dim() == 1 && running.size(0) == channels, name, " must have one value for each of ", channels,
                  " channels");
  STD_TORCH_CHECK(running.is_cpu(), name, " must be on the CPU, as the input is");
  type_of(running);
  values_of(running, name);
}

// running = (1 - momentum) * running + momentum * measured(c), where there is such a value.
template <class T, class F>
void move_values(const Tensor& running, double momentum, F measured) {
  T* data = static_cast<T*>(running.mutable_data_ptr());
  const int64_t stride = running.stride(0);
  for (int64_t c = 0; c < running.size(0); ++c) {
    T& value = data[c * stride];
    if (const std::optional<double> target = measured(c))
      value = static_cast<T>((1 - momentum) * static_cast<double>(value) + momentum * *target);
  }
}
template <class F>
void move_towards(const Tensor& running, double momentum, F measured) {
  switch (type_of(running)) {
    case Type::float32: return move_values<float>(running, momentum, measured);
    case Type::float64: return move_values<double>(running, momentum, measured);
    case Type::bfloat16: return move_values<torch::headeronly::BFloat16>(running, momentum, measured);
    case Type::float16: return move_values<torch::headeronly::Half>(running, momentum, measured);
  }
}

// Channels without a measurement do not move: no values have no mean, and one value has no unbiased variance.
void move(const Tensor& running_mean, const Tensor& running_var, const double* rows, double momentum, bool unbiased,
          bool skip_nonfinite) {
  const int64_t channels = running_mean.size(0);
  const double *counts = rows + count_row * channels, *means = rows + mean_row * channels, *m2s = rows + m2_row * channels;
  const auto counts_at_least = [&](int64_t c, double least) {
    return counts[c] >= least && !(skip_nonfinite && !(std::isfinite(means[c]) && std::isfinite(m2s[c])));
  };
  const double missing = unbiased ? 1 : 0;
  move_towards(running_mean, momentum,
               [&](int64_t c) { return counts_at_least(c, 1) ? std::optional(means[c]) : std::nullopt; });
  move_towards(running_var, momentum, [&](int64_t c) {
    return counts_at_least(c, 1 + missing) ? std::optional(m2s[c] / (counts[c] - missing)) : std::nullopt;
  });
}

void update_running(Tensor running_mean, Tensor running_var, Tensor statistics, double momentum, bool unbiased,
                    bool skip_nonfinite) {
  STD_TORCH_CHECK(statistics.dim() == 2 && statistics.size(0) == statistics_rows &&
                      statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() && statistics.is_cpu(),
                  "statistics must be float64, contiguous, (3, channels)");
  const int64_t channels = statistics.size(1);
  check_running(running_mean, channels, "running_mean");
  check_running(running_var, channels, "running_var");
  move(running_mean, running_var, static_cast<const double*>(values_of(statistics, "statistics")), momentum, unbiased,
       skip_nonfinite);
}

std::tuple<Tensor, Tensor> forward_and_update(Tensor x, Optional weight, Optional bias, double eps, Optional running_mean,
                                              Optional running_var, Optional batches, double momentum, int64_t activation,
                                              double slope, Optional residual, Optional mask, bool unbiased,
                                              bool skip_nonfinite) {
  Call call(x, weight, bias, residual, mask, activation, slope, 0);
  check_measures(call, mask.has_value(), eps);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var go together");
  if (running_mean) {
    check_running(*running_mean, call.channels(), "running_mean");
    check_running(*running_var, call.channels(), "running_var");
  }
  int64_t* counter = nullptr;
  if (batches) {
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long && batches->numel() == 1 && batches->is_cpu(),
                    "batches must be one int64 on the CPU");
    counter = static_cast<int64_t*>(const_cast<void*>(values_of(*batches, "batches")));
  }
  const std::tuple<Tensor, Tensor> result = measure_and_normalize(call, eps);
  if (running_mean) move(*running_mean, *running_var, call.rows(std::get<1>(result)), momentum, unbiased, skip_nonfinite);
  if (counter) ++*counter;
  return result;
}

int64_t vector_bytes() { return batchnorm::vector_bytes(); }

}  // namespace
}  // namespace batchnorm::ops

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
  library.impl("forward_", TORCH_BOX(&batchnorm::ops::forward_and_update));
}
