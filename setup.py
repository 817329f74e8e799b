"""Copy the recipes at the repository root into the wheel; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """Build the package and put ``recipes/*.yaml`` beside it as ``squeeze/recipes``."""

    def run(self) -> None:
        """Build, then copy; an editable install reads the recipes where they are."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "squeeze", "recipes")
        target.mkdir(parents=True, exist_ok=True)
        for recipe in sorted(Path(__file__).parent.glob("recipes/*.yaml")):
            self.copy_file(str(recipe), str(target / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
