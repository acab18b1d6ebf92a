"""Packages of the wheel: `uae`, and Resources/Models as `uae/_models`; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

if __name__ == "__main__":  # 3D Slicer imports every .py of a folder that is added as a module path
    setup(
        packages=[*find_packages(include=["uae", "uae.*"]), "uae._models"],
        package_dir={"uae._models": "Resources/Models"},
        package_data={"uae._models": ["models.json", "*.pt"], "uae": ["**/*.toml", "**/*.json"]},
    )
