"""Code of the user's own: the examples of docs/extending.md, what runs record of it, and what is refused."""

import ast
import contextlib
import contextvars
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import untrained_run

import ibjax.models
from ibjax import calls, config, errors, extensions, files, main, threat
from ibjax.attacks import names
from ibjax.data import augment
from ibjax.devices import cluster
from ibjax.errors import CodeError, InputError, PreemptedError
from ibjax.evaluation.evaluate import attack_images, evaluate
from ibjax.evaluation.named import named, takes_step_size
from ibjax.runs import command_line, own_code, recipe_files, run, rundir, trees
from ibjax.training import experiment, loop

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


def examples():
    """{file name: source} of the examples on the page."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return {block.split("\n")[0].removeprefix("# "): block for block in blocks}


@contextlib.contextmanager
def another_process():
    """As in a process that has imported no code of the user's own so far."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("ibjax_own_")}
    loaded, allowed = extensions._loaded.copy(), extensions._allowed.copy()
    extensions._loaded.clear()
    extensions._allowed.clear()
    try:
        yield
    finally:
        sys.modules.update(own)
        extensions._loaded.update(loaded)
        extensions._allowed.update(allowed)


def write_examples(folder):
    """`folder`, in which the examples now stand."""
    for name, source in examples().items():
        (folder / name).write_text(source)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of the examples, workdir): a run of all four, as it begins, evaluated."""
    folder = write_examples(tmp_path_factory.mktemp("mine"))
    with another_process(), cluster.on_one_device():
        settings = recipe_files.load(str(folder / "my_recipe.py"))
        loop.check(settings)
        evaluate(untrained_run(folder / "run", settings))
    return folder, folder / "run"


def test_the_examples_are_four_of_at_most_40_lines():
    found = examples()
    assert list(found) == ["my_objective.py", "my_network.py", "my_attack.py", "my_data.py", "my_recipe.py"]
    assert all(len(source.splitlines()) <= 40 for source in found.values())


def test_the_examples_train_stop_resume_evaluate_and_report(tmp_path, monkeypatch):
    workdir = write_examples(tmp_path) / "run"
    with another_process(), cluster.on_one_device():
        command = main.parse(["main", f"--config={tmp_path / 'my_recipe.py'}", f"--workdir={workdir}"])
        with monkeypatch.context() as stopping:
            stopping.setattr(cluster, "preempted", lambda: True)
            with pytest.raises(PreemptedError):
                main.execute(*command)
        main.execute(*command)
    found = {file.name: json.loads(file.read_text()) for file in (workdir / "eval" / "best").glob("*.json")}
    assert list(found) == ["my_attack_py_my_attack-4(start=0.5).json"]
    record = found["my_attack_py_my_attack-4(start=0.5).json"]
    assert record["attack"] == "my_attack.py:my_attack-4(start=0.5)" and record["dataset"] == "stripes"
    assert record["attack_settings"]["steps"] == 4 and record["max_distance"] <= 8 / 255 + 1e-6
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"preempted", "val"} <= {row["kind"] for row in rows}
    last = [row for row in rows if row["kind"] == "train"][-1]
    assert last["loss"] == pytest.approx(last["natural"] - 0.2 * last["entropy"], rel=1e-4)
    page = (workdir / "report.html").read_text()
    assert "my_attack.py:my_attack-4" in page and "stripes" in page


def test_attacking_the_same_images_outside_the_run_gives_its_record(made):
    _, workdir = made
    with cluster.on_one_device():
        trained = ibjax.load(workdir, trust="code")
        (found,), _ = attack_images(trained, run.test_split(trained), "stripes", trust="code")
    record = json.loads((workdir / "eval/best/my_attack_py_my_attack-4(start=0.5).json").read_text())
    keys = ("attack", "attack_settings", "dataset", "eps", "clean_acc", "robust_acc", "fingerprint", "code")
    assert {key: found[key] for key in keys} == {key: record[key] for key in keys}


# ---- what a run records, and when it refuses ---------------------------------------------------------------------


@pytest.fixture
def moved(made, tmp_path):
    """(folder, workdir) of a copy of it, of which nothing has been imported."""
    folder = tmp_path / "mine"
    shutil.copytree(made[0], folder)
    for path in (made[0], folder):  # the copy names its own files
        file = folder / "run" / "config.json"
        file.write_text(file.read_text().replace(str(path), str(folder)))
    content = json.loads(file.read_text())
    files.write_json(file, {key: value for key, value in content.items() if key != "digest"})
    with another_process():
        yield folder, folder / "run"


def test_a_run_records_name_file_and_digests_of_its_code(made):
    folder, workdir = made
    recorded = [json.loads((workdir / name).read_text())["own_code"] for name in ("config.json", "env.json")]
    record = json.loads((workdir / "eval/best/my_attack_py_my_attack-4(start=0.5).json").read_text())
    recorded.append(record["own_code"])
    for found in recorded:
        assert list(found) == ["data", "model", "objective", "attack", "validate.attack"]
        for entry in found.values():
            file = Path(entry["file"])
            assert file.parent == folder and entry["name"].startswith(str(file))
            assert entry["sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    code = {"name": "my_attack.py:my_attack", "sha256": recorded[0]["attack"]["sha256"]}
    assert record["attack_settings"]["code"] == code


def test_code_that_a_folder_names_runs_with_permission_only_and_none_before(moved):
    folder, workdir = moved
    enter = (
        lambda **trust: ibjax.load(workdir, **trust),
        lambda **trust: evaluate(workdir, attacks=("fgsm",), **trust),
        lambda **trust: recipe_files.load(str(workdir / "config.json")),
    )
    text = f"with your permission: attack .*, data '{folder}/my_data.py', .*; read it, then give --trust=code"
    for door in enter:
        with pytest.raises(CodeError, match=text) as caught:
            door()
        assert "\n" not in str(caught.value) and not [name for name in sys.modules if name.startswith("ibjax_own_")]
    found = ibjax.load(workdir, trust="code")
    assert type(found.model).__name__ == "Model" and found.logits_fn(jnp.zeros((2, 8, 8, 1))).shape == (2, 3)
    assert ibjax.load(workdir).step == found.step  # this process runs the code anyway
    with pytest.raises(InputError, match="trust='yes' is unknown; allowed: changed, code"):
        ibjax.load(workdir, trust="yes")


def test_every_command_takes_the_permission(moved):
    folder, workdir = moved
    given = main.parse(["main", f"--config={workdir}/config.json", f"--workdir={folder}/again", "--trust=code"])
    assert given.trust == "code" and given.settings.model.name == str(folder / "my_network.py")
    parsers = (command_line.of_run("m", ""), command_line.of_recipe("m", ""), command_line.of_training("m", ""))
    for parser in parsers:
        words = [f"--{action.dest}=x" for action in parser._actions if action.required]
        context = contextvars.copy_context()
        assert context.run(parser.parse_args, [*words, "--trust=changed"]).trust == "changed"
        assert context.run(extensions.may_run, "os.system") and not extensions.may_run("os.system")


def test_a_students_command_asks_before_it_runs_a_teachers_code(moved):
    student = config.smoke(config.base(), (8, 8, 1), 3, {})
    student.model, student.objective = dict(name="cnn", widths=((4,),), hidden=(), padding=1), dict(name="rslad")
    student.attack.update(loss="kl", init="gaussian")
    student.teacher.workdir = str(moved[1])
    with pytest.raises(CodeError, match=r"runs only with your permission: attack .*, model '.*my_network.py'"):
        loop.check(student)
    with extensions.trusting("code"):
        loop.check(student)


@pytest.mark.parametrize("changed", ["my_objective.py", "my_network.py"])
def test_changed_code_is_named_and_refused_unless_told(moved, changed):
    folder, workdir = moved
    with (folder / changed).open("a") as file:
        file.write("\n# a change\n")
    text = f"made with other code of .*: {folder}/{changed} changed since; put the code back, .*--trust=changed"
    with pytest.raises(CodeError, match=text):
        ibjax.load(workdir, trust="code")
    command = main.parse(["main", f"--config={folder / 'my_recipe.py'}", f"--workdir={workdir}"])
    with pytest.raises(CodeError, match=text):
        main.execute(*command)
    with extensions.trusting("changed"):
        facts = rundir.read_config(workdir)[1]
        rundir.write_config(workdir, command.settings, facts)
        saved = ibjax.load(workdir).config
    section = {"my_objective.py": "objective", "my_network.py": "model"}[changed]
    recorded = rundir.recorded_code(workdir)
    assert [path for path, entry in recorded.items() if "earlier" in entry] == [section]
    name = extensions.unanchored(saved[section].name)
    assert own_code.doubts(saved, recorded) == [
        f"the code of {section} '{name}' was changed while this run was trained"
    ]
    assert ibjax.load(workdir, trust="code").step == 0  # what the run goes on with is on record


def test_a_file_that_has_moved_is_found_in_the_runs_folder_and_in_the_current_one(moved, monkeypatch):
    folder, workdir = moved
    for name in ("my_data.py", "my_network.py"):
        shutil.move(folder / name, workdir / name)
    (folder / "elsewhere").mkdir()
    for name in ("my_objective.py", "my_attack.py"):
        shutil.move(folder / name, folder / "elsewhere" / name)
    with pytest.raises(CodeError, match=f"there is no file {folder}/my_attack.py"):
        ibjax.load(workdir, trust="code")
    monkeypatch.chdir(folder / "elsewhere")
    found = ibjax.load(workdir, trust="code").config
    assert found.model.name == str(workdir / "my_network.py") and found.attack.name.startswith(str(Path.cwd()))


def test_a_project_that_was_copied_goes_on_with_its_run(made, moved, monkeypatch):
    """The run's config.json names the files of the original, which this process does not use."""
    folder, workdir = moved
    shutil.copy(made[1] / "config.json", workdir / "config.json")
    command = main.parse(["main", f"--config={folder / 'my_recipe.py'}", f"--workdir={workdir}"])
    assert rundir.read_config(workdir)[0].model.name == str(
        folder / "my_network.py"
    )  # the same code, which runs anyway
    rundir.write_config(workdir, command.settings, rundir.read_config(workdir)[1])
    assert str(made[0]) not in (workdir / "config.json").read_text()
    shutil.copy(made[1] / "config.json", workdir / "config.json")
    with another_process():
        with (folder / "my_network.py").open("a") as file:
            file.write("# a change")
        command = main.parse(["main", f"--config={folder / 'my_recipe.py'}", f"--workdir={workdir}"])
        with pytest.raises(CodeError, match=f"{folder}/my_network.py changed since"):
            main.execute(*command)


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder on the import path, with a package `their_pkg` that also has entry points."""
    root = tmp_path / "site"
    files_ = {
        "their_pkg/__init__.py": "from .parts import attribute\n",
        "their_pkg/parts.py": "def attribute(*, size: int = 2):\n    return lambda key, images: images[:, ::-1]\n",
        "their_pkg/flip.py": "import their_pkg.parts\nfrom . import unused\n\n\n"
        "def flip(*, times: int = 1):\n    return lambda key, images: images\n",
        "their_pkg/unused.py": "",
        "their_pkg/never.py": "",
        "theirs-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: theirs\nVersion: 2.0\n",
        "theirs-2.0.dist-info/entry_points.txt": "[ibjax.augmentations]\nturn = their_pkg.flip:flip\n"
        "crop_and_flip = their_pkg.flip:flip\ngone = their_pkg.gone\n[ibjax.schedules]\nboth = their_pkg.flip\n",
        "other-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
        "other-1.0.dist-info/entry_points.txt": "[ibjax.schedules]\nboth = other:both\n",
    }
    for name, text in files_.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.syspath_prepend(str(root))
    with another_process():
        yield root
    for name in [name for name in sys.modules if name.startswith("their_pkg")]:
        del sys.modules[name]


def test_a_name_is_a_module_an_attribute_an_entry_point_or_a_file(package, caplog):
    x = jnp.arange(12, dtype=jnp.float32).reshape(1, 2, 2, 3) / 12
    assert calls.factory("augmentations", "their_pkg.attribute")()(None, x).tolist() == x[:, ::-1].tolist()
    for name in ("their_pkg.flip", "their_pkg.flip.flip", "turn", f"{package}/their_pkg/flip.py:flip"):
        assert calls.factory("augmentations", name)(times=2)(None, x).tolist() == x.tolist()
    assert calls.factory("augmentations", "crop_and_flip") is augment.crop_and_flip
    assert "entry point 'crop_and_flip' of theirs in ibjax.augmentations is not used" in caplog.text
    with pytest.raises(InputError, match=r"augment.name 'trun' is unknown; allowed: .*did you mean 'turn'"):
        calls.factory("augmentations", "trun")
    with pytest.raises(CodeError, match=r"entry point of theirs 2.0 names the module 'their_pkg.gone', which"):
        calls.factory("augmentations", "gone")
    with pytest.raises(
        CodeError, match=r"schedule 'both' is an entry point of both (other and theirs|theirs and other)"
    ):
        calls.factory("schedules", "both")


def test_every_kind_has_entry_points(package):
    (package / "their_pkg/each.py").write_text(
        "def mine(*, norm: str = 'linf', eps: float = 0.1, steps: int = 3):\n"
        "    return lambda key, logits_fn, x, target: x\n"
    )
    (package / "each-3.0.dist-info").mkdir()
    (package / "each-3.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: each\nVersion: 3.0\n")
    groups = (f"[ibjax.{kind}]\nmine = their_pkg.each:mine\n" for kind in calls._CONTRACTS)
    (package / "each-3.0.dist-info/entry_points.txt").write_text("".join(groups))
    extensions._points.cache_clear()
    try:
        for kind in calls._CONTRACTS:
            source = calls.own_source(kind, "mine")
            assert (source.module, source.version) == ("their_pkg.each", "each 3.0"), kind
            assert f"`ibjax.{kind}`" in PAGE.read_text(encoding="utf-8")
        assert named("mine-7").settings["steps"] == 7
    finally:
        extensions._points.cache_clear()


def test_a_record_names_the_version_and_every_source_file_that_is_imported(package):
    record = extensions.record(extensions.locate("augmentations", "turn"))
    assert (record["module"], record["version"]) == ("their_pkg.flip", "theirs 2.0")
    assert list(record["sha256"]) == [f"their_pkg/{name}.py" for name in ("__init__", "flip", "parts", "unused")]
    (package / "alone.py").write_text("from .neighbour import WIDTH\n\n\ndef alone():\n    return lambda key, x: x\n")
    (package / "neighbour.py").write_text("WIDTH = 3\n")
    source = extensions.locate("augmentations", f"{package}/alone.py")
    before = extensions.record(source)
    assert list(before["sha256"]) == ["alone.py", "neighbour.py"]
    path = list(sys.path)
    calls.factory("augmentations", source.name)
    assert sys.path == path and "alone" not in sys.modules and "neighbour" not in sys.modules
    (package / "neighbour.py").write_text("WIDTH = 40\n")
    assert extensions.record(source) == before  # of what this process runs
    with another_process():
        assert extensions.changed(before, source) == [f"{package}/neighbour.py"]


WRONG = {
    "there is no file .*/none.py": ("objectives", "{folder}/none.py:x", ""),
    "Python finds no module 'no_such_pkg'; install": ("objectives", "no_such_pkg.method", ""),
    "'ibjax.objectives.trades' is in ibjax itself; .* 'trades'": ("objectives", "ibjax.objectives.trades", ""),
    "module 'sys' has no source file": ("objectives", "sys.exit", ""),
    "defines no 'w' to call; allowed: x": ("objectives", "{file}:w", "def x(): pass"),
    "w.py, line 2: NameError: name 'y'": ("objectives", "{file}", "\ny + 1"),
    "w.py, line 2: SyntaxError": ("objectives", "{file}", "\ndef ("),
    "w.py, line 1: SystemExit": ("objectives", "{file}", "raise SystemExit(3)"),
    "No module named 'beside'; a file beside it is imported as `from . import beside`": (
        "objectives", "{file}", "import beside"),
    "argument 'options' has no name to be given by": ("objectives", "{file}", "def w(**options): pass"),
    "takes no argument 'num_classes', which ibjax passes; it takes width": (
        "models", "{file}:w", "def w(width=1): pass"),
    "takes no argument 'eps'": ("attacks", "{file}", "def w(*, norm): pass"),
    "is a NoneType; return ibjax.step.Objective": ("objectives", "{file}", "def w(): pass"),
    "cannot be made: .*w.py, line 1: ZeroDivisionError": ("objectives", "{file}", "def w(): 1 / 0"),
    "is a NoneType; make a flax.linen.Module": ("models", "{file}:w", "def w(num_classes=1): pass"),
    "is called with .self, x.; define __call__.self, x, train=False.": (
        "models", "{file}", "import flax.linen as nn\nclass Model(nn.Module):\n    num_classes: int = 1\n"
        "    def __call__(self, x): return x"),
    "is a int; return a function .key, logits_fn": ("attacks", "{file}", "def w(*, norm='linf', eps=1): return 3"),
    "is a dict; return ibjax.data.Arrays": ("data", "{file}:w", "def w(): return {{}}"),
    "is a int; return an optax": ("optimizers", "{file}", "def w(*, lr=1): return 3"),
    "returns an array of shape .2,.; return the learning rate": (
        "schedules", "{file}", "def w(*, lr=1, epochs=2): return lambda epoch: [epoch, epoch]"),
    "is a int; return a function .params": ("perturbations", "{file}", "def w(): return 3"),
    "is a int; return a function .key, images": ("augmentations", "{file}", "def w(): return 3"),
}  # fmt: skip


@pytest.mark.parametrize("words", WRONG)
def test_code_that_cannot_be_used_is_refused_in_one_line(tmp_path, words):
    kind, name, source = WRONG[words]
    (tmp_path / "w.py").write_text(source.replace("{{}}", "{}"))
    (tmp_path / "beside.py").write_text("")
    with pytest.raises(CodeError, match=words) as caught:
        calls.factory(kind, name.format(folder=tmp_path, file=tmp_path / "w.py"))()
    assert "\n" not in str(caught.value)


def test_options_of_own_code_are_checked_as_those_of_built_ins(made):
    settings = recipe_files.load(str(made[0] / "my_recipe.py"))
    for path, words in {
        "objective.gama=1": "objective.gama is unknown to '.*my_objective'; allowed: gamma; did you mean 'gamma'?",
        "objective.gamma='x'": "objective.gamma='x' has the wrong type; .* takes float",
        "objective.gamma=-1": "objective.gamma=-1 is not allowed; give a number of at least 0",
        "attack.eps=8": "eps",
        "model.width=None": "model.width=None has the wrong type",
    }.items():
        wrong = settings.copy_and_resolve_references()
        key, _, value = path.partition("=")
        section, _, option = key.partition(".")
        wrong[section] = {**config.plain(wrong[section]), option: ast.literal_eval(value)}
        with pytest.raises(InputError, match=words):
            config.check(wrong)


def test_names_of_own_attacks(made, monkeypatch):
    monkeypatch.chdir(made[0])
    name = "./my_attack.py:my_attack-4(start=0.5)"
    assert (names.canonical(f" {name} "), names.recorded(name)) == (name, "my_attack.py:my_attack-4(start=0.5)")
    assert names.in_file_name(name) == "my_attack_py_my_attack-4(start=0.5)"
    assert named(name).settings["steps"] == 4 and named("./my_attack.py:my_attack").settings["steps"] == 10
    for wrong, words in {
        "./my_attack.py:my_attack-4(strat=1)": "no option 'strat'; .*did you mean 'start'",
        "./my_attack.py:my_attack-4(start=wide)": "start=wide is not allowed; give it as <class 'float'>",
        "./my_attack.py:my_attack-4(steps=3)": "has its steps in its name",
        "./my_atack.py:my_attack-4": "there is no file",
        "my_attack-4": "attack 'my_attack-4' is unknown",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            named(wrong)
        assert "\n" not in str(caught.value)
    wide = "def wide(*, norm, eps, step_size='1/255'):\n    return lambda key, f, x, y: x + eps + step_size\n"
    (made[0] / "wide.py").write_text(wide)
    assert takes_step_size("./wide.py:wide") and named("./wide.py:wide(step_size=2/255)").length == "2/255"
    with pytest.raises(InputError, match=r"'./wide.py:wide' takes no steps; write ./wide.py:wide"):
        named("./wide.py:wide-3")
    with pytest.raises(InputError, match=r"attack 'wide.py:wide' leaves the eps-ball or \[0, 1\]"):
        evaluate(made[1], attacks=("./wide.py:wide",), n=8)


def test_a_module_in_a_folder_appended_to_a_package_is_recorded_and_its_absence_named(made, tmp_path, monkeypatch):
    """Which is how own networks were added before they had names."""
    (tmp_path / "extra_net.py").write_text((made[0] / "my_network.py").read_text())
    monkeypatch.setattr(ibjax.models, "__path__", [*ibjax.models.__path__, str(tmp_path)])
    settings = recipe_files.load(str(made[0] / "my_recipe.py"))
    settings.model.name = "extra_net"
    config.check(settings)
    recorded = own_code.record(settings)
    assert recorded["model"]["file" if "file" in recorded["model"] else "module"] == "ibjax.models.extra_net"
    assert list(recorded["model"]["sha256"]) == ["extra_net.py"]
    monkeypatch.undo()
    sys.modules.pop("ibjax.models.extra_net", None)
    with pytest.raises(
        CodeError, match=r"names the model 'extra_net', made by ibjax.models.extra_net, which is not installed"
    ):
        own_code.permit(settings, recorded, tmp_path / "config.json")


# ---- what own code returns -------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(made, monkeypatch):
    """A recipe of the examples' data and network, which is checked as the command line would."""
    monkeypatch.chdir(made[0])
    settings = recipe_files.load("my_recipe.py")
    settings.attack.name = settings.validate.attack.name = "fgsm"
    del settings.attack["steps"], settings.validate.attack["steps"]
    return settings


BODIES = {
    "its target is float32.2.; return labels": ("return jnp.zeros(2)", "return 0.0, (variables, {})"),
    "its loss returns float32..; return loss, .variables, metrics.": ("return batch['label']", "return jnp.zeros(())"),
    "its loss is float32.8.; return one number": ("return batch['label']", "return jnp.zeros(8), (variables, {})"),
    "returns variables of another structure": ("return batch['label']", "return jnp.zeros(()), ({}, {})"),
    "its metric 'm' is float32.8.; give one number": (
        "return batch['label']", "return jnp.zeros(()), (variables, {'m': jnp.zeros(8)})"),
    "the method needs the tap 'stage7', .* its taps are stage1, pre_logits": (
        "return batch['label']", "return net.predict(variables, x_adv)[1]['stage7'].sum(), (variables, {})"),
    "cannot be traced: .*w.py, line 7: ZeroDivisionError": ("return batch['label']", "return 1 / 0"),
}  # fmt: skip
OBJECTIVE = """import jax.numpy as jnp
from ibjax.step import Objective
def w():
    def target(net, variables, batch, key):
        {}
    def loss(net, variables, batch, x_adv, key):
        {}
    return Objective(target, loss)
"""


@pytest.mark.parametrize("words", BODIES)
def test_an_objective_of_the_wrong_structure_is_refused_before_training(recipe, tmp_path, words):
    (tmp_path / "w.py").write_text(OBJECTIVE.format(*BODIES[words]))
    recipe.objective = dict(name=f"{tmp_path}/w.py")
    with pytest.raises(InputError, match=words) as caught:
        loop.check(recipe)
    assert "\n" not in str(caught.value)


LOGITS = """import flax.linen as nn
class Model(nn.Module):
    num_classes: int
    @nn.compact
    def __call__(self, x, train=False):
        return {}
"""


def test_a_network_may_return_logits_alone_and_a_method_names_the_tap_that_it_needs(recipe, tmp_path):
    (tmp_path / "net.py").write_text(LOGITS.format("nn.Dense(self.num_classes)(x.reshape(len(x), -1))"))
    recipe.model = dict(name=f"{tmp_path}/net.py")
    recipe.objective = dict(name="pgd_at")
    loop.check(recipe)
    for objective, words in {
        "ib_rar": "no layer 'pre_logits'; it returns logits alone",
        "hbar": "no layer 'pre_logits'; it returns logits alone",
        "infoat_r": "needs the tap 'pre_logits', which the network does not have: it returns logits alone",
        "vib": "needs a network with a stochastic layer",
    }.items():
        config.rename(recipe, "objective", objective)
        losses = {"ib_rar": "ce", "hbar": "kl", "infoat_r": "objective"}
        attack = dict(name="pgd", loss=losses.get(objective), init="gaussian", steps=1, **threat.own())
        recipe.attack = attack if objective in losses else None
        with pytest.raises(InputError, match=words):
            loop.check(recipe)
    config.rename(recipe, "objective", "pgd_at")
    recipe.attack = dict(name="fgsm", **threat.own())
    for number, (body, words) in enumerate({
        "nn.Dense(7)(x.reshape(len(x), -1))": r"the network returns logits of shape \(1, 7\); the data has 3 classes",
        "[x]": "the network returns a list; return logits",
        "(x, x, x)": "the network returns a tuple of 3; return logits",
    }.items()):  # fmt: skip
        (tmp_path / f"net{number}.py").write_text(LOGITS.format(body))
        recipe.model = dict(name=f"{tmp_path}/net{number}.py")
        with pytest.raises(InputError, match=words):
            loop.check(recipe)


PARTS = """import jax
import jax.numpy as jnp
import optax
def noisy(*, size: float = 0.1):
    return lambda key, images: images + size * jax.random.normal(key, images.shape)
def smaller(*, lr, momentum: float = 0.5):
    return optax.sgd(lr, momentum)
def halved(*, lr: float, epochs: float, every: int = 1):
    return lambda epoch: lr * 0.5 ** jnp.floor(epoch / every)
def up(*, gamma: float = 0.1):
    return lambda params, gradients, epoch: jax.tree.map(lambda g: gamma * g, gradients)
def lossy():
    return lambda key, images: images[1:]
"""


def test_own_augmentations_optimisers_schedules_and_perturbations_make_the_step(recipe, tmp_path):
    """One compiled step: its images depend on seed and step alone, the rate is the schedule's."""
    (tmp_path / "parts.py").write_text(PARTS)
    here = f"{tmp_path}/parts.py"
    names = {"augment": "noisy", "optimizer": "smaller", "schedule": "halved", "perturb": "up"}
    overrides = [f"--config.{section}.name={here}:{name}" for section, name in names.items()]
    recipe = recipe_files.override(recipe, [*overrides, "--config.augment.size=0.3", "--config.optimizer.lr=0.25"])
    assert (recipe.augment.to_dict(), recipe.optimizer.momentum) == ({"name": f"{here}:noisy", "size": 0.3}, 0.9)
    made = experiment.build(recipe)
    state, images = experiment.initial_state(made), made.data.train.images[:8]
    batch = {"image": images, "label": made.data.train.labels[:8], "index": np.arange(8)}
    step, key = jax.jit(made.train_step), jax.random.key(0)
    one, metrics = step(state, batch, key)
    again, _ = step(state, batch, key)
    assert trees.digest(one) == trees.digest(again) and np.isfinite(metrics["loss"])
    later, _ = step(state._replace(step=state.step + 1), batch, key)
    assert trees.digest(one.variables) != trees.digest(later.variables)
    assert float(made.learning_rate(jnp.int32(made.steps_per_epoch))) == pytest.approx(0.125)
    assert list(own_code.record(recipe)) == [
        "data",
        "model",
        "objective",
        "optimizer",
        "schedule",
        "perturb",
        "augment",
    ]
    recipe.augment = dict(name=f"{here}:lossy")
    with pytest.raises(InputError, match=r"lossy' returns float32\[7, 8, 8, 1\]; return images as it got, float32\[8"):
        loop.check(recipe)


def test_an_objective_that_is_nan_at_the_start_is_blamed_and_no_learning_rate(recipe, tmp_path):
    (tmp_path / "w.py").write_text(OBJECTIVE.format("return batch['label']", "return jnp.log(-1.0), (variables, {})"))
    (tmp_path / "net.py").write_text(LOGITS.format("nn.Dense(self.num_classes)(x.reshape(len(x), -1))"))
    recipe.objective, recipe.model = dict(name=f"{tmp_path}/w.py"), dict(name=f"{tmp_path}/net.py")
    text = r"loss is NaN or Inf in the very first batch, at the initial weights, so objective '.*w.py'"
    with pytest.raises(errors.DivergedError, match=text):
        loop.train(experiment.build(recipe), tmp_path / "run")
