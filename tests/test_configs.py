"""Every recipe of `configs/`: it runs in its short form, and means what its page says in its long one."""

from pathlib import Path

import jax
import pytest
from conftest import load_recipe, smoke_config

from ibjax import config, main, metrics, train

CONFIGS = sorted(file.stem for file in (Path(__file__).parent.parent / "configs").glob("*.py"))
ROWS = [(name, row) for name in CONFIGS for row in getattr(load_recipe(name), "ROWS", ("",))]


# the row of a recipe that is run; the first where none is named, all others are traced
RUN = {
    "baselines_ibd": "infoat_r",
    "baselines_shared": "mnist-mart",
    "baselines_siriib": "awp",
    "baselines_original": "te_trades",
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "digits"])  # that one is the `digits_run`
def test_every_recipe_runs_in_its_short_form(name, tmp_path):
    records = main.execute(smoke_config(name, f"{RUN.get(name, '')},smoke"), tmp_path / "run")
    assert {record["attack"] for record in records} == {"fgsm", "pgd-2", "cw-2"}
    assert all(row["loss"] > 0 for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_is_complete_and_every_option_is_known(name, row):
    settings = smoke_config(name, row)
    config.check(settings)
    config.check(config.complete(settings))


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, row in ROWS if row])
def test_every_rows_step_can_be_traced(name, row):
    settings = smoke_config(name, f"{row},smoke")
    promotion = "standard" if settings.optimizer.name == "adam" else "strict"  # Optax's Adam mixes int and float
    with jax.numpy_dtype_promotion(promotion):
        train.check(settings)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_the_short_form_keeps_the_method(name, row):
    long, short = smoke_config(name, row), smoke_config(name, f"{row},smoke")
    assert long.objective == short.objective and long.attack_bn == short.attack_bn and long.perturb == short.perturb
    assert long.optimizer == short.optimizer and long.schedule == short.schedule
    if long.attack is None:
        assert short.attack is None
    else:
        kept = set(long.attack) - {"steps"}
        assert all(long.attack[key] == short.attack[key] for key in kept)
