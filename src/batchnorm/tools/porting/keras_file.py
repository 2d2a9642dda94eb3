"""The BatchNormalization layers in a file of Keras, read with zipfile and h5py: without Keras, and running nothing."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .keras_rank import children, input_ranks, name_in_model

_KIND = "BatchNormalization"
_LARGEST = 1 << 24  # channels: more than any layer has; a file may claim anything


class Stored(NamedTuple):
    """A layer as the file has it: its config, its weights as `from_keras` takes them, and the input's dimensions."""

    config: Mapping[str, Any]
    weights: Any
    ndim: int | None


class Place(NamedTuple):
    """Where a layer is in the model's config: its path by names, and by Keras 3's names in the file."""

    path: str
    group: str
    layer: Mapping[str, Any]
    ndim: int | None


def read(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """The layers by their path in the model.

    Raises:
        ModuleNotFoundError: h5py is not installed.
        ValueError: not a file that Keras's save() writes; or a layer's weights are not in it.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files of Keras are read with h5py: pip install 'batchnorm[keras]' (Keras itself is not needed)"
        ) from None
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if not {"config.json", "model.weights.h5"} <= names:
                raise _not_saved_by_keras(path, "a zip file without config.json and model.weights.h5")
            with archive.open("model.weights.h5") as weights, h5py.File(weights, "r") as file:
                return _by_groups(json.loads(archive.read("config.json")), file)
    if os.path.isfile(path) and h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            config = file.attrs.get("model_config")
            if config is None:
                raise _not_saved_by_keras(path, "weights alone, without the model's config")
            return _by_names(json.loads(config), _inside(file, "model_weights") or {})
    raise _not_saved_by_keras(path, "neither zip nor HDF5" if os.path.isfile(path) else "no file")


def _not_saved_by_keras(path: Any, what: str) -> ValueError:
    return ValueError(
        f"expected a .keras or .h5 file, as model.save() of Keras writes it, but {os.fspath(path)} is {what}; else "
        "load it with Keras and pass the model, or pass the vectors of each layer to from_keras()"
    )


def _by_groups(model: Mapping[str, Any], file: Any) -> dict[str, Stored]:
    """Keras 3's: a group a layer, its weights numbered."""
    found, read = {}, set()
    for place in _places(model, "", "", None):
        name = f"{place.group}/vars"
        group = _inside(file, name)
        if group is None:  # TensorFlow 2.12's
            group = _inside(file, name := name.replace("layers/", "_layer_checkpoint_dependencies/"))
        if group is None:
            raise ValueError(f"the file has no weights of {place.path}: load it with Keras and pass the model")
        vectors = [_vector(group, number) for number in sorted(group, key=int)]
        found[place.path] = Stored(place.layer["config"], vectors, place.ndim)
        read.add(name)
    _name_the_unread([name.removesuffix("/vars") for name in _with_statistics(file) if name not in read])
    return found


def _by_names(model: Mapping[str, Any], weights: Any) -> dict[str, Stored]:
    """Keras 2's, and 3's .h5: a group for each layer of the outermost model, its weights with their names."""
    found, unread = {}, []
    places = list(_places(model, "", "", None))
    for outer in weights:
        group = _inside(weights, outer)
        own = [place for place in places if place.path.split("/")[0] == outer]
        layers: dict[str, dict[str, str]] = {}
        for name in map(_text, group.attrs.get("weight_names", ())):
            layer, _, vector = name.removesuffix(":0").rpartition("/")
            layers.setdefault(layer, {})[vector] = name
        layers = {layer: names for layer, names in layers.items() if "moving_mean" in names}
        if len(own) != len(layers):
            unread += [f"{outer}: {layer}" for layer in layers]
            if own:
                raise ValueError(
                    f"{outer} has {len(own)} batch norms by its config, and the vectors of {len(layers)}: load the "
                    "file with Keras and pass the model"
                )
            continue
        for place, names in zip(own, _in_order(own, layers), strict=True):
            vectors = {vector: _vector(group, name) for vector, name in names.items()}
            found[place.path] = Stored(place.layer["config"], vectors, place.ndim)
    missing = [place.path for place in places if place.path not in found]
    if missing:
        raise ValueError(f"the file has no weights of {', '.join(missing)}: load it with Keras and pass the model")
    _name_the_unread(unread)
    return {place.path: found[place.path] for place in places}


def _in_order(places: list[Place], layers: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """The layers' vectors in the order of the places: by name, or where names say nothing as the file has them."""
    by_name = {layer.rpartition("/")[2]: names for layer, names in layers.items()}
    wanted = [place.path.rpartition("/")[2] for place in places]
    if len(by_name) == len(places) and set(wanted) == set(by_name):
        return [by_name[name] for name in wanted]
    return list(layers.values())


def _places(model: Mapping[str, Any], path: str, group: str, rank: int | None) -> Iterator[Place]:
    """The batch norms of a model, depth first."""
    layers, used = children(model), Counter[str]()
    for layer, ndim in zip(layers, input_ranks(layers, rank), strict=True):
        name = name_in_model(layer)
        kind = _snake_case(layer["class_name"])
        within = f"{group}layers/{kind}" + (f"_{used[kind]}" if used[kind] else "")
        used[kind] += 1
        if layer["class_name"] == _KIND:
            yield Place(path + name, within, layer, ndim)
        yield from _places(layer, f"{path}{name}/", f"{within}/", ndim)


def _snake_case(name: str) -> str:
    """As Keras names groups."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _with_statistics(file: Any) -> list[str]:
    """Groups of three vectors of one length, or more: with a mean and variance among them, that is a batch norm."""
    lengths: dict[str, list[int]] = {}

    def note(name: str, item: Any) -> None:  # of what is in the file itself: links to others are not followed
        if getattr(item, "ndim", 0) == 1:
            lengths.setdefault(name.rpartition("/")[0], []).append(item.size)

    file.visititems(note)
    return [group for group, sizes in lengths.items() if len(sizes) >= 3 and len(set(sizes)) == 1]


def _name_the_unread(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"not read, for the file does not say what they are: {', '.join(names)}. They look like batch norms in "
            "layers of a class of one's own; load the file with Keras and pass each layer to from_keras()",
            stacklevel=5,
        )


def _inside(group: Any, path: str) -> Any:
    """What is in the group under this path; None if nothing.

    Raises:
        ValueError: it is a link. HDF5 can refer to other files, which are not part of the layer.
    """
    import h5py

    for part in path.split("/"):
        link = group.get(part, getlink=True) if isinstance(group, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} links outside of its layer, which Keras never writes")
        group = group[part]
    return group


def _vector(group: Any, name: str) -> np.ndarray:
    array = _inside(group, name)
    if getattr(array, "shape", None) is None or array.external or array.is_virtual:
        raise ValueError(f"{name} is not an array in the file")
    if array.ndim != 1 or array.size > _LARGEST:
        raise ValueError(f"{name} should be a vector, one number per channel, but has shape {array.shape}")
    if _text(array.attrs.get("dtype", "")) == "bfloat16":  # which HDF5 does not have
        return (array[()].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array[()]


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
