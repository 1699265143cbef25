"""Measures what a run does before its first step is done: seconds by part, and how often it traces and compiles.

    python benchmarks/launch.py --config=FILE.py[:arg] [--config.KEY=VALUE …] [--out=PATH.json]

The command `ibjax train` runs twice, in a fresh process each, with private folders for the run and for what is cached:
compiled programs and decoded images. They are empty at first, and filled by the first run for the second. Each process
ends after the first step of the configuration, which has no teacher to train first. Every part is given as seconds of
the clock, and as seconds of all processors, which other processes disturb less; the check reads the data. Prints the
table; with --out writes it, and a JSON file beside it.
"""

import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from parts import bare, from_child, refuse_other

from ibjax import errors, files
from ibjax.runs import command_line

PARTS = ("import", "data", "check", "first state", "first step", "all")
EVENTS = {"jaxpr_trace": "traced", "jaxpr_to_mlir_module": "lowered", "backend_compile": "compiled or loaded"}


class FirstStep(Exception):
    """The first step is done."""


def measure(words: list[str], launched: float) -> dict[str, Any]:
    """{"spent": {part: [seconds, processor seconds]}, event: {program: count}} of a run in this process."""
    import jax

    from ibjax import main
    from ibjax.runs import run
    from ibjax.training import feed, loop

    spent: dict[str, list[float]] = {part: [0.0, 0.0] for part in PARTS}
    spent["import"] = [time.time() - launched, time.process_time()]
    events = {title: collections.Counter() for title in EVENTS.values()}

    def timed(module, name, part):
        call = getattr(module, name)

        def measured(*arguments, **options):
            began, used = time.time(), time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                spent[part][0] += time.time() - began
                spent[part][1] += time.process_time() - used

        setattr(module, name, measured)

    def count(event, seconds, fun_name="", **_):
        for name, title in EVENTS.items():
            if event.endswith(f"/{name}_duration"):
                events[title][fun_name.removeprefix("jit(").removesuffix(")")] += 1

    def ending(*arguments):
        made = make(*arguments)

        def dispatch(*given):
            took["done"] = jax.block_until_ready(made.dispatch(*given)) and time.time()
            raise FirstStep

        timed(holder := type("Dispatch", (), {"dispatch": staticmethod(dispatch)}), "dispatch", "first step")
        return made._replace(dispatch=holder.dispatch)

    took: dict[str, Any] = {}
    make, feed.feed = feed.feed, ending
    jax.monitoring.register_event_duration_secs_listener(count)
    timed(run, "load_data", "data")
    timed(loop, "check", "check")
    timed(loop, "initial_state", "first state")
    sys.argv[1:] = words
    try:
        command = main.parse(sys.argv)
        main.cluster.initialize()
        main.execute(*command)
    except FirstStep:
        spent["all"] = [took["done"] - launched, time.process_time()]
    return {"spent": spent, **events}


def table(records: list[dict[str, Any]]) -> str:
    """The parts of both runs as Markdown."""
    from measuring import markdown  # here, since a process that is measured imports what a run imports

    heads, rows = ("cache", *PARTS, *EVENTS.values()), []
    for record in records:
        if "error" in record:
            rows.append((record["cache"], record["error"], *[""] * (len(heads) - 2)))
            continue
        spent = ["{:.1f} ({:.1f})".format(*record["spent"][part]) for part in PARTS]
        rows.append((record["cache"], *spent, *(sum(record[title].values()) for title in EVENTS.values())))
    return markdown(heads, rows)


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument(
        "--config", required=True, help="a recipe, as that of ibjax train; --config.KEY=VALUE changes it"
    )
    parser.add_argument("--out", type=files.path, help="a JSON file, with the table beside it; default: print only")
    parser.add_argument("--child", help="the time of the launch; measures in this process")
    words, overrides = command_line.apart(sys.argv[1:])
    given = parser.parse_args(words)

    def command():
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"--config={given.config}", *overrides]
            if given.child:
                print(json.dumps(measure([*settings, f"--workdir={folder}/run"], float(given.child))))
                return
            cache = {"XDG_CACHE_HOME": str(Path(folder, "cache"))}
            os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
            if given.out:
                refuse_other(given.out)
            records = []
            for name in ("empty", "filled"):
                found = from_child(__file__, *settings, f"--child={time.time()}", environment=cache)
                records.append({"cache": name, **found})
        from measuring import report  # after the runs, whose device it may take

        report("launch", given.out, table, records)

    errors.exit_with(command)


if __name__ == "__main__":
    main()
