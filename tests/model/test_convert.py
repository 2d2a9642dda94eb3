"""convert() and revert(): only the class of each layer changes, and what must not be touched is not."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn


class Net(nn.Module):
    """Batch-norm layers of every rank, nested, one of them in two places, one tied to another's weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.shared = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleDict({"again": self.shared, "tied": nn.BatchNorm2d(4)})
        self.blocks["tied"].weight = self.shared.weight
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3, affine=False).eval())
        self.volume = nn.BatchNorm3d(1, track_running_stats=False)

    def forward(self, x):
        x = self.shared(self.conv(x))
        x = self.blocks["tied"](self.blocks["again"](x))
        x = self.volume(x[:, None])[:, 0]
        return self.flat(x)


def identities(model):
    """Everything by which the outside may hold on to a model."""
    return (
        [(n, id(m)) for n, m in model.named_modules(remove_duplicate=False)],
        [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        [(n, id(b)) for n, b in model.named_buffers(remove_duplicate=False)],
        [m.training for m in model.modules()],
        list(model.state_dict()),
    )


def test_everything_but_the_class_stays_the_same_object():
    model = Net()
    seen = []
    model.shared.register_forward_hook(lambda *_: seen.append("forward"))
    model.shared.weight.register_hook(lambda g: seen.append("gradient"))
    before = identities(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    assert bn.convert(model) is model
    assert identities(model) == before
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d}

    old = model.shared.weight.detach().clone()
    model(torch.randn(3, 2, 6, 6)).square().sum().backward()
    optimizer.step()
    assert seen == ["forward", "forward", "gradient"]
    assert not torch.equal(model.shared.weight, old)

    assert bn.revert(model) is model
    assert identities(model) == before
    assert {type(m).__module__ for m in model.modules() if "BatchNorm" in type(m).__name__} == {
        "torch.nn.modules.batchnorm"
    }
    assert model.shared.__dict__.keys() == nn.BatchNorm2d(4).__dict__.keys()


def test_a_converted_model_computes_what_the_original_did():
    model = Net()
    x = torch.randn(3, 2, 6, 6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x)
    model.load_state_dict(state)
    torch.testing.assert_close(bn.convert(model)(x), expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(state)
    assert torch.equal(bn.revert(model)(x), expected)


def test_a_layer_itself_converts():
    layer = nn.BatchNorm1d(3)
    assert bn.convert(layer) is layer
    assert type(layer) is bn.BatchNorm1d
    assert type(bn.revert(layer)) is nn.BatchNorm1d


def test_subclasses_and_lazy_layers_are_left_alone():
    class Mine(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(Mine(3), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(3))
    bn.convert(model)
    assert [type(m) for m in model] == [Mine, nn.LazyBatchNorm2d, bn.SyncBatchNorm]


def test_a_layer_cast_while_it_was_ours_works_as_torchs():
    model = bn.convert(nn.BatchNorm1d(3)).bfloat16()
    bn.revert(model)(torch.randn(4, 3).bfloat16())
    assert model.running_mean.dtype == torch.bfloat16


OPTIONS = {"virtual_batch_size": 2, "nonfinite": "skip", "singleton": "running", "unbiased": False}


@pytest.mark.parametrize("options", [OPTIONS, {"renorm": bn.Renorm(2.0, 1.0)}, {"renorm": bn.Renorm(), "sync": True}])
@pytest.mark.parametrize("copied", [False, True])
def test_options_of_all_layers_are_those_of_layers_built_with_them_and_revert_undoes_them(options, copied):
    class Mine(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input) + 1

    other = nn.BatchNorm1d if "virtual_batch_size" in options else nn.SyncBatchNorm
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm1d(3), other(3)), Mine(3))
    before = [m.__dict__.keys() for m in bn.revert(copy.deepcopy(model)).modules()]
    classes = [type(m) for m in bn.revert(copy.deepcopy(model)).modules()]
    x = torch.randn(8, 3)
    built = bn.BatchNorm1d(3, **options)
    expected = built(x)
    assert bn.convert(model, **options) is model
    model = copy.deepcopy(model) if copied else model
    assert repr(model[0]) == repr(bn.BatchNorm1d(3, **options))
    assert torch.equal(model[0](x), expected)
    assert torch.equal(model[0].running_var, built.running_var)
    assert model[1][0].beyond_torch == model[0].beyond_torch
    assert model[1][1].renorm == options.get("renorm")
    bn.convert(model, nonfinite="skip")(x)  # again, and other
    bn.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nonfinite": "skpi"}, ValueError, "nonfinite must be one of"),
        ({"virtual_batch_size": 0}, ValueError, "positive integer"),
        ({"virtual_batch_size": 2, "sync": True}, ValueError, "virtual_batch_size and sync exclude each other"),
        ({"renorm": bn.Renorm()}, ValueError, "cannot convert 1: virtual_batch_size and renorm exclude each other"),
        ({"singleton": "running"}, ValueError, r"cannot convert 2\.0: singleton=\"running\" needs running statistics"),
        ({"channel_dim": -1}, TypeError, r"convert\(\) sets virtual_batch_size, .*; got channel_dim"),
    ],
)
def test_an_option_that_one_layer_cannot_have_raises_and_changes_nothing(options, error, message):
    untracked = nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), bn.BatchNorm1d(3, virtual_batch_size=4), nn.Sequential(untracked))
    before = repr(model)
    with pytest.raises(error, match=message):
        bn.convert(model, **options)
    assert type(model[0]) is nn.BatchNorm1d
    assert repr(model) == before


def test_reverting_undoes_what_convert_set_but_refuses_what_was_built():
    layer = bn.BatchNorm1d(3, nonfinite="skip")
    for nonfinite in ("propagate", "raise"):
        with pytest.raises(ValueError, match="it is built with nonfinite=skip, which"):
            bn.revert(bn.convert(layer, nonfinite=nonfinite))
        assert layer.nonfinite == nonfinite


@pytest.mark.parametrize("call", [bn.convert, bn.revert])
@pytest.mark.parametrize("model", [None, [nn.BatchNorm1d(3)], nn.BatchNorm1d], ids=str)
def test_what_is_no_module_raises(call, model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*got (NoneType|list|type)"):
        call(model)


def test_reverting_would_lose_an_activation_so_it_refuses_and_changes_nothing():
    model = nn.Sequential(bn.BatchNorm1d(3), nn.Sequential(bn.BatchNorm1d(3, activation="relu")))
    with pytest.raises(ValueError, match=r"cannot revert 1\.0.*relu"):
        bn.revert(model)
    assert type(model[0]) is bn.BatchNorm1d
