"""The models: families of torchvision, timm, transformers and segmentation_models_pytorch, with random weights."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from . import tiny
from .tiny import Built

TORCHVISION = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_y_400mf",
    "regnet_x_400mf",
    "densenet121",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "mnasnet0_5",
    "mnasnet1_0",
    "googlenet",
    "inception_v3",
    "vgg11_bn",
    "vgg16_bn",
]
SEGMENTATION = ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18"]
QUANTIZABLE = ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"]
TIMM = [
    "efficientnet_b0",
    "efficientnet_lite0",
    "tf_efficientnet_b0",
    "tf_efficientnetv2_b0",
    "mobilenetv2_050",
    "mobilenetv2_100",
    "mobilenetv3_small_050",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "fbnetc_100",
    "spnasnet_100",
    "mnasnet_small",
    "mixnet_s",
    "tf_mixnet_s",
    "hardcorenas_a",
    "tinynet_e",
    "lcnet_050",
    "ghostnet_050",
    "ghostnetv2_100",
    "regnetx_002",
    "regnety_002",
    "regnetz_b16",
    "densenet121",
    "resnet10t",
    "resnet14t",
    "resnet18",
    "resnet26d",
    "resnetblur50",
    "legacy_seresnet18",
    "skresnet18",
    "ecaresnet26t",
    "res2net50_14w_8s",
    "res2next50",
    "resnest14d",
    "selecsls42b",
    "dla34",
    "dla46_c",
    "dla60_res2net",
    "dpn48b",
    "hrnet_w18_small",
    "vovnet39a",
    "ese_vovnet19b_dw",
    "cspresnet50",
    "cspdarknet53",
    "darknet17",
    "repvgg_a0",
    "repghostnet_050",
    "mobileone_s0",
    "fastvit_t8",
    "levit_128s",
    "levit_conv_128s",
    "convmixer_768_32",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "efficientvit_m0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "repvit_m0_9",
    "starnet_s1",
    "xception41",
    "inception_v4",
    "inception_resnet_v2",
    "visformer_tiny",
    "gernet_s",
    "tresnet_m",
    "rexnet_100",
    "semnasnet_075",
    "hgnet_tiny",
    "hgnetv2_b0",
    "tiny_vit_5m_224",
    "swiftformer_xs",
    "shvit_s1",
    "nextvit_small",
    "coatnet_pico_rw_224",
    "halonet26t",
    "botnet26t_256",
    "lambda_resnet26t",
]
SMP = [
    "Unet:resnet18",
    "UnetPlusPlus:resnet18",
    "MAnet:resnet18",
    "Linknet:resnet18",
    "FPN:mobilenet_v2",
    "PSPNet:resnet18",
    "DeepLabV3:resnet18",
    "DeepLabV3Plus:resnet18",
    "PAN:resnet18",
    "UPerNet:resnet18",
    "Unet:efficientnet-b0",
    "Unet:timm-regnetx_002",
    "Unet:tu-mobilenetv3_small_050",
    "Unet:densenet121",
    "Unet:xception",
]
LARGE = {"inception_v3": 96, "inception_v4": 96, "inception_resnet_v2": 96, "xception41": 96, "xception": 96}
FIXED = {"levit_128s": 224, "levit_conv_128s": 224, "tiny_vit_5m_224": 224, "coatnet_pico_rw_224": 224}
FIXED |= {"efficientformer_l1": 224, "efficientformerv2_s0": 224, "visformer_tiny": 224}
FIXED |= {"efficientvit_m0": 224, "halonet26t": 256, "botnet26t_256": 256, "nextvit_small": 224, "shvit_s1": 224}


def images(size: int = 64, batch: int = 2) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, 3, size, size)


def _torchvisions(part: str) -> Any:
    return import_module(f"torchvision.{part}")


def _torchvision(name: str) -> Built:
    models = _torchvisions("models")
    more: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name == "inception_v3":
        more["aux_logits"] = False  # its second classifier needs images of 299 pixels
    return models.get_model(name, weights=None, **more), images(LARGE.get(name, 64))


def _segmentation(name: str) -> Built:
    models = _torchvisions("models")
    return models.get_model(name, weights=None, weights_backbone=None), images(64)


def _video(name: str) -> Built:
    models = _torchvisions("models")
    return models.get_model(name, weights=None), torch.randn(2, 3, 4, 64, 64)


def _quantizable(name: str) -> Built:
    quantization = _torchvisions("models.quantization")
    return getattr(quantization, name)(weights=None, quantize=False), images()


def _features(name: str) -> Built:
    models, extraction = _torchvisions("models"), _torchvisions("models.feature_extraction")
    return extraction.create_feature_extractor(models.get_model(name, weights=None), ["layer1", "layer4"]), images()


def _detection(name: str) -> Built:
    parts = _torchvisions("models.detection.backbone_utils")
    return parts.resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5), images()


def _timm(name: str) -> Built:
    timm = import_module("timm")
    size = FIXED.get(name, LARGE.get(name, 64))
    return timm.create_model(name, pretrained=False), images(size)


def _smp(name: str) -> Built:
    smp = import_module("segmentation_models_pytorch")
    architecture, encoder = name.split(":")
    return getattr(smp, architecture)(encoder_name=encoder, encoder_weights=None), images(
        128 if architecture == "PAN" else 64
    )


def named() -> Iterator[tuple[str, str]]:
    """(library, name) of every model."""
    yield from (("torchvision", name) for name in TORCHVISION)
    yield from (("torchvision.segmentation", name) for name in SEGMENTATION)
    yield from (("torchvision.video", name) for name in VIDEO)
    yield from (("torchvision.quantization", name) for name in QUANTIZABLE)
    yield from (("torchvision.features", name) for name in ("resnet18", "resnet50"))
    yield from (("torchvision.detection", name) for name in ("resnet18", "resnet50"))
    yield from (("timm", name) for name in TIMM)
    yield from (("transformers", name) for name in tiny.MODELS)
    yield from (("segmentation_models_pytorch", name) for name in SMP)


def build(library: str, name: str) -> Built:
    """The model in train mode with random weights, and an input for it."""
    torch.manual_seed(0)
    if library == "transformers":
        return tiny.MODELS[name]()
    makers = {
        "torchvision": _torchvision,
        "torchvision.segmentation": _segmentation,
        "torchvision.video": _video,
        "torchvision.quantization": _quantizable,
        "torchvision.features": _features,
        "torchvision.detection": _detection,
        "timm": _timm,
        "segmentation_models_pytorch": _smp,
    }
    return makers[library](name)
