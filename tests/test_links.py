"""Documents: every link leads somewhere, and every file that a docstring names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "benchmarks", "configs") for page in ROOT.glob(f"{folder}/**/*.md")),
]
# names with a part that stands for many, as results/benchmarks-BACKEND.json
PATH = re.compile(
    r"(?<!--out=)(?<![\w/.-])(?:docs|results|configs|benchmarks|launch)/[\w./-]+\.(?:md|json|py|toml|sh|sbatch)"
)


def anchors(page):
    """The anchors that a Markdown page has, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def targets(text):
    """Where the links of a Markdown text lead, but for those to the web."""
    found = re.findall(r"\]\(([^()\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    dead = []
    for target in targets(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


def test_every_document_and_result_that_the_code_names_is_there():
    missing = []
    for source in (file for folder in ("ibjax", "benchmarks", "configs") for file in ROOT.glob(f"{folder}/**/*.py")):
        for name in PATH.findall(source.read_text(encoding="utf-8")):
            if not re.search(r"[A-Z]{3}|OTHER", name) and not (ROOT / name).exists():
                missing.append(f"{source.relative_to(ROOT)}: {name}")
    assert not missing
