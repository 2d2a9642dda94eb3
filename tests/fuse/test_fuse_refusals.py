"""convert(fuse=True) leaves what it cannot prove to be the same, says why, and obeys whatever changes later."""

import copy
import functools
import linecache
import types

import pytest
import torch
import torch.nn.functional as F
from cases import make
from fusible import BasicBlock, Cifar, ConvBNReLU, Timm
from torch import nn

import batchnorm as bn


class Two(nn.Module):
    """Two batch norms and an activation, for the forwards below."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.seen = []


class WithoutGradient(Two):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.relu(x)


class WithinAWith(Two):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.a(x)
            x = self.relu(x)
        return x * 1


class Caught(Two):
    def forward(self, x):
        y, narrow = x, x[:, :2]
        try:
            y = self.a(x)
            y += narrow  # does not broadcast
            y = self.relu(y)
        except RuntimeError:
            y = y - 1
        return y


class UsedAgain(Two):
    def forward(self, x):
        z = self.a(x)
        y = self.relu(z)
        return y * z


class UsedInTheNextRound(Two):
    def forward(self, x):
        z = x
        for _ in range(2):
            x = x + z
            z = self.a(x)
            y = self.relu(z)
        return y


class UsedInPlaceAfterwards(Two):
    def forward(self, x):
        z = self.a(x)
        y = self.relu(z)
        z += 1
        return y + z


class Kept(Two):
    def forward(self, x):
        x = self.a(x)
        self.seen.append(x)
        x = self.relu(x)
        return x + self.seen.pop()


class SeenByAFunction(Two):
    def forward(self, x):
        def peek():
            return z.detach().clone()

        z = self.a(x)
        z = self.relu(z)
        return z + peek()


class ChangesTheInput(Two):
    def forward(self, x):
        x = x * 1
        z = self.a(x)
        x.add_(1)
        return self.relu(z) + x


class ChangesTheInputBesideTheActivation(Two):
    def forward(self, x):
        x = x * 1
        z = self.a(x)
        return torch.cat([x.mul_(2), self.relu(z)])


class ChangesTheInputByAModule(Two):
    def forward(self, x):
        x = x * 1
        z = self.a(x)
        y = self.inplace(x)
        z = z + y
        return self.relu(z)


class ChangesTheInputInTheSum(Two):
    def forward(self, x):
        x = x * 1
        return self.relu(self.a(x) + x.neg_())


class AddsIntoTheOther(Two):
    def forward(self, x):
        identity = x * 1
        y = identity
        z = self.a(x)
        identity += z
        return self.relu(identity) + y


class AddsDirectlyIntoTheOther(Two):
    def forward(self, x):
        identity = x * 1
        y = identity
        identity += self.a(x)
        identity = self.relu(identity)
        return identity + y


class AsksAPropertyWhileItSums(Two):
    @property
    def is_warm(self):
        return bool(self.a.num_batches_tracked % 2)

    def forward(self, x):
        z = self.a(x)
        y = self.b(x) if self.is_warm else x
        z = z + y
        return self.relu(z)


class Chance(Two):
    def forward(self, x):
        z = self.a(x)
        noise = torch.rand_like(x)
        z = z + noise
        return self.relu(z)


class AsksForItsClass(Two):
    def forward(self, x):
        x = self.relu(self.a(x))
        return x * 2 if type(self) is AsksForItsClass else x


class LooksAtItsVariables(Two):
    def forward(self, x):
        z = self.a(x)
        z = self.relu(z)
        return z + len(locals())


class Inside(Two):
    def forward(self, x):
        def part(z):
            z = self.a(z)
            return self.relu(z)

        return part(x)


class Decorated(Two):
    @torch.no_grad()
    def forward(self, x):
        return self.relu(self.a(x))


class Registered(Two):
    known = {}  # noqa: RUF012

    def __init_subclass__(cls):
        Registered.known[cls.__name__] = cls

    def forward(self, x):
        return self.relu(self.a(x))


class Meta(type):
    pass


class OfAMetaclass(Two, metaclass=Meta):
    def forward(self, x):
        return self.relu(self.a(x))


REFUSED = {
    WithoutGradient: "`x = self.a.x.`: the block ends before",
    WithinAWith: "inside a with, try",
    Caught: "inside a with, try",
    UsedAgain: "used again",
    UsedInTheNextRound: "used again",
    UsedInPlaceAfterwards: "used again",
    Kept: "`self.seen.append.x.`: its output is used again",
    SeenByAFunction: "another function sees",
    ChangesTheInput: "`x.add_.1.`: this is between",
    ChangesTheInputBesideTheActivation: "between",
    ChangesTheInputByAModule: "`y = self.inplace.x.`: this is between",
    ChangesTheInputInTheSum: "the other summand is computed after the batch norm",
    AddsIntoTheOther: "written into the other summand",
    AddsDirectlyIntoTheOther: "written into the other summand",
    AsksAPropertyWhileItSums: "this is between",
    Chance: "rand_like.*this is between",
    AsksForItsClass: "type would see that the class has changed",
    LooksAtItsVariables: "locals would see",
    Inside: "function inside a function",
    Decorated: "something is wrapped around it",
    Registered: "__init_subclass__",
    OfAMetaclass: "metaclass Meta",
}


def same(plain, fused, x, differentiates):
    """Bit for bit what the model computes unfused: values, the input's gradient, and the statistics."""
    results = []
    for model in (plain, fused):
        torch.manual_seed(1)
        t = x.clone().requires_grad_(differentiates)
        with torch.set_grad_enabled(differentiates):
            y = model(t)
        if y.requires_grad:
            y.sum().backward()
        results.append([y, t.grad, t, *model.buffers()])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
def test_what_might_not_be_the_same_is_left_and_said(build):
    torch.manual_seed(0)
    plain = nn.Sequential(bn.convert(build()), bn.convert(BasicBlock(2, 2)))
    fused = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=rf"not fused everywhere:\n  1 \S+ \(0\): .*{REFUSED[build]}"):
        bn.convert(fused, fuse=True)
    assert type(fused[0]) is build
    assert type(fused[1]) is not BasicBlock  # one that cannot be does not keep the others from it
    explained = bn.nn.explain_fusion(fused)
    assert not explained["0"].fused
    assert len(explained["1"].fused) == 2
    # autograd forbids to change what a batch norm keeps
    same(plain[0], fused[0], make((8, 6)), "ChangesTheInput" not in build.__name__)


class Nothing(Two):
    def forward(self, x):
        x = self.a(x)
        x = x * 2
        x = self.relu(x)
        x = self.b(x)
        return x.mean()


class Fallen(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_sequential_with_a_forward_of_its_own_is_left_and_named():
    model = Fallen(nn.BatchNorm1d(6), nn.ReLU())
    with pytest.warns(UserWarning, match="1 Fallen .*: .*, its forward does not call 0 and 1 by name"):
        bn.convert(model, fuse=True)
    assert type(model) is Fallen


def test_nothing_to_fuse_is_nothing_to_warn_of():
    model = Nothing()
    kind = type(model)
    bn.convert(model, fuse=True)
    assert type(model) is kind
    assert bn.nn.explain_fusion(model) == {}


def from_text(text, name="<text>"):
    """A model whose forward has this source, which inspect finds or not."""
    namespace = {"torch": torch, "nn": nn, "Two": Two, "F": F}
    exec(compile(text, name, "exec"), namespace)
    return namespace["Model"]


TEXT = "class Model(Two):\n    def forward(self, x):\n        return self.relu(self.a(x)){}\n"


def test_without_a_source_it_says_so():
    with pytest.warns(UserWarning, match="the model.: forward has no readable source"):
        bn.convert(from_text(TEXT.format(""))(), fuse=True)


@pytest.mark.parametrize("said", ["", " * 2"])
def test_a_source_edited_after_it_was_loaded_is_not_believed(said):
    name = f"<edited {len(said)}>"
    text = TEXT.format(said)
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    model = from_text(TEXT.format(""), name)()
    if said:
        with pytest.warns(UserWarning, match="differs from its source file"):
            bn.convert(model, fuse=True)
    else:
        assert type(bn.convert(model, fuse=True)) is not type(Two())
    x = make((8, 6))
    assert torch.equal(model.train()(x), copy.deepcopy(model.a)(x).relu())


# What happens after the model was fused.


def hook_on_the_batch_norm(block):
    block.bn2.register_forward_hook(lambda m, args, y: y + 1)


def hook_on_the_activation(block):
    block.relu.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def gradient_hook(block):
    block.relu = nn.ReLU()
    block.bn1.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))


def hook_in_the_shortcut(block):
    # sees the batch norm's statistics as they were left by the call before it
    block.downsample[0].register_forward_hook(lambda m, args, y: y + block.bn2.running_mean.mean())


def hook_on_the_shortcut(block):
    block.downsample.register_forward_pre_hook(lambda m, args: (args[0] + block.bn2.running_var.mean(),))


def other_activation(block):
    block.relu = nn.Softplus()


def activation_with_a_forward_of_its_own(block):
    block.relu.forward = lambda x: x * 2


def batch_norm_with_a_forward_of_its_own(block):
    block.bn1.forward = lambda x: x * 2


def no_batch_norm(block):
    block.bn2 = nn.Identity()


def torchs_batch_norm(block):
    bn.revert(block.bn2)


def batch_norm_with_an_activation(block):
    block.bn1 = bn.BatchNorm2d(8, activation="tanh")


def shortcut_in_place(block):
    block.conv1, block.conv2, block.bn1, block.relu = (nn.Identity() for _ in range(4))
    block.requires_grad_(False).downsample = nn.ReLU(inplace=True)


def shortcut_is_the_batch_norm(block):
    block.downsample = nn.Sequential(nn.Conv2d(4, 8, 1), block.bn2)


def shortcut_shares_statistics(block):
    block.downsample[1].running_mean = block.bn2.running_mean


def shortcut_of_another_kind(block):
    class Peeks(nn.Module):
        def forward(self, x):
            return torch.zeros(8, 1, 1) + block.bn2.running_mean[:, None, None]

    block.downsample = Peeks()


def shortcut_broadcasts(block):
    block.downsample = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 8, 1))


def forward_of_the_instance(block):
    block.forward = types.MethodType(lambda self, x: self.conv1(x), block)


LATER = [
    hook_on_the_batch_norm,
    hook_on_the_activation,
    gradient_hook,
    hook_in_the_shortcut,
    hook_on_the_shortcut,
    other_activation,
    activation_with_a_forward_of_its_own,
    batch_norm_with_a_forward_of_its_own,
    no_batch_norm,
    torchs_batch_norm,
    batch_norm_with_an_activation,
    shortcut_in_place,
    shortcut_is_the_batch_norm,
    shortcut_shares_statistics,
    shortcut_of_another_kind,
    shortcut_broadcasts,
    forward_of_the_instance,
]


@pytest.mark.parametrize("change", LATER, ids=lambda change: change.__name__)
def test_what_changes_later_is_obeyed(change):
    plain = bn.convert(BasicBlock(4, 8))
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    for block in (plain, fused):
        torch.manual_seed(3)
        change(block)
    channels = 8 if change is shortcut_in_place else 4
    x = make((4, channels, 6, 6))
    results = []
    for block in (plain, fused):
        for _ in range(2):
            t = x.clone().requires_grad_(change is not shortcut_in_place)  # autograd forbids that one
            y = block(t)
            if t.requires_grad:
                y.square().sum().backward()
        results.append([y, t if t.grad is None else t.grad, *block.buffers()])
    for a, b in zip(*results, strict=True):
        # What is still fused differs by roundings, of numbers up to 30; what was changed, by far more.
        torch.testing.assert_close(b, a, rtol=1e-5, atol=3e-5)


def test_methods_given_to_the_class_later_are_obeyed(monkeypatch):
    class Block(Cifar):
        pass

    class Plain(ConvBNReLU):
        pass

    model = bn.convert(nn.Sequential(Block(4, 4), Plain(4, 4)), fuse=True).eval()
    x = make((4, 4, 6, 6))

    def times(factor):
        def forward(self, x):
            return x * factor

        return forward

    monkeypatch.setattr(Cifar, "forward", times(2))
    assert torch.equal(model[0](x), x * 2)
    Block.forward, Plain.forward = times(3), times(5)
    assert torch.equal(model(x), x * 3 * 5)
    with pytest.warns(UserWarning, match="1 Plain .*: .*, its forward does not call 1 and 2 by name"):
        assert torch.equal(bn.convert(model, fuse=True)(x), x * 3 * 5)
    assert type(model[0]) is Block


def test_functions_replaced_later_are_obeyed(monkeypatch):
    model = bn.convert(Cifar(4, 4), fuse=True).eval()
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: x * 0 + 7)
    assert (model(make((4, 4, 6, 6))) == 7).all()


def test_parts_that_were_none_are_used_once_they_are_there():
    plain = bn.convert(Timm(4, 4)).eval()
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    for block in (plain, fused):
        block.drop_path = nn.Hardtanh(-0.1, 0.1)
        block.drop_block = nn.Hardtanh(-0.2, 0.2)
        block.downsample = nn.Tanh()
    x = make((4, 4, 6, 6))
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_an_input_that_is_no_plain_tensor_takes_the_forward_as_it_was():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    model = bn.convert(Cifar(4, 4), fuse=True).eval().requires_grad_(False)
    x = make((4, 4, 6, 6))
    y = model(x.as_subclass(Watched))
    assert type(y) is Watched
    assert seen.count("relu") == 2
    torch.testing.assert_close(y.as_subclass(torch.Tensor), model(x), rtol=1e-5, atol=1e-5)


class Private(Two):
    """Private names, super(), defaults, keywords and closures have to work in rewritten source as in any."""

    __scale = 3.0

    def forward(self, x, *, shift=1.0, **more):
        super().extra_repr()
        super(Private, self).extra_repr()  # noqa: UP008
        x = self.relu(self.a(x))
        return x * self.__scale + shift + more.get("extra", 0.0)


def test_names_defaults_and_keywords_mean_what_they_meant():
    outside = 2.0

    class Closure(Private):
        own = 2.0

        def forward(self, x, factor=5.0):
            return super(Closure, self).forward(x) * outside * Closure.own + self.relu(self.b(x)) * factor  # noqa: UP008

    plain = bn.convert(Closure())
    fused = bn.convert(copy.deepcopy(plain), fuse=True)
    assert type(fused) is not Closure
    x = make((8, 6))
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
    outside = 7.0
    torch.testing.assert_close(fused(x, factor=1.0), plain(x, factor=1.0), rtol=1e-5, atol=1e-5)
    base = bn.convert(Private())
    twin = bn.convert(copy.deepcopy(base), fuse=True)
    assert type(twin) is not Private
    torch.testing.assert_close(twin(x, shift=2.0, extra=1.0), base(x, shift=2.0, extra=1.0), rtol=1e-5, atol=1e-5)


def test_errors_are_raised_where_they_were_and_change_nothing():
    model = bn.convert(BasicBlock(4, 8), fuse=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="expected input"):
        model(make((4, 5, 6, 6)))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_shared_wrappers_do_not_hide_a_decorator():
    def doubled(forward):
        @functools.wraps(forward)
        def twice(self, x):
            return forward(self, x) * 2

        return twice

    class Wrapped(Two):
        @doubled
        def forward(self, x):
            return self.relu(self.a(x))

    model = Wrapped()
    with pytest.warns(UserWarning, match="something is wrapped around it"):
        bn.convert(model, fuse=True)
    assert type(model) is Wrapped
