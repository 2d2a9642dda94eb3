"""fold(): in float64 the same outputs without the layers that went, for every kind of layer and in whole models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import torchs
from compare import assert_close
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import batchnorm as bn

# Here an output is a sum of less than 100 products, of numbers near 1; folding changes the rounding of each product and
# of each partial sum, by half an ulp each, and normalizing with variances over 0.25 doubles that at most.
ULPS = 400

AFTER = {
    "linear": (lambda **k: nn.Linear(5, 6, **k), (7, 5)),
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, padding=1, **k), (3, 4, 9)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, **k), (3, 4, 9, 8)),
    "conv3d": (lambda **k: nn.Conv3d(3, 6, 2, dilation=2, **k), (2, 3, 4, 5, 4)),
    "same, reflected": (lambda **k: nn.Conv2d(3, 6, 3, padding="same", padding_mode="reflect", **k), (2, 3, 5, 4)),
    "grouped": (lambda **k: nn.Conv2d(4, 6, 3, groups=2, **k), (3, 4, 5, 6)),
    "depthwise": (lambda **k: nn.Conv2d(6, 6, 3, groups=6, padding=1, **k), (3, 6, 5, 6)),
    "transposed1d": (lambda **k: nn.ConvTranspose1d(4, 6, 3, stride=2, **k), (3, 4, 5)),
    "transposed2d": (lambda **k: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, **k), (3, 4, 5, 4)),
    "transposed3d": (lambda **k: nn.ConvTranspose3d(3, 6, 2, **k), (2, 3, 3, 2, 3)),
    "transposed, grouped": (lambda **k: nn.ConvTranspose2d(4, 6, 3, groups=2, **k), (3, 4, 5, 4)),
    "transposed, depthwise": (lambda **k: nn.ConvTranspose2d(6, 6, 2, groups=6, **k), (3, 6, 5, 4)),
}
NORMS = {
    "theirs": lambda theirs, ours: theirs(6),
    "without gamma and beta": lambda theirs, ours: theirs(6, affine=False),
    "gamma alone": lambda theirs, ours: torchs(theirs, 6, bias=False),
    "beta alone": lambda theirs, ours: ours(6, scale=False),
    "ours, eps": lambda theirs, ours: ours(6, eps=0.1),
    "relu": lambda theirs, ours: ours(6, activation="relu"),
    "leaky": lambda theirs, ours: ours(6, activation=nn.LeakyReLU(0.3)),
    "gelu": lambda theirs, ours: ours(6, activation=nn.GELU("tanh")),
    "frozen": lambda theirs, ours: bn.freeze(theirs(6)).train(),
    "sync": lambda theirs, ours: nn.SyncBatchNorm(6),
    "our sync": lambda theirs, ours: bn.SyncBatchNorm(6),
}


def norm_for(kind, dimensions, **features):
    name = {0: 1, 2: 1, 3: 1, 4: 2, 5: 3}[dimensions]
    return NORMS[kind](getattr(nn, f"BatchNorm{name}d"), getattr(bn, f"BatchNorm{name}d"))


def trained(model):
    """In eval mode, with statistics, gamma and beta away from the initial ones, in float64."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.25, 2)
            for p in layer.parameters():
                nn.init.uniform_(p, -1.5, 1.5)
    return model.double().eval()


def same_outputs(model, folded, x, ulps=ULPS):
    """The two agree, and `folded` has what it says it has."""
    with torch.no_grad():
        assert_close(folded(x), model(x), ulps=ulps)
    names = [name for name, m in folded.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sorted(folded.folding.refused) == sorted(names)


@pytest.mark.parametrize(
    ("kind", "norm", "bias"),
    [
        *((kind, "theirs", bias) for kind in AFTER for bias in (False, True)),
        *((kind, norm, True) for kind in ("linear", "conv2d", "transposed, grouped") for norm in NORMS),
    ],
)
def test_a_batch_norm_after_any_layer_goes(kind, norm, bias):
    make, shape = AFTER[kind]
    model = trained(nn.Sequential(make(bias=bias), norm_for(norm, len(shape)), nn.Tanh()))
    x = torch.randn(shape, dtype=torch.float64)
    folded = bn.fold(model, x)
    same_outputs(model, folded, x)
    assert folded.folding.folded == {"1": "0"}
    assert folded.folding.error <= 1e-12
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert isinstance(folded[1], (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.GELU))


BEFORE = {
    "linear": (lambda: nn.Linear(6, 4), (7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, bias=False), (3, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2), (3, 6, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, padding="valid"), (2, 6, 3, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2), (3, 6, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6, bias=False), (3, 6, 5, 6)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (3, 6, 5, 6)),
    "replicated": (lambda: nn.Conv2d(6, 4, 3, padding="same", padding_mode="replicate"), (3, 6, 5, 6)),
}


@pytest.mark.parametrize("kind", BEFORE)
@pytest.mark.parametrize(
    "norm", ["theirs", "without gamma and beta", "gamma alone", "beta alone", "frozen", "our sync"]
)
def test_a_batch_norm_before_a_layer_goes_where_that_is_exact(kind, norm):
    make, shape = BEFORE[kind]
    model = trained(nn.Sequential(nn.Tanh(), norm_for(norm, len(shape)), make()))
    x = torch.randn(shape, dtype=torch.float64)
    folded = bn.fold(model, x)
    same_outputs(model, folded, x)
    assert folded.folding.folded == {"1": "2"}


@pytest.mark.parametrize(
    "after", [nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, 3, padding="same"), nn.ConvTranspose2d(6, 4, 3, groups=2)]
)
def test_before_zero_padding_only_a_scale_can_go(after):
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm2d(6), copy.deepcopy(after)))
    x = torch.randn(3, 6, 5, 4, dtype=torch.float64)
    folded = bn.fold(model, x)
    assert "pads with zeros" in folded.folding.refused["1"]
    same_outputs(model, folded, x)
    nn.init.zeros_(model[1].running_mean)
    nn.init.zeros_(model[1].bias)
    folded = bn.fold(model, x)
    assert folded.folding.folded == {"1": "2"}
    same_outputs(model, folded, x)


def test_what_torch_cannot_fold():
    """Ours is the rest of this file: the same layers are among AFTER and NORMS."""
    with pytest.raises(RuntimeError, match="size of tensor"):
        fuse_conv_bn_eval(nn.ConvTranspose2d(4, 6, 3, groups=2).eval(), nn.BatchNorm2d(6).eval(), transpose=True)
    with pytest.raises(TypeError, match="NoneType"):
        fuse_linear_bn_eval(nn.Linear(4, 6).eval(), nn.BatchNorm1d(6, affine=False).eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_weight_is_rounded_once(dtype):
    model = trained(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).to(dtype)
    exact = fuse_conv_bn_eval(*copy.deepcopy(model).double())
    folded = bn.fold(model)
    for ours, theirs in zip(folded[0].parameters(), exact.parameters(), strict=True):
        assert ours.dtype == dtype
        # Half an ulp of each value, and a hair for the ties.
        error = (ours.double() - theirs).abs() / theirs.abs()
        assert error.max() <= 0.5001 * torch.finfo(dtype).eps


def test_a_tiny_variance_folds_and_what_would_overflow_stays():
    model = trained(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, eps=1e-12)))
    model[1].running_var.fill_(1e-20)
    x = torch.randn(8, 4, dtype=torch.float64)
    folded = bn.fold(model, x)
    # y is a difference of numbers a million times as large as those that the other tests add up.
    same_outputs(model, folded, x, ulps=1e6)
    half = bn.fold(model.half())
    assert "not be finite in torch.float16" in half.folding.refused["1"]
    assert torch.equal(half[0].weight, model[0].weight)


class Residual(nn.Module):
    """A block of ResNet."""

    def __init__(self, cin, cout, stride, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), norm(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), norm(cout)
        self.down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), norm(cout)) if stride > 1 else None

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += x if self.down is None else self.down(x)
        return y.relu()


class Inverted(nn.Module):
    """A block of MobileNet v2."""

    def __init__(self, channels, norm):
        super().__init__()
        wide = 2 * channels
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, wide, 1, bias=False), norm(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), norm(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, channels, 1, bias=False), norm(channels)),
        )

    def forward(self, x):
        return x + self.layers(x)


class Dense(nn.Module):
    """A block of DenseNet: batch norms before the convolutions."""

    def __init__(self, channels, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.norm2, self.conv2 = norm(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, features):
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return [*features, self.conv2(F.relu(self.norm2(y)))]


class DenseNet(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())
        self.blocks = nn.ModuleList(Dense(4 + 4 * i, norm) for i in range(3))
        self.last, self.head = norm(16), nn.Linear(16, 5)

    def forward(self, x):
        features = [self.stem(x)]
        for block in self.blocks:
            features = block(features)
        return self.head(self.last(torch.cat(features, 1)).mean((2, 3)))


def resnet(norm):
    return nn.Sequential(*(Residual(c, d, s, norm) for c, d, s in ((3, 8, 2), (8, 8, 1), (8, 16, 2))), nn.Flatten())


def mobilenet(norm):
    stem = nn.Conv2d(3, 8, 3, 2, 1), norm(8)
    return nn.Sequential(*stem, Inverted(8, norm), Inverted(8, norm), nn.Flatten(), nn.LazyLinear(5))


MODELS = {
    "resnet": (resnet, 8, []),
    "mobilenet": (mobilenet, 7, []),
    "densenet": (DenseNet, 4, ["blocks.0.norm1", "blocks.1.norm1", "blocks.2.norm1", "last"]),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, bn.BatchNorm2d])
@pytest.mark.parametrize("kind", MODELS)
def test_whole_models(kind, norm, fused):
    make, gone, stay = MODELS[kind]
    model, x = make(norm), torch.randn(4, 3, 12, 12)
    if fused:
        model, norm = bn.convert(model, fuse=True), bn.BatchNorm2d
    model(x)
    model = trained(model)
    before, described = copy.deepcopy(model.state_dict()), repr(model)

    folded = bn.fold(model, x.double())
    # Some ten layers one after the other.
    same_outputs(model, folded, x.double(), ulps=10 * ULPS)
    assert (len(folded.folding.folded), sorted(folded.folding.refused)) == (gone, stay)
    assert type(folded) is type(model)
    assert not any(m.training for m in folded.modules())
    norms = {name for name, m in model.named_modules() if isinstance(m, norm)} - set(stay)
    kept = {key for key in before if key.rpartition(".")[0] not in norms}
    assert set(folded.state_dict()) == kept | {f"{into}.bias" for into in folded.folding.folded.values()}

    assert repr(model) == described
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "folding")


@pytest.mark.slow
def test_the_result_compiles_exports_and_is_copied_and_pickled():
    model = trained(Residual(3, 8, 2, bn.BatchNorm2d)).float()
    x = torch.randn(2, 3, 12, 12)
    folded = bn.fold(model, x)
    y = folded(x)
    program = torch.export.export(folded, (x,))
    assert not any("norm" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), y)
    assert torch.equal(torch.compile(folded, fullgraph=True, backend="eager")(x), y)
    with pytest.warns(UserWarning, match="nothing to fold: the model has no batch norm; it has Conv2d, Identity"):
        again = bn.fold(folded)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), again):
        assert torch.equal(other(x), y)
    assert other.folding.folded == other.folding.refused == {}
    folded.load_state_dict(bn.fold(model).state_dict())


def test_a_batch_norm_between_two_layers_goes_into_the_first_and_several_into_one():
    model = trained(
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Identity())
    )
    x = torch.randn(8, 4, dtype=torch.float64)
    folded = bn.fold(model, x)
    same_outputs(model, folded, x, ulps=3 * ULPS)
    assert folded.folding.folded == {"0": "1", "2": "1", "3": "1"}


def test_a_block_in_two_places_folds_for_its_calls_are_all_alike():
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    model = trained(nn.Sequential(block, block))
    x = torch.randn(8, 4, dtype=torch.float64)
    folded = bn.fold(model, x)
    same_outputs(model, folded, x, ulps=3 * ULPS)
    assert folded.folding.folded == {"0.1": "0.0"}
    assert folded[0] is folded[1]
    assert vars(folded[0][1]).keys() == vars(nn.Identity()).keys()


def test_what_refers_to_a_folded_layer_elsewhere_sees_what_is_in_its_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
            self.order = [self.conv, self.norm]  # a plain list, which modules() does not see

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    model, x = trained(Model()), torch.randn(8, 4, dtype=torch.float64)
    folded = bn.fold(model, x)
    same_outputs(model, folded, x)
    assert folded.folding.folded == {"norm": "conv"}


def test_a_gradient_is_required_where_it_was():
    model = trained(nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3)))
    assert all(p.requires_grad for p in bn.fold(model).parameters())
    assert not any(p.requires_grad for p in bn.fold(model.requires_grad_(False)).parameters())
