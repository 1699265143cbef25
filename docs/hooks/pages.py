"""What MkDocs builds the site from beside the pages in docs/: events that MkDocs calls, see mkdocs.yml.

- Documents outside docs/ become pages: `OUTSIDE`, and the tables of results/.
- Markers in a page are replaced by parts of other files, so that nothing is written twice (`PARTS`).
- Relative links lead to the page of the file that they name: `Links`. The same links work on a code host.
- The built pages may load nothing from elsewhere: `on_post_build`.
"""

import itertools
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

import docstrings

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "benchmarks/README.md": "benchmarks.md",
    **{f"results/{file.name}": f"results/{file.name}" for file in sorted(ROOT.glob("results/*.md"))},
}
STATIC = ("results/*.json", "results/*.svg", "notebooks/*.ipynb")  # copied, so that links to them lead somewhere
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r'<(?:script|img|iframe|link)\b[^>]* (?:src|href)="?(?:https?:)?//[^>]*>')
MARKER = re.compile(r"^<!-- (docstring|section|rows): (.+?) -->$", re.MULTILINE)


class Missing(ValueError):
    """A marker or a link names what does not exist."""


# ---- parts of other files ------------------------------------------------------------------------------------


def docstring_part(argument: str) -> str:
    """`ibjax/objectives/ibd.py`: the docstring of a module: what it is, equations, symbols, policy, deviations."""
    if not (ROOT / argument).is_file():
        raise Missing(f"there is no file {argument}")
    return docstrings.markdown(docstrings.of_module(ROOT / argument))


def section_part(argument: str) -> str:
    """`configs/README.md#IBD`: what stands below the heading that begins so, up to the next heading.

    `docs/recipes.md#`configs/siriib.py`#`pgd_at``: below the second heading, the first after the first one.
    """
    name, *headings = argument.split("#")
    text = _read(name)
    for heading in headings:
        found = re.search(rf"^#+ {re.escape(heading)}.*\n", text, re.MULTILINE)
        if not found:
            raise Missing(f"{name} has no heading that begins with '{heading}'")
        text = text[found.end() :]
    text = re.split(r"^#{1,6} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    return relinked(text.strip() + "\n", name, None)


def rows_part(argument: str) -> str:
    """`results/effects-digits.md: IBD; PGD-AT`: those rows of the file's first table, and its bullets about them.

    Columns that are empty in these rows are left out. Without names, as in `results/flips.md`: the whole first table.
    """
    name, _, wanted = argument.partition(": ")
    names = [one.strip() for one in wanted.split(";")] if wanted else []
    lines = _read(name).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    of_table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in of_table]
    rows = {row[0]: row for row in table[2:]}
    if missing := [one for one in names if one not in rows]:
        raise Missing(f"{name} has no row {', '.join(missing)}")
    shown = [rows[one] for one in names] if wanted else table[2:]
    columns = [index for index in range(len(table[0])) if any(row[index] for row in shown)]
    made = ["| " + " | ".join(row[index] for index in columns) + " |" for row in (*table[:2], *shown)]
    bullets = [line for line in lines if any(line.startswith(f"- **{one}**") for one in names)]
    return "\n".join([*made, *[""] * bool(bullets), *bullets]) + "\n"


PARTS: dict[str, Callable[[str], str]] = {"docstring": docstring_part, "section": section_part, "rows": rows_part}


def assembled(text: str) -> str:
    """A page with the parts that its markers name."""
    return MARKER.sub(lambda found: PARTS[found[1]](found[2]), text)


def _read(name):
    file = ROOT / name
    if not file.is_file():
        raise Missing(f"there is no file {name}")
    return file.read_text(encoding="utf-8")


# ---- links ---------------------------------------------------------------------------------------------------


def relinked(text: str, source: str, links: "Links | None") -> str:
    """`text` of the file `source` with every relative link replaced by `links(path from the root)`.

    Without `links`, a link becomes the path from the root, with a leading slash, for the page that includes the text.
    """

    def replace(found):
        label, target = found.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return found[0]
        path, _, anchor = target.partition("#")
        rooted = path.lstrip("/") if path.startswith("/") else posixpath.join(posixpath.dirname(source), path)
        path = posixpath.normpath(rooted)
        anchor = f"#{anchor}" if anchor else ""
        if links is None:
            return f"{label}(/{path}{anchor})"
        address = links(path)
        return label[1:-1] if address is None else f"{label}({address}{anchor if '#' not in address else ''})"

    # what looks like a link within code is none; code within the label of a link stays, so the text is searched whole
    parts = FENCE.split(text)
    parts[1::2] = [code.replace("](", "]\0(") for code in parts[1::2]]
    return LINK.sub(replace, "".join(parts)).replace("\0", "")


class Links:
    """Where a link to a file leads from a page: to a page, a copied file or the code host; else None."""

    def __init__(self, page: str, pages: dict[str, str], modules: dict[str, str], repository: str):
        self.page, self.pages, self.modules, self.repository = page, pages, modules, repository

    def __call__(self, path: str) -> str | None:
        if path in self.pages:
            return posixpath.relpath(self.pages[path], posixpath.dirname(self.page) or ".")
        if not (ROOT / path).exists():
            raise Missing(f"{self.page} links to {path}, which does not exist")
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module in self.modules:
            return f"{posixpath.relpath(self.modules[module], posixpath.dirname(self.page) or '.')}#{module}"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{self.repository.rstrip('/')}/{kind}/main/{path}" if self.repository else None


def api_modules() -> dict[str, str]:
    """{module: page} of the API reference, as the directives `::: module` in docs/api/ say."""
    found = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for module in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found[module] = f"api/{page.name}"
    return found


# ---- events --------------------------------------------------------------------------------------------------


def on_files(files, config):
    """Adds the documents outside docs/, and the files that links name."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=_read(source)))
    for file in (file for pattern in STATIC for file in sorted(ROOT.glob(pattern))):
        name = file.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Assembles a page and directs its links."""
    from mkdocs.exceptions import PluginError

    name = page.file.src_uri
    source = next((source for source, own in OUTSIDE.items() if own == name), f"docs/{name}")
    published = {f"docs/{file.src_uri}": file.src_uri for file in files if file.generated_by is None}
    copied = {file.src_uri: file.src_uri for file in files if file.generated_by is not None}
    pages = {**published, **copied, **OUTSIDE}
    try:
        links = Links(name, pages, api_modules(), config.repo_url or "")
        text = relinked(assembled(markdown), source, links)
    except Missing as error:
        raise PluginError(f"{source}: {error}") from error
    return re.sub(r"(?<=\d) ± (?=\d)", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}", text)  # a value stays in one line


def on_post_build(config):
    """Refuses pages that load a script, style, font or picture from elsewhere."""
    from mkdocs.exceptions import PluginError

    for file in Path(config.site_dir).rglob("*.html"):
        for found in ELSEWHERE.finditer(file.read_text(encoding="utf-8")):
            if 'rel="canonical"' not in found[0]:
                raise PluginError(f"{file.name} loads from elsewhere: {found[0]}")
