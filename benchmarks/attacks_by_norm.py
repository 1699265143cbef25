"""Compares every attack, in every norm that it supports, with an independent implementation at equal effort.

    pip install torch scipy && pip install --no-deps torchattacks==3.5.1
    pip install git+https://github.com/fra31/auto-attack@a39220048b3c9f2cca9a4d3a54604793c68eca7e
    python benchmarks/attacks_by_norm.py [--only=square] [--out=results/attacks-by-norm.json]

The measure is robust accuracy. The network has one tanh layer. Its random weights and the images come from NumPy's
generator, so that they are the same on every machine; the labels are the network's own predictions. In each row both
sides use the same number of steps, samples or queries. These numbers are small enough to reveal differences in single
steps, and eps leaves a part of the images robust. Random attacks run several times on both sides.

The reference implementations are fra31/auto-attack, torchattacks and scipy's L-BFGS-B. Where none of them has the
attack in a norm, its formula is a loop in PyTorch or NumPy in `oracles.py`. Randomised networks are evaluated at their
mean weights, transfer attacks on the network that was not attacked. C&W's images count only within eps.

`tests/test_attacks_by_norm.py` runs our side of each row again; the result may differ by at most 2 points from the
reference's mean in the file that this script writes. Each row of that file says which call has made it.
"""

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measuring
import numpy as np
from oracles import (
    GUIDES,
    SIGMA,
    SURROGATE,
    N,
    X,
    Y,
    ara_scipy,
    auto_attack,
    climb,
    deepfool_linf,
    draws,
    hidden,
    logits_fn,
    random_pixels,
    randomised,
    randomised_each,
    spsa_l2,
    torchattacks_,
)
from parts import ROOT, added_to, bare
from scipy import special

from ibjax import files
from ibjax.attacks import geometry
from ibjax.attacks.apgd import apgd
from ibjax.attacks.cw import cw
from ibjax.attacks.deepfool import deepfool
from ibjax.attacks.eot import eot
from ibjax.attacks.fab import fab
from ibjax.attacks.fgsm import fgsm
from ibjax.attacks.mim import mim
from ibjax.attacks.nifgsm import nifgsm
from ibjax.attacks.noise import noise
from ibjax.attacks.pgd import pgd
from ibjax.attacks.representation import ara
from ibjax.attacks.sparse_rs import sparse_rs
from ibjax.attacks.spsa import spsa
from ibjax.attacks.square import square
from ibjax.attacks.targeted import targeted
from ibjax.attacks.transfer import transfer

RESULTS = ROOT / "results" / "attacks-by-norm.json"


class Row(NamedTuple):
    """One attack in one norm, on both sides (numbers of images (N, H, W, C) in and out)."""

    attack: str
    norm: str
    eps: float
    settings: str  # as the table prints them
    ours: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (key, x, y) -> x_adv
    oracle: str
    theirs: Callable[[int, np.ndarray, np.ndarray], np.ndarray]  # (seed, x, y) -> x_adv
    runs: int = 5  # 1 where nothing is drawn

    @property
    def name(self) -> str:
        """Of the row, unique."""
        return f"{self.attack} {self.norm}{f' {self.settings}' * bool(self.settings)}"


def robust_accuracy(x_adv: Any, row: Row) -> float:
    """Percent of images that are still classified correctly, or whose perturbation is longer than eps."""
    x_adv = np.asarray(x_adv)
    far = np.asarray(geometry.distance(jnp.asarray(x_adv), jnp.asarray(X), row.norm)) > row.eps * (1 + 1e-4)
    return 100 * float(np.mean((logits_fn(x_adv).argmax(1) == Y) | far))


def run_ours(row: Row) -> list[float]:
    """Our robust accuracy in each run of a row."""
    attack, x, y = jax.jit(row.ours), jnp.asarray(X), jnp.asarray(Y)
    return [robust_accuracy(attack(jax.random.key(seed), x, y), row) for seed in range(row.runs)]


# ---- the rows ------------------------------------------------------------------------------------------------

AUTO, TORCH, LOOP = "auto-attack", "torchattacks", "PyTorch loop"
ROLLED = dict(unroll=False)
ONCE = dict(runs=1)
LINF, L2, L1 = 0.007, 0.16, 1.5  # radii that leave part of the images robust
# of each norm: the ball and step of our attacks, and the same as torchattacks calls them
BALLS = {norm: dict(norm=norm, eps=eps, step_size=eps / 4) for norm, eps in (("linf", LINF), ("l2", L2))}
THEIR_BALLS = {norm: dict(eps=ball["eps"], alpha=ball["step_size"]) for norm, ball in BALLS.items()}


def attacking(attack: Callable, network: Callable = logits_fn) -> Callable:
    """An attack as a row has it."""
    return lambda key, x, y: attack(key, network, x, y)


def rows() -> list[Row]:
    """The whole table."""
    return [*fgsm_rows(), *climbing_rows("linf"), *climbing_rows("l2"), *target_rows(), *other_rows(), *auto_rows()]


def fgsm_rows() -> Iterator[Row]:
    """One step."""
    theirs = torchattacks_("PGDL2", eps=L2, alpha=L2, steps=1, random_start=False)
    yield Row("fgsm", "linf", LINF, "", attacking(fgsm(eps=LINF)), TORCH, torchattacks_("FGSM", eps=LINF), **ONCE)
    yield Row("fgsm", "l2", L2, "", attacking(fgsm(norm="l2", eps=L2)), TORCH, theirs, **ONCE)


def climbing_rows(norm: str) -> Iterator[Row]:
    """Projected ascent in l_inf or l2, from the image or beside it, of one network or of draws; and noise."""
    ball, theirs, in_linf, text = BALLS[norm], THEIR_BALLS[norm], norm == "linf", "5 steps"
    eps, steps = ball["eps"], dict(steps=5, **ball, **ROLLED)
    oracle, loop = TORCH if in_linf else LOOP, partial(climb, norm, eps, ball["step_size"], 5)
    their_pgd = partial(torchattacks_, "PGD" if in_linf else "PGDL2", steps=5, **theirs)

    yield Row("pgd", norm, eps, text, attacking(pgd(**steps)), TORCH, their_pgd())
    margin = attacking(pgd(loss="margin", **steps))
    yield Row("pgd", norm, eps, f"margin, {text}", margin, LOOP, loop(loss="margin", start=True))
    same = torchattacks_("BIM", steps=5, **theirs) if in_linf else loop()
    yield Row("bim", norm, eps, text, attacking(pgd(init="none", **steps)), oracle, same, **ONCE)
    same = torchattacks_("MIFGSM", steps=5, **theirs) if in_linf else loop(momentum=1.0)
    yield Row("mim", norm, eps, text, attacking(mim(**steps)), oracle, same, **ONCE)

    drawn, draw = f"{text}, 4 samples", dict(sigma=SIGMA, samples=4)
    same = torchattacks_("EOTPGD", sigma=SIGMA, steps=5, eot_iter=4, **theirs) if in_linf else loop(start=True, **draw)
    ours = attacking(eot(attack=pgd, samples=4, **steps), randomised)
    yield Row("eot(pgd)", norm, eps, drawn, ours, oracle, same)
    ours = attacking(eot(attack=mim, samples=4, **steps), randomised)
    yield Row("eot(mim)", norm, eps, drawn, ours, LOOP, loop(momentum=1.0, **draw))

    moved = transfer(attack=pgd(**steps), surrogate=partial(logits_fn, net=SURROGATE))
    yield Row("transfer(pgd)", norm, eps, text, attacking(moved), TORCH, their_pgd(SURROGATE))
    far = 12 * eps
    for kind in ("uniform", "sign"):
        ours = attacking(noise(kind=kind, norm=norm, eps=far))
        yield Row("noise", norm, far, kind, ours, "NumPy", draws(kind, norm, far), runs=20)


def target_rows() -> Iterator[Row]:
    """Ascent on other losses than that of the label, and Nesterov's."""
    target = special.softmax(logits_fn(X), axis=1)
    trades = pgd(loss="kl", init="gaussian", steps=10, **BALLS["linf"], **ROLLED)
    theirs = torchattacks_("TPGD", steps=10, **THEIR_BALLS["linf"])
    yield Row("pgd", "linf", LINF, "KL, 10 steps", lambda key, x, y: trades(key, logits_fn, x, target), TORCH, theirs)
    for norm, name in (("linf", "PGD"), ("l2", "PGDL2")):
        ours = attacking(targeted(steps=5, **BALLS[norm], **ROLLED))
        theirs = torchattacks_(name, steps=5, mode="least_likely", **THEIR_BALLS[norm])
        yield Row("targeted", norm, BALLS[norm]["eps"], "least likely, 5 steps", ours, TORCH, theirs)
    ours = attacking(nifgsm(steps=5, **BALLS["linf"], **ROLLED))
    theirs = torchattacks_("NIFGSM", steps=5, **THEIR_BALLS["linf"])
    yield Row("nifgsm", "linf", LINF, "5 steps", ours, TORCH, theirs, **ONCE)


def other_rows() -> Iterator[Row]:
    """Without gradients, for the least length, of few pixels, and towards another image's representation."""
    text, adam = "4 steps, 32 samples", dict(delta=0.01, lr=0.01)
    ours = attacking(spsa(eps=LINF, steps=4, samples=32, **adam))
    theirs = torchattacks_("SPSA", eps=LINF, nb_iter=4, nb_sample=32, **adam)
    yield Row("spsa", "linf", LINF, text, ours, TORCH, theirs)
    ours = attacking(spsa(norm="l2", eps=L2, steps=4, samples=32, **adam))
    yield Row("spsa", "l2", L2, text, ours, "NumPy loop", spsa_l2(L2, steps=4, samples=32, **adam))

    c_and_w = dict(c=1.0, steps=30, lr=0.01)
    for compat, text in ((False, "30 steps"), (True, "compat, 30 steps")):
        ours = attacking(cw(torchattacks_compat=compat, **c_and_w))
        yield Row("cw", "l2", L2, text, ours, TORCH, torchattacks_("CW", **c_and_w), **ONCE)
    ours = attacking(deepfool(norm="linf", eps=LINF, steps=3))
    yield Row("deepfool", "linf", LINF, "3 steps", ours, "NumPy loop", deepfool_linf(3), **ONCE)
    ours = attacking(deepfool(norm="l2", eps=L2, steps=3))
    yield Row("deepfool", "l2", L2, "3 steps", ours, TORCH, torchattacks_("DeepFool", steps=3), **ONCE)

    ours = attacking(sparse_rs(eps=2, queries=150))
    yield Row("sparse_rs", "l0", 2, "150 queries", ours, "NumPy loop", random_pixels(2, 150))
    eps, towards = 4 * LINF, ara(eps=4 * LINF, steps=6)
    ours = lambda key, x, y: towards(key, hidden, x, jnp.asarray(GUIDES))  # noqa: E731
    yield Row("ara", "linf", eps, "6 iterations", ours, "scipy", ara_scipy(eps, 6), **ONCE)


def auto_rows() -> Iterator[Row]:
    """The parts of AutoAttack."""
    for norm, eps in (("linf", LINF), ("l2", L2), ("l1", L1)):
        ball, same = dict(norm=norm, eps=eps), partial(auto_attack, norm=norm, eps=eps)

        def row(attack, text, ours, theirs, norm=norm, eps=eps, **options):
            return Row(attack, norm, eps, text, ours, AUTO, theirs, **options)

        for loss in ("ce", "dlr"):
            ours = attacking(apgd(loss=loss, steps=10, **ball))
            yield row("apgd", f"{loss}, 10 steps", ours, same("apgd", loss=loss, n_iter=10))
        ours = attacking(apgd(loss="dlr_targeted", steps=10, targets=3, **ball))
        yield row("apgd-t", "10 steps, 3 targets", ours, same("apgd-t", n_iter=10, n_target_classes=3))
        ours = attacking(apgd(steps=10, eot=4, **ball), randomised_each)
        theirs = same("apgd", sigma=SIGMA, loss="ce", n_iter=10, eot_iter=4)
        yield row("apgd", "ce, 10 steps, 4 samples", ours, theirs, runs=20)
        yield row("fab", "5 steps", attacking(fab(steps=5, **ball)), same("fab", n_iter=5), **ONCE)
        theirs = same("fab", n_iter=5, targeted=True, n_target_classes=3)
        yield row("fab-t", "5 steps, 3 targets", attacking(fab(steps=5, targets=3, **ball)), theirs, **ONCE)
        ours = attacking(fab(steps=5, restarts=2, **ball))
        yield row("fab", "5 steps, 2 restarts", ours, same("fab", n_iter=5, n_restarts=2))
    ours = attacking(apgd(norm="l1", eps=L1, steps=20, larger_eps=True))
    theirs = auto_attack("apgd", "l1", L1, loss="ce", n_iter=20, use_largereps=True)
    yield Row("apgd", "l1", L1, "ce, 20 steps, from 3 eps", ours, AUTO, theirs)
    for norm, eps in (("linf", 1.5 * LINF), ("l2", 3 * L2), ("l1", 2 * L1)):
        for rescale in (False, True):
            ours = attacking(square(norm=norm, eps=eps, queries=150, rescale=rescale))
            theirs = auto_attack("square", norm, eps, n_queries=150, resc_schedule=rescale)
            yield Row("square", norm, eps, f"150 queries{', rescaled' * rescale}", ours, AUTO, theirs)


# ---- the page ------------------------------------------------------------------------------------------------


def table(records: list[dict], runs: bool = False) -> str:
    """The records as Markdown, with `runs` also how often each side ran."""
    heads = ("attack", "norm", "eps", "settings", "oracle", "theirs", "ours", "difference", *["runs"] * runs)
    lines = []
    for record in records:
        theirs, ours = (np.mean(record[side]) for side in ("theirs", "ours"))
        cells = [record[key] for key in ("attack", "norm", "eps", "settings", "oracle")]
        often = [len(record["theirs"])] * runs
        lines.append((*cells, f"{theirs:.1f}", f"{ours:.1f}", f"{ours - theirs:+.1f}", *often))
    return measuring.markdown(heads, lines)


def page(content: dict[str, Any]) -> str:
    """The table, and which call has made which rows, as Markdown."""
    made: dict[str, list[str]] = {}
    for record in content["records"]:
        made.setdefault(origin(record.get("about", {})), []).append(record["name"])
    calls = "\n".join(f"- {call}: {'; '.join(names)}" for call, names in made.items())
    note = f"{content['n']} images; robust accuracy in percent, the mean of the runs of each side"
    return f"{table(content['records'], runs=True)}\n\n{note}\n\n{calls}\n"


def origin(about: dict[str, Any]) -> str:
    """What made a row, in a line; of some rows of before only the commit is known that has put them here."""
    if "command" in about:
        return measuring.provenance_line(about)
    return f"a call that was not kept, in this file since commit {about.get('kept_since', 'unknown')}"


def environment() -> dict[str, Any]:
    """Ours, with the versions of the reference implementations that are here; auto-attack's is its commit."""
    found = measuring.environment()
    for name in ("torchattacks", "autoattack", "scipy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            package = importlib.metadata.distribution(name)
            sources = [Path(file.locate()) for file in package.files or () if file.name == "direct_url.json"]
            commits = [files.read_json(source).get("vcs_info", {}).get("commit_id") for source in sources]
            found["versions"] = {**found["versions"], name: next(filter(None, commits), package.version)}
    return found


def main() -> None:
    """The command line."""
    parser = bare(__file__, __doc__)
    parser.add_argument("--only", default="", help="rows whose names begin so; the file keeps its others")
    parser.add_argument("--out", type=files.path, default=RESULTS)
    given = parser.parse_args()
    chosen = [row for row in rows() if row.name.startswith(given.only)]
    if not chosen:
        parser.error(f"--only={given.only} begins no row's name; allowed: {', '.join(row.name for row in rows())}")
    before = added_to(given.out, "attacks_by_norm").get("records", [])
    records, found = {record["name"]: record for record in before}, environment()
    for row in chosen:
        theirs = [robust_accuracy(row.theirs(seed, X, Y), row) for seed in range(row.runs)]
        about = {key: getattr(row, key) for key in ("name", "attack", "norm", "eps", "settings", "oracle")}
        records[row.name] = {**about, "theirs": theirs, "ours": run_ours(row), "about": found}
        print(table([records[row.name]]).splitlines()[-1], flush=True)
        ordered = [records[other.name] for other in rows() if other.name in records]
        content = {"benchmark": "attacks_by_norm", "n": N, "records": ordered}
        files.write_json(given.out, content)
        given.out.with_suffix(".md").write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    measuring.run(main)
