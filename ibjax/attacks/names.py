"""Names of attacks as text: "cw-l2-200(c=0.1,lr=0.1)" is "cw-l2-200" with two options. `named.py` builds the attacks.

NAME            "fgsm", "pgd-20", "autoattack"
NAME(OPTION=VALUE,…)

NAME may refer to an attack of the user's own, as "my_pkg.my_attack-20" or "./my_attack.py:my_attack-20".
"""

import ast
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from ibjax import extensions
from ibjax.errors import InputError

# "cw" means the authors' l2 attack only. PGD on the margin loss, which many papers call CW in l_inf, is named "margin"
RENAMED = {"cw": "margin"}
log = logging.getLogger(__name__)


def split(text: str) -> list[str]:
    """Splits text at its commas, except those within parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def parse(name: str) -> tuple[str, dict[str, Any]]:
    """Splits a name with options, as into ("cw-l2-200", {"c": 0.1, "lr": 0.1}); raises InputError on other syntax."""
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
    """The value of an option: a number, a boolean, or the text itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, bool | int | float | str) else text


def counted(base: str) -> tuple[str, int | None]:
    """Splits a base name into a family and its number of steps: ("pgd", 20); ("fgsm", None)."""
    family, _, number = base.rpartition("-")
    steps = number.isascii() and number.isdecimal() and int(number) > 0
    return (family, int(number)) if steps and family else (base, None)


def own(name: str) -> str | None:
    """The reference in a name to an attack of the user's own: "./my.py:my_attack" of "./my.py:my_attack-20(c=1)"."""
    family, _ = counted(str(name).partition("(")[0].strip())
    return family if extensions.is_reference(family) else None


def relocated(name: str, change: Callable[[str], str]) -> str:
    """The name, with `change` applied to its reference to an attack of the user's own, if it has one."""
    reference = own(name)
    return name if reference is None else name.replace(reference, change(reference), 1)


def recorded(name: str) -> str:
    """The name as a record states it: without the folder of the attack's own file, which differs between machines."""
    return relocated(name, extensions.unanchored)


def with_options(base: str, options: dict[str, Any]) -> str:
    """The name with its options in alphabetical order, so that each attack has exactly one name."""
    if not options:
        return base
    texts = (f"{key}={value:.12g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items())
    return f"{base}({','.join(sorted(texts))})"


def add(name: str, **options: Any) -> str:
    """The canonical name of the attack with further options."""
    base, given = parse(name)
    return with_options(base, {**given, **options})


def canonical(name: str) -> str:
    """The name as in records: without spaces, options in alphabetical order, old names replaced."""
    name, source, title = str(name).partition(" from ")
    return with_options(*parse(name)) + source + title


def in_file_name(text: Any) -> str:
    """A name or a length in a form that a file name can contain: "4/255" becomes "4_255", "a.py:b-2" "a_py_b-2"."""
    plain = relocated(str(text), lambda reference: re.sub(r"\W", "_", extensions.unanchored(reference)))
    return plain.replace("/", "_")


def old(name: str) -> str:
    """The former name of a canonical name; the name itself if it was never renamed."""
    for before, now in RENAMED.items():
        if name.startswith(f"{now}-"):
            return before + name.removeprefix(now)
    return name


def tell_of_old(names: Iterable[str]) -> None:
    """Logs a warning for each name that is an old one."""
    for name in names:
        base, _ = parse(name)
        if not name.strip().startswith(base):
            log.warning("attack '%s' is called '%s' now; the old name goes on working", name, canonical(name))
