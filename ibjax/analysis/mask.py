"""The permanent channel mask of IB-RAR (Xu et al., 2023), section 2.3: zeroes channels with little label information.

    φ_c = 1 where nHSIC(Y, f_c) ≥ thr, else 0            thr excludes the 5 % of channels with the lowest values

    python -m ibjax.analysis.mask --workdir=DIR --tap=stage5 --out=DIR2 [--checkpoint=best] [--share=0.05]

nHSIC is a mean over batches of clean training images, of the run's own batch size, in evaluation mode. DIR2 becomes a
run with the same weights in a network of `ibjax.models.masked`, which applies the mask in attacks and at test; it can
be evaluated, loaded and reported like any other. The tap is the last convolution's output: stage5 of VGG, pre_logits
(pooled) of residual networks. The paper does not say on which images it computes nHSIC; we use 50 batches.
"""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibjax import config, errors, files
from ibjax.analysis import commands
from ibjax.analysis.attacked import feature_shapes
from ibjax.errors import InputError, nearest
from ibjax.net import linen_net, to_float
from ibjax.objectives.ib_rar import channel_information, permanent_mask
from ibjax.runs import command_line, run, rundir, trees

BATCHES = 50


def information(trained: run.Run, tap: str, batches: int = BATCHES) -> np.ndarray:
    """Mean nHSIC(Y, f_c) of each channel of a tap, shape (C,), over random batches of clean training images."""
    net = linen_net(trained.model)
    features = feature_shapes(net.predict, trained.variables, trained.facts["input_shape"])
    if tap not in features:
        raise InputError(f"--tap={tap} is no feature of the network; {nearest(tap, features)}")
    train, size = run.load_data(trained.config).train, trained.config.batch_size
    order = np.random.default_rng(0).permutation(len(train.labels))
    measure = jax.jit(functools.partial(channel_information, net, tap=tap))
    rows = [order[first : first + size] for first in range(0, len(order) - size + 1, size)][:batches]
    values = [
        measure(trained.variables, to_float(jnp.asarray(train.images[row])), jnp.asarray(train.labels[row]))[1]
        for row in rows
    ]
    return np.mean(np.stack(values), axis=0)


def mask(workdir: Path, out: Path, tap: str, checkpoint: str = "best", share: float = 0.05) -> tuple[int, ...]:
    """Writes the masked run into `out`; returns the masked channels."""
    out = files.path(out)
    errors.check_range("--share", share, 0, 1)
    trained = run.load(workdir, checkpoint)
    with_y = information(trained, tap)
    channels = tuple(np.flatnonzero(np.asarray(permanent_mask(jnp.asarray(with_y), share)) == 0).tolist())
    if not channels:
        raise InputError(f"--share={share} of {len(with_y)} channels is less than one; give more")
    settings = trained.config.copy_and_resolve_references()
    settings.title = f"{settings.title or trained.workdir.resolve().name}, masked"
    inner = config.plain(settings.model)
    settings.model = dict(name="masked", backbone=inner, tap=tap, channels=channels)
    masked = dict(step=trained.step, weights=trees.digest(trained.variables), share=share)
    with rundir.lock(out):
        variables = {kind: {"backbone": tree} if tree else {} for kind, tree in trained.variables.items()}
        validation = trained.validation  # of the unmasked network
        facts = {**trained.facts, "masked": masked}
        rundir.write_network(out, settings, facts, variables, step=trained.step, validation=validation)
        log = trained.workdir / "metrics.jsonl"
        if jax.process_index() == 0 and log.is_file():
            shutil.copy(log, out / log.name)
    return channels


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_run("ibjax.analysis.mask", __doc__)
    parser.add_argument("--tap", required=True, help="the feature, as stage5")
    parser.add_argument("--out", type=files.path, required=True, help="workdir of the masked run; made if absent")
    parser.add_argument("--share", type=float, default=0.05, help="of the channels that are zeroed")
    given = parser.parse_args()

    def measure():
        return mask(given.workdir, given.out, given.tap, given.checkpoint, given.share)

    def lines(channels):
        yield f"{given.out}: {len(channels)} channels of {given.tap} are zero: {', '.join(map(str, channels))}"
        yield f"python -m ibjax.evaluate --workdir={given.out}"

    commands.conduct(given, measure, lines)


if __name__ == "__main__":
    main()
