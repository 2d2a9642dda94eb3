"""Does diagnose find planted faults, and does it stay silent on healthy trainings?

    python benchmarks/diagnose.py [--seeds 20]

prints tables and writes them to benchmarks/results/diagnose.md. Every seed trains anew: even ones on digits, odd ones
on mnist5k (at half its resolution, to be done in minutes), and of each four two the MLP and two the CNN of the lab,
with torch.nn's layers. A fault counts as found if its rule fires at any severity.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import header, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.diagnosis.rules import few_values, mixed, unconverged, updates
from batchnorm.lab.data import Data, load
from batchnorm.lab.models import build
from batchnorm.mixin import BatchNorm

BATCH, STEPS = 60, 80
NUMBERED = 8  # seeds of which the numbers behind the findings are told
SOURCES = ("run", "checkpoint", "model", "batches")


def data_of(seed: int) -> Data:
    return _load(("digits", "mnist5k")[seed % 2])


@cache
def _load(name: str) -> Data:
    data = load(name)
    if data.name == "mnist5k":
        data = replace(data, x_train=F.avg_pool2d(data.x_train, 2), x_test=F.avg_pool2d(data.x_test, 2))
    return data


class Training:
    """A small training of one seed, recorded; what a fault changes is given or overridden.

    Args:
        settings: of every batch-norm layer, set before the first step.
        steps, batch: how many, and of how many samples.
        change: what becomes of the k-th batch.
        step: takes one step; by default a forward, a backward and the optimizer's step.
    """

    def __init__(
        self,
        seed: int,
        *,
        model: str | None = None,
        steps: int = STEPS,
        batch: int = BATCH,
        change: Callable[[int, Tensor], Tensor] = lambda k, x: x,
        step: Callable[[Training, Tensor, Tensor], Any] | None = None,
        start: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        self.seed, self.size, self.change = seed, batch, change
        self.data = data_of(seed)
        self.kind = model or ("mlp", "cnn")[seed // 2 % 2]
        fresh = build(self.kind, self.data.shape, len(self.data.classes), seed=seed)
        self.model = bn.revert(fresh) if start is None else start
        for layer in self.layers():
            for name, value in settings.items():
                setattr(layer, name, value)
        self.generator = torch.Generator().manual_seed(seed)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.05, momentum=0.9)
        self.folder = Path(tempfile.mkdtemp()) / "run"
        step = step or Training.step
        with bn.watch(self.model, self.folder, optimizer=self.optimizer) as watched:
            for k in range(steps):
                step(self, *self.draw(k))
            watched.probe([x for x, _ in self.batches(16)])

    def layers(self) -> list[BatchNorm]:
        return [module for module in self.model.modules() if isinstance(module, BatchNorm)]

    def draw(self, k: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(len(self.data.y_train), generator=self.generator)[: self.size]
        return self.change(k, self.data.x_train[rows]), self.data.y_train[rows]

    def batches(self, count: int = 16) -> list[tuple[Tensor, Tensor]]:
        return [self.draw(k) for k in range(count)]

    def step(self, x: Tensor, y: Tensor) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def findings(self, source: str) -> list[bn.Finding]:
        if source == "run":
            return bn.diagnose(self.folder)
        if source == "checkpoint":
            return bn.diagnose(self.model.state_dict())
        if source == "model":
            return bn.diagnose(self.model)
        return bn.diagnose(self.model, self.batches(), loss=F.cross_entropy)


Planted = Iterator[tuple[str, list[bn.Finding]]]


def judged(training: Training, *sources: str) -> Planted:
    for source in sources:
        yield source, training.findings(source)


def momentum_too_small(seed: int) -> Planted:
    yield from judged(Training(seed, momentum=0.002), "run", "batches")


def few_batches_tracked(seed: int) -> Planted:
    yield from judged(Training(seed, steps=12), "run", "model", "checkpoint")


def statistics_of_other_weights(seed: int) -> Planted:
    """Trained weights with the statistics of the first 15 steps, as of averaged weights with forgotten buffers."""
    early, late = Training(seed, steps=15), Training(seed)
    for old, new in zip(early.layers(), late.layers(), strict=True):
        new.running_mean, new.running_var = old.running_mean, old.running_var
    yield from judged(late, "batches")


def other_preprocessing(seed: int) -> Planted:
    training = Training(seed)
    training.change = lambda k, x: x / 2 + 1
    yield from judged(training, "batches")


def values_up_to_255(seed: int) -> Planted:
    training = Training(seed)
    training.change = lambda k, x: x * 255
    yield from judged(training, "batches")


def nan_batch(seed: int) -> Planted:
    def change(k: int, x: Tensor) -> Tensor:
        return x if k != 60 else torch.where(torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1)) == 0, math.nan, x)

    training = Training(seed, change=change, step=without_nan)
    yield from judged(training, "run", "checkpoint", "model")


def without_nan(training: Training, x: Tensor, y: Tensor) -> None:
    """As with a gradient scaler or a guard: the step is skipped, the statistics are not."""
    training.model.train()
    loss = F.cross_entropy(training.model(x), y)
    if loss.isfinite():
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
    else:
        training.optimizer.zero_grad()
        training.optimizer.step()


def freeze_leak(seed: int) -> Planted:
    model = Training(seed).model
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.requires_grad_(False)
    yield from judged(Training(seed + 1000, start=model, model=("mlp", "cnn")[seed // 2 % 2]), "run", "model")


def second_forward(seed: int) -> Planted:
    def step(training: Training, x: Tensor, y: Tensor) -> None:
        training.model.train()
        F.cross_entropy(training.model(x), y).backward()
        training.step(x, y)

    yield from judged(Training(seed, step=step), "run")


def recomputation(seed: int) -> Planted:
    def step(training: Training, x: Tensor, y: Tensor) -> None:
        training.model.train()
        training.optimizer.zero_grad()
        F.cross_entropy(recompute(training.model, x), y).backward()
        training.optimizer.step()

    def recompute(model: nn.Module, x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False)

    training = Training(seed, step=step)
    yield "run", training.findings("run")
    yield (
        "batches",
        bn.diagnose(
            training.model, training.batches(), loss=F.cross_entropy, call=lambda m, batch: recompute(m, batch[0])
        ),
    )


def accumulation(seed: int) -> Planted:
    def step(training: Training, x: Tensor, y: Tensor) -> None:
        training.model.train()
        training.optimizer.zero_grad()
        for part, of_part in zip(x.chunk(4), y.chunk(4), strict=True):
            (F.cross_entropy(training.model(part), of_part) / 4).backward()
        training.optimizer.step()

    yield from judged(Training(seed, step=step, batch=240), "run")


def small_batches(seed: int) -> Planted:
    # Of the MLP: with its many positions the CNN has enough values at any size.
    yield from judged(Training(seed, model="mlp", batch=4), "run", "batches")


def batches_of_one_image(seed: int) -> Planted:
    yield from judged(Training(seed, model="cnn", batch=1), "run", "batches")


class Sorted(Training):
    """Epoch after epoch in the order of the labels."""

    def draw(self, k: int) -> tuple[Tensor, Tensor]:
        order = self.data.y_train.argsort(stable=True)
        begin = k * self.size % (len(order) // self.size * self.size)
        rows = order[begin : begin + self.size]
        return self.change(k, self.data.x_train[rows]), self.data.y_train[rows]


def sorted_labels(seed: int) -> Planted:
    # Of the MLP: what a convolution measures hardly tells digits apart.
    yield from judged(Sorted(seed, model="mlp"), "run", "batches")


def train_mode_forgotten(seed: int) -> Planted:
    done = Counter[int]()

    def step(training: Training, x: Tensor, y: Tensor) -> None:
        training.step(x, y)
        done[0] += 1
        if done[0] == STEPS // 3:  # an evaluation
            training.model.train = lambda mode=True: training.model  # pyright: ignore[reportAttributeAccessIssue]
            training.model.eval()
            for module in training.model.modules():
                module.training = False

    yield from judged(Training(seed, step=step), "run")


def last_batch_of_one(seed: int) -> Planted:
    training = Training(seed)
    rows = torch.randperm(len(training.data.y_train), generator=training.generator)[: 10 * BATCH + 1]
    dataset = TensorDataset(training.data.x_train[rows], training.data.y_train[rows])
    yield "batches", bn.diagnose(training.model, DataLoader(dataset, BATCH), max_batches=8)


def keras_momentum(seed: int) -> Planted:
    yield from judged(Training(seed, momentum=0.99), "run", "model")


def momentum_zero(seed: int) -> Planted:
    yield from judged(Training(seed, momentum=0.0), "run", "model")


def eps_too_large(seed: int) -> Planted:
    yield from judged(Training(seed, eps=1.0), "run", "model")


def ranks(seed: int) -> Planted:
    """Two ranks: one model, one gradient, and each its own statistics of its own classes."""
    first = Training(seed)
    second = copy.deepcopy(first.model)
    for replica, low in ((first.model, True), (second, False)):
        replica.train()
        for x, y in first.batches(30):
            with torch.no_grad():
                replica(x[(y < 5) == low])
    yield "checkpoint", bn.diagnose([first.model.state_dict(), second.state_dict()])


def padding(seed: int) -> Planted:
    """Rows of an image as a sequence, (N, rows, columns), cut off at random and filled up with zeros."""
    data = data_of(seed)
    torch.manual_seed(seed)
    width = data.shape[-1]
    model = nn.Sequential(nn.Conv1d(data.shape[1], 16, 3, padding=1, bias=False), nn.BatchNorm1d(16))
    batches = []
    for _ in range(30):
        x = data.x_train[torch.randperm(len(data.y_train))[:BATCH], 0]
        lengths = torch.randint(width // 4, width + 1, (len(x), 1, 1))
        batches.append(torch.where(torch.arange(width) < lengths, x, 0.0))
        model(batches[-1])
    yield "batches", bn.diagnose(model, batches)


def statistics_lost(seed: int) -> Planted:
    training = Training(seed)
    for layer in training.layers():
        layer.reset_running_stats()
    yield from judged(training, "checkpoint", "model", "batches")


def two_streams(seed: int) -> Planted:
    yield from judged(Training(seed, change=lambda k, x: x if k % 2 else 1 - x), "run", "batches")


def evaluation_in_train_mode(seed: int) -> Planted:
    done = Counter[int]()

    def step(training: Training, x: Tensor, y: Tensor) -> None:
        training.step(x, y)
        done[0] += 1
        if done[0] % 25 == 0:
            with torch.no_grad():
                for rows in training.data.x_test.split(BATCH)[:6]:
                    training.model(rows)

    yield from judged(Training(seed, step=step), "run")


FAULTS: tuple[tuple[Callable[[int], Planted], tuple[str, ...]], ...] = (
    (momentum_too_small, ("unconverged",)),
    (few_batches_tracked, ("unconverged",)),
    (statistics_of_other_weights, ("unconverged",)),
    (other_preprocessing, ("preprocessing", "unconverged")),
    (values_up_to_255, ("preprocessing",)),
    (nan_batch, ("nonfinite",)),
    (freeze_leak, ("freeze-leak",)),
    (second_forward, ("updates",)),
    (recomputation, ("updates",)),
    (accumulation, ("updates",)),
    (small_batches, ("few-values",)),
    (batches_of_one_image, ("few-values",)),
    (sorted_labels, ("mixed-populations",)),
    (train_mode_forgotten, ("mode",)),
    (last_batch_of_one, ("few-values",)),
    (keras_momentum, ("momentum",)),
    (momentum_zero, ("momentum",)),
    (eps_too_large, ("small-variance",)),
    (ranks, ("ranks-disagree",)),
    (padding, ("padding",)),
    (statistics_lost, ("untracked",)),
    (two_streams, ("mixed-populations",)),
    (evaluation_in_train_mode, ("mode",)),
)

# What is compared with a threshold, and the thresholds that are opened so that it is told whatever it is.
OPENED = (
    (unconverged, ("MEAN_WARNING", "VAR_WARNING")),
    (few_values, ("NOISE_WARNING",)),
    (mixed, ("DISPERSION", "SPLIT", "DISTANCE")),
    (updates, ("FAR",)),
)
NUMBERS = {
    "unconverged": ("mean_drift", "var_factor"),
    "few-values": ("noise",),
    "mixed-populations": ("share", "distance", "dispersion"),
    "updates": ("updates",),
}


def numbers(training: Training, source: str) -> dict[str, float]:
    """The largest of each number over the layers, whether it is above its threshold or not."""
    with ExitStack() as stack:
        for module, names in OPENED:
            for name in names:
                stack.enter_context(patch.object(module, name, -1.0))
        found = training.findings(source)
    largest: dict[str, float] = {}
    for finding in found:
        for name in NUMBERS.get(finding.rule, ()):
            if name in finding.numbers:
                largest[name] = max(largest.get(name, 0.0), finding.numbers[name])
    return largest


def healthy(seeds: int) -> list[str]:
    fired: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    serious: Counter[tuple[str, str]] = Counter()
    largest: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind in ("mlp", "cnn"):
        for seed in range(seeds):
            training = Training(seed, model=kind)
            for source in SOURCES:
                found = training.findings(source)
                serious[kind, source] += any(finding.severity == "serious" for finding in found)
                fired[kind, source].update({f"{finding.rule} ({finding.severity})" for finding in found})
                if source in ("run", "batches") and seed < NUMBERED:
                    for name, value in numbers(training, source).items():
                        largest[source, name].append(value)
            print("healthy", kind, seed, {source: sum(fired[kind, source].values()) for source in SOURCES}, flush=True)
    lines = ["## Healthy trainings", "", "| model | judged | with a serious finding | what fired, in how many |"]
    lines += ["|---|---|---|---|"]
    for (kind, source), counter in fired.items():
        told = ", ".join(f"{rule} {count}" for rule, count in counter.most_common()) or "nothing"
        lines.append(f"| {kind} | {source} | {serious[kind, source]} of {seeds} | {told} |")
    lines += [
        "",
        f"The numbers that thresholds are compared with, of {NUMBERED} seeds: the largest of a training's layers.",
    ]
    lines += ["", "| judged | number | median | largest |", "|---|---|---|---|"]
    for (source, name), values in sorted(largest.items()):
        ordered = sorted(values)
        lines.append(f"| {source} | {name} | {ordered[len(ordered) // 2]:.3g} | {ordered[-1]:.3g} |")
    return lines


def planted(seeds: int) -> list[str]:
    lines = ["## Planted faults", "", "| fault | judged | rule | found | its numbers, median (least) | also serious |"]
    lines += ["|---|---|---|---|---|---|"]
    for fault, rules in FAULTS:
        begin = time.perf_counter()
        hits: Counter[str] = Counter()
        others: dict[str, Counter[str]] = defaultdict(Counter)
        values: dict[tuple[str, str], list[float]] = defaultdict(list)
        for seed in range(seeds):
            for source, found in fault(seed):
                mine = [finding for finding in found if finding.rule in rules]
                hits[source] += bool(mine)
                others[source].update({f.rule for f in found if f.severity == "serious" and f.rule not in rules})
                for name in sorted(
                    {name for finding in mine for name in finding.numbers} & set(sum(NUMBERS.values(), ()))
                ):
                    values[source, name].append(max(f.numbers[name] for f in mine if name in f.numbers))
        for source, count in hits.items():
            told = ", ".join(
                f"{name} {sorted(each)[len(each) // 2]:.3g} ({min(each):.3g})"
                for (of, name), each in values.items()
                if of == source
            )
            also = ", ".join(f"{rule} {times}" for rule, times in others[source].most_common())
            name = fault.__name__.replace("_", " ")
            lines.append(f"| {name} | {source} | {', '.join(rules)} | {count} of {seeds} | {told} | {also} |")
            print(lines[-1], f"{time.perf_counter() - begin:.0f} s", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = header(
        "What the diagnosis finds",
        f"{options.seeds} seeds, {STEPS} steps of {BATCH} samples each; digits and mnist5k, the lab's MLP and CNN.",
    )
    lines += [*planted(options.seeds), ""]
    of_healthy = healthy(options.seeds)
    print("\n".join(of_healthy))
    save("diagnose", lines + of_healthy)


if __name__ == "__main__":
    main()
