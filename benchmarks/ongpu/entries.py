"""What is measured, in the order of importance: each distinct layer of two networks, tensors of other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from batchnorm.bench.problem import LAST, Case

BATCH = 256
BOTH, FORWARD, EVAL = "forward+backward", "forward", "eval"
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
LARGE_BYTES = 64e6  # from here on a tensor is large, and torch.compile worth the seconds that it takes to compile

# Channels, height and width of the input, what comes after the batch norm, and how many such layers: of networks as
# torchvision has them, at 224x224. A test counts them anew in timm's.
RESNET50 = (
    (64, 112, "BN+ReLU", 1),
    (64, 56, "BN+ReLU", 6),
    (256, 56, "BN+add+ReLU", 3),
    (256, 56, "BN", 1),
    (128, 56, "BN+ReLU", 1),
    (128, 28, "BN+ReLU", 7),
    (512, 28, "BN+add+ReLU", 4),
    (512, 28, "BN", 1),
    (256, 28, "BN+ReLU", 1),
    (256, 14, "BN+ReLU", 11),
    (1024, 14, "BN+add+ReLU", 6),
    (1024, 14, "BN", 1),
    (512, 14, "BN+ReLU", 1),
    (512, 7, "BN+ReLU", 5),
    (2048, 7, "BN+add+ReLU", 3),
    (2048, 7, "BN", 1),
)
MOBILENET_V2 = (
    (32, 112, "BN+ReLU6", 2),
    (16, 112, "BN", 1),
    (96, 112, "BN+ReLU6", 1),
    (96, 56, "BN+ReLU6", 1),
    (24, 56, "BN", 2),
    (144, 56, "BN+ReLU6", 3),
    (144, 28, "BN+ReLU6", 1),
    (32, 28, "BN", 3),
    (192, 28, "BN+ReLU6", 5),
    (192, 14, "BN+ReLU6", 1),
    (64, 14, "BN", 4),
    (384, 14, "BN+ReLU6", 8),
    (96, 14, "BN", 3),
    (576, 14, "BN+ReLU6", 5),
    (576, 7, "BN+ReLU6", 1),
    (160, 7, "BN", 3),
    (960, 7, "BN+ReLU6", 6),
    (320, 7, "BN", 1),
    (1280, 7, "BN+ReLU6", 1),
)
NETWORKS = {"ResNet-50": RESNET50, "MobileNetV2": MOBILENET_V2}
RESNET50_SERIES = "ResNet-50, bfloat16, channels last, forward+backward"
OTHER, ODD = "other shapes", "odd channels"
SHAPES = {
    OTHER: ((1 << 20, 32), (131072, 256), (8192, 1024), (512, 2048), (2, 32, 128, 128, 128)),
    ODD: ((BATCH, 3, 112, 112), (BATCH, 37, 56, 56), (BATCH, 100, 28, 28)),
}
# Compiling tries many kernels there, for half a minute.
AUTOTUNED = ((BATCH, 256, 56, 56), (1 << 20, 32))


@dataclass(frozen=True)
class Entry:
    """A case, where it is from, how often it is there, and what else than eager torch is timed beside ours."""

    group: str
    case: Case
    count: int = 1
    compiled: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """About how long it takes: it is not begun with less time left."""
        return 2.0 + 10.0 * ("compile" in self.compiled) + 30.0 * ("max-autotune" in self.compiled)

    @property
    def series(self) -> str:
        """The entries that it stands among."""
        _, dtype, layout, _, mode = self.case.words
        return f"{self.group}, {dtype}, channels {layout}, {mode}"


def entries() -> Iterator[Entry]:
    """All, the most important first."""
    yield from _compiled(_network("ResNet-50", BFLOAT16))
    yield from _compiled(_shapes(OTHER, BFLOAT16))
    yield from _network("ResNet-50", FLOAT32)
    yield from _network("ResNet-50", BFLOAT16, last=False)
    yield from _shapes(ODD, BFLOAT16)
    yield from _network("MobileNetV2", BFLOAT16)
    yield from _shapes(OTHER, FLOAT32)
    yield from _network("ResNet-50", BFLOAT16, mode=FORWARD)
    yield from _shapes(ODD, FLOAT32)
    yield from _some(_network("ResNet-50", FLOAT16))
    yield from _some(_network("ResNet-50", BFLOAT16, mode=EVAL))
    yield from _network("ResNet-50", FLOAT32, last=False)
    yield from _network("MobileNetV2", FLOAT32)
    yield from _network("MobileNetV2", BFLOAT16, last=False)


def shrunk(entry: Entry) -> Entry:
    """The same with a tiny tensor."""
    items, channels, *space = entry.case.shape
    shape = (min(items, 4), min(channels, 5), *(min(size, 3) for size in space))
    return replace(entry, case=replace(entry.case, shape=shape))


def _network(name: str, dtype: torch.dtype, last: bool = True, mode: str = BOTH) -> list[Entry]:
    return [
        Entry(name, Case((BATCH, channels, size, size), dtype, last, variant, mode), count)
        for channels, size, variant, count in NETWORKS[name]
    ]


def _shapes(group: str, dtype: torch.dtype) -> list[Entry]:
    return [
        Entry(group, Case(shape, dtype, last, "BN+ReLU", BOTH))
        for shape in SHAPES[group]
        for last in ((True, False) if len(shape) in LAST else (False,))
    ]


def _compiled(those: Iterable[Entry]) -> Iterator[Entry]:
    for entry in those:
        large = entry.case.bytes > LARGE_BYTES
        autotuned = large and entry.case.shape in AUTOTUNED and entry.case.variant != "BN"
        yield replace(entry, compiled=("compile",) * large + ("max-autotune",) * autotuned)


def _some(those: list[Entry]) -> list[Entry]:
    """One of each size class and kind."""
    return those[:4] + those[-3:]
