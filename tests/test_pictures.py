"""Files of pictures and records: their kinds, their text, and the line that says where they are."""

import logging
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from ibjax import files
from ibjax.analysis import output, pictures
from ibjax.errors import InputError

EVIL = "</text><script>alert(1)</script><image href='//evil.example/x'/>&amp;$"


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("ibjax")]


def drawn():
    figure = pictures.figure(2, 1.5)
    panel = figure.subplots()
    panel.set_title(EVIL, parse_math=False)
    panel.plot([0, 1, 2], [0, 1, 0])
    pictures.show(figure.add_axes((0.7, 0.6, 0.2, 0.2)), np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16)
    return figure


@pytest.mark.parametrize("name", ["a.png", "a.PDF", "a.svg"])
def test_a_picture_is_of_the_kind_that_its_name_says(name, tmp_path, caplog):
    file = tmp_path / "new" / name
    pictures.check(file)
    with caplog.at_level(logging.INFO):
        pictures.save(drawn(), file)
    assert said(caplog) == [f"written: {file}"] and [f.name for f in file.parent.iterdir()] == [name]
    content = file.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[-3:].lower()])
    pictures.save(drawn(), file)
    assert file.read_bytes() == content  # no date: the same numbers give the same bytes
    if name == "a.png":
        with Image.open(file) as image:
            assert image.size == (600, 450) and round(image.info["dpi"][0]) == 300


def test_text_in_a_vector_picture_is_text(tmp_path):
    """Letters are letters, and neither tags nor addresses."""
    pictures.save(drawn(), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    root = ElementTree.fromstring(text)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in tags and "foreignObject" not in tags
    assert EVIL in {"".join(element.itertext()).strip() for element in root.iter() if element.tag.endswith("}text")}
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.png.txt"])
def test_other_kinds_are_refused_before_the_work(name):
    with pytest.raises(InputError, match=r"give a name that ends in \.png, \.pdf, \.svg"):
        pictures.check(pictures.Path(name))


def test_records_and_arrays_say_where_they_are(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        output.record(tmp_path / "tendency", "best.pgd-20(eps=1/16)", {"n": 1}, {"x": np.arange(3)})
    record, arrays = (tmp_path / "tendency" / f"best.pgd-20(eps=1_16).{kind}" for kind in ("json", "npz"))
    assert said(caplog) == [f"written: {record}", f"written: {arrays}"]
    assert (
        files.read_json(record) == {"n": 1}
        and record.read_text().startswith('{\n "n": 1')
        and np.load(arrays)["x"].tolist() == [0, 1, 2]
    )


def test_a_result_made_with_other_settings_or_of_other_weights_is_kept_beside_the_new_one(tmp_path, caplog):
    def write(name="pgd-20", versions="1", value=1.0, weights="aa"):
        content = {"attack": name, "versions": {"jax": versions}, "shape": (2, 3), "weights": weights}
        output.record(tmp_path / "new", "best", content, {"x": np.array([value])})

    def kept():
        found = sorted((tmp_path / "new").glob("*.json"))
        return {
            file.stem: (files.read_json(file)["attack"], float(np.load(file.with_suffix(".npz"))["x"][0]))
            for file in found
        }

    write()
    write(versions="2")
    assert kept() == {"best": ("pgd-20", 1.0)}
    write("fgsm", value=2.0)
    write("apgd-ce", value=3.0)
    write("apgd-ce", value=4.0, weights="bb")
    old = {"best.1": ("pgd-20", 1.0), "best.2": ("fgsm", 2.0), "best.3": ("apgd-ce", 3.0)}
    assert kept() == {"best": ("apgd-ce", 4.0)} | old
    (tmp_path / "new/best.json").write_text("{")  # a damaged one is set aside too
    write()
    assert (tmp_path / "new/best.4.json").read_text() == "{"
