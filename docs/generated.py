"""What the scripts share that write pages of this folder."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet", "mnist": "MNIST"}
NORMS = {"linf": "l_inf", "l2": "l2", "corruptions": "common corruptions"}


def command(name: str, text: str) -> None:
    """Writes docs/NAME.md; with --check, ends with 1 where the page is not this text."""
    page = DOCS / f"{name}.md"
    if "--check" not in sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        print(page)
    elif not page.is_file() or page.read_text(encoding="utf-8") != text:
        sys.exit(f"docs/{name}.md is not current; write it with: python docs/{name}.py")
