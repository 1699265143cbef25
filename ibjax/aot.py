"""Compiles the real train step for a TPU slice or a GPU that is not here: what it costs, and where it communicates.

    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=v5e:16x16 [--config.batch_size=1024 …]
    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=h200

Prints memory of each chip against its HBM, FLOPs and bytes of each chip and step, the images/s that either of them
allows at most, and the collectives with the loop in which they stand. An attack must contain none: in evaluation mode
images are independent. Needs the extra [tpu], or for a GPU [cuda13], whose compilers need neither chip nor driver, and
no data: only their shape counts.

    FLOPs = m · ( FLOPs(dispatch) + (k − 1) · FLOPs(attack step) ), likewise the bytes

of m microbatches, since the compiler counts a rolled loop's body once, whatever its length k; so it does with the
bodies of other loops, as MMA's bisection, whose number is printed. Both are what it reports for the optimised program
of one chip; the bounds assume its peak in bfloat16 and its bandwidth, so they are never reached.

For a GPU it reports neither; printed are the kernels in loops and outside, and the bytes that they read and write.
"""

import os

import jax

from ibjax import errors, files
from ibjax.devices import cluster
from ibjax.runs import (
    command_line,
    provenance,
)
from ibjax.training import (
    ahead,
)


def command() -> None:
    """The command line of this module."""
    parser = command_line.of_recipe("ibjax.aot", __doc__)
    parser.add_argument("--topology", default="v5e:16x16", help="the slice, or h200: one GPU; default: %(default)s")
    parser.add_argument("--teacher", help="recipe of the teacher, where the configuration names none")
    ahead.add_images(parser)
    parser.add_argument(
        "--images", type=int, default=50_000, help="of training, on every chip; streamed ones lie elsewhere"
    )
    parser.add_argument("--json", type=files.path, help="file for the numbers")
    given, recipe = command_line.parse_recipe(parser)

    def body():
        os.environ.update(ahead.WITHOUT_CHIPS)
        jax.config.update("jax_platforms", "cpu")
        settings = recipe()
        shape, classes = ahead.images_of(settings.data, given.shape, given.classes)
        teachers = ahead.teachers_of(settings, given.teacher)
        mesh = ahead.slice_mesh(given.topology)
        cluster.check_divides(settings.batch_size, "batch_size", mesh.size, settings.microbatches)
        images = None if settings.data.name == "stream" else given.images
        settings = ahead.prepare(settings, shape, classes, teachers)
        found = ahead.compile_step(settings, mesh, images)
        print(ahead.in_words(shape, classes))
        print(ahead.table(found))
        if given.json:
            numbers = {**found, "collectives": [item._asdict() for item in found["collectives"]]}
            numbers |= {"topology": given.topology, "config": given.config, "versions": provenance.versions()}
            files.write_json(given.json, numbers)
            print(f"numbers: {given.json}")

    errors.exit_with(body)


if __name__ == "__main__":
    command()
