"""What a configuration must be for its data, its network, its objective and its teachers: see `experiment.build`.

Each function raises InputError on what would fail later, or would be ignored.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from ibjax import config, extensions
from ibjax.calls import factory, signature
from ibjax.data import Arrays, streamed
from ibjax.errors import InputError
from ibjax.net import as_output
from ibjax.step import Objective


def data(settings: ConfigDict, found: Arrays) -> None:
    """Checks what the configuration makes of its data: selection, batches, crops."""
    if settings.select_on == "val" and found.val is None:
        raise InputError("data.val_size=0 leaves nothing to select on; hold some out, or set select_on='test'")
    _padding(settings.augment.get("pad", 0), found.train.images.shape[1:3])
    if streamed(found.train) and "name" not in settings.augment and (settings.augment.pad or settings.augment.flip):
        raise InputError(
            "streamed images are cropped and flipped as they are read; set augment.pad=0, augment.flip=False"
        )
    if len(found.train.labels) < settings.batch_size:
        raise InputError(f"batch_size={settings.batch_size} exceeds the {len(found.train.labels)} training images")


def _padding(pad, size):
    """Raises InputError if a crop shifted by `pad` in both directions could miss its image altogether."""
    if pad >= min(size):
        raise InputError(
            f"augment.pad={pad} is not allowed with images of {size[0]}×{size[1]} pixels: crops would miss the image; "
            f"give less than {min(size)}, 4 is usual for 32×32"
        )


def model(settings: ConfigDict, network: nn.Module, found: Arrays) -> None:
    """Checks that the network does something to images of such a shape, and returns logits for their classes."""
    _modulation(settings.model, found.train.images.shape[-1])
    if config.own_source("models", settings.model.name) is not None:
        _logits(network, found)


def _modulation(section, channels):
    """Raises InputError where SiRIIB's module would only scale the images."""
    if section.name == "siriib" and section.get("fourier", "amplitude") == "amplitude" and channels == 1:
        raise InputError(
            "model.fourier='amplitude' mixes the moduli of colours, and images of one channel would only be scaled; "
            "set model.fourier='amp_phase' or 'reim'"
        )


def _logits(network, found):
    """Raises InputError where a network of the user's own does not return logits for the classes of the data."""
    x = jax.ShapeDtypeStruct((1, *found.train.images.shape[1:]), np.float32)
    try:
        made = jax.eval_shape(lambda x: as_output(network.init_with_output(jax.random.key(0), x, train=False)[0]), x)
    except InputError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"the network cannot be traced: {extensions.failure(error)}") from error
    if made[0].shape != (1, found.num_classes):
        raise InputError(
            f"the network returns logits of shape {made[0].shape}; the data has {found.num_classes} classes: give "
            f"(1, {found.num_classes}) for images of shape {x.shape}"
        )


def objective(settings: ConfigDict, made: Objective) -> None:
    """Checks that the objective uses the attack, the head's optimiser and the teachers that are configured."""
    _attack(settings, made)
    if settings.head_optimizer.lr is not None and made.head is None:
        raise InputError(
            f"objective '{settings.objective.name}' has no trained head here, and head_optimizer would be ignored; "
            f"set head_optimizer.lr=None"
        )
    for role in config.TEACHERS:
        if role not in made.teachers and (settings[role].workdir or settings[role].recipe):
            raise InputError(
                f"objective '{settings.objective.name}' asks no {role} and would ignore it; set {role}.workdir='' and "
                f"{role}.recipe=None"
            )
    attacked = settings.attack is not None or made.attack is not None
    if settings.validate.stop_on_overfitting and not attacked:
        raise InputError(
            "validate.stop_on_overfitting looks at the robust accuracy that adversarial training loses; this run "
            "trains on clean images, set it to False"
        )
    if settings.bn_statistics == "adv" and not attacked:
        raise InputError("bn_statistics='adv' needs adversarial images; this run trains on clean ones, set 'all'")
    if settings.attack_bn != "eval" and settings.attack is None:
        raise InputError(f"attack_bn='{settings.attack_bn}' needs an attack; set it to 'eval'")


def _attack(settings, made):
    """Raises InputError where the objective ignores the attack, lacks one, or needs one with another loss."""
    name, losses = settings.objective.name, made.attack_losses
    if settings.attack is None:
        if losses:
            raise InputError(f"objective '{name}' needs an attack; set attack=dict(name='pgd', loss='{losses[0]}', …)")
        return
    loss = settings.attack.get("loss", "ce")
    if not losses:
        why = "makes its own adversarial images" if made.attack else "trains on clean images"
        raise InputError(f"objective '{name}' {why} and would ignore the attack; set attack=None")
    if loss not in losses:
        raise InputError(f"attack.loss='{loss}' does not go with objective '{name}'; allowed: {', '.join(losses)}")
    default = signature(factory("attacks", settings.attack.name))[0].get("init")
    start = settings.attack.get("init", None if default is None else default.default)
    if made.flat_at_x and start == "none":
        raise InputError(
            f"attack.init='none' of '{settings.attack.name}' starts where the loss that objective '{name}' has the "
            f"attack climb has no gradient; use 'gaussian'"
        )


def teacher(folder: Path, taught: dict[str, Any], found: Arrays) -> None:
    """Checks that a teacher, of whose run these are the facts, is one of such images."""
    if taught["num_classes"] != found.num_classes:
        raise InputError(
            f"the teacher in {folder} has {taught['num_classes']} classes, the data has {found.num_classes}; "
            f"give a teacher of this data set"
        )
    if tuple(taught["input_shape"]) != found.train.images.shape[1:]:
        raise InputError(
            f"the teacher in {folder} takes images of shape {tuple(taught['input_shape'])}, "
            f"the data has {found.train.images.shape[1:]}"
        )
