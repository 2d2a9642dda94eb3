"""from_keras_model() of files: beside the model that Keras saved, and files by the sources of other versions."""

import io
import json
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
import torch

import batchnorm as bn

# Keras's own save() on the PyTorch backend.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VECTORS = ("gamma", "beta", "moving_mean", "moving_variance")


def saved(keras, model, path):
    """The model's batch norms by path, in memory and from a file; the layers have seen data."""
    model.save(path)
    return bn.port.from_keras_model(model), bn.port.from_keras_model(path)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, layer in found.items():
        assert repr(layer) == repr(expected[name])
        for key, value in expected[name].state_dict().items():
            assert torch.equal(layer.state_dict()[key], value)


def sequential(keras):
    layers = keras.layers
    inner = [layers.BatchNormalization(center=False, axis=1, name="norm"), layers.BatchNormalization(scale=False)]
    model = keras.Sequential(
        [
            layers.Input((6, 6, 3)),
            layers.Conv2D(5, 2, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.BatchNormalization(momentum=0.5, epsilon=0.25, name="other"),
            keras.Sequential(inner, name="inner"),
            layers.GlobalAveragePooling2D(),
            layers.BatchNormalization(trainable=False),
        ]
    )
    model(torch.randn(3, 6, 6, 3), training=True)
    return model


def functional(keras):
    layers = keras.layers
    x = layers.Input((8, 3))
    within = keras.Model(x, layers.Dense(4)(layers.BatchNormalization(name="z")(layers.Conv1D(4, 3)(x))), name="within")
    a = layers.Input((8, 3))
    shared = layers.BatchNormalization(name="shared")
    b = layers.Add()([shared(within(a)), shared(layers.ReLU()(within(a)))])
    flat = layers.BatchNormalization(name="a")(layers.Flatten()(b))
    image = layers.BatchNormalization(name="b")(layers.Reshape((4, 3, 2))(flat))
    model = keras.Model(a, layers.BatchNormalization(name="c")(layers.LSTM(5)(layers.Reshape((4, 6))(image))))
    model(torch.randn(5, 8, 3), training=True)
    return model


@pytest.mark.parametrize("kind", ["keras", "h5", "hdf5"])
@pytest.mark.parametrize("make", [sequential, functional])
def test_a_file_has_what_the_model_in_memory_has(keras, tmp_path, make, kind):
    expected, found = saved(keras, make(keras), tmp_path / f"model.{kind}")
    assert len(found) == 5
    assert_same(found, expected)


@pytest.mark.processes
def test_neither_keras_nor_what_is_in_the_file_is_run(keras, tmp_path):
    layers, path = keras.layers, str(tmp_path / "model.keras")
    harmful = layers.Lambda(lambda x: x + 0)
    model = keras.Sequential([layers.Input((4,)), layers.BatchNormalization(name="norm"), harmful])
    model.save(path)
    with pytest.raises(ValueError, match=r"[Ll]ambda"):
        keras.models.load_model(path)  # Keras would run it, and refuses
    program = (
        "import sys; sys.modules['keras'] = sys.modules['tensorflow'] = None; import batchnorm as bn\n"
        f"print(list(bn.port.from_keras_model({path!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['norm']"


# Files of other versions, by their sources


def keras_2_layer(kind, name, sources=(), **config):
    nodes = [[[source, 0, 0, {}] for source in sources]] if sources else []
    return {"class_name": kind, "name": name, "config": {"name": name, **config}, "inbound_nodes": nodes}


def keras_2_file(path, layers, weights):
    """Keras 2's HDF5: names are bytes, of the layer's scope with a number of its own at times, and end in :0."""
    with h5py.File(path, "w") as file:
        config = {"class_name": "Model", "config": {"name": "model_1", "layers": layers, "output_layers": []}}
        file.attrs["model_config"] = json.dumps(config).encode()
        group = file.create_group("model_weights")
        for layer, arrays in weights.items():
            within = group.create_group(layer)
            within.attrs["weight_names"] = np.array([name.encode() for name in arrays])
            for name, array in arrays.items():
                within[name] = array
    return path


def vectors(scope, channels, first):
    return {f"{scope}/{name}:0": np.full(channels, first + i, np.float32) for i, name in enumerate(VECTORS)}


def test_keras_2_says_no_dimensions_and_scopes_have_other_names(tmp_path):
    norm = {"axis": [3], "momentum": 0.9, "epsilon": 0.01, "center": True, "scale": True}
    inner = [
        keras_2_layer("InputLayer", "input_2", batch_input_shape=[None, 4, 4, 8]),
        keras_2_layer("BatchNormalization", "norm", ["input_2"], **norm),
        keras_2_layer("SeparableConv2D", "conv_2", ["norm"]),
        keras_2_layer("BatchNormalization", "other", ["conv_2"], **norm),
        keras_2_layer("GlobalAveragePooling2D", "pool", ["other"]),
    ]
    layers = [
        keras_2_layer("InputLayer", "input_1", batch_input_shape=[None, 6, 6, 1]),
        keras_2_layer("Conv2D", "conv_1", ["input_1"]),
        keras_2_layer("BatchNormalization", "norm", ["conv_1"], **norm),
        keras_2_layer("Activation", "act", ["norm"]),
        {**keras_2_layer("Model", "inner", ["act"]), "config": {"name": "inner", "layers": inner}},
        keras_2_layer("BatchNormalization", "last", ["inner"], **{**norm, "axis": [1]}),
    ]
    layers[4]["config"]["output_layers"] = [["pool", 0, 0]]
    arrays = {
        "norm": vectors("norm_1", 8, 0.0),
        "inner": {**vectors("norm_2", 8, 10.0), **vectors("other_2", 16, 20.0)},
        "last": vectors("last", 16, 30.0),
    }
    found = bn.port.from_keras_model(keras_2_file(tmp_path / "model.hdf5", layers, arrays))
    assert {name: (type(layer).__name__, layer.running_mean[0].item()) for name, layer in found.items()} == {
        "norm": ("BatchNorm2d", 2.0),
        "inner/norm": ("BatchNorm2d", 12.0),
        "inner/other": ("BatchNorm2d", 22.0),
        "last": ("BatchNorm1d", 32.0),
    }
    assert (found["norm"].channel_dim, found["norm"].eps, round(found["norm"].momentum, 9)) == (3, 0.01, 0.1)


def test_dimensions_that_nobody_tells_are_asked_for(tmp_path):
    layers = [
        keras_2_layer("InputLayer", "in", batch_input_shape=[None, 4, 4, 1]),
        keras_2_layer("Mine", "mine", ["in"]),
        keras_2_layer("BatchNormalization", "norm", ["mine"]),
    ]
    path = keras_2_file(tmp_path / "model.h5", layers, {"norm": vectors("norm", 3, 1.0)})
    with pytest.raises(ValueError, match="ndim must be the number of dimensions of the input"):
        bn.port.from_keras_model(path)
    assert type(bn.port.from_keras_model(path, ndim=4)["norm"]) is bn.BatchNorm2d


def test_a_layer_of_ones_own_hides_its_batch_norms_and_they_are_named(keras, tmp_path):
    class Block(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.hidden = keras.layers.BatchNormalization(name="hidden")

        def build(self, shape):
            self.hidden.build(shape)

        def call(self, x, training=False):
            return self.hidden(x, training=training)

    model = keras.Sequential([keras.layers.Input((4,)), Block(name="block"), keras.layers.BatchNormalization(name="n")])
    for kind, place in (("keras", "layers/block/hidden"), ("h5", "block: ")):
        path = tmp_path / f"model.{kind}"
        model.save(path)
        with pytest.warns(UserWarning, match=f"not read, .* {place}") as warned:
            assert list(bn.port.from_keras_model(path, ndim=2)) == ["n"]
        assert warned[0].filename == __file__


def archive(path, group, as_stored):
    """A Keras 3 archive of one layer, whose four vectors are 1.5 and 3, 2.5 and 3, and so on."""
    config = {
        "class_name": "BatchNormalization",
        "config": {"name": "norm"},
        "build_config": {"input_shape": [None, 2]},
    }
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for i in range(4):
            as_stored(file.require_group(group), str(i), torch.tensor([1.5 + i, 3.0]))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": [config]}}))
        file.writestr("model.weights.h5", weights.getvalue())
    return path


def in_bfloat16(group, name, vector):
    """Two bytes a number, which HDF5 has no type for."""
    bits = vector.bfloat16().view(torch.int16).numpy()
    group.create_dataset(name, data=bits.view("V2")).attrs["dtype"] = "bfloat16"


@pytest.mark.parametrize(
    "as_stored",
    [lambda group, name, x: group.create_dataset(name, data=x.numpy()), in_bfloat16],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("layers", ["layers", "_layer_checkpoint_dependencies"])  # Keras 3's, TensorFlow 2.12's
def test_archives_as_other_versions_write_them(tmp_path, layers, as_stored):
    path = archive(tmp_path / "model.keras", f"{layers}/batch_normalization/vars", as_stored)
    layer = bn.port.from_keras_model(path)["norm"]
    assert [t.tolist() for t in (layer.weight, layer.running_var)] == [[1.5, 3.0], [4.5, 3.0]]


# Files that are none


def replaced(path, change):
    layers = [keras_2_layer("BatchNormalization", "norm", batch_input_shape=[None, 3])]
    keras_2_file(path, layers, {"norm": vectors("norm", 3, 1.0)})
    with h5py.File(path, "a") as file:
        group = file["model_weights/norm/norm"]
        if change:
            del group["gamma:0"]
            change(group)
    return path


def outside(group):
    with h5py.File(group.file.filename + ".other", "w") as other:
        other["secret"] = np.zeros(3, np.float32)
    group["gamma:0"] = h5py.ExternalLink(group.file.filename + ".other", "/secret")


def raw(group):
    path = group.file.filename + ".raw"
    np.zeros(3, np.float32).tofile(path)
    group.create_dataset("gamma:0", (3,), np.float32, external=[(path, 0, 12)])


def assembled(group):
    layout = h5py.VirtualLayout((3,), np.float32)
    layout[:] = h5py.VirtualSource(group.file.filename, "model_weights/norm/norm/beta:0", (3,))
    group.create_virtual_dataset("gamma:0", layout)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (outside, "links outside of its layer"),
        (lambda group: group.__setitem__("gamma:0", h5py.SoftLink("/model_weights/norm/norm/beta:0")), "links outside"),
        (raw, "is not an array in the file"),
        (assembled, "is not an array in the file"),
        (lambda group: group.create_group("gamma:0"), "is not an array in the file"),
        (lambda group: None, "is not an array in the file"),
        (lambda group: group.__setitem__("gamma:0", np.zeros((3, 3))), "should be a vector"),
        (lambda group: group.create_dataset("gamma:0", (1 << 40,), np.int8, chunks=(1024,)), "should be a vector"),
        (lambda group: group.__setitem__("gamma:0", np.array([b"a"] * 3)), "should hold numbers"),
    ],
    ids=["external", "soft", "raw", "virtual", "group", "missing", "matrix", "huge", "text"],
)
def test_a_file_refers_to_nothing_else_and_claims_nothing(tmp_path, change, said):
    assert list(bn.port.from_keras_model(replaced(tmp_path / "fine.h5", None))) == ["norm"]
    with pytest.raises(ValueError, match=said):
        bn.port.from_keras_model(replaced(tmp_path / "model.h5", change))


def test_what_is_no_file_of_keras_says_what_to_do(keras, tmp_path, monkeypatch):
    text, archive, weights = tmp_path / "text.h5", tmp_path / "some.zip", tmp_path / "model.weights.h5"
    text.write_text("no")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    sequential(keras).save_weights(weights)
    for path, what in (
        (text, "neither zip nor HDF5"),
        (archive, "a zip file without"),
        (weights, "weights alone"),
        (tmp_path / "absent", "no file"),
        (tmp_path, "no file"),
    ):
        with pytest.raises(ValueError, match=f"{what}.*; else load it with Keras"):
            bn.port.from_keras_model(path)
    without = keras_2_file(tmp_path / "without.h5", [keras_2_layer("BatchNormalization", "norm")], {})
    with pytest.raises(ValueError, match="no weights of norm"):
        bn.port.from_keras_model(without)
    with pytest.warns(UserWarning, match="no BatchNormalization"):
        assert bn.port.from_keras_model(keras_2_file(tmp_path / "none.h5", [keras_2_layer("Dense", "d")], {})) == {}
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"batchnorm\[keras\]"):
        bn.port.from_keras_model(without)
