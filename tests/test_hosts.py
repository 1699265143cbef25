"""Data and evaluations on several hosts: each reads its part, and all end where one of them sees something else."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from test_data import write_npz
from test_faults import environment, finish, start

from ibjax import errors, files
from ibjax.config import base
from ibjax.devices import cluster, compiled, peers
from ibjax.errors import DataError, InputError, PeerError
from ibjax.runs import metrics, run, rundir


class Store:
    """The key-value store of `jax.distributed`, for processes that are threads."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                return self.values[key]
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_dir_get(self, folder):
        return [item for item in list(self.values.items()) if item[0].startswith(folder)]


@pytest.fixture
def processes(monkeypatch):
    """A function (body, count) -> what body(i) returns or raises in each of `count` processes."""

    def call(body, count=3):
        store, local = Store(), threading.local()

        class Topics:
            def __next__(self):
                local.topic = getattr(local, "topic", -1) + 1
                return local.topic

        monkeypatch.setattr(cluster, "several", lambda: True)
        monkeypatch.setattr(peers, "_client", lambda: store)
        monkeypatch.setattr(peers, "_topics", Topics())
        monkeypatch.setattr(peers, "_INTERVAL", 0.02)
        monkeypatch.setattr(jax, "process_index", lambda: local.me)
        monkeypatch.setattr(jax, "process_count", lambda: count)
        found = [None] * count

        def one(me):
            local.me = me
            store.key_value_set(f"ibjax/name/{me}", f"process {me} (host{me})")
            try:
                found[me] = body(me)
            except Exception as error:
                found[me] = error
            store.key_value_set(f"ibjax/left/{me}", "")

        threads = [threading.Thread(target=one, args=(me,)) for me in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return found

    return call


@pytest.mark.parametrize("which", [0, 2])
def test_what_one_process_cannot_read_ends_all_with_its_line(processes, which):
    def body(me):
        with peers.together("data"):
            if me == which:
                raise DataError("images.npz is absent")
        return "went on"

    found = processes(body)
    assert isinstance(found[which], DataError) and str(found[which]) == "images.npz is absent"
    for me in {0, 1, 2} - {which}:
        assert str(found[me]) == f"process {which} (host{which}): images.npz is absent"
    assert processes(lambda me: body(me + 3)) == ["went on"] * 3


def test_a_process_that_ends_without_coming_is_named(processes):
    def body(me):
        if me != 1:
            peers.agree("numbers", {"a": 1})

    found = processes(body)
    assert found[1] is None
    assert str(found[0]) == "process 1 (host1) has ended and never came to 'numbers'"
    assert isinstance(found[2], InputError)


def test_a_process_that_is_late_cannot_be_reached_or_was_interrupted_is_no_wrong_input(processes, monkeypatch):
    """Scripts repeat what ends with 69, and nothing that ends with 2."""
    monkeypatch.setattr(peers, "PATIENCE", 0.1)

    def late(me):
        time.sleep(0.5 * (me == 1))
        peers.agree("numbers", {"a": 1})

    found = processes(late, 2)
    assert isinstance(found[0], PeerError)
    assert str(found[0]) == "process 1 (host1) has not come to 'numbers' within 0.1 s"

    def ended(code, error):
        def body(me):
            if me:
                peers._client().key_value_set("ibjax/ended/1", json.dumps([code, "process 1 has ended: its trouble"]))
            else:
                peers.agree("numbers", {"a": 1})

        assert type(processes(body, 2)[0]) is error

    ended(errors.EXIT_INTERRUPTED, PeerError)
    ended(errors.EXIT_PEER_LOST, PeerError)
    ended(errors.EXIT_DIVERGED, InputError)

    def unreachable(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: failed to connect")

    monkeypatch.setattr(Store, "blocking_key_value_get", unreachable)
    assert all(isinstance(error, PeerError) for error in processes(lambda me: peers.agree("numbers", {"a": 1}), 2))


def test_devices_of_others_that_are_not_told_in_time_are_no_wrong_input(monkeypatch):
    def late():
        raise RuntimeError("Unable to initialize backend 'cuda': DEADLINE_EXCEEDED: Getting topologies timed out")

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(jax, "default_backend", late)
    for several, error in ((True, PeerError), (False, InputError)):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda several=several: several)
        with pytest.raises(error, match="Getting topologies timed out"):
            cluster.backend()


@pytest.mark.parametrize(
    ("homes", "variable", "kept", "said"),
    [
        (["home"] * 3, None, "home/gpu", ""),
        (["home", "home", "other"], None, None, "what process 0 wrote there: True in process 0, False in process 2"),
        (["home", None, "home"], None, None, "the folder: '{0}/home/gpu' in process 0, '' in process 1"),
        ([None, "home", "home"], None, None, ""),
        (["home"] * 3, "{0}/named", "named", ""),
        (["home"] * 3, "/proc/none", None, "process 0 cannot write into /proc/none"),
        (["home"] * 3, "gs://bucket/kept", "gs://bucket/kept", ""),
        (["home"] * 3, "", None, ""),
    ],
)
def test_gpus_of_several_hosts_keep_compiled_programs_only_where_all_see_them(
    processes, tmp_path, monkeypatch, caplog, homes, variable, kept, said
):
    """Else those that find none wait for kernels which process 0, that finds its own, does not measure.

    "other" is a folder with the same path on another disk, None a host without a home folder.
    """
    caplog.set_level(logging.INFO, "ibjax")
    variable = variable and variable.format(tmp_path)

    class Config(threading.local):
        """Each process has its own; JAX reads the variable when it is imported."""

        jax_enable_compilation_cache = True
        jax_compilation_cache_dir = variable

        def update(self, name, value):
            setattr(self, name, value)

    def cache_folder():
        if homes[jax.process_index()] is None:
            raise RuntimeError("there is no home folder")
        return tmp_path / "home"

    monkeypatch.setattr(files, "cache_folder", cache_folder)
    monkeypatch.setattr(peers, "sees", lambda file, _: file.is_file() and homes[jax.process_index()] != "other")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if variable is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", variable)
    own = Config()
    monkeypatch.setattr(compiled, "jax", SimpleNamespace(config=own, process_index=lambda: jax.process_index()))

    def body(me):
        compiled.share()
        return own.jax_compilation_cache_dir if own.jax_enable_compilation_cache else None

    expected = kept and (kept if files.in_store(kept) else str(tmp_path / kept))
    assert processes(body) == [expected] * 3
    assert not list(tmp_path.glob("**/.seen-*"))
    lines = [record.getMessage() for record in caplog.records if "nothing compiled is kept" in record.getMessage()]
    assert said.format(tmp_path) in "".join(lines) and ("all share" in "".join(lines)) == bool(said)


@pytest.mark.parametrize("own", [range(8), (1, 6, 3)])
def test_a_process_reads_the_examples_of_its_own_devices_in_any_order_of_the_mesh(monkeypatch, own):
    """`own` are the devices of this process; the mesh has all eight in an order of its own, as on a slice."""
    mesh = Mesh(np.array(jax.devices())[[5, 1, 7, 0, 6, 2, 4, 3]], ("data",), axis_types=(AxisType.Auto,))
    every = NamedSharding.addressable_devices_indices_map
    only = lambda sharding, shape: {d: i for d, i in every(sharding, shape).items() if d.id in own}  # noqa: E731
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", only)
    rows, place = cluster.parts_of_batch(mesh, 16)
    held = sorted(2 * at + i for at, device in enumerate(mesh.devices) if device.id in own for i in (0, 1))
    assert rows.tolist() == held
    asked = {}
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, _, share: asked.update(shape=shape, share=share) or "placed"
    )
    values = np.arange(48.0).reshape(16, 3)
    assert place(values[rows]) == "placed" and asked["shape"] == (16, 3)
    for first in held[::2]:
        index = (slice(first, first + 2), slice(None))
        np.testing.assert_array_equal(asked["share"](index), values[index])


def settings(file):
    made = base()
    made.data = dict(name="npz", path=str(file), val_size=8, split_seed=0)
    return made


def test_a_host_that_lacks_a_file_or_has_another_version_of_it_ends_all(processes, tmp_path):
    for me in (0, 1):
        (tmp_path / f"host{me}").mkdir()
    copies = [write_npz(tmp_path / f"host{me}" / "images.npz") for me in (0, 1)]
    same = processes(lambda me: run.load_data(settings(copies[me])), 2)
    np.testing.assert_array_equal(same[0].train.images, same[1].train.images)

    with np.load(copies[1]) as stored:
        arrays = dict(stored)
    arrays["x_test"][3, 1, 2, 0] ^= 1
    np.savez(copies[1], **arrays)
    other = processes(lambda me: run.load_data(settings(copies[me])), 2)
    assert str(other[0]) == str(other[1])
    words = str(other[0])
    assert "the processes see different data: test: " in words and "in process 1 (host1); give all hosts" in words

    os.unlink(copies[1])
    absent = processes(lambda me: run.load_data(settings(copies[me])), 2)
    assert isinstance(absent[1], DataError) and str(copies[1]) in str(absent[1])
    assert str(absent[0]) == f"process 1 (host1): {absent[1]}"


# ---- real processes -----------------------------------------------------------------------------------------


RECIPE = """
from pathlib import Path

import numpy as np

from ibjax.config import base
from ibjax.data import Arrays, Split


def load(*, path):
    with np.load(Path(path).expanduser()) as stored:
        images, labels = stored["image"], stored["label"]
    with open("{reads}", "a") as told:
        told.write("read\\n")
    return Arrays(Split(images[:128], labels[:128]), Split(images[128:], labels[128:]), 4, label="made up")


def get_config(arg=None):
    config = base()
    config.data = dict(name="{file}:load", path="$HOST/images.npz", val_size=16, split_seed=0)
    config.data.extra = dict(path="$HOST/images.npz", fraction=0.5, resident=False)
    config.augment = dict(pad=0, padding="zero", flip=True)
    config.model = dict(name="cnn", widths=((4,),), hidden=(), padding=1, batch_norm=True, pool="average")
    config.attack.update(eps="0.1", step_size="0.05", steps=2)
    config.validate.attack.update(eps="0.1", step_size="0.05", steps=2)
    config.validate.update(every=2, batch_size=16)
    config.evaluate.update(attacks=("pgd-20", "apgd-ce"), eps="0.1", step_size="0.05", batch_size=16)
    config.evaluate.ladder = ()
    config.update(batch_size=16, epochs=2, log_every=1, checkpoint_every=1)
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe with data of one's own and generated images that are read; each host has its own copy of the files."""
    rng = np.random.default_rng(0)
    made = dict(image=rng.integers(0, 256, (160, 8, 8, 1), np.uint8), label=rng.integers(0, 4, 160))
    for host in ("host0", "host1"):
        (tmp_path / host).mkdir()
        np.savez(tmp_path / host / "images.npz", **made)
    file = tmp_path / "recipe.py"
    file.write_text(RECIPE.format(reads=tmp_path / "reads", file=file))
    return file


def on_two_hosts(recipe, workdir, module="ibjax.main", *words):
    """Two processes of a command, each with the files of its own host."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=2)
    words = words or (f"--config={recipe}",)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, f"--workdir={workdir}", *words],
            env=environment(**common, JAX_PROCESS_ID=i, HOST=recipe.parent / f"host{i}"),
            **pipes,
        )
        for i in (0, 1)
    ]


@pytest.mark.slow
def test_two_hosts_train_attack_and_analyse_as_one_does_and_each_reads_its_files_once(recipe, tmp_path):
    for code, output in map(finish, on_two_hosts(recipe, tmp_path / "two")):
        assert code == 0, output
    assert (tmp_path / "reads").read_text().count("read") == 2, "each process reads the files once"
    code, output = finish(start(recipe, tmp_path / "one", JAX_NUM_CPU_DEVICES=2, HOST=tmp_path / "host0"))
    assert code == 0, output
    one, two = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    losses = [[row["loss"] for row in rows if row["kind"] == "train"] for rows in (one, two)]
    assert len(losses[0]) == 14
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for name in ("pgd-20", "apgd-ce"):
        records = [files.read_json(tmp_path / run / "eval" / "best" / f"{name}.json") for run in ("one", "two")]
        assert records[0]["robust_flags"] == records[1]["robust_flags"]
        assert records[0]["clean_acc"] == records[1]["clean_acc"]

    words = ("--tap=pre_logits", "--share=0.5", f"--out={tmp_path / 'masked'}", "--trust=code")
    both = [finish(process) for process in on_two_hosts(recipe, tmp_path / "two", "ibjax.analysis.mask", *words)]
    assert [code for code, _ in both] == [0, 0], both
    assert ["are zero" in output for _, output in both] == [True, False]
    assert rundir.has_checkpoint(tmp_path / "masked")


@pytest.mark.slow
def test_a_mistyped_option_ends_two_hosts_whose_recipe_uses_jax_with_one_line(recipe, tmp_path):
    recipe.write_text(f"import jax.numpy as jnp\nMEAN = jnp.ones(3)\n{recipe.read_text()}")
    words = (f"--config={recipe}", "--config.epocs=3")
    for code, output in map(finish, on_two_hosts(recipe, tmp_path / "two", "ibjax.main", *words)):
        assert code == 2 and "Traceback" not in output, output
        assert [line for line in output.splitlines() if "'epocs'" in line] == [output.splitlines()[-1]]
    assert not (tmp_path / "two").exists()


@pytest.mark.slow
def test_a_file_that_one_real_host_lacks_ends_both_with_one_line(recipe, tmp_path):
    (tmp_path / "host1" / "images.npz").unlink()
    (code0, other), (code1, own) = map(finish, on_two_hosts(recipe, tmp_path / "two"))
    assert (code0, code1) == (2, 2), (other, own)
    line = next(line for line in own.splitlines() if line.startswith("error: "))
    told = next(line for line in other.splitlines() if line.startswith("error: "))
    assert f"{tmp_path / 'host1' / 'images.npz'}" in line
    assert told.startswith("error: process 1 of 2 (") and told.endswith(line.removeprefix("error: "))
    assert "Traceback" not in own + other and not (tmp_path / "two" / "metrics.jsonl").exists()
