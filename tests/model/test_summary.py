"""summary(): every batch norm is a row, whose facts are the layer's; a checkpoint's too."""

import json

import pytest
import torch
from lookalikes import BatchNormAct2d, FrozenBatchNorm2d
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import batchnorm as bn
from batchnorm.cli import app


class Overrides(nn.BatchNorm2d):
    def forward(self, x):
        return x


def zoo():
    return nn.ModuleDict(
        {
            "plain": nn.BatchNorm2d(3, eps=1e-3, momentum=None),
            "own": bn.BatchNorm1d(4, activation="relu", scale=False),
            "act": BatchNormAct2d(5),
            "frozen": FrozenBatchNorm2d(6, eps=0.5),
            "other": Overrides(7, affine=False),
            "lazy": nn.LazyBatchNorm2d(),
        }
    )


def rows(model):
    return {row.name: row for row in bn.summary(model).rows}


def test_a_row_has_what_the_layer_has():
    model = zoo()
    model["plain"](torch.randn(2, 3, 4, 4))
    found = rows(model)
    assert list(found) == list(model)
    assert (found["plain"].channels, found["plain"].eps, found["plain"].momentum) == (3, 1e-3, None)
    assert (found["plain"].batches, found["plain"].ours, found["plain"].why_not) == (1, False, "")
    assert (found["own"].kind, found["own"].ours, found["own"].learns) == ("BatchNorm1d", True, "beta")
    assert found["own"].fused == "relu"
    assert (found["frozen"].eps, found["frozen"].learns, found["frozen"].batches) == (0.5, "nothing, frozen", None)
    assert found["other"].why_not == "overrides forward without calling super().forward"
    assert (found["lazy"].channels, found["lazy"].why_not) == (None, "lazy: it has not seen an input yet")


def test_what_is_frozen_shows():
    model = bn.freeze(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    model[1].weight.requires_grad_(False)
    assert [row.learns for row in bn.summary(model).rows] == [
        "gamma, beta; frozen: statistics",
        "beta; frozen: gamma, statistics",
    ]


def test_fused_names_what_runs_in_the_same_operation():
    model = bn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU6(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), fuse=True)
    model.append(bn.convert(BatchNormAct2d(3, nn.SiLU())))
    assert [row.fused for row in bn.summary(model).rows] == ["relu6", "", "silu"]


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.bns, self.act = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2)), nn.ReLU()
        self.short = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        for norm in self.bns:
            x = self.act(norm(x))
        return self.act(self.short(x) + x)


def test_layers_in_a_list_and_at_the_end_of_a_child_are_told_too():
    rows = bn.summary(bn.convert(Loop(), fuse=True)).rows
    assert [(row.name, row.fused) for row in rows] == [
        ("bns.0", "relu"),
        ("bns.1", "relu"),
        ("short.1", "add + relu"),
    ]


def test_the_headline_counts_and_groups():
    with pytest.warns(UserWarning, match="converted 3 of 6"):
        model = bn.convert(zoo())
    assert bn.summary(model).headline == (
        "6 batch norms: 3 ours (2 fused with what follows); "
        "1 FrozenBatchNorm2d: frozen: four buffers, with nothing to measure, track or learn; "
        "1 Overrides: overrides forward without calling super().forward; "
        "1 LazyBatchNorm2d: lazy: it has not seen an input yet"
    )


def test_a_line_is_a_line_whatever_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    lines = str(bn.summary(zoo())).splitlines()
    assert len(lines) == 2 + 6
    assert all(line.startswith(name) for line, name in zip(lines[2:], zoo(), strict=True))


def test_names_are_text_in_html_and_in_the_terminal():
    model = nn.Module()
    model.add_module("<b>[red]x", nn.BatchNorm2d(3))
    shown = bn.summary(model)
    assert "&lt;b&gt;[red]x" in shown._repr_html_()
    assert "<b>" not in shown._repr_html_()
    assert "<b>[red]x" in str(shown)


@pytest.mark.processes
@pytest.mark.slow
def test_layers_in_wrappers_have_their_own_names():
    assert [row.name for row in bn.summary(torch.compile(nn.Sequential(nn.BatchNorm1d(3)))).rows] == ["0"]


def test_what_has_none_says_of_what_it_is_made():
    with pytest.raises(ValueError, match="the model has no batch norm to sum up; it has Linear, ReLU"):
        bn.summary(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(TypeError):
        bn.summary({})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_command_shows_a_checkpoint(suffix, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    model(torch.randn(2, 3, 8, 8))
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), path)
    result = CliRunner().invoke(app, ["summary", str(path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["batch_norms"]
    assert [(row["name"], row["channels"], row["learns"], row["batches"]) for row in found] == [
        ("1", 4, "gamma, beta", 1),
        ("2", 4, "nothing", 1),
    ]
    assert found[0]["eps"] is None  # a checkpoint does not hold it
    shown = CliRunner().invoke(app, ["summary", str(path)]).stdout.splitlines()
    assert shown[0] == "2 batch norms, 8 channels"
    assert len(shown) == 4


def test_the_command_refuses_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["summary", str(tmp_path / "none.pt")])
    assert result.exit_code != 0
    assert "none.pt" in result.output
    assert "Traceback" not in result.output
