"""benchmarks/results.py: its list of cells, what it starts next, and the page, which is a function of the records."""

import argparse
import base64
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import cells
import one_cell
import results_page

import results
from ibjax import config, files
from ibjax.data import npz
from ibjax.errors import InputError

ROOT = Path(__file__).parent.parent
CELLS = cells.cells()
BOTH = ("mnist-standard-0", "digits-trades-20-epochs-0")  # one that takes long, one that does not


def parsed(tmp_path, *words):
    return results.parse([f"--work={tmp_path / 'work'}", f"--cells={tmp_path / 'cells'}", *words])


def put(given, cell, accuracy=50.0, flags=None, **more):
    """The folder of a finished cell."""
    folder = given.cells / cell.name
    records = [dict(attack="pgd-20", robust_acc=accuracy, clean_acc=90.0, n=2000, main=True, images="digest")]
    if flags is not None:
        records[0]["robust_flags"] = base64.b64encode(np.packbits(flags).tobytes()).decode()
    files.write_json(folder / "config.json", config.plain(one_cell.settings(cell, given)))
    files.write_json(folder / "records.json", dict(records=[] if more.get("failed") else records))
    environment = dict(hardware="1 × cpu, 2 cores", commit="abc")
    about = dict(cell=cell.name, seconds=dict(train=60.0), terms={}, failed="", environment=environment)
    files.write_json(folder / "cell.json", about | more)


# ---- the list ------------------------------------------------------------------------------------------------


def test_every_cell_has_a_valid_configuration(tmp_path):
    given, seen = parsed(tmp_path), set()
    for cell in CELLS.values():
        kind = (cell.recipe, *sorted(cell.changes), str(cell.changes.get("objective", {})), bool(cell.of))
        if kind not in seen:
            seen.add(kind)
            made = one_cell.settings(cell, given)
            config.check(made)
            assert (made.seed, made.evaluate.n, made.validate.every) == (cell.seed, cell.n, made.epochs)
    assert len(seen) > 30


def test_what_a_cell_needs_is_a_cell_before_it():
    before = set()
    for cell in CELLS.values():
        assert {cell.teacher, cell.of} - {""} <= before, cell.name
        assert set(cell.against) <= CELLS.keys()
        before.add(cell.name)
        assert cell.group in cells.GROUPS and cell.minutes > 0


def test_a_teacher_is_larger_by_what_its_row_says(tmp_path):
    given, sizes = parsed(tmp_path), {}
    for size in cells.CHANNELS:
        made = one_cell.settings(CELLS[f"digits-teacher-{size}-x-as-large-5-x-as-long-0"], given)
        widths = [1, *(width for stage in made.model.widths for width in stage)]
        sizes[size] = sum(9 * a * b for a, b in itertools.pairwise(widths))
        assert made.epochs == 5 * 20
    assert sizes[4] / sizes[1] == pytest.approx(4, rel=0.02) and sizes[16] / sizes[1] == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize("name", ["mnist-trades-0", "digits-pgd-at-20-epochs-1", "cifar10-ibd-20-epochs-0-autoattack"])
def test_the_command_of_a_row_selects_its_cell(name):
    python, script, *words = shlex.split(results_page.command(CELLS[name]))
    assert (python, (ROOT / script).is_file()) == ("python", True)
    given = results.parse(words)
    assert [cell.name for cell in results.chosen(given.only)] == [name] and given.budget is None


def test_class_folders_are_packed_once_with_the_same_images(tmp_path):
    given, cell = parsed(tmp_path, f"--cifar10={tmp_path / 'images'}"), CELLS["cifar10-pgd-at-20-epochs-0"]
    for split, count in (("train", 3), ("test", 2)):
        for label in range(2):
            (tmp_path / "images" / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                pixels = np.full((32, 32, 3), 100 * label + 10 * i + 7, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / f"class{label}" / f"{i}.png")
    made = one_cell.settings(cell, given).data
    assert (made.name, made.label) == ("npz", "CIFAR-10 (JPEG)")
    packed = npz.load(path=made.path)
    assert packed.train.images[:, 0, 0, 0].tolist() == [7, 17, 27, 107, 117, 127]
    assert packed.test.labels.tolist() == [0, 0, 1, 1]
    (tmp_path / "images" / "train" / "class0" / "0.png").unlink()
    assert one_cell.settings(cell, given).data.path == made.path and len(npz.load(path=made.path).train.labels) == 6


def test_a_name_of_no_cell_and_absent_data_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--only=mnist-trade-0 names no cell.*mnist-trades-0"):
        results.chosen("mnist-trade-0")
    given, mnist, digits = parsed(tmp_path, f"--mnist={tmp_path / 'none.npz'}"), *map(CELLS.get, BOTH)
    assert results.with_data([mnist, digits], given) == [digits]
    with pytest.raises(InputError, match=r"--mnist=.*none\.npz is not there"):
        results.with_data([mnist], given)
    for text in ("8", "m", "-3m", "0m"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"give it as 90s, 8m or 1\.5h"):
            results.span(text)
    assert [results.span(text) for text in ("90s", "8m", "1.5h")] == [1.5, 8, 90]


def test_a_cell_that_runs_again_begins_without_what_it_has_left(tmp_path, capsys):
    """An attack on another cell's network leaves the network; it would find its record there and take no time."""
    given, cell = parsed(tmp_path), CELLS["cifar10-ibd-20-epochs-0-autoattack"]
    network, own = given.work / cell.of, given.work / cell.name
    attacked = network / "eval" / "last"
    stays = [network / "seconds.json", attacked / "pgd-20.n1000.json", attacked / "autoattack-plus.n1000.json"]
    goes = [own / "seconds.json"]
    goes += [attacked / f"{name}.n1000{end}" for name, end in (("autoattack", ".json"), (".autoattack", "-3fa1.npz"))]
    for file in (*stays, *goes):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    one_cell.forget(cell, given)
    assert all(map(Path.exists, stays)) and not any(map(Path.exists, goes))
    one_cell.forget(CELLS[cell.of], given)
    assert not network.exists()
    with pytest.raises(SystemExit):
        parsed(tmp_path, "--again", "--budget=8m")
    assert "--again and --budget exclude each other" in capsys.readouterr().err


# ---- what comes next -----------------------------------------------------------------------------------------


def test_what_fits_comes_first_then_on_a_cpu_what_can_be_continued(tmp_path):
    given = parsed(tmp_path)
    long, short = map(CELLS.get, BOTH)
    card_only = CELLS["cifar10-pgd-at-30-epochs-0"]
    cpu, card = results.Machine(False, "cpu"), results.Machine(True, "card")
    assert results.choose([long, short], 5, cpu, given) == short
    assert results.choose([long, short], 0.1, cpu, given) == long
    assert results.choose([long, short], 0.1, card, given) is None
    with one_cell.clocked(given.work / long.name, "train"):
        pass
    assert results.choose([short, long], 5, cpu, given) == long  # what was begun goes on
    assert results.choose([short, long], 5, card, given) == short
    assert results.choose([card_only], 99, cpu, given) is None
    assert results.choose([short, card_only], 99, card, given) == card_only


def test_the_cost_of_a_cell_has_that_of_what_it_needs(tmp_path):
    given = parsed(tmp_path)
    student, teacher = (CELLS[f"mnist-methods-{name}-0"] for name in ("ibd", "trades-4-x-as-large"))
    both = results.minutes(student, given, 2.0)
    assert both == 2 * (student.minutes + teacher.minutes)
    files.write_json(given.work / teacher.name / "seconds.json", dict(train=1.0, trained=1))
    assert results.minutes(student, given, 2.0) == 2 * student.minutes
    files.write_json(given.work / student.name / "seconds.json", dict(train=600.0))
    assert results.minutes(student, given, 2.0) == 2 * student.minutes - 10


def test_seconds_of_several_calls_add_up(tmp_path, monkeypatch):
    clock = iter([0.0, 7.0, 100.0, 103.5])
    monkeypatch.setattr(one_cell.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), one_cell.clocked(tmp_path, "train"):
        raise KeyboardInterrupt
    with one_cell.clocked(tmp_path, "train"):
        pass
    assert one_cell.seconds(tmp_path) == {"train": 10.5}


# ---- the page ------------------------------------------------------------------------------------------------


def test_the_committed_page_is_that_of_the_records(tmp_path):
    page = ROOT / "results" / "README.md"
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "results" / "README.md"
    copy.parent.mkdir()
    for name in ("cells", "published-cpu.json"):
        (copy.parent / name).symlink_to(page.parent / name)
    results_page.write(copy, copy.parent / "cells")
    assert copy.read_text(encoding="utf-8") == text


def test_a_row_has_mean_and_spread_over_seeds_beside_the_papers_number(tmp_path):
    given = parsed(tmp_path)
    for seed, accuracy in enumerate((50.0, 52.0, 54.0)):
        put(given, CELLS[f"mnist-trades-{seed}"], accuracy)
    put(given, CELLS["mnist-mart-0"], failed="diverged: loss became NaN")
    text = page_of(given)
    (row,) = [line for line in text.splitlines() if line.startswith("| TRADES |")]
    assert "| 0, 1, 2 | 2 epochs of 100%, 5 × 0.1, batch 128 | 90.00 ± 0.00 (99.14) | 52.00 ± 2.00 (97.85) |" in row
    assert "| 2,000 | 1 × cpu, 2 cores | 0.05 | abc |" in row
    assert "- mnist-mart-0: diverged: loss became NaN" in text and "| MART |" not in text
    assert "16 of 20 cells have not run." in text


def test_differences_are_of_the_same_images_with_their_interval(tmp_path):
    given, rng = parsed(tmp_path), np.random.default_rng(0)
    method, base = "mnist-methods-ib-rar", "mnist-standard"
    shift = {}
    for seed in (0, 1):
        flags = rng.random(2000) < 0.5
        changed = flags.copy()
        changed[: 100 * (seed + 1)] = True
        shift[seed] = changed.astype(float) - flags
        for name, values in ((f"{method}-{seed}", changed), (f"{base}-{seed}", flags)):
            put(given, CELLS[name], flags=values)
        if seed == 0:
            half = 196 * shift[0].std() / 2000**0.5
            assert f"| IB-RAR | Standard (PGD-AT) | {100 * shift[0].mean():+.2f} ± {half:.2f} |" in page_of(given)
    means = [100 * each.mean() for each in shift.values()]
    half = stats.t.ppf(0.975, 1) * np.std(means, ddof=1) / 2**0.5
    assert f"| IB-RAR | Standard (PGD-AT) | {np.mean(means):+.2f} ± {half:.2f} (2) |" in page_of(given)


def page_of(given):
    return results_page.content(results_page.finished(given.cells), [])


def test_a_record_has_no_path_of_the_machine():
    content = dict(robust_acc=1.0, config=dict(a=1), data=dict(path="/home/me/mnist.npz"), teacher=dict(workdir="/a/b"))
    assert one_cell.portable(content) == dict(robust_acc=1.0, data=dict(path="mnist.npz"), teacher=dict(workdir="b"))
    assert one_cell.portable(dict(config=dict(workdir=""))) == dict(config=dict(workdir=""))
    for file in (ROOT / "results" / "cells").rglob("*.json*"):
        assert file.stat().st_size < 200_000
        assert "/work/" not in (text := file.read_text(encoding="utf-8")) and "/home/" not in text, file


@pytest.mark.slow
def test_cells_run_in_miniature_and_a_stopped_one_goes_on(tmp_path):
    """A teacher and its student, each in a process, then the page; a second call finds nothing to do."""
    student = "digits-ibd-from-1-x-as-large-1-x-as-long-20-epochs-0"
    command = [sys.executable, "benchmarks/results.py", "--quick", f"--only={student}", f"--work={tmp_path}"]

    def call(*words):
        done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "stopped; the same command continues" in call("--budget=6s")
    assert f"{student}: finished" in call("--budget=5m")
    cell = json.loads((tmp_path / "quick" / "records" / student / "cell.json").read_text())
    assert cell["seconds"]["train"] > 0 and cell["failed"] == ""
    assert "0 cells are missing" in call("--budget=5m")
    assert f"--only={student}" in (tmp_path / "quick" / "README.md").read_text()
