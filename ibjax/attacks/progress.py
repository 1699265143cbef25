"""What AutoAttack has found so far, and the file that keeps it.

The file says what its content depends on: images, labels, norm, eps, attacks, key, batch size, precision, the code of
the attacks, and the network by its fingerprint, logits and gradients on a few images (see `checks.fingerprint`). Where
any of it has changed, the file is refused and the difference named. It is read whole, and its content has a digest.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibjax.attacks import checks
from ibjax.errors import InputError, UnreadableError
from ibjax.files import content_digest, read_npz, replacing

SAVE_SECONDS = 30.0  # between two states on disk


class Progress:
    """Of one evaluation; `restart` begins anew, whatever is in the file.

    Args:
      file: where it is kept; None: nowhere.
      settings: plain data that the result depends on.
      fingerprint: of the network.
      x, clean: images (N, H, W, C), and which of them are classified correctly (N,).
    """

    def __init__(
        self,
        file: Path | None,
        settings: dict[str, Any],
        fingerprint: np.ndarray,
        x: np.ndarray,
        clean: np.ndarray,
        restart: bool = False,
    ):
        self.file, self.settings, self.fingerprint, self.x, self.clean = file, settings, fingerprint, x, clean
        self.x_adv, self.broken = x.copy(), ~clean
        self.right: np.ndarray | None = None  # (N,) of a random network: how many draws are right about x_adv
        self.after: list[np.ndarray] = []
        self.seconds, self.flat = [0.0], [0]  # of each attack; the last one is under way
        self.position, self.saved = 0, time.monotonic()
        self.own = self._begin() if settings["version"] == "rand" else None  # what the attack under way has found
        if file is not None and file.exists() and not restart:
            self._restore(file)

    @property
    def robust(self) -> np.ndarray:
        """(N,) bool: not broken yet, by any attack that is finished."""
        return ~self.broken

    @property
    def todo(self) -> np.ndarray:
        """(N,) bool: the images that the attack under way attacks, whatever it has broken of them by now."""
        robust = self.after[-1] if self.after else self.clean
        return robust if self.right is None else robust | (self.right > 0)

    @property
    def attacked(self) -> tuple[np.ndarray, np.ndarray]:
        """(images (N, H, W, C), which are broken (N,)) of the attack under way, for it to change.

        Of a random network these are its own, since it also attacks images that another has broken.
        """
        return (self.x_adv, self.broken) if self.own is None else self.own

    def _begin(self):
        return self.x.copy(), np.zeros(len(self.x), bool)

    def finish_attack(self, rows: np.ndarray, right: np.ndarray | None) -> None:
        """Counts what the attack under way has found for the images `rows`.

        right: of a random network, how many draws are right about what it found for each of them.
        """
        if self.own is not None and self.right is not None and right is not None:
            images, broken = self.own
            better = rows[right < self.right[rows]]
            self.x_adv[better] = images[better]
            self.right[rows] = np.minimum(right, self.right[rows])
            self.broken, self.own = self.broken | broken, self._begin()
        self.after.append(self.robust)
        self.seconds.append(0.0)
        self.flat.append(0)
        self.position = 0
        self.save()

    # ---- the file --------------------------------------------------------------------------------------------

    def save(self, at_once: bool = True) -> None:
        """Writes the file, whole or not at all; unless `at_once`, only where the last one is half a minute old."""
        if self.file is None or jax.process_index() != 0:
            return
        if not at_once and time.monotonic() - self.saved < SAVE_SECONDS:
            return
        content = dict(
            settings=np.array(json.dumps(self.settings, sort_keys=True)),
            fingerprint=self.fingerprint,
            tolerance=np.array(checks.FINGERPRINT_TOLERANCE),
            clean=self.clean,
            broken=self.broken,
            after=np.array(self.after, bool).reshape(len(self.after), len(self.clean)),
            seconds=np.array(self.seconds),
            flat=np.array(self.flat),
            position=np.array(self.position),
            **self._changed("", self.x_adv),
        )
        if self.own is not None:
            content |= dict(right=self.right, own_broken=self.own[1], **self._changed("own_", self.own[0]))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary, temporary.open("wb") as handle:
            np.savez(handle, **content, digest=np.array(content_digest(content)))
        self.saved = time.monotonic()

    def _changed(self, prefix, images):
        rows = np.nonzero(np.any(images != self.x, axis=(1, 2, 3)))[0]
        return {f"{prefix}changed": rows, f"{prefix}images": images[rows]}

    def _restore(self, file):
        how = "give restart=True or delete it to begin anew, or give another file"
        try:
            found = read_npz(file)
            if str(found.pop("digest", None)) != content_digest(found):
                raise ValueError("its content is not what was written, or it is of an earlier version of ibjax")
            settings = json.loads(str(found["settings"]))
            changed = [name for name, value in self.settings.items() if settings.get(name) != value]
            changed += checks.differences(found["fingerprint"], self.fingerprint, found["tolerance"])
            if not changed and not np.array_equal(found["clean"], self.clean):
                changed = ["clean predictions"]
        except UnreadableError:
            raise
        except (InputError, ValueError, KeyError) as error:
            raise InputError(f"{file} is no state of AutoAttack, or damaged ({error}); {how}") from None
        if changed:
            raise InputError(f"{file} is of another evaluation (its {', '.join(changed)} differ); {how}")
        self.position, self.broken = int(found["position"]), found["broken"]
        self.seconds, self.flat = found["seconds"].tolist(), found["flat"].tolist()
        self.after = list(found["after"])
        self.x_adv[found["changed"]] = found["images"]
        if self.own is not None:
            self.right, self.own = found["right"], (self.own[0], found["own_broken"])
            self.own[0][found["own_changed"]] = found["own_images"]
