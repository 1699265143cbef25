"""Every product of a program states its precision, and the right one (`ibjax.devices.precision`).

Programs are traced, never compiled: their jaxprs are walked, with all jaxprs inside them.
"""

import contextlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.lax import Precision
from jax.sharding import AxisType, Mesh
from test_forms import NETWORKS, X, Y, everything

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import methods
import programs

from ibjax import config, wrap
from ibjax.attacks import pgd
from ibjax.devices import cores, precision
from ibjax.errors import InputError
from ibjax.evaluation import named
from ibjax.evaluation.report import provenance
from ibjax.net import linen_net

KEY = jax.random.key(0)
DEFAULT, HIGH, HIGHEST = Precision.DEFAULT, Precision.HIGH, Precision.HIGHEST
# primitive -> why its products may say nothing; nothing needs this now
EXCEPTIONS: dict[str, str] = {}
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "scaled_matmul")


def stated(closed):
    """[precisions of each product] of a program and of the programs inside it."""
    found, ahead = [], [closed.jaxpr]
    while ahead:
        for equation in ahead.pop().eqns:
            if equation.primitive.name in PRODUCTS and equation.primitive.name not in EXCEPTIONS:
                said = equation.params["precision"]
                found.append((set(said) if isinstance(said, tuple) else {said}, equation))
            for part in jax.tree.leaves(equation.params, is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)):
                if isinstance(part, Jaxpr | ClosedJaxpr):
                    ahead.append(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
    return found


def check(closed, *allowed):
    """Asserts that a program has products, and that each of them states one of the allowed precisions."""
    found = stated(closed)
    wrong = [equation for said, equation in found if not said <= set(allowed)]
    assert found and not wrong, "\n".join(f"{e.params['precision']}: {e.source_info.traceback}" for e in wrong[:3])
    return set().union(*(said for said, _ in found))


# ---- programs of the package --------------------------------------------------------------------------------------


@pytest.fixture
def unaided(monkeypatch):
    """JAX's default stays unset, so that products have a precision only where they state it themselves."""
    monkeypatch.setattr(jax, "default_matmul_precision", lambda name: contextlib.nullcontext())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_of_a_network_states_the_precision_that_is_asked_for(name, unaided):
    """Values and gradients, in evaluation and training mode, in the forms of each platform."""
    for platform, dtype in (("cpu", "float32"), ("cuda", "bfloat16"), ("tpu", "bfloat16")):
        model = methods.network(NETWORKS[name], dtype)
        with cores.elsewhere(platform), precision.at("high"):
            variables = jax.eval_shape(model.init, KEY, X)
            closed = jax.make_jaxpr(lambda v, x, m=model: everything(m, v, x))(variables, X)
        assert HIGH in check(closed, HIGH, HIGHEST)


@pytest.mark.parametrize("name", programs.TABLE)
@jax.numpy_dtype_promotion("standard")  # optax's Adam mixes a float with its integer count
def test_every_product_of_a_program_states_its_precision(name, unaided):
    """Train steps "default", attacks and analyses "high"; what is judged, and estimators of information, "highest"."""
    kind, _, rest = name.partition(" ")
    scale, mesh = (
        programs.SMALL._replace(batch=4, seen=4),
        Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,)),
    )
    with cores.elsewhere("cuda"):  # where the judgement is a pass of its own
        program = programs.TABLE[name](scale, mesh)
        closed = program.call.trace(*jax.eval_shape(program.make)).jaxpr
    usual = DEFAULT if kind in ("objective", "perturbation") else HIGH
    found = check(closed, usual, HIGHEST)
    assert usual in found
    if kind == "attack" and named.named(rest if rest in named.ATTACKS else f"{rest}-2").make is not None:
        assert HIGHEST in found  # AutoAttack's parts are judged from the host


# ---- who decides ----------------------------------------------------------------------------------------------------

MODEL = methods.network(methods.TINY)


def of_predict(net, *contexts):
    variables = jax.eval_shape(MODEL.init, KEY, X)
    with contexts[0] if contexts else contextlib.nullcontext():
        return check(jax.make_jaxpr(lambda v, x: net(v, x)[0])(variables, X), DEFAULT, HIGH, HIGHEST)


def test_a_network_alone_is_evaluated_at_high_and_as_its_caller_asks():
    predict = linen_net(MODEL).predict
    assert of_predict(predict) == {HIGH}
    assert of_predict(predict, precision.at("default")) == {DEFAULT}
    assert of_predict(predict, precision.at("highest")) == {HIGHEST}
    assert of_predict(predict, jax.default_matmul_precision("float32")) == {HIGHEST}
    with jax.default_matmul_precision("float32"):
        assert of_predict(predict, precision.at("default")) == {DEFAULT}  # a name outweighs JAX's default
    assert precision.asked() is None
    with pytest.raises(
        InputError, match="precision='hihg' is unknown; allowed: default, high, highest; did you mean 'high'"
    ):
        precision.at("hihg").__enter__()


def test_a_jitted_network_is_traced_anew_for_another_precision():
    """A program that was traced for one precision is not used for another."""
    predict, seen = linen_net(MODEL).predict, []

    @jax.jit
    def inner(v, x):
        seen.append(precision.asked())
        return predict(v, x)

    of_predict(inner)
    of_predict(inner, precision.at("highest"))
    of_predict(inner, precision.at("highest"))
    assert seen == [None, "highest"]


def test_the_gradient_of_pixels_states_the_precision_of_the_forward_pass_wherever_it_is_taken():
    """Derivatives of a jitted network are traced outside of the context in which the network was called."""
    model = methods.network(methods.TINY, "bfloat16")
    variables = jax.eval_shape(model.init, KEY, X)
    with cores.elsewhere("cuda"):
        program = jax.jit(linen_net(model).predict)
        gradient = jax.grad(lambda x, v: program(v, x)[0].sum())
        assert check(jax.make_jaxpr(gradient)(X, variables), HIGH) == {HIGH}


KERNEL = jnp.ones((32 * 32 * 3, 5))


def foreign(x):
    """A network of the user's own, which says nothing."""
    return x.reshape(len(x), -1) @ KERNEL


OF_USERS = {"function": foreign, "jitted": jax.jit(foreign), "wrapped": wrap.function(foreign).logits_fn}


@pytest.mark.parametrize("name", OF_USERS)
def test_the_products_of_a_function_of_the_users_own_are_those_of_an_evaluation(name):
    made = OF_USERS[name]

    def attacked(name=None):
        attack = pgd.pgd(steps=1)
        with precision.at(name) if name else precision.evaluating():
            return check(jax.make_jaxpr(lambda x: attack(KEY, made, x, Y))(X), HIGH, HIGHEST)

    bare = jax.make_jaxpr(lambda x: pgd.pgd(steps=1)(KEY, made, x, Y))(X)
    assert check(bare, HIGH) == attacked() == {HIGH}
    assert attacked("highest") == {HIGHEST}
    if made is foreign:
        assert {None} == set().union(*(said for said, _ in stated(jax.make_jaxpr(made)(X))))  # what is to be mended


# ---- configurations and records of earlier versions -----------------------------------------------------------------


def test_an_earlier_run_is_trained_and_evaluated_as_it_was():
    earlier = config.base()
    with earlier.unlocked():
        del earlier["precision"], earlier.evaluate["precision"]
        read = config.upgrade(earlier)
    assert (read.precision, read.evaluate.precision) == ("default", "default")
    assert (config.base().precision, config.base().evaluate.precision) == ("default", "high")
    said = {None: "default", "None": "default", "float32": "highest", "tensorfloat32": "high", "high": "high"}
    assert {given: precision.of_record({"precision": given}) for given in said} == said
    for key in ("precision", "evaluate.precision"):
        wrong = config.base()
        wrong.update_from_flattened_dict({key: "double"})
        with pytest.raises(InputError, match=f"{key}='double' is unknown; allowed: default, high, highest"):
            config.check(wrong)


def test_a_report_says_at_which_precision_its_numbers_were_made():
    earlier, later = {"precision": "None", "n": 10}, {"precision": "high", "judged_in": "highest", "n": 300}
    records = [earlier, {**later, "changed_by_judgement": 2}, {**later, "changed_by_judgement": 0}]
    assert provenance._precision(records) == (
        "attacks at default, flags judged at default; attacks at high, flags judged at highest; 2 of 600 flags were "
        "changed by this judgement"
    )
