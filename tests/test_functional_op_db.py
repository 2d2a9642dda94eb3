"""Every batch-norm sample in torch's own op_db, through batch_norm(): values, gradients, running statistics."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import batchnorm as bn

pytestmark = pytest.mark.slow

# In which order each of torch's operators takes what F.batch_norm calls running_mean, running_var, weight, bias, ...
STATISTICS, PARAMETERS, REST = ("running_mean", "running_var"), ("weight", "bias"), ("momentum", "eps")
ORDERS = {
    "nn.functional.batch_norm": (*STATISTICS, *PARAMETERS, "training", *REST),
    "native_batch_norm": (*PARAMETERS, *STATISTICS, "training", *REST),
    "_native_batch_norm_legit": (*PARAMETERS, *STATISTICS, "training", *REST),
    "_batch_norm_with_update": (*PARAMETERS, *STATISTICS, *REST),
}
INFOS = {
    f"{info.name}{info.variant_test_name and '-'}{info.variant_test_name}": info
    for info in op_db
    if "batch_norm" in info.name
}


def samples(info, dtype):
    """Input and the other arguments of F.batch_norm, by name, of every sample."""
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        names = ORDERS[info.name]
        if info.name == "_native_batch_norm_legit" and len(sample.args) == 5:  # its overload without statistics
            names = (*PARAMETERS, "training", *REST)
        always = {"training": True} if info.name == "_batch_norm_with_update" else {}
        arguments = {**dict(zip(names, sample.args, strict=False)), **sample.kwargs, **always}
        yield sample.input, {"running_mean": None, "running_var": None, **arguments}


def run(function, x, arguments, dtype):
    """y, every gradient, and the running statistics after the call, with all tensors in a dtype of one's own choice."""
    given = {k: v.detach().to(dtype, copy=True) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    leaves = {"x": x.detach().to(dtype, copy=True), **{k: given[k] for k in PARAMETERS if given.get(k) is not None}}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y = function(leaves["x"], **given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(x.dtype).to(dtype).view(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    statistics = {k: given[k] for k in STATISTICS if given.get(k) is not None}
    return {"y": y, **{f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}, **statistics}


def test_all_of_torchs_operators_are_there():
    assert {info.name for info in INFOS.values()} == set(ORDERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INFOS)
def test_every_sample(name, dtype):
    tried = 0
    for x, arguments in samples(INFOS[name], dtype):
        if x.dim() == 1:  # see below
            continue
        exact = run(F.batch_norm, x, arguments, torch.float64)
        theirs = run(F.batch_norm, x, arguments, dtype)
        ours = run(bn.batch_norm, x, arguments, dtype)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype
            # Gradients of parameters add up a channel's terms, each of the size of x (in eval) or xhat, or less.
            scale = max(1.0, x.double().abs().sum().item()) if key in ("dweight", "dbias") else None
            assert_close(value, exact[key], peer=theirs[key], scale=scale)
        tried += 1
    assert tried >= 9


def test_no_dimension_for_channels_is_refused_even_where_there_are_no_values():
    """What is left out above: torch takes the shape (0,), we refuse every input of one dimension."""
    empty = torch.empty(0)
    assert F.batch_norm(empty, empty, empty, training=True).shape == (0,)
    with pytest.raises(IndexError, match="at least 2 dimensions"):
        bn.batch_norm(empty, empty, empty, training=True)
