"""The order of training-mode passes is what each page says, and passes that are made for statistics change no loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ib_rar import BATCH, NET, VARIABLES, X_ADV, taps

from ibjax.errors import InputError
from ibjax.objectives.ard import ard
from ibjax.objectives.dkl import dkl
from ibjax.objectives.iad import iad
from ibjax.objectives.ibd import ibd
from ibjax.objectives.label_smoothing import label_smoothing
from ibjax.objectives.mart import mart
from ibjax.objectives.pgd_at import pgd_at
from ibjax.objectives.rslad import rslad
from ibjax.objectives.score import score
from ibjax.objectives.te import te
from ibjax.objectives.trades import trades

OTHER = jax.tree.map(lambda w: np.asarray(w)[::-1], VARIABLES["params"])
TAUGHT = NET._replace(teacher=lambda x: taps(OTHER, x), assistant=lambda x: taps(OTHER, x[::-1]))
EARLY, LATE = ({**BATCH, "index": jnp.arange(16), "epoch": jnp.float32(epoch)} for epoch in (39.9, 60.0))
# the order of passes, x as 1 and x' as 2, is a number that the network of test_ib_rar writes into its statistics
ORDERS = {
    "pgd_at": (pgd_at(), 2),
    "pgd_at, Rice et al.": (pgd_at(passes="adv,adv,clean"), 221),
    "pgd_at, IBD's code": (pgd_at(passes="clean,adv"), 12),
    "pgd_at of older runs": (pgd_at(clean_forward=True), 21),
    "trades": (trades(), 12),
    "trades, its authors": (trades(passes="clean,adv,clean"), 121),
    "trades of older runs": (trades(forwards=3), 121),
    "trades, AWP's authors": (trades(passes="adv,clean,clean"), 211),
    "label_smoothing": (label_smoothing(), 2),
    "label_smoothing of clean images": (label_smoothing(base="standard"), 1),
    "label_smoothing, Pang et al.": (label_smoothing(passes="adv,clean,clean"), 211),
    "score": (score(), 12),
    "score of adversarial images": (score(base="pgd_at"), 2),
    "dkl": (dkl(variant="dkl"), 21),
    "mart": (mart(), 12),
    "te": (te(), 2),
    "te on trades": (te(base="trades"), 12),
    "ard": (ard(), 21),
    "rslad": (rslad(), 21),
    "ibd": (ibd(beta=0.0), 12),
    "iad I": (iad(), 21),
    "iad II": (iad(variant="II"), 21),
    "iad I, its authors": (iad(passes="code"), 2211),
    "iad II, its authors": (iad(variant="II", passes="code"), 21),
}


def result(objective, params, batch):
    """(loss, order of passes)."""
    variables = {**VARIABLES, "params": params, "memory": jnp.full((16, 3), 0.2)}
    value, (after, _) = objective.loss(TAUGHT, variables, batch, jnp.asarray(X_ADV), jax.random.key(0))
    return value, after["batch_stats"]["passes"]


def order(objective, batch=LATE):
    """The passes, in a program that has nothing else to compute."""
    return float(jax.jit(lambda params: result(objective, params, batch)[1])(VARIABLES["params"]))


def with_gradient(objective, batch):
    """((loss, order of passes), gradient)."""
    return jax.jit(jax.value_and_grad(lambda params: result(objective, params, batch), has_aux=True))(
        VARIABLES["params"]
    )


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_what_the_page_says(name):
    objective, expected = ORDERS[name]
    assert order(objective) == expected


def test_before_it_begins_iads_code_makes_other_passes():
    """The first variant one over x for the label's weightless term, the second none."""
    assert order(iad(passes="code"), EARLY) == 221
    assert order(iad(variant="II", passes="code"), EARLY) == 2
    assert order(iad(variant="II"), EARLY) == 21


@pytest.mark.parametrize(
    ("plain", "more"),
    [
        (pgd_at(), pgd_at(passes="clean,adv")),
        (pgd_at(), pgd_at(passes="adv,adv,clean")),
        (trades(), trades(passes="adv,clean,clean")),
        (label_smoothing(), label_smoothing(passes="adv,clean,clean")),
        (iad(), iad(passes="code")),
        (iad(variant="II"), iad(variant="II", passes="code")),
    ],
)
@pytest.mark.parametrize("batch", [EARLY, LATE], ids=["early", "late"])
def test_passes_for_statistics_change_no_loss_and_no_gradient(plain, more, batch):
    ((value, _), gradient), ((other, _), other_gradient) = (with_gradient(made, batch) for made in (plain, more))
    np.testing.assert_allclose(value, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, other_gradient)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pgd_at(passes="clean"),
        lambda: pgd_at(passes=""),
        lambda: pgd_at(passes="adv,x"),
        lambda: trades(passes="adv"),
        lambda: label_smoothing(base="standard", passes="adv"),
        lambda: iad(passes="adv,clean"),
    ],
)
def test_an_order_that_lacks_what_the_loss_needs_is_refused(make):
    with pytest.raises(InputError, match=r"objective.passes='.*' is (not allowed|unknown)"):
        make()
