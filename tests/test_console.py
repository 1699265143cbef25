"""The console command `ibjax`: each word is a command, the same as its `python -m`; what ships with it is found."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ibjax
from ibjax import __main__ as console
from ibjax import cli, errors, extensions, main, places
from ibjax.errors import InputError
from ibjax.runs import recipe_files

ROOT = Path(__file__).parent.parent


def run(monkeypatch, *words, program="/usr/bin/ibjax"):
    """The exit status of `ibjax WORDS`."""
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(SystemExit) as stopped:
        console.main()
    return stopped.value.code


@pytest.fixture(autouse=True)
def own_signals_and_path(monkeypatch):
    monkeypatch.setattr(ibjax, "_leave_on_interrupt", lambda: None)
    monkeypatch.setattr(sys, "path", sys.path[:])


@pytest.mark.parametrize("name", [*console.COMMANDS, *console.ALIASES])
def test_each_command_has_help_that_names_it_as_it_was_called(name, monkeypatch, capsys):
    usual = console.ALIASES.get(name, name)
    for program, shown in (("/usr/bin/ibjax", "ibjax"), (console.__file__, "python -m ibjax")):
        assert run(monkeypatch, name, "--help", program=program) == 0
        text = capsys.readouterr().out
        assert (
            f"{shown} {usual} " in text
            and f"python -m {console.COMMANDS[usual].removesuffix('.__main__')} " not in text
        )


def test_a_command_is_the_same_as_its_module(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--list", "--config=ibd_wrn") == 0
    assert capsys.readouterr().out.split() == ["ibd", "awp"]
    for words, said in (
        (["train", "--confg=x"], "'--confg' is no option; allowed: --config"),
        (["train", "--workdir=x"], "--config is missing; for example: ibjax train --config=digits"),
        (["analyse", "tendancy"], "did you mean 'tendency'?"),
        (["trian"], "there is no command 'trian'; allowed: analyse, aot"),
        (["--verison"], "did you mean '--version'?"),
        (["convert", "--workdir=x", "--config.a=1", "--torch=y", "z"], "'z' is no option"),
    ):
        assert run(monkeypatch, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines


def test_an_analysis_is_named_as_it_was_called(monkeypatch, capsys):
    assert run(monkeypatch, "analyse") == 0
    text = capsys.readouterr().out
    assert "\n    ibjax analyse mask --workdir=" in text and "python -m" not in text
    assert run(monkeypatch, "analyse", "mask", "--help") == 0
    assert "usage: ibjax analyse mask " in capsys.readouterr().out


def test_it_says_its_version_its_commands_and_where_recipes_are(monkeypatch, capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ibjax.__version__ == version
    assert run(monkeypatch, "--version") == 0 and capsys.readouterr().out == f"ibjax {version}\n"
    assert run(monkeypatch) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in console.COMMANDS)
    assert f"recipes: {ROOT / 'configs'}\n" in text and f"scripts for clusters: {ROOT / 'launch'}\n" in text


def test_help_and_import_need_no_library_and_names_are_seen_before_they_are_imported():
    code = (
        "import sys, ibjax; assert {'load', 'Run', '__version__', *ibjax.__all__} <= set(dir(ibjax))\n"
        "sys.argv = ['ibjax', '--help']\n"
        "from ibjax.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'jax', 'numpy', 'absl'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_on_the_digits_imports_no_library_that_only_other_runs_need():
    heavy = "matplotlib scipy sklearn pandas tensorflow tensorflow_datasets torch grain jinja2 tensorboardX wandb"
    code = (
        "import sys, ibjax.main; from ibjax.data import digits; digits.load()\n"
        f"assert not set({heavy.split()}) & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PACKAGES = ("", ".analysis", ".attacks", ".data", ".information", ".models", ".objectives", ".pytorch")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_of_a_package_is_there_and_is_listed(name):
    package = importlib.import_module(f"ibjax{name}")
    assert package.__all__ == sorted(package.__all__) and set(package.__all__) <= set(dir(package))
    assert all(getattr(package, public) is not None for public in package.__all__)
    with pytest.raises(AttributeError, match=f"module 'ibjax{name}' has no attribute 'laod'"):
        package.laod  # noqa: B018


def test_the_marker_for_type_checkers_is_there():
    assert (ROOT / "ibjax/py.typed").is_file()


FIRST = (
    ["--config=mine.py:row"],
    ["--trust=code", "--config", "mine.py"],
    ["--attacks=fgsm,./mine.py:mine-3"],
    ["--attacks=fgsm, my_pkg.mine-20(c=0.1)"],
    ["--attack", "my_pkg.mine"],
    ["--config=digits", "--config.teacher.recipe.objective.name=my_pkg.mine"],
    ["--config.evaluate.attacks=('fgsm', 'my_pkg.mine-3')"],
)
LAST = (["--trust=code"], ["--config=runs/x/config.json", "--trust", "changed"])
OUT = (
    ["--config=digits", "--workdir=run.v2", "--config.optimizer.lr=0.1", "--config.objective.name=trades"],
    ["a.npz", "--out=b.npz", "--attacks=pgd-20(step_size=1/255,c=0.1),ib_rar-3(layers=a.b)", "--names=a.b"],
)


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("words", [*FIRST, *LAST, *OUT], ids=" ".join)
def test_own_code_may_be_in_the_current_folder_unless_that_is_a_run_s(words, module, tmp_path, monkeypatch):
    """With the console command as with python -m, which puts the folder first before ibjax is imported."""
    monkeypatch.chdir(tmp_path)
    usual = ["/usr/bin", "/site"]

    def path():
        monkeypatch.setattr(sys, "argv", ["-m" if module else "ibjax", *words])
        monkeypatch.setattr(sys, "path", [str(tmp_path), *usual[1:]] if module else usual[:])
        (ibjax._leave_folder if module else ibjax._begin_command)()
        return [folder for folder in sys.path if folder != "/usr/bin"]

    here = [str(tmp_path)]
    assert path() == [*here * (words in FIRST), "/site", *here * (words in LAST)]
    (tmp_path / "config.json").touch()
    assert path() == ["/site"]


@pytest.mark.parametrize("name", ["train", "evaluate", "attack", "convert", "aot"])
def test_the_commands_that_read_a_run_or_a_recipe_take_the_permission_for_own_code(name):
    parser = importlib.import_module(console.COMMANDS[name]).parser()
    assert [action.choices for action in parser._actions if action.dest == "trust"] == [extensions.TRUSTS]


def test_whoever_closes_the_pipe_sees_no_traceback():
    command = f"{sys.executable} -m ibjax analyse | head -n 1; exit ${{PIPESTATUS[0]}}"
    for buffering in ("", "1"):
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "PYTHONUNBUFFERED": buffering})  # fmt: skip
        assert done.stderr == "" and done.returncode in (0, errors.EXIT_PIPE) and done.stdout.count("\n") == 1


# ---- recipes -----------------------------------------------------------------------------------------------


def test_recipes_are_found_by_name_in_any_folder_and_a_file_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = main.parse(["main", "--config=ibd_wrn:awp", "--workdir=x", "--config.seed=3"])
    assert named.settings.perturb.name == "awp" and named.settings.seed == 3
    shutil.copy(ROOT / "configs/ibd_wrn.py", tmp_path / "mine.py")
    assert recipe_files.load("mine.py:awp").perturb.name == "awp"
    assert recipe_files.load("baselines_shared:mnist-mart,smoke").threat.eps == "0.3"  # it imports its neighbour
    for value, said in (
        ("digitz", "nor a recipe that ships with ibjax: allowed: .*did you mean 'digits'"),
        ("configs/digits.py", "which ships with ibjax is --config=digits"),
        ("mine", "nor a recipe that ships with ibjax"),
    ):
        with pytest.raises(InputError, match=said):
            recipe_files.load(value)


def test_every_recipe_is_listed_with_its_rows():
    lines = list(recipe_files.listing())
    names = [line.partition(":")[0] for line in lines[:-1] if not line.startswith(" ")]
    assert names == sorted(file.stem for file in (ROOT / "configs").glob("*.py"))
    assert "    ibd, awp" in lines
    with pytest.raises(InputError, match="has no rows"):
        list(recipe_files.listing("digits"))


@pytest.mark.parametrize("code", ["raise RuntimeError('no')", "import sys; sys.exit(0)"])
def test_a_recipe_that_fails_or_exits_is_named(tmp_path, code):
    file = tmp_path / "broken.py"
    file.write_text(code)
    for use in (recipe_files.load, recipe_files.listing):
        with pytest.raises(InputError, match=r"broken\.py fails with (RuntimeError|SystemExit)"):
            list(use(str(file)))


def test_listing_runs_nothing_of_a_run_s_folder(tmp_path):
    (tmp_path / "config.json").write_text("ROWS = ('a',)")
    with pytest.raises(InputError, match="has no rows"):
        list(recipe_files.listing(str(tmp_path / "config.json")))


def test_an_installation_has_recipes_and_launchers_inside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_PACKAGE", tmp_path)
    assert places.recipes() == ROOT / "configs" and places.launchers() == ROOT / "launch"
    for name in ("recipes", "launch"):
        (tmp_path / name).mkdir()
    assert places.recipes() == tmp_path / "recipes" and places.launchers() == tmp_path / "launch"


def test_the_command_that_makes_a_teacher_is_found_anywhere(tmp_path, monkeypatch):
    """Its recipe is one that a wheel has."""
    monkeypatch.chdir(tmp_path)
    for name in ("ibd_wrn", "ibd_resnet18:cifar100", "ibd_ablations", "distillation"):
        made_by = recipe_files.load(name).teacher.made_by
        recipe_files.load(made_by.split("--config=")[1].split()[0])


# ---- completion --------------------------------------------------------------------------------------------


def test_the_shell_completes_commands_options_and_recipes(monkeypatch, capsys, tmp_path):
    pytest.importorskip("shtab")
    assert run(monkeypatch, "--completion", "bash") == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)

    def completed(*words):
        given = " ".join(f"'{word}'" for word in words)
        script = (
            f". ./completion; COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; _shtab_ibjax; echo ${{COMPREPLY[@]}}"
        )
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True).stdout.split()

    assert completed("ibjax", "tr") == ["train"]
    assert completed("ibjax", "evaluate", "--sur") == ["--surrogate", "--surrogate_checkpoint"]
    assert completed("ibjax", "train", "--config", "ibd_r") == ["ibd_resnet18"]
    assert completed("ibjax", "analyse", "ten") == ["tendency"]


def test_without_shtab_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run(monkeypatch, "--completion", "bash") == 2
    assert "pip install 'ibjax[completion]'" in capsys.readouterr().err


def test_parsers_read_docstrings_without_importing(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""One\nsentence. Another."""\nimport nothing_of_that_name\n\n\ndef main():\n    pass\n'
    )
    text, runs = cli.docstring(tmp_path / "a.py")
    assert cli.first_sentence(text) == "One sentence." and runs
