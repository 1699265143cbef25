"""Reports the results of runs: prints a table, and writes a self-contained HTML page that checks itself.

    python -m ibjax.report DIR [DIR …] [--out=report.html] [--each] [--open] [--tables=DIR] [--pictures=DIR]
    python -m ibjax.report DIR [DIR …] --watch [--port=8770] [--open]

A DIR is a workdir, or a folder that contains workdirs; every run below it is reported, including teachers and runs for
contrast. Runs that differ only in their seed share one line with mean ± standard deviation; --each gives every run its
own line.

--watch writes nothing: it serves a live page of runs that train, at http://localhost:8770/, until Ctrl-C.
"""

import webbrowser

from ibjax import cli, errors, files
from ibjax.errors import InputError
from ibjax.evaluation.report import (
    RunResults,
    read,
    self_checks,
    table,
    watch,
    write,
    write_pictures,
    write_tables,
)

__all__ = ["RunResults", "read", "table", "write", "write_pictures", "write_tables"]


def parser() -> cli.Parser:
    """The arguments of this module."""
    text = "Writes one HTML page on all runs in and below the folders, and prints their table."
    parser = cli.parser("ibjax.report", text)
    add = parser.add_argument
    add("folder", metavar="DIR", type=files.path, nargs="+", help="a workdir, or a folder above some")
    add("--out", type=files.path, help="the page to write; default: report.html in the first DIR")
    add("--each", action="store_true", help="a line for every seed of a recipe, not their mean")
    add("--open", action="store_true", help="open the page in the browser")
    add("--tables", type=files.path, metavar="DIR", help="write every table there as CSV, Markdown and LaTeX")
    add("--pictures", type=files.path, metavar="DIR", help="write every figure there as PNG, SVG and PDF")
    add("--watch", action="store_true", help="serve a live page of runs that train; write nothing")
    add("--port", type=int, help=f"of --watch; default: {watch.PORT}, or a free one")
    return parser


def main() -> None:
    """The command line of this module."""
    given = parser().parse_args()
    errors.exit_with(lambda: _watch(given) if given.watch else _report(given))


def _report(given):
    if given.port is not None:
        raise InputError("--port goes with --watch")
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
    if given.tables:
        print(f"tables: {_counted(write_tables(runs, given.tables, given.each), given.tables)}")
    if given.pictures:
        print(f"pictures: {_counted(write_pictures(runs, given.pictures, given.each), given.pictures)}")
    print(f"report: {out}")
    if given.open:
        _open(out.resolve().as_uri())


def _watch(given):
    for option in ("out", "tables", "pictures", "each"):
        if getattr(given, option):
            raise InputError(
                f"--{option} does not go with --watch, which writes nothing and shows each run; leave one out"
            )
    if given.port is not None:
        errors.check_range("--port", given.port, 0, 65535)
    with watch.server(given.folder, given.port) as server:
        port = server.server_address[1]
        print(f"{server.url} (from another machine: ssh -L {port}:localhost:{port} HOST); Ctrl-C ends it", flush=True)
        if given.open:
            _open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _counted(found, folder):
    return f"{folder}, {len(found)} files"


def _open(address):
    if not webbrowser.open(address):
        print(f"no browser was found here; open {address}")


if __name__ == "__main__":
    main()
