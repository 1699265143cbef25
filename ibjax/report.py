"""Reports the results of runs: prints a table, and writes a self-contained HTML page that checks itself.

    python -m ibjax.report DIR [DIR …] [--out=report.html] [--each]

A DIR is a workdir, or a folder that contains workdirs; every run below it is reported, including teachers and runs for
contrast. Runs that differ only in their seed share one line with mean ± standard deviation; --each gives every run its
own line.
"""

from ibjax import cli, errors, files
from ibjax.evaluation.report import RunResults, read, self_checks, table, write

__all__ = ["RunResults", "read", "table", "write"]


def parser() -> cli.Parser:
    """The arguments of this module."""
    text = "Writes one HTML page on all runs in and below the folders, and prints their table."
    parser = cli.parser("ibjax.report", text)
    parser.add_argument("folder", metavar="DIR", type=files.path, nargs="+", help="a workdir, or a folder above some")
    parser.add_argument("--out", type=files.path, help="the page to write; default: report.html in the first DIR")
    parser.add_argument("--each", action="store_true", help="a line for every seed of a recipe, not their mean")
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()

    def command():
        out = given.out or given.folder[0] / "report.html"
        runs = write(given.folder, out, given.each)
        records = [record for run in runs for record in run.records]
        print(table(records, given.each))
        for run in runs:
            for problem in run.problems:
                print(f"warning: {run.title}: {problem}")
        for check in self_checks.checks(records):
            if check.status == "fail":
                print(f"failed check: {check.name}: {'; '.join(check.details)}")
        print(f"report: {out}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
