"""Kernels that nobody has proved check themselves on first use; the CPU's operators stand in for a GPU's here."""

import warnings

import pytest
import torch

from batchnorm.ops import cpu  # noqa: F401  (its operators stand in)
from batchnorm.ops.gpu import available, trust
from batchnorm.ops.gpu.arguments import check
from batchnorm.ops.gpu.implementation import OPERATORS, by_plain

operators = torch.ops.batchnorm
EPS = 1e-5


@pytest.fixture(autouse=True)
def nothing_trusted(monkeypatch):
    monkeypatch.setattr(trust, "_trusted", set())
    monkeypatch.setattr(available, "_distrusted", [])


def arguments(name, x, **changed):
    """All arguments of an operator by name, defaults included."""
    random = torch.Generator().manual_seed(1)
    channels = x.size(1)
    weight, bias = torch.rand(channels, generator=random) + 0.5, torch.randn(channels, generator=random)
    if x.dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    statistics = operators.measure(x)
    known = {
        "x": x,
        "dy": torch.randn(x.shape, generator=random).to(x.dtype),
        "weight": weight,
        "bias": bias,
        "eps": EPS,
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "batches": torch.tensor(3),
        "momentum": 0.1,
        "statistics": statistics,
        "sums": torch.ones(2, channels, dtype=torch.float64) * 30,
        "act": 1,
        **changed,
    }
    schema = getattr(operators, name).default._schema.arguments
    return {a.name: known.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def right(name, given):
    return getattr(operators, name)(**given)


def a_bit_off(name, given):
    """As a kernel that forgets the last of 300 rows."""
    x = given["x"].clone()
    x[-1] = 0
    return getattr(operators, name)(**{**given, "x": x})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", [1, 5], ids=["relu", "silu"])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_right_is_trusted(name, act, dtype):
    x = (torch.randn(300, 9, generator=torch.Generator().manual_seed(0)) * 2 + 3).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trust.call(name, arguments(name, x, act=act), right, by_plain)
    assert len(trust._trusted) == 1
    called = []
    trust.call(name, arguments(name, x, act=act), lambda *a: called.append(a), lambda *a: pytest.fail("checked again"))
    assert len(called) == 1


@pytest.mark.parametrize("name", ["forward", "forward_", "measure", "infer", "normalize", "backward", "apply"])
def test_what_is_wrong_is_not(name):
    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)) + 20
    given = arguments(name, x)
    before = {key: value.clone() for key, value in given.items() if isinstance(value, torch.Tensor)}
    with pytest.warns(RuntimeWarning, match=f"of {name}, "):
        result = trust.call(name, given, a_bit_off, by_plain)
    moved = ("running_mean", "running_var", "batches")
    expected_given = {**given, **{key: before[key].clone() for key in moved if given.get(key) is not None}}
    expected = by_plain(name, expected_given)
    for found, should in zip(trust._flat(result), trust._flat(expected), strict=True):
        torch.testing.assert_close(found, should, rtol=0, atol=0)
    for key in moved:
        if given.get(key) is not None:
            torch.testing.assert_close(given[key], expected_given[key], rtol=0, atol=0)  # moved once, and rightly
    assert available.why_not(torch.device("cuda", 0)) is not None


X300 = torch.randn(300, 9, generator=torch.Generator().manual_seed(0)) + 20
FIFTH = torch.arange(300) == 5


def half_again_off(name, given):
    return tuple(None if each is None else each * 1.5 for each in by_plain(name, given))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": X300.masked_fill(FIFTH[:, None], torch.nan), "mask": ~FIFTH},
        {"x": X300.masked_fill(FIFTH[:, None], 1e30), "mask": ~FIFTH},
        {"x": X300, "dy": torch.ones(300, 9).masked_fill(FIFTH[:, None], torch.nan), "mask": ~FIFTH},
        {"x": X300, "need_dx": False, "act": 5},
    ],
    ids=["NaN under a mask", "1e30 under a mask", "a gradient of NaN under a mask", "parameters' gradients alone"],
)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_what_is_wrong_is_seen_whatever_stands_beside_it(name, changed):
    given = {key: value for key, value in {**arguments(name, X300), **changed}.items() if key in arguments(name, X300)}
    with pytest.warns(RuntimeWarning, match=f"of {name}, "):
        trust.call(name, given, half_again_off, by_plain)
    assert trust._trusted == set()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_what_cannot_be_compared_is_not_trusted_yet(odd):
    x = X300.clone()
    x[3, 0] = odd  # of one channel: the others are compared
    given = arguments("forward", x)
    trust.call("forward", given, right, by_plain)
    assert trust._trusted == set()
    assert available._distrusted == []
    with pytest.warns(RuntimeWarning, match="of forward, "):
        trust.call("forward", given, half_again_off, by_plain)


def test_a_kernel_that_raises_is_not(monkeypatch):
    def broken(name, given):
        given["running_mean"].fill_(7)
        raise RuntimeError("no kernel image is available")

    given = arguments("forward_", torch.randn(30, 5))
    with pytest.warns(RuntimeWarning, match="raised RuntimeError: no kernel image is available"):
        trust.call("forward_", given, broken, by_plain)
    assert float(given["running_mean"].abs().max()) < 1


def test_out_of_memory_is_no_ones_fault():
    def full(name, given):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        trust.call("measure", arguments("measure", torch.randn(30, 5)), full, by_plain)
    assert available._distrusted == []


def test_out_of_memory_while_checking_leaves_the_running_statistics_as_they_were():
    """The call is tried again, which would move them twice."""

    def full(name, given):
        raise torch.OutOfMemoryError("full")

    given = arguments("forward_", torch.randn(30, 5) + 9)
    with pytest.raises(torch.OutOfMemoryError):
        trust.call("forward_", given, right, full)
    assert float(given["running_mean"].abs().max()) == 0
    assert int(given["batches"]) == 3


@pytest.mark.parametrize(("act", "slope"), [(1, 0.0), (2, 0.0), (3, 0.2), (4, 1.3), (8, 0.0)])
def test_one_derivative_on_the_other_side_of_a_kink_is_no_fault(act, slope):
    def flipped(name, given):
        dx, *others = by_plain(name, given)
        dx[7, 0] *= 1.3
        return dx, *others

    x = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
    given = {**arguments("backward", x, act=act), "slope": slope}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trust.call("backward", given, flipped, by_plain)
    assert len(trust._trusted) == 1


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given = arguments("measure", torch.randn(30, 5))
    found = trust.call("measure", given, lambda *a: pytest.fail("nobody has checked this"), by_plain)
    torch.testing.assert_close(found, by_plain("measure", given))


def test_another_layout_dtype_or_activation_is_another_variant():
    x = torch.randn(8, 16, 6, 6)
    given = arguments("forward", x)
    changed = [
        {**given, "x": x.double()},
        {**given, "x": x.contiguous(memory_format=torch.channels_last)},
        {**given, "act": 2},
        {**given, "weight": None},
        {**given, "residual": x},
        {**given, "mask": torch.ones(8, 6, 6, dtype=torch.bool)},
        arguments("forward", torch.randn(8, 16, 40, 40)),
    ]
    keys = {trust.variant("forward", each) for each in [given, *changed]}
    assert len(keys) == 1 + len(changed)
    assert trust.variant("forward", {**given, "eps": 1.0, "slope": 2.0}) in keys


# What the kernels could not read safely never reaches them.
X = torch.randn(6, 4)
REFUSED = {
    "one dimension": {"x": X[0]},
    "integers": {"x": X.int()},
    "a weight of other channels": {"weight": torch.ones(5)},
    "a weight of integers": {"weight": torch.ones(4, dtype=torch.int32)},
    "a residual of another shape": {"residual": X[:1]},
    "a residual of another dtype": {"residual": X.double()},
    "a mask of another shape": {"mask": torch.ones(5, dtype=torch.bool)},
    "a mask of bytes": {"mask": torch.ones(6, dtype=torch.uint8)},
    "no such activation": {"act": 11},
    "eps": {"eps": 0.0},
    "one value": {"x": X[:1]},
    "a counter of floats": {"batches": torch.tensor(1.0)},
    "another device": {"weight": torch.ones(4, device="meta")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(RuntimeError):
        check("forward_", {**arguments("forward_", X), **REFUSED[name]})


def test_freed_memory_is_refused():
    given = arguments("backward", X)
    check("backward", given)
    given["dy"].untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="dy has no memory behind it"):
        check("backward", given)


@pytest.mark.parametrize("name", ["statistics", "sums"])
def test_rows_are_checked(name):
    given = arguments("apply", X)
    check("apply", given)
    for wrong in (given[name][:1], given[name].float(), given[name][:, :3], given[name].unsqueeze(1)):
        with pytest.raises(RuntimeError, match=name):
            check("apply", {**given, name: wrong})
