"""One threat model: training, validation and evaluation take it unless they say otherwise, and records tell."""

import json
import shutil

import pytest
from conftest import clean_recipe, digits_recipe, smoke_config

from ibjax import config, files, main, threat
from ibjax.errors import InputError
from ibjax.evaluation import evaluate, results, settings
from ibjax.evaluation.report import self_checks, tables
from ibjax.runs import recipe_files, run
from ibjax.training import jobs


def said(settings):
    """(norm, eps, step size) of training, validation and evaluation."""
    sections = (settings.attack, settings.validate.attack, settings.evaluate)
    return [None if part is None else (part.norm, part.eps, part.get("step_size")) for part in sections]


def test_the_threat_model_of_the_command_line_is_that_of_every_attack_and_every_run():
    flags = ["--config.threat.eps=6/16", "--config.threat.norm=l2"]
    todo = jobs.jobs(config.effective(recipe_files.override(smoke_config("digits"), flags)), tmp := run.Path("x"))
    assert [job.workdir for job in todo] == [tmp / "teacher", tmp / "undefended", tmp]
    for job in todo:
        trained, *others = said(job.settings)
        assert others == [("l2", "6/16", "1.5/16")] * 2 and trained in (None, others[0])
    assert [said(job.settings)[0] is None for job in todo] == [False, True, False]


def test_what_a_section_says_itself_stays_and_the_rest_follows():
    settings = config.base()
    settings.attack.update(step_size="0.01")
    settings.evaluate.eps = "4/255"
    assert said(config.effective(settings)) == [
        ("linf", "8/255", "0.01"),
        ("linf", "8/255", "2/255"),
        ("linf", "4/255", "1/255"),
    ]
    settings.attack = dict(name="fgsm", loss="ce", init="none")  # its step is its eps, where none is given
    assert said(config.effective(settings))[0] == ("linf", "8/255", None)
    settings.attack = dict(name="cw")  # any size: no threat model
    assert "norm" not in config.effective(settings).attack and threat.trained(config.effective(settings)) is None
    once = config.effective(config.complete(config.base()))
    assert config.effective(once) == once


@pytest.mark.parametrize(
    "eps, expected", [("8/255", "2/255"), ("2/255", "0.5/255"), ("2/16", "0.5/16"), ("0.3", "0.075"), (0.5, 0.125)]
)
def test_a_step_is_a_quarter_of_eps(eps, expected):
    assert threat.quarter(eps) == expected


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config.attack.norm=l2"], "set attack.eps too"),
        (["--config.threat.eps=8"], r"threat\.eps=8"),
        (["--config.threat.norm=l3"], "'l3'"),
        (["--config.threat.eps=0"], r"threat\.eps=0 is not allowed"),
        (["--config.attack.step_size=0"], r"attack\.step_size=0 is not allowed"),
        (["--config.validate.attack.step_size=0.0"], r"validate\.attack\.step_size=0\.0 is not allowed"),
        (["--config.evaluate.step_size=0/255"], r"evaluate\.step_size=0/255 is not allowed"),
        (["--config.teacher.recipe.attack.eps=9"], r"teacher\.recipe: attack\.eps=9"),
        (["--config.threat.norn=l2"], "did you mean 'threat.norm'"),
    ],
)
def test_no_threat_model_is_refused_in_one_line(flags, words):
    with pytest.raises(InputError, match=words) as caught:
        config.check(recipe_files.override(smoke_config("digits"), flags))
    assert "\n" not in str(caught.value)


def test_only_a_recipe_that_is_held_may_leave_its_threat_model_open():
    config.check(smoke_config("digits"))
    with pytest.raises(InputError, match=r"threat\.norm is missing"):
        config.check(smoke_config("digits").contrast.undefended)


def test_a_saved_configuration_is_the_same_run_and_still_follows_its_threat_model():
    given = config.effective(config.complete(smoke_config("digits")))
    loose = threat.follow(given.copy_and_resolve_references())
    assert loose.attack.eps is loose.evaluate.norm is loose.teacher.recipe.threat.eps is None
    assert config.effective(loose) == given
    loose.threat.eps = "4/16"
    assert said(config.effective(loose).teacher.recipe) == [("linf", "4/16", "1/16")] * 3


def test_a_run_from_before_there_was_a_threat_model_loads_and_continues(digits_run, tmp_path):
    folder = shutil.copytree(digits_run, tmp_path / "old", ignore=shutil.ignore_patterns(".lock"))
    for file in folder.rglob("config.json"):
        content = files.read_json(file)
        parts = [content["config"], content["config"]["teacher"]["recipe"], *content["config"]["contrast"].values()]
        for part in filter(None, parts):
            del part["threat"]
            part["evaluate"]["step_size"] = part["validate"]["attack"]["step_size"] = "1/32"
        file.write_text(json.dumps(content))
    saved = run.load(folder).config
    assert saved.threat.to_dict() == {"norm": "linf", "eps": "2/16"} and saved.attack.eps == "2/16"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("eval/best/*.json")}
    assert len(main.execute(digits_recipe(), folder)) == 9
    assert before == {file: file.stat().st_mtime_ns for file in before}


# ---- what differs is said --------------------------------------------------------------------------------------


@pytest.fixture
def digits(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "digits", ignore=shutil.ignore_patterns(".lock"))


@pytest.fixture(scope="module")
def records(digits_run, tmp_path_factory):
    """The records of a student, and of an undefended network."""
    ignored = shutil.ignore_patterns(".lock")
    digits = shutil.copytree(digits_run, tmp_path_factory.mktemp("evaluated") / "digits", ignore=ignored)
    return [evaluate.evaluate(folder) for folder in (digits, digits / "undefended")]


def test_training_in_another_norm_than_the_evaluation_is_said_before_and_after(tmp_path, caplog):
    recipe = clean_recipe()
    recipe.update(objective=dict(name="pgd_at"), epochs=1)
    recipe.attack = dict(name="pgd", norm="l2", eps="6/16", steps=1)
    recipe.evaluate.attacks = ("fgsm",)
    record = main.execute(recipe, tmp_path / "run")[0]
    text = "trained in l2 at eps 6/16, evaluated in l_inf at eps 2/16"
    assert any(text in message for message in caplog.messages)
    assert record["train_threat"] == {"norm": "l2", "eps": "6/16"}
    assert record["validate_threat"] == {"norm": "linf", "eps": "2/16"} == {key: record[key] for key in ("norm", "eps")}
    assert text in tables.as_text([record])
    (check,) = (check for check in self_checks.checks([record]) if "one threat model" in check.name)
    assert check.status == "warn" and text in check.details[0]
    assert text in (tmp_path / "run/report.html").read_text()


def test_one_threat_model_is_no_difference_and_neither_is_training_on_clean_images(records):
    assert [found[1]["train_threat"] for found in records] == [{"norm": "linf", "eps": "2/16"}, None]
    assert all(results.departures(found[1]) == [] for found in records)
    assert results.departures({"norm": "linf", "eps": "0.5/4", "train_threat": {"norm": "linf", "eps": "1/8"}}) == []


def test_an_objective_that_makes_its_own_images_says_their_radius():
    recipe = clean_recipe()
    recipe.objective = dict(name="mma")
    assert threat.trained(recipe) == {"norm": "linf", "eps": "12/255"}
    recipe.objective.max_eps = "0.3"
    assert threat.trained(recipe) == {"norm": "linf", "eps": "0.3"}


def test_a_record_says_by_which_accuracy_its_checkpoint_was_selected(digits, records):
    """Checkpoints from before there was a choice were selected by robust accuracy."""
    assert [found[0]["select"] for found in records] == ["robust", "clean"]
    assert evaluate.evaluate(digits, "last", attacks=("fgsm",))[0]["select"] is None


# ---- another threat model in one evaluation ----------------------------------------------------------------------


def test_an_evaluation_under_another_threat_model_stands_beside_the_runs_own(digits):
    own = (digits / "eval/best/pgd-2.json").read_bytes()
    wider = evaluate.evaluate(digits, attacks=("pgd-2",), eps="4/16")
    assert len(wider) == 1 and (wider[0]["eps"], wider[0]["step_size"], wider[0]["main"]) == ("4/16", "1/16", True)
    other = evaluate.evaluate(digits, attacks=("pgd-2",), norm="l2", eps="0.5", step_size="0.1")[0]
    assert (other["norm"], other["eps"], other["step_size"]) == ("l2", "0.5", 0.1)
    assert (digits / "eval/best/pgd-2.json").read_bytes() == own
    assert {file.name for file in (digits / "eval/best").glob("*eps*.json")} == {
        "pgd-2.eps4_16.json",
        "pgd-2(step_size=0.1).l2.eps0.5.json",
    }
    titles = [line for line in tables.as_text([json.loads(own), *wider, other]).splitlines() if "accuracy in" in line]
    assert [title.split(": ")[0].split(", ", 1)[1] for title in titles] == [
        "linf, eps 2/16", "linf, eps 4/16", "l2, eps 0.5"
    ]  # fmt: skip


def test_the_same_length_in_other_words_is_the_runs_own(digits):
    before = (digits / "eval/best/pgd-2.json").stat().st_mtime_ns
    evaluate.evaluate(digits, attacks=("pgd-2",), eps="1/8", step_size="1/32")
    assert (digits / "eval/best/pgd-2.json").stat().st_mtime_ns == before


def test_another_norm_needs_its_own_eps(digits):
    with pytest.raises(InputError, match="give --eps"):
        evaluate.evaluate(digits, norm="l2")
    section = {**run.load(digits).config.evaluate.to_dict(), "norm": "l2"}
    settings.replaced(section, norm="linf", eps="0.1", attacks=("nifgsm-2",))  # for l_inf only, which its own is not
    for changes, words in (
        (dict(step_size="0"), "step_size"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(eps="wide"), "'wide' is not a number"),
        (dict(eps="8"), "eps=8"),
        (dict(norm="l3", eps="1"), "'l3' is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate.evaluate(digits, **changes)


@pytest.mark.parametrize(
    "flag, words",
    [("--config.model.padding=0", r"model\.padding=1"), ("--config.data.val_size=9", r"data\.val_size=8")],
)
def test_evaluation_alone_refuses_another_model_or_other_data_than_the_runs(digits, flag, words):
    with pytest.raises(InputError, match=words):
        main.execute(recipe_files.override(smoke_config("digits"), [flag]), digits, "eval")
