"""What is to be reached, and whether it was; the layers of a network all together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import steps
from .entries import BFLOAT16, BOTH, LARGE_BYTES, NETWORKS, RESNET50_SERIES
from .measure import OURS, WALL, Result

WALL_BYTES = 16e6
RESNET50_MS = {"H200": 14.0, "H100": 20.0}
ROUNDING = 0.005  # of figures with two decimals


@dataclass(frozen=True)
class Target:
    """`reached` is None where nothing was measured that says so."""

    text: str
    reached: bool | None
    figure: str


@dataclass(frozen=True)
class Sum:
    """All layers of a network, each entry as often as it is there: milliseconds of the device."""

    series: str
    layers: int
    ours_ms: float
    eager_ms: float
    floor_ms: float


def targets(results: Sequence[Result], stepped: Sequence[steps.Result], device: str) -> list[Target]:
    """Every one."""
    measured = [result for result in results if not result.failed]
    large = [result for result in measured if result.entry.case.bytes > LARGE_BYTES]
    walled = [result for result in measured if result.entry.case.bytes > WALL_BYTES]
    relu = [r for r in measured if _kind(r) == ("BN+ReLU", BOTH, BFLOAT16)]
    return [
        _right([*results, *stepped]),
        _least("90 % of a copy on floor bytes, over 64 MB", large, lambda r: r.fraction, 0.9),
        _least("BN+ReLU forward and backward, bfloat16: 1.6x eager", relu, Result.eager, 1.6),
        _least("the same: 2x eager, the aim", relu, Result.eager, 2.0),
        _least("1.1x torch.compile, over 64 MB", large, lambda r: r.ratio("compile"), 1.1),
        _resnet50(measured, device),
        _least("the device's time never over eager's, on any entry", measured, Result.eager, 1.0),
        _least("wall time not over eager's, over 16 MB", walled, lambda r: r.eager(WALL), 1.0),
    ]


def sums(results: Sequence[Result]) -> list[Sum]:
    """Of each network's layers, where all of them were measured."""
    measured = [result for result in results if not result.failed and result.entry.group in NETWORKS]
    found = []
    for series in dict.fromkeys(result.entry.series for result in measured):
        those = [result for result in measured if result.entry.series == series]
        layers = sum(result.entry.count for result in those)
        if layers == sum(count for *_, count in NETWORKS[those[0].entry.group]):
            totals = (sum(r.entry.count * us(r) / 1e3 for r in those) for us in (_ours_us, _eager_us, _floor_us))
            found.append(Sum(series, layers, *totals))
    return found


def _kind(result: Result) -> tuple[object, ...]:
    return result.entry.case.variant, result.entry.case.mode, result.entry.case.dtype


def _ours_us(result: Result) -> float:
    return result.device_us[OURS]


def _eager_us(result: Result) -> float:
    return min(us for side, us in result.device_us.items() if side.startswith("eager"))


def _floor_us(result: Result) -> float:
    return _ours_us(result) * (result.fraction or 0.0)


def _right(results: Sequence[Result | steps.Result]) -> Target:
    wrong = sum(result.failed.startswith("wrong") for result in results)
    others = sum(bool(result.failed) for result in results) - wrong
    figure = f"{wrong} of {len(results)} wrong" + (f", {others} not measured for other reasons" if others else "")
    return Target("everything within rounding of float64", not wrong if results else None, figure)


def _least(text: str, results: Sequence[Result], figure: Callable[[Result], float | None], bound: float) -> Target:
    found = [(value, result) for result in results if (value := figure(result)) is not None]
    if not found:
        return Target(text, None, "not measured")
    least, where = min(found, key=lambda pair: pair[0])
    below = sum(value < bound - ROUNDING for value, _ in found)
    middle = statistics.geometric_mean(value for value, _ in found)
    figures = f"least {least:.2f} ({' '.join(where.entry.case.words)}), geometric mean {middle:.2f}"
    return Target(text, not below, f"{figures}; {below} of {len(found)} below")


def _resnet50(measured: Sequence[Result], device: str) -> Target:
    name, bound = next(((name, ms) for name, ms in RESNET50_MS.items() if name in device), (device, None))
    text = f"ResNet-50's layers, bfloat16, channels last, on {name}" + (f": {bound:g} ms" if bound else "")
    found = next((each for each in sums(measured) if each.series == RESNET50_SERIES), None)
    if found is None:
        return Target(text, None, "not measured")
    reached = None if bound is None else found.ours_ms <= bound
    return Target(text, reached, f"{found.ours_ms:.2f} ms; two passes at a copy's bandwidth: {found.floor_ms:.2f} ms")
