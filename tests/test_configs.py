"""Every row of every recipe of `configs/`: it runs in its short form, and means what its page says in its long one."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import config_rows, smoke_config

from ibjax import config, main
from ibjax.attacks.names import split
from ibjax.evaluation.named import named
from ibjax.evaluation.settings import check_settings
from ibjax.runs import metrics, recipe_files
from ibjax.training import loop

ROOT = Path(__file__).parent.parent
RECIPES = {file.stem: config_rows(file.stem) for file in sorted((ROOT / "configs").glob("*.py"))}
ALL = [(name, row) for name, rows in RECIPES.items() for row in rows]
# networks of their own; the digits are the `digits_run`, and `.ci/run` runs ibd_resnet18
RUN = [("siriib", "pgd_at"), ("shared_information", "resnet18")]
load = functools.cache(smoke_config)  # for tests that change nothing of it
OTHER = [(name, row) for name, row in ALL if (name, row) not in RUN and name != "digits"]


def kind_of(name, row):
    """What a row trains, on what network."""
    settings = load(name, f"{row},smoke")
    parts = [settings[section] and settings[section].name for section in ("objective", "model", "attack", "perturb")]
    return (*parts, str(settings.objective.get("base")))


def program_of(name, row):
    """A row but for its numbers, as those of a sweep, and its titles: rows that are equal make one program."""
    settings = smoke_config(name, f"{row},smoke")
    settings.title = settings.teacher.made_by = settings.assistant.made_by = ""
    return re.sub(r"\d+(\.\d+)?", lambda number: str(float(number[0]) != 0), repr(config.plain(settings)))


@functools.cache
def one_of_each(name, key):
    """Of the rows of a recipe for which `key` is the same, the first."""
    rows = [row for other, row in OTHER if other == name]
    return list({key(name, row): row for row in reversed(rows)}.values())[::-1]


def run(name, recipe_row, folder):
    records = main.execute(smoke_config(name, f"{recipe_row},smoke"), folder)
    assert {record["attack"] for record in records} >= {"pgd-2"}
    rows = [row for row in metrics.read(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert all(row["loss"] > 0 or "nhsic_y" in row for row in rows)  # IB-RAR subtracts the information on the labels
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("name, row", RUN)
def test_recipes_run_in_their_short_form(name, row, tmp_path):
    run(name, row, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name, row", OTHER)
def test_every_other_row_runs_too(name, row, tmp_path):
    """Rows that differ from an earlier one in numbers alone, as those of a sweep, are the same program: skipped."""
    if row not in one_of_each(name, program_of):
        pytest.skip("an earlier row is the same program")
    run(name, row, tmp_path / "run")


@pytest.mark.parametrize("key", [kind_of, pytest.param(program_of, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_every_row_can_be_traced(name, key):
    """The whole step and the validation, with teachers that have yet to be made; nothing is compiled."""
    for row in one_of_each(name, key):
        loop.check(smoke_config(name, f"{row},smoke"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_complete_and_every_option_is_known(name):
    for row in RECIPES[name]:
        config.check(load(name, row))
        config.check(config.complete(smoke_config(name, row)))


@pytest.mark.parametrize("name", RECIPES)
def test_the_short_form_keeps_the_method(name):
    for row in RECIPES[name]:
        long, short = load(name, row), load(name, f"{row},smoke")
        assert long.objective == short.objective and long.attack_bn == short.attack_bn, row
        assert long.perturb == short.perturb, row
        assert long.optimizer == short.optimizer and long.schedule == short.schedule, row
        assert (long.attack is None) == (short.attack is None), row
        if long.attack is not None:
            assert all(long.attack[key] == short.attack[key] for key in set(long.attack) - {"steps"}), row


@pytest.mark.parametrize("name", [name for name, rows in RECIPES.items() if len(rows) > 1])
def test_no_two_rows_of_a_recipe_are_the_same(name):
    texts = [repr({**config.plain(load(name, row)), "title": ""}) for row in RECIPES[name]]
    assert len(set(texts)) == len(texts)


def test_the_commands_of_the_page_name_what_there_is():
    text = (ROOT / "configs" / "README.md").read_text()
    lists = re.findall(r"--attacks=([^\s`\"]+)", text)
    flags = re.findall(r"--config\.evaluate\.[^\s`\"]+", text)
    rows = re.findall(r"`(?:configs/)?(\w+)\.py:([\w.-]+)`", text)
    assert lists and flags and rows
    for names in lists:
        assert all(named(name) for name in split(names))
    for flag in flags:
        check_settings(config.effective(recipe_files.override(smoke_config("ibd_resnet18", "paper"), [flag])).evaluate)
    for name, row in rows:
        assert row in RECIPES[name] or row.isupper() or row == "METHOD-original", row


def test_what_is_compared_with_itself_in_ib_rars_text_is_the_same_but_for_the_terms():
    """Rows `-base` and `-paper-base`; the original TRADES and MART are those of their own objectives."""
    for row in (row for row in RECIPES["ib_rar"] if row.endswith("-paper")):
        with_terms, without = (config.plain(smoke_config("ib_rar", name)) for name in (row, f"{row}-base"))
        assert without["objective"] == {**with_terms["objective"], "alpha": 0.0, "beta": 0.0}
        assert {**without, "objective": 0, "title": 0} == {**with_terms, "objective": 0, "title": 0}
        method = row.split("-")[1]
        assert with_terms["attack"]["init"] == {"pgd": "uniform"}.get(method, "gaussian")
    assert smoke_config("ib_rar", "wrn-mart-paper").objective.robust_weight == 6.0


def test_a_sweep_names_every_row_that_matches(tmp_path):
    def sweep(*arguments, python=Path(sys.executable).parent):
        command = ["bash", "launch/sweep.sh", "configs/ibd_ablations.py", "runs/x", *arguments]
        path = f"{python}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PATH": path, "DRY": "1"}, capture_output=True, text=True, check=False
        )

    rows = RECIPES["ibd_ablations"]
    assert [line.split("ibd_ablations.py:")[1].split()[0] for line in sweep().stdout.splitlines()] == list(rows)
    stub = tmp_path / "python"  # it says the same rows at once
    stub.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{row}'" for row in rows))
    stub.chmod(0o755)
    chosen = sweep("alpha-*", "--config.seed=1", python=tmp_path).stdout.splitlines()
    assert len(chosen) == sum(row.startswith("alpha-") for row in rows) > 1
    assert all(
        line.split()[-2:] == [f"--workdir=runs/x/{row}", "--config.seed=1"]
        for line, row in zip(chosen, [row for row in rows if row.startswith("alpha-")], strict=True)
    )
    none = sweep("nothing", python=tmp_path)
    assert none.returncode == 2 and "alpha-0.8" in none.stderr


@pytest.mark.parametrize("overrides", [[], ["--config.epochs=2"]])
def test_a_configuration_takes_no_new_keys_once_its_overrides_are_applied(overrides):
    settings = recipe_files.override(config.base(), overrides)
    assert settings.epochs == (2 if overrides else config.base().epochs)
    for section in (settings, settings.data):
        with pytest.raises(AttributeError):
            section.epoch = 3
