"""What the ahead-of-time compiler reads from a program."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config_rows, smoke_config
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ibjax import aot, config
from ibjax.attacks import pgd
from ibjax.data import extra
from ibjax.devices import cluster, cores
from ibjax.errors import InputError
from ibjax.information.linalg import each_matrix
from ibjax.training import ahead, hlo

ROOT = Path(__file__).resolve().parent.parent


def compiled_text(function, *args, **options):
    return jax.jit(function, **options).lower(*args).compile().as_text()


def test_collectives_are_found_in_the_loop_where_they_stand():
    """A sum over devices before a loop, in it, and in a loop within it; and none where images stay by themselves."""
    mesh = cluster.mesh()
    x = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    options = dict(out_shardings=NamedSharding(mesh, P()))

    def scale(x, n):
        def inner(_, x):
            return x / jnp.sum(x)

        def outer(_, x):
            return lax.fori_loop(0, n, inner, x * jnp.max(x))

        return lax.fori_loop(0, n, outer, x * jnp.min(x))

    found = ahead.collectives(compiled_text(scale, x, jnp.int32(3), out_shardings=NamedSharding(mesh, P("data"))))
    assert {item.depth for item in found if item.kind == "all-reduce"} == {0, 1, 2}
    program = compiled_text(scale, x, jnp.int32(3), out_shardings=NamedSharding(mesh, P("data")))
    assert {item.depth for item in ahead.collectives(program, around=1)} >= {-1, 0, 1} and ahead.loops(program) == 2
    assert all(item.bytes == 4 * item.count for item in found if item.kind == "all-reduce")
    alone = compiled_text(lambda x: jnp.sin(x) / jnp.sum(x, 1, keepdims=True), x)
    assert ahead.collectives(alone) == []
    gathered = ahead.collectives(compiled_text(jnp.sin, x, **options))
    assert [(item.kind, item.bytes) for item in gathered] == [("all-gather", 16 * 4 * 4)]


@pytest.mark.parametrize(
    "name, count",
    [
        ("vmap()/gather", 0),  # what compilers for TPUs make of the crops
        ("jit(_interp)/jit(searchsorted)/jit(_searchsorted_scan_impl)/while", 0),  # in a schedule
        ("while", 1),
    ],
)
def test_a_loop_without_flops_counts_as_none(name, count):
    loop = 'while(%x), condition=%c, body=%b, metadata={op_name="jit(step)/while/body/NAME" id=2}'.replace("NAME", name)
    assert ahead.loops(f"ENTRY %main.1 (x: f32[8]) -> f32[8] {{\n  %a = f32[8] {loop}\n}}") == count


def test_a_collective_in_pieces_is_one():
    """A TPU's compiler lets it run on beside several convolutions, as pieces of a chain."""
    piece = '  %g = bf16[64,100] all-gather(%x), channel_id=1, frontend_attributes={chain_id="3"}'
    other = "  %h = bf16[64,100] all-gather(%x), channel_id=2"
    program = "\n".join(("ENTRY %main.1 (x: bf16[16,100]) -> bf16[64,100] {", piece, piece, other, other, "}"))
    assert ahead.collectives(program) == [("all-gather", 0, 3, 3 * 64 * 100 * 2)]


def test_kernels_are_counted_where_they_run_and_what_is_inside_of_one_is_none():
    """A convolution and a fusion in a loop, a fusion and a sort outside, in the form that GPUs' compiler prints."""
    program = """
%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %m = f32[4,8]{1,0} multiply(%p, %p)
}
%less (a: f32[], b: f32[]) -> pred[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}
%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %i = s32[] get-tuple-element(%s), index=0
  %conv = (f32[4,8]{1,0}, u8[16]{0}) custom-call(%x, %x), custom_call_target="__cudnn$convForward"
  %y = f32[4,8]{1,0} get-tuple-element(%conv), index=0
  %z = f32[4,8]{1,0} fusion(%y), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %z)
}
%condition (s: (s32[], f32[4,8])) -> pred[] {
  %s.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %k = pred[] constant(true)
}
ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %w = f32[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%fused
  %zero = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%zero, %w)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%condition, body=%body
  %last = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %sorted = f32[4,8]{1,0} sort(%last), dimensions={1}, to_apply=%less
}"""
    one = 4 * 4 * 8
    assert ahead.kernels(program) == (2, (3 * one + 16) + 2 * one, 2, 4 * one)
    assert ahead.kernels(program, around=1) == (0, 0, 4, (3 * one + 16) + 6 * one)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "ib_rar"])
def test_the_attack_of_a_train_step_communicates_nothing(name):
    """On eight devices, loops rolled: batch statistics and gradients are summed once a step, and that is all."""
    settings = config.base()
    settings.model = dict(name="cnn", widths=((4,),), hidden=(), padding=1, batch_norm=True, pool="average")
    settings.objective = dict(name=name)
    settings.attack.update(loss="kl" if name == "trades" else "ce", init="gaussian", steps=3)
    settings.update(batch_size=16, log_every=2)
    found = ahead.compile_step(ahead.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)
    assert any(item.depth == 0 and item.kind == "all-reduce" for item in found["collectives"])
    assert all(item.depth < 1 for item in found["collectives"])
    assert "each step" in ahead.table(found) and "IN A LOOP" not in ahead.table(found)


def test_flops_count_every_step_of_the_attack():
    """The compiler counts a rolled body once: three more steps cost three more bodies."""
    settings = config.base()
    settings.model = dict(name="resnet", blocks=(1,), width=8)
    settings.update(batch_size=16, log_every=2)
    flops = []
    for steps in (1, 4, 7):
        settings.attack.steps = steps
        flops.append(ahead.compile_step(ahead.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)["flops"])
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=0.01) and flops[0] > 0
    assert (flops[1] - flops[0]) / 3 == pytest.approx(flops[0] * 2 / 5, rel=0.15)  # 2 of the 2 + 3 forward passes


@pytest.mark.parametrize(
    ("recipe", "option", "words"),
    [
        ("digits", "--images=0", "--images=0 is not allowed"),
        ("digits", "--images=-5", "--images=-5 is not allowed"),
        ("digits", "--generated=8", "no generated images, data.extra; leave it out"),
        ("ibd_imagenet", "--images=8", "no image of data.name='stream' is kept on a chip; leave it out"),
    ],
)
def test_counts_of_images_that_the_step_would_not_have_are_refused(recipe, option, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aot", f"--config={recipe}", option])
    with pytest.raises(SystemExit) as caught:
        aot.main()
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_a_batch_that_does_not_divide_among_the_chips_is_refused():
    settings = config.base()
    settings.batch_size = 12
    with pytest.raises(InputError, match="12 does not divide among 8 devices"):
        ahead.compile_step(ahead.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)


def test_streamed_images_are_no_data_of_the_device():
    """A batch comes to a step of its own: no loop around it, and the data set takes no memory."""
    settings = config.base()
    settings.model = dict(name="resnet", blocks=(1,), width=4)
    settings.update(batch_size=16, log_every=2)
    settings.attack.steps = 3
    streamed, resident = (
        ahead.compile_step(ahead.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), images)
        for images in (None, 100_000)
    )
    for found in (streamed, resident):
        assert {item.depth for item in found["collectives"] if item.kind == "all-reduce"} == {0}
    assert resident["memory"] - streamed["memory"] > 100_000 * 8 * 8 * 3


def test_the_number_of_generated_images_is_that_of_their_file(tmp_path):
    data, shape, file = config.base().data, (8, 8, 3), tmp_path / "images.npz"
    assert ahead.generated(data, shape, None) is None
    data.extra = dict(path=str(file), fraction=0.7)
    for count, there in ((None, ahead.GENERATED), (50_000_000, 50_000_000)):
        made = ahead.generated(data, shape, count)
        assert len(made.labels) == there and made.resident == (there * 192 <= extra.RESIDENT)
    np.savez(file, image=np.zeros((7, *shape), np.uint8), label=np.zeros(7))
    assert len(ahead.generated(data, shape, None).labels) == 7


@pytest.mark.slow
def test_generated_images_count_in_memory_or_as_what_is_read(tmp_path):
    """Kept on the chip, they add their bytes; read while training, their places of a batch."""
    settings = config.base()
    settings.model = dict(name="resnet", blocks=(1,), width=4)
    settings.update(batch_size=16, log_every=2)
    settings.attack.steps = 1
    settings.data.extra = dict(path=str(tmp_path / "absent.npz"), fraction=0.7)
    shape, small = (8, 8, 3), ahead.prepare(settings, (8, 8, 3), 4, {})
    kept = ahead.generated(settings.data, shape, 200_000)
    with settings.unlocked():
        settings.data.extra.resident = False
    read = ahead.generated(settings.data, shape, 200_000)
    found = {
        name: ahead.compile_step(small, cluster.mesh(), 1000, made)
        for name, made in (("none", None), ("kept", kept), ("read", read))
    }
    assert found["none"]["generated"] is None
    assert found["kept"]["generated"] == dict(count=200_000, in_batch=11, bytes=200_000 * 196, bytes_a_step=0)
    assert found["read"]["generated"] == dict(count=200_000, in_batch=11, bytes=0, bytes_a_step=2 * 196)
    assert found["kept"]["memory"] - found["read"]["memory"] > 200_000 * 192
    assert "11 of a batch, of 200,000: 0.04 GB in the memory of every chip" in ahead.table(found["kept"])
    with pytest.raises(InputError, match=r"not with data\.name='stream'"):
        ahead.compile_step(small, cluster.mesh(), None, kept)


def test_a_program_for_elsewhere_is_not_that_for_this_cpu():
    """Factorisations are batched and short loops rolled, as on an accelerator."""
    matrices = jnp.zeros((6, 4, 4))

    def program():
        return str(jax.make_jaxpr(lambda m: each_matrix(jnp.linalg.svd, m))(matrices))

    here = program()
    with cores.elsewhere():
        there = program()
    assert "scan" in here and "scan" not in there and "6,4,4" in there
    assert pgd.unrolled(None) and not cores.elsewhere()(lambda: pgd.unrolled(None))()


@pytest.mark.parametrize(
    "data, shape, classes",
    [
        (dict(name="tfds", dataset="cifar100"), (32, 32, 3), 100),
        (dict(name="tfds", dataset="tiny_imagenet"), (64, 64, 3), 200),
        (dict(name="stream", dataset="imagenet2012", size=160), (160, 160, 3), 1000),
        (dict(name="digits"), (8, 8, 1), 10),
    ],
)
def test_images_are_those_of_the_recipe(data, shape, classes):
    assert ahead.images_of(ConfigDict(data), None, None) == (shape, classes)
    assert ahead.images_of(ConfigDict(data), "20,20,3", 7) == ((20, 20, 3), 7)


def test_class_folders_say_their_size_where_images_are_fitted():
    fitted = dict(name="folder", path="nowhere", size=24, grey=True)
    assert ahead.images_of(ConfigDict(fitted), None, 3) == ((24, 24, 1), 3)
    with pytest.raises(InputError, match="does not say what its images are"):
        ahead.images_of(ConfigDict({**fitted, "size": None}), None, 3)


def test_images_that_nobody_knows_are_asked_for():
    for shape, classes in ((None, 3), ("8,8,1", None), ("8,8", 3), ("8,8,x", 3), ("8,8,0", 3), ("8,8,1", 0)):
        with pytest.raises(InputError, match="--shape=HEIGHT,WIDTH,CHANNELS and --classes"):
            ahead.images_of(ConfigDict(dict(name="npz", path="x.npz")), shape, classes)


def test_every_recipe_says_what_its_images_are():
    for file in sorted((ROOT / "configs").glob("*.py")):
        for row in config_rows(file.stem):
            data = smoke_config(file.stem, row).data  # as the recipe has it, which is no short form here
            if "path" not in data:  # of a user's own files nothing is known
                (height, width, channels), classes = ahead.images_of(data, None, None)
                assert height == width and channels in (1, 3) and classes >= 10


needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu, of the extra [tpu]")


@needs_libtpu
def test_a_slice_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"v5e:3x5x7 is no slice"):
        ahead.slice_mesh("v5e:3x5x7")


@pytest.mark.slow
@needs_libtpu
def test_the_command_compiles_for_a_slice(tmp_path):
    """As a user calls it, in a process of its own: nothing is compiled for this CPU."""
    command = [sys.executable, "-m", "ibjax.aot", "--config=configs/digits.py:smoke", "--topology=v5e:2x2"]
    command += ["--config.attack.steps=3", f"--json={tmp_path / 'found.json'}"]
    environment = {**os.environ, "XLA_FLAGS": ""}  # libtpu knows none of the CPU's
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["chips"], found["kind"]) == (4, "TPU v5 lite") and "4 × TPU v5 lite" in process.stdout
    assert all(item["depth"] < 1 for item in found["collectives"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs the extra [cuda13]")
def test_the_command_compiles_for_a_gpu(tmp_path):
    command = [sys.executable, "-m", "ibjax.aot", "--config=configs/digits.py:smoke", "--topology=h200"]
    process = subprocess.run([*command, f"--json={tmp_path / 'found.json'}"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["chips"], found["kind"]) == (1, "NVIDIA H200 141GB HBM3e") and found["kernels"]["in_loops"] > 0
    assert "kernels " in process.stdout


@pytest.mark.parametrize("topology", ahead.GPUS)
def test_without_its_compiler_a_gpu_is_refused(topology, monkeypatch):
    def absent(*_, target_config, **__):
        assert "gpu_device_info" in target_config
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match="compiler for GPUs is not installed"):
        ahead.slice_mesh(topology)


def test_without_its_compiler_a_slice_is_refused(monkeypatch):
    def absent(*_, **__):
        raise RuntimeError("libtpu.so was not found")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match="compiler for TPUs is not installed"):
        ahead.slice_mesh("v5e:2x2")


# ---- the time that a TPU's compiler expects ------------------------------------------------------------------------

PROGRAM = """
%product (p: bf16[2,8,8,4], w: bf16[3,3,4,16]) -> bf16[2,8,8,16] {
  %p = bf16[2,8,8,4]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[3,3,4,16]{3,2,1,0} parameter(1)
  ROOT %c = bf16[2,8,8,16]{3,2,1,0} convolution(%p, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
%body (s: (s32[], bf16[2,8,8,4])) -> (s32[], bf16[2,8,8,4]) {
  %s = (s32[], bf16[2,8,8,4]{3,2,1,0}) parameter(0)
  %x = bf16[2,8,8,4]{3,2,1,0} get-tuple-element(%s), index=1
  %k = bf16[3,3,4,16]{3,2,1,0} constant({...})
  %f = bf16[2,8,8,16]{3,2,1,0} fusion(%x, %k), kind=kOutput, calls=%product, metadata={op_name="conv"}, CYCLES(3000)
  ROOT %t = (s32[], bf16[2,8,8,4]{3,2,1,0}) tuple(%i, %x)
}
%other (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %e = f32[8]{0} exponential(%z), CYCLES(1000)
  %o = f32[8]{0} sort(%e), dimensions={0}, to_apply=%less
}
%condition (s: (s32[], bf16[2,8,8,4])) -> pred[] {
  ROOT %k.1 = pred[] constant(true)
}
ENTRY %main (x: bf16[2,8,8,4]) -> bf16[2,8,8,4] {
  %a = f32[1000,1000]{1,0} add(%u, %v), metadata={op_name="sum"}, CYCLES(200000)
  %r = f32[8,8]{1,0} custom-call(%m), custom_call_target="Cholesky"
  %b = f32[8,8]{1,0} custom-call(%m), custom_call_target="ConcatBitcast"
  %loop = (s32[], bf16[2,8,8,4]{3,2,1,0}) while(%init), condition=%condition, body=%body
  %small = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%other
}""".replace("CYCLES(", 'backend_config={"window_config":{"estimated_cycles":"').replace("00)\n", '00"}}\n')


def test_the_expected_time_of_a_step_is_that_of_its_parts():
    """The longest loop is the attack's and runs ten times; another counts once. A kernel far from its bound shows."""
    chip = ahead.Chip(flops=1e8, hbm=1e9, bandwidth=1e9, clock=1e6)
    found = hlo.estimate(PROGRAM, chip, attack_steps=10)
    assert found[:3] == pytest.approx((3.0, 201.0, 231.0))
    assert [(kernel.operation, kernel.ms, kernel.in_attack) for kernel in found.kernels] == [
        ("sum", 200.0, False),
        ("conv", 3.0, True),
        ("", 1.0, False),
    ]
    products = 2 * 2 * 16 * 4 * (3 * 8 - 2) ** 2  # of 8 pixels, two at the border miss one of three
    bounds = (4.0, 1e3 * products / 1e8, 32e-6)  # 4 MB, products, 32 bytes
    assert [kernel.bound_ms for kernel in found.kernels] == pytest.approx(bounds)
    assert [kernel.slow() for kernel in found.kernels] == [True, False, True]
    assert found.unpriced == {"Cholesky": 1, "sort": 1}
    assert hlo.estimate(PROGRAM, chip, attack_steps=10, microbatches=2).step_ms == pytest.approx(208)
    assert hlo.estimate(PROGRAM, chip, around=1).step_ms == pytest.approx(4)
    assert hlo.estimate(PROGRAM, chip, around=1).unpriced == {"sort": 1}
    assert hlo.estimate(PROGRAM, ahead.CHIPS["NVIDIA H200 141GB HBM3e"]) is None


@pytest.mark.parametrize("passes, precision, kind", [(1, "default", "f32"), (3, "high", "f32"), (6, "highest", "f32"),
                                                     (1, "highest", "bf16")])  # fmt: skip
def test_a_float32_product_takes_as_many_passes_as_its_precision(passes, precision, kind):
    line = f"%d = {kind}[8,5] dot(%a, %b), lhs_contracting_dims={{1}}, operand_precision={{{precision},{precision}}}"
    text = f"""
ENTRY %main (a: f32[8,7]) -> f32[8,5] {{
  %a = {kind}[8,7] parameter(0)
  %b = {kind}[7,5] parameter(1)
  {line}, backend_config={{"estimated_cycles":"7"}}
}}"""
    chip = ahead.Chip(flops=1e3, hbm=1e9, bandwidth=1e9, clock=1e6)
    assert hlo.estimate(text, chip).kernels[0].bound_ms == pytest.approx(passes * 2 * 8 * 5 * 7)


@pytest.mark.parametrize(
    "out, lhs, rhs, text, count",
    [
        ([1, 4, 4, 3], [1, 8, 8, 2], [3, 3, 2, 3], "window={size=3x3 stride=2x2 pad=1_1x1_1}", 6 * 11**2),
        ([1, 8, 8, 2], [1, 4, 4, 3], [3, 3, 3, 2], "window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2}", 6 * 11**2),
        ([8, 5], [8, 7], [7, 5], "dim_labels=bf_io->bf", 8 * 5 * 7),
    ],
)
def test_multiplications_are_counted_without_padding(out, lhs, rhs, text, count):
    """A convolution of stride 2, its gradient, which needs as many, and a product of matrices."""
    text = text if "dim_labels" in text else f"{text}, dim_labels=b01f_01io->b01f"
    assert hlo._multiplications(text, out, lhs, rhs) == count
