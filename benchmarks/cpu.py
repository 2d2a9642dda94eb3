"""Times batch normalization on the CPU against torch's, over the whole list of shapes, and writes the results.

    python benchmarks/cpu.py [--quick] [--compile] [--what BN+ReLU ...] [--mode forward+backward ...] [--seconds 0.2]

prints a table and writes it to benchmarks/results/cpu.md, or cpu_compile.md with --compile, which compiles every entry
for many seconds. The whole list takes a quarter of an hour, --quick a few minutes. batchnorm.bench.timing explains the
timing and the floor; `batchnorm bench` is the short version.
"""

from __future__ import annotations

import argparse
import statistics

from common import header, save

from batchnorm.bench.timing import IMAGES, MODES, OTHERS, VARIANTS, Result, cases, measure, summarize

QUICK = [
    (32, 64, 56, 56),
    (32, 512, 14, 14),
    (32, 512, 7, 7),
    (32, 96, 28, 28),
    (128, 100),
    (1024, 256),
    (32, 64, 1000),
]
LARGE = 8 << 20  # bytes


def row(result: Result) -> str:
    compiled = "" if result.compiled is None else f"{result.compiled:.2f}"
    numbers = (f"{result.ours_us:,.0f}", f"{result.fraction:.0%}", f"{result.eager:.2f}", compiled)
    return f"| {' | '.join((*result.case.words, *numbers))} |"


def summary(results: list[Result]) -> list[str]:
    lines = ["| what | geometric mean of torch eager / ours | slowest entry |", "|---|---|---|"]
    lines += [f"| {s.dtype}, {s.variant}, {s.mode} | {s.ratio:.2f} | {s.slowest:.2f} |" for s in summarize(results)]
    large = [r.fraction for r in results if r.case.bytes > LARGE]
    slower = sum(r.eager < 0.95 for r in results)
    compiled = [r.compiled for r in results if r.compiled is not None]
    if compiled:
        lines += ["", f"torch.compile / ours: {statistics.geometric_mean(compiled):.2f}, at least {min(compiled):.2f}."]
    lines += [
        "",
        f"Over 8 MiB: {statistics.median(large):.0%} of the copy floor in the median, at least {min(large):.0%}."
        if large
        else "",
        f"Entries slower than torch eager (below 0.95): {slower} of {len(results)}.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few shapes")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--what", nargs="+", choices=VARIANTS, default=VARIANTS, help="only these")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="only these")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each entry, about")
    arguments = parser.parse_args()

    columns = ["| shape | dtype | channels | what | mode | ours, µs | of the floor | eager / ours | compile / ours |"]
    columns += ["|---|---|---|---|---|---|---|---|---|"]
    print("\n".join(columns))
    results = []
    for case in cases(QUICK if arguments.quick else IMAGES + OTHERS, arguments.what, arguments.mode):
        results.append(measure(case, arguments.seconds, arguments.compile))
        print(row(results[-1]), flush=True)
    print("\n" + "\n".join(summary(results)))
    notes = (
        "A ratio above 1 is how many times faster this package is than torch. Every entry was first checked against "
        "float64. What the columns mean: see `batchnorm.bench.timing`."
    )
    name = "cpu_compile" if arguments.compile else "cpu"
    save(name, [*header("Batch normalization on the CPU", notes), *summary(results), "", *columns, *map(row, results)])


if __name__ == "__main__":
    main()
