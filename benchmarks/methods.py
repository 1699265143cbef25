"""For benchmarks: a train step of every objective of the package at its paper's defaults, on noise, unaugmented.

`NAMES` are the objectives, and "awp", which is PGD-AT with a weight perturbation. The network is a ResNet, wrapped in
the modules that a method adds (NETWORKS). The teacher of a distillation method is another such ResNet or a given
network.
"""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from measuring import Steps, noise
from ml_collections import ConfigDict

from ibjax import config, optim, step
from ibjax.attacks import Attack
from ibjax.devices import cluster
from ibjax.net import Net, Variables, linen_net
from ibjax.perturb import awp
from ibjax.step import Objective, Perturb, TrainState

NAMES = (
    "standard",
    "pgd_at",
    "trades",
    "mart",
    "te",
    "alp",
    "label_smoothing",
    "score",
    "dkl",
    "mma",
    "awp",
    "ard",
    "hat",
    "rslad",
    "iad",
    "ibd",
    "ib_rar",
    "hbar",
    "shared_information",
    "siriib",
    "vib",
    "ceb",
    "infoat_r",
)
Section = Mapping[str, Any]
NETWORKS: dict[str, Callable[[Section], Section]] = {
    **dict.fromkeys(("vib", "shared_information"), lambda net: dict(name="stochastic", backbone=net)),
    "ceb": lambda net: dict(name="stochastic", backbone=net, sigma="unit", class_means=True),
    "siriib": lambda net: dict(name="siriib", backbone=net),
}
RESNET18 = dict(name="resnet", depth=18)
WRN34 = dict(name="wide_resnet", depth=34, width=10)
# To try the scripts. PyTorch 2.13 on a CPU corrupts its memory in the training of four channels stored channels-last.
TINY = dict(name="resnet", blocks=(1, 1), width=8)


class Case(NamedTuple):
    """What a step is made of."""

    model: nn.Module
    objective: Objective
    attack: Attack | None
    teachers: Mapping[str, nn.Module] = MappingProxyType({})  # role -> network, with random weights
    perturb: Perturb | None = None


class Program(NamedTuple):
    """A step that nothing has traced yet."""

    train_step: Callable  # (state, batch, key, frozen) -> (state, metrics)
    init: Callable[[], tuple[TrainState, dict[str, Variables]]]  # () -> (state, frozen)
    bind_net: Callable[[Mapping[str, Variables] | None], Net]

    def shapes(self, batch_size: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """(state, batch, key, frozen) as shapes and types: what compiling takes."""
        state, frozen = jax.eval_shape(self.init)
        batch = {"image": jax.ShapeDtypeStruct((batch_size, *shape), "float32")}
        batch |= dict.fromkeys(("label", "index"), jax.ShapeDtypeStruct((batch_size,), "int32"))
        return state, batch, jax.eval_shape(lambda: jax.random.key(0)), frozen


def settings(name: str, network: Section, attack_steps: int = 10, **options: Any) -> ConfigDict:
    """The configuration of a name in NAMES, with its objective's other options."""
    made = config.base()
    made.objective = dict(name="pgd_at" if name == "awp" else name, **options)
    made.perturb = dict(name="awp", gamma=0.01) if name == "awp" else None
    made.model = NETWORKS.get(name, dict)(network)
    losses = config.build("objectives", made.objective, "objective").attack_losses
    if losses:
        init = "gaussian" if losses[0] == "kl" or name == "mart" else "uniform"
        made.attack.update(loss=losses[0], init=init, steps=attack_steps)
    else:
        made.attack = None
    if name == "mma":
        made.objective.steps = attack_steps
    return made


def chosen(parser: argparse.ArgumentParser, text: str) -> tuple[str, ...]:
    """The names in a command line's "NAME[,NAME…]" or "all"."""
    found = NAMES if text == "all" else tuple(text.split(","))
    if unknown := set(found) - set(NAMES):
        parser.error(f"--objective: {', '.join(sorted(unknown))} is unknown; allowed: all or {', '.join(NAMES)}")
    return found


def build(given: ConfigDict, teacher: Section, *, dtype: str = "float32", unroll: bool | None = None) -> Case:
    """The parts of a configuration of `settings`, for ten classes; `unroll` is that of its attack."""
    given = config.effective(given)
    made = config.build("objectives", given.objective, "objective")
    attack = None
    if given.attack is not None:
        options = config.arguments("attacks", given.attack, "attack") | dict(unroll=unroll)
        options["loss"] = made.attack_loss or options["loss"]
        attack = config.factory("attacks", given.attack.name)(**options)
    return Case(
        network(config.plain(given.model), dtype),
        made,
        attack,
        {role: network(teacher, dtype) for role in made.teachers},
        None if given.perturb is None else awp(gamma=given.perturb.gamma),
    )


def network(section: Section, dtype: str = "float32") -> nn.Module:
    """A network of ten classes that computes in `dtype`; a `backbone` is what has it."""
    inside = section.get("backbone")
    section = {**section, "backbone": {**inside, "dtype": dtype}} if inside else {**section, "dtype": dtype}
    return config.build("models", section, "model", num_classes=10)


def program(case: Case, images: int, shape: tuple[int, ...] = (32, 32, 3), microbatches: int = 1) -> Program:
    """The step of a case on images (H, W, C); a method that remembers images has room for so many."""
    optimizer = optim.sgd(lr=0.01)

    def bind_net(frozen):
        return linen_net(case.model, case.teachers, frozen)

    def init():
        key, x = jax.random.key(0), jnp.zeros((1, *shape))
        frozen = {role: module.init(key, x) for role, module in case.teachers.items()}
        memory = case.objective.memory(images, 10) if case.objective.memory else None
        parts = (key, bind_net(frozen), case.model, case.objective.head, optimizer, x)
        return step.init_state(*parts, ema=False, memory=memory), frozen

    problem = step.Problem(bind_net, case.objective, case.attack, microbatches=microbatches)
    made = step.make_train_step(problem, optimizer, perturb=case.perturb)
    return Program(made, init, bind_net)


def ibjax_steps(
    case: Case,
    batch_size: int,
    shape: tuple[int, int, int] = (32, 32, 3),
    microbatches: int = 1,
    devices: int = 1,
) -> Steps:
    """Jitted and donated train steps on one batch of noise, on the first so many devices."""
    made = program(case, batch_size, shape, microbatches)
    options = dict(axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    mesh = jax.make_mesh((devices,), ("data",), **options)
    replicated, sharded = (NamedSharding(mesh, spec) for spec in (cluster.REPLICATED, cluster.BATCH))
    state, frozen = jax.jit(made.init, out_shardings=replicated)()
    x, y = noise(batch_size, shape)
    batch = {"image": x, "label": y, "index": jnp.arange(batch_size, dtype="int32")}
    batch, key = jax.device_put(batch, sharded), jax.device_put(jax.random.key(1), replicated)
    train_step = jax.jit(made.train_step, donate_argnums=0, out_shardings=replicated)

    def steps(n):
        nonlocal state
        for _ in range(n):
            state, metrics = train_step(state, batch, key, frozen)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return steps


def ibjax_predictions(case: Case, batch_size: int, shape: tuple[int, int, int] = (32, 32, 3)) -> Steps:
    """Jitted predictions of one batch of noise, on the first device."""
    variables = jax.jit(partial(case.model.init, train=False))(jax.random.key(0), jnp.zeros((1, *shape)))
    x, _ = noise(batch_size, shape)
    predict, x = jax.jit(lambda variables, x: linen_net(case.model).predict(variables, x)[0]), jnp.asarray(x)

    def predictions(n):
        logits = [predict(variables, x) for _ in range(n)]
        return float(jax.block_until_ready(logits)[-1].mean())

    return predictions
