"""Compiles a recipe's train step for a TPU slice or a GPU that this machine lacks; prints its cost and communication.

    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=v5e:16x16 [--config.batch_size=1024 …]
    python -m ibjax.aot --config=configs/ibd_wrn.py --topology=h200                     (or h100)

Prints the memory of each chip against its HBM, the FLOPs and bytes per chip and step, the upper bounds on images/s that
follow from them, and the collectives with the loop that contains them. An attack must contain no collective, since
images are independent in evaluation mode; one in training mode (`attack_bn="train"`) has those of batch-norm. Needs the
extra [tpu], or for a GPU [cuda13]; their compilers need neither chip nor driver. No data are read: only their shape
matters. Generated images (`data.extra`) count with their number: in the memory of every chip, or as what is read in
each step.

`ibjax.training.ahead` says how FLOPs and bytes are counted, and what the bounds assume.

A TPU's compiler also says how many cycles it expects of each kernel. From these follow the estimated milliseconds of a
step of the attack's loop and of the rest, the share of the peak and the images/s of the slice, without communication.
These are estimates, not measurements. Printed with them are the ten slowest kernels, by the operation that they come
from, and every kernel of at least 20 µs that takes more than three times its own bound (products over peak, bytes over
bandwidth).

For a GPU, the command instead prints the number of kernels inside and outside of loops, their bytes, and the bound that
the GPU's bandwidth sets.
"""

import os

import jax

from ibjax import cli, errors, files
from ibjax.devices import cluster
from ibjax.errors import InputError
from ibjax.runs import command_line, provenance
from ibjax.training import ahead

IMAGES = 50_000  # training images on every chip: those of CIFAR


def parser() -> cli.Parser:
    """The arguments of this module."""
    parser = command_line.of_recipe("ibjax.aot", __doc__)
    parser.add_argument(
        "--topology", default="v5e:16x16", help="the slice, or one GPU: h100, h200; default: %(default)s"
    )
    parser.add_argument("--teacher", help="recipe of the teacher, where the configuration names none")
    ahead.add_images(parser)
    parser.add_argument(
        "--images", type=int, metavar="N", help=f"training images, on every chip unless streamed; default: {IMAGES:,}"
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
        images = _images(given, settings.data)
        shape, classes = ahead.images_of(settings.data, given.shape, given.classes)
        teachers = ahead.teachers_of(settings, given.teacher)
        mesh = ahead.slice_mesh(given.topology)
        cluster.check_divides(settings.batch_size, "batch_size", mesh.size, settings.microbatches)
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


def _images(given, data):
    """The number of training images on every chip; None where they are streamed."""
    streamed = data.name == "stream"
    for name in ("images", "generated"):
        if getattr(given, name) is not None:
            errors.check_count(f"--{name}", getattr(given, name))
    if given.images is not None and streamed:
        raise InputError(f"--images={given.images}: no image of data.name='stream' is kept on a chip; leave it out")
    if given.generated is not None and data.get("extra") is None:
        raise InputError(f"--generated={given.generated}: the recipe has no generated images, data.extra; leave it out")
    return None if streamed else given.images or IMAGES


if __name__ == "__main__":
    main()
