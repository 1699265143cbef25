"""Shared command lines, what made a file, and long jobs that run in parts: one process per part, and one JSON file that
is always whole.

This module does not use an accelerator, so that its child processes can.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ibjax import cli, files
from ibjax.errors import InputError
from ibjax.runs import provenance

ROOT = Path(__file__).resolve().parent.parent


def bare(script: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a script, its `__file__`, without arguments yet."""
    return cli.parser("", description, prog=f"python benchmarks/{Path(script).name}")


# ---- what made a file ----------------------------------------------------------------------------------------


def as_typed(command: str | Sequence[str]) -> list[str]:
    """The words of a recorded command from its script's name on, without --out, which changes no number."""
    words = shlex.split(command) if isinstance(command, str) else list(command)
    script, *rest = words[1:] if words[0] == "python" else words
    kept, left = [], iter(rest)
    for word in left:
        if word == "--out":
            next(left, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return [Path(script).name, *kept]


def in_line(command: str | Sequence[str], xla_flags: str = "") -> str:
    """A recorded command as a page shows it; of paths outside the repository, which are of one machine, the names."""
    script, *words = as_typed(command)
    named = (re.sub(r"(^|[=:])/(?:[^/\s]+/)+", r"\1", word.replace(f"{ROOT}/", "")) for word in words)
    flags = f"XLA_FLAGS={shlex.quote(xla_flags)} " if xla_flags else ""
    return f"`{flags}{shlex.join(['python', f'benchmarks/{script}', *named])}`"


def refuse_other(out: Path) -> None:
    """Raises InputError where `out` is no JSON file, or was made by another command than ours: its records would go."""
    content = _there(out)
    made = content.get("command") or content.get("run", {}).get("command")
    if content and not (made and as_typed(made) == as_typed(sys.argv)):
        whose = f"what {in_line(made)} has made" if made else "the records of another command"
        raise InputError(f"--out={out} holds {whose}; give another --out, or delete the file")


def added_to(out: Path, benchmark: str) -> dict[str, Any]:
    """What earlier calls of a benchmark have written into `out`, for a script whose calls add to one file; {} at first.

    Raises InputError where `out` is no JSON file, or that of another benchmark.
    """
    content = _there(out)
    if content and content.get("benchmark") != benchmark:
        raise InputError(f"--out={out} holds no records of {benchmark}; give another --out, or delete the file")
    return content


def _there(out):
    """The content of a JSON file; {} where there is none."""
    if out.suffix != ".json":
        raise InputError(f"--out={out} is no JSON file; give a path that ends in .json")
    try:
        return files.read_json(out) if out.is_file() else {}
    except ValueError as error:
        raise InputError(f"--out={out} cannot be read ({error}); give another --out, or delete the file") from None


# ---- one process per part ------------------------------------------------------------------------------------


def update(out: Path, part: str, **values: Any) -> None:
    """Adds values to one part of the JSON file."""
    content = files.read_json(out) if out.is_file() else {}
    files.write_json(out, {**content, part: {**content.get(part, {}), **values}})


def made_by() -> dict[str, Any]:
    """Of which code and versions a row is, those of the compilers for accelerators among them."""
    versions = provenance.versions()
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"commit": provenance.commit(), "versions": versions}


def done(row: Mapping[str, Any] | None, source: Mapping[str, Any]) -> bool:
    """Whether a row is there, without an error, and of this `made_by()`."""
    return row is not None and not row["error"] and all(row.get(key) == value for key, value in source.items())


def reason(code: int, log: str) -> str:
    """Why a compilation ended, in a line: the compiler's fatal one, the last one, or the signal."""
    lines = [line for line in log.splitlines() if line.strip()]
    if code > 0:
        return lines[-1][:200] if lines else f"exit code {code}"
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]  # as Abseil logs: F1122 09:44:11.680648 … message
    return f"the compiler crashed, {signal.Signals(-code).name} {fatal[0].partition('] ')[2] if fatal else ''}"[:200]


def from_child(
    script: str,
    *words: str,
    environment: Mapping[str, str] | None = None,
    why: Callable[[int, str], str] = reason,
) -> dict[str, Any]:
    """What a script, its `__file__`, prints as JSON in its last line in a process of its own.

    Where it fails, {"error": why(exit code, what it said)}.
    """
    options: dict[str, Any] = dict(env={**os.environ, **(environment or {})}, capture_output=True)
    process = subprocess.run([sys.executable, script, *words], encoding="utf-8", errors="replace", **options)
    if process.returncode:
        return {"error": why(process.returncode, process.stderr)}
    return json.loads(process.stdout.strip().splitlines()[-1])


def compiled_before(parser: argparse.ArgumentParser, out: Path, topology: str) -> dict[str, Any]:
    """The content of a file of compiled programs; one of another topology, or of something else, ends the command."""
    known = _there(out)
    run = known.get("run", {})
    if known and not (run and run.keys() <= {"topology", "date", "versions"}):
        parser.error(f"--out={out} holds no compiled programs; give another --out")
    if run.get("topology", topology) != topology:
        parser.error(f"--out={out} is of {run['topology']}; give another --out")
    return known


def compile_rows(
    parser: argparse.ArgumentParser,
    out: Path,
    topology: str,
    names: Iterable[str],
    compile_one: Callable[[str], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    keep: bool = False,
) -> None:
    """Compiles rows one by one into the JSON file, with `page` of its content beside it as Markdown.

    A row that is `done` stays, and with `keep` also one of another commit. `compile_one` returns the numbers of a row,
    with "compile_seconds", or {"error": …}. A file of another topology ends the command.
    """
    known, source = compiled_before(parser, out, topology), made_by()
    update(out, "run", topology=topology)
    for name in names:
        row = known.get(name)
        if done(row, source | {"commit": row.get("commit")} if keep and row else source):
            continue
        found = {"error": "", **compile_one(name), **source}
        update(out, name, **found)
        update(out, "run", date=datetime.date.today().isoformat())
        out.with_suffix(".md").write_text(page(files.read_json(out)), encoding="utf-8")
        print(name, found["error"] or f"{found['compile_seconds']:.0f} s", flush=True)
    print(out.with_suffix(".md"))


@contextlib.contextmanager
def started(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process whose output goes to `log`; it and its children are gone when the block ends, however it ends."""
    options = dict(cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True)
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
