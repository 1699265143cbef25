"""A FLOPs audit: does a compiled train step compute only what its method needs, and nothing twice?

    python -m ibjax.analysis.flops --config=configs/NAME.py[:arg] [--batch=8] [--shape=32,32,3 --classes=10]
                                   [--config.KEY=…]

    ratio    = FLOPs of the compiled step / FLOPs of one compiled forward pass in evaluation mode, same batch
    expected = cost of the method's formulas in forward passes; an input gradient costs 2, an update 3
    quotient = ratio / expected                                                    should be at most 1.05

| method           | expected                                  |
|------------------|-------------------------------------------|
| standard         | 3                                         |
| label smoothing  | 2k + 3            (3: base="standard")    |
| PGD-k            | 2k + 3                                    |
| TRADES-k         | 2k + 1 + 6                                |
| SCORE-k          | 2k + 1 + 6        (2k + 3: base="pgd_at") |
| DKL-k            | 2k + 1 + 6                                |
| HAT-k            | 2k + t + 9        (+ 1: base="trades")    |
| MART-k, ALP-k    | 2k + 6                                    |
| TE-k             | 2k + 1 + 3        (+ 3: base="trades")    |
| MMA-k            | 2k + 2 + s + 6    (s search_steps)        |
| InfoAT-R-k       | 2k + 1 + 6                                |
| IBD-k            | 2k + 6 + 2t       (t with features of the teacher at x, + 1: attack_target="student") |
|                  | 2k + 6 + t + a    (natural labels of the assistant; other labels of their own: 2k + 6 + t)  |
|                  | 3 + t             (without adversarial training)                                     |
| RSLAD-k          | 2k + 6 + t                                |
| ARD-k            | 2k + 4 + t        (2k + 6 + t with α < 1) |
| IAD-k            | 2k + 6 + 2t       (II: 2k + 6 + t + a)    |
| VIB, CEB         | 3                 (+ 2k: adversarial)     |
| IB-RAR           | 2k + 3            (3: base="standard"; + 3: "trades", "mart"; + 1: TRADES in form="original") |
| HBaR             | 2k + 6            (3: base="standard"; + 1: "trades")                                      |
| shared information | 2k + 6                                |

In the table, k is the number of attack steps; t and a are the costs of a forward pass of the teacher and of the
assistant, in units of the student's. A pass made only to update the running statistics (`objective.passes`) costs
1; it is free if the compiler merges it with an identical pass. MMA makes one more pass over x than its update needs, to
find the correctly classified images. A weight perturbation repeats the forward and backward passes of the update. Gram
matrices are not counted: at a batch of 128 those of IB-RAR are about a hundredth of a ResNet-18 step.

FLOPs are XLA's own count, which leaves out padding. It counts the body of a rolled loop once, so the attack is unrolled
here. With `--shape`, noise replaces the configuration's data. The command always compiles for the CPU.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from ibjax import errors
from ibjax.config import TEACHERS
from ibjax.errors import check_range
from ibjax.net import Net, Variables
from ibjax.runs import command_line
from ibjax.training import ahead
from ibjax.training.experiment import build, initial_state


def compiled_flops(function: Callable, *args: Any) -> float:
    """XLA's FLOP count of the compiled `function`; arguments may be `jax.ShapeDtypeStruct`s."""
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    if not cost or "flops" not in cost:
        raise RuntimeError(f"the compiler for {jax.default_backend()} counts no FLOPs; compile for the CPU")
    return float(cost["flops"])


def step_cost(
    train_step: Callable,
    bind_net: Callable[[Mapping[str, Variables] | None], Net],
    state: Any,
    batch: Any,
    frozen: Mapping[str, Variables] | None = None,
) -> dict[str, float]:
    """FLOPs of a train step and its parts: {"forward", "teacher", "assistant", "step"}; nothing is run.

    Args:
      train_step, bind_net: the result and an argument of `ibjax.step.make_train_step`; the attack must be unrolled.
      state, batch, frozen: arrays, or their shapes and types.
    """
    state, batch, frozen = (_abstract(tree) for tree in (state, batch, frozen))
    x = jax.ShapeDtypeStruct(batch["image"].shape, "float32")
    key = jax.eval_shape(lambda: jax.random.key(0))

    def teach(role):
        return lambda frozen, x: getattr(bind_net(frozen), role)(x)

    roles = {role: compiled_flops(teach(role), frozen, x) if role in (frozen or {}) else 0.0 for role in TEACHERS}
    return {
        "forward": compiled_flops(lambda variables, x: bind_net(None).predict(variables, x)[0], state.variables, x),
        **roles,
        "step": compiled_flops(train_step, state, batch, key, frozen),
    }


def _abstract(tree):
    """Shapes and types without devices, so that everything is compiled for a single device."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def expected_forwards(settings: ConfigDict, teacher: float = 0.0, assistant: float = 0.0) -> float | None:
    """The expected cost of a step in forward passes of the network; None for a method that is not in the table.

    `teacher` and `assistant` are the costs of one forward pass of each, in the same unit.
    """
    objective, attack = settings.objective, settings.attack
    ascent = 0
    if attack is not None:
        steps, restarts = attack.get("steps", 1 if attack.name == "fgsm" else 10), attack.get("restarts", 1)
        ascent = 2 * steps if restarts == 1 else restarts * (2 * steps + 1)
    rest = 0  # passes of neither the attack nor the update
    made = (objective.get("passes") or "").count(",") + 1  # in training mode
    more = made - (2 if objective.name in ("trades", "dkl") else 1) if "passes" in objective else 0
    match objective.name:
        case "standard":
            update = 3
        case "pgd_at":
            update, rest = 3, more + bool(objective.get("clean_forward"))
        case "trades":
            update, rest = 6, 1 + more + objective.get("forwards", 2) - 2
        case "label_smoothing":
            update, rest = 3, more
        case "score":
            both = objective.get("base", "trades") == "trades"
            update, rest = 6 if both else 3, both + (made - (2 if both else 1) if objective.get("passes") else 0)
        case "dkl":
            update, rest = 6, 1 + more
        case "hat":
            update, rest = 9, teacher + (objective.get("base", "trades") == "trades")
        case "mart" | "alp":
            update = 6
        case "infoat_r":
            update, rest = 6, 1
        case "te":
            update, rest = 6 if objective.get("base") == "trades" else 3, 1
        case "mma":
            update, rest = 6, 2 * objective.get("steps", 10) + 2 + objective.get("search_steps", 10)
        case "ibd":
            adversarial, labels = objective.get("adversarial", True), objective.get("labels", "robust")
            features = objective.get("beta", 0.8) > 0
            at_x_adv = features and adversarial and objective.get("teacher_features", "adv") == "adv"
            at_x = labels == "robust" or (features and not at_x_adv)
            update, rest = 6 if adversarial else 3, teacher * (at_x + at_x_adv) + assistant * (labels == "natural")
            rest += adversarial and objective.get("attack_target", "teacher") == "student"
        case "rslad":
            update, rest = 6, teacher
        case "ard":
            only_statistics = objective.get("alpha", 1.0) == 1
            update, rest = 3 if only_statistics else 6, only_statistics + teacher
        case "iad":
            first = objective.get("variant", "I") == "I"
            update, rest = 6, teacher + (teacher if first else assistant)
            rest += 2 * (first and objective.get("passes") == "code")
        case "vib" | "ceb":
            update = 3
        case "ib_rar":
            base = objective.get("base", "pgd_at")
            update = 3 if base in ("standard", "pgd_at") else 6
            rest = base == "trades" and objective.get("form") == "original"
        case "hbar":
            base = objective.get("base", "trades")
            update, rest = 3 if base == "standard" else 6, base == "trades"
        case "shared_information":
            update = 6
        case _:
            return None
    return ascent + rest + update * (2 if settings.perturb else 1)


def audit(settings: ConfigDict) -> dict[str, Any]:
    """Compiles one step of a configuration, as `experiment.build` makes it, and compares it with what its method needs.

    Returns {"method", "batch_size", "forward_flops", "teacher_flops", "assistant_flops", "step_flops", "ratio",
    "expected", "quotient"}; the last two are None for a method that `expected_forwards` does not know. Raises
    InputError as `experiment.build` does.
    """
    settings = settings.copy_and_resolve_references()
    if settings.attack is not None and settings.attack.name in ("pgd", "pgd_adam"):
        with settings.unlocked():
            settings.attack.unroll = True
    experiment = build(settings)
    image, scalar = experiment.data.train.images, ((settings.batch_size,), "int32")
    batch = {"image": ((settings.batch_size, *image.shape[1:]), image.dtype), "label": scalar, "index": scalar}
    batch = {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in batch.items()}
    state = jax.eval_shape(partial(initial_state, experiment))
    cost = step_cost(experiment.train_step, experiment.bind_net, state, batch, experiment.frozen)
    ratio, *taught = (cost[part] / cost["forward"] for part in ("step", *TEACHERS))
    expected = expected_forwards(settings, *taught)
    return {
        "method": settings.title or settings.objective.name,
        "batch_size": settings.batch_size,
        **{f"{name}_flops": value for name, value in cost.items()},
        "ratio": ratio,
        "expected": expected,
        "quotient": ratio / expected if expected else None,
    }


def main() -> None:
    """The command line of this module."""
    parser = command_line.of_recipe("ibjax.analysis.flops", __doc__)
    parser.add_argument("--batch", type=int, default=8, help="batch size of the audit; default: %(default)s")
    ahead.add_images(parser)
    given, recipe = command_line.parse_recipe(parser)

    def command():
        check_range("--batch", given.batch, 1)
        settings = recipe()
        settings.batch_size = given.batch
        if given.shape is not None or given.classes is not None:
            shape, classes = ahead.images_of(settings.data, given.shape, given.classes)
            settings.data = dict(name="synthetic", shape=shape, num_classes=classes, val_size=classes, split_seed=0)
        jax.config.update("jax_platforms", "cpu")
        for name, value in audit(settings).items():
            print(f"{name:15}", value if isinstance(value, str | int | None) else f"{value:,.5g}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
