"""How many dimensions the input of each layer in a Keras model has, by the config: files of Keras 2 do not say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Layers whose output has as many dimensions as their (first) input.
_KEEPING = {"Dense", "EinsumDense", "Activation", "Dropout", "BatchNormalization", "LayerNormalization", "Masking"}
_KEEPING |= {"GroupNormalization", "UnitNormalization", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Rescaling"}
_KEEPING |= {"ThresholdedReLU", "GaussianNoise", "GaussianDropout", "AlphaDropout", "ActivityRegularization", "Permute"}
_KEEPING |= {"Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Normalization"}
_RECURRENT = ("LSTM", "GRU", "SimpleRNN")
_OF_IMAGES = re.compile(
    r"(Conv|SeparableConv|DepthwiseConv|MaxPooling|AveragePooling|UpSampling|ZeroPadding|Cropping|SpatialDropout)"
    r"([123])D(Transpose)?"
)


def input_ranks(layers: list[Mapping[str, Any]], rank: int | None = None) -> list[int | None]:
    """Of each layer of a model, in its order; None where it cannot be told.

    Args:
        layers: as in the model's config.
        rank: of the model's input, where its config does not say.
    """
    before, outputs, found = rank, {}, []
    for layer in layers:
        source = _source(layer.get("inbound_nodes"))
        given = _declared(layer) or (before if source is None else outputs.get(source))
        found.append(given)
        before = outputs[name_in_model(layer)] = _output(layer, given)
    return found


def children(layer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The layers of a model, by its config; none of what is no model."""
    config = layer["config"]
    inner = config.get("layers") if isinstance(config, Mapping) else config  # Sequential's of Keras 2.0 is the list
    return inner if isinstance(inner, list) else []


def name_in_model(layer: Mapping[str, Any]) -> str:
    """The layer's name; empty where a config does not have it."""
    return layer.get("name") or (layer["config"].get("name", "") if isinstance(layer["config"], Mapping) else "")


def _declared(layer: Mapping[str, Any]) -> int | None:
    """What the file says itself."""
    config = layer["config"] if isinstance(layer["config"], Mapping) else {}
    shapes = (
        (layer.get("build_config") or {}).get("input_shape"),
        *map(config.get, ("batch_shape", "batch_input_shape")),
    )
    return next((len(s) for s in shapes if isinstance(s, list) and not any(isinstance(n, list) for n in s)), None)


def _output(layer: Mapping[str, Any], rank: int | None) -> int | None:
    kind, config = layer["class_name"], layer["config"]
    if children(layer):
        inner = children(layer)
        ranks = dict(zip(map(name_in_model, inner), input_ranks(inner, rank), strict=True))
        last = _source(config.get("output_layers")) if isinstance(config, Mapping) else None
        end = next((each for each in inner if name_in_model(each) == last), inner[-1])
        return _output(end, ranks[name_in_model(end)])
    images = _OF_IMAGES.fullmatch(kind)
    if images:
        return int(images[2]) + 2
    if kind == "Flatten" or (kind.startswith("Global") and not config.get("keepdims")):
        return 2
    if kind == "Reshape":
        return len(config["target_shape"]) + 1
    if kind == "Embedding":
        return None if rank is None else rank + 1
    if kind in _RECURRENT:
        return 3 if config.get("return_sequences") else 2
    return rank if kind in _KEEPING or kind == "InputLayer" else None


def _source(nodes: Any) -> str | None:
    """The first layer that a part of a config refers to, however that is written."""
    if isinstance(nodes, Mapping):
        history = nodes.get("keras_history")
        return history[0] if history else next(filter(None, map(_source, nodes.values())), None)
    if not isinstance(nodes, list):
        return None
    if len(nodes) >= 3 and isinstance(nodes[0], str):
        return nodes[0]
    return next(filter(None, map(_source, nodes)), None)
