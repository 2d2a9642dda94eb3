"""Which GPUs the kernels are on for, and what is said where they are not."""

import json
import warnings

import pytest
import torch

import batchnorm as bn
from batchnorm.ops.gpu import available

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """An H100 with Triton 3.7; what is asked of it is forgotten before and after."""

    def forget():
        available._why_off.cache_clear()
        available._is_proved.cache_clear()

    monkeypatch.delenv(available.SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(available, "triton_version", lambda: (3, 7))
    monkeypatch.setattr(available, "_distrusted", [])
    monkeypatch.setattr(available, "PROVED", tmp_path / "proved.json")
    available.PROVED.write_text("[]")
    forget()
    yield monkeypatch
    forget()


def test_off_until_proved(machine):
    assert "no run has proved the kernels on sm_90 with Triton 3.7 yet" in available.why_not(CUDA)
    assert not available.is_proved(CUDA)


def test_the_environment_switches_them_on(machine):
    machine.setenv("BATCHNORM_GPU", "1")
    assert available.why_not(CUDA) is None
    assert not available.is_proved(CUDA)  # so that they check themselves


def test_a_proof_switches_them_on_for_such_a_machine_alone(machine):
    available.PROVED.write_text(json.dumps([{"architecture": "sm_90", "triton": "3.7"}]))
    assert available.why_not(CUDA) is None
    assert available.is_proved(CUDA)
    available._why_off.cache_clear()
    available._is_proved.cache_clear()
    machine.setattr(available, "triton_version", lambda: (3, 8))
    assert "with Triton 3.8" in available.why_not(CUDA)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.setenv("BATCHNORM_GPU", "0"), "BATCHNORM_GPU=0 switches the kernels off"),
        (lambda m: m.setattr(available, "triton_version", lambda: None), "Triton is not installed"),
        (lambda m: m.setattr(available, "triton_version", lambda: (3, 5)), "Triton 3.5 is older than 3.6"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "PyTorch sees no GPU"),
        (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda i=0: (7, 5)), "sm_75 is older than sm_80"),
    ],
    ids=["switch", "no triton", "old triton", "no gpu", "old gpu"],
)
def test_why_not(machine, change, why):
    available.PROVED.write_text(json.dumps([{"architecture": "sm_90", "triton": "3.7"}]))
    change(machine)
    assert available.why_not(CUDA) == why


def test_what_was_seen_wrong_stays_off_but_ranks_still_agree(machine):
    machine.setenv("BATCHNORM_GPU", "1")
    with pytest.warns(RuntimeWarning, match=r"switches its GPU kernels off.*9 off.*check-gpu"):
        available.distrust("9 off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        available.distrust("9 off, again")  # said once
    assert "gave a wrong result: 9 off" in available.why_not(CUDA)
    assert available.why_off(CUDA) is None


def test_the_committed_list_is_of_what_a_run_wrote():
    pairs = json.loads((available.PROVED).read_text())
    assert all({"architecture", "triton", "device", "torch", "batchnorm", "date"} <= set(pair) for pair in pairs)


def test_backends_says_it(machine):
    (row,) = [row for row in bn.backends().rows if row.name == "gpu"]
    assert not row.on
    assert "BATCHNORM_GPU=1 switches them on" in row.why_not
