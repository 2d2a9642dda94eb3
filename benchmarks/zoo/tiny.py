"""Models of transformers, from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]  # a model and what it is called with

_SMALL = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
_DETECTOR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32}
_DETECTOR |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}
_DETECTOR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
# transformers' name of a model, of its configuration, the size of an image, options
_VISION: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "ResNet": ("ResNetModel", "ResNetConfig", 64, _SMALL),
    "ResNet, basic": ("ResNetModel", "ResNetConfig", 64, {"layer_type": "basic", **_SMALL}),
    "RegNet": ("RegNetModel", "RegNetConfig", 64, {"groups_width": 8, **_SMALL}),
    "RegNet, x": ("RegNetModel", "RegNetConfig", 64, {"groups_width": 8, "layer_type": "x", **_SMALL}),
    "MobileNetV1": ("MobileNetV1Model", "MobileNetV1Config", 64, {"depth_multiplier": 0.25}),
    "MobileNetV2": ("MobileNetV2Model", "MobileNetV2Config", 64, {"depth_multiplier": 0.25}),
    "EfficientNet": ("EfficientNetModel", "EfficientNetConfig", 64, {"width_coefficient": 0.5, "hidden_dim": 640}),
    "MobileViT": ("MobileViTModel", "MobileViTConfig", 64, {"image_size": 64}),
    "MobileViTV2": ("MobileViTV2Model", "MobileViTV2Config", 64, {"image_size": 64, "width_multiplier": 0.5}),
    "LeViT": ("LevitModel", "LevitConfig", 224, {}),
    "SwiftFormer": ("SwiftFormerModel", "SwiftFormerConfig", 64, {"depths": [1, 1, 1, 1]}),
    "RT-DETR's ResNet": ("RTDetrResNetBackbone", "RTDetrResNetConfig", 64, _SMALL),
    "HGNetV2": ("HGNetV2Backbone", "HGNetV2Config", 64, {}),
    "TextNet": ("TextNetModel", "TextNetConfig", 64, {}),
    "Segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", 64, {"depths": [1, 1, 1, 1]}),
}


def _vision(name: str) -> Built:
    transformers = import_module("transformers")
    model, config, size, options = _VISION[name]
    return getattr(transformers, model)(getattr(transformers, config)(**options)), torch.randn(2, 3, size, size)


def _detector(kind: str) -> Built:
    transformers = import_module("transformers")
    backbone = transformers.ResNetConfig(**_SMALL, out_features=["stage4"])
    config = getattr(transformers, f"{kind}Config")(**{**_DETECTOR, "backbone_config": backbone})
    return getattr(transformers, f"{kind}Model")(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _rt_detr() -> Built:
    transformers = import_module("transformers")
    backbone = transformers.RTDetrResNetConfig(**_SMALL, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 40],
        decoder_in_channels=[32, 32, 32],
        encoder_hidden_dim=32,
        d_model=32,
        num_queries=5,
        decoder_layers=1,
        encoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_denoising=0,
    )
    return transformers.RTDetrModel(config), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _matcher() -> Built:
    transformers = import_module("transformers")
    model = transformers.EfficientLoFTRModel(transformers.EfficientLoFTRConfig())
    return model, {"pixel_values": torch.randn(1, 2, 3, 64, 64)}


def _series(kind: str) -> Built:
    transformers = import_module("transformers")
    options: dict[str, Any] = {
        "num_input_channels": 3,
        "context_length": 32,
        "patch_length": 4,
        "norm_type": "batchnorm",
    }
    options |= {"d_model": 16, "num_hidden_layers": 2, "dropout": 0.0}
    if kind == "PatchTSMixer":
        options |= {"patch_stride": 4, "num_layers": 2, "norm_mlp": "BatchNorm"}
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config), {"past_values": torch.randn(4, 32, 3)}


def _wav2vec2() -> Built:
    transformers = import_module("transformers")
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
        conv_depthwise_kernel_size=7,
    )
    return transformers.Wav2Vec2ConformerModel(config), {"input_values": torch.randn(2, 1600)}


MODELS: dict[str, Callable[[], Built]] = {
    **{name: lambda name=name: _vision(name) for name in _VISION},
    "DETR": lambda: _detector("Detr"),
    "Table Transformer": lambda: _detector("TableTransformer"),
    "Conditional DETR": lambda: _detector("ConditionalDetr"),
    "RT-DETR": _rt_detr,
    "EfficientLoFTR": _matcher,
    "PatchTSMixer": lambda: _series("PatchTSMixer"),
    "PatchTST": lambda: _series("PatchTST"),
    "Wav2Vec2-Conformer": _wav2vec2,
}
