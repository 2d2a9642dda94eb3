"""batch_norm() against the float64 oracle, with torch's own error as the yardstick: values, gradients, statistics."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, SHAPES, laid_out, make, vectors
from compare import assert_close
from torch import nn
from torch.autograd import forward_ad

import batchnorm as bn
from batchnorm import activations, reference

ACTIVATIONS = [None, *activations.NAMES, nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5), nn.ELU(1.7), nn.GELU("tanh")]
TORCH_ACTIVATIONS = {
    None: lambda z: z,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    **{name: getattr(F, name) for name in ("relu", "relu6", "elu", "silu", "gelu", "hardswish")},
}


def torch_batch_norm(x, v, training, eps=1e-5, residual=None, activation=None):
    """The same thing put together from torch's operators."""
    z = F.batch_norm(
        x, v["running_mean"], v["running_var"], v.get("weight"), v.get("bias"), training, momentum=0.1, eps=eps
    )
    z = z if residual is None else z + residual
    return TORCH_ACTIVATIONS[activation](z) if activation in TORCH_ACTIVATIONS else activation(z)


def check_against_oracle(x, v, training, *, residual=None, activation=None, mask=None, dy=None, with_torch=True):
    """Values, gradients and running statistics of batch_norm, each within twice torch's own error."""
    parsed = activations.parse(activation)
    leaves = {"x": x, "weight": v.get("weight"), "bias": v.get("bias"), "residual": residual}

    def run(function):
        copies = {k: None if t is None else t.detach().requires_grad_() for k, t in leaves.items()}
        stats = {k: v[k].clone() for k in ("running_mean", "running_var")}
        y = function(copies, stats)
        gradient = torch.ones((), dtype=y.dtype).expand(y.shape) if dy is None else dy
        y.backward(gradient)
        return y, {k: t.grad for k, t in copies.items() if t is not None}, stats, gradient

    y, grads, stats, gradient = run(
        lambda c, s: bn.batch_norm(
            c["x"], **s, weight=c["weight"], bias=c["bias"], training=training,
            residual=c["residual"], activation=activation, mask=mask,
        )
    )  # fmt: skip
    peer_y, peer_grads, peer_stats = None, {}, {}
    if with_torch:
        peer_y, peer_grads, peer_stats, _ = run(
            lambda c, s: torch_batch_norm(c["x"], {**c, **s}, training, residual=c["residual"], activation=activation)
        )
    options = {
        "running": None if training else (v["running_mean"], v["running_var"]),
        "residual": residual,
        "activation": parsed,
        "mask": mask,
    }
    exact = reference.forward(x, v.get("weight"), v.get("bias"), **options)
    exact_grads = reference.backward(gradient, x, v.get("weight"), v.get("bias"), **options)

    assert y.dtype == x.dtype
    assert_close(y, exact.y, peer=peer_y)
    # dweight and dbias are sums over the batch: their rounding is relative to the sum of the absolute terms.
    terms = max(1.0, gradient.double().abs().sum().item())
    for name, expected in zip(("x", "weight", "bias", "residual"), exact_grads, strict=True):
        if name in grads:
            scale = terms if name in ("weight", "bias") else None
            assert_close(grads[name], expected, peer=peer_grads.get(name), scale=scale)
    if training:
        moments = bn.Moments.measure(x, mask)
        enough = moments.count > 1
        mean = torch.where(enough, 0.9 * v["running_mean"].double() + 0.1 * moments.mean, v["running_mean"].double())
        var = 0.9 * v["running_var"].double() + 0.1 * moments.variance(unbiased=True)
        var = torch.where(enough, var, v["running_var"].double())
        assert_close(stats["running_mean"], mean, peer=peer_stats.get("running_mean"))
        assert_close(stats["running_var"], var, peer=peer_stats.get("running_var"))
    else:
        assert torch.equal(stats["running_mean"], v["running_mean"])
        assert torch.equal(stats["running_var"], v["running_var"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_layout_and_dtype(shape, layout, dtype, training):
    x = laid_out(make(shape, dtype), layout)
    # torch raises on some empty shapes; where nothing is added up, rounding is all there is to allow anyway.
    dy = laid_out(make(shape, dtype), layout)
    check_against_oracle(x, vectors(shape[1], dtype), training, dy=dy, with_torch=x.numel() > 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation_with_and_without_residual(activation, with_residual, dtype, training):
    x = make((4, 5, 6, 7), dtype)
    residual = make(x.shape, dtype) if with_residual else None
    check_against_oracle(
        x, vectors(5, dtype), training, residual=residual, activation=activation, dy=make(x.shape, dtype)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")])
def test_weight_or_bias_alone_or_neither(missing, training):
    v = {k: t for k, t in vectors(5).items() if k not in missing}
    check_against_oracle(make((6, 5, 9)), v, training, activation="silu", dy=make((6, 5, 9)))


def test_a_gradient_that_is_one_number_expanded():
    check_against_oracle(make((4, 5, 6, 7)), vectors(5), training=True, activation="relu", dy=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_float32_parameters_beside_a_low_precision_input(dtype, training):
    check_against_oracle(make((4, 5, 6, 7), dtype), vectors(5), training, dy=make((4, 5, 6, 7), dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masked_samples_neither_count_nor_move(layout, with_residual, dtype, training):
    x = laid_out(make((4, 5, 6, 7), dtype), layout)
    mask = torch.rand(4, 6, 7) < 0.5
    residual = make(x.shape, dtype) if with_residual else None
    dirty = torch.where(mask.unsqueeze(1), x, torch.nan)
    dy = torch.where(mask.unsqueeze(1), make(x.shape, dtype), torch.nan)
    # torch has no masks: the bound is the rounding of y and of the sums alone.
    check_against_oracle(
        dirty, vectors(5), training, residual=residual, activation="relu", mask=mask, dy=dy.nan_to_num(),
        with_torch=False,
    )  # fmt: skip


def test_one_counted_value_has_a_mean_but_no_unbiased_variance():
    running = torch.zeros(2), torch.full((2,), 3.0)
    mask = torch.tensor([[False, True, False]])
    x = torch.arange(6.0).view(1, 2, 3)
    bn.batch_norm(x, *running, training=True, momentum=0.5, mask=mask)
    assert running[0].tolist() == [0.5, 2.0]
    assert running[1].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(("shape", "dtype"), [((5, 1, 1), torch.float32), ((4, 5, 6, 7), torch.float64)])
def test_a_residual_of_another_shape_or_dtype_is_added_as_by_plus(shape, dtype):
    x, residual = make((4, 5, 6, 7)), make(shape, dtype).requires_grad_()
    y = bn.batch_norm(x, training=True, residual=residual, activation="relu")
    y.sum().backward()
    gradient, residual.grad = residual.grad, None
    expected = (bn.batch_norm(x, training=True) + residual).relu()
    expected.sum().backward()
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert torch.equal(gradient, residual.grad)


def test_an_all_masked_batch_leaves_the_running_statistics_alone():
    v = vectors(5)
    before = {k: t.clone() for k, t in v.items()}
    x = torch.full((4, 5, 6), torch.nan, requires_grad=True)
    y = bn.batch_norm(x, **v, training=True, mask=torch.zeros(4, 6, dtype=torch.bool))
    y.sum().backward()
    assert y.eq(0).all()
    assert x.grad.eq(0).all()
    assert all(torch.equal(v[k], before[k]) for k in v)


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e4, 1e5, 1e6])
def test_the_error_does_not_grow_with_the_mean(mean, layout):
    x = laid_out((torch.randn(64, 8, 32, 32) + mean), layout)
    running_mean, running_var = torch.zeros(8), torch.ones(8)
    y = bn.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    exact = reference.forward(x)
    near = exact.y.abs() <= 6
    assert (y.double() - exact.y)[near].abs().max() <= 4e-6
    unbiased = bn.Moments.measure(x).variance(unbiased=True)
    assert ((running_var.double() - unbiased) / unbiased).abs().max() <= 1e-6


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(16, 5), (4, 5, 6, 7)])
def test_a_poisoned_channel_poisons_no_other(shape, poison):
    x = make(shape)
    expected = bn.batch_norm(x, training=True)
    x[(1, 2, *[0] * (len(shape) - 2))] = poison
    x.requires_grad_()
    y = bn.batch_norm(x, training=True, activation="relu")
    y.sum().backward()
    others = [0, 1, 3, 4]
    assert y[:, 2].isnan().all()
    assert torch.equal(y[:, others], expected[:, others].relu())
    assert x.grad[:, others].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "tanh", "elu"])
def test_second_derivatives(activation, masked, with_residual, training):
    shape = (3, 2, 4)
    v = vectors(2, torch.float64)
    mask = torch.rand(3, 4) < 0.7 if masked else None
    inputs = [make(shape, torch.float64), v["weight"], v["bias"]]
    if with_residual:
        inputs.append(make(shape, torch.float64))

    def function(x, weight, bias, residual=None):
        return bn.batch_norm(
            x, v["running_mean"].clone(), v["running_var"].clone(), weight, bias, training,
            residual=residual, activation=activation, mask=mask,
        )  # fmt: skip

    inputs = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.SiLU()], ids=str)
def test_a_gradient_penalty_leaves_the_gradients_that_torchs_layers_have(activation, training):
    """Zeros where they have zeros: DistributedDataParallel waits for parameters that have none."""
    x, v, found = make((6, 3), torch.float64), vectors(3, torch.float64), []

    def torchs(*arguments, activation):
        y = F.batch_norm(*arguments)
        return y if activation is None else activation(y)

    for function in (bn.batch_norm, torchs):
        t, weight, bias = (given.clone().requires_grad_() for given in (x, v["weight"], v["bias"]))
        running = v["running_mean"].clone(), v["running_var"].clone()
        y = function(t, *running, weight, bias, training, activation=activation)
        (g,) = torch.autograd.grad(y.sum(), t, create_graph=True)
        g.square().sum().backward()
        found.append((t.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_second_derivative_agrees_with_torchs_in_float32():
    x, w = make((4, 3, 5, 5)), torch.rand(3) + 0.5

    def penalty(function, dtype):
        t = x.to(dtype).requires_grad_()
        y = function(t, weight=w.to(dtype), training=True)
        (g,) = torch.autograd.grad(y.pow(3).sum(), t, create_graph=True)
        g.square().sum().backward()
        return t.grad

    def torchs(t, weight, training):
        return F.batch_norm(t, None, None, weight, None, training)

    exact = penalty(torchs, torch.float64)
    assert_close(penalty(bn.batch_norm, torch.float32), exact, peer=penalty(torchs, torch.float32))


def test_torch_func_transforms_agree_with_torchs():
    x = torch.randn(6, 4, 3, 2)
    weights = torch.rand(6, 3)

    def ours(t, w):
        return bn.batch_norm(t, weight=w, training=True, activation="tanh")

    def torchs(t, w):
        return torch.tanh(F.batch_norm(t, None, None, w, None, True))

    close = {"rtol": 1e-4, "atol": 1e-5}  # float32, derivatives of size 1 over 8 values
    batched = torch.func.vmap(ours)(x, weights)
    torch.testing.assert_close(batched, torch.stack([torchs(t, w) for t, w in zip(x, weights, strict=True)]), **close)
    shared = torch.func.vmap(ours, in_dims=(None, 0))(x[0], weights)
    torch.testing.assert_close(shared, torch.stack([torchs(x[0], w) for w in weights]), **close)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(
            transform(ours, argnums=(0, 1))(x[0], weights[0]),
            transform(torchs, argnums=(0, 1))(x[0], weights[0]),
            **close,
        )
    per_model = torch.func.vmap(torch.func.grad(lambda t, w: ours(t, w).pow(3).sum(), argnums=1))(x, weights)
    one_by_one = [
        torch.func.grad(lambda t, w: torchs(t, w).pow(3).sum(), argnums=1)(t, w)
        for t, w in zip(x, weights, strict=True)
    ]
    torch.testing.assert_close(per_model, torch.stack(one_by_one), **close)


def test_vmap_over_masks():
    x, masks = make((2, 4, 3, 5)), torch.rand(2, 4, 5) < 0.6
    together = torch.func.vmap(lambda t, m: bn.batch_norm(t, training=True, mask=m))(x, masks)
    apart = [bn.batch_norm(t, training=True, mask=m) for t, m in zip(x, masks, strict=True)]
    torch.testing.assert_close(together, torch.stack(apart), rtol=1e-6, atol=1e-6)  # an ulp of y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "tanh"])
def test_forward_mode_nests_with_itself_and_with_reverse(activation, training):
    running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    x, residual = make((4, 2), torch.float64), make((4, 2), torch.float64)

    def ours(t):
        given = [r.clone() for r in running]
        return bn.batch_norm(t, *given, training=training, residual=residual, activation=activation).pow(2).sum()

    def exact(t):
        options = {"running": None if training else running, "residual": residual}
        return reference.forward(t, activation=activations.parse(activation), **options).y.pow(2).sum()

    expected = torch.func.jacrev(torch.func.jacrev(exact))(x)
    for outer, inner in ((torch.func.jacfwd, torch.func.jacfwd), (torch.func.jacrev, torch.func.jacfwd)):
        torch.testing.assert_close(outer(inner(ours))(x), expected, rtol=1e-9, atol=1e-9)
    tangent = make((4, 2), torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        (gradient,) = torch.autograd.grad(ours(dual), dual)
        along = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(along, torch.einsum("ijkl,kl->ij", expected, tangent), rtol=1e-9, atol=1e-9)


@pytest.mark.processes
@pytest.mark.slow
def test_transforms_compile_and_agree_with_eager():
    x = make((4, 3))
    gradient = torch.func.grad(lambda t: bn.batch_norm(t, training=True, activation="tanh").pow(3).sum())
    compiled = torch.compile(gradient, fullgraph=True)(x)
    assert compiled.abs().max() > 0.1
    torch.testing.assert_close(compiled, gradient(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_derivatives_do_not_see_what_lies_under_the_mask(activation):
    clean, mask = make((4, 2, 5), torch.float64), torch.rand(4, 5) < 0.6
    weight, results = torch.rand(2, dtype=torch.float64).requires_grad_(), []
    for hidden in (0.0, torch.nan):
        x = torch.where(mask[:, None], clean, hidden).requires_grad_()
        y = bn.batch_norm(x, weight=weight, training=True, mask=mask, activation=activation)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), (x, weight)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_forward_mode_agrees_with_torchs():
    x, tangent = make((4, 3, 5)), make((4, 3, 5))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        ours = forward_ad.unpack_dual(bn.batch_norm(dual, training=True)).tangent
        torchs = forward_ad.unpack_dual(F.batch_norm(dual, None, None, training=True)).tangent
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-6)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    v = vectors(5)
    x = make((4, 5, 6, 7)).requires_grad_()

    def step(t, stats):
        return bn.batch_norm(t, *stats, v["weight"], v["bias"], training, activation="relu")

    eager_stats = [v["running_mean"].clone(), v["running_var"].clone()]
    compiled_stats = [t.clone() for t in eager_stats]
    eager = step(x, eager_stats)
    (expected,) = torch.autograd.grad(eager.sum(), x)
    compiled = torch.compile(step, fullgraph=True)(x, compiled_stats)
    (gradient,) = torch.autograd.grad(compiled.sum(), x)
    # Inductor may fuse a multiply and an add: an ulp of values of size 5.
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled_stats, eager_stats, rtol=1e-6, atol=1e-6)


X = torch.zeros(4, 3, 5)
ERRORS = {
    "too few dimensions": (IndexError, "at least 2", {"input": torch.zeros(3)}),
    "integers": (NotImplementedError, "floating-point", {"input": X.int()}),
    "one value": (ValueError, "more than 1 value per channel", {"input": torch.zeros(1, 3, 1)}),
    "weight of another size": (RuntimeError, "weight should contain 3 elements not 4", {"weight": torch.ones(4)}),
    "running mean of another size": (
        RuntimeError,
        "running_mean should contain 3 elements not 4",
        {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
    ),
    "running mean of two dimensions": (
        RuntimeError,
        "running_mean",
        {"running_mean": torch.zeros(1, 3), "running_var": torch.ones(1, 3)},
    ),
    "mixed dtypes": (RuntimeError, "mixed dtype", {"weight": torch.ones(3, dtype=torch.float64)}),
    "low-precision weight": (RuntimeError, "mixed dtype", {"weight": torch.ones(3, dtype=torch.bfloat16)}),
    "another device": (RuntimeError, "on the input's device", {"weight": torch.ones(3, device="meta")}),
    "integer statistics": (
        RuntimeError,
        "floating point",
        {"running_mean": torch.zeros(3).long(), "running_var": torch.ones(3).long()},
    ),
    "no statistics in eval": (RuntimeError, "running_mean must be defined", {"training": False}),
    "eps 0 in training": (ValueError, "positive during training", {"eps": 0.0}),
    "negative eps in eval": (
        ValueError,
        "non-negative",
        {"eps": -1.0, "training": False, "running_mean": torch.zeros(3), "running_var": torch.ones(3)},
    ),
}


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_of_two_dimensions_are_refused_at_once(name):
    """torch takes them, moves the running statistics, and fails in backward."""
    with pytest.raises(RuntimeError, match=r"in one dimension.*got \(1, 3\)"):
        bn.batch_norm(X, training=True, **{name: torch.ones(1, 3)})


@pytest.mark.parametrize(("error", "message", "arguments"), ERRORS.values(), ids=ERRORS)
def test_a_mistake_raises_what_torch_raises(error, message, arguments):
    arguments = {"input": X, "training": True, "running_mean": None, "running_var": None, **arguments}
    with pytest.raises(error):
        F.batch_norm(**arguments)
    with pytest.raises(error, match=message):
        bn.batch_norm(**arguments)


# torch has no masks, and takes an integer running_var beside a running_mean of floats: it then never moves.
OUR_ERRORS = {
    "an integer running_var": (
        RuntimeError,
        "running_var should be floating point",
        {"running_mean": torch.zeros(3), "running_var": torch.ones(3).long()},
    ),
    "a mask that is not bool": (ValueError, "bool", {"mask": torch.ones(4, 5)}),
    "a mask of another size": (ValueError, "mask", {"mask": torch.ones(7) > 0}),
    "beside no samples too": (ValueError, "mask", {"input": X[:0], "mask": torch.ones(7) > 0}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("error", "message", "arguments"), OUR_ERRORS.values(), ids=OUR_ERRORS)
def test_a_mistake_that_torch_does_not_see_moves_nothing(error, message, arguments, training):
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    before = {name: value.clone() for name, value in (running | arguments).items() if name in running}
    arguments = {"input": X + 1, **running, **arguments}
    with pytest.raises(error, match=message):
        bn.batch_norm(**arguments, training=training)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


@pytest.mark.parametrize("training", [True, False])
def test_eps_that_is_no_number_gives_none_as_in_torch(training):
    arguments = (torch.randn(4, 3), torch.zeros(3), torch.ones(3), None, None, training)
    assert F.batch_norm(*arguments, eps=torch.nan).isnan().all()
    assert bn.batch_norm(*arguments, eps=torch.nan).isnan().all()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_of_two_dimensions_is_refused_at_once(name):
    """torch takes it beside a contiguous input, tracks the batch, and raises at its gradient."""
    parameter, running = torch.ones(1, 3, requires_grad=True), (torch.zeros(3), torch.ones(3))
    y = F.batch_norm(X, None, None, **{name: parameter}, training=True)
    with pytest.raises(RuntimeError):
        y.sum().backward()
    with pytest.raises(RuntimeError, match=name):
        bn.batch_norm(X + 1, *running, **{name: parameter}, training=True)
    assert running[0].eq(0).all()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (RuntimeError, "broadcast", {"residual": torch.zeros(4, 3, 2)}),
        (ValueError, "activation must be", {"activation": "swish"}),
        (ValueError, "activation must be", {"activation": nn.Softplus()}),
        (ValueError, "bool mask", {"mask": torch.ones(4, 5)}),
        (ValueError, "mask that broadcasts", {"mask": torch.ones(4, 4, dtype=torch.bool)}),
    ],
)
def test_a_mistake_in_our_own_options_raises_and_changes_nothing(error, message, options):
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(error, match=message):
        bn.batch_norm(X, *running, training=True, **options)
    assert running[0].eq(0).all()
    assert running[1].eq(1).all()


@pytest.mark.kernels  # torch's relu keeps its output
def test_only_x_and_channel_vectors_are_kept_for_backward():
    x = make((8, 4, 16, 16)).requires_grad_()
    residual = make(x.shape).requires_grad_()
    kept = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = bn.batch_norm(x, weight=torch.ones(4, requires_grad=True), training=True, activation="relu")
        large = [t for t in kept if t.numel() > 4 * 4]  # count, mean, m2 and rstd of 4 channels
        assert [t.data_ptr() for t in large] == [x.data_ptr()]
        kept.clear()
        y = bn.batch_norm(x, training=True, residual=residual, activation="relu")
        large = {t.data_ptr() for t in kept if t.numel() > 4 * 4}
        assert large == {x.data_ptr(), y.data_ptr()}
