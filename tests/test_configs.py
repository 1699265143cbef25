"""Every recipe of `configs/`: it runs in its short form, and means what its page says in its long one."""

from pathlib import Path

import pytest
from conftest import smoke_config

from ibjax import config, main, metrics

CONFIGS = sorted(file.stem for file in (Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "digits"])  # that one is the `digits_run`
def test_every_recipe_runs_in_its_short_form(name, tmp_path):
    records = main.execute(smoke_config(name), tmp_path / "run")
    assert {record["attack"] for record in records} == {"fgsm", "pgd-2", "cw-2"}
    assert all(row["loss"] > 0 for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_is_complete_and_every_option_is_known(name):
    settings = smoke_config(name, None)
    config.check(settings)
    config.check(config.complete(settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_short_form_keeps_the_method(name):
    long, short = smoke_config(name, None), smoke_config(name)
    assert long.objective == short.objective and long.attack.loss == short.attack.loss
    assert long.attack.eps == short.attack.eps and long.attack_bn == short.attack_bn
