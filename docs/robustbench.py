"""Writes docs/robustbench.md: every network of RobustBench's leaderboards, how it is imported, or why it is not.

python docs/robustbench.py             writes the page
python docs/robustbench.py --check     ends with 1 where the page is not what it would write
"""

from itertools import groupby

from generated import DATA, NORMS, command

from ibjax.pytorch.published import Published, entries

HEAD = """# RobustBench's networks

Of the {count} networks on RobustBench's leaderboards (commit 78fcc9e), ibjax imports {covered}:

```sh
python -m ibjax.convert --torch=FILE --robustbench=Wang2023Better_WRN-70-16 --workdir=runs/wang
```

The name says architecture, size, normalisation and published accuracies ([all of them](zoo.md)); FILE is downloaded by
hand. The import compares logits with PyTorch's and, where the test set is there, the clean accuracy with the published
one; without the test set, `--photographs=32` (224 for ImageNet) compares logits alone. Where several networks share a
name, write it in full, as in `cifar10/linf/Engstrom2019Robustness`.

`python -m ibjax.evaluate --workdir=DIR --leaderboard` runs AutoAttack on the whole test set, writes the run's entry
with RobustBench's keys to `DIR/leaderboard/`, and prints the rank that it would have. Submitting it is up to you.

Networks are ranked by the lowest robust accuracy that is known, in percent; those for common corruptions are ranked by
their accuracy under corruptions. This page is generated from `ibjax/pytorch/published.csv` by
`python docs/robustbench.py`; a test keeps it current.

| leaderboard | networks | imported |
|---|---|---|
"""


def page() -> str:
    """The page."""
    rows = [row for row in entries().values() if row.data != "mnist"]
    groups = [(key, list(group)) for key, group in groupby(rows, key=lambda row: (row.data, row.norm))]
    covered = sum(not row.uncovered for row in rows)
    parts = [HEAD.format(count=len(rows), covered=covered)]
    for (data, norm), group in groups:
        parts.append(f"| {DATA[data]}, {NORMS[norm]} | {len(group)} | {sum(not row.uncovered for row in group)} |\n")
    for (data, norm), group in groups:
        parts.append(f"\n## {DATA[data]}, {NORMS[norm]}\n\n")
        parts += _section(group)
    return "".join(parts)


def _section(rows: list[Published]):
    yield "| rank | name | clean | robust | `--arch`, or why not |\n|---|---|---|---|---|\n"
    for rank, row in enumerate(sorted(rows, key=lambda row: -(row.robust or 0.0)), 1):
        size = "-".join(str(part) for part in (row.depth, row.width) if part)
        how = f"not imported. {row.uncovered}" if row.uncovered else f"`{row.arch}` {size}"
        yield f"| {rank} | {row.name} | {row.clean:.2f} | {row.robust:.2f} | {how} |\n"


if __name__ == "__main__":
    command("robustbench", page())
