"""Copies `configs/` into the package when a wheel is built; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The configs are at the top of the repository, where people look for them, and in the wheel below `lit_llm`."""

    def run(self) -> None:
        """Build the packages, then add the configs; an editable installation finds them beside the package."""
        super().run()
        if not self.editable_mode:
            place = Path(self.build_lib, "lit_llm", "configs")
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree("configs", place)


setup(cmdclass={"build_py": BuildWithConfigs})
