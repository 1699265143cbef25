"""A run's folder from elsewhere runs no code unless the user permits it, and is asked for nothing outside it."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import change_config, clean_recipe, smoke_config, untrained_run
from test_faults import ROOT, environment

import ibjax
from ibjax import attack as attack_command
from ibjax import config, files, main
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, CodeError, InputError
from ibjax.evaluation import evaluate, report
from ibjax.evaluation.named import named
from ibjax.models import cnn
from ibjax.runs import recipe_files, run

RNG = np.random.default_rng(0)
UNKNOWN = ("evil", "linked", "../evil", "__main__", "..evil")
FORBIDDEN = ("os.system", "evil.Model", "{folder}/evil.py:Model", "./evil.py", "{folder}/linked.py")
NAMES = (*UNKNOWN, *FORBIDDEN)
SECTIONS = ("model", "objective", "data", "attack", "validate.attack", "optimizer", "schedule", "perturb", "augment")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, made here from a file."""
    here = tmp_path_factory.mktemp("foreign")
    np.savez(here / "a.npz", x_train=RNG.integers(0, 256, (48, 8, 8, 1), dtype=np.uint8), y_train=np.arange(48) % 3,
             x_test=RNG.integers(0, 256, (21, 8, 8, 1), dtype=np.uint8), y_test=np.arange(21) // 7)  # fmt: skip
    recipe = clean_recipe()
    recipe.data = dict(name="npz", path=str(here / "a.npz"), val_size=8, split_seed=0)
    recipe.model.update(widths=(), hidden=())
    recipe.evaluate.attacks = ("fgsm",)
    return untrained_run(here / "run", recipe)


@pytest.fixture
def foreign(made, tmp_path, monkeypatch):
    """A copy of it with modules in its folder, which is the current one and is searched for imports.

    Nothing may be imported or called by the end of a test.
    """
    folder, ran = shutil.copytree(made, tmp_path / "foreign"), []
    evil = f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef Model(*a, **k): pass\nload = evil = linked = Model\n"
    (folder / "evil.py").write_text(evil)
    (tmp_path / "outside.py").write_text(evil)
    (folder / "linked.py").symlink_to(tmp_path / "outside.py")
    (tmp_path / "evil.py").write_text(evil)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(os, "system", ran.append)
    yield folder
    assert not ran and not (tmp_path / "ran").exists() and not {"evil", "linked", "outside"} & set(sys.modules)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_none_of_ours_is_not_imported_without_permission(foreign, name, section):
    name = name.format(folder=foreign)
    key, absent = section.replace(".", "__"), section in ("attack", "perturb")
    change_config(foreign, **({key: {"name": name}} if absent else {f"{key}__name": name}))
    with pytest.raises((CheckpointError, CodeError)) as caught:
        ibjax.load(foreign)
    text = str(caught.value)
    unknown, forbidden = f".name {name!r} is unknown; allowed: " in text, "only with your permission: " in text
    assert (unknown, forbidden) == ((True, False) if name in UNKNOWN else (False, True))
    assert ("--trust=code" in text) == forbidden and "damaged" not in text and "\n" not in text


def test_names_inside_sections_are_unknown_too(foreign):
    inner = smoke_config("digits").teacher.recipe
    inner.model.name = "evil"
    for values in (
        dict(teacher__recipe=config.plain(inner)),
        dict(contrast={"other": config.plain(inner)}),
        dict(model=dict(name="stochastic", backbone=dict(name="evil"))),
        dict(model=dict(name="masked", tap="stage1", channels=(0,), backbone=dict(name="evil"))),
    ):
        shutil.copy(foreign / "config.json", foreign / "kept")
        change_config(foreign, **values)
        with pytest.raises(CheckpointError, match="name 'evil' is unknown"):
            ibjax.load(foreign)
        text = (foreign / "config.json").read_text().replace('"evil"', '"os.system"')
        files.write_json(foreign / "config.json", {k: v for k, v in json.loads(text).items() if k != "digest"})
        with pytest.raises(CodeError, match=r"permission: .* 'os.system'; read it"):
            ibjax.load(foreign)
        shutil.move(foreign / "kept", foreign / "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_every_door_to_a_folder_refuses_it(made, foreign, tmp_path, name):
    """Evaluation, a surrogate, a teacher; a report shows the records that there are."""
    name = name.format(folder=foreign)
    change_config(foreign, model={"name": name})
    student = smoke_config("digits")
    student.teacher.recipe, student.teacher.workdir = None, str(foreign)
    for enter in (
        lambda: evaluate.evaluate(foreign),
        lambda: evaluate.evaluate(made, surrogate=foreign, attacks=("fgsm",)),
        lambda: main.execute(student, tmp_path / "student"),
    ):
        with pytest.raises(InputError, match=r"is unknown|only with your permission"):
            enter()
    report.write([foreign], tmp_path / "report.html")
    assert not (tmp_path / "student" / "checkpoints").exists()


@pytest.mark.parametrize("attack", ["os.system-3", "evil.Model", "./evil.py:Model"])
def test_attacks_that_a_folder_names_do_not_run_without_permission(foreign, monkeypatch, capsys, attack):
    """Those of its `evaluate` section, at every door that takes them when the caller names none."""
    change_config(foreign, evaluate__attacks=(attack,))
    trained = ibjax.load(foreign)
    words = "runs only with your permission: evaluate.attacks"
    for enter in (
        lambda: evaluate.evaluate(foreign),
        lambda: evaluate.attack_images(trained, run.test_split(trained), "test"),
        lambda: recipe_files.load(str(foreign / "config.json")),
    ):
        with pytest.raises(CodeError, match=words):
            enter()
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    monkeypatch.setattr(sys, "argv", ["attack", str(foreign.parent / "b.npz"), f"--model={foreign}"])
    split = run.test_split(trained)
    np.savez(foreign.parent / "b.npz", x=split.images, y=split.labels)
    with pytest.raises(SystemExit):
        attack_command.main()
    assert words in capsys.readouterr().err


def test_an_installed_package_takes_no_name_of_ours(foreign, tmp_path, monkeypatch):
    """Entry points that are called as built-in modules are, whatever their group."""
    about = tmp_path / "site" / "other-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    groups = ("ibjax", *(f"ibjax.{kind}" for kind in ("models", "objectives", "data", "attacks")))
    names = ("cnn", "standard", "npz", "fgsm", "pgd")
    points = [f"[{group}]\n" + "".join(f"{name} = evil:Model\n" for name in names) for group in groups]
    (about / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(str(about.parent))
    assert len([point for point in importlib.metadata.entry_points(name="cnn") if point.value == "evil:Model"]) == 5
    assert type(ibjax.load(foreign).model) is cnn.Model
    assert evaluate.evaluate(foreign, attacks=("fgsm",)) and named("pgd-1").settings["steps"] == 1


_opened: list[str] | None = None  # while it is watched


def _watch(event, arguments):
    if _opened is not None and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str | Path):
        _opened.append(os.path.abspath(arguments[0]))


@contextlib.contextmanager
def watched():
    """The paths that Python opens or lists meanwhile."""
    global _opened
    if not getattr(watched, "hooked", False):  # a hook stays for good
        sys.addaudithook(_watch)
        watched.hooked = True
    _opened = []
    try:
        yield _opened
    finally:
        _opened = None


def test_load_follows_no_path_to_a_teacher_or_to_data(foreign, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(foreign / "config.json", elsewhere / "config.json")
    change_config(foreign, teacher__workdir=str(elsewhere), assistant__workdir=str(elsewhere),
            data__path=str(elsewhere / "a.npz"))  # fmt: skip
    with watched() as opened:
        ibjax.load(foreign)
    assert str(foreign / "config.json") in opened
    assert not [path for path in opened if path.startswith(str(elsewhere))]


# ---- commands that are started in the folder --------------------------------------------------------------------

SHADOWED = ("json", "optax", "numpy", "jax", "tqdm", "signal", "typing", "logging", "argparse", "configs")


@pytest.mark.parametrize(
    "command", ["ibjax.evaluate --workdir=.", "ibjax.report .", "ibjax.analysis.complexity --config=config.json"]
)
def test_a_command_in_the_folder_imports_nothing_from_it(made, tmp_path, command):
    folder = shutil.copytree(made, tmp_path / "run")
    for name in SHADOWED:
        code = f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        (folder / f"{name}.py").write_text(code)
    words = [sys.executable, "-m", *command.split()]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "ran").exists() and done.returncode == 0, done.stderr


def test_a_recipe_imports_its_neighbours(tmp_path):
    (tmp_path / "neighbour.py").write_text("WIDTH = 24\n")
    recipe = (ROOT / "configs" / "digits.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(f"{recipe}\nimport neighbour\nprint('width', neighbour.WIDTH)\n")
    words = [sys.executable, "-m", "ibjax.analysis.complexity", "--config=mine.py"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("width 24"), done.stderr
