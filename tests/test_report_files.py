"""What a report gives beside its page: tables and pictures as files, a live page, the page in a browser."""

import csv
import http.client
import io
import re
import threading
import urllib.error
import urllib.request
import webbrowser

import pytest
from PIL import Image
from test_report import FLAGS, N, Page, healthy, record, run_main, seeds, undrawn, write_examples, write_run

from ibjax.evaluation import report
from ibjax.evaluation.report import grids, progress, runs, tables, watch
from ibjax.evaluation.report.grids import Grid, Value

pages_without_plots = undrawn  # a fixture of every test here; pictures in files are drawn
EVIL = '[a] *b*_c & 50% $x$ #1 \\rm ~ ^ {d} <img src=x> | e--f `g` "h"\nline'


def auto(**changes):
    after = {"apgd-ce": 37.5, "apgd-t": 25.0, "square": 12.5}
    return record("autoattack", flags=[1] + [0] * 7, robust_after=after, **changes)


# ---- tables ------------------------------------------------------------------------------------------------


def test_every_table_of_the_page_is_a_file_with_the_page_s_numbers(tmp_path):
    for each in seeds(3):
        write_run(tmp_path / "runs" / str(each["seed"]), [each], seed=each["seed"])
    write_run(tmp_path / "runs" / "other", [*healthy(title="other"), auto(title="other")], "other")
    found = report.write([tmp_path / "runs"], tmp_path / "page.html")
    files = report.write_tables(found, tmp_path / "new" / "tables")
    names = ["dice-linf-8_255", "dice-linf-8_255-every-seed", "dice-linf-8_255-after-each-attack"]
    assert [file.name for file in files] == [f"{name}.{suffix}" for name in names for suffix in ("csv", "md", "tex")]
    shown = set(re.findall(r"<td>([^<]*\d\.\d\d[^<]*)</td>", (tmp_path / "page.html").read_text()))
    assert {"≤ 37.50 ± 12.50", "81.00 ± 1.00", "12.50"} < shown

    def written(suffix, between):
        texts = (
            file.read_text().replace(r"$\pm$", "±").replace(r"$\leq$", "≤") for file in files if file.suffix == suffix
        )
        cells = (cell.strip(" \\\n") for text in texts for cell in re.split(between, text))
        return {cell for cell in cells if re.fullmatch(r"(≤ )?\d+\.\d\d( ± \d+\.\d\d)?", cell)}

    assert written(".md", r"\|") == written(".tex", r"&|\\\\") == shown
    means = {re.sub("≤ | ±.*", "", cell) for cell in shown}
    assert means <= written(".csv", "[,\n]")
    assert report.write_tables(found, tmp_path / "each", each=True)[0].read_text().count("student, seed") == 3


def test_csv_has_numbers_alone_in_their_cells():
    lines = [["a, b", Value(81.0, 1.0, 3, 3), Value(37.5, None, 1, 3, bound=True)], ["c", Value(5.0, None, 1, 1), None]]
    header = ["run", "clean", "clean std", "PGD-2", "PGD-2 runs", "PGD-2 bound"]
    rows = list(csv.DictReader(io.StringIO(grids.as_csv(Grid("t", ["run", "clean", "PGD-2"], lines, 1, [])))))
    assert rows == [
        dict(zip(header, ["a, b", "81.00", "1.00", "37.50", "1/3", "True"], strict=True)),
        dict(zip(header, ["c", "5.00", "", "", "", ""], strict=True)),
    ]


def test_whatever_a_title_holds_it_is_text_in_every_format():
    grid = Grid(EVIL, ["run", "clean"], [[EVIL, Value(1.0, 0.5, 2, 3, bound=True)]], 1, [EVIL])
    one_line = " ".join(EVIL.split())
    # Markdown: what is left of the cell when each backslash gives up the letter after it
    *_, row = (line for line in grids.markdown(grid).splitlines() if line.startswith("|"))
    cells = re.split(r"(?<!\\)\|", row)[1:-1]
    assert re.sub(r"\\(.)", r"\1", cells[0]).strip() == one_line and cells[1] == " ≤ 1.00 ± 0.50 (2/3) "
    assert not re.search(r"(?<!\\)[<`$*]", row)
    # LaTeX: every letter with a meaning is behind a backslash or in braces, and rows end where they should
    text = grids.latex(grid)
    body = text.partition("\\midrule\n")[2].partition("\n\\bottomrule")[0]
    assert body.count("\n") == 0 and body.endswith(r" & $\leq$ 1.00 $\pm$ 0.50 (2/3) \\")
    assert body.startswith(
        r"{[}a] {*}b{*}\_c \& 50\% \$x\$ \#1 \textbackslash{}rm \textasciitilde{} \textasciicircum{} \{d\} "
        r"\textless{}img src=x\textgreater{} \textbar{} e-{}-f \textasciigrave{}g\textasciigrave{} ''h'' line"
    )
    assert text.count("{") == text.count("}") and text.count(r"\begin") == text.count(r"\end") == 2
    # a terminal: one line for each row, nothing that moves its cursor
    *_, row = lines = grids.aligned(grid._replace(lines=[[f"\x1b[2J{EVIL}", None]]))
    assert len(lines) == 2 and row.isprintable() and row.startswith(rf"\x1b[2J{one_line}")
    # CSV: as its own reader reads it
    assert list(csv.reader(io.StringIO(grids.as_csv(grid))))[1][0] == EVIL


def test_tables_of_like_names_do_not_overwrite_one_another():
    records = [record(), record(dataset="dice ", title="other"), record(dataset="dice?", title="third")]
    assert sorted(tables.named(records)) == ["dice-linf-8_255", "dice_-linf-8_255", "dice_-linf-8_255-2"]


# ---- pictures ----------------------------------------------------------------------------------------------


def test_the_command_writes_tables_and_pictures_and_opens_the_page(tmp_path, monkeypatch, capsys):
    """Every figure of the page as PNG, SVG and PDF."""
    folder, opened = write_run(tmp_path / "run", healthy()), []
    write_examples(folder)
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)))
    assert run_main(monkeypatch, folder, "--open", f"--tables={tmp_path}/t", f"--pictures={tmp_path}/p") == 0
    printed = capsys.readouterr().out
    address = (folder / "report.html").resolve().as_uri()
    assert opened == [address] and f"no browser was found here; open {address}" in printed
    assert f"tables: {tmp_path}/t, 3 files" in printed and f"pictures: {tmp_path}/p, 9 files" in printed
    files, stems = sorted((tmp_path / "p").iterdir()), ("curves", "examples0", "training0")
    assert [file.name for file in files] == [f"{stem}{end}" for stem in stems for end in (".pdf", ".png", ".svg")]
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(file.read_bytes().startswith(starts[file.suffix]) for file in files)
    texts = {file.stem: file.read_text() for file in files if file.suffix == ".svg"}
    assert "student" in texts["curves"] and "validation images, attacked" in texts["training0"]  # the legends
    assert "#0a0b0c" not in texts["curves"] and "✗ 9" in texts["examples0"]  # no colour of the page's variables
    with Image.open(tmp_path / "p" / "curves.png") as image:
        assert round(image.info["dpi"][0]) == 300


# ---- a live page -------------------------------------------------------------------------------------------

ROW = {"kind": "train", "epoch": 0.5, "loss": 1.25, "images_per_s": 1234.5, "seconds_left": 4000.0}


def test_a_live_page_shows_how_far_each_run_has_come(tmp_path):
    write_run(tmp_path / "runs" / "a", (), "<b>", rows=[{**ROW, "step": 1}])
    server = watch.server([tmp_path / "runs"])
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            text = answer.read().decode()
        page = Page(text)
        assert '<meta http-equiv="refresh" content="10">' in text and "script" not in page.tags and "b" not in page.tags
        for said in ("<b>", "training", "1 of 4", "0.50 of 2", "1.25", "1,234", "67 min", "s ago"):
            assert said in page.text
        assert "not finished" not in page.text and "no results" not in page.text
        assert all(link.startswith("#") for link in page.links)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}etc/passwd", timeout=30)
        (tmp_path / "runs" / "a" / "config.json").unlink()  # between two requests
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            urllib.request.urlopen(server.url, timeout=30)
        assert "holds no run" in caught.value.read().decode()
        assert caught.value.headers["Refresh"] == "10"
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
        connection.connect()  # an idle one, as browsers open them, blocks no other
        write_run(tmp_path / "runs" / "a", healthy(), rows=[{**ROW, "step": 4}])
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            text = Page(answer.read().decode()).text
        assert "evaluated" in text and "margin PGD-2" in text
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "rows, state",
    [
        ([], "no row yet"),
        ([{**ROW, "step": 2}], "training"),
        ([{**ROW, "step": 4}], "trained"),
        ([{**ROW, "step": 2}, {"kind": "preempted", "step": 2}], "preempted"),
        ([{"kind": "diverged", "step": 2, "reason": "loss"}], "diverged"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_last_row(tmp_path, rows, state):
    (run,) = runs.read([write_run(tmp_path / "run", rows=rows)], unfinished=True)
    ((_, found, *_),) = progress.grid([run]).lines
    assert found == state


def test_lengths_of_time_in_words():
    said = [progress.duration(seconds) for seconds in (0, 119, 120, 7000, 7500, 200_000, -1, None, float("nan"))]
    assert said == ["0 s", "119 s", "2 min", "117 min", "2 h 05 min", "2 d 8 h", "–", "–", "–"]


# ---- the command line --------------------------------------------------------------------------------------


def test_a_place_for_tables_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [record(attack) for attack in FLAGS])
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, folder, f"--tables={tmp_path}/file/t") == 2
    assert f"{tmp_path}/file/t cannot be written (Not a directory); give another --tables" in capsys.readouterr().err


def test_the_command_watches_until_ctrl_c_and_writes_nothing(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [record(flags=[0] * N)])

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch._Server, "serve_forever", interrupted)
    assert run_main(monkeypatch, folder, "--watch", "--port=0") == 0
    assert re.search(r"http://localhost:(\d+)/ \(.*ssh -L \1:localhost:\1 HOST\)", capsys.readouterr().out)
    assert not (folder / "report.html").exists()
    for wrong, said in (
        (("--watch", "--out=x.html"), "--out does not go with --watch"),
        (("--port=1",), "--port goes with --watch"),
        (("--watch", "--port=-1"), "--port=-1 is not allowed"),
    ):
        assert run_main(monkeypatch, folder, *wrong) == 2
        assert said in capsys.readouterr().err
    with watch.server([folder], 0) as server:
        assert run_main(monkeypatch, folder, "--watch", f"--port={server.server_address[1]}") == 2
        assert "cannot be used" in capsys.readouterr().err
        monkeypatch.setattr(watch, "PORT", server.server_address[1])
        with watch.server([folder]) as other:  # the usual port is in use: another one
            assert other.server_address[1] != server.server_address[1]
