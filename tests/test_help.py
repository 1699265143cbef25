"""Every command line says what it takes."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for file in (ROOT / "ibjax").rglob("*.py")
    if file.parent.name != "torch_models"  # what an export brings along, to be run in its folder
    and 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
)


def test_commands_are_found():
    assert {"ibjax.main", "ibjax.aot", "ibjax.analysis.flops", "ibjax.data.prepare"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_help_is_no_error_and_names_the_command_and_its_options(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    entrance = getattr(module, "main", None)
    if not callable(entrance):  # in ibjax.aot, main is the module of that name
        entrance = module.command
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        entrance()
    printed = capsys.readouterr()
    assert stopped.value.code == 0 and not printed.err
    assert name in printed.out and re.search(r"^\s+-", printed.out, re.MULTILINE)
