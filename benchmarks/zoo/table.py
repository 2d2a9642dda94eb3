"""The rows of models as a table, with totals on top and what is left below."""

from __future__ import annotations

from collections import Counter
from typing import Any

Row = dict[str, Any]

COLUMNS = (
    "library",
    "model",
    "batch norms",
    "converted",
    "wrong",
    "activations fused",
    "other activations",
    "folded",
    "seen, serious",
)
NOTES = """
- **batch norms**: modules that are a `_BatchNorm` of torch.nn or whose class is named FrozenBatchNorm.
- **converted**: how many `convert` made ours; the others that it named, with its reason.
- **wrong**: one training step (outputs, gradients, running statistics, counters) of the model after `convert`, after
  `convert(fuse=True)` and after `revert` beside torch's, in float64 to 1e-8, or where a network amplifies rounding more
  (inception_v4) to eight times what an input changed by four roundings moves torch's own step by; in float32 at most
  twice torch's own error (and 2e-6 more) on one of five inputs at least, for a ReLU's kink is decided by rounding; the
  keys of the state_dict; the classes after `revert`; the folded model's outputs; whether anything raised.
- **activations fused**: an activation that can be fused was given what a batch norm returned, or the sum of that and
  something of its shape; how many of these ran as one operation, and how many more `convert` names as left,
  counting what it says of a module up to three levels further out, lists of modules aside.
  **other activations**: as many more were of a kind that is not fused, as hardsigmoid or prelu.
- **folded**: batch norms given the very tensor that a convolution or linear layer returned, in eval mode.
- **seen, serious**: whether `diagnose` and `summary` see every batch norm; serious findings of the model as built.
""".strip().splitlines()


def line(row: Row) -> str:
    """A row of the table."""
    if "failed" in row:
        cells = [row["library"], row["model"], f"failed: {row['failed']}"]
        cells += [""] * (len(COLUMNS) - len(cells))
    else:
        wrong = "; ".join([*row["wrong"], *(f"{name} passed over" for name in row.get("silent", ()))]) or "0"
        converted = f"{row.get('converted', 0)}"
        if row.get("named"):
            converted += f", {row['named']} named: {row['reasons']}"
        fused = f"{row.get('fused', 0)} of {row.get('pairs', 0)}"
        if row.get("explained"):
            fused += f", {row['explained']} named"
        seen = "all" if row["found"] and row["summary"] in (None, row["norms"]) else "not all"
        cells = [row["library"], row["model"], row["norms"], converted, wrong, fused, row.get("others", 0)]
        cells += [f"{row.get('folded', 0)} of {row.get('foldable', 0)}", f"{seen}, {row['serious']}"]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def totals(rows: list[Row]) -> list[str]:
    """How many of how many, over all models."""
    done = [row for row in rows if "failed" not in row]

    def count(key: str) -> int:
        return sum(row.get(key, 0) for row in done)

    def of(part: str, whole: str) -> str:
        share = 100 * count(part) / max(1, count(whole))
        return f"{count(part):,} of {count(whole):,} ({share:.1f} %)"

    silent = sum(len(row.get("silent", ())) for row in done)
    neither = count("pairs") - count("fused") - count("explained")
    return [
        f"- Models that ran: {len(done)} of {len(rows)}; with something wrong: {sum(bool(r['wrong']) for r in done)}.",
        f"- Batch norms converted: {of('converted', 'norms')}; named with a reason: {count('named')}; passed over in "
        f"silence: {silent}.",
        f"- Batch norms (and additions) with an activation after them that ran as one operation: "
        f"{of('fused', 'pairs')}; named: {count('explained')}; neither: {neither}.",
        f"- Batch norms right after a convolution or linear layer that folded: {of('folded', 'foldable')}.",
    ]


def left(rows: list[Row]) -> list[str]:
    """What was not folded, with how often and why; and what was neither fused nor named."""
    reasons = Counter(each.split(": ", 1)[1] for row in rows for each in row.get("unfolded", ()))
    unfolded = [f"- {number}: {reason}" for reason, number in reasons.most_common()]
    neither = [f"- {r['library']} {r['model']}: {', '.join(names)}" for r in rows if (names := r.get("neither"))]
    lines = ["", "Not folded:", "", *unfolded] if unfolded else []
    return [*lines, "", "Neither fused nor named:", "", *neither] if neither else lines


def page(rows: list[Row], versions: str) -> str:
    """The whole of results/zoo.md."""
    head = [
        "# Public models",
        "",
        f"`make zoo`: {versions}; random weights, small inputs.",
        "",
        *totals(rows),
        "",
        *NOTES,
    ]
    rule = "|" + "---|" * len(COLUMNS)
    return "\n".join([*head, "", f"| {' | '.join(COLUMNS)} |", rule, *map(line, rows), *left(rows)]) + "\n"
