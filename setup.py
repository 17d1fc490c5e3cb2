"""Builds csrc/ with ninja and maps the top-level folders into the package; pyproject.toml holds everything else.

LIBMOE_FAST_BUILD decides about the C++ extension: unset builds it where a compiler and torch 2.11 or newer are found,
1 makes it an error if either is missing, 0 skips it. Without the extension the `reference` and `triton` backends do
everything; on the CPU only slower.
LIBMOE_FAST_CUDA decides likewise about its CUDA part (csrc/cuda/): unset builds it where a CUDA toolkit is found.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.resolve()
SETUPTOOLS_FLOOR = 77  # the first to read pyproject.toml's licence expression; torch needs it too
# The oldest torch whose stable ABI has all that csrc/ needs: 2.9 has no TORCH_BOX, parallel_for and strings, 2.10 no
# from_blob with a deleter. The package itself runs under older ones too (pyproject.toml), without the extension.
TORCH_FLOOR = (2, 11)
# What the library may use of a newer torch's headers, too: major in the top byte, minor in the next.
TORCH_TARGET_VERSION = f"0x{TORCH_FLOOR[0]:02x}{TORCH_FLOOR[1]:02x}000000000000"
FOLDERS = ("train", "kernels", "benchmarks")  # of this repository, each a subpackage of libmoe_fast
BUILDING_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}

OLD_SETUPTOOLS = """\
libmoe_fast: setuptools {found} is installed, but building needs {floor} or newer.
  Either pip install "setuptools>={floor}", or leave out --no-build-isolation, and pip fetches one to build with."""

NO_COMPILER = """\
libmoe_fast: no C++ compiler found ({looked_for}), so the C++ extension is left out.
  What works without it: everything, on the backends `reference` (pure PyTorch) and, on a GPU, `triton`.
  To get it: install g++ 11 or newer (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda
  install gxx), or name another compiler in CXX, and install again.
  LIBMOE_FAST_BUILD=1 makes a missing compiler an error, LIBMOE_FAST_BUILD=0 leaves the extension out silently."""

COMPILE_FAILED = """\
libmoe_fast: compiling the C++ extension failed; the compiler's own message is above.
  It needs a C++20 compiler, such as g++ 11 or newer (CXX names another one). LIBMOE_FAST_BUILD=0 installs without the
  extension: everything then works on the backends `reference` (pure PyTorch) and, on a GPU, `triton`.
  If nvcc failed: LIBMOE_FAST_CUDA=0 leaves only the CUDA part out."""

NO_CUDA = """\
libmoe_fast: the CUDA part is left out: {reason}.
  CUDA_HOME names a toolkit; LIBMOE_FAST_CUDA=1 makes this an error, LIBMOE_FAST_CUDA=0 leaves it out silently."""

NO_TORCH = """\
libmoe_fast: torch is not installed here, but the C++ extension is built against it.
  Either install torch first (pip install "torch>={floor}"), or leave out --no-build-isolation, and pip fetches one to
  build with, or set LIBMOE_FAST_BUILD=0 to install without the extension."""

OLD_TORCH = """\
libmoe_fast: the C++ extension is left out: it needs torch {floor} or newer, and here is {found}. The backends \
`reference` and, on a GPU, `triton` do everything; LIBMOE_FAST_BUILD=1 makes this an error."""


def mapped_packages():
    """Package name -> folder, for the folders whose name in the repository is not their name in the package.

    Top-level `train/` is installed as libmoe_fast.train, `benchmarks/` as libmoe_fast.benchmarks and `kernels/` as
    libmoe_fast.kernels: a top-level package named `kernels` would shadow the one on PyPI that transformers imports.
    """
    return {f"libmoe_fast.{name}": name for name in FOLDERS if any((ROOT / name).glob("*.py"))}


def all_packages(mapping):
    packages = ["libmoe_fast", *(f"libmoe_fast.{name}" for name in setuptools.find_packages(str(ROOT / "libmoe_fast")))]
    for package, folder in mapping.items():
        packages += [package, *(f"{package}.{name}" for name in setuptools.find_packages(str(ROOT / folder)))]
    return packages


def find_compiler():
    """(The name looked for, whether it is there), as torch's own build will look for it."""
    name = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    return name, shutil.which(shlex.split(name)[0]) is not None


def import_torch():
    """torch, or None where it is too old to build against, which is reported here, once. Exits where there is none."""
    floor = ".".join(map(str, TORCH_FLOOR))
    try:
        import torch
    except ImportError:
        sys.exit(NO_TORCH.format(floor=floor))
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= TORCH_FLOOR:
        return torch
    message = OLD_TORCH.format(found=torch.__version__, floor=floor)
    if os.environ.get("LIBMOE_FAST_BUILD") == "1":
        sys.exit(message)
    print(message, file=sys.stderr)
    return None


def extension_wanted():
    """Whether this command builds the extension. A missing compiler is reported here, once."""
    choice = os.environ.get("LIBMOE_FAST_BUILD", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"libmoe_fast: LIBMOE_FAST_BUILD is {choice!r}; expected 0, 1 or nothing")
    if choice == "0" or not BUILDING_COMMANDS & set(sys.argv):
        return False
    looked_for, found = find_compiler()
    if found:
        return True
    message = NO_COMPILER.format(looked_for=looked_for)
    if choice == "1":
        sys.exit(message)
    print(message, file=sys.stderr)
    return False


def cuda_toolkit(torch):
    """The CUDA toolkit to build csrc/cuda/ with, or None. A missing one is reported here, once."""
    choice = os.environ.get("LIBMOE_FAST_CUDA", "")
    if choice not in ("", "0", "1"):
        sys.exit(f"libmoe_fast: LIBMOE_FAST_CUDA is {choice!r}; expected 0, 1 or nothing")
    if choice == "0":
        return None
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    from cuda_toolkit import ToolkitError, find

    try:
        return find(Path(torch.__file__).parents[1] / "nvidia", torch.version.cuda)
    except ToolkitError as error:
        message = NO_CUDA.format(reason=error)
        if choice == "1":
            sys.exit(message)
        print(message, file=sys.stderr)
        return None


def sources(*patterns):
    """Files of csrc/, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cuda_extension(toolkit, cxx_flags):
    """csrc/cuda/ as a library of its own: a torch without CUDA has no use for it, and never loads it.

    It needs nothing of torch's CUDA libraries but a C function that names the current stream, and brings the CUDA
    runtime along: one file runs with every torch that the CPU library runs with, whichever CUDA that is built for.
    """
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's own guess fails where nvcc is a script, and without CUDA
    nvcc = ["-O3", "-std=c++20", "-fmad=false", "--compiler-options=-fvisibility=hidden", *toolkit.flags]
    return cpp_extension.CppExtension(
        "libmoe_fast._cuda",
        [*sources("cuda/*.cpp", "cuda/*.cu"), "csrc/checks.cpp"],
        depends=sources("*.h", "cuda/*.h", "cuda/*.cuh"),
        py_limited_api=True,
        include_dirs=list(toolkit.include_dirs),
        library_dirs=[toolkit.library_dir],
        libraries=["cudart_static", "dl", "pthread", "rt"],
        extra_compile_args={"cxx": [*cxx_flags, "-DUSE_CUDA"], "nvcc": nvcc},  # USE_CUDA: torch's header declares it
        # libtorch.so brings that function in from libtorch_cuda.so, which a torch without CUDA that builds this lacks.
        extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"],
    )


def extension_options():
    """setup() arguments for the extension: none when it is left out, and the wheel is then a pure-Python one."""
    if not extension_wanted():
        return {}
    torch = import_torch()
    if torch is None:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # ninja, distutils and torch each raise a type of their own
                sys.exit(f"{error}\n{COMPILE_FAILED}")

    # A library of torch ops, loaded with torch.ops.load_library: it has no Python in it, so it needs no Python headers
    # and no PyInit.
    cxx_flags = [
        "-O3",
        "-std=c++20",
        "-Wall",
        # No fused multiply-add: one result, bit for bit, on every machine.
        "-ffp-contract=off",
        # Nobody reads exception flags; with them, a comparison is a branch, and AVX2 loops stay scalar.
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-g0",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        f'-DLIBMOE_FAST_TORCH_VERSION="{torch.__version__}"',
    ]
    cpu = CppExtension(
        "libmoe_fast._cpu",
        sources("*.cpp"),
        depends=sources("*.h"),
        py_limited_api=True,
        extra_compile_args=cxx_flags,
    )
    toolkit = cuda_toolkit(torch)
    return {
        "ext_modules": [cpu, cuda_extension(toolkit, cxx_flags)] if toolkit else [cpu],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=shutil.which("ninja") is not None)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def check_setuptools():
    if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS_FLOOR:
        sys.exit(OLD_SETUPTOOLS.format(found=setuptools.__version__, floor=SETUPTOOLS_FLOOR))


check_setuptools()
mapping = mapped_packages()
setuptools.setup(
    packages=all_packages(mapping),
    package_dir=mapping,
    package_data={"libmoe_fast.train": ["presets/**/*.yaml", "presets/**/*.py"]},
    include_package_data=False,
    **extension_options(),
)
