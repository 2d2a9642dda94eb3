"""The sentences of a run, against figures worked out by hand."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batchnorm.view.words import PLAIN, Words, summarize


class Recorded:
    """Stands in for a run: one layer of two channels, with the vectors and probes that it is given."""

    def __init__(self, gamma: Any, beta: Any, means: Any = (), variances: Any = (), count: int = 4) -> None:
        channels = len(gamma[0])
        self.layers = [SimpleNamespace(name="bn", channels=channels, tracks=True)]
        self.main, self.meta, self.results, self.status = self, {"batch_size": 4}, {}, "finished"
        self.recorded: dict[str, Any] = {}
        self._vectors = {"gamma": np.array(gamma, np.float32), "beta": np.array(beta, np.float32)}
        self._probes = {"batch_mean": np.array([means], np.float32), "batch_var": np.array([variances], np.float32)}
        self._count = count
        self.steps = np.arange(len(self._vectors["gamma"]))

    def stats(self, layer: str, quantity: str) -> np.ndarray:
        found = np.zeros((len(self.steps), 9), np.float32)
        found[:, -1] = (~np.isfinite(self._vectors[quantity])).sum(1)
        return found

    def vectors(self, layer: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        values = self._vectors[quantity]
        return np.arange(len(values)), values

    def probes(self, layer: str, quantity: str) -> tuple[np.ndarray, np.ndarray]:
        values = self._probes[quantity]
        return (np.array([7]), values) if values.size else (np.zeros(0), np.zeros((0, 0, 0)))

    def counts(self, layer: str) -> np.ndarray:
        return np.array([self._count, 2])


def numbers_of(run: Any) -> list[str]:
    return summarize(run).numbers


def experiment(arms: dict[str, dict[str, Any]], samples: int = 1000) -> SimpleNamespace:
    main = SimpleNamespace(layers=[])
    return SimpleNamespace(main=main, results={"arms": arms}, meta={"test_samples": samples}, status="running")


def test_how_far_gamma_and_beta_moved():
    # |gamma - 1| is 0.5 and 0.1, |beta| 0 and 0.2.
    run = Recorded(gamma=[[1, 1], [1.5, 0.9]], beta=[[0, 0], [0, -0.2]])
    (line,) = numbers_of(run)
    assert line == (
        "Learned up to step 1: over 2 channels gamma moved from 1 by 0.30 on average and by at most 0.50, "
        "beta from 0 by 0.10 and at most 0.20."
    )


def test_what_did_not_move_is_not_said_to_have_learned():
    (line,) = numbers_of(Recorded([[1, 1]] * 2, [[0, 0]] * 2))
    assert line == (
        "Gamma and beta were 1 and 0 up to step 1, the last that is known; what that step made of them is not recorded."
    )
    assert numbers_of(Recorded([[1, 1]], [[0, 0]])) == []  # of a single step, what was there before it


def test_small_and_huge_moves_have_their_digits():
    # 2^-13 = 0.000122 and 2^60 = 1.15e18 are exact in float32.
    (line,) = numbers_of(Recorded(gamma=[[1], [1 + 2**-13]], beta=[[0], [2.0**60]]))
    assert (
        "over 1 channel gamma moved from 1 by 0.00012 on average and by at most 0.00012, beta from 0 by 1e+18" in line
    )
    (line,) = numbers_of(Recorded(gamma=[[1], [1.05]], beta=[[0], [0]]))
    assert "moved from 1 by 0.050 on average and by at most 0.050, beta from 0 by 0 and" in line


def test_the_last_finite_values_are_not_passed_off_as_the_outcome():
    run = Recorded(gamma=[[1, 1], [1.5, 0.9], [np.nan, 1]], beta=[[0, 0], [0, -0.2], [0, np.inf]])
    assert summarize(run).plain[0] == "Not finite at the end (step 2): gamma and beta of bn."
    assert numbers_of(run) == []
    run = Recorded(gamma=[[1, 1], [np.nan, 1], [1.5, 0.5]], beta=[[0, 0], [0, 0], [0, 0]])  # a passing NaN
    assert numbers_of(run)[0].startswith("Learned up to step 2: over 2 channels gamma moved from 1 by 0.50")


def test_how_unlike_the_batches_are():
    # Means of channel 0: 0, 1, 2, of channel 1: 0, 0, 0; deviations 1 and 0 of channels of variance 4 and 4: 0.5 and 0,
    # median 0.25. Variances 2, 4, 6 and 4, 4, 4: deviations 2 / 4 and 0, median 25 %.
    run = Recorded([[1, 1]], [[0, 0]], means=[[0, 0], [1, 0], [2, 0]], variances=[[2, 4], [4, 4], [6, 4]], count=16)
    line = numbers_of(run)[0]
    assert (
        "in 3 batches at the same weights (step 7) the means of a channel differ by 0.25 (bn) of its standard" in line
    )
    assert "the variances by 25 % (bn)" in line
    assert len(numbers_of(run)) == 1


@pytest.mark.parametrize(("scale", "said"), [(1.0, True), (0.1, False), (10.0, False)])
def test_chance_is_named_only_where_it_fits(scale, said):
    # Standard normal data in batches of 4: means differ by 1 / sqrt(4) = 0.5.
    means = scale * np.array([[-0.5, -0.5], [0, 0], [0.5, 0.5]])
    run = Recorded([[1, 1]], [[0, 0]], means=means, variances=np.ones((3, 2)))
    assert any("1 / sqrt(4) = 0.50" in line for line in numbers_of(run)) == said


def test_dead_channels_have_no_part_in_it():
    means, variances = [[0, 5], [1, 5]], [[1, 0], [1, 0]]
    line = numbers_of(Recorded([[1, 1]], [[0, 0]], means=means, variances=variances))[0]
    assert "differ by 0.71 (bn)" in line  # the deviation of 0 and 1


def test_accuracies_that_differ_by_chance_are_not_ranked():
    # Two standard errors of a difference of two shares of 98 % of 1,000: 2 sqrt(2 * 0.98 * 0.02 / 1000) = 1.25 points.
    lines = numbers_of(experiment({"learned": {"test_accuracy": 0.985}, "none": {"test_accuracy": 0.98}}))
    assert lines[0] == "Test accuracy: learned 98.5 %, none 98.0 %."
    assert lines[1].startswith(
        "No arm is clearly ahead at the end: on 1,000 test samples and with one seed, less than 1.3 "
    )
    lines = numbers_of(experiment({"learned": {"test_accuracy": 0.985}, "none": {"test_accuracy": 0.95}}))
    assert lines[1].startswith("At the end learned is 3.5 points above none: ")


def test_speed_and_divergence():
    curve = {"step": [10, 20], "test_accuracy": [0.5, 0.95], "loss": [1, 1]}
    slow = {"step": [10, 20], "test_accuracy": [0.1, 0.2], "loss": [1, None]}
    arms = {
        "learned": {"test_accuracy": 0.95, "train_loss": 0.1, "curve": curve},
        "none": {"test_accuracy": 0.2, "train_loss": None, "curve": slow},
    }
    text = "\n".join(numbers_of(experiment(arms)))
    assert "90.0 % was first reached: learned by step 20, none never (tested every 10 steps)." in text
    assert summarize(experiment(arms)).plain[0] == "The arm none diverged: its loss is no longer a finite number."


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (0.98, "Owning a pair gained nothing that this test can tell, for 3 times as many gammas and betas."),
        (0.90, "Owning a pair ended 8.0 points below one shared pair, for 3 times"),
    ],
)
def test_pairs(accuracy, verdict):
    single = {"min": 0.9, "median": 0.95, "max": 0.99, "all": [0.9, 0.95, 0.99], "samples": 1000}
    spread = {"gamma_std": 0.0123, "beta_std": 0.5}
    per_batch = {
        "test_accuracy": accuracy,
        "steps": 30,
        "single_pair_accuracy": single,
        "pair_spread": spread,
    }
    lines = numbers_of(experiment({"learned": {"test_accuracy": 0.98}, "per-batch": per_batch}))
    text = "\n".join(lines)
    assert (
        "each of 3 batches keeps its samples and owns a gamma and beta a channel, which moved 10 times in 30 steps"
        in text
    )
    assert "The pairs differ by 0.012 in gamma and 0.50 in beta" in text
    assert f"the average pair gets {100 * accuracy:.1f} % right, single pairs 90.0 % to 99.0 %, median 95.0 %." in text
    assert lines[-1].startswith(verdict)


def test_one_pair_one_step_and_a_spread_that_is_no_number():
    single = {"min": 0.5, "median": 0.5, "max": 0.5, "all": [0.5], "samples": 10}
    spread = {"gamma_std": None, "beta_std": 0.5}
    found = {"test_accuracy": 0.5, "steps": 1, "single_pair_accuracy": single, "pair_spread": spread}
    text = "\n".join(numbers_of(experiment({"learned": {"test_accuracy": 0.5}, "per-batch": found})))
    assert "each of 1 batch keeps its samples" in text
    assert "moved 1 time in 1 step. How much the pairs differ is no longer a finite number." in text
    assert "for 1 time as many" in text


def test_what_is_missing_is_said():
    run = experiment({"learned": {"test_accuracy": 0.9}})
    run.meta["arms"] = ["learned", "none"]
    assert summarize(run).plain[0] == "No results yet from none: the run is running."


def trained(experiment: str, arms: dict[str, Any], learns: str = "all", recorded: int = 12) -> Recorded:
    """A run of two channels that moved, and of three batches that were probed, with results."""
    run = Recorded([[1, 1], [1.5, 0.9]], [[0, 0], [0, -0.2]], means=[[0, 0], [1, 2], [2, 1]], variances=np.ones((3, 2)))
    run.meta |= {"experiment": experiment, "learns": learns, "test_samples": 1000}
    run.results, run.recorded = {"arms": arms}, {"steps": recorded}
    return run


SINGLE = {"min": 0.4, "median": 0.5, "max": 0.6, "all": [0.4, 0.5, 0.6], "samples": 1000}
ANSWER = [
    "Only the mean and the variance are computed anew for each batch: 3 batches, put through the same network, had 3 "
    "different means, but shared one gamma and one beta in each channel.",
    "Gamma and beta are learned like any other weight: they started at 1 and 0, and 12 steps moved them, each from "
    "where the one before had left them.",
]


def test_five_plain_sentences_where_gamma_and_beta_alone_learned():
    per_batch = {"test_accuracy": 0.7, "steps": 12, "single_pair_accuracy": SINGLE, "pair_spread": {}}
    arms = {"learned": {"test_accuracy": 0.95}, "fixed": {"test_accuracy": 0.1}, "per-batch": per_batch}
    assert summarize(trained("gamma-beta", arms, "gamma and beta")).plain == [
        *ANSWER,
        "Nothing else learned here: every other weight kept its random value, and these 4 numbers alone got 95.0 % of "
        "1,000 new samples right.",
        "With gamma and beta kept at 1 and 0, every batch was measured just the same, and 10.0 % came out right: "
        "measuring teaches nothing.",
        "When each of 3 batches owned a gamma and a beta instead, one such pair got from 40.0 % to 60.0 % right: it "
        "had learned from its own batch alone, and a new sample belongs to no batch.",
    ]


def test_no_lesson_is_drawn_from_a_difference_that_may_be_chance():
    arms = {"learned": {"test_accuracy": 0.101}, "fixed": {"test_accuracy": 0.1}}
    said = summarize(trained("gamma-beta", arms, "gamma and beta")).plain
    assert said[3].endswith("10.0 % came out right: too close for this test to tell apart.")
    arms["fixed"]["test_accuracy"] = 0.5  # fixed is the better: nor does that show it
    said = summarize(trained("gamma-beta", arms, "gamma and beta")).plain
    assert "measuring teaches nothing" not in said[3]


def test_plain_sentences_where_all_learned():
    curves = [{"step": [10, 20], "test_accuracy": accuracy} for accuracy in ([0.95, 0.98], [0.5, 0.92])]
    arms = {
        "learned": {"test_accuracy": 0.98, "curve": curves[0]},
        "fixed": {"test_accuracy": 0.98, "curve": curves[0]},
        "none": {"test_accuracy": 0.92, "curve": curves[1]},
    }
    assert summarize(trained("all", arms)).plain == [
        *ANSWER,
        "With gamma and beta learned, 98.0 % of 1,000 new samples came out right; with both kept at 1 and 0, 98.0 %; "
        "without batch norm, 92.0 %.",
        "90.0 % was first reached by step 10 with batch norm, and by step 20 without it.",
        "All the other weights learned here too, and they can do much of what gamma and beta do.",
    ]
    arms["none"]["test_accuracy"] = 0.979
    assert summarize(trained("all", arms)).plain[2].endswith("97.9 %: too close for this test to tell apart.")


def test_plain_sentences_where_the_input_to_a_sigmoid_was_followed():
    def arm(*widths):
        curve = {"step": [10, 20], "test_accuracy": [0.5, 0.6]}
        curve |= {f"input_p{name}": [sign * w / 2 for w in widths] for name, sign in ((15, -1), (50, 0), (85, 1))}
        return {"test_accuracy": 0.6, "curve": curve}

    said = summarize(trained("paper", {"learned": arm(2.5, 3), "none": arm(0.25, 2)})).plain
    assert said[3] == (
        "From the first test to the last, the middle 70 % of what reached one sigmoid of the last hidden layer became "
        "1.20 times as wide with batch norm, and 8.00 times without it."
    )
    diverged = arm(0.25, 2)
    diverged["curve"]["input_p85"][-1] = None
    assert not any(
        "sigmoid" in line for line in summarize(trained("paper", {"learned": arm(2, 3), "none": diverged})).plain
    )


def test_plain_sentences_of_a_run_of_ones_own():
    said = summarize(trained("", {})).plain
    assert said == [
        *ANSWER,
        "At the last known step gamma was 0.30 away from 1 on average, and beta 0.10 away from 0.",
        "In eval mode no batch is measured: the running mean and variance, averages over the batches seen, are used "
        "instead, and gamma and beta stay as they were learned.",
    ]


def test_what_is_not_so_is_not_said():
    run = trained("", {})
    run._vectors["gamma"][0] = 2  # a model that was trained before
    assert summarize(run).plain[1].startswith("Gamma and beta are learned like any other weight: 12 steps moved them")
    run.meta["arm"] = "per-batch"
    assert not any("the one before" in line for line in summarize(run).plain)
    run = trained("", {})
    run._probes["batch_mean"][:] = 0.5  # whatever the batch
    assert not any("different means" in line for line in summarize(run).plain)


def test_trouble_comes_first_and_there_are_never_more_than_five():
    arms = {name: {"test_accuracy": 0.5, "train_loss": None} for name in ("learned", "fixed", "none")}
    said = summarize(trained("all", arms)).plain
    assert len(said) == PLAIN
    assert [line.split(" diverged")[0] for line in said[:3]] == ["The arm learned", "The arm fixed", "The arm none"]
    assert summarize(SimpleNamespace(main=SimpleNamespace(layers=[]), results={}, meta={})) == Words([], [])


@pytest.mark.processes
def test_no_torch():
    code = "import sys, batchnorm.view.words; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
