"""Networks of one's own: the examples of docs/own_network.md, and the records and report of `ibjax.benchmark`."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import ibjax
from ibjax import calls, config, files, main
from ibjax.errors import InputError
from ibjax.evaluation import benchmark as module
from ibjax.evaluation import evaluate, report, results
from ibjax.runs import rundir

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


@pytest.mark.slow
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


@pytest.fixture
def folder(tmp_path):
    """The files of the page, and one whose factory makes an instance."""
    pytest.importorskip("equinox")
    instance = "from .my_nnx import Model as Net\nfrom flax import nnx\n\n\n"
    instance += "def Model(num_classes: int):\n    return Net(num_classes, rngs=nnx.Rngs(0))\n"
    for name, source in {**FILES, "made.py": instance}.items():
        (tmp_path / name).write_text(source)
    return tmp_path


def test_a_class_of_another_library_is_a_factory_of_linen_modules_with_checked_options(folder, lenient):
    for library in ("nnx", "equinox"):
        section = dict(name=f"{folder}/my_{library}.py", width=4)
        model = calls.build("models", section, "model", num_classes=10)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        assert isinstance(model, linen.Module) and shapes.keys() == {"params", "batch_stats"}
        for wrong, words in ((dict(widht=4), "did you mean 'width'"), (dict(width="a"), "takes int")):
            with pytest.raises(InputError, match=words):
                calls.arguments("models", {**section, **wrong}, "model", ("num_classes",))
    with pytest.raises(InputError, match=r"is a Model; name its class, or return ibjax\.wrap\.linen_from_nnx"):
        calls.build("models", dict(name=f"{folder}/made.py"), "model", num_classes=10)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_class_of_another_library_trains_by_its_name(library, folder, lenient):
    short = ["epochs=1", "data.fraction=0.1", "attack.steps=1", "validate.attack.steps=1", "evaluate.n=32"]
    short += ["evaluate.attacks=('fgsm',)", f"model.name={folder}/my_{library}.py"]
    words = ["main", f"--config={folder / 'my_recipe.py'}", f"--workdir={folder / 'run'}"]
    main.execute(*main.parse([*words, *(f"--config.{option}" for option in short)]))
    record = files.read_json(folder / "run/eval/best/fgsm.n32.json")
    assert record["config"]["model"]["width"] == 16 and "model" in record["own_code"]
    trained = ibjax.load(folder / "run")  # this process has trained it
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


def given(**options):
    """Arguments of a benchmark of the linear network."""
    return dict(network=linear, data=(X, Y), threat=THREAT, attacks=("fgsm",), title="Linear") | options


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, records) of a benchmark of the linear network."""
    folder = tmp_path_factory.mktemp("benchmark") / "b"
    return folder, ibjax.benchmark(**given(workdir=folder))


def test_on_a_linear_network_nothing_is_broken_that_cannot_be(made):
    folder, (record,) = made
    flags = results.robust_flags(record)
    assert not np.any(robust() & ~flags) and 0 < flags.mean() < 1 and record["clean_acc"] == 100
    assert (record["title"], record["dataset"], record["checkpoint"]) == ("Linear", "given images", "given")
    assert record["config"]["model"]["network"] == "linear" and record["train_threat"] == "unknown"
    assert "given to ibjax.benchmark: linear, jax" in (folder / "report.html").read_text()
    assert report.table(report.read([folder])[0].records) == report.table([record])


def test_a_second_call_computes_nothing_and_another_threat_model_stands_beside_the_first(made, monkeypatch):
    folder, records = made
    ibjax.benchmark(**given(threat=("l2", 0.1), workdir=folder))
    assert sorted(file.name for file in (folder / "eval/given").glob("*.json")) == [
        "fgsm.json",
        "fgsm.l2.eps0.1.json",
    ]
    monkeypatch.setattr(evaluate, "_executor", None)  # nothing may be attacked
    assert ibjax.benchmark(**given(workdir=folder)) == json.loads(json.dumps(records))


def test_no_training_takes_the_folder_of_a_benchmark(made):
    before = (made[0] / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"holds the records of ibjax\.benchmark; give another --workdir"):
        rundir.write_config(made[0], config.base(), {"input_shape": [8, 8, 1], "num_classes": 10})
    assert (made[0] / "config.json").read_bytes() == before


def test_a_run_has_the_same_flags_as_in_its_evaluation(digits_run):
    trained = ibjax.load(digits_run)
    record = next(
        record for file in sorted((digits_run / "eval/best").glob("*.json"))
        if (record := json.loads(file.read_text()))["attack"].startswith("pgd") and record["main"]
    )  # fmt: skip
    threat, n = (record["norm"], record["eps"]), record["n"]
    (found,) = ibjax.benchmark(
        trained, config.plain(trained.config.data), threat=threat, attacks=(record["attack"],), n=n
    )
    keys = ("robust_flags", "clean_acc", "images", "dataset", "attack_settings", "step_size", "chance_acc")
    assert {key: found[key] for key in keys} == {key: record[key] for key in keys}
    x, y = trained.test(n)
    assert x.dtype == jnp.float32 and float(x.max()) <= 1 and y.shape == (n,)


def test_what_cannot_be_benchmarked_is_refused_in_one_line_and_nothing_is_written(made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()

    def of(network=linear, **options):
        return given(network=network, workdir=tmp_path / "new") | options

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
        "holds the benchmark of another network": of(lambda x: -linear(x), workdir=made[0]),
        "holds the benchmark of another data": of(data=(X[:20], Y[:20]), workdir=made[0]),
        "holds something else": of(workdir=tmp_path / "full"),
    }
    for words, arguments in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            ibjax.benchmark(**arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match=r"holds the records of ibjax\.benchmark, not the network"):
        ibjax.load(made[0])


def test_objects_of_other_libraries_are_refused_with_the_function_that_wraps_them():
    torch = pytest.importorskip("torch")
    for network, words in (
        (torch.nn.Linear(2, 2), r"wrap\.pytorch\(module\)"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), r"wrap\.nnx\(model\)"),
        (linen.Dense(2), r"wrap\.linen\(model, variables\)"),
    ):
        with pytest.raises(InputError, match=words):
            ibjax.benchmark(network, (X, Y))


def test_programs_that_call_back_into_python_are_found_wherever_they_do():
    def called_back(x):
        return jax.lax.map(lambda v: jax.pure_callback(np.sin, jax.ShapeDtypeStruct(v.shape, v.dtype), v), x)

    for f, expected in ((jnp.sin, False), (called_back, True), (jax.jit(jax.checkpoint(called_back)), True)):
        assert module._calls_back(jax.make_jaxpr(f)(X[:2]).jaxpr) is expected
