"""Shared by the analyses: attacks a run's images with a named attack, and returns a network's predictions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax import config, losses
from ibjax.attacks.names import canonical, parse
from ibjax.data import Split
from ibjax.devices import cluster, precision
from ibjax.errors import InputError
from ibjax.evaluation.evaluate import make_scorer
from ibjax.evaluation.named import named
from ibjax.evaluation.scoring import Flags, auto_attack
from ibjax.evaluation.settings import check_network, check_settings
from ibjax.net import to_float
from ibjax.runs import own_code, run


def load(
    workdir: Path, checkpoint: str = "best", *, attacks: Sequence[str] | None = None, n: int | None = None
) -> tuple[run.Run, dict[str, Any], Split]:
    """(a run, its checked `evaluate` section, its test images); `attacks` and `n` replace the section's values.

    The analyses evaluate a stochastic network at its mean, so `samples` is unset.
    """
    trained = run.load(workdir, checkpoint)
    if attacks is None:
        own_code.permit_attacks(trained.config.evaluate.attacks, workdir / "config.json")
    settings = config.plain(trained.config.evaluate) | {"samples": None}
    settings["attacks"] = tuple(map(canonical, settings["attacks"] if attacks is None else attacks))
    settings |= {} if n is None else {"n": n}
    check_settings(settings)
    check_network(trained.model, trained.facts["input_shape"], settings)
    return trained, settings, run.test_split(trained, settings["n"])


def check_counts(attacks: Sequence[str]) -> None:
    """InputError for an attack with count=attacked, in an analysis whose other rows need correct clean images."""
    for name in attacks:
        if parse(name)[1].get("count", "both") != "both":
            raise InputError(f"{name} counts other images than the rows of this analysis; leave out count=attacked")


def attack(
    name: str, predict: Callable, trained: run.Run, split: Split, settings: dict[str, Any]
) -> tuple[Flags, np.ndarray]:
    """(flags, adversarial images) of the whole split under one attack of `evaluation/named.py` on a network."""
    chosen, total, seed = named(name, trained.config.objective), len(split.labels), trained.config.seed
    norm, eps, batch_size = settings["norm"], settings["eps"], settings["batch_size"]
    if chosen.make is None:
        options = dict(norm=norm, eps=eps, batch_size=batch_size, title=name, keep=total)
        options["attacked_in"] = settings["precision"]
        network, made = lambda x, keys: predict(trained.variables, x)[0], chosen.of_autoattack()
        return auto_attack(network, split, seed, made, **options)[:2]
    scorer = make_scorer(chosen, lambda variables, x, keys: predict(variables, x), settings, cluster.mesh())
    step_size = chosen.step_size(eps, settings["step_size"])
    return scorer(trained.variables, split, seed, eps=eps, step_size=step_size, progress=name, keep=total)


def feature_shapes(predict: Callable, variables: Any, input_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """{tap: its shape for one image}, in the order in which the network computes them."""
    found = {}

    def note(variables, x):  # what eval_shape returns is sorted by name
        found.update({name: feature.shape for name, feature in predict(variables, x)[1].items()})

    jax.eval_shape(note, variables, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    return found


def predictions(predict: Callable, variables: Any, images: np.ndarray, batch_size: int) -> np.ndarray:
    """The predicted classes (N,) of images (N, H, W, C), at the precision of flags; InputError where logits are NaN."""
    classify = jax.jit(partial(classes_of, predict))
    parts = [images[first : first + batch_size] for first in range(0, len(images), batch_size)]
    with precision.at(precision.JUDGEMENT):
        classes = np.concatenate([np.asarray(classify(variables, part)) for part in parts])
    if undefined := int(np.sum(classes < 0)):
        raise InputError(
            f"the network returns NaN or infinite logits for {undefined} of these images: no class to show"
        )
    return classes


def classes_of(predict: Callable, variables: Any, images: Array) -> Array:
    """The predicted classes (B,) of one batch (B, H, W, C); −1 where logits are NaN."""
    return losses.predicted(predict(variables, to_float(images))[0])
