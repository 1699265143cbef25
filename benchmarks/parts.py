"""Shared command lines, and long jobs that run in parts: one process per part, and one JSON file that is always whole.

This module does not use an accelerator, so that its child processes can.
"""

import argparse
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ibjax import files
from ibjax.runs import command_line

ROOT = Path(__file__).resolve().parent.parent


def bare(script: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a script, its `__file__`, without arguments yet."""
    return command_line.bare("", description, prog=f"python benchmarks/{Path(script).name}")


def update(out: Path, part: str, **values: Any) -> None:
    """Adds values to one part of the JSON file."""
    content = files.read_json(out) if out.is_file() else {}
    files.write_json(out, {**content, part: {**content.get(part, {}), **values}})


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
