"""SHA-256 digests of published files, by file name.

RobustBench publishes no digests; that of Carmon2019Unlabeled.pt is recorded independently in three public repositories.
Files of torch.hub, torchvision and timm have the first digits of their digest in their names, such as
resnet18-f37072fd.pth.
"""

import re

from ibjax.errors import CheckpointError, InputError

SHA256 = {
    "Carmon2019Unlabeled.pt": "f3ea703e4e98d26947bced9580f63922e31423233bbe45eebff8c7d45b7eacfc",
    "model_mnist_smallcnn.pt": "5b99888064f692047d5592b38df2dde126aa1b991a26c6aad683ce709634bea0",  # TRADES, f94f414
}


def expected(name: str) -> tuple[str, str] | None:
    """(the first digits of a file's SHA-256, their source); None where none is published for this file name."""
    if name in SHA256:
        return SHA256[name], "the published one"
    match = re.search(r"-([0-9a-f]{8,64})\.\w+$", name)
    if match and not match[1].isdigit():  # digits alone are a date
        return match[1], "the one in its name"
    return None


def compare(name: str, digest: str, given: str | None) -> str:
    """Compares a file's digest with the caller's, else with the published one; says in words which one it matches.

    Raises InputError where `given` is no SHA-256, CheckpointError where the digests differ.
    """
    if given is not None:
        if not re.fullmatch(r"[0-9a-f]{8,64}", given.lower()):
            raise InputError(f"--sha256={given} is no SHA-256; give its 64 hexadecimal digits, or the first 8 or more")
        if not digest.startswith(given.lower()):
            raise CheckpointError(f"{name} has the SHA-256 {digest}, wanted is {given}: download it again")
        return "agrees with --sha256"
    known = expected(name)
    if known is None:
        return "compared with none"
    if not digest.startswith(known[0]):
        raise CheckpointError(
            f"{name} has the SHA-256 {digest}, {known[1]} is {known[0]}: download it again, or if it is another file "
            f"of that name, give --sha256={digest}"
        )
    return f"agrees with {known[1]}"
