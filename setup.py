"""Map the root folders into the ``vertebra`` package; all other settings are in pyproject.toml."""

from setuptools import find_namespace_packages, setup

FOLDERS = ("backbones", "configs", "domains", "pipelines", "tokenizers")
patterns = [pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]

setup(
    packages=[
        "vertebra",
        *(
            f"vertebra.{name}"
            for name in find_namespace_packages("src/vertebra", include=["cli", "cli.*", "models", "models.*"])
        ),
        *(f"vertebra.{name}" for name in find_namespace_packages(include=patterns)),
    ],
    package_dir={"vertebra": "src/vertebra", **{f"vertebra.{folder}": folder for folder in FOLDERS}},
)
