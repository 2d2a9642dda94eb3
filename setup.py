"""Compiles the operators of csrc/ with the torch that is installed; docs/installing.md says when it does not."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available
except ImportError:
    torch = None

OLDEST_TORCH = (2, 10)
TARGET = "0x020a000000000000"  # the same: the binary asks for nothing newer, and runs with everything newer
# No -march=native and no -ffast-math: the same bits on every machine. Contraction into FMA would differ between them;
# Clang does it by default, and GCC for ARM. A file, for `make arm` compiles with the same.
FLAGS = Path("csrc/flags").read_text().split()
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # torch's headers have those
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").glob(pattern))


def compiler() -> str | None:
    """The C++ compiler that the user names, else Python's own, else one on the path."""
    if "CXX" in os.environ:
        return os.environ["CXX"]
    pythons = shlex.split(sysconfig.get_config_var("CXX") or "c++")[0]
    return next(filter(shutil.which, (pythons, "c++", "g++", "clang++")), None)


def why_pure() -> str | None:
    """Why nothing is to be compiled; None where it is."""
    if os.environ.get("BATCHNORM_PURE", "0") not in ("", "0"):
        return "BATCHNORM_PURE is set"
    if sys.platform == "win32":
        return "they are written for GCC and Clang, and torch for Windows for MSVC"
    if compiler() is None:
        return "there is no C++ compiler"
    return None


TAKE_TORCH = '`pip install torch "setuptools>=77" ninja`, then install batchnorm again with --no-build-isolation'
TAKE_COMPILER = "name a compiler that knows C++20, as in CXX=clang++"


def fail(rule: str, happened: object, cure: str) -> NoReturn:
    raise CompileError(
        f"""

batchnorm: {rule}
  What happened: {happened}
  Cure: {cure};
  or set BATCHNORM_PURE=1 for a package without compiled operators, slower on CPUs. More in docs/installing.md.
"""
    )


class WithoutTorch(build_ext):
    """Metadata and source distributions need no torch; the operators do."""

    def run(self) -> None:
        fail(
            "compiling the operators needs torch 2.10 or newer where the package is built.",
            "there is none. pip and uv build apart from your environment unless told otherwise.",
            TAKE_TORCH,
        )


def build_with_torch() -> type[build_ext]:
    class Build(BuildExtension):
        def run(self) -> None:
            found = tuple(int(part) for part in torch.__version__.split(".")[:2])
            if found < OLDEST_TORCH:
                fail("compiling the operators needs torch 2.10 or newer.", f"there is {torch.__version__}.", TAKE_TORCH)
            try:
                super().run()
            except Exception as error:
                fail("the operators did not compile; the compiler's own message is above.", error, TAKE_COMPILER)

        def get_ext_filename(self, name: str) -> str:
            return f"{name.replace('.', os.sep)}.so"  # no Python's name in it: the binary uses nothing of Python's

    return Build.with_options(use_ninja=is_ninja_available())


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def extension() -> dict:
    reason = why_pure()
    if reason:
        print(f"batchnorm: built without its compiled operators: {reason}. It works, slower on CPUs.", file=sys.stderr)
        return {}
    os.environ["CXX"] = str(compiler())  # setuptools and ninja would each look for another
    if torch is None:
        module, build = Extension("batchnorm._C", SOURCES), WithoutTorch
    else:
        module = CppExtension(
            "batchnorm._C",
            SOURCES,
            depends=HEADERS,
            define_macros=[("TORCH_TARGET_VERSION", TARGET)],
            extra_compile_args=FLAGS + WARNINGS + os.environ.get("CXXFLAGS", "").split(),  # the last word is yours
            py_limited_api=True,  # links nothing of Python's
        )
        build = build_with_torch()
    return {"ext_modules": [module], "cmdclass": {"build_ext": build, "bdist_wheel": Wheel}}


setup(**extension())
