"""Adversarial representation attack (ARA): Sabour et al., "Adversarial Manipulation of Deep Representations", ICLR
2016, as in the shared-information paper (MERL TR2022-141, eq. 17).

    min_x'  ‖φ(x') − φ(x_guide)‖²        subject to  |x' − x| ≤ ε,  0 ≤ x' ≤ 1

by L-BFGS-B from x' = x, for each image separately. φ is the layer before the output (for a stochastic layer, its mean).
An image is broken if x' is not classified as the label of x.

| symbol | code  | default  |
|--------|-------|----------|
| σ      | eps   | "10/255" | the paper: 5, 10, 15 of 255
| step   | steps | 20       | maximum number of iterations, without those of the line search. The paper: 10, 20

The paper does not state the starting point or how the guides of the test set are chosen. Here the attack starts at x,
and the guide of an image is drawn from the images of other classes (`guides`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ibjax.attacks import Attack, geometry, lbfgsb
from ibjax.attacks.entrance import ANYTHING, checked, images
from ibjax.errors import InputError, check_count


def ara(*, eps: "str | float | Array" = "10/255", steps: int = 20) -> Attack:
    """An attack `(key, features_fn, x, guide) -> x_adv`; `key` is not used.

    `features_fn` maps (B, H, W, C) to features (B, …), each image independently; `guide` holds an image for each of x.

        x_adv = ara()(key, lambda x: net.predict(variables, x)[1]["pre_logits"], x, images[guides(labels)])

    Raises:
      InputError: an eps that is not a radius for [0, 1] images, steps < 1, guides of another shape.
    """
    eps = geometry.radius(eps, "linf")
    check_count("steps", steps)

    def attack(key: Array, features_fn: Callable, x: Array, guide: Array) -> Array:
        if np.shape(guide) != x.shape:
            raise InputError(f"guides have shape {np.shape(guide)}; give one image for each of x, {x.shape}")
        guide = images(guide, "guides")
        wanted = features_fn(guide)
        radius = geometry.per_image(eps, x)
        lower, upper = jnp.maximum(x - radius, 0.0), jnp.minimum(x + radius, 1.0)

        def one(x, wanted, lower, upper):
            def distance(flat):
                return jnp.sum((features_fn(flat.reshape(1, *x.shape))[0] - wanted) ** 2)

            flat, _ = lbfgsb.minimize(distance, x.ravel(), lower.ravel(), upper.ravel(), steps=steps)
            return flat.reshape(x.shape)

        return geometry.project(jax.vmap(one)(x, wanted, lower, upper), x, "linf", eps)

    return checked(attack, ANYTHING, draws=False)


def guides(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """For every image (N,), the index of its guide, drawn uniformly from the images with another label.

    Choose guides for the whole test set before splitting it into batches, so that no result depends on the batches.
    Raises InputError if all labels are the same.
    """
    labels = np.asarray(labels)
    order = np.argsort(labels, kind="stable")  # sorted by class
    _, group, count = np.unique(labels, return_inverse=True, return_counts=True)
    if len(count) < 2:
        raise InputError("guides come from another class; all images have the same label")
    after_own = np.cumsum(count)[group]  # where the image's class ends in `order`; other classes follow, cyclically
    drawn = np.random.default_rng(seed).integers(0, len(labels) - count[group])
    return order[(after_own + drawn) % len(labels)]
