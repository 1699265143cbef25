"""Model cards: a run becomes a folder as Hugging Face keeps networks, and a run again."""

import hashlib
import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
from conftest import Bomb, clean_recipe, untrained_run

from ibjax import config, convert, files
from ibjax.errors import CheckpointError, InputError
from ibjax.evaluation import card, report
from ibjax.evaluation.evaluate import evaluate
from ibjax.runs import run, trees
from ibjax.training import loop
from ibjax.training.experiment import build

EVIL = "*a_b* <img src=//evil.example/x> | [x](y)\n---\nlicense: mit"


def settings(**changes):
    recipe = clean_recipe()
    recipe.update(title=EVIL, epochs=1, checkpoint_every=1)
    recipe.model.widths = ((4,),)
    recipe.evaluate.update(attacks=("fgsm",), ladder=())
    with recipe.unlocked():
        recipe.update(changes)
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(an evaluated run, its card)."""
    validation = dict(clean_acc=50.0, robust_acc=25.0, select="clean")
    workdir = untrained_run(tmp_path_factory.mktemp("card") / "run", settings(), validation)
    evaluate(workdir)
    return workdir, card.to_card(workdir, workdir / "card")


def command(monkeypatch, *argv):
    """The exit code of ibjax.convert."""
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        convert.main()
    return ended.value.code


def test_a_network_that_comes_back_from_its_card_has_the_same_bits(made, tmp_path, monkeypatch, capsys):
    workdir, folder = made
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert command(monkeypatch, f"--card={folder}", f"--workdir={tmp_path / 'back'}") == 0
    assert f"{tmp_path / 'back'}: checkpoint best at step" in capsys.readouterr().out
    before, after = run.load(workdir), run.load(tmp_path / "back")
    assert trees.digest(before.variables) == trees.digest(after.variables) and before.step == after.step
    x = np.random.default_rng(0).random((4, *before.facts["input_shape"]), np.float32)
    np.testing.assert_array_equal(before.logits_fn(x), after.logits_fn(x))
    assert after.validation["robust_acc"] == before.validation["robust_acc"]
    # it is evaluated as before, and says of itself what the run said
    old, (new,) = files.read_json(workdir / "eval/best/fgsm.json"), evaluate(tmp_path / "back")
    same = ("robust_flags", "clean_acc", "weights", "images", "step", "selected_on", "title")
    assert {key: old[key] for key in same} == {key: new[key] for key in same}
    # and it teaches
    taught = settings(objective=dict(name="rslad"), teacher=dict(settings().teacher, workdir=str(tmp_path / "back")))
    taught.attack = dict(name="pgd", loss="kl", steps=1)
    loop.check(taught)
    assert build(taught).facts["teacher"]["weights"] == new["weights"]
    # training goes on in no folder of a card
    with pytest.raises((InputError, CheckpointError)):
        loop.train(build(settings(epochs=2)), tmp_path / "back")


def test_the_checkpoint_of_a_card_is_named_by_the_records_of_its_run(made, tmp_path):
    card.from_card(card.to_card(made[0], tmp_path / "last", "last"), tmp_path / "back")
    assert evaluate(tmp_path / "back")[0]["selected_on"] == "last"


def test_the_card_has_the_report_s_table_and_the_hub_s_metadata(made):
    workdir, folder = made
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    metadata = {key: json.loads(value) for key, value in (line.split(": ", 1) for line in front.splitlines())}
    assert {"jax", "adversarial-robustness", "ibjax"} < set(metadata["tags"]) and metadata["metrics"] == ["accuracy"]
    (found,) = report.read([workdir])
    (record,) = found.records
    (index,) = metadata["model-index"]
    assert index["name"] == EVIL
    values = {each["name"]: each["value"] for each in index["results"][0]["metrics"]}
    n = record["n"]
    name = f"accuracy under FGSM, linf, eps {record['eps']}, n = {n}"
    assert values == {f"clean accuracy, n = {n}": record["clean_acc"], name: record["robust_acc"]}
    assert f"| {record['clean_acc']:.2f} | {record['robust_acc']:.2f} |" in body
    assert "license" not in metadata
    assert not re.search(r"(?<!\\)<img|^license|(?<!\\)\*a", body.partition("## Recipe")[0], re.MULTILINE)
    recipe = json.loads(body.partition("```json\n")[2].partition("\n```")[0])
    assert recipe["objective"] == config.plain(run.load(workdir).config)["objective"]
    assert "ibjax.convert --card=CARD --workdir=RUN" in body and "It has not been evaluated" not in body


def test_a_card_names_no_folder_of_this_machine(made, tmp_path):
    workdir, _ = made
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("card"))
    content = files.read_json(tmp_path / "run" / "config.json")
    content["config"]["teacher"]["workdir"] = "/home/alice/teacher"
    content["config"]["data"]["data_dir"] = "/home/alice/data"
    content["config"]["objective"]["name"] = "/home/alice/my.py:my"  # code of one's own
    content["config"]["writers"] = ("/home/alice/my.py:MyWriter",)
    published = card._published(run.load(workdir)._replace(config=config.ConfigDict(content["config"])))
    assert "alice" not in json.dumps(config.plain(published)) and published.data.data_dir == "data"
    assert published.objective.name == "my.py:my"  # which is looked for beside config.json


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_any_changed_byte_is_found_and_nothing_is_written(made, tmp_path, name):
    shutil.copytree(made[1], tmp_path / "card")
    file = tmp_path / "card" / name
    content = file.read_bytes()
    for i in np.linspace(0, len(content) - 2, 12).astype(int):
        if content[i : i + 1].isspace():
            continue
        file.write_bytes(content[:i] + bytes([content[i] ^ 0x02]) + content[i + 1 :])
        with pytest.raises(InputError, match=r"damaged|SHA-256|not that of a card"):
            card.from_card(tmp_path / "card", tmp_path / "back")
    file.unlink()
    with pytest.raises(InputError, match=r"config\.json|is missing"):
        card.from_card(tmp_path / "card", tmp_path / "back")
    assert [entry.name for entry in tmp_path.iterdir()] == ["card"]


def test_weights_of_another_network_are_refused_even_with_their_digest(made, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(made[1], tmp_path / "card")
    file, tensors = tmp_path / "card" / "model.safetensors", load_file(made[1] / "model.safetensors")
    name = sorted(tensors)[0]

    def refused(tensors, match):
        save_file(tensors, file)
        content = files.read_json(made[1] / "config.json")
        content["card"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        files.write_json(tmp_path / "card" / "config.json", content)
        with pytest.raises(CheckpointError, match=match):
            card.from_card(tmp_path / "card", tmp_path / "back")

    refused({**tensors, name: tensors[name][:1]}, f"is of another network: {name} is float32")
    refused({key: value for key, value in tensors.items() if key != name}, f"{name} is nothing")
    refused({**tensors, "more": tensors[name]}, "more is float32.*makes it nothing")
    refused({**tensors, name: tensors[name] + 1}, "does not hold the weights of config.json")


def test_nothing_is_unpickled(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "card")
    file = tmp_path / "card" / "model.safetensors"
    file.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    content = files.read_json(made[1] / "config.json")
    content["card"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    files.write_json(tmp_path / "card" / "config.json", content)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        card.from_card(tmp_path / "card", tmp_path / "back")
    assert not (tmp_path / "executed").exists()


def test_options_of_the_data_s_place_may_change_and_no_others(made, tmp_path):
    with pytest.raises(InputError, match=r"holds a run with seed=.*now 9 is asked for"):
        card.from_card(made[1], tmp_path / "back", ["--config.seed=9"])
    card.from_card(made[1], tmp_path / "back", ["--config.title=mine"])
    assert run.load(tmp_path / "back").config.title == "mine"


def test_the_command_line(made, tmp_path, monkeypatch, capsys):
    workdir, folder = made
    assert command(monkeypatch, f"--workdir={workdir}", "--to=card", f"--out={tmp_path / 'c'}") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'c'}\n"
    assert [each.folder for each in report.read([workdir])] == [workdir]  # the card in it is no run
    for wrong, said in (
        ((f"--workdir={workdir}", "--to=card"), f"{folder} exists and is not an empty folder"),
        ((f"--workdir={workdir}",), "give --torch FILE --arch NAME (or --zoo NAME) or --card FOLDER"),
        ((f"--workdir={workdir}", "--to=card", f"--card={folder}"), "give --torch FILE"),
        ((f"--workdir={workdir}", "--to=torch"), "--to torch needs --out FOLDER"),
        ((f"--workdir={workdir}", "--to=other", f"--out={tmp_path / 'o'}"), "--out goes with --to card or --to torch"),
        ((f"--workdir={tmp_path / 'b'}", f"--card={folder}", "--arch=vgg"), "--arch names a PyTorch network"),
        ((f"--workdir={tmp_path / 'b'}", f"--card={folder}", "--mean=0.5"), "go with --torch"),
        ((f"--workdir={workdir}", "--to=card", "--config.seed=1"), "--config.KEY=VALUE with --torch or --card"),
        ((f"--workdir={tmp_path / 'b'}", f"--card={workdir}"), "is not that of a card of ibjax"),
        ((f"--workdir={tmp_path / 'b'}", f"--card={tmp_path}"), "has no config.json"),
    ):
        assert command(monkeypatch, *wrong) == 2, wrong
        assert said in capsys.readouterr().err
