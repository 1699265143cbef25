"""The command line: wrong input ends in exit code 2 and one line, before anything is written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import clean_recipe, smoke_config

from ibjax import config, errors, evaluate, main, run
from ibjax.attacks.geometry import fraction
from ibjax.errors import DivergedError, InputError, PreemptedError

ROOT = Path(__file__).parent.parent
DIGITS = f"--config={ROOT / 'configs/digits.py'}:smoke"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """(arguments) -> (exit code, stderr) of `python -m ibjax.main`, in this process."""
    monkeypatch.setattr(main.cluster, "initialize", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", *arguments])
        with pytest.raises(SystemExit) as caught:
            main.main()
        return caught.value.code, capsys.readouterr().err.strip()

    return call


def float_images(path):
    np.savez(path, x_train=np.full((32, 8, 8, 1), 200.0), y_train=np.arange(32) % 10, x_test=np.zeros((8, 8, 8, 1)),
             y_test=np.arange(8))  # fmt: skip


WRONG = {
    "a misspelt key": (["--config.objective.aplha=0.5"], ["'objective.aplha'", "did you mean 'objective.alpha'?"]),
    "a misspelt section": (["--config.batchsize=4"], ["'batchsize'", "did you mean 'batch_size'?"]),
    "a misspelt flag": (["--confg=x"], ["confg"]),
    "a misspelt module": (["--config.objective.name=trade"], ["'trade'", "did you mean 'trades'?"]),
    "eps in grey levels": (["--config.attack.eps=8"], ["eps=8", "'8/255'"]),
    "a learning rate that is no number": (["--config.optimizer.lr=nan"], ["optimizer.lr=nan"]),
    "text for a number": (["--config.epochs=ten"], ["epochs", "ten"]),
    "a batch that does not divide": (["--config.batch_size=12"], ["batch_size=12", "8 devices", "use 8 or 16"]),
    "a batch larger than the data": (["--config.batch_size=800"], ["batch_size=800", "training images"]),
    "an unknown mode": (["--mode=trian"], ["mode", "train"]),
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
    changed = main.override(
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
    assert changed.objective.to_dict() == {"name": "trades", "beta": 2.0, "forwards": 2}
    assert changed.optimizer.nesterov is True and changed.schedule.boundaries == (1,) and changed.ema_decay == 0.5
    assert changed.perturb.to_dict() == {"name": "awp", "gamma": 0.005, "warmup": 0}
    assert changed.teacher.recipe.objective.beta == 4.0 and changed.contrast.undefended.seed == 3
    plain = main.override(smoke_config("digits"), ["--config.attack=None", "--config.objective.name=standard"])
    assert plain.attack is None and plain.objective.to_dict() == {"name": "standard"}


def test_missing_files_and_flags(command, tmp_path):
    code, message = command(f"--config={ROOT / 'configs/digit.py'}", f"--workdir={tmp_path}")
    assert code == 2 and "did you mean 'digits.py'?" in message
    assert command(DIGITS) == (2, main_missing("workdir"))
    assert command(f"--workdir={tmp_path}") == (2, main_missing("config"))
    code, message = command(f"{DIGITS}smok", f"--workdir={tmp_path / 'x'}")
    assert code == 2 and "did you mean 'smoke'?" in message
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    code, message = command(f"--config={broken}", f"--workdir={tmp_path / 'x'}")
    assert code == 2 and "ZeroDivisionError" in message and "\n" not in message


def main_missing(flag):
    example = "python -m ibjax.main --config=configs/digits.py --workdir=runs/digits"
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
    with pytest.raises(
        InputError, match=r"train the teacher first: python -m ibjax\.main --config=configs/trades_wrn\.py"
    ):
        main.execute(recipe, tmp_path / "x", "train")
    assert not (tmp_path / "x").exists()


def test_another_source_can_be_named_on_the_command_line_with_what_it_needs(command, tmp_path):
    recipe, workdir = f"--config={ROOT / 'configs/trades_wrn.py'}", f"--workdir={tmp_path / 'x'}"
    code, message = command(recipe, workdir, "--config.data.name=folder")
    assert code == 2 and "data.path is missing; 'folder' needs it" in message
    code, message = command(recipe, workdir, "--config.data.name=folder", f"--config.data.path={tmp_path / 'cifar'}")
    assert code == 2 and "train/ and test/" in message
    chosen = main.override(
        main.load_config(str(ROOT / "configs/trades_wrn.py")),
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


def test_a_finished_command_does_nothing_again(digits_run):
    """Checkpoints and records are reused: neither the teacher nor an attack runs twice."""
    files = [*digits_run.rglob("checkpoints/*/*"), *digits_run.rglob("eval/best/*.json")]
    before = {file: file.stat().st_mtime_ns for file in files}
    records = main.execute(smoke_config("digits"), digits_run, "train")
    assert len(records) == 9
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_evaluation_alone_needs_a_trained_run(tmp_path, digits_run):
    with pytest.raises(InputError, match="holds no trained run"):
        main.execute(smoke_config("digits"), tmp_path / "x", "eval")
    assert len(main.execute(smoke_config("digits"), digits_run, "eval")) == 9


def test_a_record_says_where_its_numbers_come_from(digits_run):
    record = json.loads((digits_run / "eval/best/pgd-2.json").read_text())
    keys = "clean_acc robust_acc attack eps norm n checkpoint selected_on seed config versions commit seconds warnings"
    assert set(keys.split()) <= set(record)
    assert (
        record["selected_on"] == "val" and record["n"] == 16 and 0 <= record["robust_acc"] <= record["clean_acc"] <= 100
    )
    assert record["max_distance"] <= fraction(record["eps"]) + 1e-6


def test_load_returns_a_working_network(digits_run):
    import ibjax

    loaded = ibjax.load(digits_run, checkpoint="last")
    test = run.load_data(loaded.config).test
    logits = loaded.logits_fn(test.images[:5].astype(np.float32) / 255)
    assert logits.shape == (5, 10) and np.isfinite(logits).all()
    direct, _ = loaded.model.apply(loaded.variables, test.images[:5].astype(np.float32) / 255, train=False)
    np.testing.assert_allclose(logits, direct, atol=1e-5)


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("x"), errors.EXIT_INPUT),
        (PreemptedError("x"), errors.EXIT_PREEMPTED),
        (DivergedError("x"), errors.EXIT_DIVERGED),
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
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={digits_run}", *arguments])
        with pytest.raises(SystemExit) as caught:
            evaluate.main()
        assert caught.value.code == 2 and words in capsys.readouterr().err
