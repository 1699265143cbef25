"""Expectation over transformation: Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018.

    max_x'  mean_s L(f(k_s, x'), target)          f(k, x): the network with the randomness of key k;  s = 1 … samples

For a randomised network the gradient of one draw is noisy; the attack maximises the mean loss of many draws. Guarantees
(tests of the same names): the gradient is the mean of the samples' gradients; a deterministic network gives the plain
attack's result.

The random draws are a function of the key and of the point x': a new point gets fresh draws, and the same point the
same ones. With a key per image they depend on that image alone, so neither batch size nor number of devices changes
them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ibjax.attacks import Attack
from ibjax.attacks.checks import first
from ibjax.attacks.entrance import as_key, enter, images
from ibjax.attacks.pgd import fold_in, loss_function, target_kind
from ibjax.errors import check_count

Stochastic = Callable[[Array, Array], Any]  # (one key, x (B, H, W, C)) -> logits (B, classes), or (logits, …)
StochasticAttack = Callable[[Array, Stochastic, Array, Array], Array]
_NOISE = 0x656F74  # folded into the key: the network's draws differ from those of the attack's start


def eot(
    *, attack: Callable[..., Attack], samples: int = 20, loss: "str | Callable" = "ce", **options: Any
) -> StochasticAttack:
    """An attack `(key, stochastic, x, target) -> x_adv` on the mean loss of `samples` draws.

    Args:
      attack: a factory that takes a `loss` function of the network's output: `pgd`, `mim`, `nifgsm`, `spsa`.
        Its other decisions, such as the choice between restarts, use the mean logits.
      samples: draws per gradient; memory grows with samples × batch.
      loss: the loss of one draw, as in `pgd`.
      options: further options of the attack.

    Attacks without such a `loss` can be given `lambda x: sampled(key, stochastic, samples)(x)[0]`, the mean logits.
    """
    check_count("samples", samples)
    one = loss_function(loss)

    def mean_loss(output, target):
        return jnp.mean(jax.vmap(lambda draw: one(draw, target))(output[1]), axis=0)

    ascend = attack(loss=mean_loss, **options)

    def expected(key: Array, stochastic: Stochastic, x: Array, target: Array) -> Array:
        key = as_key(key, images(x))
        network = sampled(fold_in(key, _NOISE), stochastic, samples)
        # coupled: an image's draws depend on its position in the batch
        key, x, target = enter(key, network, x, target, target_kind(loss), coupled=True)
        return ascend(key, network, x, target)

    return expected


def sampled(key: Array, stochastic: Stochastic, samples: int) -> Callable[[Array], tuple[Array, Any]]:
    """x -> (mean logits (B, classes), all outputs with a leading axis `samples`); `key` is one key or one per image."""
    check_count("samples", samples)

    def forward(x):
        typed = as_key(key, x)
        at_x = _fold_in_point(typed, x)

        def draw(s):
            if typed.ndim == 0:
                return stochastic(fold_in(at_x, s), x)
            alone = jax.vmap(lambda k, image: jax.tree.map(lambda z: z[0], stochastic(k, image[None])))
            return alone(fold_in(at_x, s), x)

        outputs = jax.vmap(draw)(jnp.arange(samples))
        return jnp.mean(first(outputs), axis=0), outputs

    return forward


def _fold_in_point(key, x):
    """The key, or each image's key, with the bits of x folded in."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(x).astype(jnp.float32), jnp.uint32).reshape(x.shape[0], -1)
    odd = jnp.uint32(2) * jax.random.bits(jax.random.key(_NOISE), bits.shape[1:]) + jnp.uint32(1)
    digest = jnp.sum(
        (bits ^ (bits >> 15)) * odd[None], axis=1
    )  # modulo 2³²; the shift lets high bits reach the low ones
    if key.ndim == 0:
        return jax.random.fold_in(key, jnp.sum(digest * (2 * jnp.arange(len(digest), dtype=jnp.uint32) + 1)))
    return jax.vmap(jax.random.fold_in)(key, digest)
