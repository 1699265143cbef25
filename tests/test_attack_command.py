"""ibjax attack: the images of a file, attacked on a run's network or on that of a PyTorch file."""

import json
import re
import sys

import jax
import numpy as np
import pytest

import ibjax
from ibjax import attack, files
from ibjax.data import npz
from ibjax.devices import cluster
from ibjax.errors import DataError, InputError
from ibjax.evaluation import results
from ibjax.net import to_float
from ibjax.pytorch.architectures import ARCHITECTURES
from ibjax.runs import run


@pytest.fixture
def command(monkeypatch, capsys):
    """(arguments) -> (exit code, stdout, stderr) of `python -m ibjax.attack`, in this process."""
    monkeypatch.setattr(cluster, "initialize", lambda: None)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["attack", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            attack.main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out, printed.err.strip()

    return call


@pytest.fixture(scope="module")
def images(digits_run, tmp_path_factory):
    """(an .npz with the test images of `digits_run`, these images)."""
    split = run.test_split(ibjax.load(digits_run))
    file = tmp_path_factory.mktemp("images") / "digits.npz"
    np.savez(file, x=split.images, y=split.labels)
    return file, split


def test_its_help_names_an_architecture_that_exists():
    (name,) = re.findall(r"--arch=(\w+)", attack.__doc__ or "")
    assert name in ARCHITECTURES


def test_it_ends_at_the_flags_of_the_run_s_own_evaluation_and_x_adv_shows_them(command, images, digits_run):
    """The same images, network, seed and attacks."""
    file, split = images
    code, printed, _ = command(file, f"--model={digits_run}", "--attacks=pgd-2,fgsm", "--batch_size=8")
    out = file.with_name("digits-attacked.npz")
    assert code == 0 and str(out) in printed and "PGD-2" in printed
    found = files.read_npz(out)
    assert list(found["attacks"]) == ["pgd-2", "fgsm"] and np.array_equal(found["y"], split.labels)
    network = ibjax.load(digits_run)
    x = np.asarray(to_float(split.images))
    for name, x_adv, robust, text in zip(
        *(found[key] for key in ("attacks", "x_adv", "robust", "records")), strict=True
    ):
        record = json.loads(text)
        results.validate(record)
        own = files.read_json(digits_run / f"eval/best/{name}.json")
        assert np.array_equal(robust, results.robust_flags(own)) and record["weights"] == own["weights"]
        assert record["dataset"] == "digits" and record["robust_acc"] == own["robust_acc"]
        assert x_adv.shape == x.shape and x_adv.dtype == np.float32
        assert np.abs(x_adv - x).max() <= 2 / 16 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
        kept = [np.asarray(network.logits_fn(each)).argmax(1) == split.labels for each in (x, x_adv)]
        assert np.array_equal(robust, kept[0] & kept[1])


def test_another_threat_model_and_fewer_images_can_be_asked_for(command, images, digits_run, tmp_path):
    file, split = images
    given = (f"--model={digits_run}", f"--out={tmp_path / 'a.npz'}", "--norm=l2", "--eps=0.5", "--n=10", "--seed=3")
    code, _, message = command(file, *given, "--attacks=pgd-2")
    assert code == 0, message
    found = files.read_npz(tmp_path / "a.npz")
    record = json.loads(str(found["records"][0]))
    assert (record["norm"], record["eps"], record["n"], record["seed"]) == ("l2", "0.5", 10, 3)
    assert found["x_adv"].shape == (1, 10, *split.images.shape[1:])


def test_a_pytorch_file_is_attacked_as_the_run_that_is_made_of_it(command, digits_run, images, tmp_path):
    """An exported network, read back: the same flags, and nothing but the output is written."""
    pytest.importorskip("torch")
    from ibjax import convert

    file, split = images
    convert.to_torch(digits_run, tmp_path / "exported", n=16)
    network = next((tmp_path / "exported").glob("*.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    code, _, message = command(
        file, f"--model={network}", "--arch=cnn", "--attacks=pgd-2", "--eps=2/16", f"--out={tmp_path / 'b.npz'}"
    )
    assert code == 0, message
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "b.npz"])
    found, own = files.read_npz(tmp_path / "b.npz"), files.read_json(digits_run / "eval/best/pgd-2.json")
    record = json.loads(str(found["records"][0]))
    assert np.array_equal(found["robust"][0], results.robust_flags(own)) and record["clean_acc"] == own["clean_acc"]
    assert record["train_threat"] == "unknown" and record["imported"]["max_delta_logit"] <= 1e-4
    assert record["imported"]["images"] == f"{len(split.labels)} images of digits"
    words = (f"--model={network}", "--arch=cnn", "--attacks=noise", "--n=5", f"--out={tmp_path / 'd.npz'}")
    assert command(file, *words)[0] == 0  # no more images are compared than are attacked
    assert (
        json.loads(str(files.read_npz(tmp_path / "d.npz")["records"][0]))["imported"]["images"] == "5 images of digits"
    )
    code, _, message = command(file, f"--model={network}", f"--out={tmp_path / 'c.npz'}")
    assert code == 2 and "--arch is missing" in message and "\n" not in message


WRONG = {
    "no such file": (["none.npz"], "none.npz is no file; give an .npz with x and y"),
    "no such model": (["images", "--model=none"], "none is neither the folder of a run nor a file"),
    "arch of a run": (["images", "--arch=cnn"], "is a run, which says all of its network"),
    "an unknown attack": (["images", "--attacks=pdg-20"], "did you mean 'pgd-20'"),
    "an out that is no npz": (["images", "--out=x.png"], "--out=x.png is not allowed"),
    "an out that is the input": (["images", "--out=images"], "give another file"),
    "too many images": (["images", "--n=99"], "--n=99 is not allowed; there are 16 images"),
    "a label that is no class": (["labels"], "labels: labels lie in [1, 10]; with 10 classes"),
    "another shape": (["shape"], "have shape (4, 4, 1), the network takes (8, 8, 1)"),
    "grey levels": (["grey"], "divide by 255"),
    "labels in a column, images without channel": (["keras", "--n=8", "--attacks=pdg-20"], "did you mean 'pgd-20'"),
    "a norm without eps": (["images", "--norm=l2"], "norm=l2 needs its own eps"),
    "a negative seed": (["images", "--seed=-1"], "--seed=-1 is not allowed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_writes_nothing(case, command, images, digits_run, tmp_path):
    words, said = WRONG[case]
    file, split = images
    x, y = split.images, split.labels
    made = {"labels": (x, np.where(y == y[0], 10, y)), "shape": (x[:, :4, :4], y), "grey": (x.astype(np.float32), y)}
    made["keras"] = x[..., 0], y[:, None]
    for name, (x, y) in made.items():
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    there = {name: tmp_path / f"{name}.npz" for name in made} | {"images": file}
    words = [str(there.get(word, word)).replace("=images", f"={file}") for word in words]
    words += [] if any(word.startswith("--out") for word in words) else [f"--out={tmp_path / 'out.npz'}"]
    words += [] if any(word.startswith("--model") for word in words) else [f"--model={digits_run}"]
    before = file.read_bytes()
    code, _, message = command(*words)
    assert code == 2 and message.startswith("error: ") and "\n" not in message and said in message, message
    assert not (tmp_path / "out.npz").exists() and file.read_bytes() == before


def test_images_without_a_channel_are_compared_with_one(images, digits_run):
    split = images[1]._replace(images=images[1].images[:, :4, :4, 0])
    with pytest.raises(InputError, match=r"images of mine have shape \(4, 4, 1\), the network takes \(8, 8, 1\)"):
        attack.attack_images(ibjax.load(digits_run), split, "mine")


def test_a_file_of_keras_s_layout_is_read_and_what_is_missing_is_named(tmp_path):
    x, y = np.zeros((2, 4, 4, 1), np.uint8), np.arange(2)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y[::-1])
    assert np.array_equal(npz.images(tmp_path / "a.npz").labels, [1, 0])
    np.savez(tmp_path / "a.npz", x_test=x[..., 0], y_test=y[::-1, None])  # MNIST's images, CIFAR's labels
    found = npz.images(tmp_path / "a.npz")
    assert found.images.shape == (2, 4, 4, 1) and np.array_equal(found.labels, [1, 0])
    for labels in (np.eye(2, dtype=int), y[:1]):
        np.savez(tmp_path / "a.npz", x=x, y=labels)
        with pytest.raises(DataError, match=r"a\.npz: y has shape \(.*\), x \(2, 4, 4, 1\); give one integer for each"):
            npz.images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=x, labels=y)
    with pytest.raises(DataError, match=r"b\.npz lacks x and y \(or x_test and y_test\); it holds x, labels"):
        npz.images(tmp_path / "b.npz")


@pytest.mark.slow
def test_autoattack_runs_on_such_images_too(images, digits_run):
    """Its flags are those of its own function, called by hand."""
    from ibjax.attacks import autoattack
    from ibjax.evaluation.evaluate import attack_images
    from ibjax.evaluation.settings import replaced

    network, (_, split) = ibjax.load(digits_run), images
    settings = replaced(network.config.evaluate, attacks=["apgd-ce(steps=2)"], batch_size=16)
    (record,), x_adv = attack_images(network, split, "mine", settings=settings)
    key = jax.random.fold_in(jax.random.key(network.config.seed), 0x65766C)
    found = autoattack.autoattack(
        key, network.logits_fn, np.asarray(to_float(split.images)), split.labels, norm="linf", eps="2/16",
        attacks=["apgd-ce"], options={"steps": 2}, batch_size=16,
    )  # fmt: skip
    assert np.array_equal(results.robust_flags(record), found.robust) and record["dataset"] == "mine"
    np.testing.assert_allclose(x_adv[0], found.x_adv, atol=1e-6)
