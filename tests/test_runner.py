"""The runner: which programs a plan compiles, and that how it runs them changes no image."""

import itertools
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checks import one_step
from test_faults import environment

from ibjax.attacks import geometry, progress, runner
from ibjax.attacks.apgd import iterative_apgd
from ibjax.attacks.autoattack import autoattack, sub_attacks
from ibjax.attacks.fab import iterative_fab
from ibjax.attacks.iterative import Iterative, lead
from ibjax.attacks.runner import Runner
from ibjax.attacks.square import iterative_square
from ibjax.devices import forms
from ibjax.errors import PreemptedError

RNG = np.random.default_rng(0)
N, CLASSES, EPS = 64, 5, 0.02
X = np.float32(RNG.uniform(0.25, 0.75, size=(N, 4, 4, 3)))
WEIGHTS = np.float32(RNG.normal(size=(48, CLASSES)))
OTHERS = np.argsort(-(X.reshape(N, -1) @ WEIGHTS), axis=1)
Y, OTHERS = OTHERS[:, 0], OTHERS[:, 1:]
KEY = jax.random.key(0)
PIXELS = np.float32(RNG.uniform(size=(1, 4, 4, 3)))  # of `searching`


@jax.jit
def curved(x):
    z = x.reshape(x.shape[0], -1) @ WEIGHTS
    return z + jnp.sin(3 * z[:, ::-1])


def run(plan, todo=None, eps=EPS, others=OTHERS, batch_size=64, made=None):
    """(runner, flags (N,) after each attack, images) of a plan {name: attack}; `made`: by an earlier runner."""
    made = made or Runner(KEY, curved, X, Y, norm="linf", eps=eps, batch_size=batch_size)
    broken, x_adv, after = np.zeros(N, bool), X.copy(), {}
    for name, attack in plan.items():
        left = np.nonzero(~broken)[0] if todo is None else todo
        for _ in made.run(name, attack, left, others, broken, x_adv):
            pass
        after[name] = ~broken
    return made, after, x_adv


def few(queries=60):
    return {
        "apgd-ce": iterative_apgd("ce", "linf", EPS, 3),
        "apgd-t": iterative_apgd("dlr_targeted", "linf", EPS, 3),
        "fab-t": iterative_fab("linf", EPS, 3, targets=2),
        "square": iterative_square("linf", EPS, queries),
    }


def searching(queries, eps=EPS):
    """A search that is as small as one can be: a query moves all pixels to walls of the ball, by the image's key.

    What lowers the margin is kept, and an image is done where the margin is not above 0.
    """

    def start(keys, restart, x, y):
        return keys, x, jnp.full(len(x), jnp.inf)

    def step(i, logits_fn, x, y, other, state, exact=None):
        keys, best, margin = state
        drawn = (jax.random.key_data(keys)[:, -1] % 997).astype(x.dtype)  # a number of each image
        waves = jnp.sin(geometry.per_image(drawn * jnp.float32(1 + i), x) * PIXELS)
        moved = jnp.clip(x + eps * jnp.sign(waves), 0, 1)
        found = lead(logits_fn, exact, moved, y, margin > 0)
        better = (margin > 0) & (found < margin)
        return keys, jnp.where(geometry.per_image(better, x), moved, best), jnp.where(better, found, margin)

    def x_adv(x, state):
        return jnp.where(geometry.per_image(done(state), x), state[1], x)

    def done(state):
        return state[2] <= 0

    return Iterative("search", "linf", eps, start, step, queries, x_adv, done, gradient=False)


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """Programs are compiled ahead and sizes chosen as there; `on_an_accelerator(queries=…)` changes more."""

    def change(**fields):
        monkeypatch.setitem(forms.TABLE, "cpu", forms.TABLE["cpu"]._replace(**fields))

    change(**{name: getattr(forms.TABLE["cuda"], name) for name in ("compiling", "ahead", "queries")})
    return change


# ---- which programs ------------------------------------------------------------------------------------------


def test_attacks_that_differ_in_their_loss_or_name_are_one_program():
    apgd, others = few()["apgd-ce"], (few()["apgd-t"], iterative_apgd("ce", "linf", EPS, 3))
    assert all(other.functions() == apgd.functions() for other in others)
    step = one_step(EPS)
    plan = {"step": step, "towards two": step._replace(targets=2), "search": searching(3), "again": step}
    made, _, _ = run(plan, todo=np.arange(N))
    assert len(made.programs) == 2


def test_a_size_is_compiled_only_where_its_steps_save_more_than_that_takes(on_an_accelerator):
    sizes = Runner(KEY, curved, X, Y, norm="linf", eps=EPS, batch_size=64).sizes
    assert sizes == [8, 16, 24, 32, 40, 48, 56, 64]  # of eight devices
    plan, _ = sub_attacks("standard", "linf", EPS, 10)
    used = {name: runner.worthwhile(sizes, attack.steps) for name, attack in plan.items()}
    assert used == {"apgd-ce": [64], "apgd-t": [64], "fab-t": [64], "square": sizes}
    for steps in (101, 700, 5001):
        chosen = runner.worthwhile(sizes, steps)
        saved = [steps * (larger - size) / 64 for size, larger in itertools.pairwise(chosen)]
        assert all(each > 500 for each in saved) and (steps < 600) == (len(chosen) == 1)
    on_an_accelerator(compiling=30)
    assert runner.worthwhile(sizes, 101) == [16, 40, 64]


def test_a_batch_that_is_nearly_done_shrinks_only_to_sizes_that_pay(on_an_accelerator):
    plan = {"search": searching(200, 0.2)}
    on_an_accelerator(compiling=1)
    made, after, _ = run(plan, eps=0.2, batch_size=16)
    assert len(made.programs) > 1
    on_an_accelerator(compiling=10**6)
    made, again, _ = run(plan, eps=0.2, batch_size=16)
    assert len(made.programs) == 1
    np.testing.assert_array_equal(after["search"], again["search"])


def test_many_queries_at_once_change_no_flag_and_most_are_made_where_least_changes(on_an_accelerator):
    attack = searching(701)
    found = {}
    for queries in (50, 500):
        on_an_accelerator(queries=queries)
        found[queries] = run({"search": attack})[1]["search"], runner.stops(attack)
    np.testing.assert_array_equal(found[50][0], found[500][0])
    assert 0 < found[50][0].sum() < N
    assert found[50][1] == [*range(50, 701, 50), 701] and found[500][1] == [50, 100, 200, 400, 701]
    assert len(runner.stops(iterative_square("linf", EPS, 5000))) == 14


def test_a_program_ends_where_all_of_its_images_are_done():
    attack = iterative_square("linf", EPS, 1000)._replace(done=lambda state: state >= 70)
    count = jax.jit(lambda start, stop, state: runner._steps(attack, lambda i, s: s + 1, start, stop, state))
    np.testing.assert_array_equal(count(0, 1000, jnp.array([0, 3])), [100, 103])  # looks after each 50 queries
    np.testing.assert_array_equal(count(0, 30, jnp.array([0, 3])), [30, 33])
    np.testing.assert_array_equal(count(950, 1001, jnp.array([0, 0])), [51, 51])


def test_a_batch_that_is_given_up_between_its_programs_is_as_if_it_had_not_begun():
    """What it has found so far is not kept, so that whoever goes on ends with the same bits."""
    attack = searching(120)
    made, _, wanted = run({"search": attack})
    looks, given_up, position = [False, True, True, *[False] * 9], 0, 0

    def heed():
        if looks.pop(0):
            raise PreemptedError

    made.heed, broken, x_adv = heed, np.zeros(N, bool), X.copy()
    while position < N:
        try:
            position = next(made.run("search", attack, np.arange(N), OTHERS, broken, x_adv, position))
        except PreemptedError:
            given_up += 1
            assert not broken.any() and np.array_equal(x_adv, X)
    assert given_up == 2 and broken.any()
    np.testing.assert_array_equal(x_adv, wanted)


# ---- compiled ahead ------------------------------------------------------------------------------------------


def attack(**options):
    return autoattack(KEY, curved, X, Y, "linf", EPS, **{"attacks": few(), "batch_size": 64, **options})


def test_what_is_compiled_ahead_in_threads_has_the_same_flags_and_images(on_an_accelerator, monkeypatch):
    compile, threads = jax.stages.Lowered.compile, []

    def noting(self, *args, **kwargs):
        threads.append(threading.current_thread().name)
        return compile(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", noting)
    found = {}
    for ahead in (False, True):
        on_an_accelerator(ahead=ahead, products="rounded")
        threads.clear()
        found[ahead] = attack(attacks={"search": searching(60)})
        assert all(name.startswith("compile") == ahead for name in threads)
        assert len(threads) == 2 + 4  # clean and judged logits, the parts of the attack
    np.testing.assert_array_equal(found[False].x_adv, found[True].x_adv)
    for name, flags in found[False].robust_after.items():
        np.testing.assert_array_equal(found[True].robust_after[name], flags)


def test_what_goes_wrong_in_a_thread_is_raised_where_its_program_is_called(on_an_accelerator, monkeypatch):
    compile, count = jax.stages.Lowered.compile, [0]

    def failing(self, *args, **kwargs):
        count[0] += 1
        if count[0] > 4:  # the logits and the programs of a step are well
            raise ValueError("no space left on the card")
        return compile(self, *args, **kwargs)

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    seen, finish = [], progress.Progress.finish_attack
    monkeypatch.setattr(progress.Progress, "finish_attack", lambda self, *a: (seen.append(a), finish(self, *a)))
    step = one_step(EPS)
    with pytest.raises(ValueError, match="no space left on the card"):
        attack(attacks={"once": step, "again": step, "another": one_step(EPS)})
    assert len(seen) == 2


def test_an_attack_that_leaves_ball_or_box_ends_the_evaluation():
    for shift in (1e-3, 1.0):
        cheat = one_step(EPS)._replace(x_adv=lambda x, state, shift=shift: state[0] + shift)
        with pytest.raises(RuntimeError, match="away or outside"):
            attack(attacks={"step": cheat})


def test_an_interrupted_evaluation_does_not_wait_for_the_compiler(on_an_accelerator, monkeypatch):
    compile, count, released = jax.stages.Lowered.compile, [0], threading.Event()

    def slow(self, *args, **kwargs):
        count[0] += 1
        if count[0] > 4:
            released.wait(60)
        return compile(self, *args, **kwargs)

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jax.stages.Lowered, "compile", slow)
    monkeypatch.setattr(progress.Progress, "finish_attack", interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            attack(attacks={"once": one_step(EPS), "another": one_step(EPS)})
        assert not released.is_set()
    finally:
        released.set()


ENDING = """
import time, types
from ibjax import errors
from ibjax.attacks.programs import Compiler
from ibjax.devices import forms
from ibjax.errors import PreemptedError

def command():
    forms.TABLE["cpu"] = forms.TABLE["cpu"]._replace(ahead=True)
    compiler = Compiler()
    compiler.compile(types.SimpleNamespace(compile=lambda: time.sleep(60)))
    compiler.close()
    print(time.time(), flush=True)
    raise errors.PreemptedError("the state is saved")

errors.exit_with(command)
"""


def test_a_command_that_is_preempted_ends_with_its_exit_code_while_a_program_is_compiled():
    """A machine that is taken away is switched off after half a minute; large programs take longer."""
    done = subprocess.run([sys.executable, "-c", ENDING], env=environment(), capture_output=True, text=True, timeout=50)
    assert done.returncode == 75 and "preempted: the state is saved" in done.stderr, done.stderr
    assert time.time() - float(done.stdout) < 20


def test_further_targets_change_no_image_that_the_first_one_breaks():
    """A step towards one class, and towards three in turn, the least likely first."""
    made, first, once = run({"step": one_step(0.1, targets=1)}, eps=0.1, others=OTHERS[:, ::-1])
    _, broken, x_adv = run({"step": one_step(0.1, targets=3)}, others=OTHERS[:, ::-1], made=made)
    first, broken = ~first["step"], ~broken["step"]
    assert 0 < first.sum() < broken.sum() and np.all(broken[first])
    np.testing.assert_allclose(x_adv[first], once[first], atol=1e-5)


def test_a_name_draws_for_itself_although_it_shares_its_program():
    step = one_step(0.1, drawn=True, targets=1)
    made, _, first = run({"step": step}, eps=0.1, todo=np.arange(N))
    images = [first, *(run({name: step}, todo=np.arange(N), made=made)[2] for name in ("step", "another"))]
    assert len(made.programs) == 1
    np.testing.assert_array_equal(images[0], images[1])
    assert np.any(images[0] != images[2])
