"""What values, settings and neighbors tell: each rule fires on its fault, and not on the same model without it."""

import copy

import numpy as np
import pytest
import torch
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from public import import_timm, import_with_torchvision
from torch import nn

import batchnorm as bn


def trained(batches=60, seed=0, **settings):
    """A small model whose running statistics and parameters have seen some data."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, **settings), nn.ReLU(), nn.Linear(8, 4), nn.Sigmoid()
    )
    for _ in range(batches):
        model(torch.randn(32, 6) * 3 + 1)
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(-0.5, 0.5)
    return model


def nan_in(model):
    model[1].running_mean[3] = float("nan")


def infinite_gamma(model):
    model[1].weight.data[0] = float("inf")


def negative(model):
    model[1].running_var[2] = -1e-3


def freeze_leak(model):
    model[1].requires_grad_(False)


def reset(model):
    model[1].reset_running_stats()


def keras_momentum(model):
    model[1].momentum = 0.99


def no_momentum(model):
    model[1].momentum = 0.0


def large_eps(model):
    model[1].eps = 1e3


def constant_channel(model):
    model[1].running_var[1] = 0.0


def zero_gamma(model):
    model[1].weight.data[0] = 1e-5


def shut(model):
    model[1].weight.data[:6], model[1].bias.data[:6] = 0.1, -0.4


def in_train_mode(model):
    model.eval()
    model[1].train()


def in_eval_mode(model):
    model[1].eval()


def untracked_in_eval(model):
    model[1] = nn.BatchNorm1d(8, track_running_stats=False)


def with_bias(model):
    model[0].bias = nn.Parameter(torch.zeros(8))


FAULTS = [
    (nan_in, "nonfinite", "serious"),
    (infinite_gamma, "nonfinite", "serious"),
    (negative, "nonfinite", "serious"),
    (freeze_leak, "freeze-leak", "serious"),
    (reset, "untracked", "serious"),
    (keras_momentum, "momentum", "serious"),
    (no_momentum, "momentum", "warning"),
    (large_eps, "small-variance", "warning"),
    (constant_channel, "small-variance", "note"),
    (zero_gamma, "dead-channels", "note"),
    (shut, "dead-channels", "warning"),
    (in_train_mode, "mode", "serious"),
    (in_eval_mode, "mode", "note"),
    (untracked_in_eval, "mode", "note"),
    (with_bias, "bias", "note"),
]


def test_a_healthy_model_has_no_finding():
    model = trained()
    assert bn.diagnose(model) == []
    assert bn.diagnose(bn.convert(copy.deepcopy(model), fuse=True)) == []
    assert bn.diagnose(model.state_dict()) == []
    assert bn.diagnose(model.eval()) == []


@pytest.mark.parametrize(("plant", "rule", "severity"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
@pytest.mark.parametrize("ours", [False, True])
def test_each_fault_is_found_and_nothing_else(plant, rule, severity, ours):
    model = trained()
    plant(model)
    if ours:
        bn.convert(model)
    found = bn.diagnose(model)
    assert [(finding.rule, finding.layer, finding.severity) for finding in found] == [(rule, "1", severity)]
    assert found[0].since_step is None
    assert 0 < found[0].confidence <= 1
    assert found[0].remedy
    assert "{" not in found[0].evidence


@pytest.mark.parametrize(("plant", "rule"), [(f[0], f[1]) for f in FAULTS if f[0] in (nan_in, negative, reset, shut)])
def test_a_state_dict_needs_no_model(plant, rule):
    model = trained()
    plant(model)
    (found,) = bn.diagnose(model.state_dict())
    assert (found.rule, found.layer) == (rule, "1")


def test_a_checkpoint_without_buffers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn1, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(4)

    parameters = dict(Net().named_parameters())
    for state in (parameters, {"epoch": 3, "model": parameters}):
        (found,) = bn.diagnose(state)
        assert (found.rule, found.severity) == ("untracked", "serious")
        assert found.layer.endswith("bn1")
    with pytest.raises(ValueError, match="A dict of only the parameters lacks them"):
        bn.diagnose(dict(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).named_parameters()))


def constant(layer):
    nn.init.constant_(layer.weight, 0.7)
    nn.init.constant_(layer.bias, 0.1)


INITIALIZATIONS = {
    "zeros, as the last of a residual block": lambda layer: nn.init.zeros_(layer.weight),
    "N(1, 0.02), as of generators": lambda layer: nn.init.normal_(layer.weight, 1.0, 0.02),
    "uniform, as of old torch": lambda layer: nn.init.uniform_(layer.weight),
    "one number": constant,
}


@pytest.mark.parametrize("init", INITIALIZATIONS.values(), ids=list(INITIALIZATIONS))
@pytest.mark.parametrize("frozen", [False, True])
def test_a_fresh_model_is_healthy(init, frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, bias=False))
    model.append(nn.BatchNorm2d(4))
    for layer in (model[1], model[3]):
        init(layer)
        layer.requires_grad_(not frozen)

    def worst(findings):
        return {finding.severity for finding in findings}

    assert worst(bn.diagnose(model)) == worst(bn.diagnose(model.state_dict())) == set()
    batches = [(torch.randn(16, 3, 8, 8) * 3 + 2, torch.zeros(16)) for _ in range(3)]
    with_loss = bn.diagnose(model, batches, loss=lambda output, _: output.square().mean())
    assert worst(with_loss) == {"note"}
    assert {finding.rule for finding in with_loss} == {"unconverged"}
    for x, _ in 20 * batches:
        model(x)
    assert bn.diagnose(model) == []  # tracked, not trained


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "mobilenetv3_small_050", "regnety_002"])
def test_timms_fresh_models_are_healthy(name):
    """With zero_init_last, timm's default."""
    model = import_timm().create_model(name, pretrained=False)
    assert bn.diagnose(model).serious == bn.diagnose(model.state_dict()).serious == []


TRANSFORMERS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "groups_width": 8},
    "Levit": {},
    "MobileViT": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 16]},
    "EfficientNet": {"width_coefficient": 0.3, "depth_coefficient": 0.3, "hidden_dim": 64, "batch_norm_momentum": 0.01},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_fresh_models_are_healthy(name):
    """Some begin with gamma from N(0, 0.02), of which some channels are near 0."""
    import_with_torchvision("torchvision")
    transformers = import_with_torchvision("transformers")
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**TRANSFORMERS[name]))
    assert bn.diagnose(model) == bn.diagnose(model.state_dict()) == []


def test_what_was_tracked_or_trained_and_is_as_new_is_shown():
    model = trained()
    with torch.no_grad():
        model[1].bias.zero_()
    model[1].running_mean.zero_()
    model[1].running_var.fill_(1)
    (found,) = bn.diagnose(model)  # the counter says it
    assert (found.rule, found.severity, found.numbers["updates"]) == ("untracked", "serious", 60)
    model[1].num_batches_tracked.zero_()
    assert bn.diagnose(model) == []  # gamma alone says nothing
    with torch.no_grad():
        model[1].bias[2] = 0.1
    (found,) = bn.diagnose(model)
    assert (found.rule, found.severity) == ("untracked", "serious")


def test_leftover_of_the_beginning():
    # After 5 batches 0.9^5 = 59 % of the initial values are left, after 60 less than 0.2 %.
    (found,) = bn.diagnose(trained(batches=5))
    assert (found.rule, found.severity) == ("unconverged", "warning")
    assert found.numbers["leftover"] == pytest.approx(0.9**5)
    assert "59.0%" in found.evidence
    assert bn.diagnose(trained(batches=10, momentum=None)) == []
    # The true variance is that of a very long average.
    far, near = trained(batches=5)[1], trained(batches=400)[1]
    ratio = np.log((far.running_var.numpy() + 1e-5) / (near.running_var.numpy() + 1e-5))
    assert np.log(found.numbers["var_factor"]) == pytest.approx(np.sqrt((ratio**2).mean()), rel=0.3)


def test_frozen_layers_are_as_they_should_be():
    model = trained()
    freeze_leak(model)
    assert [finding.rule for finding in bn.diagnose(model)] == ["freeze-leak"]
    assert bn.diagnose(bn.freeze(model, affine=True)) == []
    # Never learned is another thing than frozen: such statistics have to be tracked.
    plain = trained()
    plain[1].reset_parameters()
    plain[1].requires_grad_(False)
    assert [finding.rule for finding in bn.diagnose(plain)] == []


def test_weight_decay_is_seen_in_the_optimizer():
    model = trained()
    (found,) = bn.diagnose(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=1e-4))
    assert (found.rule, found.severity) == ("decay", "note")
    assert bn.diagnose(model, optimizer=torch.optim.SGD(bn.param_groups(model, 1e-4), 0.1)) == []


def test_a_linear_layer_of_another_width_before_it():
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(5), nn.ReLU())
    (found,) = bn.diagnose(model)
    assert (found.rule, found.severity) == ("axis", "serious")
    model(torch.randn(4, 5, 6))  # torch takes it without a word


def test_order_of_definition_is_less_sure_than_a_sequential():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    (unsure,) = bn.diagnose(Block())
    (sure,) = bn.diagnose(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert unsure.rule == sure.rule == "bias"
    assert unsure.confidence < sure.confidence == 1


def test_ranks():
    one, other = trained(), trained()
    states = [one.state_dict(), other.state_dict()]
    assert bn.diagnose(states) == []
    other[1].running_mean += 2
    (found,) = bn.diagnose(states)
    assert (found.rule, found.severity) == ("ranks-disagree", "serious")
    other[1].running_mean -= 2 - 1e-2
    assert [f.severity for f in bn.diagnose([one, other])] == ["warning"]
    other[1].weight.data += 1
    (found,) = bn.diagnose([one, other])
    assert "gamma and beta differ" in found.evidence


def test_findings_print_worst_first_and_keep_the_worst_of_a_rule():
    model = trained()
    with_bias(model)
    nan_in(model)
    found = bn.diagnose(model)
    assert [finding.severity for finding in found] == ["serious", "note"]
    said = str(found)
    assert said.index("nonfinite in 1") < said.index("bias in 1")
    assert '→ bn.recalibrate(model, batches, only="nonfinite")' in said
    assert str(bn.diagnose(trained())).splitlines()[0] == "0 findings."


def test_layers_that_share_a_fault_share_a_finding():
    layers = [nn.BatchNorm1d(4, momentum=0.99 if i < 49 else 0.1) for i in range(50)]
    model = nn.Sequential(*layers)
    (found,) = bn.diagnose(model)
    assert (found.layer, found.layers) == ("0", tuple(map(str, range(49))))
    assert found.evidence.startswith("49 layers: momentum is 0.99")
    assert [each.layer for each in found.each] == list(found.layers)
    assert "in 0, 1, 2, 3 and 45 more\n" in str(bn.diagnose(model))
    exec(found.remedy, {"model": model})
    assert [layer.momentum for layer in layers] == [0.01] * 49 + [0.1]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_without_decay_the_optimizer_is_the_same(make):
    model = trained()
    options = {"betas": (0.8, 0.99)} if make in (torch.optim.AdamW, torch.optim.NAdam) else {"momentum": 0.7}
    theirs = make(model.parameters(), lr=0.03, weight_decay=0.02, **options)
    (found,) = bn.diagnose(model, optimizer=theirs)
    names = {"bn": bn, "torch": torch, "model": model}
    exec(found.remedy, names)
    ours = names["optimizer"]
    assert type(ours) is make
    spared = {id(model[1].weight), id(model[1].bias)}
    for group in ours.param_groups:
        before = {key: value for key, value in theirs.param_groups[0].items() if key not in ("params", "weight_decay")}
        assert {key: group[key] for key in before} == before
        assert group["weight_decay"] == (0.0 if spared & {id(p) for p in group["params"]} else 0.02)
    assert "decay" not in {finding.rule for finding in bn.diagnose(model, optimizer=ours)}


def test_layers_with_other_remedies_have_findings_of_their_own():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=0.99), nn.BatchNorm1d(4, momentum=0.9), nn.BatchNorm1d(4))
    assert [finding.layers for finding in bn.diagnose(model)] == [("0",), ("1",)]


def test_what_a_checkpoint_does_not_hold_is_assumed():
    model = trained(eps=100.0)
    (found,) = bn.diagnose(model)
    assert (found.assumed, found.severity) == ((), "warning")
    model[1].running_var.fill_(1e-6)  # beside PyTorch's eps, 1e-5
    (found,) = bn.diagnose(model.state_dict())
    assert (found.rule, found.assumed, found.severity) == ("small-variance", ("eps",), "note")
    assert "eps: assumed, as a checkpoint does not say" in found.evidence
    (found,) = bn.diagnose(trained(batches=5).state_dict())
    assert (found.rule, found.assumed) == ("unconverged", ("momentum",))
    (found,) = bn.diagnose(trained(batches=5))
    assert found.assumed == ()


@pytest.mark.parametrize(("dead", "said"), [(1, "0.1%"), (512, "50%"), (1022, "99.8%"), (1024, "100%")])
def test_a_share_that_is_not_0_is_not_printed_as_0(dead, said):
    layer = nn.BatchNorm1d(1024)
    layer.running_mean += 1
    nn.init.uniform_(layer.bias)
    layer.weight.data[:dead] = 0
    (found,) = bn.diagnose(layer)
    assert found.evidence.startswith(f"{said} of 1024 channels")


def test_what_was_judged_and_what_could_not_be():
    model = trained()
    of_state, of_model = bn.diagnose(model.state_dict()).judged, bn.diagnose(model).judged
    assert (of_state.layers, of_state.steps, of_state.batches) == (1, None, None)
    assert "momentum" not in of_state.rules
    assert "momentum" in of_model.rules
    assert any("eps and momentum" in line for line in of_state.missed)
    assert "eval-gap needs batches with loss=" in of_model.missed
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert "decay" in bn.diagnose(model, optimizer=optimizer).judged.rules
    batches = list(torch.randn(3, 16, 6))
    assert bn.diagnose(model, batches).judged.batches == 3
    bn.freeze(model)
    assert "what batches measure in 1: frozen" in str(bn.diagnose(model, batches))


def test_what_cannot_be_diagnosed():
    with pytest.raises(ValueError, match="the model has no batch norm to diagnose; it has Linear"):
        bn.diagnose(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lazy"):
        bn.diagnose(nn.Sequential(nn.LazyBatchNorm1d()))
    with pytest.raises(ValueError, match="no batch-norm layer"):
        bn.diagnose(nn.Linear(2, 2).state_dict())
    with pytest.raises(TypeError, match="got int"):
        bn.diagnose(3)
    with pytest.raises(TypeError, match="need a model"):
        bn.diagnose(trained().state_dict(), [torch.randn(2, 6)])
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        bn.diagnose("no/such/thing")


def test_a_finding_is_immutable_hashable_and_plain():
    model = trained()
    nan_in(model)
    (found,) = bn.diagnose(model)
    with pytest.raises(AttributeError):
        found.rule = "other"
    assert {found: 1}[found] == 1
    assert set(found.to_dict()) == {
        "rule", "layer", "severity", "evidence", "since_step", "remedy", "confidence", "numbers",
        "layers", "sources", "assumed", "each",
    }  # fmt: skip


def test_a_layer_that_is_the_model():
    (found,) = bn.diagnose(nn.BatchNorm1d(3, momentum=0.99))
    assert found.remedy == "model.momentum = 0.01"
    (found,) = bn.diagnose(
        bn.BatchNorm1d(3, momentum=0.99).state_dict() | {"running_mean": torch.full((3,), torch.nan)}
    )
    assert found.layer == "(the layer itself)"


def test_braces_in_a_name():
    model = nn.Sequential()
    model.add_module("{odd}", nn.Linear(3, 4))
    model.add_module("{0}", nn.BatchNorm1d(4))
    (found,) = bn.diagnose(model)
    assert found.layer == "{0}"
    assert found.evidence.startswith("{odd} (Linear) adds a bias to 4 channels")


class WithActivation(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(channels):
    layer = nn.BatchNorm2d(channels)
    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    return layer


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(torch.compile(model))])
@pytest.mark.parametrize(
    "make",
    [WithActivation, BatchNormAct2d, FrozenBatchNorm2d, parametrized, lambda n: bn.convert(BatchNormAct2d(n))],
    ids=["child", "norm-act", "look-alike", "parametrized", "converted"],
)
def test_no_class_is_passed_over(make, wrap):
    """As the state_dict is judged, which knows no classes."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), make(4), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    for layer in (model[1], model[3]):
        layer.running_var[0] = torch.nan

    def broken(findings):
        return [name for found in findings if found.rule == "nonfinite" for name in found.layers]

    assert broken(bn.diagnose(model.state_dict())) == ["1", "3"]
    assert [name.removeprefix("0.") for name in broken(bn.diagnose(wrap(model)))] == ["1", "3"]


def test_a_frozen_lookalike_is_neither_fresh_nor_untracked():
    """It never tracks, in either mode, so values as at the beginning say nothing of it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.ReLU())
    batches = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    for mode in (True, False):
        assert bn.diagnose(model.train(mode)) == []
        assert bn.diagnose(model.train(mode), batches) == []
