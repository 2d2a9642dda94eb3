"""backends(): what it says serves a call is what the call runs."""

import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm as bn
from batchnorm.ops import choose, cpu

X = torch.randn(8, 3, 5)
MASK = torch.ones(8, 5, dtype=torch.bool)


class Ran(TorchDispatchMode):
    """Notes the operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.name().partition(".")[0])
        return function(*arguments, **(options or {}))


def what_ran(layer, x, mask):
    with Ran() as ran:
        layer(x, mask=mask)
    normalizing = [name for name in ran.names if name.startswith("batchnorm::") and "update" not in name]
    return "cpu" if normalizing else "native" if "aten::native_batch_norm" in ran.names else "plain"


@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["cpu", "meta", "not compiled", "empty", "channels last"])
@pytest.mark.parametrize(
    "options", [{}, {"virtual_batch_size": 4}, {"renorm": bn.Renorm()}, {"momentum": None}, {"sync": True}], ids=str
)
def test_it_says_what_runs(options, where, training, mask, monkeypatch):
    layer, x = bn.BatchNorm1d(3, **options).train(training), X
    if where == "meta":
        layer, x, mask = layer.to("meta"), x.to("meta"), None if mask is None else mask.to("meta")
    elif where == "not compiled":
        monkeypatch.setattr(cpu, "COMPILED", False)
    elif where == "empty":
        monkeypatch.setattr(cpu, "COMPILED", False)
        x, mask = x[:0], None if mask is None else mask[:0]
    elif where == "channels last":
        layer.channel_dim, x = -1, x.transpose(1, 2).contiguous()
    said = bn.backends(layer, x, mask=mask)
    assert said.served_by == what_ran(layer, x, mask)
    assert [row.why_not == "" for row in said.rows] == [row.name == said.served_by for row in said.rows]
    assert f"; {said.served_by} serves this call" in said.headline


def test_why_not():
    def why(*asked, **given):
        return {row.name: row.why_not for row in bn.backends(*asked, **given).rows}

    elsewhere, ours = {"gpu": "the input is on cpu"}, {"native": "there is a kernel of ours", "plain": "cpu serves it"}
    assert why(X) == {"cpu": "", **elsewhere, **ours}
    meta = "the input is on meta"
    assert why(X.to("meta")) == {"cpu": meta, "gpu": meta, "native": "", "plain": "native serves it"}
    assert why(x=X) == why(X)
    assert why(bn.BatchNorm1d(3, renorm=bn.Renorm()), X.to("meta"))["native"].endswith("no renormalization")
    found = []
    torch.func.vmap(lambda x: found.append(why(x)) or x)(X)
    assert (
        found[0]["cpu"] == found[0]["native"] == "a transform of torch.func, forward mode or torch.jit.trace is active"
    )


def test_over_ranks():
    operands = choose.Operands(X.to("meta"), None, None, None, None)
    found = choose.backends(operands, choose.Settings(1e-5, bn.BatchNorm1d(3).activation), True, over_ranks=True)
    assert found[2].why_not == "torch has no operators on meta that measure over ranks"


def test_the_machine(monkeypatch):
    table = bn.backends()
    assert table.served_by is None
    assert {row.name for row in table.rows if row.why_not} <= {"gpu"}
    assert table.rows[0].register_bits in (128, 256, 512)
    lines = str(table).splitlines()
    assert lines[0] == table.headline
    assert lines[0].replace("cpu, gpu,", "cpu,") == f"torch {torch.__version__}: cpu, native, plain"
    assert len(lines) == 2 + len(table.rows)
    assert table._repr_html_().count("<tr>") == 1 + len(table.rows)
    assert json.loads(json.dumps(table.to_dict()))["backends"][0]["dtypes"] == "float32 float64 bfloat16 float16"
    monkeypatch.setattr(cpu, "COMPILED", False)
    off = bn.backends().rows[0]
    assert (off.on, off.register_bits) == (False, None)
    assert off.why_not.startswith("batchnorm was installed without its compiled operators: take")


@pytest.mark.parametrize(
    "asked",
    [(nn.BatchNorm1d(3), X), (bn.BatchNorm1d(3),), (nn.ReLU(),), (None, 3)],
    ids=["torch's layer and a tensor", "no input", "another module", "no layer"],
)
def test_what_is_no_call(asked):
    with pytest.raises(TypeError, match="expected "):
        bn.backends(*asked)
