"""Builds the C++ extension where a compiler is at hand; without one the install succeeds and says what is missing."""

from __future__ import annotations

import glob
import gzip
import os
import runpy
import sys
import tarfile

from pybind11.setup_helpers import Pybind11Extension, build_ext, has_flag
from setuptools import find_packages, setup
from setuptools.command.sdist import sdist
from setuptools.errors import CCompilerError, ExecError, PlatformError

DIGEST = runpy.run_path("kernels/undo_kernels/cpu/sources.py")["digest"]("csrc")
FLAGS = ["-O3", "-ffp-contract=off"]
# A sanitizer, such as address,undefined, for tests: Python must then run with its library loaded first (LD_PRELOAD).
SANITIZER = [f"-fsanitize={os.environ['UNDO_SANITIZE']}", "-g1", "-O1"] if os.environ.get("UNDO_SANITIZE") else []
OPENMP = "-fopenmp"
REPRODUCIBLE = "SOURCE_DATE_EPOCH" in os.environ
if REPRODUCIBLE:
    os.umask(0o022)  # a wheel states the modes of its files


class BuildExtension(build_ext):
    """Compiles with OpenMP if the compiler has it; says in one line what is missing otherwise."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        try:
            if has_flag(self.compiler, OPENMP):
                extension.extra_compile_args.append(OPENMP)
                extension.extra_link_args.append(OPENMP)
            else:  # as Apple's compiler
                print(
                    f"undo-core: NO OPENMP: the compiler rejects {OPENMP}; the C++ kernels run on one thread", file=sys.stderr
                )
            super().build_extension(extension)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            reason = " ".join(str(error).split())
            print(f"undo-core: NO C++ KERNELS: {reason}; the plain-PyTorch reference backend is used instead", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """What was built; a missing extension is not an error."""
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """Only what was built."""
        built = [e for e in self.extensions if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(e.name)))]
        every, self.extensions = self.extensions, built
        super().copy_extensions_to_source()
        self.extensions = every


class SourceArchive(sdist):
    """Gives every file the time of SOURCE_DATE_EPOCH, if that is set, and no owner, so that the archive has the same bytes again."""

    def make_archive(self, base_name: str, format: str, root_dir=None, base_dir=None, owner=None, group=None) -> str:
        """Returns the path of the archive."""
        if format != "gztar" or not REPRODUCIBLE:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        time, path = int(os.environ["SOURCE_DATE_EPOCH"]), f"{base_name}.tar.gz"

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid, entry.gid, entry.uname, entry.gname = 0, 0, "", ""
            entry.mtime, entry.mode = time, 0o755 if entry.mode & 0o100 else 0o644
            return entry

        with (
            open(path, "wb") as raw,
            gzip.GzipFile("", "wb", fileobj=raw, mtime=time) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            archive.add(base_dir, filter=plain)  # a folder's entries in the order of their names
        return path


setup(
    packages=find_packages("kernels") + find_packages(include=["undo_core", "undo_core.*"]),
    package_dir={"undo_kernels": "kernels/undo_kernels", "undo_core": "undo_core"},
    ext_modules=[
        Pybind11Extension(
            "undo_kernels._cpu",
            sorted(glob.glob("csrc/*.cpp")),
            depends=sorted(glob.glob("csrc/*.h")),
            cxx_std=17,
            define_macros=[("UNDO_SOURCES", f'"{DIGEST}"')],
            extra_compile_args=FLAGS + SANITIZER,
            extra_link_args=SANITIZER,
        )
    ],
    cmdclass={"build_ext": BuildExtension, "sdist": SourceArchive},
)
