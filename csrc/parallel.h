// Tasks shared out to torch's threads.
#pragma once

#include <cstdint>

#ifndef BATCHNORM_WITHOUT_TORCH
#include <torch/csrc/stable/ops.h>
#endif

namespace batchnorm {

// f(begin, end) for ranges of at least `grain` tasks that together cover all. In a build without torch, which serves to try the
// passes on other CPUs, the caller's thread does everything.
template <class F>
void parallel_for(int64_t tasks, int64_t grain, const F& f) {
#ifdef BATCHNORM_WITHOUT_TORCH
  static_cast<void>(grain);
  f(0, tasks);
#else
  torch::stable::parallel_for(0, tasks, grain, f);
#endif
}

}  // namespace batchnorm
