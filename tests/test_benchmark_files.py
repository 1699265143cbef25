"""The files of the benchmarks: no command overwrites what another has made, and every page says what made it."""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import ahead  # noqa: E402
import attacks_by_norm  # noqa: E402
import comparison  # noqa: E402
import device  # noqa: E402
import effects  # noqa: E402
import failures  # noqa: E402
import flips  # noqa: E402
import forms  # noqa: E402
import imports  # noqa: E402
import information  # noqa: E402
import measuring  # noqa: E402
import parts  # noqa: E402
import published  # noqa: E402
import scaling  # noqa: E402
import search_dtype  # noqa: E402
import sharding  # noqa: E402

import launch  # noqa: E402
from ibjax import files  # noqa: E402
from ibjax.errors import InputError  # noqa: E402
from ibjax.evaluation import evaluate  # noqa: E402
from ibjax.runs import provenance  # noqa: E402

ABOUT = dict(commit="abc", hardware="h", versions={"jax": "1"}, date="2026-01-02T03:04:05+00:00")


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", list(words))


def put(file, **content):
    files.write_json(file, content)
    return file


# ---- what made a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks/a.py", "--n=5", "--out=x.json"],
        ["/home/me/benchmarks/a.py", "--out", "y.json", "--n=5"],
        "python benchmarks/a.py --n=5 --out=z",
    ],
)
def test_a_command_is_the_same_wherever_it_writes(command):
    assert parts.as_typed(command) == ["a.py", "--n=5"]
    assert parts.in_line(command) == "`python benchmarks/a.py --n=5`"


def test_a_command_is_shown_without_folders_of_the_machine():
    line = parts.in_line(["a.py", "--data=mnist:/home/me/mnist.npz", "--workdir", "/tmp/x/runs", "--eps=4/255", "a b"])
    assert line == "`python benchmarks/a.py --data=mnist:mnist.npz --workdir runs --eps=4/255 'a b'`"
    line = parts.in_line(["a.py", f"--config={ROOT}/configs/digits.py:smoke"])
    assert line == "`python benchmarks/a.py --config=configs/digits.py:smoke`"
    found = {**ABOUT, "command": ["a.py"], "xla_flags": "--xla_a=1 --xla_b"}
    line = "`XLA_FLAGS='--xla_a=1 --xla_b' python benchmarks/a.py`, commit abc; h; jax 1; 2026-01-02"
    assert measuring.provenance_line(found) == line


def test_flags_of_the_compiler_are_recorded_and_compared_and_no_record_of_a_run_asks_for_them(tmp_path, monkeypatch):
    jax.devices()  # which reads the flags, and ends the process over those that do not exist
    monkeypatch.setenv("XLA_FLAGS", " --xla_a=1  --xla_b ")
    assert provenance.environment()["xla_flags"] == "--xla_a=1 --xla_b"
    with_flags = {**ABOUT, **provenance.xla_flags()}
    monkeypatch.delenv("XLA_FLAGS")
    assert "xla_flags" not in provenance.environment()
    before = put(tmp_path / "a.json", **ABOUT, records=[1])  # as files of before, which do not say
    assert measuring.kept(before, ABOUT)["records"] == [1] and measuring.kept(before, with_flags) == {}
    assert measuring.kept(put(before, **with_flags), ABOUT) == {}
    assert "xla_flags" not in evaluate._IDENTITY


# ---- no silent overwriting -------------------------------------------------------------------------------------


def test_only_the_same_command_writes_a_file_anew(tmp_path, monkeypatch):
    file = put(tmp_path / "a.json", command=["x/a.py", "--n=5", f"--out={tmp_path / 'a.json'}"])
    called(monkeypatch, "benchmarks/a.py", "--n=5", "--out", str(file))
    parts.refuse_other(file)
    parts.refuse_other(tmp_path / "new.json")
    for words in (("a.py",), ("a.py", "--n=6"), ("b.py", "--n=5")):
        called(monkeypatch, *words)
        with pytest.raises(InputError, match=r"holds what `python benchmarks/a.py --n=5` has made; give another --out"):
            parts.refuse_other(file)
    with pytest.raises(InputError, match="the records of another command"):
        parts.refuse_other(put(tmp_path / "b.json", rows=[]))
    with pytest.raises(InputError, match=r"is no JSON file; give a path that ends in \.json"):
        parts.refuse_other(tmp_path / "a.md")
    file.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read"):
        parts.refuse_other(file)


def page(out=None, **options):
    return measuring.Page("train_step", out, lambda records: f"| a |\n|---|\n{records}", **options)


def test_a_trial_has_a_file_of_its_own_in_the_repository_wherever_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    called(monkeypatch, "train_step.py")
    full, quick = page().out, page(quick=True).out
    assert full.parent == quick.parent == ROOT / "results"
    assert full.name.startswith("train_step-cpu-2") and quick.name.startswith("train_step-quick-cpu-2")


def test_a_page_of_other_options_is_refused_and_one_that_adds_keeps_its_records(tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    called(monkeypatch, "train_step.py", "--objective=pgd_at")
    page(out, note="5 rounds").add({"n": 1})
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert f"5 rounds; `python benchmarks/train_step.py --objective=pgd_at`, commit {provenance.commit()}" in text
    assert text == measuring.page(files.read_json(out), lambda records: f"| a |\n|---|\n{records}")
    called(monkeypatch, "train_step.py", "--objective=trades")
    with pytest.raises(InputError, match="--objective=pgd_at` has made"):
        page(out)
    adding = page(out, adds=True)
    adding.add({"n": 2})
    assert files.read_json(out)["records"] == [{"n": 1}, {"n": 2}]
    assert "last call: `python benchmarks/train_step.py --objective=trades`" in out.with_suffix(".md").read_text()
    with pytest.raises(InputError, match="holds no records of hosts"):
        measuring.Page("hosts", out, str, adds=True)


@pytest.mark.parametrize("words", [["--epochs=60", "--runs=PGD-AT"], ["--runs=ingredients", "--fraction=0.1"]])
def test_other_effects_do_not_overwrite_a_record_not_even_by_their_first_run(words, tmp_path, monkeypatch):
    file = put(tmp_path / "effects.json", command="python benchmarks/effects.py --workdir=w --out=results/effects")
    called(monkeypatch, "effects.py", "--workdir=w", *words)
    with pytest.raises(InputError, match=r"holds what `python benchmarks/effects.py --workdir=w` has made"):
        effects.study(effects.parse(["--workdir=w", *words, f"--out={file.with_suffix('')}"]))


def test_a_comparison_of_some_does_not_overwrite_that_of_all(tmp_path, monkeypatch):
    file = put(tmp_path / "all.json", command="python benchmarks/comparison.py --workdir=w")
    called(monkeypatch, "comparison.py", "--workdir=w", "--only=mart,te", f"--out={file}")
    with pytest.raises(InputError, match="give another --out"):
        comparison.command_line()


def test_another_session_on_a_device_does_not_delete_one(tmp_path, monkeypatch):
    file = put(tmp_path / "device.json", run=dict(command=["benchmarks/device.py", "--data=d"]))
    monkeypatch.setattr(device.signal, "signal", lambda *_: None)
    called(monkeypatch, "device.py", "--parts=methods", f"--out={file}")
    with pytest.raises(InputError, match=r"`python benchmarks/device.py --data=d` has made"):
        device.main()
    assert files.read_json(file)["run"]["command"]


def test_a_published_networks_record_is_not_replaced_by_one_that_says_less(tmp_path):
    record = dict(network="WK17a", n=10_000, ours={"clean": 1.0, "autoattack": 1.0})
    file = put(tmp_path / "a.json", benchmark="published", records=[record])
    assert published.kept(file, ["WK17a"], ["clean", "autoattack"], 10_000) == {"WK17a": record}
    assert published.kept(file, ["TRADES"], ["clean"], 1000) == {"WK17a": record}
    for attacks, n in ((["clean", "autoattack"], 1000), (["clean"], 10_000)):
        with pytest.raises(InputError, match="holds clean, autoattack of WK17a on 10,000 images, which would be lost"):
            published.kept(file, ["WK17a"], attacks, n)


def test_flags_of_a_search_stay_where_another_call_has_less(tmp_path):
    networks = {name: dict(n=1000) for name in ("digits", "WK17a")}
    file = put(tmp_path / "a.json", benchmark="search_dtype", **ABOUT, networks=networks)
    asked = lambda n, *only: argparse.Namespace(n=n, only=list(only))  # noqa: E731
    assert search_dtype.continued(file, ABOUT, asked(16, "TRADES"))["networks"] == networks
    with pytest.raises(InputError, match="holds digits on 1000 images, which would be lost"):
        search_dtype.continued(file, ABOUT, asked(16, "digits"))
    other = {**ABOUT, "commit": "def"}
    with pytest.raises(InputError, match="holds WK17a on 1000 images, which would be lost"):
        search_dtype.continued(file, other, asked(1000, "digits"))
    assert search_dtype.continued(file, other, asked(1000, "digits", "WK17a"))["networks"] == {}


def test_flips_of_other_code_or_of_a_known_seed_are_not_added(tmp_path):
    about = {**ABOUT, "compression": "zlib"}
    file = put(tmp_path / "a.json", kinds={}, bad=[], seeds=[11, 12], run=about)
    assert flips.continued(file, about, 13)["seeds"] == [11, 12]
    assert flips.continued(tmp_path / "new.json", about, 13)["seeds"] == []
    with pytest.raises(InputError, match="--seed=12 already; give one that is not in 11, 12"):
        flips.continued(file, about, 12)
    for key in ("commit", "versions", "compression"):
        with pytest.raises(InputError, match=f"flips of other {key}; give another"):
            flips.continued(file, {**about, key: "another"}, 13)
    run = {**about, "command": ["flips.py", "--seed=12"]}
    text = flips.page(dict(kinds={"data": {"nothing": 3}}, seeds=[11, 12], run=run))
    assert "| data | 3 | 3 | 0 |" in text
    assert "seeds 11, 12. The last call: `python benchmarks/flips.py --seed=12`, commit abc" in text


@pytest.mark.parametrize("content", [dict(run=dict(topology="h200")), dict(run=dict(command=["a.py"])), dict(rows=[])])
def test_compiled_programs_are_added_to_files_of_their_topology_alone(content, tmp_path, capsys):
    file, parser = put(tmp_path / "a.json", **content), parts.bare(parts.__file__, "")
    with pytest.raises(SystemExit):
        parts.compiled_before(parser, file, "v5e:2x2")
    assert "give another --out" in capsys.readouterr().err


# ---- what pages say --------------------------------------------------------------------------------------------

PAGES = {
    "ahead-h200": ahead.page,
    "ahead-v5e-2x2": ahead.page,
    "attacks-by-norm": attacks_by_norm.page,
    "failures": failures.page,
    "flips": flips.page,
    "forms-h200": forms.page,
    "forms-v5e-2x2": forms.page,
    "published-cpu": lambda content: published.page(content["records"]),
    "search-dtype-cpu": search_dtype.page,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_committed_page_is_that_of_its_records(name):
    file = ROOT / "results" / f"{name}.json"
    assert file.with_suffix(".md").read_text(encoding="utf-8") == PAGES[name](files.read_json(file))


def test_compiled_rows_say_of_which_commits_and_versions_they_are():
    rows = [("2", "b"), ("1", "a"), ("1", "c")]
    content = {f"row {i}": dict(versions={"jax": jax}, commit=commit) for i, (jax, commit) in enumerate(rows)}
    content = {"run": dict(topology="v5e:2x2", date="2026-01-02"), **content, "old": {}}
    assert measuring.compiled_line("x.py", content) == (
        "`python benchmarks/x.py --topology=v5e:2x2`; commits: b; jax 2; commits: a, c; jax 1; commits: unknown; "
        "last compiled: 2026-01-02"
    )


def test_what_was_there_before_is_not_dated_anew(tmp_path, monkeypatch):
    """Neither by a call that compiles nothing, nor where the page is written again."""
    file, parser = tmp_path / "a.json", parts.bare(parts.__file__, "")
    row = {"error": "", **parts.made_by()}
    put(file, run=dict(topology="h200", date="2026-01-02"), row=row)
    parts.compile_rows(parser, file, "h200", ["row"], lambda name: {"compile_seconds": 1}, str)
    assert files.read_json(file)["run"]["date"] == "2026-01-02"
    parts.compile_rows(parser, file, "h200", ["other"], lambda name: {"compile_seconds": 1}, str)
    assert files.read_json(file)["run"]["date"] > "2026-01-02"
    made = {"run": {"topology": "v5e:16x16"}, "wrn fsdp 1": {**row, "error": "too large"}}
    line = measuring.compiled_line("sharding.py", made)
    assert f"Batch 4,096 on v5e:16x16, bfloat16, compiled and not run; {line}" in sharding.page(made)


def test_a_network_says_which_code_has_trained_it_also_where_it_is_used_again(tmp_path):
    def start(commit, *steps):
        put(tmp_path / "env.json", commit=commit)
        for step in steps:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)

    assert comparison.trained_by(tmp_path) == []
    start("a", 10)
    assert comparison.trained_by(tmp_path) == ["a"]
    start("b")  # it finds a finished network
    assert comparison.trained_by(tmp_path) == ["a"]
    start("c", 20)  # it is killed before anyone asks
    assert comparison.trained_by(tmp_path) == ["a", "c"]  # asked by the next
    start("d", 30)
    assert comparison.trained_by(tmp_path) == ["a", "c", "d"]


def test_networks_of_other_code_are_named_on_the_page():
    runs = {"IBD": {"0": dict(commits=["a", "b"]), "1": dict(commits=["c"])}, "TRADES": {"0": dict(commits=["a", "b"])}}
    assert comparison.older("c", runs) == "\n\nTrained by commit a, b: IBD (seed 0), TRADES (seed 0)."
    assert comparison.older("c", {"IBD": {"1": dict(commits=["c"]), "2": {}}}) == ""


def test_a_row_of_attacks_keeps_what_made_it(tmp_path, monkeypatch):
    rows = [attacks_by_norm.rows()[0]._replace(attack=name, theirs=lambda *_: attacks_by_norm.X) for name in "ab"]
    monkeypatch.setattr(attacks_by_norm, "rows", lambda: rows)
    monkeypatch.setattr(attacks_by_norm, "run_ours", lambda row: [50.0])
    out = tmp_path / "a.json"
    for name in "ab":
        found = {**ABOUT, "commit": f"of {name}", "command": ["attacks_by_norm.py", f"--only={name}"]}
        monkeypatch.setattr(attacks_by_norm, "environment", lambda found=found: found)
        called(monkeypatch, "attacks_by_norm.py", f"--only={name}", f"--out={out}")
        attacks_by_norm.main()
    assert [record["about"]["commit"] for record in files.read_json(out)["records"]] == ["of a", "of b"]
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| ours | difference | runs |" in text and "| 100.0 | 50.0 | -50.0 | 1 |" in text
    assert "- `python benchmarks/attacks_by_norm.py --only=a`, commit of a; h; jax 1; 2026-01-02: a linf" in text


def test_times_of_different_rounds_have_a_quotient_of_medians():
    record = dict(batch={"1": 8, "2": 8}, seconds_per_step={"1": [1.0, 2.0, 9.0], "2": [4.0, 1.0, 3.0]})
    assert scaling.table([{"axis": "devices", **record}]).splitlines()[-1].endswith("| 1.50 |")
    assert scaling.table([{"axis": "batch", **record}]).splitlines()[-1].endswith("| 0.33 – 0.50 – 4.00 |")
    seconds = {information.BASE: [1.0, 2.0, 9.0], "SVD": [0.5]}
    assert information.table([dict(batch=8, dtype="float32", seconds=seconds)]).splitlines()[-1].endswith("| 25.0 % |")


# ---- launch and imports ----------------------------------------------------------------------------------------


def test_a_launch_that_fails_is_named_in_its_row(tmp_path, monkeypatch):
    found = iter([{"error": "no such file"}, {"spent": {part: [1.0, 2.0] for part in launch.PARTS},
                                              **{title: {"step": 2} for title in launch.EVENTS.values()}}])  # fmt: skip
    monkeypatch.setattr(launch, "from_child", lambda *_, **__: next(found))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    out = tmp_path / "launch.json"
    called(monkeypatch, "launch.py", "--config=digits", "--config.seed=3", f"--out={out}")
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 1
    failed, right = out.with_suffix(".md").read_text(encoding="utf-8").splitlines()[2:4]
    assert failed.startswith("| empty | no such file |") and right.startswith("| filled | 1.0 (2.0) |")
    assert right.endswith("| 2 | 2 | 2 |")
    assert [record["cache"] for record in files.read_json(out)["records"]] == ["empty", "filled"]


def test_a_launch_without_a_recipe_is_refused(monkeypatch, capsys):
    called(monkeypatch, "launch.py", "--config.seed=3")
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert ended.value.code == 2 and "--config" in capsys.readouterr().err


def test_times_of_imports_are_printed_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(imports, "seconds", lambda words: 0.25)
    for words in ((), (f"--out={tmp_path / 'a.json'}",)):
        called(monkeypatch, "imports.py", "--rounds=2", *words)
        try:
            imports.main()
        except SystemExit as ended:
            assert not ended.code
        assert "| import ibjax | 0.25 (0.25 – 0.25) |" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["records"][0]["seconds"] == [0.25, 0.25]
