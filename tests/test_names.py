"""Attacks by name: what a name and its options stand for, how they are written, and that records keep them."""

import functools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_recipe, untrained_run
from jax.sharding import AxisType

from ibjax import evaluate as evaluate_command
from ibjax import files
from ibjax.attacks import names
from ibjax.attacks.autoattack import sub_attacks
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.mim import mim
from ibjax.attacks.pgd import pgd
from ibjax.attacks.spsa import spsa
from ibjax.attacks.targeted import targeted
from ibjax.data import Split
from ibjax.errors import InputError
from ibjax.evaluation import evaluate, report, results, scoring
from ibjax.evaluation.named import ATTACKS, FAMILIES, check, named, takes_step_size
from ibjax.evaluation.report import runs, tables
from ibjax.objectives import siriib
from ibjax.runs import command_line, run

RNG = np.random.default_rng(7)
X = RNG.random((6, 4, 4, 1), dtype=np.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
Y = np.int32(np.sin(3 * (X.reshape(6, 16) @ np.asarray(WEIGHTS))).argmax(1))  # as the network has it
KEY = jax.random.key(0)
# another value of each option than its default
OTHER = dict(
    loss="margin", init="gaussian", restarts=2, step_size="1/255", decay=0.5, samples=3, delta=0.02, lr=0.1, c=0.1,
    kappa=1.0, torchattacks_compat=True, steps=7, targets=2, queries=9, p_init=0.3, alpha=0.1, beta=0.2,
    layers="pre_logits", y_kernel="linear", group=4, lam=20.0, count="attacked", draws=9, towards=1, overshoot=0.1,
    search_dtype="bfloat16",
)  # fmt: skip
FORMS = {**ATTACKS, **{f"{name}-3": form for name, form in FAMILIES.items()}}


def network(x):
    """Winding enough for every option to lead elsewhere."""
    return jnp.sin(3 * (x.reshape(len(x), -1) @ WEIGHTS))


# ---- how names are written ---------------------------------------------------------------------------------


def test_commas_within_parentheses_belong_to_a_name():
    assert names.split("fgsm, cw-l2-200(c=0.1, lr=0.1),pgd-20") == ["fgsm", "cw-l2-200(c=0.1, lr=0.1)", "pgd-20"]
    assert command_line.comma_list("cat, dog (big, brown)") == ["cat", "dog (big, brown)"]


@pytest.mark.parametrize(
    "given, expected",
    [
        (" pgd-20 ", "pgd-20"),
        ("cw-l2-200( lr = 0.10 , c=1e-1 )", "cw-l2-200(c=0.1,lr=0.1)"),
        ("cw-l2-200(c=1.0)", "cw-l2-200(c=1)"),
        ("cw-100", "margin-100"),
        ("cw-100(restarts=2) from cw-100 (old)", "margin-100(restarts=2) from cw-100 (old)"),
        ("ib_rar-10(layers=stage1,stage2,beta=1)", "ib_rar-10(beta=1,layers=stage1,stage2)"),
        ("pgd-20(step_size=1/255)", "pgd-20(step_size=1/255)"),
    ],
)
def test_one_attack_has_one_name(given, expected):
    assert names.canonical(given) == expected == names.canonical(expected)


@pytest.mark.parametrize("name", FORMS)
def test_every_name_takes_its_options_states_them_and_refuses_others(name):
    for option in (*FORMS[name].options(), "count"):
        value = "ce" if option == "loss" and name in ("margin-3", "spsa-3") else OTHER[option]
        value = 0.8 if (option, name) == ("p_init", "sparse-rs") else value
        whole = names.add(name, **{option: value})
        made = named(whole).settings
        assert value in (made.get(option), made.get("options", {}).get(option))
        assert named(name).settings != made
        assert named(whole).count == ("attacked" if option == "count" else "both")
    with pytest.raises(InputError, match=r"has no option 'steep_size'; allowed: .*count"):
        named(f"{name}(steep_size=1/255)")


@pytest.mark.parametrize(
    "name, words",
    [
        ("pgd-20(restats=3)", "did you mean 'restarts'"),
        ("pgd-20(restarts=2.5)", "give it as restarts=1"),
        ("pgd-20(restarts=True)", "give it as restarts=1"),
        ("cw-l2-9(c=much)", r"give it as c=1\.0"),
        ("pgd-20(steps=3)", "write pgd-3"),
        ("pgd-20(", "cannot be read"),
        ("pgd-20()", "cannot be read"),
        ("pgd-20(restarts)", "at 'restarts'"),
        ("pgd-20(restarts=1,restarts=2)", "each option once"),
        ("pgd-20(count=all)", "count=all is unknown"),
        ("pdg-20(restarts=2)", "did you mean 'pgd-20'"),
        ("fgsm(step_size=1/255)", "no option 'step_size'"),
        ("pgd-20(eps=1/255)", "no option 'eps'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name, words):
    with pytest.raises(InputError, match=words) as caught:
        named(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, allowed, words",
    [
        ("pgd-3(loss=cee)", "pgd-3(loss=ce)", "loss 'cee' is unknown"),
        ("pgd-3(init=unifrom)", "pgd-3(init=uniform)", "init 'unifrom' is unknown"),
        ("pgd-3(restarts=0)", "pgd-3(restarts=1)", "restarts=0 is not allowed"),
        ("pgd-3(step_size=0)", "pgd-3(step_size=1/255)", "step_size=0 is not allowed"),
        ("pgd-3(step_size=9)", "pgd-3(step_size=0.9)", "step_size=9 is outside"),
        ("cw-l2-3(c=-1)", "cw-l2-3(c=0)", "c=-1 is not allowed"),
        ("spsa-3(samples=0)", "spsa-3(samples=1)", "samples=0 is not allowed"),
        ("square(queries=0)", "square(queries=1)", "queries=0 is not allowed"),
        ("apgd-ce(restarts=0)", "apgd-ce(restarts=1)", "restarts=0 is not allowed"),
        ("pgd-t-3(towards=given)", "pgd-t-3(towards=3)", "towards=given is for calls in Python"),
        ("pgd-t-3(towards=nearest)", "pgd-t-3(towards=next)", "towards='nearest' is unknown"),
        ("deepfool-3(overshoot=-1)", "deepfool-3(overshoot=0)", "overshoot=-1 is not allowed"),
        ("sparse-rs", "square", "norm 'linf' is unknown here; allowed: l0"),
        ("ib_rar-3(group=1)", "ib_rar-3(group=2)", "group=1 is not allowed"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(name, allowed, words):
    check(allowed, "linf", "8/255", "2/255")
    with pytest.raises(InputError, match=words):
        check(name, "linf", "8/255", "2/255")


# ---- what they stand for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, direct",
    [
        ("pgd-3(init=gaussian,loss=margin,step_size=0.07)",
         lambda: pgd(eps=0.1, step_size=0.07, steps=3, loss="margin", init="gaussian")),
        ("pgd-t-3(loss=margin,towards=1)",
         lambda: targeted(towards=1, loss="margin", eps=0.1, step_size=0.03, steps=3)),
        ("deepfool-3(overshoot=0.5)", lambda: deepfool(eps=0.1, steps=3, overshoot=0.5)),
        ("fgsm(init=uniform)", lambda: pgd(eps=0.1, step_size=0.1, steps=1)),
        ("mim-3(decay=0.5)", lambda: mim(eps=0.1, step_size=0.03, steps=3, decay=0.5)),
        ("spsa-2(samples=4)", lambda: spsa(eps=0.1, steps=2, samples=4)),
        ("cw-l2-9(c=5,lr=0.1)", lambda: cw(c=5.0, lr=0.1, steps=9)),
    ],
)  # fmt: skip
@jax.numpy_dtype_promotion("standard")  # optax's Adam raises its rates to a whole number
def test_options_reach_the_attack(name, direct):
    def of(name):
        attack = named(name)
        return attack.make(norm="linf", eps=0.1, step_size=attack.step_size(0.1, 0.03))

    attacks = of(name), direct(), of(names.parse(name)[0])
    x_adv, same, usual = jax.jit(lambda x, y: [attack(KEY, network, x, y) for attack in attacks])(X, Y)
    np.testing.assert_array_equal(x_adv, same)
    assert np.abs(x_adv - usual).max() > 1e-4


def test_options_of_autoattacks_parts_come_in_place_of_the_versions():
    for name, key, value in (("apgd-ce", "steps", 7), ("apgd-t", "targets", 2), ("fab", "restarts", 3)):
        changed, _ = named(f"{name}({key}={value})").parts("linf", 0.1, 10)
        usual, _ = sub_attacks("standard", "linf", 0.1, 10, [name])
        assert json.loads(json.dumps(changed[name].identity())) != json.loads(json.dumps(usual[name].identity()))
        assert named(f"{name}({key}={value})").of_autoattack()["options"] == {key: value}
    assert named("square(queries=9)").parts("linf", 0.1, 10)[0]["square"].steps < 20
    assert named("apgd-ce").of_autoattack() == dict(version="standard", attacks=["apgd-ce"])
    assert named("apgd-ce(count=attacked)").of_autoattack() == dict(version="standard", attacks=["apgd-ce"])


def test_lam_weighs_what_siriib_adds_to_cross_entropy(monkeypatch):
    seen = []
    monkeypatch.setattr(siriib, "adaptive_attack", lambda **options: seen.append(options))
    for name in ("siriib-2", "siriib-2(lam=20)", "siriib-svd-2(lam=20,restarts=3)"):
        named(name).make(norm="linf", eps=0.1, step_size=0.03)
    assert [(made["terms"], made["weights"]) for made in seen] == [
        (("ce", "svd", "info"), (1.0, 1.0, 1.0)), (("ce", "svd", "info"), (1.0, 20, 20)), (("svd",), (20,))
    ]  # fmt: skip
    assert "restarts" not in seen[0] and seen[2]["restarts"] == 3


def test_count_attacked_counts_what_only_the_attack_makes_right():
    """Of four images: right both ways, as it is, under the attack, neither."""
    clean, attacked = jnp.array([1, 1, 0, 0]), jnp.array([1, 0, 1, 0])
    split = Split((np.arange(4, dtype=np.uint8) * 10).reshape(4, 1, 1, 1), np.ones(4, np.int32))

    def predict(variables, x, keys):
        number = jnp.round(x[:, 0, 0, 0] * 25.5)
        was_attacked, index = jnp.abs(x[:, 0, 0, 0] * 25.5 - number) > 0.01, number.astype(int)
        right = jnp.where(was_attacked, attacked[index], clean[index])
        return jax.nn.one_hot(right, 2), {}

    def make(eps, step_size):
        return lambda key, logits_fn, x, y: x + 0.004

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    score = functools.partial(scoring.Scorer, predict, make, mesh, 4, "linf")
    flags, _ = score()({}, split, 0, eps=0.1, step_size=0.1)
    assert flags.robust.tolist() == [True, False, False, False] and flags.clean.tolist() == [True, True, False, False]
    flags, _ = score(count="attacked")({}, split, 0, eps=0.1, step_size=0.1)
    assert flags.robust.tolist() == [True, False, True, False] and flags.clean.tolist() == [True, True, False, False]


def test_a_step_size_is_that_of_attacks_that_leave_it_open():
    assert [name for name in FORMS if takes_step_size(name)] == [
        name for name in FORMS if name.split("-")[0] in ("pgd", "margin", "bim", "mim", "nifgsm", "siriib")
        and not name.startswith("pgd-scaled")
    ]  # fmt: skip
    assert not takes_step_size("pgd-3(step_size=1/255)")


# ---- labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, label",
    [
        ("margin-100", "margin PGD-100"),
        ("cw-100", "margin PGD-100"),
        ("cw-l2-200(c=0.1,lr=0.1)", "C&W l2-200 (any size, c 0.1, lr 0.1)"),
        ("pgd-20(count=attacked,restarts=5)", "PGD-20 (restarts 5, judged under attack only)"),
        ("pgd-20(restarts=5) from teacher (old)", "PGD-20 (restarts 5), transfer from teacher (old)"),
        ("square(queries=10)", "Square (queries 10)"),
        ("pgd-t-20(towards=next)", "targeted PGD-20 (towards next)"),
        ("sparse-rs", "Sparse-RS"),
    ],
)
def test_a_label_says_what_is_not_the_default(name, label):
    assert results.attack_label(name) == label


def test_options_come_after_the_plain_attack():
    order = ["fgsm", "pgd-20", "pgd-20(restarts=5)", "pgd-100", "margin-20", "margin-20(restarts=5) from x"]
    assert sorted(set(order), key=results.strength) == order


# ---- records -------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "digits", ignore=shutil.ignore_patterns(".lock"))


def test_options_are_in_records_files_and_tables(digits):
    asked = ("pgd-2( restarts=2 )", "pgd-2(step_size=1/255)", "fgsm(count=attacked)", "pgd-2", "pgd-2")
    own = {**run.load(digits).config.evaluate.to_dict(), "ladder": ("4/16",)}
    records = [record for record in evaluate.evaluate(digits, settings=own, attacks=asked) if record["main"]]
    assert [record["attack"] for record in records] == [
        "pgd-2(restarts=2)", "pgd-2(step_size=1/255)", "fgsm(count=attacked)", "pgd-2"
    ]  # fmt: skip
    assert records[0]["attack_settings"]["restarts"] == 2
    assert records[1]["step_size"] == "1/255" == records[1]["attack_settings"]["step_size"]
    assert records[2]["attack_settings"]["count"] == "attacked"
    folder = digits / "eval/best"
    assert (folder / "pgd-2(restarts=2).json").is_file() and (folder / "pgd-2(step_size=1_255).json").is_file()
    ladder = json.loads((folder / "pgd-2(step_size=1_255)@4_16.json").read_text())
    assert np.isclose(ladder["step_size"], 2 / 255)  # twice the eps, twice the step
    (table,) = tables.tables(records)
    assert tables.cells(table)[0][4:8] == [
        "FGSM (judged under attack only)", "PGD-2", "PGD-2 (restarts 2)", "PGD-2 (step_size 1/255)"
    ]  # fmt: skip
    (found,) = (part for part in runs.read([digits]) if part.folder == digits)
    assert {"pgd-2(step_size=1/255)", "fgsm(count=attacked)"} <= {record["attack"] for record in found.records}


@pytest.fixture(scope="module")
def once_evaluated(tmp_path_factory):
    """A run that has taken no step, with the records of two attacks."""
    model = dict(name="cnn", widths=(), hidden=())
    settings = small_recipe(model=model, attacks=("pgd-1", "margin-1"))
    workdir = untrained_run(tmp_path_factory.mktemp("once") / "run", settings)
    evaluate.evaluate(workdir)
    return workdir


@pytest.fixture
def evaluated(once_evaluated, tmp_path):
    return shutil.copytree(once_evaluated, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))


def test_a_step_size_of_one_evaluation_is_an_option_of_its_attacks(evaluated):
    own = (evaluated / "eval/best/pgd-1.json").read_bytes()
    records = evaluate.evaluate(evaluated, attacks=("fgsm", "pgd-1"), step_size="1/64")
    mains = {record["attack"]: record["step_size"] for record in records if record["main"]}
    assert mains == {"fgsm": "8/255", "pgd-1(step_size=1/64)": "1/64"}
    assert (evaluated / "eval/best/pgd-1.json").read_bytes() == own


def test_what_was_called_cw_is_read_reused_and_called_margin(evaluated, caplog):
    folder = evaluated / "eval/best"
    for file in folder.glob("margin-1*"):  # as a run from before has it
        if file.suffix == ".json":
            file.write_text(json.dumps({**files.read_json(file), "attack": "cw-1"}))
        file.rename(file.with_name(file.name.replace("margin", "cw")))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert [record["attack"] for record in evaluate.evaluate(evaluated, attacks=("cw-1",))] == ["margin-1"]
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (found,) = runs.read([evaluated])
    assert "margin-1" in {record["attack"] for record in found.records}
    assert "margin PGD-1" in report.table(found.records)
    names.tell_of_old(["cw-2", "cw-l2-2", "margin-2", " pgd-2"])
    assert caplog.messages == ["attack 'cw-2' is called 'margin-2' now; the old name goes on working"]


def test_a_command_takes_names_with_spaces_and_options(digits, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_command.cluster, "initialize", lambda: None)
    command = [f"--workdir={digits}", "--attacks=fgsm, pgd-2(restarts=2, step_size=1/64)", "--n=8"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *command])
    with pytest.raises(SystemExit) as caught:
        evaluate_command.main()
    assert caught.value.code == 0 and "PGD-2 (restarts 2, step_size 1/64)" in capsys.readouterr().out


def test_a_transfer_is_from_the_checkpoint_that_is_asked_for(digits):
    other = digits / "undefended"
    for checkpoint in ("best", "last"):
        record = evaluate.evaluate(digits, attacks=("fgsm",), surrogate=other, surrogate_checkpoint=checkpoint)[0]
        assert record["attack_settings"]["surrogate"]["step"] == run.load(other, checkpoint).step
    with pytest.raises(InputError, match="'99' is not in"):
        evaluate.evaluate(digits, attacks=("fgsm",), surrogate=other, surrogate_checkpoint="99")
