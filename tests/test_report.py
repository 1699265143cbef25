"""Reports on small hand-made runs: tables, checks, damaged files, the page."""

import base64
import errno
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from ibjax import config, files, main
from ibjax import report as report_command
from ibjax.data import first_of_each
from ibjax.errors import InputError
from ibjax.evaluation import report, results
from ibjax.evaluation.report import commands, figures, page, runs, self_checks, tables
from ibjax.runs import recipe_files

SVG = figures.Plot.svg


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Plots of pages stay empty: drawing them takes nine tenths of a page's time."""
    monkeypatch.setattr(figures.Plot, "svg", Markup("<svg></svg>"))


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """They do not: for tests of what is in them."""
    monkeypatch.setattr(figures.Plot, "svg", SVG)


N = 8
FLAGS = {  # the images that are robust at the main eps; images 2 and 3 withstand all three attacks
    "fgsm": [1, 1, 1, 1, 1, 0, 0, 0],
    "pgd-2": [0, 1, 1, 1, 0, 0, 0, 0],
    "margin-2": [1, 0, 1, 1, 0, 0, 0, 0],
}


def record(attack="pgd-2", eps="8/255", flags=None, **changes):
    """A record as evaluate.py writes it; accuracy follows from the flags."""
    flags = np.array(FLAGS[attack] if flags is None else flags, bool)
    numerator, _, denominator = eps.partition("/")
    return {
        "title": "student",
        "attack": attack,
        "eps": eps,
        "main": eps == "8/255",
        "clean_acc": 87.5,
        "robust_acc": 100 * float(flags.mean()),
        "dataset": "dice",
        "norm": "linf",
        "n": N,
        "chance_acc": 25.0,
        "seed": 3,
        "step": 4,
        "step_size": "2/255",
        "checkpoint": "best",
        "selected_on": "val",
        "config": {"evaluate": {"eps": "8/255"}},
        "versions": {"jax": "0.0"},
        "commit": "abc1234",
        "hardware": "1 × abacus",
        "warnings": [],
        "max_distance": float(numerator) / float(denominator or 1),
        "seconds": 1.0,
        "robust_flags": base64.b64encode(np.packbits(flags).tobytes()).decode(),
        **changes,
    }


def healthy(**changes):
    """Three attacks at two eps, without a fault."""
    larger = [record(attack, "16/255", [0, 0, 1, 0, 0, 0, 0, 0], **changes) for attack in FLAGS]
    return [*(record(attack, **changes) for attack in FLAGS), *larger]


EVALUATE = {"eps": "8/255", "norm": "linf"}


def write_run(folder, records=(), title="student", rows=None, data=None, **config):
    """A workdir: two epochs of two steps, finished unless `rows` says otherwise; `config`, `data`: other values."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"title": title, "epochs": 2, "batch_size": 4, "select_on": "val", "evaluate": EVALUATE, **config}
    data = {"label": "dice", "n_train": 8, "n_test": N, "input_shape": [4, 4, 1], **(data or {})}
    (folder / "config.json").write_text(json.dumps({"config": config, "data": data}))
    (folder / "env.json").write_text(json.dumps({"hardware": "1 × abacus", "versions": {}, "commit": None}))
    if rows is None:
        rows = [{"kind": "train", "step": s, "epoch": s / 2, "loss": 2 / s, "clean_acc": 0.5} for s in (2, 4)]
        rows.append({"kind": "val", "step": 4, "epoch": 2.0, "clean_acc": 60.0, "robust_acc": 30.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for each in records:
        name = each["attack"] if each["main"] else f"{each['attack']}@{each['eps'].replace('/', '_')}"
        file = folder / "eval" / each["checkpoint"] / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(each))
    return folder


def write_examples(folder, eps=8 / 255, label=(3, 7), predicted_adv=(3, 9)):
    """Two images of which the second is misclassified under the attack."""
    x = np.random.default_rng(0).integers(1, 9, (2, 4, 4, 1)).astype(np.float32) / 10
    arrays = dict(label=np.array(label), predicted=np.array(label), predicted_adv=np.array(predicted_adv))
    file = folder / "eval" / "best" / "pgd-2.examples.npz"
    np.savez_compressed(file, x=x, x_adv=x + np.float32(eps), **arrays)
    return file


def page_of(folder, *more):
    report.write([folder, *more], folder / "report.html")
    return (folder / "report.html").read_text()


def status(records, name, problems=()):
    """(status, details) of the one check whose name contains `name`."""
    (check,) = (check for check in self_checks.checks(records, problems) if name in check.name)
    return check.status, " | ".join(check.details)


def run_main(monkeypatch, *argv):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_info:
        report_command.main()
    return exit_info.value.code


# ---- tables ------------------------------------------------------------------------------------------------


def test_table_has_a_line_for_each_run_and_a_column_for_each_attack():
    title, head, *lines = report.table([*healthy(), *healthy(title="undefended", selected_on="test")]).splitlines()
    assert title == "dice, linf, eps 8/255: accuracy in percent"
    columns = ["run", "checkpoint / selected on", "n", "clean", "FGSM", "PGD-2", "margin PGD-2", "worst case"]
    assert re.split(r"\s{2,}", head) == columns
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["student", "best / val", "8", "87.50", "62.50", "37.50", "37.50", "25.00"],
        ["undefended", "best / test", "8", "87.50", "62.50", "37.50", "37.50", "25.00"],
    ]


def lines(records, each=False):
    """The cells of each line of the first table."""
    return [line[0:2] + line[3:] for line in tables.cells(tables.tables(records, each)[0])[1:]]


def test_the_worst_case_counts_the_images_that_withstand_every_attack():
    # neither the smallest accuracy (37.5) nor a product of them
    assert tables.worst_case([record("pgd-2"), record("margin-2")]) == 25.0
    assert tables.worst_case([record("pgd-2")]) is None


def test_the_ladder_is_not_in_the_table():
    assert "16/255" not in report.table(healthy())
    assert report.table([]).startswith("no records")


def test_records_without_the_main_key_are_judged_by_the_configuration():
    ladder = record(eps="16/255")
    del ladder["main"]
    assert not results.is_main(ladder)
    assert results.is_main({**ladder, "eps": "8/255"})


def test_other_data_norms_and_eps_get_tables_of_their_own():
    found = tables.tables([record(), record(norm="l2"), record(dataset="coins"), record(eps="4/255", main=True)])
    assert len({(table.dataset, table.norm, table.eps) for table in found}) == 4
    assert all(len(table.lines) == 1 for table in found)


def test_no_line_loses_its_worst_case_because_another_one_has_more_attacks():
    other = healthy(title="other")
    alone = report.table([*healthy(), *other])
    more = [
        *healthy(),
        record("autoattack", flags=[0, 0, 1, 0, 0, 0, 0, 0]),
        record("cw-l2-9", flags=[0] * N, bounded=False),
        *other,
    ]
    assert [line[-1] for line in lines(more)] == ["12.50", "≤ 25.00"]  # the bound: at most, with AutoAttack too
    assert "≤: not every attack of the table was made on this run" in report.table(more)
    assert "≤" not in alone and [line[-1] for line in lines([*healthy(), *other])] == ["25.00", "25.00"]
    # a run under one attack only is bounded by it, and one under none has nothing to show
    assert [line[-1] for line in lines([*healthy(), record(title="other")])] == ["25.00", "≤ 37.50"]
    unbounded = record("cw-l2-9", title="other", flags=[0] * N, bounded=False)
    clean, *attacked, worst = lines([*healthy(), unbounded])[1][2:]
    assert (clean, sorted(attacked), worst) == ("87.50", ["0.00", "–", "–", "–"], "–")
    # an attack of any size adds a column and no bound
    assert [line[-1] for line in lines([*healthy(), unbounded, *other])] == ["25.00", "25.00"]


def test_one_network_is_one_line_whatever_its_checkpoint_is_called():
    best = healthy(weights="aa")
    last = [
        record("pgd-2", weights="aa", checkpoint="last", selected_on="last"),
        record("autoattack", weights="aa", checkpoint="last", selected_on="last", flags=[0] * N),
    ]
    both = [*last, *best]
    assert lines(both) == [["student", "best, last / val", "87.50", "62.50", "37.50", "37.50", "0.00", "0.00"]]
    assert [len(row.records) for row in tables.rows(both)] == [7]  # PGD, which both have, once
    old = [{key: value for key, value in each.items() if key != "weights"} for each in both]
    assert lines(old) == lines(both)  # records that do not say what their weights are have their step
    other = [{**each, "step": 9, "weights": "bb"} for each in last]
    assert [line[:2] for line in lines([*best, *other])] == [
        ["student, best", "best / val"],
        ["student, last", "last / last"],
    ]
    assert lines([*best, record(weights="aa", checkpoint="4", selected_on="step")])[0][1] == "best, step 4 / val"


def seeds(number, **changes):
    """Runs of one recipe whose seed is their number, in whose attacks one image more or less is robust."""
    found = []
    for seed in range(number):
        flags = [int(i < 2 + seed) for i in range(N)]
        each = [record(attack, flags=flags, seed=seed, clean_acc=80.0 + seed, **changes) for attack in FLAGS]
        found += [{**each_one, "config": {**each_one["config"], "seed": seed, "lr": 0.1}} for each_one in each]
    return found


def test_runs_that_differ_in_their_seed_alone_are_one_line():
    robust = np.array([25.0, 37.5, 50.0])
    text = f"{robust.mean():.2f} ± {robust.std(ddof=1):.2f}"
    assert lines(seeds(3)) == [["student, 3 seeds", "best / val", "81.00 ± 1.00", text, text, text, text]]
    assert "±: mean and sample standard deviation over training seeds" in report.table(seeds(3))
    assert [line[:3] for line in lines(seeds(3), each=True)] == [
        [f"student, seed {seed}", "best / val", f"{80 + seed:.2f}"] for seed in range(3)
    ]
    assert "±" not in report.table(seeds(3), each=True)
    # an attack that one of them has says so; the worst case is over what all have
    some = [*seeds(3), {**seeds(1)[0], "attack": "autoattack", "robust_acc": 12.5}]
    assert lines(some)[0][-2:] == ["12.50 (1/3)", f"≤ {text}"]
    # runs with folders for names have what these begin with
    named = [{**each, "title": f"ibd-{each['seed']}", "config": {**each["config"], "title": ""}} for each in seeds(3)]
    assert lines(named)[0][0] == "ibd, 3 seeds"


def test_what_differs_in_more_than_the_seed_is_no_sample():
    other = [{**each, "config": {**each["config"], "lr": 0.2}} for each in seeds(2) if each["seed"] == 1]
    assert len(lines([*seeds(1), *other])) == 2
    again = [{**each, "weights": "bb", "folder": "again"} for each in seeds(1)]  # the same seed on another machine
    first = [{**each, "weights": "aa", "folder": "once"} for each in seeds(1)]
    assert [line[0] for line in lines([*first, *again])] == ["student, once", "student, again"]
    copies = [{**each, "weights": "aa", "folder": "copy"} for each in first]  # as each student's own teacher
    assert len(lines([*first, *copies])) == 1
    assert len(lines([*seeds(2), *seeds(2, n=4, robust_flags="AA==", robust_acc=0.0)])) == 2  # other images
    # best is not best of all seeds where it is last for one of them
    best, last = seeds(2), [{**each, "checkpoint": "last", "selected_on": "last"} for each in seeds(2)]
    best = [{**each, "weights": f"{each['seed']}"} for each in best]
    last = [{**each, "weights": "0" if each["seed"] == 0 else "last"} for each in last]
    assert [line[:2] for line in lines([*best, *last])] == [
        ["student, best, 2 seeds", "best / val"],
        ["student, last, 2 seeds", "last / last"],
    ]


def transferred(source, title, weights, step=7):
    made = dict(loss="ce", surrogate=dict(title=source, step=step, weights=weights))
    return record(attack=f"pgd-2 from {source}", flags=[1] * 4 + [0] * 4, title=title, attack_settings=made)


def test_surrogates_of_one_title_are_told_apart(tmp_path):
    """Teacher and student of one title, from the command line of an evaluation and from a page with both."""
    own = record(title="WRN", weights="aa")
    alone = [{**transferred("WRN", "WRN", "bb"), "weights": "aa"}, own]
    head = tables.cells(tables.tables(alone)[0])[0]
    assert head[4:] == ["PGD-2", "PGD-2, transfer from WRN (step 7, weights bb)", "worst case"]
    two = [transferred("WRN", "net", "bb"), transferred("WRN", "net", "cc", 8)]
    assert len(tables.tables(two)[0].attacks) == 2  # not one column that shows whichever came last
    assert tables.tables(two[:1])[0].attacks == ["pgd-2 from WRN"]

    student = write_run(tmp_path / "run", [record(title="WRN", weights="aa"), record("fgsm", weights="aa")], "WRN")
    (student / "eval/best/pgd-2~bb.json").write_text(json.dumps({**transferred("WRN", "WRN", "bb"), "weights": "aa"}))
    write_run(student / "teacher", [record(weights="bb")], "WRN")
    text = Page(page_of(student)).text
    assert f"transfer from WRN ({student / 'teacher'})" in " ".join(text.split())


def test_runs_of_one_title_are_told_apart():
    labels = [row.label for row in tables.rows([record(seed=0), record(seed=1), record("margin-2", seed=1)])]
    assert labels == ["student, seed 0", "student, seed 1"]
    other = {"model": {"name": "cnn"}, "evaluate": {}}
    assert len({row.label for row in tables.rows([record(), record(config=other)])}) == 2


def test_attacks_are_sorted_by_strength_and_curves_by_eps():
    shuffled = [record(attack, flags=[1] * N) for attack in ("margin-2", "pgd-100", "fgsm", "pgd-20", "autoattack")]
    (table,) = tables.tables(shuffled)
    assert table.attacks == ["fgsm", "pgd-20", "pgd-100", "margin-2", "autoattack"]
    (row,) = tables.rows([record(eps=eps) for eps in ("16/255", "2/255", "8/255")])
    assert [text for _, text, _ in tables.ladders(row)["pgd-2"]] == ["0", "2/255", "8/255", "16/255"]
    assert tables.ladders(row)["pgd-2"][0] == (0.0, "0", 87.5)


# ---- checks ------------------------------------------------------------------------------------------------


def test_a_healthy_run_passes_every_check():
    assert {check.status for check in self_checks.checks(healthy())} == {"pass"}
    targeted = record("pgd-t-2", flags=[1] * 7 + [0])  # towards one class it may be weaker than FGSM
    assert status([*healthy(), targeted], "as strong as FGSM")[0] == "pass"


def test_an_eps_written_in_two_ways_is_one_threat_model():
    (table,) = tables.tables([record(), record("margin-2", str(8 / 255), main=True)])
    assert table.eps == "8/255" and table.attacks == ["pgd-2", "margin-2"] and table.lines[0].worst.mean == 25.0


@pytest.mark.parametrize(
    "name, fault, numbers",
    [
        ("as strong as FGSM", record("pgd-2", flags=[1] * 6 + [0, 0]), "PGD-2 leaves 75.00, FGSM 62.50"),
        (
            "as every other",
            record("autoattack", str(8 / 255), [1] * 5 + [0] * 3, main=True),
            "leaves 62.50, PGD-2 37.50",
        ),
        ("as every other", record("autoattack", flags=[1] * 5 + [0] * 3), "AutoAttack leaves 62.50, PGD-2 37.50"),
        ("does not rise", record("pgd-2", "16/255", [1] * 4 + [0] * 4), "37.50 at eps 8/255, 50.00 at eps 16/255"),
        ("halves", [record(a, "16/255", [1, 1, 1, 1, 0, 0, 0, 0]) for a in FLAGS], "87.50 clean, 50.00 at eps 16/255"),
        ("eps-ball", record(max_distance=8 / 255 + 2e-6), "0.03137455"),
        ("same images", record(n=N + 1, robust_flags="AAA=", robust_acc=0.0), "n = 8 | dice, n = 9"),
        ("same images", record(dataset="coins"), "coins"),
        (
            "same images",
            [record(images="aa"), record("margin-2", images="bb")],
            "n = 8 (images aa) | dice, n = 8 (images b",
        ),
        ("same images", record("margin-2", step=2), "several steps"),
        (
            "one threat model",
            record(train_threat={"norm": "l2", "eps": "6/16"}),
            "trained in l2 at eps 6/16",
        ),
        ("test set", record(selected_on="test"), "student: selected on the test set"),
        ("warning", record(warnings=["gradients may vanish"]), "gradients may vanish (1 records)"),
        ("flags", record(robust_acc=50.0), "50.0000 stated, 37.5000 counted"),
        ("flags", record(clean_acc=25.0), "25.0000 clean"),
        ("commit", record(commit="def5678"), "abc1234 | def5678"),
        ("commit", healthy(commit="abc1234+"), "abc1234+"),
    ],
)
def test_each_check_warns_on_the_fault_that_it_is_for(name, fault, numbers):
    faults = fault if isinstance(fault, list) else [fault]
    replaced = {(each["attack"], each["eps"]) for each in faults}
    rest = [each for each in healthy() if (each["attack"], each["eps"]) not in replaced]
    outcome, details = status([*rest, *faults], name)
    assert outcome == ("fail" if name in ("eps-ball", "flags") else "warn")  # there the numbers mean nothing
    assert numbers in details


@pytest.mark.parametrize(
    "clean, changes, outcome",
    [
        (87.5, {}, "pass"),
        (50.0, {}, "fail"),  # 25 % and two standard errors, 2·√(25·75/8) = 30.6, are 55.6
        (62.5, {}, "pass"),
        (62.5, dict(chance_acc=60.0), "fail"),  # the most frequent class alone: a constant answer
        (37.5, dict(chance_acc=None, num_classes=10), "pass"),  # older records: one of ten classes, 10 + 21.2
        (25.0, dict(chance_acc=None, num_classes=10), "fail"),
        (25.0, dict(chance_acc="none"), "not checked"),
    ],
)
def test_a_network_at_chance_level_fails(tmp_path, clean, changes, outcome):
    records = [record(clean_acc=clean, flags=[0] * N, **changes)]
    assert status(records, "better than chance")[0] == outcome
    text = page_of(write_run(tmp_path / "run", records))
    assert ("1 check fails" in text) == (outcome == "fail")


def test_robust_accuracy_after_each_attack_is_shown(tmp_path):
    after = {"apgd-ce": 37.5, "apgd-t": 25.0, "square": 12.5}
    made = dict(version="standard", attacks=None)
    auto = record("autoattack", flags=[1] + [0] * 7, robust_after=after, attack_settings=made)
    (table,) = tables.tables([*healthy(), auto])
    ((header, line),) = (stage.cells() for stage in tables.stages(table, [*healthy(), auto]))
    assert header[1:] == ["clean", "APGD-ce", "APGD-t", "Square"] and line[1:] == ["87.50", "37.50", "25.00", "12.50"]
    assert "student, AutoAttack" in tables.as_text([auto]) and tables.stages(table, healthy()) == []
    write_run(tmp_path / "run", [*healthy(), auto])
    report.write([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Robust accuracy after each attack" in page and "AutoAttack standard, apgd-ce, apgd-t, square" in page


def test_half_a_point_is_allowed_and_no_more():
    def pair(points):
        fgsm = record("fgsm", robust_acc=50.0)
        return status([fgsm, record("pgd-2", robust_acc=50.0 + points)], "as strong as FGSM")[0]

    assert pair(0.5) == "pass"
    assert pair(0.6) == "warn"


def test_what_cannot_be_checked_is_not_a_pass():
    assert status([record("pgd-2")], "as strong as FGSM")[0] == "not checked"
    assert status([record("pgd-2")], "halves")[0] == "not checked"
    assert {check.status for check in self_checks.checks([], ["nothing there"])} == {"warn", "not checked"}


# ---- files -------------------------------------------------------------------------------------------------


def test_runs_below_a_folder_are_found_once_and_in_order(tmp_path):
    student = write_run(tmp_path / "student", healthy())
    write_run(student / "teacher", healthy(title="teacher"), "teacher")
    write_run(student / "undefended", healthy(title="undefended"), "undefended")
    assert [run.title for run in runs.read([student])] == ["student", "teacher", "undefended"]
    ordered = runs.read([student, student / "undefended", student / "teacher", student / "teacher"])
    assert [run.title for run in ordered] == ["student", "undefended", "teacher"]
    assert [run.title for run in runs.read([tmp_path])] == ["student", "teacher", "undefended"]


def test_the_page_says_whether_the_ladders_steps_scale(tmp_path):
    for name, changes, words in (
        ("old", {}, "step sizes scale with eps<"),
        ("scaled", {"fixed_step": False}, "step sizes scale with eps<"),
        ("fixed", {"fixed_step": True}, "step sizes stay as they are<"),
    ):
        assert words in page_of(write_run(tmp_path / name, healthy(**changes)))


def test_two_runs_of_one_title_are_named_by_their_folders(tmp_path):
    for seed in "01":
        write_run(tmp_path / seed, healthy())
    titles = [run.title for run in runs.read([tmp_path])]
    assert titles == [f"student ({tmp_path / seed})" for seed in "01"]


def test_a_main_record_is_the_one_whose_file_has_no_at_sign(tmp_path):
    stale = {**record(eps="4/255"), "main": False}
    main = {**record(eps="4/255"), "main": True}
    folder = write_run(tmp_path / "a", [stale, main])
    (found,) = runs.read([folder])[0].records  # the same numbers, kept once
    assert found["main"]


def test_the_name_of_a_file_says_which_eps_is_the_main_one(tmp_path):
    """Whatever the run's own configuration says: a teacher is evaluated with the settings of its student."""
    own = {"evaluate": {"eps": "16/255"}}
    folder = write_run(tmp_path / "a", [{**each, "config": own} for each in healthy()])
    for file in folder.glob("eval/best/*.json"):
        file.write_text(json.dumps({k: v for k, v in files.read_json(file).items() if k != "main"}))
    assert [(each["eps"], each["main"]) for each in runs.read([folder])[0].records] == [
        ("8/255", True),
        ("16/255", False),
    ] * 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text(file.read_text()[:40]),
        lambda file: file.write_bytes(b"\xff\xfe\x00"),
        lambda file: file.write_text("[1, 2]"),
        lambda file: file.write_text(json.dumps({**record("margin-2"), "robust_acc": float("nan")})),
        lambda file: file.write_text(json.dumps({**record("margin-2"), "eps": "eight"})),
        lambda file: file.write_text(json.dumps({**record("margin-2"), "robust_flags": "AA"})),
        lambda file: file.write_text(json.dumps({**record("margin-2"), "n": 800})),
        lambda file: file.write_text(json.dumps({**record("margin-2"), "config": 3})),
        lambda file: file.write_text(json.dumps({k: v for k, v in record("margin-2").items() if k != "norm"})),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path, damage):
    folder = write_run(tmp_path / "run", healthy())
    damage(folder / "eval" / "best" / "margin-2.json")
    text = page_of(folder)
    assert "eval/best/margin-2.json" in text
    assert "37.50" in text and "PGD-2" in text
    run = runs.read([folder])[0]
    assert len(run.records) == 5 and len(run.problems) == 1
    assert status(run.records, "can be read", run.problems)[0] == "warn"


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl", "eval/best/pgd-2.examples.npz"])
def test_other_damaged_files_are_named_too(tmp_path, name):
    folder = write_run(tmp_path / "run", healthy())
    write_examples(folder)
    (folder / name).write_bytes(b"{\xff\n{}\n{}\n")
    assert any(name in problem for problem in runs.read([folder])[0].problems)
    assert "62.50" in page_of(folder)


def test_damage_anywhere_in_the_images_is_named(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    file = write_examples(folder)
    content = file.read_bytes()
    whole, named = runs.read([folder])[0].examples, 0
    for i in range(30, 260, 4):  # in the first array, its zip header and its compressed bytes
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        run = runs.read([folder])[0]
        if any("pgd-2.examples.npz" in problem for problem in run.problems):
            named += 1
        else:  # a byte that says nothing of the images, as a date
            np.testing.assert_equal(run.examples, whole)
    assert named > 40


@pytest.mark.usefixtures("drawn")
def test_a_value_of_another_type_stops_no_page(tmp_path):
    """Whatever stands where a record or a configuration has something else: it is named, or shown as it is."""
    record_values = dict(weights=[1], select={"a": 1}, count=[1], samples={"a": 1}, seed=[1], step=[1], images={"a": 1})
    record_values |= dict(attack_settings=3, num_classes="x", chance_acc=[1], commit=[1], seconds="x")
    made = dict(loss=[1], init=3, steps="x", restarts=None, surrogate=dict(title=[1], weights=3))
    *_, third = FLAGS
    records = [record(**record_values), record("fgsm", attack_settings=made), record(third, warnings=3)]
    sections = dict(seed=[1], teacher=3, attack=[1], validate="x", threat=3, evaluate=[1])
    for folder in "ab":
        write_run(tmp_path / "runs" / folder, records, data={"classes": 3, "num_classes": [1]}, **sections)
    text = page_of(tmp_path / "runs")
    assert "62.50" in text and f"eval/best/{third}.json is damaged" in text


def test_an_unfinished_run_says_so(tmp_path):
    rows = [{"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.0}]
    text = page_of(write_run(tmp_path / "run", rows=rows))
    assert "it is not finished, 2 of 4 steps" in text
    assert "it has no results yet" in text


@pytest.mark.usefixtures("drawn")
def test_a_diverged_run_says_so(tmp_path):
    rows = [{"kind": "train", "step": s, "epoch": s / 2, "loss": float("nan")} for s in (2, 4)]
    assert "it diverged" in page_of(write_run(tmp_path / "run", healthy(), rows=rows))
    rows = [{"kind": "diverged", "step": 2, "reason": "loss became NaN at step 2"}]
    assert "it diverged: loss became NaN at step 2" in page_of(write_run(tmp_path / "other", healthy(), rows=rows))


def test_a_damaged_line_is_named_and_the_rows_around_it_kept(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([whole[0], "{garbled", *whole[1:]]))
    found = runs.read([folder])[0]
    assert any("1 damaged line" in problem for problem in found.problems)
    assert len(found.metrics) == len(whole)


# ---- the page ----------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Collects what a page would fetch, its tags and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.open, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)
        for name, value in attrs:
            if name.split(":")[-1] in ("src", "href", "srcset", "action", "data", "poster"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.mark.usefixtures("drawn")
def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    write_examples(folder)
    text = page_of(folder)
    page = Page(text)
    assert {"svg", "img", "table", "details"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


@pytest.mark.usefixtures("drawn")
def test_whatever_stands_in_a_file_is_escaped(tmp_path):
    evil = '</title><script>alert("x")</script><img src=//evil onerror=x>$\\frac{$'
    changes = dict(title=evil, dataset=evil, commit=evil, hardware=evil, warnings=[evil], versions={evil: evil})
    records = healthy(**changes, checkpoint="best", selected_on=evil, step=evil, seed=evil)
    records.append(record(evil.replace("/", "|"), flags=[0] * N, **changes))
    folder = write_run(tmp_path / "run", (), evil, select_on=evil)
    for i, each in enumerate(records):
        file = folder / "eval" / "best" / f"{i}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(each))
    page = Page(page_of(folder))
    assert "script" not in page.tags and "img" not in page.tags
    assert evil in page.text


@pytest.mark.usefixtures("drawn")
def test_every_name_from_a_file_is_text_in_tables_legends_examples_and_commands(tmp_path):
    """Titles of seeds, classes, attacks, surrogates: none of them is a tag, and the page asks no other address."""
    evil = "<img src=//evil.example/x onerror=alert(1)>&lt;b&gt;\"'"
    records = []
    for seed in (0, 1):
        made = dict(loss=evil, surrogate=dict(title=evil, step=evil, weights=evil))
        own = dict(title=evil, seed=seed, config={"evaluate": EVALUATE, "seed": seed}, select=evil, count=evil)
        records = [record(**own), record("fgsm", **own), record(evil, flags=[0] * N, attack_settings=made, **own)]
        folder = write_run(tmp_path / "runs" / str(seed), records, evil, data={"classes": [evil] * 10}, seed=seed)
        (folder / "eval" / "best" / "evil.json").write_text(json.dumps(records[-1]))
        write_examples(folder)
    text = page_of(tmp_path / "runs")
    page = Page(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert page.tags.count("img") == 6 and not {"script", "b"} & set(page.tags)  # three rows of two images
    assert page.text.count(evil) > 20
    assert f"{evil}, seeds 0, 1" in page.text and f"{evil}, 2 seeds" in page.text and f"✗ {evil}" in page.text


def test_selection_on_the_test_set_is_labelled(tmp_path):
    assert 'class="test"' not in page_of(write_run(tmp_path / "a", healthy()))
    text = page_of(write_run(tmp_path / "b", healthy(selected_on="test"), select_on="test"))
    assert re.search(r'<td class="word">best <span class="test">selected on test</span>', text)


def test_warnings_of_records_stand_verbatim_on_the_page(tmp_path):
    text = page_of(write_run(tmp_path / "a", healthy(warnings=["two passes differ: use EOT"])))
    assert "two passes differ: use EOT (6 records)" in text


def test_wrong_predictions_are_marked_and_the_factor_is_named(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    write_examples(folder)
    text = page_of(folder)
    assert re.findall(r'<span class="wrong">([^<]*)</span>', text) == ["✗ 9"]
    assert "difference × 15" in text  # 15 · 8/255 is the last multiple below 0.5


def strokes(picture):
    """Lines of series in a figure: matplotlib draws them as paths, marks as <use>."""
    return len(re.findall(r'<path d="[^"]*"[^>]*style="[^"]*fill: none;[^"]*stroke: var\(--s\d\)', picture))


@pytest.mark.usefixtures("drawn")
def test_two_points_are_marks_and_three_are_a_line():
    two = [record(attack) for attack in FLAGS]
    picture = page.figure(figures.curves(tables.families(two)))
    assert strokes(picture) == 0 and len(re.findall("<use ", picture)) >= 6 and "Two points are not joined" in picture
    three = page.figure(figures.curves(tables.families(healthy())))
    assert strokes(three) == 3 and "Two points" not in three
    some = [*healthy(), record("autoattack", flags=[0] * N)]  # of which the table says as much
    assert page.figure(figures.curves(tables.families(some))) == three
    assert figures.curves(tables.families([record("cw-l2-9", flags=[0] * N, bounded=False)])) is None


def test_curves_in_two_norms_or_on_two_data_sets_are_in_panels_of_their_own():
    others = [record(title="round", norm="l2", eps="128/255", main=True), record(title="coins", dataset="coins")]
    plot = figures.curves(tables.families([record(), *others]))
    assert plot.description.count("PGD-2, dice, linf") == 1
    assert "PGD-2, dice, l2" in plot.description and "PGD-2, coins, linf" in plot.description
    assert "linf" not in figures.curves(tables.families(healthy())).description


@pytest.mark.usefixtures("drawn")
def test_seeds_have_bars():
    spread = page.figure(figures.curves(tables.families(seeds(3))))
    assert "Bars: standard deviation over training seeds" in spread and "student, 3 seeds" in spread
    assert "Bars" not in figures.curves(tables.families(seeds(3), each=True)).caption


@pytest.mark.usefixtures("drawn")
def test_one_epoch_is_a_mark_in_a_panel_and_a_panel_without_numbers_is_not_drawn(tmp_path):
    train = {"kind": "train", "step": 4, "epoch": 1.0, "loss": 2.0, "clean_acc": 50.0}
    many = [{**train, "step": s, "epoch": s / 2, "loss": float(s)} for s in (1, 2, 3, 4)]

    def drawn(rows):
        (run,) = runs.read([write_run(tmp_path / "run", healthy(), rows=rows)])
        (plot,) = figures.training([run])
        return page.figure(plot)

    one = drawn([train])
    assert strokes(one) == 0 and "loss" in one and "accuracy in %" in one
    assert len(set(re.findall(r'<use [^>]*style="[^"]*fill: (var\(--s\d\))', one))) == 2  # the loss, the accuracy
    assert strokes(drawn(many)) == 2
    val = {"kind": "val", "step": 4, "epoch": 1.0, "clean_acc": 60.0, "robust_acc": 30.0}
    only = drawn([val])
    assert "accuracy in %" in only and "loss" not in only
    nothing = drawn([{"kind": "train", "step": 4, "epoch": 1.0, "lr": 0.1}])
    assert "<svg" not in nothing and "no loss and no accuracy" in nothing


def test_a_step_that_is_best_and_last_is_marked_once(tmp_path):
    records = [record(weights="aa"), record("fgsm", weights="aa", checkpoint="last", selected_on="last")]
    assert "Evaluated, dotted: best and last (step 4)." in page_of(write_run(tmp_path / "run", records))


def test_examples_are_of_different_classes_and_classes_have_their_names(tmp_path):
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert first_of_each(labels, 4).tolist() == [0, 1, 3, 5] and first_of_each(labels, 99).tolist() == list(range(8))
    assert first_of_each(labels, 2).tolist() == [0, 3] and first_of_each(labels, 0).tolist() == []
    names = ["one", "two", "three", "four"]
    folder = write_run(tmp_path / "run", healthy(), data={"classes": names, "num_classes": 4})
    write_examples(folder, label=(2, 1), predicted_adv=(2, 3))
    text = page_of(folder)
    assert re.findall(r'<th scope="col">(two|three|[0-9])</th>', text) == ["two", "three"]  # by class
    assert re.findall(r'<span class="wrong">([^<]*)</span>', text) == ["✗ four"]
    assert "the first of each class" in text
    write_examples(folder, label=(2, 2), predicted_adv=(2, 7))  # a class that has no name
    text = page_of(folder)
    assert "✗ 7" in text and "the first of each class" not in text


@pytest.mark.parametrize(
    "name, said",
    [
        ("pgd-2.n40", "PGD-2"),
        ("pgd-2(count=attacked,restarts=2).n40", "PGD-2 (restarts 2, judged under attack only)"),
        ("pgd-2(step_size=2_255).l2.eps1_2.sampled12", "PGD-2 (step_size 2/255)"),
        ("cw-l2-20(c=0.1,lr=0.1)", "C&W l2-20 (any size, c 0.1, lr 0.1)"),
        ("pgd-2~3fa1c2e4", "PGD-2, transfer from another network"),
    ],
)
def test_examples_of_any_evaluation_are_shown_under_their_attack(tmp_path, name, said):
    folder = write_run(tmp_path / "run", healthy())
    file = write_examples(folder)
    file.rename(file.with_name(f"{name}.examples.npz"))
    assert f"{said}, checkpoint best" in Page(page_of(folder)).text


def test_examples_are_captioned_with_the_threat_model_of_their_own_record(tmp_path):
    folder = write_run(tmp_path / "run", [record(), record("fgsm")])
    file = write_examples(folder)
    other = file.with_name("pgd-2.l2.eps1_2.examples.npz")
    other.write_bytes(file.read_bytes())
    other.with_name("pgd-2.l2.eps1_2.json").write_text(json.dumps(record(norm="l2", eps="1/2", max_distance=0.5)))
    assert "PGD-2, checkpoint best, linf, eps 8/255" in Page(page_of(folder)).text
    file.unlink()
    assert "PGD-2, checkpoint best, l2, eps 1/2" in Page(page_of(folder)).text


def test_a_page_of_seeds_shows_their_mean_and_each_on_demand(tmp_path):
    for each in seeds(3):
        write_run(tmp_path / "runs" / str(each["seed"]), [each], seed=each["seed"])
    text = Page(page_of(tmp_path / "runs")).text
    assert "student, 3 seeds" in text and "81.00 ± 1.00" in text and "Every seed" in text
    assert [run.title for run in runs.read([tmp_path / "runs"])] == [f"student, seed {i}" for i in range(3)]
    assert text.count("student, seeds 0, 1, 2") == 1  # one figure of training
    report.write([tmp_path / "runs"], tmp_path / "each.html", each=True)
    text = Page((tmp_path / "each.html").read_text()).text
    assert "Every seed" not in text and "±" not in text.partition("How these numbers")[0]


def test_a_page_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", healthy())
    before = page_of(folder)
    assert sorted(file.name for file in folder.glob("report*")) == ["report.html"]

    def full_disk(file, text, **options):
        file.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full_disk)
    with pytest.raises(InputError, match=r"report\.html cannot be written \(No space left on device\)"):
        report.write([folder], folder / "report.html")
    assert (folder / "report.html").read_text() == before


@pytest.mark.usefixtures("drawn")
def test_the_same_results_give_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    assert page_of(folder) == page_of(folder)


# ---- the command line --------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_the_path(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", healthy())
    assert run_main(monkeypatch, folder) == 0
    printed = capsys.readouterr().out
    assert report.table(healthy()) in printed
    assert printed.endswith(f"report: {folder / 'report.html'}\n")
    assert (folder / "report.html").is_file()
    assert run_main(monkeypatch, folder, f"--out={tmp_path / 'other.html'}") == 0
    assert (tmp_path / "other.html").is_file()


def test_the_command_names_failed_checks_and_shows_each_seed(tmp_path, monkeypatch, capsys):
    for each in seeds(2):
        write_run(tmp_path / "runs" / str(each["seed"]), [{**each, "chance_acc": 70.0}], seed=each["seed"])
    assert run_main(monkeypatch, tmp_path / "runs") == 0
    printed = capsys.readouterr().out
    assert "student, 2 seeds" in printed and "80.50 ± 0.71" in printed
    assert "failed check: Every network is better than chance: student, seed 0: 80.00 clean on 8 images" in printed
    assert run_main(monkeypatch, tmp_path / "runs", "--each") == 0
    printed = capsys.readouterr().out
    assert "student, seed 1" in printed and "±" not in printed


def test_a_folder_without_a_run_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    for missing in (tmp_path / "nowhere", tmp_path):
        assert run_main(monkeypatch, missing) == 2
        error = capsys.readouterr().err
        assert str(missing) in error and error.count("\n") == 1
    folder = write_run(tmp_path / "run", healthy())
    assert run_main(monkeypatch, folder, f"--out={tmp_path / 'no' / 'page.html'}") == 2
    assert "--out" in capsys.readouterr().err
    assert run_main(monkeypatch, folder, "--ou=x") == 2  # no abbreviations


# ---- commands --------------------------------------------------------------------------------------------------


def pasted(text, folder):
    """The arguments of every command in the page's <pre> below "Commands", as bash splits them."""
    section = text.partition("<h2>Commands</h2>")[2]
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" >>"$OUT"; printf "\\0" >>"$OUT"\n')
    (folder / "python").chmod(0o755)
    script = "\n".join(html.unescape(block) for block in re.findall(r"<pre>(.*?)</pre>", section, re.DOTALL))
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    done = subprocess.run(["bash", "-u"], input=script, text=True, capture_output=True, cwd=folder, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return [call.split("\0") for call in (folder / "out").read_text().split("\0\0")[:-1]]


def test_a_shell_splits_each_command_into_the_arguments_that_are_meant(tmp_path):
    """Whatever titles, folders and attacks are called."""
    title = 'it\'s "$(touch pwned)" `touch pwned`; # \\ !1\ntouch pwned'
    folder = tmp_path / "my 'runs' $(touch pwned)"
    records = [
        record(n=4, robust_flags="AA==", robust_acc=0.0),
        record("cw-l2-200(c=0.1,lr=0.1)", flags=[0] * N),
    ]
    write_run(folder, [{**each, "title": title} for each in records], title)
    calls = pasted(page_of(folder), tmp_path)
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    assert calls == [
        ["-m", "ibjax.main", f"--config={folder}/config.json", f"--workdir={folder}-again"],
        ["-m", "ibjax.evaluate", f"--workdir={folder}", "--checkpoint=best", "--attacks=cw-l2-200(c=0.1,lr=0.1)"],
        ["-m", "ibjax.evaluate", f"--workdir={folder}", "--checkpoint=best", "--attacks=pgd-2", "--n=4"],
        ["-m", "ibjax.report", str(folder), f"--out={folder}/report.html"],
    ]


def test_the_commands_say_all_that_the_numbers_depend_on(tmp_path):
    folder = tmp_path / "run"
    transfer, from_last = transferred("teacher", "student", "bb"), transferred("teacher", "student", "cc")
    lost = transferred("elsewhere", "student", "dd")
    write_run(folder, [record(samples=3)], evaluate={**EVALUATE, "step_size": "2/255"})
    for i, each in enumerate([transfer, lost, record(norm="l2", eps="128/255", step_size="32/255"), from_last]):
        (folder / f"eval/best/{i}.json").write_text(json.dumps(each))
    # its student's settings attacked it: another eps than its own
    teacher = [record(weights="bb"), record("fgsm", weights="cc", checkpoint="last", selected_on="last", step=9)]
    write_run(folder / "teacher", teacher, "teacher", evaluate={"eps": "4/255", "norm": "linf"})
    same = [record(precision="high"), record("fgsm", precision="highest")]  # on all 8 images, where the run says 4
    evaluated, masked = {"n": 4, "precision": "high"}, {"masked": {"weights": "0123456789"}}
    write_run(folder / "same", same, "same", data=masked, evaluate=evaluated, threat={"eps": 8 / 255, "norm": "linf"})
    report.write([folder], tmp_path / "page.html", each=True)
    text = (tmp_path / "page.html").read_text()
    options = [call[3:] for call in pasted(text, tmp_path) if call[1] == "ibjax.evaluate"]
    assert options == [
        ["--checkpoint=best", "--attacks=pgd-2", f"--surrogate={folder}/teacher"],
        ["--checkpoint=best", "--attacks=pgd-2", "--norm=l2", "--eps=128/255", "--step_size=32/255"],
        ["--checkpoint=best", "--attacks=pgd-2", f"--surrogate={folder}/teacher", "--surrogate_checkpoint=last"],
        ["--checkpoint=best", "--attacks=pgd-2", "--samples=3"],
        ["--checkpoint=best", "--attacks=fgsm", "--n=8", "--precision=highest"],
        ["--checkpoint=best", "--attacks=pgd-2", "--n=8"],
        ["--checkpoint=best", "--attacks=pgd-2", "--norm=linf", "--eps=8/255", "--step_size=2/255"],
        ["--checkpoint=last", "--attacks=fgsm", "--norm=linf", "--eps=8/255"],
    ]
    assert "its attacks from elsewhere need that run, which is not on this page" in text
    (alone,) = runs.read([folder / "same"])  # no recipe trains it
    heading = "same: made by ibjax.analysis.mask of a run's weights 01234567"
    assert commands.blocks([alone], tmp_path / "page.html", each=False)[0] == (heading, [])
    assert pasted(text, tmp_path)[-1][1:] == ["ibjax.report", str(folder), "--each", f"--out={tmp_path}/page.html"]


def test_the_command_that_trains_again_has_the_run_s_own_configuration(digits_run, tmp_path):
    report.write([digits_run], tmp_path / "page.html")
    calls = [call for call in pasted((tmp_path / "page.html").read_text(), tmp_path) if call[1] == "ibjax.main"]
    assert len(calls) == 1  # which trains teacher and contrast too
    asked = main.parse(["main", *calls[0][2:]])
    assert asked.workdir == Path(f"{digits_run}-again")
    saved = files.read_json(digits_run / "config.json")["config"]
    assert config.plain(config.effective(asked.settings)) == config.plain(saved)
    assert main.parse(["main", *calls[0][2:], "--config.seed=9"]).settings.seed == 9
    with pytest.raises(InputError, match=r"holds no recipe .* and no config"):
        recipe_files.load(str(tmp_path / "config.json"))
