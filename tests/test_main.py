"""The command line: wrong input ends in exit code 2 and one line, before anything is written."""

import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import clean_recipe, digits_recipe, smoke_config

from ibjax import config, errors, evaluate, main
from ibjax.analysis import layers
from ibjax.attacks.geometry import fraction
from ibjax.devices import cluster
from ibjax.errors import DivergedError, InputError, PreemptedError
from ibjax.runs import recipe_files, run, rundir
from ibjax.training import jobs, loop

ROOT = Path(__file__).parent.parent
DIGITS = f"--config={ROOT / 'configs/digits.py'}:smoke"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """(arguments) -> (exit code, stderr) of `python -m ibjax.main`, in this process."""
    monkeypatch.setattr(cluster, "initialize", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        return caught.value.code, capsys.readouterr().err.strip()

    return call


@pytest.mark.parametrize("module", [main, layers])
def test_jax_is_set_up_before_code_of_the_users_own_runs(module, tmp_path, monkeypatch, capsys):
    """It may use JAX as soon as it is imported, as with MEAN = jnp.array(…), after which no process can be joined."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import os\nassert 'BEGUN' in os.environ\ndef get_config(): raise ValueError('its own error')")
    monkeypatch.setattr(cluster, "initialize", lambda: os.environ.update(BEGUN="1"))
    monkeypatch.setattr(sys, "argv", ["main", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2 and "its own error" in capsys.readouterr().err


def float_images(path):
    np.savez(path, x_train=np.full((32, 8, 8, 1), 200.0), y_train=np.arange(32) % 10, x_test=np.zeros((8, 8, 8, 1)),
             y_test=np.arange(8))  # fmt: skip


WRONG = {
    "a misspelt key": (["--config.objective.aplha=0.5"], ["'objective.aplha'", "did you mean 'objective.alpha'?"]),
    "a misspelt section": (["--config.batchsize=4"], ["'batchsize'", "did you mean 'batch_size'?"]),
    "a misspelt flag": (["--confg=x"], ["'--confg'", "did you mean '--config'?"]),
    "a misspelt module": (["--config.objective.name=trade"], ["'trade'", "did you mean 'trades'?"]),
    "eps in grey levels": (["--config.attack.eps=8"], ["eps=8", "'8/255'"]),
    "a learning rate that is no number": (["--config.optimizer.lr=nan"], ["optimizer.lr=nan"]),
    "text for a number": (["--config.epochs=ten"], ["epochs", "ten"]),
    "a batch that does not divide": (["--config.batch_size=12"], ["batch_size=12", "8 devices", "use 8 or 16"]),
    "a batch larger than the data": (["--config.batch_size=800"], ["batch_size=800", "training images"]),
    "an unknown mode": (["--mode=trian"], ["mode", "'trian'", "train"]),
    "an unknown evaluation attack": (["--config.evaluate.attacks=('pdg-20',)"], ["'pdg-20'", "'pgd-20'"]),
    "an eps of the ladder": (["--config.evaluate.ladder=('8',)"], ["eps=8"]),
    "a word too many": (["digits"], ["'digits'"]),
    "zero epochs": (["--config.epochs=0"], ["epochs=0", "at least 1"]),
    "an unknown perturbation": (["--config.perturb.name=awpp"], ["'awpp'", "did you mean 'awp'?"]),
    "an unknown teacher's checkpoint": (["--config.teacher.checkpoint=lst"], ["'lst'", "best, last"]),
    "an attack that would be ignored": (["--config.objective.name=standard"], ["trains on clean images"]),
    "an attack that is missing": (["--config.attack=None"], ["needs an attack", "loss='kl'"]),
    "momentum below zero": (["--config.optimizer.momentum=-5"], ["momentum=-5", "at least 0"]),
    "groups that do not divide": (["--config.model.bn_groups=3"], ["bn_groups=3"]),
    "a dtype that is none": (["--config.model.dtype=bfloat15"], ["did you mean 'bfloat16'?"]),
    "a padding as wide as the image": (["--config.augment.pad=8"], ["augment.pad=8", "8×8"]),
    "a section as a value": (["--config.schedule=cosine"], ["'schedule' is a section", "--config.schedule.name=NAME"]),
    "an absent section as a value": (
        ["--config.perturb=awp"],
        ["'perturb' is a section", "--config.perturb.name=NAME"],
    ),
    "a held section as a value": (["--config.teacher.recipe.model=cnn"], ["is a section", "its keys are", "widths"]),
    "None for what must be said": (["--config.epochs=None"], ["epochs", "None"]),
    "more test images than there are": (["--config.evaluate.n=99"], ["evaluate.n=99", "16 images", "None takes them"]),
    "an attack that is not for the network": (
        ["--config.evaluate.attacks=('siriib-2',)"],
        ["'siriib-2' needs the feature 'x_avg'"],
    ),
    "an attack on a tap that is not there": (
        ["--config.evaluate.attacks=('ib_rar-10(layers=stage9)',)"],
        ["'ib_rar-10(layers=stage9)' is not for this network", "stage9"],
    ),
    "an unknown padding": (["--config.augment.padding=edges"], ["'edges'", "did you mean 'edge'?"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_exits_with_2_and_one_line_and_writes_nothing(command, tmp_path, case):
    arguments, words = WRONG[case]
    workdir = tmp_path / "run"
    code, message = command(DIGITS, f"--workdir={workdir}", *arguments)
    assert code == 2 and message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in words), message
    assert not workdir.exists()


def test_flags_reach_every_option_and_bring_and_take_sections():
    """Also defaults that the recipe leaves out, the options of a renamed call, and those of the teacher's recipe."""
    changed = recipe_files.override(
        smoke_config("digits"),
        [
            "--config.objective.name=trades",
            "--config.objective.beta=2",
            "--config.optimizer.nesterov=true",
            "--config.schedule.name=piecewise",
            "--config.schedule.boundaries=(1,)",
            "--config.perturb.name=awp",
            "--config.perturb.gamma=0.005",
            "--config.ema_decay=0.5",
            "--config.teacher.recipe.objective.beta=4",
            "--config.contrast.undefended.seed=3",
        ],
    )
    assert changed.objective.to_dict() == {"name": "trades", "beta": 2.0, "passes": "clean,adv", "forwards": 2}
    assert changed.optimizer.nesterov is True and changed.schedule.boundaries == (1,) and changed.ema_decay == 0.5
    assert changed.perturb.to_dict() == {"name": "awp", "gamma": 0.005, "warmup": 0}
    assert changed.teacher.recipe.objective.beta == 4.0 and changed.contrast.undefended.seed == 3
    plain = recipe_files.override(smoke_config("digits"), ["--config.attack=None", "--config.objective.name=standard"])
    assert plain.attack is None and plain.objective.to_dict() == {"name": "standard"}


def test_flags_reach_what_other_recipes_hold_and_what_may_be_none():
    changed = recipe_files.override(
        smoke_config("digits"),
        [
            "--config.evaluate.n=None",
            "--config.evaluate.samples=None",
            "--config.ema_decay=None",
            "--config.attack.step_size=None",
            "--config.attack.unroll=None",
            "--config.teacher.recipe.attack=None",
            "--config.teacher.recipe.objective.name=standard",
            "--config.contrast.undefended.attack.name=pgd",
            "--config.contrast.undefended.objective.name=pgd_at",
            "--config.contrast.undefended.perturb.name=awp",
        ],
    )
    assert changed.evaluate.n is changed.evaluate.samples is changed.ema_decay is changed.attack.unroll is None
    assert changed.teacher.recipe.attack is None and changed.contrast.undefended.perturb.gamma == 0.01
    config.check(changed)
    limited = recipe_files.override(recipe_files.load(str(ROOT / "configs/small_cnn.py")), ["--config.evaluate.n=None"])
    assert limited.evaluate.n is None
    assert recipe_files.override(smoke_config("digits"), ["--config.teacher.recipe=None"]).teacher.recipe is None


def test_a_runs_own_configuration_can_be_given(digits_run, tmp_path, command):
    file = digits_run / "config.json"
    same = recipe_files.load(str(file))
    assert config.plain(config.effective(same)) == config.plain(rundir.read_config(digits_run)[0])
    changed = recipe_files.override(
        same, ["--config.threat.eps=4/16", "--config.evaluate.n=9", "--config.ema_decay=0.9"]
    )
    for part in (changed, changed.teacher.recipe):
        part = config.effective(changed) if part is changed else config.effective(changed).teacher.recipe
        assert part.attack.eps == part.evaluate.eps == "4/16" and part.attack.step_size == "1/16"
    assert (changed.evaluate.n, changed.ema_decay) == (9, 0.9)
    assert len(main.execute(recipe_files.load(str(file)), digits_run, "train")) == 9  # nothing to do
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "cut.json").write_text(file.read_text()[:99])
    for name in ("other.json", "cut.json"):
        code, message = command(f"--config={tmp_path / name}", f"--workdir={tmp_path / 'x'}")
        assert code == 2 and "is not the config.json of a run" in message and "\n" not in message
    code, message = command(f"--config={file}:smoke", f"--workdir={tmp_path / 'x'}")
    assert code == 2 and "takes no argument" in message


RECIPES = {
    "frozen": "return FrozenConfigDict(config.base())",
    "no argument": "pass",
    "a dict": "return dict(config.base())",
}


def test_what_get_config_may_return_and_take(tmp_path, command):
    head = "from ml_collections import FrozenConfigDict\nfrom ibjax import config\n"
    for name, body in RECIPES.items():
        (tmp_path / f"{name}.py").write_text(f"{head}def get_config():\n    {body}\n")
    made = recipe_files.override(
        recipe_files.load(str(tmp_path / "frozen.py")), ["--config.epochs=3", "--config.evaluate.n=5"]
    )
    assert (made.epochs, made.evaluate.n, made.attack.name) == (3, 5, "pgd")
    (tmp_path / "none.py").write_text("x = 1\n")
    for name, arg, words in (
        ("a dict", "", "returns a dict"),
        ("no argument", ":smoke", "leave ':smoke' out"),
        ("none", "", "has no get_config"),
    ):
        code, message = command(f"--config={tmp_path / name}.py{arg}", f"--workdir={tmp_path / 'x'}")
        assert code == 2 and words in message and "\n" not in message


def test_a_recipe_shares_settings_with_the_one_beside_it_and_says_so_where_that_is_missing(tmp_path, monkeypatch):
    for name in ("baselines_shared.py", "shared_information.py"):
        shutil.copy(ROOT / "configs" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert recipe_files.load("baselines_shared.py:mnist-mart,smoke").threat.eps == "0.3"
    (tmp_path / "shared_information.py").unlink()
    with pytest.raises(InputError, match=r"^baselines_shared\.py shares settings with shared_information\.py.*copy"):
        recipe_files.load("baselines_shared.py")


def test_a_recipe_says_what_it_takes(command, tmp_path):
    recipe = ROOT / "configs/ibd_wrn.py"
    for arg, words in (
        ("smok", "ROW,smoke; allowed: awp, ibd, smoke"),
        ("ibd,awp", "exclude each other; it takes a row"),
    ):
        code, message = command(f"--config={recipe}:{arg}", f"--workdir={tmp_path}")
        assert code == 2 and words in message


def test_what_cannot_be_written_is_told_before_the_first_step(tmp_path, monkeypatch):
    recipe = clean_recipe()
    monkeypatch.setattr(loop, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(InputError, match=r"report\.html cannot be written \(Is a directory\)"):
        main.execute(recipe, tmp_path)
    (tmp_path / "report.html").rmdir()
    (tmp_path / "eval").write_text("")
    with pytest.raises(InputError, match="eval cannot be written"):
        main.execute(recipe, tmp_path)


def test_missing_files_and_flags(command, tmp_path):
    code, message = command(f"--config={ROOT / 'configs/digit.py'}", f"--workdir={tmp_path}")
    assert code == 2 and "did you mean 'digits.py'?" in message
    assert command(DIGITS) == (2, main_missing("workdir"))
    assert command(f"--workdir={tmp_path}") == (2, main_missing("config"))
    code, message = command(f"{DIGITS}smok", f"--workdir={tmp_path / 'x'}")
    assert code == 2 and "did you mean 'smoke'?" in message
    for file, words in (("none/x.py", f"there is no folder {tmp_path / 'none'}"), ("x.py", "holds no recipe")):
        code, message = command(f"--config={tmp_path / file}", f"--workdir={tmp_path / 'x'}")
        assert code == 2 and words in message and "nothing is allowed" not in message
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    code, message = command(f"--config={broken}", f"--workdir={tmp_path / 'x'}")
    assert code == 2 and "ZeroDivisionError" in message and "\n" not in message


def main_missing(flag):
    example = "python -m ibjax.main --config=digits --workdir=runs/digits"
    return f"error: --{flag} is missing; for example: {example}"


def test_missing_data_and_teacher_say_what_to_do(command, tmp_path):
    """The CIFAR recipes without their data set and teacher."""
    code, message = command(f"--config={ROOT / 'configs/ibd_wrn.py'}", f"--workdir={tmp_path / 'x'}",
                            f"--config.data.data_dir={tmp_path / 'tfds'}")  # fmt: skip
    assert code == 2 and "has no cifar10" in message and "\n" not in message
    assert f"python -m ibjax.data.prepare --dataset=cifar10 --data_dir={tmp_path / 'tfds'}" in message
    recipe = smoke_config("ibd_resnet18")
    recipe.teacher.update(workdir=str(tmp_path / "none"))
    recipe.teacher.recipe = None
    with pytest.raises(InputError, match=r"train the teacher first: python -m ibjax\.main --config=trades_wrn "):
        main.execute(recipe, tmp_path / "x", "train")
    assert not (tmp_path / "x").exists()


def test_another_source_can_be_named_on_the_command_line_with_what_it_needs(command, tmp_path):
    recipe, workdir = f"--config={ROOT / 'configs/trades_wrn.py'}", f"--workdir={tmp_path / 'x'}"
    code, message = command(recipe, workdir, "--config.data.name=folder")
    assert code == 2 and "data.path is missing; 'folder' needs it" in message
    code, message = command(recipe, workdir, "--config.data.name=folder", f"--config.data.path={tmp_path / 'cifar'}")
    assert code == 2 and "train/ and test/" in message
    chosen = recipe_files.override(
        recipe_files.load(str(ROOT / "configs/trades_wrn.py")),
        ["--config.data.name=synthetic", "--config.data.shape=(32, 32, 3)", "--config.data.num_classes=10"],
    )
    assert config.plain(chosen.data)["shape"] == (32, 32, 3) and chosen.data.val_size == 1000


def test_a_teacher_of_another_class_count_or_image_size_is_refused(digits_run, tmp_path):
    recipe = smoke_config("digits")
    recipe.teacher.recipe = None
    recipe.teacher.workdir = str(digits_run / "teacher")
    recipe.data.num_classes = 7
    with pytest.raises(InputError, match="has 10 classes, the data has 7"):
        main.execute(recipe, tmp_path, "train")
    recipe.data.num_classes = 10
    recipe.data.shape = (12, 12, 1)
    with pytest.raises(InputError, match=r"shape \(8, 8, 1\)"):
        main.execute(recipe, tmp_path, "train")


def test_float_images_outside_the_unit_interval_are_refused(tmp_path):
    float_images(tmp_path / "a.npz")
    recipe = clean_recipe()
    recipe.data = dict(name="npz", path=str(tmp_path / "a.npz"), val_size=8, split_seed=0)
    with pytest.raises(InputError, match=r"\[200, 200\].*divide by 255"):
        main.execute(recipe, tmp_path / "x", "train")


def test_a_typo_in_the_last_recipe_stops_before_the_first_is_trained(tmp_path):
    recipe = smoke_config("digits")
    recipe.contrast.undefended.model.name = "cnnn"
    with pytest.raises(InputError, match=r"contrast\.undefended: model.name 'cnnn'.*did you mean 'cnn'"):
        main.execute(recipe, tmp_path / "x", "train")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["/somewhere/else", "in/it", "restarted-1", "eval"])
def test_a_contrast_stays_in_its_folder(tmp_path, name):
    recipe = smoke_config("digits")
    with recipe.unlocked():
        recipe.contrast[name] = recipe.contrast.undefended
    with pytest.raises(InputError, match=rf"contrast\.{name}: .*folder"):
        jobs.jobs(recipe, tmp_path / "x")


@pytest.mark.parametrize("part", ["undefended", "."])
def test_a_finished_command_does_nothing_again(digits_run, tmp_path, part):
    """Checkpoints and records are reused: no training, the teacher's included, and no attack runs twice."""
    workdir = Path(shutil.copytree(digits_run / part, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))
    files = [*workdir.rglob("checkpoints/*/*"), *workdir.rglob("eval/best/*.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    recipe, count = (digits_recipe(), 9) if part == "." else (clean_recipe(), 3)
    assert len(main.execute(recipe, workdir, "train")) == count
    assert files and before == {file: file.stat().st_mtime_ns for file in before}


def test_evaluation_alone_needs_a_trained_run(tmp_path, digits_run):
    with pytest.raises(InputError, match="holds no trained run"):
        main.execute(smoke_config("digits"), tmp_path / "x", "eval")
    assert len(main.execute(clean_recipe(), digits_run / "undefended", "eval")) == 3


def test_a_record_says_where_its_numbers_come_from(digits_run):
    record = json.loads((digits_run / "eval/best/pgd-2.json").read_text())
    keys = "clean_acc robust_acc attack eps norm n checkpoint selected_on seed config versions commit seconds warnings"
    assert set(keys.split()) <= set(record)
    assert (
        record["selected_on"] == "val" and record["n"] == 16 and 0 <= record["robust_acc"] <= record["clean_acc"] <= 100
    )
    assert record["max_distance"] <= fraction(record["eps"]) + 1e-6
    seen = ("high", "highest", 0)  # the precision of the attack and of the judgement, which changes nothing on a CPU
    assert (record["precision"], record["judged_in"], record["changed_by_judgement"]) == seen


def test_a_run_is_shown_on_one_screen(digits_run):
    import ibjax

    for folder, words in ((digits_run, "eps 2/16"), (digits_run / "undefended", "on clean images")):
        text = repr(ibjax.load(folder))
        assert len(text.splitlines()) <= 8 and max(map(len, text.splitlines())) <= 160
        assert words in text and str(folder) in text and ".logits_fn" in text and "parameters" in text


def test_load_returns_a_working_network(digits_run):
    import ibjax

    loaded = ibjax.load(digits_run, checkpoint="last")
    test = run.load_data(loaded.config).test
    logits = loaded.logits_fn(test.images[:5].astype(np.float32) / 255)
    assert logits.shape == (5, 10) and np.isfinite(logits).all()
    direct, _ = jax.jit(loaded.model.apply)(loaded.variables, test.images[:5].astype(np.float32) / 255)
    np.testing.assert_allclose(logits, direct, atol=1e-5)


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("x"), errors.EXIT_INPUT),
        (PreemptedError("x"), errors.EXIT_PREEMPTED),
        (DivergedError("x"), errors.EXIT_DIVERGED),
        (errors.PeerError("x"), errors.EXIT_PEER_LOST),
        (KeyboardInterrupt(), errors.EXIT_INTERRUPTED),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating"), errors.EXIT_DIVERGED),
    ],
)
def test_exit_codes_tell_the_endings_apart(error, code, capsys):
    def body():
        raise error

    with pytest.raises(SystemExit) as caught:
        errors.exit_with(body)
    assert caught.value.code == code and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(capsys):
    class Ends:
        def __del__(self):
            raise KeyboardInterrupt

    def command():
        thing = Ends()
        del thing
        for _ in range(10**8):
            pass
        raise AssertionError("it went on")

    with pytest.raises(SystemExit) as caught:
        errors.exit_with(command)
    assert caught.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_wrong_input():
    def body():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        errors.exit_with(body)


def test_evaluate_command_refuses_unknown_attacks_and_checkpoints(digits_run, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.cluster, "initialize", lambda: None)
    for arguments, words in (
        (["--attacks=autoatack"], "autoatack"),
        (["--checkpoint=bst"], "best, last"),
        (["--n=99"], "n=99"),
        (["--surrogate_checkpoint=last"], "--surrogate_checkpoint=last goes with --surrogate"),
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={digits_run}", *arguments])
        with pytest.raises(SystemExit) as caught:
            evaluate.main()
        assert caught.value.code == 2 and words in capsys.readouterr().err
