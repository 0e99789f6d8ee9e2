"""The setuptools build backend with one rule added: compile against the torch that is installed.

Were torch named in build-system.requires, the installer would fetch its newest CUDA build into a throw-away
environment and compile against that one, whatever torch the user has. So torch is required for the build only
where none is installed, and a build environment is shown the user's torch where there is one.
"""

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - every other hook is setuptools' own


def _candidate_site_packages():
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    yield Path(sysconfig.get_path("purelib"))
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # uv builds with an interpreter of its own environment
        if prefix := os.environ.get(variable):
            yield Path(prefix) / "lib" / version / "site-packages"
            yield Path(prefix) / "Lib" / "site-packages"


def expose_installed_torch() -> bool:
    """Make the user's torch importable; last on the path, so that it shadows no build requirement."""
    for path in _candidate_site_packages():
        if (path / "torch" / "version.py").is_file():
            if str(path) not in sys.path:
                sys.path.append(str(path))
            return True
    return False


def _build_requirements(config_settings=None):
    return [] if expose_installed_torch() else ["torch>=2.11", "numpy"]


get_requires_for_build_wheel = get_requires_for_build_editable = _build_requirements


def _with_torch(hook):
    def build(*args, **kwargs):
        expose_installed_torch()
        return hook(*args, **kwargs)

    return build


build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
prepare_metadata_for_build_wheel = _with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = _with_torch(build_meta.prepare_metadata_for_build_editable)
