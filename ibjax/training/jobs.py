"""The training jobs of one configuration: its teachers, the runs that it is contrasted with, and itself."""

import re
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from ibjax import config, files
from ibjax.errors import InputError

_OWN_FOLDERS = ("checkpoints", "eval", "damaged", "tensorboard", "wandb", "card", "leaderboard")


class Job(NamedTuple):
    """One training job of a configuration."""

    settings: ConfigDict
    workdir: Path
    teachers: dict[str, Path]  # role -> workdir


def jobs(settings: ConfigDict, workdir: Path) -> list[Job]:
    """All training jobs of one configuration, in order: teachers, runs for contrast, the configuration itself."""
    settings = config.effective(settings)
    made, teachers = [], {}
    for _, recipe in config.recipes(settings):
        recipe.writers = settings.writers if recipe.writers is None else recipe.writers
    for role in config.TEACHERS:
        section = settings[role]
        if section.workdir or section.recipe is not None:
            teachers[role] = files.path(section.workdir) if section.workdir else workdir / role
        if section.recipe is not None:
            made += jobs(section.recipe, teachers[role])
    for name, recipe in settings.contrast.items():
        if name in (*config.TEACHERS, *_OWN_FOLDERS) or name.startswith("restarted-"):
            raise InputError(f"contrast.{name}: that name is a folder of the run itself; choose another")
        if not re.fullmatch(r"[\w-]+", name):
            raise InputError(f"contrast.{name}: it names a folder in workdir; give letters, digits, _ and -")
        made += jobs(recipe, workdir / name)
    return [*made, Job(settings, workdir, teachers)]
