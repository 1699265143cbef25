"""Times the information terms at the size of a CIFAR batch, beside the PGD-10 step of ResNet-18 that they add to.

    python benchmarks/information.py [--batch=128] [--repeats=5] [--dtype=float32|bfloat16] [--quiet]

    nHSIC   Σ_l nHSIC(X, T_l) − nHSIC(Y, T_l) over ResNet-18's ten taps, with its gradient to the taps
    mask    nHSIC of X and of Y with each of 512 pooled channels, no gradient
    SVD     mean squared differences of singular values, polar factors and pixels of two batches, with its gradient

Taps and images come from a network with random weights, or for the SVD are noise. Writes a JSON with every single time,
and the table beside it as Markdown.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pgd_step

from ibjax import run
from ibjax.attacks.pgd import pgd
from ibjax.information import hsic
from ibjax.information.svd import singular_values_and_polar
from ibjax.models import resnet
from ibjax.objectives.pgd_at import pgd_at

LAYERS = ("stem", *(f"block{i}" for i in range(1, 9)), "pre_logits")
BASE = "PGD-10 step, ResNet-18"
CALLS = 5  # of a term in one round: they are short


def terms(batch_size: int, dtype: str) -> dict[str, Callable[[int], Any]]:
    """{name: runs so many evaluations of the term and waits for them}."""
    model = resnet.Model(num_classes=10, depth=18, dtype=dtype)
    x, y = (jnp.asarray(array) for array in pgd_step.noise(batch_size))
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    features = jax.jit(model.apply)(variables, x)[1]
    taps = [features[name] for name in LAYERS]

    def operators(x, y):
        return jnp.stack([hsic.correlation_operator(hsic.scaled_gram(x)), hsic.label_operator(y, 10)])

    def nhsic(taps, x, y):
        with_x, with_y = hsic.nhsic_layers(operators(x, y), taps)
        return jnp.sum(0.008 * with_x - 0.08 * with_y)

    def svd(x, other):
        pairs = zip(parts(x), parts(other), strict=True)
        return sum(jnp.mean(jnp.square(a - b)) for a, b in pairs)

    def parts(x):
        channels = jnp.moveaxis(x, -1, 1)
        return (*singular_values_and_polar(channels), channels)

    return {
        "nHSIC, 10 layers, with gradient": runner(jax.value_and_grad(nhsic), taps, x, y),
        "mask, 512 channels": runner(
            lambda z, x, y: hsic.nhsic_channels(operators(x, y), z), features["pre_logits"], x, y
        ),
        f"SVD, {3 * batch_size} of 32 × 32, with gradient": runner(jax.value_and_grad(svd), x, jnp.flip(x, axis=0)),
    }


def runner(f: Callable, *arguments: Any) -> Callable[[int], Any]:
    """`pgd_step.alternate`'s form of a function."""
    compiled = jax.jit(f)

    def steps(n):
        for _ in range(n):
            jax.block_until_ready(compiled(*arguments))

    return steps


def measure(batch_size: int, dtype: str, repeats: int, quiet: bool) -> dict[str, Any]:
    """The record that the JSON holds."""
    model = resnet.Model(num_classes=10, depth=18, dtype=dtype)
    base = {BASE: pgd_step.ibjax_steps(model, pgd_at(), pgd(), batch_size)}
    seconds, elsewhere = {}, {}
    for runners, calls in ((base, 1), (terms(batch_size, dtype), CALLS)):
        pgd_step.warm_up(runners, [])
        times = pgd_step.alternate(runners, repeats, calls, quiet)
        seconds |= times.seconds
        elsewhere |= times.elsewhere
    return {
        "batch": batch_size,
        "dtype": dtype,
        "repeats": repeats,
        "calls_per_repeat": {BASE: 1, "terms": CALLS},
        "seconds": seconds,
        "processors_busy_elsewhere": elsewhere,
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    base = statistics.median(record["seconds"][BASE])
    lines = ["| batch | dtype |  | ms, median (min – max) | of the step |", "|---|---|---|---|---|"]
    for name, times in record["seconds"].items():
        middle, low, high = (1e3 * f(times) for f in (statistics.median, min, max))
        share = f"{100 * middle / 1e3 / base:.1f} %"
        lines.append(
            f"| {record['batch']} | {record['dtype']} | {name} | {middle:,.1f} ({low:,.1f} – {high:,.1f}) | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default, help="of the network")
    parser.add_argument("--quiet", action="store_true", help="wait for other processes to rest")
    parser.add_argument("--out", type=Path, help="default: results/information-BACKEND-DATE.json")
    given = parser.parse_args()
    found = pgd_step.environment()
    out = given.out or Path("results") / f"information-{jax.default_backend()}-{found['date'][:10]}.json"
    record = measure(given.batch, given.dtype, given.repeats, given.quiet)
    run.write_json(out, {"benchmark": "information", **found, "records": [record]})
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    text = f"{table(record)}\n\n{found['hardware']}; {given.repeats} rounds; {versions}; {found['date'][:10]}\n"
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
