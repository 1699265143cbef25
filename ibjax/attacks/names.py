"""Names of attacks as text: "cw-l2-200(c=0.1,lr=0.1)" is "cw-l2-200" with two options. What they mean: `named.py`.

NAME            "fgsm", "pgd-20", "autoattack"
NAME(OPTION=VALUE,…)
"""

import ast
import logging
from collections.abc import Iterable
from typing import Any

from ibjax.errors import InputError

# C&W is by its authors an attack in l2; PGD on the margin loss, which papers write "CW" in l_inf, is called what it is
RENAMED = {"cw": "margin"}
log = logging.getLogger(__name__)


def split(text: str) -> list[str]:
    """The parts of a list with commas between them; those within parentheses belong to a part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """("cw-l2-200", {"c": 0.1, "lr": 0.1}) of a name with options; raises InputError where it cannot be read."""
    base, opened, inside = str(name).strip().partition("(")
    base = base.strip()
    family, dash, steps = base.rpartition("-")
    if family in RENAMED:
        base = RENAMED[family] + dash + steps
    if not opened:
        return base, {}
    if not inside.endswith(")") or not inside[:-1].strip():
        raise InputError(f"attack '{name}' cannot be read; write options as NAME(OPTION=VALUE,OPTION=VALUE)")
    options: dict[str, Any] = {}
    key = ""
    for part in split(inside[:-1]):
        if key and "=" not in part:  # a value that is a list, as layers=stage1,stage2
            options[key] = f"{options[key]},{part}"
            continue
        key, equals, value = (text.strip() for text in part.partition("="))
        if not (key.isidentifier() and equals and value) or key in options:
            raise InputError(f"attack '{name}' cannot be read at '{part}'; write each option once, as OPTION=VALUE")
        options[key] = _value(value)
    return base, options


def _value(text):
    """A number, a truth value, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def with_options(base: str, options: dict[str, Any]) -> str:
    """The name with its options in alphabetical order: one name for one attack."""
    if not options:
        return base
    texts = (f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items())
    return f"{base}({','.join(sorted(texts))})"


def add(name: str, **options: Any) -> str:
    """The canonical name with more options."""
    base, given = parse(name)
    return with_options(base, {**given, **options})


def canonical(name: str) -> str:
    """The name as records have it: without spaces, options in alphabetical order, nothing under an old name."""
    name, source, title = str(name).partition(" from ")
    return with_options(*parse(name)) + source + title


def in_file_name(text: Any) -> str:
    """A name or a length as part of a file's name: "4/255" as "4_255"."""
    return str(text).replace("/", "_")


def old(name: str) -> str:
    """What a canonical name was called before it was renamed: itself, where it was not."""
    for before, now in RENAMED.items():
        if name.startswith(f"{now}-"):
            return before + name.removeprefix(now)
    return name


def tell_of_old(names: Iterable[str]) -> None:
    """One line for each of the names that is an old one."""
    for name in names:
        base, _ = parse(name)
        if not name.strip().startswith(base):
            log.warning("attack '%s' is called '%s' now; the old name goes on working", name, canonical(name))
