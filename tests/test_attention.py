"""IBD's attention of a run: restored from its checkpoint, against its formula, and the command."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import change_config
from PIL import Image
from test_ibd import attention_oracle

from ibjax import files
from ibjax.analysis import attention
from ibjax.attacks.pgd import pgd
from ibjax.devices import cluster
from ibjax.errors import CheckpointError, InputError
from ibjax.evaluation import scoring
from ibjax.net import linen_net, to_float
from ibjax.runs import checkpoint, run, rundir, trees
from ibjax.training.experiment import build, initial_state


@pytest.fixture
def workdir(digits_run, tmp_path):
    return Path(shutil.copytree(digits_run, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def edit(workdir, **changes):
    """Changes config.json, and of which run the checkpoints are: `objective__beta=0` is config.objective.beta."""
    change_config(workdir, **changes)
    own = rundir.identity(*rundir.read_config(workdir))
    for file in (workdir / "checkpoints").glob("*/manifest/metadata"):
        files.write_json(file, {**files.read_json(file), "run": own})


def test_the_matching_is_that_of_the_checkpoint(digits_run):
    """As the training would go on with it; for every step that is kept, and not as it began."""
    experiment = attention.experiment_of(digits_run)
    made = build(rundir.read_config(digits_run)[0], {"teacher": digits_run / "teacher"})
    first = initial_state(made)
    with checkpoint.manager(digits_run, read_only=True) as orbax:
        steps, state = sorted(orbax.all_steps()), checkpoint.restore_latest(orbax, first)
    heads = [attention.restore_head(experiment, digits_run, step) for step in steps]
    jax.tree.map(np.testing.assert_array_equal, heads[-1], state.variables["head"])
    digests = [trees.digest(head) for head in (first.variables["head"], *heads)]
    assert len(set(digests)) == len(digests) > 1


@pytest.mark.parametrize(
    "sees, changes",
    [
        ("x_adv", dict()),
        ("x", dict(objective__teacher_features="nat")),
        ("x", dict(objective__adversarial=False, attack=None)),
    ],
)
def test_the_record_is_the_formula_over_attacked_images(sees, changes, workdir, monkeypatch):
    """Of a matching that prefers some layers, and not the same for all images."""
    edit(workdir, **changes)
    restore, rng, heads = attention.restore_head, np.random.default_rng(3), []

    def perturbed(*arguments):
        head = restore(*arguments)
        heads.append(jax.tree.map(lambda w: np.float32(w + 0.1 * np.abs(rng.normal(size=w.shape))), head))
        return heads[0]

    monkeypatch.setattr(attention, "restore_head", perturbed)
    record = attention.evaluate(workdir, attack="pgd-2")

    trained, taught = run.load(workdir), run.load(workdir / "teacher")
    split = run.test_split(trained)
    student, teacher = (linen_net(run.in_float32(part.model)).predict for part in (trained, taught))
    attack = pgd(eps=record["eps"], step_size=record["step_size"], steps=2)

    @jax.jit
    def by_hand(x):
        """(x, x_adv, the student's taps at x_adv, the teacher's)"""
        x, seed = to_float(x), jax.random.fold_in(jax.random.key(trained.config.seed), scoring._EVALUATION)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(seed, jnp.arange(len(x)))
        x_adv = attack(keys, lambda x: student(trained.variables, x)[0], x, jnp.asarray(split.labels))
        shown = x_adv if sees == "x_adv" else x
        return x, x_adv, student(trained.variables, x_adv)[1], teacher(taught.variables, shown)[1]

    x, x_adv, taps_s, taps_t = by_hand(split.images)
    assert record["teacher_sees"] == sees and np.abs(np.subtract(x_adv, x)).max() > 0.01
    names = record["teacher_layers"]
    assert names == record["student_layers"] == ["conv1", "conv2"]
    head = attention.experiment_of(workdir).objective.head
    taps = ({name: taps[name] for name in names} for taps in (taps_s, taps_t))
    expected = attention_oracle(head, heads[0], *taps)  # (N, n, m)
    assert np.ptp(expected.mean(0)) > 0.02 and expected.std(0).min() > 1e-4
    np.testing.assert_allclose(record["mean"], expected.mean(0), atol=1e-4)
    np.testing.assert_allclose(record["std"], expected.std(0), atol=1e-4)
    np.testing.assert_allclose(np.sum(record["mean"], 1), 1, atol=1e-6)  # over the student's layers
    assert files.read_json(workdir / "attention" / "best.json") == record


def test_what_the_teacher_sees_and_the_size_of_batches(digits_run):
    """The teacher's images change the attention, the size of the batches does not."""
    experiment, trained = attention.experiment_of(digits_run), run.load(digits_run)
    head = attention.restore_head(experiment, digits_run, trained.step)
    images = run.test_split(trained).images[:9]
    twice, taught = np.concatenate([images, images]), np.concatenate([images, images[::-1]])
    found, *names = attention.attention(trained, experiment, head, twice, taught, 6)
    whole, other = found[: len(images)], found[len(images) :]
    parts = attention.attention(trained, experiment, head, images, images, 6)  # the last three are a batch
    np.testing.assert_allclose(parts[0], whole, atol=1e-6)
    assert whole.shape == other.shape == (len(images), 2, 2) and names == [["conv1", "conv2"]] * 2
    assert np.abs(other - whole).max() > 1e-4


def test_it_is_run_from_the_command_line(workdir, monkeypatch, capsys):
    picture = workdir / "new" / "map.png"
    argv = ["attention", f"--workdir={workdir}", "--checkpoint=last", "--attack=fgsm", "--n=11"]
    monkeypatch.setattr("sys.argv", [*argv, f"--picture={picture}"])
    monkeypatch.setattr(cluster, "initialize", lambda: None)  # it must come before all of JAX
    with pytest.raises(SystemExit, match="0"):
        attention.main()
    record = files.read_json(workdir / "attention" / "last.json")
    assert record["n"] == 11 and record["attack"] == "fgsm"
    printed = capsys.readouterr()
    assert f"written: {workdir / 'attention' / 'last.json'}" in printed.err and f"written: {picture}" in printed.err
    shown = printed.out.splitlines()
    cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(record["mean"][1], record["std"][1], strict=True)]
    assert shown[-1] == f"| conv2 | {' | '.join(cells)} |" and shown[1] == "| teacher \\ student | conv1 | conv2 |"
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def colours(file):
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_picture_has_teacher_layers_for_rows(tmp_path):
    """A teacher's second layer that looks at the student's third is bright below the middle, at the right."""
    record = dict(title="t", dataset="d", n=1, attack="pgd-2", norm="linf", eps="8/255")
    record |= dict(teacher_layers=["conv1", "conv2"], student_layers=["conv1", "conv2", "conv3"])
    attention.draw(record | dict(mean=[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), tmp_path / "a.png")
    attention.draw(record | dict(mean=[[0.5, 0.5, 0.0], [0.5, 0.5, 1.0]]), tmp_path / "b.png")
    one, other = colours(tmp_path / "a.png"), colours(tmp_path / "b.png")
    changed = np.argwhere(np.any(one != other, axis=-1))
    dark = np.argwhere(np.abs(one - np.array([68, 1, 84])).max(-1) < 3)  # viridis at 0
    assert len(changed) > 1000
    top, left = changed.min(0)
    assert dark[:, 0].min() < top < dark[:, 0].max() and left < dark[:, 1].max()


def test_the_scale_ends_at_one_and_every_cell_has_its_number(tmp_path, monkeypatch):
    """So that two matrices can be compared, and read without the colours."""
    figures = []
    monkeypatch.setattr(attention.pictures, "save", lambda figure, file: figures.append(figure))
    record = dict(title="t", dataset="d", n=1, attack="pgd-2", norm="linf", eps="8/255")
    record |= dict(teacher_layers=["conv1", "conv2"], student_layers=["conv1", "conv2", "conv3"])
    attention.draw(record | dict(mean=[[0.1, 0.2, 0.3], [0.25, 0.05, 0.7]]), tmp_path / "a.png")
    panel = figures[0].axes[0]
    assert panel.images[0].get_clim() == (0, 1)
    numbers = {text.get_position(): (text.get_text(), text.get_color()) for text in panel.texts}
    assert numbers[2, 1] == ("0.70", "black") and numbers[0, 0] == ("0.10", "white") and len(numbers) == 6


@pytest.mark.parametrize("changes", [dict(beta=0.0), dict(matching="hand"), dict(name="rslad")])
def test_a_run_without_a_learned_matching_is_refused(changes, workdir):
    if "name" in changes:
        edit(workdir, objective=changes)
    else:
        edit(workdir, **{f"objective__{key}": value for key, value in changes.items()})
    with pytest.raises(InputError, match="has learned no matching; give one of"):
        attention.evaluate(workdir)


def test_another_teacher_and_a_damaged_checkpoint_are_refused(workdir):
    trained = run.load(workdir)
    experiment = attention.experiment_of(workdir)
    shutil.rmtree(workdir / "checkpoints" / str(trained.step) / "training")
    with pytest.raises(CheckpointError, match=r"training.*other checkpoints"):
        attention.restore_head(experiment, workdir, trained.step)
    assert not (workdir / "damaged").exists()  # it is read, not set aside

    shutil.rmtree(workdir / "teacher")
    with pytest.raises(InputError, match="teacher first"):
        attention.experiment_of(workdir)
    shutil.copytree(workdir / "undefended", workdir / "teacher")
    with pytest.raises(InputError, match="not the one of its training"):
        attention.experiment_of(workdir)


@pytest.mark.parametrize(
    "flag, words", [("--picture=a.jpg", "ends in .png, .pdf"), ("--attack=pgd", "'pgd' is unknown")]
)
def test_bad_input_is_one_line(flag, words, digits_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attention", f"--workdir={digits_run}", flag])
    monkeypatch.setattr(cluster, "initialize", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        attention.main()
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
