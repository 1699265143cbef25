"""Every command line says what it takes, and git does not ask about what it writes."""

import argparse
import importlib
import io
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from test_faults import environment

from ibjax import cli
from ibjax.analysis import commands
from ibjax.devices import cluster

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for file in (ROOT / "ibjax").rglob("*.py")
    if file.parent.name != "networks"  # what an export brings along, to be run in its folder
    and file.name != "__main__.py"  # of the analyses: it lists the other ones
    and 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")
)
BENCHMARKS = sorted(
    file for file in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)


def test_commands_are_found():
    assert {"ibjax.main", "ibjax.aot", "ibjax.analysis.flops", "ibjax.data.prepare"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_help_is_no_error_and_names_the_command_and_its_options(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 0 and not printed.err
    assert name in printed.out and re.search(r"^\s+-", printed.out, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [name, "--hlep"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and re.match(r"error: .*--help says what there is$", lines[0])


ANALYSES = [name.rpartition(".")[2] for name in MODULES if name.startswith("ibjax.analysis.")]


def analysis(monkeypatch, *words):
    """The exit status of `python -m ibjax.analysis WORDS`."""
    monkeypatch.setattr(sys, "argv", ["analysis", *words])
    monkeypatch.delitem(sys.modules, "ibjax.analysis.__main__", raising=False)  # else runpy warns
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("ibjax.analysis", run_name="__main__")
    return stopped.value.code


def test_the_analyses_are_listed_with_what_each_shows_and_how_it_is_called(monkeypatch, capsys):
    assert analysis(monkeypatch) == 0
    blocks = capsys.readouterr().out.split("\n\n")[1:]
    assert [block.partition(":")[0] for block in blocks] == ANALYSES
    for name, block in zip(ANALYSES, blocks, strict=True):
        shown, call, *_ = block.splitlines()
        assert len(shown) > len(name) + 20 and re.search(r"[.?]$", shown)
        assert re.match(rf"    python -m ibjax\.analysis\.{name} --(workdir|config)=", call)


def test_an_analysis_runs_by_its_name_and_an_unknown_name_is_refused(monkeypatch, capsys):
    assert analysis(monkeypatch, "mask", "--help") == 0
    assert "--share" in capsys.readouterr().out
    assert analysis(monkeypatch, "tendancy") == 2
    assert "did you mean 'tendency'?" in capsys.readouterr().err


def test_an_analysis_that_keeps_nothing_leaves_sigterm_to_the_system(monkeypatch):
    """Others get a notice of preemption, which they look for while they train."""
    before, notice, seen = signal.getsignal(signal.SIGTERM), lambda *_: None, []
    look = lambda: seen.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(cluster, "initialize", lambda: signal.signal(signal.SIGTERM, notice))
    try:
        for recipe in (None, lambda: None):
            with pytest.raises(SystemExit):
                commands.conduct(argparse.Namespace(), look, lambda _: (), recipe=recipe)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIG_DFL, notice]


@pytest.mark.slow
def test_an_analysis_that_keeps_nothing_ends_at_once_at_sigterm():
    code = (
        "import argparse, time; from ibjax.analysis import commands\n"
        "commands.conduct(argparse.Namespace(), lambda: print('begun', flush=True) or time.sleep(30), print)"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        assert process.wait(timeout=10) == -signal.SIGTERM


def ascii_terminal(monkeypatch):
    """A terminal that cannot show what help texts have, as with PYTHONIOENCODING=ascii."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    return stream


@pytest.mark.parametrize("name", MODULES)
def test_help_needs_no_utf8(name, monkeypatch):
    shown = ascii_terminal(monkeypatch)
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    shown.flush()
    assert stopped.value.code == 0 and name.encode() in shown.buffer.getvalue()


def script(path, monkeypatch, *arguments):
    """The exit code of a benchmark, run in this process as from the shell; skipped where what it compares is absent."""
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as stopped:
        try:
            runpy.run_path(str(path), run_name="__main__")
        except ModuleNotFoundError as error:
            pytest.skip(f"needs {error.name}")
    return stopped.value.code


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_the_help_of_a_benchmark_is_no_error_and_needs_no_utf8(path, monkeypatch):
    shown = ascii_terminal(monkeypatch)
    assert script(path, monkeypatch, "--help") == 0
    shown.flush()
    assert f"benchmarks/{path.name}".encode() in shown.buffer.getvalue()


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_without_its_device_ends_in_one_line(path, monkeypatch, capfd):
    """Those whose children compute, and those that compile for what is not here, need no device themselves."""
    if "measuring.run(" not in path.read_text(encoding="utf-8"):
        pytest.skip("asks for no device itself")

    def absent():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "default_backend", absent)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert script(path, monkeypatch, "--quick") == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "JAX_PLATFORMS=cuda cannot be used here" in lines[0]


def git(*arguments):
    """The lines that git prints in this source tree; the test is skipped where that is no repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_git_ignores_what_the_documented_commands_write_and_nothing_that_is_tracked():
    documents = [ROOT / "README.md", ROOT / "configs" / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in documents)
    written = set(re.findall(r"--(?:workdir|out|to|pictures?|tables)[ =]((?!/|~|\$|[A-Z])[\w./-]+)", text))
    assert {"runs/digits", "report.html", "exported"} <= written
    written -= {"card", "torch"}  # kinds of exports
    written |= {"runs/digits/report.html", "attention.pdf", "scores.svg", "slurm-17.out", "state.npz"}
    assert written - set(git("check-ignore", "--no-index", *written)) == set()
    assert git("ls-files", "-ci", "--exclude-standard") == []


def test_a_wrong_attack_is_refused_in_its_own_words(capsys):
    """argparse would say "invalid canonical value"."""
    parser = cli.parser("ibjax.analysis.tendency", "")
    commands.add_attack(parser, "pgd-20")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--attack=pgd-20(eps"])
    assert ended.value.code == 2
    assert "attack 'pgd-20(eps' cannot be read; write options as NAME(" in capsys.readouterr().err
