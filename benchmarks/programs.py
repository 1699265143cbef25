"""Builds every compiled part of the package as a program: each objective, perturbation, attack by name and analysis.

`TABLE` maps names, such as "objective trades", "attack pgd-20" or "analysis plane", to functions that build the program
at a given scale on a mesh. `ahead.py` compiles all of them for a card that this machine lacks, and `device.py` runs
each of them twice on an available device. `ARCHITECTURES` has the train steps of every network at two image sizes, such
as "architecture xcit 224px", which only `ahead.py` compiles: each of them has a real size and no smaller one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import methods
import numpy as np
from jax.sharding import Mesh

from ibjax import config
from ibjax.analysis import attacked, attention, binarisation, calibration, embedding, modulation, plane, score_cam
from ibjax.attacks import geometry
from ibjax.attacks.iterative import as_attack
from ibjax.devices import precision
from ibjax.evaluation import named, scoring
from ibjax.evaluation.evaluate import make_scorer
from ibjax.models import siriib
from ibjax.net import linen_net, to_float
from ibjax.objectives import ib_rar
from ibjax.perturb import PERTURBATIONS

CLASSES, NORM, EPS, STEP_SIZE = 10, "linf", "8/255", "2/255"


class Scale(NamedTuple):
    """Sizes; the loops of AutoAttack's parts are rolled everywhere, so that their length costs only time."""

    network: Mapping[str, Any]
    teacher: Mapping[str, Any]
    dtype: str  # of training; evaluation is in float32
    batch: int  # of training
    seen: int  # images of a batch in evaluation and analyses
    steps: int  # of attacks in training
    named_steps: int  # of attacks by name
    short: bool = False  # AutoAttack's parts take two steps of one restart, towards two targets at most


FULL = Scale(methods.RESNET18, methods.WRN34, "bfloat16", 512, config.base().evaluate.batch_size, 10, 20)
TRIED = FULL._replace(teacher=methods.RESNET18, named_steps=2, short=True)  # as run on a card
SMALL = Scale(methods.TINY, methods.TINY, "float32", 8, 8, 1, 2, True)
SHAPE = (32, 32, 3)


class Program(NamedTuple):
    """Compiled by nobody yet."""

    call: Any  # made by `jax.jit`
    make: Callable[[], tuple]  # () -> its arguments; can be traced
    again: Callable[[tuple, Any], tuple] = lambda arguments, result: arguments  # those of the next step


Build = Callable[[Scale, Mesh], Program]


def images(count: int, shape: tuple[int, ...] = SHAPE) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, C) uint8 and labels (B,) int32."""
    x = jax.random.randint(jax.random.key(2), (count, *shape), 0, 256).astype(jnp.uint8)
    return x, jnp.arange(count, dtype=jnp.int32) % CLASSES


def initial(model: Any) -> Any:
    """Random weights of a network."""
    return model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), train=False)


def of_objective(name: str, scale: Scale, mesh: Mesh) -> Program:
    """The whole train step of a name in `methods.NAMES`."""
    return of_step(name, scale, SHAPE)


def of_step(name: str, scale: Scale, shape: tuple[int, ...]) -> Program:
    """As `of_objective`, on images (H, W, C)."""
    case = methods.build(methods.settings(name, scale.network, scale.steps), scale.teacher, dtype=scale.dtype)
    made = methods.program(case, scale.batch, shape)

    def arguments():
        state, frozen = made.init()
        x, y = images(scale.batch, shape)
        batch = {"image": to_float(x), "label": y, "index": jnp.arange(scale.batch, dtype=jnp.int32)}
        return state, batch, jax.random.key(1), frozen

    return Program(jax.jit(made.train_step, donate_argnums=0), arguments, lambda given, result: (result[0], *given[1:]))


IMAGENET_RESNET18 = {**methods.RESNET18, "stem": "imagenet"}
RESNET50 = dict(name="resnet", depth=50)
WRN28 = dict(name="wide_resnet", depth=28, width=10)
# name -> for images of a side in pixels, the network and how many images a chip has in a batch; `masked` wraps another
# network without a computation of its own
NETWORKS: Mapping[str, Mapping[int, tuple[Mapping[str, Any], int]]] = MappingProxyType(
    {
        "cnn": {
            32: (dict(name="cnn"), 512),
            224: (dict(name="cnn", hidden=(), pool="average", batch_norm=True), 64),
        },
        "resnet-18": {32: (methods.RESNET18, 512), 224: (IMAGENET_RESNET18, 128)},
        "resnet-50": {32: (RESNET50, 256), 224: ({**RESNET50, "stem": "imagenet"}, 128)},
        "wrn-50-2": {224: ({**RESNET50, "stem": "imagenet", "inner_width": 2}, 128)},
        "preact-18": {32: (dict(name="preact_resnet"), 512), 224: (dict(name="preact_resnet"), 32)},
        "wrn-28-10": {32: (WRN28, 128), 224: (WRN28, 4)},
        "vgg-16": {32: (dict(name="vgg"), 512), 224: (dict(name="vgg", variant="torchvision"), 64)},
        "convnext-t": {32: (dict(name="convnext"), 512), 224: (dict(name="convnext", stem="convstem"), 64)},
        "vit-s": {32: (dict(name="vit", patch=4), 512), 224: (dict(name="vit", stem="convstem"), 64)},
        "swin-t": {32: (dict(name="swin", patch=2, window=4), 512), 224: (dict(name="swin"), 64)},
        "xcit-s12": {32: (dict(name="xcit", patch=4), 256), 224: (dict(name="xcit"), 64)},
        "siriib": {
            32: (methods.NETWORKS["siriib"](methods.RESNET18), 512),
            224: ({**methods.NETWORKS["siriib"](IMAGENET_RESNET18), "scales": (224, 112, 56, 28)}, 64),
        },
        "stochastic": {
            32: (methods.NETWORKS["vib"](methods.RESNET18), 512),
            224: (methods.NETWORKS["vib"](IMAGENET_RESNET18), 128),
        },
    }
)


def of_architecture(name: str, side: int, scale: Scale, mesh: Mesh) -> Program:
    """PGD-AT's train step of a network in NETWORKS on images of `side` pixels."""
    network, batch = NETWORKS[name][side]
    return of_step("pgd_at", scale._replace(network=network, batch=batch), (side, side, 3))


ARCHITECTURES: Mapping[str, Build] = MappingProxyType(
    {
        f"architecture {name} {side}px": partial(of_architecture, name, side)
        for name, sides in NETWORKS.items()
        for side in sides
    }
)


def network_for(name: str, scale: Scale) -> Any:
    """The network that an attack is made for, in float32."""
    own = "siriib" if name.startswith("siriib") else "vib" if name == "autoattack-rand" else ""
    return methods.network(methods.NETWORKS.get(own, dict)(scale.network))


def of_attack(name: str, scale: Scale, mesh: Mesh) -> Program:
    """The program that scores a batch under an attack by name, or all of AutoAttack's parts on it."""
    family = name if name in named.ATTACKS else f"{name}-{scale.named_steps}"
    group = f"(group={scale.seen // 2})" if name == "ib_rar" and scale.short else ""
    chosen, model = named.named(family + group), network_for(name, scale)
    if chosen.make is None:
        return of_autoattack(chosen, model, scale)
    settings = dict(norm=NORM, batch_size=scale.seen, precision=precision.EVALUATION)
    scorer = make_scorer(chosen, lambda variables, x, keys: linen_net(model).predict(variables, x), settings, mesh)

    def arguments():
        x, y = images(scorer.batch_size)
        lengths = (jnp.float32(geometry.fraction(each)) for each in (EPS, chosen.step_size(EPS, STEP_SIZE)))
        guide = jnp.roll(x, 1, axis=0) if chosen.guided else None
        return initial(model), x, y, guide, jnp.arange(len(x), dtype=jnp.int32), jnp.uint32(0), *lengths

    return Program(scorer.score, arguments)


def of_autoattack(chosen: named.Named, model: Any, scale: Scale) -> Program:
    """AutoAttack's parts in turn, on all images."""
    in_pixels = chosen.settings["attacks"] == ["sparse-rs"]
    parts, _ = chosen.parts(*(("l0", 3) if in_pixels else (NORM, EPS)), CLASSES)
    if scale.short:
        parts = {name: part._replace(steps=2, restarts=1, targets=min(part.targets, 2)) for name, part in parts.items()}

    def attack(variables, key, x, y):
        answer = linen_net(model).predict
        if chosen.settings["version"] == "rand":
            sample = scoring.sampling(model, 1)
            network = lambda x, keys: sample(variables, x, keys)[0]  # noqa: E731
        else:
            network = lambda x: answer(variables, x)[0]  # noqa: E731
        keys = jax.random.split(key, len(parts))
        return {
            name: as_attack(part)(key, network, x, y) for (name, part), key in zip(parts.items(), keys, strict=True)
        }

    def arguments():
        x, y = images(scale.seen)
        return initial(model), jax.random.key(1), to_float(x), y

    return Program(jax.jit(attack), arguments)


# ---- analyses --------------------------------------------------------------------------------------------------


def seen_by(scale: Scale, call: Callable, model: Any = None, labels: bool = False) -> Program:
    """`call(predict, variables, images[, labels])` on a batch."""
    model = methods.network(scale.network) if model is None else model

    def arguments():
        x, y = images(scale.seen)
        return (initial(model), x, y) if labels else (initial(model), x)

    return Program(jax.jit(partial(call, linen_net(model).predict)), arguments)


def of_attention(scale: Scale, mesh: Mesh) -> Program:
    """IBD's matching of a teacher's layers and the student's."""
    case = methods.build(methods.settings("ibd", scale.network, scale.steps), scale.teacher)
    made = methods.program(case, scale.seen, SHAPE)
    call = partial(attention.attend_to, case.objective.head, linen_net(case.model).predict, made.bind_net)

    def arguments():
        state, frozen = made.init()
        x, _ = images(scale.seen)
        variables = dict(state.variables)
        head = variables.pop("head")
        return variables, frozen, head, x, x

    return Program(jax.jit(call), arguments)


def of_binarisation(scale: Scale, mesh: Mesh) -> Program:
    """A readout on the sphere around each image, and PGD on it."""
    model = methods.network(scale.network)
    eps = geometry.one_radius(EPS, NORM)
    pgd = named.named(f"pgd-{scale.named_steps}").make(norm=NORM, eps=eps, step_size=geometry.fraction(STEP_SIZE))

    def features(variables, x):
        return linen_net(model).predict(variables, x)[1]["pre_logits"]

    def call(variables, x):
        x = to_float(x)
        keys = jax.random.split(jax.random.key(1), len(x))
        anchor = features(variables, binarisation.on_sphere(keys, x, NORM, eps))
        w = anchor - features(variables, binarisation.in_ball(keys, x, NORM, eps))
        return binarisation._broken(pgd, features, NORM, eps, variables, w, anchor, keys, x)

    return Program(jax.jit(call), lambda: (initial(model), images(scale.seen)[0]))


def of_mask(scale: Scale, mesh: Mesh) -> Program:
    """nHSIC of the channels of a stage with the labels."""
    model = methods.network(scale.network)
    net = linen_net(model)
    call = lambda variables, x, y: ib_rar.channel_information(net, variables, to_float(x), y, "stage2")  # noqa: E731
    return Program(jax.jit(call), lambda: (initial(model), *images(scale.batch)))


def of_plane(scale: Scale, mesh: Mesh) -> Program:
    """nHSIC of images and labels with every layer."""

    def call(predict, variables, x, y):
        x = to_float(x)
        return plane.coordinates(x, y, CLASSES, ib_rar.layers_of(predict(variables, x)[1]))

    return seen_by(scale._replace(seen=min(scale.seen, 200)), call, labels=True)  # its default number of images


def of_score_cam(scale: Scale, mesh: Mesh) -> Program:
    """The probabilities of one image through the channels of the last map."""
    model = methods.network(scale.network)
    predict = linen_net(model).predict

    def call(variables, x):
        x = to_float(x[:1])
        maps = predict(variables, x)[1]["stage1"]
        channels = jnp.moveaxis(maps[0], -1, 0)[: score_cam.CHUNK, ::2, ::2]
        return score_cam.masked_scores(predict, variables, x[0], channels, jnp.int32(0))

    return Program(jax.jit(call), lambda: (initial(model), images(scale.seen)[0]))


def calibrated(scale: Scale) -> Any:
    """SiRIIB's network without connections, the classifier behind the calibration."""
    model = methods.network({**methods.NETWORKS["siriib"](scale.network), "connections": 0})
    assert isinstance(model, siriib.Model)
    return calibration.calibrated(model)


def logits(predict, variables, x):
    """What corruptions are scored by."""
    return predict(variables, to_float(x))[0]


ANALYSES: Mapping[str, Build] = MappingProxyType(
    {
        "attacked": lambda scale, mesh: seen_by(scale, attacked.classes_of),
        "attention": of_attention,
        "binarisation": of_binarisation,
        "calibration": lambda scale, mesh: seen_by(scale, attacked.classes_of, calibrated(scale)),
        "corruptions": lambda scale, mesh: seen_by(scale, logits),
        "embedding": lambda scale, mesh: seen_by(scale, partial(averaged, "pre_logits")),
        "mask": of_mask,
        "modulation": lambda scale, mesh: seen_by(scale, modulation.seen, network_for("siriib", scale)),
        "plane": of_plane,
        "score_cam": of_score_cam,
    }
)


def averaged(tap, predict, variables, x):
    """`embedding.averaged`, its network first."""
    return embedding.averaged(predict, tap, variables, x)


def table() -> dict[str, Build]:
    """name -> what builds it."""
    perturbations = {f"perturbation {name}": partial(of_objective, name) for name in PERTURBATIONS}
    objectives = {
        f"objective {name}": partial(of_objective, name) for name in methods.NAMES if name not in PERTURBATIONS
    }
    attacks = {f"attack {name}": partial(of_attack, name) for name in (*named.FAMILIES, *named.ATTACKS)}
    return objectives | perturbations | attacks | {f"analysis {name}": build for name, build in ANALYSES.items()}


TABLE = table()


def finite(tree: Any) -> bool:
    """Whether all floating-point numbers of a tree of arrays are finite."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return all(bool(np.isfinite(np.asarray(leaf.astype(jnp.float32))).all()) for leaf in floats)
