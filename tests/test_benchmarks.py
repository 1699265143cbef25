"""The benchmarks: every objective has its step, what their pages say, and one command runs them all."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ibjax import files, perturb
from ibjax.devices import cores
from ibjax.evaluation import named

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))
import all as everything  # noqa: E402
import comparison  # noqa: E402
import compiled  # noqa: E402
import hosts  # noqa: E402
import info_stop  # noqa: E402
import measuring  # noqa: E402
import methods  # noqa: E402
import parts  # noqa: E402
import programs  # noqa: E402
import scaling  # noqa: E402
import slices  # noqa: E402
import slices_scaling  # noqa: E402

from ibjax.runs import provenance  # noqa: E402


def test_every_objective_of_the_package_has_a_step():
    assert set(methods.NAMES) == {*comparison.names(), "awp"}


@pytest.mark.parametrize("name", methods.NAMES)
def test_each_step_can_be_traced(name):
    """With its attack, its teacher and its network, in float32 and, in two parts, in bfloat16."""
    given = methods.settings(name, methods.TINY, attack_steps=1)
    for dtype, microbatches in (("float32", 1), ("bfloat16", 2)):
        made = methods.program(
            methods.build(given, methods.TINY, dtype=dtype, unroll=False), 8, microbatches=microbatches
        )
        shapes = made.shapes(8, (32, 32, 3))
        state, metrics = jax.eval_shape(made.train_step, *shapes)
        assert metrics["loss"].shape == ()
        assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, shapes[0])


def test_every_compiled_part_of_the_package_is_a_program():
    """Objectives, perturbations, attacks by name, and each analysis that compiles something for a device."""
    kinds = {}
    for name in programs.TABLE:
        kind, _, short = name.partition(" ")
        kinds.setdefault(kind, set()).add(short)
    analyses = (FOLDER.parent / "ibjax" / "analysis").glob("*.py")
    compiling = {file.stem for file in analyses if re.search(r"\bjax\.jit\b", file.read_text(encoding="utf-8"))}
    assert kinds["objective"] == set(comparison.names())
    assert kinds["perturbation"] == set(perturb.PERTURBATIONS)
    assert kinds["attack"] == {*named.FAMILIES, *named.ATTACKS}
    assert {"mask", "plane"} <= compiling - {"flops"} <= kinds["analysis"]  # flops compiles for CPUs only


def test_every_architecture_is_a_program_at_two_image_sizes():
    known = {
        file.stem for file in (FOLDER.parent / "ibjax" / "models").glob("*.py") if "class Model" in file.read_text()
    }
    sections = {side: [sizes[side][0] for sizes in programs.NETWORKS.values() if side in sizes] for side in (32, 224)}
    for of_size in sections.values():
        assert {section["name"] for section in of_size} == known - {"masked"}  # which wraps another network
    assert set(programs.ARCHITECTURES) >= {"architecture resnet-18 32px", "architecture vit-s 224px"}


@pytest.mark.slow
@pytest.mark.parametrize("name", programs.ARCHITECTURES)
def test_the_program_of_an_architecture_can_be_traced(name):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    with cores.elsewhere("tpu"):
        program = programs.ARCHITECTURES[name](programs.FULL, mesh)
        _, metrics = jax.eval_shape(program.call, *jax.eval_shape(program.make))
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", programs.TABLE)
@jax.numpy_dtype_promotion("standard")  # optax's Adam mixes a float with its integer count
def test_each_program_takes_two_finite_steps(name):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    program = programs.TABLE[name](programs.SMALL, mesh)
    arguments = jax.jit(program.make)()
    for _ in range(2):
        result = program.call(*arguments)
        arguments = program.again(arguments, result)
    assert jax.tree.leaves(result) and programs.finite(result)
    assert not programs.finite(jnp.array([1.0, jnp.nan]))


def test_a_batch_over_several_devices_has_the_loss_of_one():
    case = methods.build(methods.settings("pgd_at", methods.TINY, 1), methods.TINY, unroll=False)
    losses = [methods.ibjax_steps(case, 8, (8, 8, 3), devices=n)(2) for n in (1, 4)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_contestants_take_turns_and_quotients_are_of_the_same_round():
    order = []
    runners = {name: lambda n, name=name: order.append((name, n)) for name in "ab"}
    times = measuring.alternate(runners, 3, 2)
    assert order == [("a", 2), ("b", 2)] * 3
    assert [len(seconds) for seconds in times.seconds.values()] == [3, 3]
    assert measuring.quotients([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def test_a_row_that_fails_is_named_and_stops_no_other(tmp_path):
    page = measuring.Page("compiled", tmp_path / "page.json", compiled.memory_table)
    about = dict(objective="ibd", batch=8, dtype="float32", microbatches=1)

    def fails():
        raise MemoryError("no\nroom")

    page.attempt(about, fails)
    page.attempt(about, lambda: about | dict(temporary_bytes=3 << 20, argument_bytes=1 << 20))
    records = json.loads((tmp_path / "page.json").read_text())["records"]
    assert [record.get("error") for record in records] == ["MemoryError: no room", None]
    rows = (tmp_path / "page.md").read_text().splitlines()
    assert rows[2] == "| ibd | 8 | float32 | 1 | MemoryError: no room |  |  |"
    assert rows[3] == "| ibd | 8 | float32 | 1 | 3 | 1 |  |"
    with pytest.raises(SystemExit):
        page.finish()


def test_a_child_that_fails_says_why(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""import sys; assert '8' in sys.argv[1]; print('noise'); print('{"at": 8}')""")
    assert measuring.in_new_process(str(script), {"n": 8}) == {"at": 8}
    assert "AssertionError" in measuring.in_new_process(str(script), {"n": 9})["error"]


def test_hsics_layers_are_those_of_the_network():
    points = scaling.points("layers", 4, quick=False)
    assert list(points) == [0, 1, 2, 5, 10]
    model = methods.network(methods.RESNET18)
    output, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    assert set(points[10]["layers"]) <= set(output[1])


# ---- the command that runs them all ----------------------------------------------------------------------------

SCRIPT = """import json, os, pathlib, sys
name, out = sys.argv[1], pathlib.Path(sys.argv[-1].removeprefix("--out="))
with (out.parent / "ran").open("a") as log:
    log.write(name + " ")
assert name != "bad", "this part fails"
out.write_text(json.dumps({"records": [1], "given": os.environ.get("GIVEN")}))
out.with_suffix(".md").write_text("| table |")
"""


@pytest.fixture
def three_parts(monkeypatch, tmp_path):
    """A part that fails, one that works, and one that needs what is not here; the first two note that they ran."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    parts = {name: everything.Part(str(script), cpu=name, quick="") for name in ("bad", "good")}
    absent = everything.Part(str(script), needs=("no_such_module",))
    monkeypatch.setattr(everything, "PARTS", {**parts, "absent": absent})
    monkeypatch.setattr(everything, "default_backend", lambda: "cpu")
    return tmp_path / "out.json"


def run_all(monkeypatch, out, parts="bad,good,absent", *options):
    monkeypatch.setattr(sys, "argv", ["all.py", f"--out={out}", f"--parts={parts}", *options])
    with pytest.raises(SystemExit) as ended:
        everything.main()
    return ended.value.code


def test_a_part_that_fails_is_named_and_stops_no_other_and_what_is_done_stays(three_parts, monkeypatch):
    assert run_all(monkeypatch, three_parts) == 1
    found = json.loads(three_parts.read_text())
    assert found["bad"]["status"] == "failed, exit code 1" and "this part fails" in found["bad"]["tail"]
    assert found["good"]["status"] == "done" and found["good"]["records"] == [1]
    assert found["absent"]["status"] == "left out: needs no_such_module, which is not installed"
    page = three_parts.with_suffix(".md").read_text()
    assert f"benchmarks/all.py --parts=bad,good,absent`; commit {provenance.commit()}\n" in page
    assert "| table |" in page and "- bad: failed" in page and "- absent: left out" in page

    run_all(monkeypatch, three_parts)
    assert (three_parts.with_suffix(".parts") / "ran").read_text() == "bad good bad "


def test_a_part_has_its_environment_and_its_line_can_be_pasted(three_parts, monkeypatch):
    part = everything.PARTS["good"]
    monkeypatch.setitem(everything.PARTS, "good", part._replace(environment=("GIVEN=2",), cpu="--a=(1,)"))
    monkeypatch.setitem(everything.PARTS, "absent", part._replace(needs=("cpu",)))
    assert run_all(monkeypatch, three_parts, "good,absent") == 0
    found = json.loads(three_parts.read_text())
    assert found["good"]["given"] == "2" and found["absent"]["status"] == "done"
    assert f"`GIVEN=2 python {part.script} '--a=(1,)'`" in three_parts.with_suffix(".md").read_text()

    monkeypatch.setattr(everything, "default_backend", lambda: "gpu")
    run_all(monkeypatch, three_parts.with_name("b.json"), "absent")
    assert json.loads(three_parts.with_name("b.json").read_text())["absent"]["status"] == "left out: is for CPUs"


def test_an_unknown_part_and_mixed_sizes_are_refused(three_parts, monkeypatch, capsys):
    assert run_all(monkeypatch, three_parts, "god") == 2
    assert "god is unknown; allowed: bad, good" in capsys.readouterr().err
    run_all(monkeypatch, three_parts, "good")
    assert run_all(monkeypatch, three_parts, "good", "--quick") == 2
    assert "holds a run without --quick" in capsys.readouterr().err
    monkeypatch.setattr(provenance, "commit", lambda: "another")
    assert run_all(monkeypatch, three_parts, "good") == 2
    assert "this is another; give another" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_runs_at_tiny_sizes(tmp_path):
    command = [sys.executable, str(FOLDER / "all.py"), "--quick", f"--out={tmp_path / 'all.json'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    found = files.read_json(tmp_path / "all.json")
    ended = {name: part["status"] for name, part in found.items() if name != "run"}
    assert list(ended) == list(everything.PARTS)
    assert done.returncode == 0 and all(status.startswith(("done", "left out")) for status in ended.values()), ended
    assert found["flops"]["versions"]["jax"] and "quotient" in (tmp_path / "all.md").read_text()


@pytest.mark.parametrize(
    "code, log, said",
    [
        (1, "loading\nerror: batch_size=100 does not divide\n", "error: batch_size=100 does not divide"),
        (1, "", "exit code 1"),
        (-4, "F1122 09:44:11.6  12 a.cc:7] Check failed: x\nE1122 RAW: Raising signal 4", "SIGILL Check failed: x"),
        (-9, "loading\n", "the compiler crashed, SIGKILL"),
    ],
)
def test_a_compilation_that_ends_says_why(code, log, said):
    assert parts.reason(code, log).strip().endswith(said)


# ---- what is kept ----------------------------------------------------------------------------------------------


def called(module, monkeypatch, *options):
    """Calls a benchmark's command line."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    module.main()


def test_info_stop_goes_on_with_what_the_same_code_versions_and_settings_have_made(tmp_path, monkeypatch, capsys):
    trained = []

    def train(given, data, fraction, steps, seed, stop):
        trained.append((seed, stop))
        return {"diverged_at": None, **info_stop.summary({"info": [1.0], "adv_acc": [0.5]})}

    monkeypatch.setattr(info_stop, "train", train)
    again = lambda: called(info_stop, monkeypatch, "--seeds=1", f"--out={tmp_path / 'a.json'}")  # noqa: E731
    again()
    again()
    assert trained == [(0, False), (0, True)]
    others = {"commit": "another", "versions": {}, "hardware": "faster", "jax_settings": {"jax_settings": {}}}
    for number, (name, value) in enumerate({**others, "xla_flags": {"xla_flags": "--another"}}.items(), 2):
        capsys.readouterr()
        with monkeypatch.context() as other:
            other.setattr(provenance, name, lambda value=value: value)
            again()
            again()
        assert len(trained) == 2 * number and f"of other {name}: measured again" in capsys.readouterr().err
        with monkeypatch.context() as other:  # as it was, for the next
            other.setattr(measuring, "kept", lambda out, found: json.loads(out.read_text()))
            again()


def test_rows_of_other_commits_stay_where_asked(tmp_path, monkeypatch):
    compiled_rows, parser = [], parts.bare(parts.__file__, "")

    def compile_one(name):
        compiled_rows.append(name)
        return {"compile_seconds": 1, "collectives": []}

    for name, keep in (("commit", False), ("commit", True), ("commit", False), ("versions", True)):
        with monkeypatch.context() as other:
            other.setattr(provenance, name, lambda: {"name": str(len(compiled_rows))})
            parts.compile_rows(parser, tmp_path / "a.json", "h200", ["row"], compile_one, str, keep)
    assert len(compiled_rows) == 3  # all but the second


def test_rows_of_slices_are_compiled_again_where_code_or_compiler_are_others(tmp_path, monkeypatch):
    compiled_rows = []

    def compile_row(name, options, topology):
        compiled_rows.append(name)
        return {"error": "too large"} if name == "b:bad" else {"compile_seconds": 1, "collectives": []}

    monkeypatch.setattr(slices, "rows", lambda: {"a:good": [], "b:bad": []})
    monkeypatch.setattr(slices, "compile_row", compile_row)
    monkeypatch.setattr(slices, "table", str)
    again = lambda: called(slices, monkeypatch, f"--out={tmp_path / 'a.json'}")  # noqa: E731
    again()
    again()
    assert compiled_rows == ["a:good", "b:bad", "b:bad"]
    compiled_rows.clear()
    for name in ("commit", "versions"):
        with monkeypatch.context() as other:
            other.setattr(provenance, name, lambda: {"name": "another"})
            again()
            again()
        assert compiled_rows == ["a:good", "b:bad", "b:bad"]
        again()
        compiled_rows.clear()
    source = parts.made_by()
    assert not parts.done({"error": ""}, source)  # of an earlier version, which did not write it down


def test_the_table_of_info_stop_comes_from_its_records_which_keep_few_steps():
    results = FOLDER.parent / "results" / "siriib-info-stop.json"
    records = json.loads(results.read_text(encoding="utf-8"))["records"]
    assert results.with_suffix(".md").read_text(encoding="utf-8").startswith(info_stop.table(records) + "\n\n")
    rows = {name: [float(n) for n in range(1, 301)] for name in ("info", "adv_acc")}
    kept = info_stop.summary(rows)
    assert {10, 50, 100, 200, 298, 299, 300} < set(kept["steps_kept"]) and len(kept["steps_kept"]) < 25
    assert kept["metrics"]["info"] == kept["steps_kept"]
    assert (kept["largest_info"], kept["last_adv_acc"]) == (300, 290.5)
    assert info_stop.summary({"info": [], "adv_acc": []})["steps_kept"] == []


def test_the_figures_of_a_slice_follow_from_the_compiled_programs_and_bound_its_efficiency():
    sizes = (("all-reduce", 0, 1e8), ("all-gather", 0, 1e6), ("all-gather", -1, 1e12))
    collectives = [dict(kind=kind, depth=depth, count=1, bytes=size) for kind, depth, size in sizes]
    row = dict(batch_size=128, chips=4, flops=1e13, bytes=5e10, collectives=collectives)
    plain, wide = slices_scaling.CASES[0], slices_scaling.CASES[1]
    content = {case.row: row for case in slices_scaling.CASES}
    found = slices_scaling.figures(plain, content, 8)
    np.testing.assert_allclose(found, (1e13 / 4, 5e10 / 4, 2.01e8))
    made = slices_scaling.bound(found, slices_scaling.Slice("", "TPU v5 lite", 4, 2, 50e9))
    np.testing.assert_allclose(made, (max(found.flops / 197e12, found.bytes / 819e9), 0.75 * 2.01e8 / 100e9))
    assert 0 < made.least < made.most <= 1
    larger = slices_scaling.figures(wide, content, 8)
    assert 5.5 < larger.flops / found.flops < 6.0  # 38.8 and 6.7 billion multiply-adds of WRN-70-16 and WRN-34-10
    np.testing.assert_allclose(larger.exchanged / found.exchanged, 266.8 / 46.16, rtol=1e-3)  # millions of parameters
    assert "| Wang et al., WRN-70-16 | strong | 1,024 | 4 |" in slices_scaling.page(
        slices_scaling.SLICES["v6e-256"], content
    )


def test_what_hosts_has_recorded_is_not_done_again_and_errors_are(tmp_path, monkeypatch):
    called, out = [], tmp_path / "hosts.json"

    def trial(name):
        called.append(name)
        if name == "stop":
            raise RuntimeError("hangs | for ever")
        return {"at": 5, "codes": [69, 69], "seconds": 30.5, "difference": 0.0}

    for _ in range(2):
        records = hosts.Records(out, None)
        for name in ("kill", "stop"):
            about = {"part": "faults", "fault": name, "processes": 4, "trial": 0}
            records.add(about, lambda name=name: trial(name))
    assert called == ["kill", "stop", "stop"]
    rows = [line for line in out.with_suffix(".md").read_text(encoding="utf-8").splitlines() if "of one in" in line]
    assert "| 4 | 1 | 1 | 30.5 to 30.5 | 69 | 0.0e+00 |" in rows[0]
    late = hosts.Records(out, -1)
    late.add({"part": "elastic"}, lambda: trial("late"))
    assert late.left_out == 1 and "late" not in called
