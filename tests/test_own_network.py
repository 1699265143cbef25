"""Networks of one's own: the examples of docs/own_network.md, and the records and report of `ibjax.benchmark`."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ibjax
from ibjax import files, main, wrap
from ibjax.errors import InputError
from ibjax.evaluation import benchmark as module
from ibjax.evaluation import evaluate, results

PAGE = (Path(__file__).parent.parent / "docs" / "own_network.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
FILES = {block.split("\n")[0].removeprefix("# "): block for block in BLOCKS if re.match(r"# \w+\.py\n", block)}
CALLS = [block for block in BLOCKS if not block.startswith("# my_") and '"Carmon2019Unlabeled.pt"' not in block]


@pytest.fixture
def lenient():
    """Other libraries rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_calls_of_the_page_run(tmp_path, monkeypatch, lenient):
    monkeypatch.chdir(tmp_path)
    for library in ("equinox", "haiku", "torch"):
        pytest.importorskip(library)
    made = {}
    for block in CALLS:
        exec(block, made)
    assert made["logits"].shape == (10, 10) and made["x_adv"].shape == (10, 8, 8, 1)
    (fgsm, pgd) = made["records"]
    assert (fgsm["attack"], pgd["attack"], pgd["n"]) == ("fgsm", "pgd-10", 100)
    assert pgd["imported"]["library"] == "torch" and pgd["max_distance"] <= 0.1 + 1e-6
    page = (tmp_path / "runs/mine/report.html").read_text()
    assert "given to ibjax.benchmark: torch.nn.modules.container.Sequential" in page and "My network" in page
    assert f"`ibjax.zoo` knows {len(made['zoo'].names())} published networks" in PAGE


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_class_of_another_library_trains_by_its_name(library, tmp_path, lenient):
    if importlib.util.find_spec("equinox" if library == "equinox" else "flax") is None:
        pytest.skip(f"needs {library}")
    for name, source in FILES.items():
        (tmp_path / name).write_text(source)
    short = ["epochs=1", "data.fraction=0.1", "attack.steps=1", "validate.attack.steps=1", "evaluate.n=32"]
    short += ["evaluate.attacks=('fgsm',)", f"model.name={tmp_path}/my_{library}.py"]
    words = ["main", f"--config={tmp_path / 'my_recipe.py'}", f"--workdir={tmp_path / 'run'}"]
    main.execute(*main.parse([*words, *(f"--config.{option}" for option in short)]))
    record = files.read_json(tmp_path / "run/eval/best/fgsm.json")
    assert record["config"]["model"]["width"] == 16 and "model" in record["own_code"]
    trained = ibjax.load(tmp_path / "run")  # this process has trained it
    x, y = trained.test(32)
    assert (np.asarray(trained.logits_fn(x)).argmax(1) == np.asarray(y)).mean() == record["clean_acc"] / 100


# ---- records -------------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).uniform(size=(30, 5, 5, 1)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).normal(size=(25, 4)).astype(np.float32)


def linear(x):
    return x.reshape(len(x), -1) @ WEIGHTS


Y = (X.reshape(30, -1) @ WEIGHTS).argmax(1)
THREAT = ("linf", 0.02)


def robust():
    """On which images the margin exceeds what eps can change: exactly those that are robust."""
    logits = (X.reshape(30, -1) @ WEIGHTS).astype(np.float64)
    slopes = np.abs(WEIGHTS[:, Y].T[:, :, None] - WEIGHTS).sum(1)  # (30, 4); pixels at the border make this a bound
    margins = logits[np.arange(30), Y, None] - logits
    return np.all((margins > THREAT[1] * slopes) | (np.arange(4) == Y[:, None]), axis=1)


def test_a_second_call_computes_nothing_and_another_threat_model_stands_beside_the_first(tmp_path, monkeypatch):
    def call(threat=THREAT, **options):
        given = {"threat": threat, "attacks": ("pgd-5", "fgsm"), "title": "Linear", **options}
        return ibjax.benchmark(linear, (X, Y), workdir=tmp_path / "b", **given)

    first = call()
    flags = results.robust_flags(first[0])
    assert not np.any(robust() & ~flags) and 0 < flags.mean() < 1  # nothing is broken that cannot be
    assert first[0]["clean_acc"] == 100 and first[0]["title"] == "Linear" and first[0]["dataset"] == "given images"
    assert first[0]["config"]["model"]["network"] == "linear" and first[0]["train_threat"] == "unknown"
    call(("l2", 0.1), attacks=("fgsm",))
    names = sorted(file.name for file in (tmp_path / "b/eval/given").glob("*.json"))
    assert names == ["fgsm.json", "fgsm.l2.eps0.1.json", "pgd-5.json"]
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "_executor", None)  # nothing may be attacked
        assert call() == first
    alone = ibjax.benchmark(wrap.function(linear), (X, Y), threat=THREAT, attacks=("pgd-5",), title="Linear")
    assert alone[0]["robust_flags"] == first[0]["robust_flags"] and alone[0]["weights"] == first[0]["weights"]


def test_a_run_has_the_same_flags_as_in_its_evaluation(digits_run):
    trained = ibjax.load(digits_run)
    record = next(
        record for file in sorted((digits_run / "eval/best").glob("*.json"))
        if (record := json.loads(file.read_text()))["attack"].startswith("pgd") and record["main"]
    )  # fmt: skip
    threat, n = (record["norm"], record["eps"]), record["n"]
    (found,) = ibjax.benchmark(trained, "digits", threat=threat, attacks=(record["attack"],), n=n)
    keys = ("robust_flags", "clean_acc", "images", "dataset", "attack_settings", "step_size", "chance_acc")
    assert {key: found[key] for key in keys} == {key: record[key] for key in keys}
    x, y = trained.test(n)
    assert x.dtype == jnp.float32 and float(x.max()) <= 1 and y.shape == (n,)


def test_what_cannot_be_benchmarked_is_refused_in_one_line_and_nothing_is_written(tmp_path):
    ibjax.benchmark(linear, (X, Y), threat=THREAT, attacks=("fgsm",), workdir=tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()

    def of(network=linear, data=(X, Y), **options):
        return dict(network=network, data=data, workdir=tmp_path / "new", threat=THREAT, attacks=("fgsm",)) | options

    cases = {
        "reach|lie in.*divide by 255|float images must lie": of(data=(X * 255, Y)),
        "labels lie in": of(data=(X, Y + 4)),
        "labels have shape": of(data=(X, Y[:3])),
        "logits have shape": of(lambda x: x),
        "JAX cannot trace": of(lambda x: np.asarray(x).reshape(len(x), -1) @ WEIGHTS),
        "give norm and eps": of(threat="linf"),
        "write 8 grey levels as '8/255'": of(threat=("linf", 8)),
        "attack 'pgd' is unknown": of(attacks=("pgd",)),
        "give names": of(attacks="fgsm"),
        "n=100 is not allowed": of(n=100),
        "seed=-1": of(seed=-1),
        "data is a int": of(data=3),
        "has no nodata": of(data=dict(name="tfds", dataset="nodata", data_dir=str(tmp_path))),
        "wrap.function was given a int": of(3),
        "other images of its batch": of(lambda x: linear(x - x.mean())),
        "holds the benchmark of another network": of(lambda x: -linear(x), workdir=tmp_path / "b"),
        "holds the benchmark of another data": of(data=(X[:20], Y[:20]), workdir=tmp_path / "b"),
        "holds something else": of(workdir=tmp_path / "full"),
    }
    for words, given in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            ibjax.benchmark(**given)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new/report.html").exists()
    with pytest.raises(InputError, match=r"holds records of ibjax\.benchmark, but not its network"):
        ibjax.load(tmp_path / "b")


def test_objects_of_other_libraries_are_refused_with_the_function_that_wraps_them():
    torch, flax = pytest.importorskip("torch"), pytest.importorskip("flax")
    rngs = flax.nnx.Rngs(0)
    for network, words in (
        (torch.nn.Linear(2, 2), r"wrap\.pytorch\(module\)"),
        (flax.nnx.Linear(2, 2, rngs=rngs), r"wrap\.nnx\(model\)"),
        (flax.linen.Dense(2), r"wrap\.linen\(model, variables\)"),
    ):
        with pytest.raises(InputError, match=words):
            ibjax.benchmark(network, (X, Y))


def test_programs_that_call_back_into_python_are_found_wherever_they_do():
    def called_back(x):
        return jax.lax.map(lambda v: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(v.shape, v.dtype), v), x)

    for f, expected in ((jnp.sin, False), (called_back, True), (jax.jit(jax.checkpoint(called_back)), True)):
        assert module._calls_back(jax.make_jaxpr(f)(X[:2]).jaxpr) is expected
