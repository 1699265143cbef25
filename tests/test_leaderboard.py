"""docs/leaderboard.md: current, and computed as it says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ibjax import evaluate
from ibjax.errors import InputError
from ibjax.evaluation import leaderboard
from ibjax.pytorch.published import table

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
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
    singh = "imagenet/linf/Singh2023Revisiting_"
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
        **{f"singh2023-convnext_{s.lower()}": f"{singh}ConvNeXt-{s}-ConvStem" for s in "TSBL"},
        **{f"liu2023-swin_{s.lower()}": f"imagenet/linf/Liu2023Comprehensive_Swin-{s}" for s in "BL"},
        **{f"singh2023-vit_{s.lower()}": f"{singh}ViT-{s}-ConvStem" for s in "SB"},
    }
    module = page.module()
    numbers = page.published(module.__doc__)
    assert set(numbers) >= set(module.ROWS)
    for row, path in rows.items():
        network, section = table()[path], module.get_config(row).model
        assert numbers[row] == (f"{network.clean:.2f}", f"{network.autoattack:.2f}"), row
        assert (section.depth, section.width) == (network.depth, network.width), row


# ---- where a run would stand -----------------------------------------------------------------------------------------


def test_the_place_of_a_run_is_between_its_neighbours():
    """Entries are ranked by the lowest robust accuracy that is known: Kang2021Stable by 64.20, not by 71.28."""
    words = leaderboard.place("cifar10", "linf", "8/255", 64.1)
    assert words.startswith("64.10 % would stand at rank 18 of 100 on cifar10, l_inf 8/255: behind ")
    assert words.endswith("(64.20 %), ahead of Xu2023Exploring_WRN-28-10 (63.89 %)")
    first, last = (leaderboard.place("imagenet2012", "linf", "4/255", robust) for robust in (99.0, 0.0))
    assert "rank 1 of 31 on imagenet2012, l_inf 4/255: ahead of Xu2024" in first and "behind" not in first
    assert "rank 30 of 31" in last and "ahead of Standard_R50 (0.00 %)" in last
    assert len(leaderboard.rows("cifar10", "l2", "128/255")) == 21
    assert len(leaderboard.rows("cifar10", "linf", "0.031")) == 99
    for eps in ("4/255", "7/255", "9/255", "0.03"):
        with pytest.raises(InputError, match=f"no leaderboard of cifar10 in linf at {eps}; there are: cifar10 in l2"):
            leaderboard.rows("cifar10", "linf", eps)


def test_the_entry_is_written_and_the_command_says_what_it_needs(tmp_path, monkeypatch, capsys):
    info = dict(architecture="WideResNet-28-10", dataset="cifar10", clean_acc="92.44", autoattack_acc="67.31")
    monkeypatch.setattr(leaderboard.exports, "model_info", lambda *_: info)
    evaluated = dict(norm="linf", eps="8/255", n=None)
    settings = ConfigDict(dict(data=dict(name="tfds", dataset="cifar10"), evaluate=evaluated))
    loaded = type("Loaded", (), dict(config=settings, facts=dict(n_test=10_000)))
    for module in (leaderboard.run, evaluate.run):
        monkeypatch.setattr(module, "load", lambda *_: loaded)
    monkeypatch.setattr(evaluate.cluster, "initialize", lambda: None)
    monkeypatch.setattr(evaluate.config, "effective", lambda settings: settings)
    called = {}
    record = dict(attack="autoattack", norm="linf", eps="8/255", main=True)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, **options: called.update(options) or [record])
    monkeypatch.setattr(evaluate.report, "table", lambda _: "table")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate", f"--workdir={tmp_path}", "--leaderboard", *words])
        with pytest.raises(SystemExit) as ended:
            evaluate.main()
        return ended.value.code, "".join(capsys.readouterr())

    code, said = run("--checkpoint=last")
    assert code == 0 and called["attacks"] == ["autoattack"] and called["n"] is None
    assert json.loads((tmp_path / "leaderboard" / "last.linf.8_255.json").read_text()) == info
    assert (
        "rank 10 of 100" in said and "last.linf.8_255.json: WideResNet-28-10, clean 92.44 %, AutoAttack 67.31 %" in said
    )
    for words, match in (
        ("--n=100", "takes all test images of cifar10, not 100; give --n=10000"),
        ("--attacks=pgd-20", "needs autoattack, without --surrogate and --samples"),
        ("--eps=4/255", "no leaderboard of cifar10 in linf at 4/255"),
    ):
        code, said = run(words)
        assert code != 0 and match in said
    settings.evaluate.n = 1000
    code, said = run()
    assert code != 0 and "takes all test images of cifar10, not 1000; give --n=10000" in said
    assert run("--n=10000")[0] == 0
    info["autoattack_acc"] = None
    code, said = run("--n=10000")
    assert code != 0 and "no record of AutoAttack on the whole test set" in said
