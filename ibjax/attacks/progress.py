"""The progress of an AutoAttack evaluation, and the state file that keeps it.

The file records everything that its content depends on: images, labels, norm, eps, attacks, key, batch size, precision,
the code of the attacks, and the fingerprint of the network, from its logits and gradients on a few images (see
`checks.fingerprint`). If any of these has changed, the file is refused and the message names the difference. Its
content has a digest.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ibjax.attacks import checks
from ibjax.devices import cluster
from ibjax.errors import InputError, UnreadableError
from ibjax.files import content_digest, read_npz, replacing

SAVE_SECONDS = 30.0  # interval between saves


class Progress:
    """The progress of one evaluation; with `restart` it ignores the content of the file and begins again.

    Args:
      file: the state file; None: progress is not saved.
      settings: plain data that the result depends on.
      fingerprint: fingerprint of the network.
      x, clean: images (N, H, W, C), and which of them are classified correctly (N,).

    If several processes run, all of them must have found the same progress; the first one writes the file.
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
        self.file, self.fingerprint, self.x, self.clean = file, fingerprint, x, clean
        self.settings = json.loads(json.dumps(settings, default=lambda number: number.item()))  # NumPy's numbers too
        self.x_adv, self.broken = x.copy(), ~clean
        self.right: np.ndarray | None = None  # (N,) random network: number of draws that are right on x_adv
        self.after: list[np.ndarray] = []
        self.seconds, self.flat = [0.0], [0]  # one entry per attack; the last one is running
        self.position, self.saved = 0, time.monotonic()
        self.own = self._begin() if settings["version"] == "rand" else None  # results of the running attack
        if file is not None and file.exists() and not restart:
            self._restore(file)
        at = {"finished attacks": len(self.after), "position": self.position, "broken": int(self.broken.sum())}
        cluster.agree("states of AutoAttack", at, "give a file that all processes share")

    @property
    def robust(self) -> np.ndarray:
        """(N,) bool: not broken by any finished attack."""
        return ~self.broken

    @property
    def todo(self) -> np.ndarray:
        """(N,) bool: the images that the running attack works on, including those that it has already broken."""
        robust = self.after[-1] if self.after else self.clean
        return robust if self.right is None else robust | (self.right > 0)

    @property
    def attacked(self) -> tuple[np.ndarray, np.ndarray]:
        """(images (N, H, W, C), which of them are broken (N,)), arrays that the running attack updates in place.

        For a random network each attack has its own arrays, since it also attacks images that another one has broken.
        """
        return (self.x_adv, self.broken) if self.own is None else self.own

    def _begin(self):
        return self.x.copy(), np.zeros(len(self.x), bool)

    def finish_attack(self, rows: np.ndarray, right: np.ndarray | None) -> None:
        """Records the results of the running attack for the images `rows`.

        right: for a random network, how many draws classify each of these results correctly.
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
        """Writes the file atomically; unless `at_once`, only if the last save is at least `SAVE_SECONDS` ago."""
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
