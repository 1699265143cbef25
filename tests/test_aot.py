"""What the ahead-of-time compiler reads from a program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ibjax import aot, cluster, config
from ibjax.errors import InputError


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

    found = aot.collectives(compiled_text(scale, x, jnp.int32(3), out_shardings=NamedSharding(mesh, P("data"))))
    assert {item.depth for item in found if item.kind == "all-reduce"} == {0, 1, 2}
    assert all(item.bytes == 4 * item.count for item in found if item.kind == "all-reduce")
    alone = compiled_text(lambda x: jnp.sin(x) / jnp.sum(x, 1, keepdims=True), x)
    assert aot.collectives(alone) == []
    gathered = aot.collectives(compiled_text(jnp.sin, x, **options))
    assert [(item.kind, item.bytes) for item in gathered] == [("all-gather", 16 * 4 * 4)]


@pytest.mark.parametrize("name", ["pgd_at", "trades"])
def test_the_attack_of_a_train_step_communicates_nothing(name):
    """On eight devices, loops rolled: batch statistics and gradients are summed once a step, and that is all."""
    settings = config.base()
    settings.model = dict(name="resnet", blocks=(1,), width=4)
    settings.objective = dict(name=name)
    settings.attack.update(loss={"pgd_at": "ce", "trades": "kl"}[name], init="gaussian", steps=3)
    settings.update(batch_size=16, log_every=2)
    found = aot.compile_step(aot.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)
    assert any(item.depth == 1 and item.kind == "all-reduce" for item in found["collectives"])
    assert all(item.depth < 2 for item in found["collectives"])
    assert "each step" in aot.table(found) and "IN A LOOP" not in aot.table(found)


def test_flops_count_every_step_of_the_attack():
    """The compiler counts a rolled body once: three more steps cost three more bodies."""
    settings = config.base()
    settings.model = dict(name="resnet", blocks=(1,), width=8)
    settings.update(batch_size=16, log_every=2)
    flops = []
    for steps in (1, 4, 7):
        settings.attack.steps = steps
        flops.append(aot.compile_step(aot.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)["flops"])
    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=0.01) and flops[0] > 0
    assert (flops[1] - flops[0]) / 3 == pytest.approx(flops[0] * 2 / 5, rel=0.15)  # 2 of the 2 + 3 forward passes


def test_a_batch_that_does_not_divide_among_the_chips_is_refused():
    settings = config.base()
    settings.batch_size = 12
    with pytest.raises(InputError, match="12 does not divide among 8 devices"):
        aot.compile_step(aot.prepare(settings, (8, 8, 3), 4, {}), cluster.mesh(), 64)


def test_a_slice_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"no slice|not installed"):
        aot.slice_mesh("v5e:3x5x7")
