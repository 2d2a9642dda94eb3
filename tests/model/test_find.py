"""Every batch norm of a model, whatever its class, by its name in the model without wrappers."""

import pytest
import torch
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils import parametrize

import batchnorm as bn
from batchnorm.model.find import bare, clean, find, require


class WithChild(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.BatchNorm2d(channels)  # found too: it is a batch norm of the model

    def forward(self, x):
        return self.act(super().forward(x))


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized():
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


def quantizable():
    layer = nn.BatchNorm2d(3)
    layer.add_module("activation_post_process", nn.Identity())
    return layer


KINDS = {
    "torch": (lambda: nn.BatchNorm2d(3), "BatchNorm2d", True),
    "ours": (lambda: bn.BatchNorm2d(3), "BatchNorm2d", True),
    "sync": (lambda: nn.SyncBatchNorm(3), "SyncBatchNorm", True),
    "lazy": (lambda: nn.LazyBatchNorm2d(), "LazyBatchNorm2d", True),
    "parametrized": (parametrized, "BatchNorm2d", True),
    "observed": (quantizable, "BatchNorm2d", True),
    "norm and activation": (lambda: BatchNormAct2d(3), "BatchNormAct2d", True),
    "converted": (lambda: bn.convert(BatchNormAct2d(3)), "BatchNormAct2d", True),
    "frozen": (lambda: bn.freeze(nn.BatchNorm2d(3)), "BatchNorm2d", True),
    "look-alike": (lambda: FrozenBatchNorm2d(3), "FrozenBatchNorm2d", False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    make, name, learns = KINDS[kind]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), make(), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3))
    (found,) = find(model)
    assert (found.name, found.layer, found.kind, found.adapter.learns) == ("1", model[1], name, learns)
    (itself,) = find(model[1])
    assert (itself.name, itself.called) == ("", f"the {name}")


def test_children_of_a_batch_norm_and_shared_layers():
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(WithChild(3), shared, shared)
    assert [each.name for each in find(model)] == ["0", "0.act", "1"]


def wrapped(compiled):
    """A model compiled within, checkpointed within that, and compiled or data parallel without."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inner = nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.BatchNorm1d(3))))
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.BatchNorm1d(3))
    return torch.compile(model, backend="eager") if compiled else nn.DataParallel(model)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_wrappers_are_not_in_the_names(compiled):
    model = wrapped(compiled)
    assert [each.name for each in find(model)] == ["0.0.0", "1"]
    assert type(bare(model)) is nn.Sequential
    assert clean("a._orig_mod.b._fsdp_wrapped_module._checkpoint_wrapped_module.c") == "a.b.c"


def test_a_model_without_any_says_of_what_it_is_made():
    assert find(nn.Linear(2, 2)) == []
    with pytest.raises(ValueError, match="has no batch norm to diagnose; it has Linear, ReLU"):
        require(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.ReLU()), "diagnose")
