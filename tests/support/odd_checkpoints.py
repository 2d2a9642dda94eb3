"""Checkpoints of every odd kind that torch.save writes: sparse, quantized, meta, repeated, within themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def whole_state() -> dict[str, Any]:
    """The state of a model with two batch norms."""
    return dict(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).state_dict())


def odd_values() -> dict[str, Any]:
    """What may stand where a vector of three numbers, or a counter, should."""
    vector = torch.tensor([1.0, -2.0, 0.0])
    cycle: dict[str, Any] = {}
    cycle |= {str(i): cycle for i in range(300)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of quantization and of sparse layouts
        return {
            "sparse": vector.to_sparse(),
            "csr": vector.expand(3, 3).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(vector, 0.1, 0, torch.qint8),
            "meta": vector.to("meta"),
            "expanded": torch.zeros(1).expand(3),
            "expanded far": torch.zeros(1).expand(2**40),
            "complex": vector.to(torch.complex64),
            "bool": vector > 0,
            "int": vector.long(),
            "half": vector.half(),
            "bfloat16": vector.bfloat16(),
            "float8": vector.to(torch.float8_e4m3fn),
            "nan": vector / 0,
            "empty": vector[:0],
            "scalar": torch.tensor(float("nan")),
            "inf": torch.tensor(float("inf")),
            "complex scalar": torch.tensor(1j),
            "huge scalar": torch.tensor(1e300, dtype=torch.float64),
            "negative": torch.tensor(-5),
            "meta scalar": torch.tensor(1, device="meta"),
            "matrix": vector.expand(2, 3).contiguous(),
            "text": "x",
            "number": 3,
            "none": None,
            "list": [vector],
            "cycle": cycle,
        }


def mutate_state(draw: Random, folder: Path) -> Path:
    """A checkpoint file with some of its values replaced."""
    state, odd = whole_state(), odd_values()
    for _ in range(draw.choice((0, 1, 1, 2, 6))):
        state[draw.choice(list(state))] = draw.choice(list(odd.values()))
    if draw.random() < 0.2:
        tensors = {k: v.clone().contiguous() for k, v in state.items() if isinstance(v, Tensor) and _can_be_saved(v)}
        save_file(tensors, folder / "a.safetensors")
        return folder / "a.safetensors"
    if draw.random() < 0.3:
        state = {"epoch": 3, draw.choice(("model", "state_dict", "")): state, "again": state}
    torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=draw.random() < 0.8)
    return folder / "a.pt"


def _can_be_saved(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return strided and tensor.numel() < 100 and not tensor.is_complex()
