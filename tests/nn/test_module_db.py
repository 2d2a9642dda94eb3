"""Every BatchNorm sample in torch's own module_db, through our layers."""

import pytest
import torch
from cases import torchs
from compare import assert_close
from torch.testing._internal.common_modules import module_db

import batchnorm as bn

INFOS = {
    info.module_cls: info
    for info in module_db
    if info.module_cls in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
}


def samples(dtype, training, requires_grad=True):
    for cls, info in INFOS.items():
        ours = getattr(bn, cls.__name__)
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
        )
        for sample in inputs:
            construct, forward = sample.constructor_input, sample.forward_input
            layers = [c(*construct.args, **construct.kwargs).to(dtype).train(training) for c in (cls, ours)]
            yield f"{cls.__name__} {sample.desc}", *layers, *forward.args


def test_all_three_are_there():
    assert len(INFOS) == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype, training):
    names = []
    for name, theirs, ours, x in samples(dtype, training):
        exact = torchs(type(theirs), *_arguments(theirs), bias=theirs.bias is not None).double().train(training)
        results = []
        for layer, t in ((theirs, x), (ours, x), (exact, x.double())):
            t = t.detach().requires_grad_()
            y = layer(t)
            y.sum().backward()
            results.append((y, t.grad, *[p.grad for p in layer.parameters()]))
        for a, b, c in zip(*results, strict=True):
            # The gradient of gamma adds up x (in eval) or xhat over the batch: rounding is relative to those terms.
            assert_close(b, c, peer=a, scale=max(1.0, x.double().abs().sum().item() / ours.num_features))
        names.append(name)
    assert len(names) in (19, 22)  # without beta from torch 2.12 on


def _arguments(layer):
    return layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats


@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives(training):
    for name, _, ours, x in samples(torch.float64, training):
        if x.numel():
            state = {k: v.clone() for k, v in ours.state_dict().items()}

            def function(t, *parameters, layer=ours, state=state):
                names = [n for n, _ in layer.named_parameters()]
                given = {**{k: v.clone() for k, v in state.items()}, **dict(zip(names, parameters, strict=True))}
                return torch.func.functional_call(layer, given, (t,))

            arguments = (x, *ours.parameters())
            assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True), name
            # along random directions: in full it takes a minute
            assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True), name


def test_memory_format_is_kept_as_torchs_keeps_it():
    for name, theirs, ours, x in samples(torch.float32, True, requires_grad=False):
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
            rank = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format)
            if rank in (None, x.dim()) and x.numel():
                t = x.contiguous(memory_format=memory_format)
                assert ours(t).stride() == theirs(t).stride(), name


def test_errors():
    checked = 0
    for cls, info in INFOS.items():
        ours = getattr(bn, cls.__name__)
        for sample in info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        ):
            construct, forward = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
            with pytest.raises(sample.error_type, match=sample.error_regex):
                ours(*construct.args, **construct.kwargs)(*forward.args, **forward.kwargs)
            checked += 1
    assert checked >= 3
