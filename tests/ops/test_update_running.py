"""The compiled operator that moves running statistics: as torch does, and both of them or neither."""

import pytest
import torch
from cases import make, vectors

from batchnorm.ops.cpu import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="installed without a compiler")
compiled = torch.ops.batchnorm


def test_momentum_moves_the_running_statistics_as_torch_does():
    torch.manual_seed(8)
    x = make((6, 5, 7))
    v = vectors(5)
    mean, var = v["running_mean"].clone(), v["running_var"].clone()
    torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=0.3)
    compiled.update_running_(v["running_mean"], v["running_var"], compiled.measure(x), 0.3, True, False)
    torch.testing.assert_close(v["running_mean"], mean)
    torch.testing.assert_close(v["running_var"], var)


def test_nothing_measured_moves_nothing():
    mean, var = torch.full((5,), 2.0), torch.full((5,), 3.0)
    compiled.update_running_(mean, var, compiled.measure(make((0, 5))), 0.3, True, False)
    assert torch.equal(mean, torch.full((5,), 2.0))
    assert torch.equal(var, torch.full((5,), 3.0))


@pytest.mark.parametrize("wrong", [torch.ones(6), torch.ones(5, 1), torch.ones(5, dtype=torch.int32)], ids=str)
def test_a_wrong_running_variance_leaves_the_running_mean_as_it_was(wrong):
    mean, statistics = torch.zeros(5), compiled.measure(make((4, 5)))
    with pytest.raises(RuntimeError, match=r"running_var|float32"):
        compiled.update_running_(mean, wrong, statistics, 0.3, True, False)
    assert torch.equal(mean, torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_running_statistics_of_any_floating_dtype_move(dtype):
    mean, var = torch.ones(5, dtype=dtype), torch.ones(5, dtype=dtype)
    statistics = compiled.measure(make((9, 5)))
    compiled.update_running_(mean, var, statistics, 0.25, True, False)
    count, measured, m2 = statistics
    torch.testing.assert_close(mean, (0.75 + 0.25 * measured).to(dtype))
    torch.testing.assert_close(var, (0.75 + 0.25 * m2 / (count - 1)).to(dtype))
