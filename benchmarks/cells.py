"""The cells of benchmarks/results.py, in the order in which they run: what each trains, attacks and compares with.

`minutes` are those of the machine on which a family was first timed: two CPU cores, or one H200 for cells that need an
accelerator. `results.py --list` scales them to the machine that it runs on.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """One network, or one more attack on the network of another cell."""

    name: str  # of its folder
    group: str  # a key of GROUPS: the table of results/README.md that it belongs to
    row: str  # of the paper's table, and of ours
    seed: int
    data: str  # "mnist", "digits" or "cifar10"
    recipe: str  # as `--config` takes it, or "digits:OBJECTIVE" as benchmarks/comparison.py trains it
    changes: Mapping[str, Any]  # key of the configuration -> value
    attacks: tuple[str, ...]
    n: int | None  # test images; None: all
    minutes: float
    paper: Mapping[str, float] = {}  # "clean" or an attack's name -> the paper's number
    teacher: str = ""  # the cell whose network, after its last epoch, is the teacher
    terms: str = ""  # the objective whose terms are measured, as in benchmarks/effects.py
    of: str = ""  # attack only: the cell whose network is attacked
    accelerator: bool = False  # whether it is for an accelerator only
    against: tuple[str, ...] = ()  # the cells that it is compared with, image by image


class Group(NamedTuple):
    """A table of results/README.md."""

    title: str
    says: str  # what the reader has to know of it


# ---- MNIST -----------------------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
CNN_ATTACKS = ("pgd-20", "pgd-40", "cw-l2-20(lr=0.003)")  # the paper's
STRONGER = "margin-100(step_size=0.03)"  # in steps that cross the ball; the paper's 20 of 0.01 reach two thirds of it
EPOCHS = 2  # of the paper's 100; five attack steps of 0.1 in place of 40 of 0.01
SHORT = {
    "epochs": EPOCHS,
    "schedule": dict(name="one_cycle"),
    "optimizer.lr": 0.05,
    "attack.steps": 5,
    "attack.step_size": "0.1",
}
WITHOUT_ATTACK = {key: value for key, value in SHORT.items() if not key.startswith("attack.")}
MNIST_MINUTES, AUTOATTACK_MINUTES = 15.0, 110.0  # of one network

# row -> (recipe, changes, the paper's numbers)
TABLE_4 = {
    "Standard": ("configs/baselines_shared.py:mnist-standard", SHORT, (99.16, 96.25, 95.54, 94.32, 90.59)),
    "TRADES": ("configs/baselines_shared.py:mnist-trades", SHORT, (99.14, 97.85, 96.44, 97.28, 92.90)),
    "MART": ("configs/baselines_shared.py:mnist-mart", SHORT, (99.28, 98.10, 96.75, 97.32, 92.60)),
    "MMA": (
        "configs/baselines_shared.py:mnist-mma",
        WITHOUT_ATTACK | {"optimizer.lr": 1e-3, "objective.steps": 5},
        (99.12, 97.35, 95.89, 96.15, 91.02),
    ),
    "shared information": (
        "configs/shared_information.py:mnist",
        # β rises over the paper's share of the training, step by step: two epochs hold no steps of whole epochs
        SHORT | {"objective.warmup": 0.1 * EPOCHS, "objective.ramp": 0.9 * EPOCHS, "objective.stepping": "step"},
        (99.10, 98.60, 96.64, 98.23, 95.76),
    ),
}
OURS = TABLE_4["shared information"]


LABELS = {"Standard": "Standard (PGD-AT)"}  # the paper's name of PGD training -> the label of the row


def mnist(group: str, row: str, seed: int, recipe: str, changes: Mapping[str, Any], **more: Any) -> Cell:
    """A network on MNIST, attacked on 2,000 test images."""
    name = f"mnist-{slug(row)}-{seed}" if group == "table4" else f"mnist-{group}-{slug(row)}-{seed}"
    given = dict(attacks=(*CNN_ATTACKS, STRONGER), n=2000, minutes=MNIST_MINUTES) | more
    return Cell(name, group, LABELS.get(row, row), seed, "mnist", recipe, changes, **given)


def slug(row: str) -> str:
    """A row's name as a folder can have it: TRADES -> trades, "α = 0.5" -> alpha-0.5."""
    for symbol, word in {"x'": "x-adv", "α": "alpha", "β": "beta", "λ": "lambda", "×": "x", "₁": "1"}.items():
        row = row.replace(symbol, word)
    words = "".join(c if c.isalnum() or c == "." else " " for c in row.lower()).split()
    return "-".join(words)


def autoattack(cell: Cell, minutes: float, n: int) -> Cell:
    """AutoAttack on a cell's network; on as many images as on those that it is compared with."""
    paper = {key: value for key, value in cell.paper.items() if key == "autoattack"}
    return cell._replace(
        name=f"{cell.name}-autoattack", attacks=("autoattack",), n=n, minutes=minutes, paper=paper, of=cell.name,
        teacher="", terms="", against=(),
    )  # fmt: skip


def table_4(seed: int) -> Iterable[Cell]:
    """Shared information, Table 4, left half."""
    for row, (recipe, changes, numbers) in TABLE_4.items():
        paper = dict(zip(("clean", *CNN_ATTACKS, "autoattack"), numbers, strict=True))
        others = tuple(f"mnist-{slug(name)}-{seed}" for name in TABLE_4) if row == "shared information" else ()
        yield mnist("table4", row, seed, recipe, changes, paper=paper, against=others[:-1])


def methods(seed: int) -> Iterable[Cell]:
    """IB-RAR, SiRIIB and IBD against their bases; that of IB-RAR is Standard of Table 4, which is PGD-AT."""
    standard, made = TABLE_4["Standard"][0], lambda row: f"mnist-methods-{slug(row)}-{seed}"
    bases = (f"mnist-standard-{seed}", f"mnist-trades-{seed}")
    siriib = dict(
        name="siriib",
        backbone=dict(name="resnet", blocks=(1, 1), width=16),
        scales=(28, 20, 14, 8),
        widths=(16,),
        fourier="amp_phase",  # the default needs colours
    )
    ib_rar = SHORT | {"objective": dict(name="ib_rar")}
    yield mnist("methods", "IB-RAR", seed, standard, ib_rar, terms="ib_rar", minutes=20, against=bases[:1])
    if seed == 0:  # the second attempt
        paper = SHORT | {"objective": dict(name="ib_rar", alpha=0.1, beta=1.0)}
        row = "IB-RAR, α and β of the text"
        yield mnist("methods", row, seed, standard, paper, terms="ib_rar", minutes=20, against=bases[:1])
    plain = SHORT | {"model": siriib}
    yield mnist("methods", "PGD-AT, SiRIIB's network", seed, standard, plain, terms="siriib", minutes=60)
    singular = plain | {"objective": dict(name="siriib", lam=20.0)}
    base = made("PGD-AT, SiRIIB's network")
    yield mnist("methods", "SiRIIB", seed, standard, singular, terms="siriib", minutes=75, against=(base,))
    trades = TABLE_4["TRADES"][0]
    wide = SHORT | {"model.widths": ((64, 64), (128, 128)), "model.hidden": (400, 400)}
    yield mnist("methods", "TRADES, 4 × as large", seed, trades, wide, minutes=50)
    teacher = made("TRADES, 4 × as large")
    distilled = {"attack.loss": "kl", "attack.init": "gaussian"}
    for row, objective in (
        ("RSLAD", dict(name="rslad", reduction="sum")),
        ("IBD, β = 0", dict(name="ibd", beta=0.0)),
        ("IBD", dict(name="ibd")),
    ):
        changes, others = SHORT | distilled | {"objective": objective}, bases
        if row == "IBD":
            others = (*bases, made("RSLAD"), made("IBD, β = 0"))
        yield mnist("methods", row, seed, standard, changes, teacher=teacher, minutes=25, against=others)


def curves() -> Iterable[Cell]:
    """Table 10's terms, and the curves of α, λ (Table 12) and β (Figure 3), one seed."""
    recipe, changes, _ = OURS
    rows: dict[str, dict[str, float]] = {
        "CE(x) only, both terms": {"alpha": 0.0},
        "CE(x') only, both terms": {"alpha": 1.0},
        "both CE, I": {"beta": 0.0},
        "both CE": {"beta": 0.0, "lam": 0.0},
        "both CE, D_SKL": {"lam": 0.0},
    }
    for row, options in rows.items():
        own = {f"objective.{key}": value for key, value in options.items()}
        terms = dict(terms="shared_information", against=("mnist-shared-information-0",))
        yield mnist("table10", row, 0, recipe, changes | own, **terms)
    for symbol, key, values in (
        ("β", "beta", (0.1, 1.0, 10.0, 30.0)),
        ("λ", "lam", (0.01, 1.0)),
        ("α", "alpha", (0.1, 0.3, 0.7, 0.9)),
    ):
        for value in values:
            own = {f"objective.{key}": value}
            yield mnist("curves", f"{symbol} = {value:g}", 0, recipe, changes | own, terms="shared_information")
    for information, lam in (("trace", 1e-3), ("nhsic", 0.1)):  # forms of I whose weight is felt
        own = {"objective.information": information, "objective.lam": lam}
        row = f"I = {information}, λ = {lam:g}"
        yield mnist("curves", row, 0, recipe, changes | own, terms="shared_information")
    for method, values in (("TRADES", (0.1, 6.0, 30.0)), ("MART", (0.1, 1.0, 30.0))):
        of_method, own, _ = TABLE_4[method]
        for value in values:
            yield mnist("curves", f"{method}, β = {value:g}", 0, of_method, own | {"objective.beta": value})


# ---- digits: can a student pass its teacherless base? ----------------------------------------------------------------

CHANNELS = {1: 1.0, 4: 2.0, 16: 4.0}  # times the student's weights -> times its channels
TEACHERS = ((4, 20), (4, 1), (1, 20), (1, 1), (4, 5), (1, 5), (16, 1), (16, 5), (16, 20))  # sizes, lengths
BEST = "4 × as large, 20 × as long"
LENGTHS = {20: 1.0, 60: 3.0, 200: 10.0}  # epochs -> times the minutes of 20
DIGITS_MINUTES = 1.0  # of AutoAttack


def digits(row: str, seed: int, objective: str, epochs: int, changes: Mapping[str, Any], **more: Any) -> Cell:
    """A network on the digits."""
    attacks = ("pgd-20", "margin-20", "autoattack")
    given = dict(attacks=attacks, n=None, minutes=0.6 * LENGTHS[epochs] + DIGITS_MINUTES) | more
    changes = {"epochs": epochs, **changes}
    return Cell(f"digits-{slug(row)}-{seed}", "ibd", row, seed, "digits", f"digits:{objective}", changes, **given)


def best_taught(seed: int) -> Iterable[Cell]:
    """The bases, and IBD, IBD without its feature term and RSLAD from the teacher that is most likely to help."""
    for epochs in LENGTHS:
        for title, objective in (("PGD-AT", "pgd_at"), ("TRADES", "trades")):
            yield digits(f"{title}, {epochs} epochs", seed, objective, epochs, {})
    yield from of_teacher(*TEACHERS[0], seed, tuple(LENGTHS))


def otherwise_taught(seed: int) -> Iterable[Cell]:
    """The other teachers of the grid, whose students have 200 epochs only where they do; and IBD's own options."""
    for size, longer in TEACHERS[1:]:
        yield from of_teacher(size, longer, seed, tuple(LENGTHS) if longer == 20 else (20, 60), STUDENTS[1:])
    for title, options in OPTIONS.items():
        own = {f"objective.{key}": value for key, value in options.items()}
        made = student(f"IBD, {title}, from {BEST}, 60 epochs", seed, "ibd", 60, own, BEST)
        yield made._replace(against=bases(60, seed))


def of_teacher(
    size: int, longer: int, seed: int, lengths: tuple[int, ...], students: tuple | None = None
) -> Iterable[Cell]:
    """A teacher of one size and length of training, and its students."""
    teacher = f"{size} × as large, {longer} × as long"
    larger = {"model.widths": widths(CHANNELS[size]), "epochs": 20 * longer}
    yield digits(f"teacher {teacher}", seed, "trades", 20, larger, minutes=0.6 * size**0.6 * longer + DIGITS_MINUTES)
    for epochs in lengths:
        others = bases(epochs, seed)
        for title, objective, options in students or STUDENTS:
            made = student(f"{title} from {teacher}, {epochs} epochs", seed, objective, epochs, options, teacher)
            yield made._replace(against=others)
            if objective == "rslad" or options:
                others = (*others, made.name)


def bases(epochs: int, seed: int) -> tuple[str, ...]:
    """The cells without a teacher of so many epochs."""
    return tuple(f"digits-{slug(f'{title}, {epochs} epochs')}-{seed}" for title in ("PGD-AT", "TRADES"))


def student(row: str, seed: int, objective: str, epochs: int, changes: Mapping[str, Any], teacher: str) -> Cell:
    """A network on the digits that learns from the teacher of a row."""
    return digits(row, seed, objective, epochs, changes, teacher=f"digits-{slug(f'teacher {teacher}')}-{seed}")


def widths(wider: float) -> tuple[tuple[int, ...], ...]:
    """The channels of the digits' network, so many times."""
    return tuple(tuple(round(wider * width) for width in stage) for stage in ((32, 32), (64, 64)))


STUDENTS = (
    ("RSLAD", "rslad", {}),
    ("IBD without its feature term", "ibd", {"objective.beta": 0.0}),
    ("IBD", "ibd", {}),
)
OPTIONS = {
    "α = 0.5": {"alpha": 0.5},
    "α = 1": {"alpha": 1.0},
    "β = 8": {"beta": 8.0},
    "β = 80": {"beta": 80.0},
    "attack target student": {"attack_target": "student"},
    "code": {"alpha": 0.8, "teacher_features": "nat", "teacher_noise": 0.001},
}

# ---- CIFAR-10 (JPEG), on an accelerator ------------------------------------------------------------------------------

CARD = {
    "model": dict(name="preact_resnet", depth=18, dtype="bfloat16"),
    "augment.padding": "edge",
    "batch_size": 512,
    "optimizer.lr": 0.3,
    "schedule": dict(name="one_cycle"),
}
DISTILLED = {"attack.loss": "kl", "attack.init": "gaussian"}
TEACHER, SHORTER = "cifar10-trades-30-epochs-0", "cifar10-trades-20-epochs-0"


def cifar10(row: str, epochs: int, changes: Mapping[str, Any], minutes: float, **more: Any) -> Cell:
    """A network on CIFAR-10 (JPEG), with the options of CARD."""
    recipe = more.pop("recipe", "configs/baselines_ibd.py")
    given = dict(attacks=("pgd-20", "margin-20"), n=None, accelerator=True) | more
    changes = {**CARD, "epochs": epochs, **changes}
    return Cell(f"cifar10-{slug(row)}-0", "cifar10", row, 0, "cifar10", recipe, changes, minutes=minutes, **given)


def on_a_card() -> Iterable[Cell]:
    """In an order in which each cell adds a comparison; AutoAttack last."""
    kl = lambda objective, **options: DISTILLED | {"objective": dict(name=objective, **options)}  # noqa: E731
    vgg = {"model": dict(name="vgg", depth=16, dtype="bfloat16"), "optimizer.lr": 0.05}
    # one pass, over x', as IB-RAR and SiRIIB make; the recipe's pass over x is for logging and moves batch-norm
    adv = dict(name="pgd_at", passes="adv")
    masked = dict(name="ib_rar", mask_tap="stage5", mask_channels=10)  # as in configs/ib_rar.py
    robust = masked | dict(base="standard", layers="robust")
    cells = [
        cifar10("PGD-AT, 20 epochs", 20, {"objective": adv}, 2.9),
        cifar10("PGD-AT, 30 epochs", 30, {"objective": adv}, 3.5),
        cifar10("TRADES, 30 epochs", 30, kl("trades", beta=6.0), 4.0),
        cifar10("TRADES, 20 epochs", 20, kl("trades", beta=6.0), 2.9),
        cifar10("RSLAD, mean over classes, from TRADES of 20 epochs", 20, kl("rslad"), 3.5, teacher=SHORTER),
        cifar10("IBD, from TRADES of 20 epochs", 20, kl("ibd"), 4.5, teacher=SHORTER),
        cifar10("IBD without its feature term, from TRADES of 20 epochs", 20, kl("ibd", beta=0.0), 3.5,
                teacher=SHORTER),
        cifar10("IBD, 20 epochs", 20, kl("ibd"), 4.5, teacher=TEACHER, paper={"clean": 83.17, "autoattack": 52.11}),
        cifar10("RSLAD, 20 epochs", 20, kl("rslad", scale=10.0), 3.5, teacher=TEACHER,
                paper={"clean": 83.38, "autoattack": 51.52}),
        cifar10("IBD without its feature term, 20 epochs", 20, kl("ibd", beta=0.0), 3.5, teacher=TEACHER),
        cifar10("IBD code, 20 epochs", 20,
                kl("ibd", alpha=0.8, teacher_features="nat", teacher_noise=0.001), 4.5, teacher=TEACHER),
        cifar10("VGG16, PGD-AT, 20 epochs", 20, vgg | {"objective": adv}, 3.0, paper={"clean": 75.02}),
        cifar10("VGG16, IB-RAR on PGD-AT, 20 epochs", 20, vgg | {"objective": masked}, 4.0,
                terms="ib_rar", paper={"clean": 76.22}),
        cifar10("VGG16, CE, 20 epochs", 20, vgg | {"attack": None, "objective": dict(name="standard")}, 1.5),
        cifar10("VGG16, IB-RAR, 20 epochs", 20,
                vgg | {"attack": None, "objective": robust}, 2.5, terms="ib_rar"),
        cifar10("shared information, 20 epochs", 20,
                {"model": dict(name="stochastic", backbone=CARD["model"], latent=256),
                 "objective": dict(name="shared_information", warmup=2, ramp=15)}, 4.0,
                terms="shared_information", paper={"clean": 81.87, "pgd-20": 55.51, "autoattack": 57.40}),
        *(cifar10(f"SiRIIB, λ₁ = {lam:g}, 20 epochs", 20,
                  {"model": dict(name="siriib", backbone=dict(name="resnet", depth=18, dtype="bfloat16")),
                   "objective": dict(name="siriib", lam=lam)}, 6.0, terms="siriib")
          for lam in (0.0, 20.0)),
        *(cifar10(f"PGD-AT, {title}, 20 epochs", 20, {"objective": adv, **changes}, 2.9)
          for title, changes in INGREDIENTS.items()),
    ]  # fmt: skip
    others = {row: tuple(f"cifar10-{slug(other)}-0" for other in of_row) for row, of_row in AGAINST.items()}
    cells = [cell._replace(against=others.get(cell.row, ())) for cell in cells]
    return [*cells, *(autoattack(cell, 1.5, 1000) for cell in cells)]


INGREDIENTS = {  # of the leaderboards' recipes, on PGD-AT of 20 epochs
    "no ingredient": {},  # the network of "PGD-AT, 20 epochs", of which no flags of single images were kept
    "average of the weights": {"ema_decay": 0.995, "averaging.warmup": True},
    "SiLU": {"model.activation": "silu"},
    "smoothed labels": {"smoothing": dict(delta=0.1, form="uniform", images="all")},
    "CutMix": {"mix": dict(name="cutmix")},
    "CutMix and average": {"mix": dict(name="cutmix"), "ema_decay": 0.995, "averaging.warmup": True},
}
AGAINST = {
    "IBD, from TRADES of 20 epochs": (
        "PGD-AT, 20 epochs", "TRADES, 20 epochs", "RSLAD, mean over classes, from TRADES of 20 epochs",
        "IBD without its feature term, from TRADES of 20 epochs",
    ),
    "IBD, 20 epochs": (
        "PGD-AT, 20 epochs", "TRADES, 20 epochs", "TRADES, 30 epochs", "RSLAD, 20 epochs",
        "IBD without its feature term, 20 epochs",
    ),
    "PGD-AT, 30 epochs": ("PGD-AT, 20 epochs",),
    **{f"PGD-AT, {title}, 20 epochs": ("PGD-AT, no ingredient, 20 epochs",) for title in list(INGREDIENTS)[1:]},
    "IBD code, 20 epochs": ("IBD, 20 epochs",),
    "VGG16, IB-RAR on PGD-AT, 20 epochs": ("VGG16, PGD-AT, 20 epochs",),
    "VGG16, IB-RAR, 20 epochs": ("VGG16, CE, 20 epochs",),
    "shared information, 20 epochs": ("PGD-AT, 20 epochs", "TRADES, 20 epochs"),
    "SiRIIB, λ₁ = 20, 20 epochs": ("SiRIIB, λ₁ = 0, 20 epochs",),
}  # fmt: skip


# ---- all -------------------------------------------------------------------------------------------------------------

GROUPS = {
    "table4": Group(
        "Shared information, Table 4, MNIST",
        "The paper trains for 100 epochs (MART and MMA 50) with PGD-40 in steps of 0.01; its AA consists of APGD-CE, "
        "untargeted APGD-DLR, FAB and Square. Ours is the standard AutoAttack. l_inf, eps 0.3. PGD-20 and PGD-40 take "
        "the paper's steps of 0.01 from a random start, and 20 of them reach two thirds of eps; margin PGD has larger "
        "steps. C&W takes 20 steps in l2 and has no bound. Ours train for two epochs with five attack steps of 0.1, "
        "and β rises within them as over the paper's hundred. AutoAttack attacks the networks of seed 0.",
    ),
    "methods": Group(
        "IB-RAR, SiRIIB and IBD against their bases, MNIST",
        "The papers have no numbers on MNIST. The base of IB-RAR is Standard (PGD-AT) above; those of IBD are "
        "Standard (PGD-AT) and TRADES above, RSLAD, and IBD without its feature term. l_inf, eps 0.3; AutoAttack on "
        "the networks of seed 0.",
    ),
    "table10": Group(
        "Shared information, Table 10's terms, MNIST",
        "The paper's numbers are of CIFAR-10. All terms together are the row of Table 4. l_inf, eps 0.3.",
    ),
    "curves": Group(
        "Shared information, curves of α, λ (Table 12) and β (Figure 3), MNIST",
        "Each row differs from that of Table 4 (α 0.5, β 4, λ 0.001; TRADES: β 1) in one value. l_inf, eps 0.3.",
    ),
    "ibd": Group(
        "IBD on the digits: can a student pass its teacherless base?",
        "Teachers are TRADES networks. Sizes are of the weights, lengths of the epochs, both relative to 20 epochs of "
        "the student's network. l_inf, eps 2/16. The grid has one seed and 360 test images: its best row is one of "
        "many, chosen on the test set, until other seeds confirm it.",
    ),
    "cifar10": Group(
        "CIFAR-10 (JPEG), PreActResNet-18 or VGG16",
        "The images are CIFAR-10's after JPEG compression, so that numbers compare with each other and not with those "
        "on CIFAR-10; the papers' are shown for orientation. bfloat16, batch size 512, one cycle. l_inf, eps 8/255. "
        "nHSIC depends on the batch size; IB-RAR's is 100. The rows of IB-RAR have the weights of its code, but "
        "momentum 0.9, weight decay 0.0005, learning rate 0.05 and eps 8/255; the code trains adversarially without "
        "momentum, with weight decay 0.01, learning rate 0.01 and eps 0.03. The paper's AutoAttack of shared "
        "information (57.40) is its own set of APGD-CE, untargeted APGD-DLR, FAB and Square.",
    ),
}


def cells() -> dict[str, Cell]:
    """All cells by name, in their order."""
    ordered = [
        *(cell for seed in SEEDS for cell in best_taught(seed)),
        *table_4(0), *methods(0), *otherwise_taught(0),
        *(autoattack(cell, AUTOATTACK_MINUTES, 2000) for cell in table_4(0)),
        *table_4(1), *table_4(2), *curves(), *methods(1), *methods(2),
        *(autoattack(cell, AUTOATTACK_MINUTES, 2000) for cell in methods(0)),
        *on_a_card(),
    ]  # fmt: skip
    named = {cell.name: cell for cell in ordered}
    if len(named) < len(ordered):
        raise ValueError("two cells have the same name")
    return named
