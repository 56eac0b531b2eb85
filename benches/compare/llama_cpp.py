"""llama.cpp's programs, built from the sdist of its Python package."""

import os
import shutil
import subprocess
import sys
import tarfile

NAME = "llama-cpp-python"
PROGRAMS = ["llama-bench", "llama-batched-bench", "llama-quantize", "llama-server"]
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
# GCC 12's `_tile_loadconfig` tells the compiler that it reads 8 bytes of the 64, so what fills the others is left out:
# llama.cpp then crashes where the machine has AMX.
TILE_CONFIG = """#ifdef __AMX_TILE__
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %X0" : : "m"(*(const char(*)[64])(config)))
#endif
"""


def environment(folder):
    """For programs whose libraries lie beside them."""
    libraries = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, libraries))}


def build(work):
    """The folder of the programs."""
    build = work / "llama.cpp"
    if all((build / "bin" / program).exists() for program in PROGRAMS):
        return build / "bin"
    if not shutil.which("cmake"):
        raise SystemExit("cmake is missing: install it, or give --llama DIR")
    source = _source(work)
    header = work / "tile_config.h"
    header.write_text(TILE_CONFIG)
    options = {**OPTIONS, "CMAKE_CXX_FLAGS": f"-include {header.resolve()}"}
    flags = [f"-D{key}={value}" for key, value in options.items()]
    subprocess.run(["cmake", "-S", source, "-B", build, *flags], check=True, stdout=sys.stderr)
    jobs = ["--parallel", str(os.cpu_count()), "--target", *PROGRAMS]
    subprocess.run(["cmake", "--build", build, *jobs], check=True, stdout=sys.stderr)
    return build / "bin"


def _source(work):
    folder = work / "llama-cpp-python"
    if not folder.exists():
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", NAME, NAME]
        subprocess.run([*download, "--dest", work], check=True, stdout=sys.stderr)
        (archive,) = work.glob("llama_cpp_python-*.tar.gz")
        part = work / "llama-cpp-python.part"
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        os.rename(part, folder)
    (source,) = folder.glob("*/vendor/llama.cpp")
    return source
