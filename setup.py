"""Builds the compiled operators where torch and a compiler are at hand; without them the package is pure Python."""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available
except ImportError:
    BuildExtension = None

OLDEST_TORCH = "0x020a000000000000"  # 2.10: the binary asks for nothing newer, and runs with everything newer
# No -march=native and no -ffast-math: the same bits on every machine. Contraction into FMA would differ between them;
# Clang does it by default, and GCC for ARM. A file, for `make arm` compiles with the same.
FLAGS = Path("csrc/flags").read_text().split()
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # torch's headers have those


def say_pure(reason: object) -> None:
    print(f"batchnorm: installing without the compiled operators ({reason}); it works, slower", file=sys.stderr)


def extension() -> dict:
    if BuildExtension is None:
        say_pure("torch is not there at build time")
        return {}

    class BuildOrGoWithout(BuildExtension):  # any failure at all leaves a package that works
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                say_pure(error)

    sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
    module = CppExtension(
        "batchnorm._C",
        sources,
        depends=sorted(str(path) for pattern in ("*.h", "*.inl") for path in Path("csrc").glob(pattern)),
        define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH)],
        extra_compile_args=FLAGS + WARNINGS + os.environ.get("CXXFLAGS", "").split(),  # the last word is yours
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildOrGoWithout.with_options(use_ninja=is_ninja_available())},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
