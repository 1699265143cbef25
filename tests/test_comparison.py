"""The comparison of all objectives: each is found and can be trained with its settings; what the page says."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import comparison

from ibjax import config
from ibjax.training import loop


def test_every_objective_is_found():
    folder = Path(__file__).parent.parent / "ibjax" / "objectives"
    no_method, around_another = {"__init__", "ibd_matching", "own", "passes"}, {"ara"}
    expected = {file.stem for file in folder.glob("*.py")} - no_method - around_another
    assert set(comparison.names()) == expected


@pytest.mark.parametrize("name", comparison.names())
def test_every_objective_can_be_trained_with_its_settings(name, tmp_path):
    settings = comparison.settings(name, 20, 1, tmp_path)
    for part in (settings, *(recipe for _, recipe in config.recipes(settings))):
        if part.model.name == "cnn":
            part.model.update(widths=((4,), (4,)))
    loop.check(settings)
    assert (settings.epochs, settings.seed, settings.title) == (20, 1, name)


def results(**methods):
    runs = {
        name: {str(seed): dict(clean=90.0, **{"pgd-20": acc}, parameters=1000, n=360) for seed, acc in enumerate(accs)}
        for name, accs in methods.items()
    }
    facts = dict(
        command="c", commit="abc", hardware="h", versions={"jax": "1"}, epochs=20, eps="2/16", attacks=["pgd-20"]
    )
    return {
        **facts,
        "methods": runs,
        "seconds_per_step": {"weak": [0.001, 0.003, 0.002]},
        "failed": {"other": "seed 0: refused"},
    }


def test_the_page_ranks_by_the_worst_attack_and_says_what_that_means():
    text = comparison.page(results(weak=[10.0, 20.0, 30.0], strong=[50.0, 50.0, 56.0]))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| strong", "| weak"]
    assert "20.0 ± 10.0" in rows[3] and "| 3 |" in rows[3] and "1,000" in rows[3]
    assert "| 2.0 |" in rows[3] and "| not yet |" in rows[2]
    # the median of 10 and 3.46 is 6.73; 2·6.73·√(2/3) = 10.99
    assert "up to 11.0 points" in text and "±5.2 points" in text and "- other: seed 0: refused" in text


def test_each_is_ranked_by_what_hurts_it_most():
    content = results(a=[50.0], b=[40.0])
    content["attacks"].append("margin-20")
    content["methods"]["a"]["0"]["margin-20"], content["methods"]["b"]["0"]["margin-20"] = 30.0, 45.0
    rows = [line for line in comparison.page(content).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| b", "| a"]


def test_one_seed_ranks_nothing():
    assert "this is no ranking" in comparison.page(results(one=[10.0], two=[20.0]))
