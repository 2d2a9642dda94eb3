"""The training of one arm: the loop, what a checkpoint holds, and the figures at the end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runs.files import require_own, write_atomically
from ..runs.schema import RUN
from ..view.facts import GAMMA_BETA
from ..watch import Recorder, watch
from .arms import PairPerBatch, fix_affine, freeze_all_else
from .batches import Batches
from .checkpoint import checked, pack, unpack
from .clock import Clock
from .data import Data
from .errors import LabError
from .evaluation import INPUT_PERCENTILES, evaluate, evaluate_single_pairs, input_percentiles, weights_sha256
from .models import build
from .parallel import ranks
from .settings import Settings

CHECKPOINT = "checkpoint.pt"
# By the clock, so that the cost is bounded whatever the model and a kill loses seconds, not an epoch.
CHECKPOINT_SECONDS = 2.0
# Batches whose statistics are compared at the same weights.
PROBE_BATCHES = 16


@dataclass(frozen=True)
class Tick:
    """Where a training stands, for whoever shows progress. `accuracy` is the last test accuracy, None before it."""

    arm: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None


class Training:
    """One arm's model, optimizer and batches, from the first step, or the last checkpoint, to the results.

    All randomness is in the seed: the initial weights and the batches. So two trainings with the same settings take the
    same steps, and one that goes on from a checkpoint ends on the same bits as one that was never stopped.

    Several ranks take a share of each batch and the same steps; each records, and the first one writes the checkpoint.

    Args:
        arm: one of `ARMS`.
        data: what to train on.
        settings: of the experiment.
        folder: where the arm's run and checkpoint are written; in this rank's own if there are several.
        checkpoint_seconds: least time between two checkpoints.
    Raises:
        LabError: the folder has a checkpoint that is damaged; nothing has been written then.
    """

    def __init__(
        self,
        arm: str,
        data: Data,
        settings: Settings,
        folder: Path,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.arm, self.data, self.settings, self.folder = arm, data, settings, folder
        self.checkpoint_seconds = checkpoint_seconds
        self.design = settings.design
        self.model = build(
            settings.model,
            data.shape,
            len(data.classes),
            norm=arm != "none",
            seed=settings.seed,
            **self.design.network,
        )
        self.batches = Batches(len(data.y_train), settings.batch_size, settings.seed, fixed=arm == "per-batch")
        self.clock = Clock.of(settings.epochs, settings.steps, len(self.batches))
        self.pairs = PairPerBatch(self.model, len(self.batches)) if arm == "per-batch" else None
        if self.design.learns == GAMMA_BETA:
            freeze_all_else(self.model)
        elif arm == "fixed":
            fix_affine(self.model)
        self.ranks = ranks()
        self.ranks.synchronized(self.model)
        modules = [self.model, self.pairs] if self.pairs else [self.model]
        parameters = chain.from_iterable(module.parameters() for module in modules)
        self.optimizer = self._optimizer([parameter for parameter in parameters if parameter.requires_grad])
        self.step = 0
        self.losses: list[float] = []  # since the last test
        inputs = INPUT_PERCENTILES if self.design.follows_input else ()
        self.curve: dict[str, list[Any]] = {name: [] for name in ("step", "test_accuracy", "loss", *inputs)}
        self.seconds = 0.0
        self._epoch_generator = self.batches.generator.get_state()
        self._resume_step = self._restore()

    def run(self, on_step: Callable[[Tick], None] = lambda tick: None) -> dict[str, Any]:
        """Train to the end, recording into the folder; returns the results."""
        for half_written in self.folder.glob(f".{CHECKPOINT}.*"):  # by a process that was killed
            half_written.unlink()
        self._began = self._saved = time.monotonic()
        layers = [] if self.arm == "none" else None
        meta = {"arm": self.arm, **{k: v for k, v in self.settings.to_meta().items() if k != "arms"}}
        with watch(
            self.model,
            self.folder,
            optimizer=self.optimizer,
            layers=layers,
            meta=meta,
            resume_step=self._resume_step,
            every_rank=True,
        ) as recorder:
            self._train(recorder, on_step)
        return self._results()

    def _train(self, recorder: Recorder, on_step: Callable[[Tick], None]) -> None:
        order: list[tuple[int, Tensor]] = []
        if self.step == 0:
            self._test(recorder)
        if self.step % len(self.batches):  # resumed within an epoch: its batches are drawn again
            order = self.batches.draw_epoch()
        while self.step < self.clock.steps:
            epoch, index = divmod(self.step, len(self.batches))
            if index == 0:
                self._epoch_generator = self.batches.generator.get_state()
                order = self.batches.draw_epoch()
            if self.step % self.clock.interval == 0:
                self.losses = []
            loss, is_due = self._train_step(recorder, epoch + 1, *order[index])
            self.step += 1
            self.losses.append(loss)
            if self.clock.is_test(self.step):
                self._test(recorder)
            accuracy = self.curve["test_accuracy"][-1] if self.curve["step"] else None
            on_step(Tick(self.arm, epoch + 1, self.clock.epochs, self.step, self.clock.steps, loss, accuracy))
            if self.step == self.clock.steps or is_due:
                self._save(recorder)

    def _train_step(self, recorder: Recorder, epoch: int, batch: int, samples: Tensor) -> tuple[float, bool]:
        """One step; returns the loss of the whole batch, and whether the first rank's clock says to save."""
        self.model.train()
        if self.pairs:
            self.pairs.select(batch)
        rate = cast(float, self.settings.lr)
        if self.design.falls:
            rate *= 1 - self.step / self.clock.steps
        if self.design.learns == GAMMA_BETA and self.arm == "fixed":
            rate = 0.0  # nothing learns at all: the gradient is there, and nobody follows it
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        share = self.ranks.share(samples)
        logits = self.model(self.data.x_train[share])
        part = len(share) / len(samples)  # of the mean over the batch
        loss = F.cross_entropy(logits, self.data.y_train[share]) * part if part else logits.sum()
        loss.backward()
        is_due = self.ranks.rank == 0 and time.monotonic() - self._saved >= self.checkpoint_seconds
        parameters = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        value, due = self.ranks.add_up(parameters, loss.item(), is_due)
        recorder.log(epoch=epoch, loss=value, lr=rate)
        self.optimizer.step()
        return value, bool(due)

    def _test(self, recorder: Recorder) -> None:
        """Test, and with the tests 0, 1, 2, 4, 8, ... and the last measure several batches at the same weights."""
        if self.pairs:
            self.pairs.select_average()
        with input_percentiles(self.model) as percentiles:
            accuracy, _ = evaluate(self.model, self.data.x_test, self.data.y_test)
        recorder.log(epoch=self.step // len(self.batches), test_accuracy=accuracy)
        if self.step:
            found = {"step": self.step, "test_accuracy": accuracy, "loss": statistics.fmean(self.losses), **percentiles}
            for name, values in self.curve.items():
                values.append(found[name])
        number = len(self.curve["step"])
        is_power_of_two = number & (number - 1) == 0  # 0 too
        if self.arm != "none" and (is_power_of_two or self.step == self.clock.steps):
            first = self.batches.first[:PROBE_BATCHES]
            recorder.probe([self.data.x_train[self.ranks.share(samples)] for samples in first])

    def _results(self) -> dict[str, Any]:
        """The figures of a finished training: NaN and infinity where it diverged."""
        data, results = self.data, {}
        if self.pairs:
            pair_accuracy = evaluate_single_pairs(self.model, self.pairs, data.x_test, data.y_test)
            results = {"single_pair_accuracy": pair_accuracy, "pair_spread": self.pairs.spread()}
        test_accuracy, test_loss = evaluate(self.model, data.x_test, data.y_test)
        train_accuracy, train_loss = evaluate(self.model, data.x_train, data.y_train)
        return {
            "test_accuracy": test_accuracy,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "train_loss": train_loss,
            "weights_sha256": weights_sha256(self._tensors().items()),
            "steps": self.step,
            "seconds": round(self.seconds, 3),
            "curve": self.curve,
            **results,
        }

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr = cast(float, self.settings.lr)  # the default is filled in
        if self.settings.optimizer == "adam":
            return torch.optim.Adam(parameters, lr)
        return torch.optim.SGD(parameters, lr, momentum=self.design.momentum)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that was trained or tracked; the model's own gamma and beta are the average pair's, if any."""
        if self.pairs:
            self.pairs.select_average()
        pairs = self.pairs.state_dict(prefix="pairs.") if self.pairs else {}
        return {**self.model.state_dict(prefix="model."), **pairs}

    def _save(self, recorder: Recorder) -> None:
        """Write the checkpoint, whole or not at all, after everything recorded so far."""
        now = time.monotonic()
        self.seconds += now - self._began
        data = pack(self._state())
        recorder.flush()
        self.ranks.wait()  # every rank's records are there before the checkpoint is
        if self.ranks.rank == 0:
            write_atomically(self.folder / CHECKPOINT, data)
        self._began = self._saved = time.monotonic()

    def _restore(self) -> int | None:
        """Take up the last checkpoint, if there is one; returns the step to go on recording from, None to begin."""
        path = self.folder / CHECKPOINT
        if self.folder.is_symlink():
            raise LabError(f"{self.folder} must be a regular folder, but is a link; it was not changed: move it away")
        try:
            require_own(path)
        except FileExistsError as error:
            raise LabError(str(error)) from None
        saved = self.ranks.of_first(path.read_bytes() if path.is_file() else None)
        if saved is None:
            return 0 if (self.folder / RUN).is_file() else None
        like = {**self._state(), "optimizer": self._stepped().state_dict()}
        try:
            state = checked(unpack(saved), like, self.clock, self.pairs is None)
        except ValueError as error:
            raise LabError(f"{path}: damaged ({error}); delete it to train this arm from the start") from None
        for prefix, module in (("model.", self.model), ("pairs.", self.pairs)):
            if module:
                tensors = state["tensors"].items()
                module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors if k.startswith(prefix)})
        # What was learned is taken from the file; how to learn is in the settings.
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": options})
        self._epoch_generator = state["generator"]
        self.batches.generator.set_state(self._epoch_generator)
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.curve = state["losses"], state["curve"]
        return self.step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        between_epochs = self.step % len(self.batches) == 0
        return {
            "tensors": self._tensors(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.step // len(self.batches),
            "generator": self.batches.generator.get_state() if between_epochs else self._epoch_generator,
            "losses": self.losses,
            "curve": self.curve,
            "seconds": self.seconds,
        }

    def _stepped(self) -> torch.optim.Optimizer:
        """Such an optimizer as it is after a step, which moved nothing of this training."""
        learned = chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
        copies = [nn.Parameter(parameter.detach().clone()) for parameter in learned]
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        optimizer = self._optimizer(copies)
        optimizer.step()
        return optimizer
