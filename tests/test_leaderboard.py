"""docs/leaderboard.md: current, and computed as it says."""

import importlib.util
from pathlib import Path

import pytest

from ibjax.pytorch.published import table

DOCS = Path(__file__).parent.parent / "docs"
SPEC = importlib.util.spec_from_file_location("docs_leaderboard", DOCS / "leaderboard.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)


@pytest.mark.slow
def test_the_page_is_current():
    """Else: python docs/leaderboard.py."""
    assert (DOCS / "leaderboard.md").read_text(encoding="utf-8") == page.page()


def test_costs_are_passes_times_images_times_the_network():
    """TRADES-10 on WRN-28-10 by hand: 27 passes of 10.5 GFLOP, 95 whole batches of 512 in each of 400 epochs."""
    passes, eflop = page.cost("wang2023-28_10-1m", page.module().get_config("wang2023-28_10-1m"))
    assert passes == 27 and eflop == pytest.approx(400 * 95 * 512 * 27 * 2 * 5.25e9 / 1e18, rel=2e-3)


def test_the_numbers_are_those_of_the_published_networks():
    rows = {
        "gowal2020-70_16": "cifar10/linf/Gowal2020Uncovering_70_16",
        "gowal2020-28_10": "cifar10/linf/Gowal2020Uncovering_28_10_extra",
        "rebuffi2021-28_10": "cifar10/linf/Rebuffi2021Fixing_28_10_cutmix_ddpm",
        "rebuffi2021-70_16": "cifar10/linf/Rebuffi2021Fixing_70_16_cutmix_ddpm",
        "gowal2021-28_10": "cifar10/linf/Gowal2021Improving_28_10_ddpm_100m",
        "gowal2021-70_16": "cifar10/linf/Gowal2021Improving_70_16_ddpm_100m",
        "score-28_10": "cifar10/linf/Pang2022Robustness_WRN28_10",
        "score-70_16": "cifar10/linf/Pang2022Robustness_WRN70_16",
        "wang2023-28_10-20m": "cifar10/linf/Wang2023Better_WRN-28-10",
        "wang2023-70_16": "cifar10/linf/Wang2023Better_WRN-70-16",
        "dkl-34_10": "cifar10/linf/Cui2023Decoupled_WRN-34-10",
        "dkl-28_10-20m": "cifar10/linf/Cui2023Decoupled_WRN-28-10",
        "bartoldson2024-94_16": "cifar10/linf/Bartoldson2024Adversarial_WRN-94-16",
    }
    module = page.module()
    numbers = page.published(module.__doc__)
    assert set(numbers) >= set(module.ROWS)
    for row, path in rows.items():
        network, section = table()[path], module.get_config(row).model
        assert numbers[row] == (f"{network.clean:.2f}", f"{network.autoattack:.2f}"), row
        assert (section.depth, section.width) == (network.depth, network.width), row
