// The passes of csrc/ without torch: reads cases from the standard input and writes what it computes to the standard output, both
// as problems.py says. So another CPU's bits are compared with those of the operators.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "batch_norm.h"
#include "strips.h"

namespace {

using namespace batchnorm;

struct Header {
  int64_t type, batch, channels, space, channels_last, gap, offset, activation, residual, mask, from_y;
  double slope, eps;
};

// Memory that begins `offset` bytes after a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t offset = 0) : bytes_(bytes), memory_(bytes + offset + 2 * line_bytes) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (line_bytes - address % line_bytes) % line_bytes + offset;
  }
  template <class T = char>
  T* data() {
    return reinterpret_cast<T*>(data_);
  }
  Buffer& read() {
    if (std::fread(data_, 1, bytes_, stdin) != static_cast<size_t>(bytes_)) std::exit(2);  // the input ends in a case
    return *this;
  }
  void write() { std::fwrite(data_, 1, bytes_, stdout); }

 private:
  int64_t bytes_;
  std::vector<char> memory_;
  char* data_;
};

class Case {
 public:
  explicit Case(const Header& header) : h_(header) {
    p_.type = type();
    p_.shape = {h_.batch, h_.channels, h_.space, h_.channels_last != 0, /*adjacent=*/h_.gap == 0, /*masked=*/h_.mask != 0};
    p_.activation = static_cast<Activation>(h_.activation);
    p_.slope = h_.slope;
    p_.weight.assign(weight_.read().data<double>(), weight_.data<double>() + h_.channels);
    p_.bias.assign(bias_.read().data<double>(), bias_.data<double>() + h_.channels);
    if (h_.mask) p_.mask = mask_.read().data<bool>();
    p_.x = operand(x_.read(), h_.gap);
    dy_.read();
    if (h_.residual) p_.residual = operand(residual_.read(), h_.gap);
  }

  void run() {
    Problem forwards = p_;
    forwards.y = operand(y_, 0);
    forward(forwards, h_.eps, row(0), row(1), rstd());
    y_.write();
    statistics_.write();

    int64_t n = 0;
    Buffer measured(2 * channel_bytes_), again(extent(0), offset_);
    measure(p_, n, measured.data<double>(), measured.data<double>() + h_.channels);
    measured.write();
    forwards.y = operand(again, 0);
    normalize(forwards, row(0), rstd());
    again.write();

    Buffer sums(2 * channel_bytes_), means(2 * channel_bytes_);
    double *sum = sums.data<double>(), *mean = means.data<double>();
    reduce(backwards(true), row(0), rstd(), sum, sum + h_.channels);
    sums.write();
    for (int64_t c = 0; c < 2 * h_.channels; ++c) mean[c] = sum[c] / static_cast<double>(std::max<int64_t>(n, 1));
    apply(backwards(true), row(0), rstd(), mean, mean + h_.channels);
    write_gradients();
    for (const bool through_mean : {true, false}) {
      backward(backwards(through_mean), row(0), rstd(), sum, sum + h_.channels);
      write_gradients();
    }
  }

 private:
  Type type() const { return static_cast<Type>(h_.type); }
  bool rows() const { return h_.channels_last || h_.space == 1; }
  int64_t extent(int64_t gap) const {
    const int64_t values = rows() ? h_.batch * h_.space * (h_.channels + gap) : h_.batch * h_.channels * (h_.space + gap);
    return values * value_bytes(type());
  }
  Operand operand(Buffer& buffer, int64_t gap) const {
    if (rows()) return {buffer.data(), h_.channels + gap, 1};
    return {buffer.data(), h_.channels * (h_.space + gap), h_.space + gap};
  }
  double* row(int64_t i) { return statistics_.data<double>() + i * h_.channels; }
  double* rstd() { return rstd_.data<double>(); }

  Problem backwards(bool through_mean) {
    Problem p = p_;
    p.dy = operand(dy_, h_.gap);
    if (h_.from_y) p.y = operand(y_, 0);
    p.dx = operand(dx_, 0);
    if (h_.residual) p.dresidual = operand(dresidual_, 0);
    p.through_mean = through_mean;
    return p;
  }
  void write_gradients() {
    dx_.write();
    if (h_.residual) dresidual_.write();
  }

  const Header h_;
  Problem p_;
  const int64_t channel_bytes_ = h_.channels * static_cast<int64_t>(sizeof(double));
  const int64_t offset_ = h_.offset * value_bytes(type());
  Buffer weight_{channel_bytes_}, bias_{channel_bytes_}, mask_{h_.batch * h_.space};
  Buffer x_{extent(h_.gap), offset_}, dy_{extent(h_.gap), offset_}, residual_{extent(h_.gap), offset_};
  Buffer statistics_{2 * channel_bytes_}, rstd_{channel_bytes_};
  Buffer y_{extent(0), offset_}, dx_{extent(0), offset_}, dresidual_{extent(0), offset_};
};

}  // namespace

int main() {
  for (Header header; std::fread(&header, sizeof header, 1, stdin) == 1;) Case(header).run();
  return 0;
}
