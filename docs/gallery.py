"""Makes docs/gallery.md and its pictures again: every analysis of ibjax.analysis on small networks.

    python -m ibjax.main --config=configs/digits.py --workdir=runs/digits                    the quickstart
    python docs/gallery.py --digits=runs/digits --workdir=runs/gallery [--folder=cifar10_jpeg] [--only=plane,mask]

Trains what an analysis needs beside the quickstart's networks, in a few minutes on two CPU cores, and keeps it in
--workdir; the same command continues. --folder is a folder with classes of 32×32 images for the corruptions, which 8×8
digits are too small for. A test compares the list below with the analyses that exist.

This file is also the recipe of the networks that it trains: `--config=docs/gallery.py:siriib`.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ibjax import files
from ibjax.config import base, parse_arg
from ibjax.runs import provenance

DOCS = Path(__file__).resolve().parent
ROWS = ("ib_rar", "siriib", "isolated", "layers", "corruptions")
LIMIT = 60_000  # bytes of a picture
WIDTH = 1500  # pixels of the widest


class Entry(NamedTuple):
    """An analysis of the gallery: what it is called on, and what a reader sees."""

    arguments: str  # {digits} and {gallery} are filled in
    needs: tuple[str, ...]  # rows of this recipe that are trained first
    picture: bool
    text: str


ENTRIES = {
    "attention": Entry(
        "--workdir={digits}",
        (),
        True,
        "Figure 4 of IBD: which student layer the learned matching assigns to which teacher layer. Rows are teacher "
        "layers and sum to 1; a uniform row means no preference.",
    ),
    "embedding": Entry(
        "--workdir={digits} --workdir={digits}/undefended --attack=pgd-20",
        (),
        True,
        "Figure 3 of IB-RAR and Figure 8 of SiRIIB: t-SNE of the penultimate features of attacked images, here of the "
        "student and of the undefended network. The silhouette is computed in feature space and can be compared "
        "between networks; the distances in the picture cannot.",
    ),
    "plane": Entry(
        "--config=docs/gallery.py:ib_rar --workdir={gallery}/plane --every=20 --taps=stage1,stage2",
        (),
        True,
        "Figure 5 of IB-RAR: nHSIC of input and features against nHSIC of labels and features during training, one "
        "curve per layer.",
    ),
    "singular": Entry(
        "--workdir={digits}/undefended --attacks=pgd-20,margin-20",
        (),
        True,
        "Figures 1 and 2 of SiRIIB: does an attack act through the singular values of an image? `swapped` puts the "
        "clean singular values back; `noise` is the control, random noise of the same size.",
    ),
    "modulation": Entry(
        "--workdir={gallery}/siriib --attacks=pgd-20,siriib-svd-20,siriib-info-20",
        ("siriib",),
        True,
        "Figures 4 and 9 to 11 of SiRIIB: attacked images before and after the calibration, and how much of the "
        "perturbation passes it.",
    ),
    "score_cam": Entry(
        "--workdir={digits} --tap=stage1",
        (),
        True,
        "Figure 7 of SiRIIB: Score-CAM heat maps of clean and attacked images, for the class predicted on the clean "
        "image.",
    ),
    "binarisation": Entry(
        "--workdir={digits} --attacks=pgd-20,apgd-ce,noise-sign --n=32 --inner=99",
        (),
        False,
        "Is the attack strong enough for this network? Zimmermann et al.'s test: an adversarial image exists by "
        "construction, and the attack has to find it.",
    ),
    "calibration": Entry(
        "--workdir={gallery}/isolated --attacks=pgd-20,margin-20",
        ("isolated",),
        False,
        "Table 8 of SiRIIB: accuracy on attacked images, on the same images after a calibration that the attack did "
        "not see, and under an attack through calibration and network.",
    ),
    "tendency": Entry(
        "--workdir={digits}/undefended --attack=pgd-20 --top=3",
        (),
        False,
        "Table 5 of IB-RAR: the wrong classes that attacked images of each class are taken for most often.",
    ),
    "layers": Entry(
        "--config=docs/gallery.py:layers --workdir={gallery}/layers",
        (),
        False,
        "Table 3 of IB-RAR: one network per tap (feature layer) is trained with the information terms of this tap "
        "alone. A tap is robust if its network gains a point of accuracy over the network without terms.",
    ),
    "mask": Entry(
        "--workdir={gallery}/ib_rar --tap=pre_logits --out={gallery}/masked",
        ("ib_rar",),
        False,
        "Section 2.3 of IB-RAR: the permanent mask of the channels with the least information on the label. The result "
        "is a run that can be evaluated.",
    ),
    "corruptions": Entry(
        "--workdir={gallery}/corruptions --generate --n=500",
        ("corruptions",),
        False,
        "Table 9 of SiRIIB: accuracy under common corruptions at five severities, here of a CNN after three epochs "
        "on CIFAR-10 (JPEG), a lossy copy.",
    ),
    "complexity": Entry(
        "--config=configs/siriib.py:pgd_at --shape=32,32,3 --classes=10",
        (),
        False,
        "Parameters and multiply-adds of a network for one image, by the rules of ptflops. Nothing is trained.",
    ),
    "flops": Entry(
        "--config=docs/gallery.py:ib_rar",
        (),
        False,
        "Does a compiled train step compute only what its method needs? The quotient in the last line should be at "
        "most 1.05.",
    ),
}


# ---- the networks ----------------------------------------------------------------------------------------------


def get_config(arg=None):
    row, _ = parse_arg(arg, ROWS)
    config = base()
    config.title = {"ib_rar": "IB-RAR", "siriib": "SiRIIB", "isolated": "SiRIIB, isolated"}.get(row, row)
    config.data = dict(name="digits", val_size=0, split_seed=0)
    config.augment = dict(pad=1, padding="zero", flip=False)
    config.model = dict(name="cnn", widths=((32, 32), (64, 64)), hidden=(), padding=1, batch_norm=True, pool="average")
    config.objective = dict(name="ib_rar")
    config.batch_size = 64
    config.epochs = 15
    config.schedule = dict(name="cosine")
    config.threat.eps = "2/16"
    config.validate.update(every=5, batch_size=256)
    config.evaluate.update(attacks=("pgd-20",), batch_size=256)
    config.log_every = 19
    if row in ("siriib", "isolated"):
        backbone = dict(name="resnet", blocks=(1, 1), width=16)
        config.model = dict(name="siriib", backbone=backbone, scales=(8, 4), widths=(16,))
        config.model.connections = 0 if row == "isolated" else 3
        config.model.fourier = "amp_phase"  # the default only scales images of one channel
        config.objective = dict(name="siriib", lam=1.0 if row == "isolated" else 20.0)
    if row == "layers":
        config.epochs = 8
    if row == "corruptions":
        config.data = dict(name="folder", path=os.environ.get("GALLERY_FOLDER", "cifar10_jpeg"), val_size=500)
        config.data.split_seed = 0
        config.model.widths = ((8, 8), (16, 16), (32, 32))
        config.objective = dict(name="pgd_at")
        config.attack = dict(name="fgsm", loss="ce", step_size="10/255", init="uniform")
        config.epochs, config.optimizer.lr, config.log_every = 3, 0.05, 100
        config.threat.eps = "8/255"
        config.evaluate.n = 500
    return config


# ---- the page --------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=files.path, required=True, help="a run of configs/digits.py")
    parser.add_argument("--workdir", type=files.path, required=True, help="of what is trained here")
    parser.add_argument("--folder", help="class folders of 32×32 images; without it the corruptions stay as they are")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these analyses; the others stay as they are")
    given = parser.parse_args()
    if given.folder:
        os.environ["GALLERY_FOLDER"] = given.folder
    names = given.only or [name for name in ENTRIES if name != "corruptions" or given.folder]
    for name in names:
        print(f"{name} …", flush=True)
        make(name, given)
    (DOCS / "gallery.md").write_text(page(), encoding="utf-8")


def make(name: str, given: argparse.Namespace) -> None:
    """Runs one analysis; keeps what it prints, and its picture, in docs/gallery/."""
    entry = ENTRIES[name]
    for row in entry.needs:
        run(["ibjax.main", f"--config=docs/gallery.py:{row}", f"--workdir={given.workdir / row}"])
    arguments = entry.arguments.format(digits=given.digits, gallery=given.workdir).split()
    picture = given.workdir / f"{name}.png"
    if entry.picture:
        arguments.append(f"--picture={picture}")
    printed = run([f"ibjax.analysis.{name}", *arguments])
    if entry.picture:
        shrink(picture, DOCS / "gallery" / f"{name}.webp")
    printed = printed.replace(str(given.digits), "runs/digits").replace(str(given.workdir), "runs/gallery")
    arguments = entry.arguments.format(digits="runs/digits", gallery="runs/gallery")
    record = {"command": f"python -m ibjax.analysis.{name} {arguments}", "printed": printed.strip()}
    record |= {"hardware": provenance.hardware(), "jax": provenance.versions()["jax"]}
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    (DOCS / "gallery" / f"{name}.json").write_text(text, encoding="utf-8")


def run(arguments: list[str]) -> str:
    """The standard output of `python -m …`; ends with its error where it fails."""
    done = subprocess.run([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, cwd=DOCS.parent)
    if done.returncode:
        sys.exit(f"error: python -m {' '.join(arguments)} ended with {done.returncode}")
    return done.stdout


def shrink(source: Path, target: Path) -> None:
    """Writes a picture as WebP of at most `LIMIT` bytes."""
    image = Image.open(source).convert("RGB")
    image.thumbnail((WIDTH, 10 * WIDTH), Image.Resampling.LANCZOS)
    for quality in (90, 80, 70, 60, 40):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= LIMIT:
            break
    target.write_bytes(buffer.getvalue())


def page() -> str:
    """docs/gallery.md from what docs/gallery/ holds."""
    records = {name: json.loads((DOCS / "gallery" / f"{name}.json").read_text(encoding="utf-8")) for name in ENTRIES}
    made = sorted({f"jax {record['jax']} on {record['hardware']}" for record in records.values()})
    parts = [PREFACE, f"Made with {', '.join(made)}."]
    for name, entry in ENTRIES.items():
        record = records[name]
        parts += [f"## {name}", entry.text, f"```sh\n{record['command']}\n```"]
        parts += [f"![what {name} draws](gallery/{name}.webp)"] * entry.picture
        parts += shown(record["printed"])
    return "\n\n".join(part.strip() for part in parts) + "\n"


def shown(printed: str) -> Iterator[str]:
    """What an analysis printed, as Markdown: tables as they are, single lines as text, anything else as it stands."""
    for is_table, lines in groupby(printed.splitlines(), lambda line: line.startswith("|")):
        text = "\n".join(lines).strip()
        if text:
            yield text if is_table or not re.search(r"\n|^-|^python", text) else f"```text\n{text}\n```"


PREFACE = """# Gallery

This page shows the output of each analysis of `ibjax.analysis` on small networks: those of the quickstart, and a few
more that `docs/gallery.py` trains on the same 8×8 digits (for the corruptions, on CIFAR-10 (JPEG)). The commands are
those that made the pictures and tables. The text of an analysis says which figure or table of a paper it corresponds
to. The networks only illustrate: one seed and 360 test images (corruptions: 500) support no conclusion.

`python -m ibjax.analysis` lists the analyses, `python -m ibjax.analysis.NAME --help` describes one in full, and
`--picture=FILE.pdf`, `.svg` or `.png` chooses the format. This page is generated: `python docs/gallery.py --help`.
"""

if __name__ == "__main__":
    main()
