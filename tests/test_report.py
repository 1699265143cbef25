"""Reports on small hand-made runs: tables, checks, damaged files, the page."""

import base64
import errno
import html.parser
import json
import pathlib
import re
import runpy
import sys

import numpy as np
import pytest

from ibjax import report, results
from ibjax.errors import InputError

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
        "max_distance": float(numerator) / float(denominator),
        "seconds": 1.0,
        "robust_flags": base64.b64encode(np.packbits(flags).tobytes()).decode(),
        **changes,
    }


def healthy(**changes):
    """Three attacks at two eps, without a fault."""
    larger = [record(attack, "16/255", [0, 0, 1, 0, 0, 0, 0, 0], **changes) for attack in FLAGS]
    return [*(record(attack, **changes) for attack in FLAGS), *larger]


def write_run(folder, records=(), title="student", epochs=2, select_on="val", rows=None):
    """A workdir: two steps an epoch, finished unless `rows` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"title": title, "epochs": epochs, "batch_size": 4, "select_on": select_on, "evaluate": {"eps": "8/255"}}
    data = {"label": "dice", "n_train": 8, "input_shape": [4, 4, 1]}
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


def write_examples(folder, eps=8 / 255):
    """Two images of which the second is misclassified under the attack."""
    x = np.random.default_rng(0).integers(1, 9, (2, 4, 4, 1)).astype(np.float32) / 10
    arrays = dict(label=np.array([3, 7]), predicted=np.array([3, 7]), predicted_adv=np.array([3, 9]))
    file = folder / "eval" / "best" / "pgd-2.examples.npz"
    np.savez_compressed(file, x=x, x_adv=x + np.float32(eps), **arrays)
    return file


def page_of(folder, *more):
    report.write([folder, *more], folder / "report.html")
    return (folder / "report.html").read_text()


def status(records, name, problems=()):
    """(status, details) of the one check whose name contains `name`."""
    (check,) = (check for check in results.checks(records, problems) if name in check.name)
    return check.status, " | ".join(check.details)


def run_main(monkeypatch, *argv):
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_info:
        report.main()
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


def test_the_worst_case_counts_the_images_that_withstand_every_attack():
    # neither the smallest accuracy (37.5) nor a product of them
    assert results.worst_case([record("pgd-2"), record("margin-2")]) == 25.0
    assert results.worst_case([record("pgd-2")]) is None


def test_the_ladder_is_not_in_the_table():
    assert "16/255" not in report.table(healthy())
    assert report.table([]).startswith("no records")


def test_records_without_the_main_key_are_judged_by_the_configuration():
    ladder = record(eps="16/255")
    del ladder["main"]
    assert not results.is_main(ladder)
    assert results.is_main({**ladder, "eps": "8/255"})


def test_other_data_norms_and_eps_get_tables_of_their_own():
    tables = results.tables([record(), record(norm="l2"), record(dataset="coins"), record(eps="4/255", main=True)])
    assert len({(table.dataset, table.norm, table.eps) for table in tables}) == 4
    assert all(len(table.lines) == 1 for table in tables)


def test_an_attack_that_a_run_lacks_is_a_dash():
    text = report.table([*healthy(), record("pgd-2", title="other"), record("margin-2", title="other")])
    # its worst case over fewer attacks is not comparable, and so not shown
    assert re.split(r"\s{2,}", text.splitlines()[-1])[4:] == ["–", "37.50", "37.50", "–"]


def test_runs_of_one_title_are_told_apart():
    labels = [row.label for row in results.rows([record(seed=0), record(seed=1), record("margin-2", seed=1)])]
    assert labels == ["student, seed 0", "student, seed 1"]
    other = {"model": {"name": "cnn"}, "evaluate": {}}
    assert len({row.label for row in results.rows([record(), record(config=other)])}) == 2


def test_attacks_are_sorted_by_strength_and_curves_by_eps():
    shuffled = [record(attack, flags=[1] * N) for attack in ("margin-2", "pgd-100", "fgsm", "pgd-20", "autoattack")]
    (table,) = results.tables(shuffled)
    assert table.attacks == ["fgsm", "pgd-20", "pgd-100", "margin-2", "autoattack"]
    (row,) = results.rows([record(eps=eps) for eps in ("16/255", "2/255", "8/255")])
    assert [text for _, text, _ in results.ladders(row)["pgd-2"]] == ["0", "2/255", "8/255", "16/255"]
    assert results.ladders(row)["pgd-2"][0] == (0.0, "0", 87.5)


# ---- checks ------------------------------------------------------------------------------------------------


def test_a_healthy_run_passes_every_check():
    assert {check.status for check in results.checks(healthy())} == {"pass"}


@pytest.mark.parametrize(
    "name, fault, numbers",
    [
        ("as strong as FGSM", record("pgd-2", flags=[1] * 6 + [0, 0]), "PGD-2 leaves 75.00, FGSM 62.50"),
        ("as every other", record("autoattack", flags=[1] * 5 + [0] * 3), "AutoAttack leaves 62.50, PGD-2 37.50"),
        ("does not rise", record("pgd-2", "16/255", [1] * 4 + [0] * 4), "37.50 at eps 8/255, 50.00 at eps 16/255"),
        ("halves", [record(a, "16/255", [1, 1, 1, 1, 0, 0, 0, 0]) for a in FLAGS], "87.50 clean, 50.00 at eps 16/255"),
        ("eps-ball", record(max_distance=8 / 255 + 2e-6), "0.03137455"),
        ("same images", record(n=N + 1, robust_flags="AAA=", robust_acc=0.0), "n = 8 | dice, n = 9"),
        ("same images", record(dataset="coins"), "coins"),
        ("same images", record("margin-2", step=2), "several steps"),
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
    assert outcome == "warn"
    assert numbers in details


def test_robust_accuracy_after_each_attack_is_shown(tmp_path):
    after = {"apgd-ce": 37.5, "apgd-t": 25.0, "square": 12.5}
    made = dict(version="standard", attacks=None)
    auto = record("autoattack", flags=[1] + [0] * 7, robust_after=after, attack_settings=made)
    (table,) = results.tables([*healthy(), auto])
    ((header, line),) = results.stages(table, [*healthy(), auto])
    assert header[1:] == ["clean", "APGD-ce", "APGD-t", "Square"] and line[1:] == ["87.50", "37.50", "25.00", "12.50"]
    assert "student, AutoAttack" in results.as_text([auto]) and results.stages(table, healthy()) == []
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
    assert {check.status for check in results.checks([], ["nothing there"])} == {"warn", "not checked"}


# ---- files -------------------------------------------------------------------------------------------------


def test_runs_below_a_folder_are_found_once_and_in_order(tmp_path):
    student = write_run(tmp_path / "student", healthy())
    write_run(student / "teacher", healthy(title="teacher"), "teacher")
    write_run(student / "undefended", healthy(title="undefended"), "undefended")
    assert [run.title for run in report.read([student])] == ["student", "teacher", "undefended"]
    ordered = report.read([student, student / "undefended", student / "teacher", student / "teacher"])
    assert [run.title for run in ordered] == ["student", "undefended", "teacher"]
    assert [run.title for run in report.read([tmp_path])] == ["student", "teacher", "undefended"]


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
    titles = [run.title for run in report.read([tmp_path])]
    assert titles == [f"student ({tmp_path / seed})" for seed in "01"]


def test_a_main_record_is_the_one_whose_file_has_no_at_sign(tmp_path):
    stale = {**record(eps="4/255"), "main": False}
    main = {**record(eps="4/255"), "main": True}
    folder = write_run(tmp_path / "a", [stale, main])
    (found,) = report.read([folder])[0].records  # the same numbers, kept once
    assert found["main"]


def test_the_name_of_a_file_says_which_eps_is_the_main_one(tmp_path):
    """Whatever the run's own configuration says: a teacher is evaluated with the settings of its student."""
    own = {"evaluate": {"eps": "16/255"}}
    folder = write_run(tmp_path / "a", [{**each, "config": own} for each in healthy()])
    for file in folder.glob("eval/best/*.json"):
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "main"}))
    assert [(each["eps"], each["main"]) for each in report.read([folder])[0].records] == [
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
    run = report.read([folder])[0]
    assert len(run.records) == 5 and len(run.problems) == 1
    assert status(run.records, "can be read", run.problems)[0] == "warn"


@pytest.mark.parametrize("name", ["config.json", "env.json", "metrics.jsonl", "eval/best/pgd-2.examples.npz"])
def test_other_damaged_files_are_named_too(tmp_path, name):
    folder = write_run(tmp_path / "run", healthy())
    write_examples(folder)
    (folder / name).write_bytes(b"{\xff\n{}\n{}\n")
    assert any(name in problem for problem in report.read([folder])[0].problems)
    assert "62.50" in page_of(folder)


def test_damage_anywhere_in_the_images_is_named(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    file = write_examples(folder)
    content = file.read_bytes()
    whole, named = report.read([folder])[0].examples, 0
    for i in range(30, 260, 4):  # in the first array, its zip header and its compressed bytes
        file.write_bytes(content[:i] + bytes([content[i] ^ 0xFF]) + content[i + 1 :])
        run = report.read([folder])[0]
        if any("pgd-2.examples.npz" in problem for problem in run.problems):
            named += 1
        else:  # a byte that says nothing of the images, as a date
            np.testing.assert_equal(run.examples, whole)
    assert named > 40


def test_an_unfinished_run_says_so(tmp_path):
    rows = [{"kind": "train", "step": 2, "epoch": 1.0, "loss": 1.0}]
    text = page_of(write_run(tmp_path / "run", rows=rows))
    assert "it is not finished, 2 of 4 steps" in text
    assert "it has no results yet" in text


def test_a_diverged_run_says_so(tmp_path):
    rows = [{"kind": "train", "step": s, "epoch": s / 2, "loss": float("nan")} for s in (2, 4)]
    assert "it diverged" in page_of(write_run(tmp_path / "run", healthy(), rows=rows))
    rows = [{"kind": "diverged", "step": 2, "reason": "loss became NaN at step 2"}]
    assert "it diverged: loss became NaN at step 2" in page_of(write_run(tmp_path / "other", healthy(), rows=rows))


def test_a_damaged_line_is_named_and_the_rows_around_it_kept(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([whole[0], "{garbled", *whole[1:]]))
    found = report.read([folder])[0]
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


def test_a_folder_without_a_run_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    for missing in (tmp_path / "nowhere", tmp_path):
        assert run_main(monkeypatch, missing) == 2
        error = capsys.readouterr().err
        assert str(missing) in error and error.count("\n") == 1
    folder = write_run(tmp_path / "run", healthy())
    assert run_main(monkeypatch, folder, f"--out={tmp_path / 'no' / 'page.html'}") == 2
    assert "--out" in capsys.readouterr().err
    assert run_main(monkeypatch, folder, "--ou=x") == 2  # no abbreviations


def test_the_configuration_in_the_commands_can_be_used_again(tmp_path):
    folder = write_run(tmp_path / "run", healthy())
    text = Page(page_of(folder)).text
    lines = re.findall(r"^#   (.*)$", text, re.MULTILINE)
    (tmp_path / "again.py").write_text("\n".join(lines))
    assert runpy.run_path(str(tmp_path / "again.py"))["get_config"]().epochs == 2
