"""Compiles a recipe's train step for a TPU slice or a GPU that this machine lacks; prints its cost and communication.

    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=v5e:16x16 [--config.batch_size=1024 …]
    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=h200                     (or h100)

Prints the memory of each chip against its HBM, the FLOPs and bytes per chip and step, the upper bounds on images/s that
follow from them, and the collectives with the loop that contains them. An attack must contain no collective, since
images are independent in evaluation mode; one in training mode (`attack_bn="train"`) has those of batch-norm. Needs the
extra [tpu], or for a GPU [cuda13]; their compilers need neither chip nor driver. No data are read: only their shape
matters. Generated images (`data.extra`) count with their number: in the memory of every chip, or as what is read in
each step.

    FLOPs = m · ( FLOPs(dispatch) + (k − 1) · FLOPs(attack step) )          for m microbatches; the same for bytes

The compiler counts the body of a rolled loop once, however long the loop is, hence the correction for the k steps of
the attack. The bodies of other loops, such as MMA's bisection, are counted once too; the number of such loops is
printed. FLOPs and bytes are the compiler's figures for the optimised program of one chip. The bounds assume the chip's
peak in bfloat16 and its full bandwidth, so no run reaches them.

A TPU's compiler also says how many cycles it expects of each kernel. From these follow the estimated milliseconds of a
step of the attack's loop and of the rest, the share of the peak and the images/s of the slice, without communication.
They are no measurement. Printed with them are the ten slowest kernels, by the operation that they come from, and every
kernel of at least 20 µs that takes more than three times its own bound (products over peak, bytes over bandwidth).

For a GPU the compiler reports neither figure. Printed instead are the number of kernels inside and outside of loops,
the bytes that they read and write, and the bound that the card's bandwidth sets.
"""

import os

import jax

from ibjax import cli, errors, files
from ibjax.devices import cluster
from ibjax.runs import (
    command_line,
    provenance,
)
from ibjax.training import (
    ahead,
)


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = command_line.of_recipe("ibjax.aot", __doc__)
    parser.add_argument(
        "--topology", default="v5e:16x16", help="the slice, or one GPU: h100, h200; default: %(default)s"
    )
    parser.add_argument("--teacher", help="recipe of the teacher, where the configuration names none")
    ahead.add_images(parser)
    parser.add_argument(
        "--images", type=int, default=50_000, help="of training, on every chip; streamed ones lie elsewhere"
    )
    parser.add_argument(
        "--generated", type=int, metavar="N", help="generated images of data.extra; default: those of its file, or 1 M"
    )
    parser.add_argument("--json", type=files.path, help="file for the numbers")
    return parser


def main() -> None:
    """The command line of this module."""
    given, recipe = command_line.parse_recipe(parser())

    def command():
        os.environ.update(ahead.WITHOUT_CHIPS)
        jax.config.update("jax_platforms", "cpu")
        settings = recipe()
        shape, classes = ahead.images_of(settings.data, given.shape, given.classes)
        teachers = ahead.teachers_of(settings, given.teacher)
        mesh = ahead.slice_mesh(given.topology)
        cluster.check_divides(settings.batch_size, "batch_size", mesh.size, settings.microbatches)
        images = None if settings.data.name == "stream" else given.images
        if given.generated is not None:
            errors.check_range("--generated", given.generated, 1)
        made = ahead.generated(settings.data, shape, given.generated)
        settings = ahead.prepare(settings, shape, classes, teachers)
        found = ahead.compile_step(settings, mesh, images, made)
        print(ahead.in_words(shape, classes))
        print(ahead.table(found))
        if given.json:
            numbers = {**found, "collectives": [item._asdict() for item in found["collectives"]]}
            numbers |= {"topology": given.topology, "config": given.config, "versions": provenance.versions()}
            files.write_json(given.json, numbers)
            print(f"numbers: {given.json}")

    errors.exit_with(command)


if __name__ == "__main__":
    main()
