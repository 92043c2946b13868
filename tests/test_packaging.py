"""What pyproject.toml lists by hand is complete: every file of the package is in the wheel."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from lutdeploy.errors import OPTIONAL

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def folder(package: str) -> Path:
    return ROOT / package.replace(".", "/")


def test_every_file_is_in_the_wheel() -> None:
    patterns = [folder(package) / "*.py" for package in SETUPTOOLS["packages"]]
    for package, data in SETUPTOOLS["package-data"].items():
        patterns += [folder(package) / pattern for pattern in data]
    files = [
        Path(place, name)
        for place, _, names in os.walk(ROOT / "lutdeploy", followlinks=True)
        for name in names
        if not place.endswith("__pycache__")
    ]
    assert len(files) > 100, "the links to training/ and engines/ were followed"
    left_out = [p for p in files if not any(p.match(str(pattern)) for pattern in patterns)]
    assert left_out == []


def test_sampling_needs_no_pytorch_and_everything_else_has_an_extra() -> None:
    """What `needing` tells people to install is what the extra brings, and no one else gets it."""
    extras = PROJECT["optional-dependencies"]
    always = {Requirement(text).name for text in PROJECT["dependencies"]}
    developers = set[str]().union(*(Requirement(text).extras for text in extras["dev"]))
    for module, (_, extra) in OPTIONAL.items():
        brought = {Requirement(text).name for text in extras[extra]}
        assert module.replace("_", "-") in brought - always
        assert extra in developers


def test_every_listed_package_is_there() -> None:
    for package in SETUPTOOLS["packages"]:
        assert (folder(package) / "__init__.py").is_file()


def test_the_links_and_the_mapping_agree() -> None:
    for package, place in SETUPTOOLS["package-dir"].items():
        assert folder(package).resolve() == ROOT / place
