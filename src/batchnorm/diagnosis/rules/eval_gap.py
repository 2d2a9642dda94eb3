"""The symptom that is reported first: in eval mode the model is far worse than in train mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..finding import Finding
from .preprocessing import CHECK, CHECK_FIRST
from .rule import RECALIBRATE, Rule

if TYPE_CHECKING:
    from ..measured import Inputs
    from ..modes import Comparison

# Eval loss beside that in train mode: so many times as large, and by so much.
WARNING, SERIOUS, LEAST = 1.5, 2.0, 0.05

LARGER = (
    "loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)  # train with larger batches, shuffled "
    "and prepared as those of the evaluation"
)


class EvalGap(Rule):
    name = "eval-gap"

    def of_modes(self, comparison: Comparison, inputs: Inputs) -> Iterator[Finding]:
        train, evaluated, mended = comparison.train_loss, comparison.eval_loss, comparison.recalibrated_loss
        if math.isfinite(evaluated) and evaluated < max(WARNING * train, train + LEAST):
            return
        serious = not math.isfinite(evaluated) or evaluated > SERIOUS * train
        # Of what eval mode loses, recalibrating gives back this share.
        back = (evaluated - mended) / (evaluated - train) if math.isfinite(evaluated) else float(math.isfinite(mended))
        if inputs.scale is not None:
            blame, remedy = "the data are to blame, which are not prepared like the training data", CHECK
        elif back > 0.5 and inputs.moved:
            blame = "the running statistics are to blame, or data that are not prepared like the training data"
            remedy = CHECK_FIRST
        elif back > 0.5:
            blame, remedy = "the running statistics are to blame", RECALIBRATE
        else:
            blame, remedy = "the running statistics are not to blame", LARGER
        yield self.found(
            None,
            "serious" if serious else "warning",
            "the loss is {eval_loss:.3g} in eval mode and {train_loss:.3g} in train mode, on the same {batches} "
            f"batches; recalibrated it would be {{recalibrated_loss:.3g}}: {blame}",
            remedy,
            confidence=0.95,
            eval_loss=evaluated,
            train_loss=train,
            recalibrated_loss=mended,
            batches=comparison.batches,
        )
