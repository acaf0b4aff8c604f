"""Adds the compiled CUDA kernels to a wheel where nvcc is present; everything else is in pyproject.toml.

The kernels know nothing of PyTorch or of Python's ABI, so one Linux wheel serves every Python and torch. Without nvcc
the wheel is pure and carries the sources, which are then built on first use. `FXFUSE_PREBUILT=0` asks for the pure
wheel, `FXFUSE_PREBUILT=1` makes a missing nvcc an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent
CARRIES_LIBRARY_FOR = ("linux", "x86_64")


def kernel_builder() -> ModuleType:
    """`fxfuse/kernels/build.py` by its path: importing the package would import torch, which is not here."""
    spec = importlib.util.spec_from_file_location("fxfuse_kernels_build", ROOT / "fxfuse" / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wants_prebuilt() -> bool:
    """Whether this build is to carry the compiled kernels."""
    asked = os.environ.get("FXFUSE_PREBUILT", "")
    if asked == "0" or (sys.platform, platform.machine()) != CARRIES_LIBRARY_FOR:
        return False
    return asked == "1" or kernel_builder().find_nvcc() is not None


class BuildWithKernels(build_py):
    """build_py, then the kernels into the build folder (never into the source tree)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode and wants_prebuilt():
            kernel_builder().build(Path(self.build_lib) / "fxfuse" / "kernels" / "_prebuilt")


class MaybeBinaryDistribution(Distribution):
    """Says that the wheel is for one platform when it carries the library."""

    def has_ext_modules(self) -> bool:
        return wants_prebuilt() and not getattr(self.get_command_obj("build_py"), "editable_mode", False)


def wheel_command() -> type:
    """bdist_wheel with the tag py3-none-linux_x86_64 for a wheel that carries the library."""
    from setuptools.command.bdist_wheel import bdist_wheel

    class AnyPythonWheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            python, abi, platform_tag = super().get_tag()
            return (python, abi, platform_tag) if self.root_is_pure else ("py3", "none", platform_tag)

    return AnyPythonWheel


setup(
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": wheel_command()},
    distclass=MaybeBinaryDistribution,
)
