"""The jitted functions of a run: its first state, its step, its validation. Each is traced once.

The check of a configuration traces them on shapes. The training finds them traced, since it calls the same functions
with arrays of these shapes and shardings.

Guarantee (tested): what a check has traced is not traced again. It is used only for the configuration,
data and networks that it was traced for.
"""

from typing import Any, NamedTuple

import jax

from ibjax import config
from ibjax.data import Split
from ibjax.devices import cluster
from ibjax.evaluation.scoring import Scorer
from ibjax.runs import checkpoint as checkpoints
from ibjax.training import feed
from ibjax.training.experiment import Experiment, initial_program, state_shapes


class Programs(NamedTuple):
    """The jitted functions of an experiment."""

    experiment: Experiment
    initial: Any  # see `initial_program`
    step: Any  # see `feed.make_step`
    validator: tuple[Scorer, dict[str, Any]]  # (with the attack that selects checkpoints, its {"eps", "step_size"})

    def of(self, other: Experiment) -> "Programs":
        """Those of another experiment: the same ones, if it is of the same configuration, data and networks."""
        own = self.experiment
        networks = own.model == other.model and own.teachers == other.teachers
        configured = own.mesh == other.mesh and config.plain(own.config) == config.plain(other.config)
        return self._replace(experiment=other) if own.data is other.data and networks and configured else make(other)

    def trace(self) -> None:
        """Traces all of them on shapes, without compiling or computing; raises the errors that tracing finds."""
        experiment, mesh = self.experiment, self.experiment.mesh
        key = cluster.shapes(jax.eval_shape(lambda: jax.random.key(0)), mesh)
        state = state_shapes(experiment, key, self.initial)
        jax.eval_shape(self.step, *feed.arguments(experiment, state, key))
        (scorer, _), variables = self.validator, cluster.shapes(checkpoints.split(state)[0], mesh)
        jax.eval_shape(scorer.score, *scorer.arguments(variables, selection_split(experiment)))


def make(experiment: Experiment) -> Programs:
    """The functions of an experiment, not yet traced."""
    section = config.complete(experiment.config.copy_and_resolve_references()).validate.attack
    options = config.arguments("attacks", section, "validate.attack")
    eps, step_size = options.pop("eps"), options.pop("step_size", None)
    factory = config.factory("attacks", section.name)
    sized = "step_size" in config.signature(factory)[0]

    def attack(*, eps, step_size):
        return factory(eps=eps, **options, **({"step_size": step_size} if sized else {}))

    predict, size = experiment.bind_net(None).predict, experiment.config.validate.batch_size
    network, own = lambda variables, x, keys: predict(variables, x), config.own_source("attacks", section.name)
    same = dict(attacked_in=experiment.config.precision, judged_in=experiment.config.precision)
    scorer = Scorer(network, attack, experiment.mesh, size, section.norm, own=own and own.name, **same)
    validator = scorer, {"eps": eps, "step_size": eps if step_size is None else step_size}
    return Programs(experiment, initial_program(experiment), feed.make_step(experiment), validator)


def selection_split(experiment: Experiment) -> Split:
    """The images that select checkpoints."""
    data = experiment.data
    return data.val if experiment.config.select_on == "val" else data.test  # pyright: ignore[reportReturnType]
