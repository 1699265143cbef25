"""Programs that run on each device for its own images, compiled at their first call or before.

Tracing needs Python's lock, compiling does not. A program is therefore traced and lowered where it is asked for, in the
context that its products take their precision from, and compiled in a thread where the platform gains from that
(`cores.form().ahead`). Whoever calls the program waits for the thread, and gets the error that compiling it ended with.
No thread launches a program of ours, so programs are launched in the same order on all processes; they also begin to
be compiled in the same order, since processes that share the work of tuning their kernels wait for each other.
"""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from ibjax import errors
from ibjax.attacks.hoist import hoisted
from ibjax.devices import cluster, cores

_THREADS = 4  # programs that are compiled at once: the parts of an attack are that many
_NAME = "compile"  # of the threads, with a number


class Compiler:
    """Compiles programs for all devices, and keeps the arrays that they close over, each on every device once."""

    def __init__(self):
        mesh = cluster.mesh()
        self.mesh, self.sharded = mesh, NamedSharding(mesh, cluster.BATCH)
        self.replicated = NamedSharding(mesh, cluster.REPLICATED)
        self.constants: dict[int, tuple[Any, jax.Array]] = {}  # id -> (array, its replica)
        self.threads: ThreadPoolExecutor | None = None

    def program(self, function: Callable, arguments: str, gathered: bool = False, donate: bool = False) -> "Program":
        """The program of a function that sees one device's share of its arguments; see `Program`.

        Args:
          function: of arrays and trees of arrays.
          arguments: one letter per argument: "s", sharded over the devices, or "c", common to all.
          gathered: whether all processes need the whole result.
          donate: whether the result may reuse the memory of the last argument (buffer donation).
        """
        return Program(self, function, arguments, gathered, donate)

    def compile(self, lowered: Any) -> Future:
        """The compiled program to be, of a lowered one."""
        if cores.form().ahead:
            self.threads = self.threads or ThreadPoolExecutor(_THREADS, _NAME)
            return self.threads.submit(contextvars.copy_context().run, lowered.compile)
        done = Future()
        done.set_result(lowered.compile())
        return done

    def close(self) -> None:
        """Compiles nothing more. A program that is being compiled is finished, but nobody waits for it.

        A command that ends does not wait for it either: a preemption notice leaves less time than compiling a large
        program takes.
        """
        if self.threads is not None:
            self.threads.shutdown(wait=False, cancel_futures=True)

    def everywhere(self, constant: Any) -> jax.Array:
        """An array that a network closes over, replicated on all devices; transferred only once."""
        if id(constant) not in self.constants:
            self.constants[id(constant)] = constant, jax.device_put(constant, self.replicated)
        return self.constants[id(constant)][1]


class Program:
    """A program that runs on each device for its own images; no device waits for another one within it.

    The arrays that the function closes over, the weights of a network, become arguments, so that they are not compiled
    in as constants. It is compiled for the shapes that it is first lowered or called with.
    """

    def __init__(self, compiler: Compiler, function: Callable, arguments: str, gathered: bool, donate: bool):
        specs = tuple({"s": cluster.BATCH, "c": cluster.REPLICATED}[kind] for kind in arguments)
        self.function = jax.shard_map(
            function, mesh=compiler.mesh, in_specs=specs, out_specs=cluster.BATCH, check_vma=False
        )
        self.compiler, self.gathered, self.donate = compiler, gathered, donate
        self.shardings = [compiler.sharded if kind == "s" else compiler.replicated for kind in arguments]
        self.shapes: Any = None  # of the result, once it is lowered

    def lower(self, *arguments: Any) -> Any:
        """Begins to compile it for arguments of these shapes, if that has not begun; returns the shapes of its result.

        Arguments are trees of arrays, or of their shapes and dtypes.
        """
        if self.shapes is not None:
            return self.shapes
        program, constants, tree = hoisted(self.function, *arguments)
        counts = [len(jax.tree.leaves(argument)) for argument in arguments]
        placed = [place for place, count in zip(self.shardings, counts, strict=True) for _ in range(count)]
        leaves, compiler = jax.tree.leaves(arguments), self.compiler
        jitted = jax.jit(
            program,
            in_shardings=([compiler.replicated] * len(constants), *placed),
            out_shardings=compiler.replicated if self.gathered else compiler.sharded,
            donate_argnums=tuple(range(1 + len(leaves) - counts[-1], 1 + len(leaves))) if self.donate else (),
        )
        self.constants = [compiler.everywhere(constant) for constant in constants]
        lowered = jitted.lower(self.constants, *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))
        self.compiled = compiler.compile(lowered)
        self.shapes = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(i.shape, i.dtype) for i in lowered.out_info])
        return self.shapes

    def __call__(self, *arguments: Any) -> Any:
        tree = jax.tree.structure(self.lower(*arguments))
        return jax.tree.unflatten(tree, self.compiled.result()(self.constants, *jax.tree.leaves(arguments)))


def _compiling() -> bool:
    """Whether a program is being compiled ahead, or soon would be."""
    return any(thread.name.startswith(_NAME) for thread in threading.enumerate())


errors.unawaited.append(_compiling)
