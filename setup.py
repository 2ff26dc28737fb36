"""Everything is said in pyproject.toml, but that a wheel takes the recipes along, which stand beside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "ringbpt" / "configs"
            self.mkpath(str(folder))
            for recipe in Path("configs").glob("*.py"):
                self.copy_file(str(recipe), str(folder / recipe.name))


setup(cmdclass={"build_py": BuildWithRecipes})
