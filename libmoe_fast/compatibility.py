"""Which versions of other packages go together: those that were tested, and combinations that are known to be bad.

`libmoe-fast doctor` names what it finds here, each with the one command that mends it. Needs no other module of this
package, so that environments/latest.py can hold a lock file against it.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

# Oldest and newest release that the tests have passed with (environments/matrix.py and the lock files). A newer patch
# of the newest counts as tested. Of what is not listed no version was seen to matter.
TESTED = {
    "torch": ("2.9", "2.15"),
    "triton": ("3.5", "3.9"),
    "transformers": ("4.51", "5.24"),
    "deepspeed": ("0.19", "0.19"),
    "lmms-eval": ("0.7.3", "0.7"),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A combination of versions that is known to be bad, or was never tested, and the command that mends it."""

    problem: str
    mend: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}"


@dataclass(frozen=True, kw_only=True)
class BadCombination:
    """Versions that do not work together: all of `versions` at once."""

    versions: Mapping[str, str]
    reason: str
    mend: str


BAD_COMBINATIONS = (
    BadCombination(
        versions={"lmms-eval": "<=0.7.3", "filelock": ">=4"},
        reason="lmms-eval imports filelock._api, which filelock 4.3 does not have: no evaluation starts",
        mend='pip install "filelock<4"',
    ),
    BadCombination(
        versions={"triton": "<3.8", "numpy": ">=2.4"},
        reason='Triton\'s interpreter fails with "only 0-dimensional arrays can be converted to Python scalars"',
        mend='pip install "numpy<2.4"',
    ),
)

# Packages whose compiled parts fit one version of another, and say which in their own requirements.
BUILT_FOR = (("torchvision", "torch"), ("torchaudio", "torch"), ("torch", "triton"))


def problems(versions: Mapping[str, str] | None = None) -> list[Problem]:
    """What is known to be wrong with these versions (package -> version; default: those installed here)."""
    if versions is None:
        versions = {name: version for name in _known_packages() if (version := installed_version(name))}
        return [*_bad_combinations(versions), *_built_for_others(), *_builds_apart(), *_untested(versions)]
    return [*_bad_combinations(versions), *_untested(versions)]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _known_packages() -> set[str]:
    return {*TESTED, *(name for bad in BAD_COMBINATIONS for name in bad.versions)}


def _bad_combinations(versions: Mapping[str, str]) -> Iterator[Problem]:
    for bad in BAD_COMBINATIONS:
        if all(name in versions and _in(versions[name], specifier) for name, specifier in bad.versions.items()):
            together = " with ".join(f"{name} {versions[name]}" for name in bad.versions)
            yield Problem(problem=f"{together}: {bad.reason}", mend=bad.mend)


def _built_for_others() -> Iterator[Problem]:
    """Installed packages whose own requirement on what they were built for is not met."""
    for name, other in BUILT_FOR:
        version, there = installed_version(name), installed_version(other)
        if version is None or there is None:
            continue
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            wanted = requirement.name == other and (requirement.marker is None or requirement.marker.evaluate())
            if wanted and not _in(there, str(requirement.specifier)):
                yield Problem(
                    problem=f"{name} {version} was built for {other}{requirement.specifier}, and here is {there}",
                    mend=f'pip install "{other}{requirement.specifier}"'
                    if other == "triton"
                    else f"pip install --upgrade {name} torch=={Version(there).public}",
                )


def _builds_apart() -> Iterator[Problem]:
    """A torchvision with CUDA beside a torch without, or for another CUDA: it fails at import, with a missing nms."""
    builds = {name: _cuda_of(name) for name in ("torch", "torchvision")}
    if None not in builds.values() and len(set(builds.values())) > 1:
        names = " and ".join(f"{name} for {'CUDA ' + cuda if cuda else 'the CPU'}" for name, cuda in builds.items())
        yield Problem(
            problem=f"builds that do not go together: {names}", mend="pip install --force-reinstall torch torchvision"
        )


def _cuda_of(name: str) -> str | None:
    """The major version of the CUDA that a package is built for, "" for none, None where it does not say."""
    spec = importlib.util.find_spec(name)
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if file is None or not file.is_file():
        return None
    found = re.search(r"__version__ = '[^'+]*\+(?:cu(\d+)\d|cpu)'", file.read_text())
    return found and (found[1] or "")


def _untested(versions: Mapping[str, str]) -> Iterator[Problem]:
    for name, (oldest, newest) in TESTED.items():
        if name not in versions:
            continue
        if not _in(versions[name], f">={oldest}"):
            yield Problem(
                problem=f"{name} {versions[name]} is older than the oldest that was tested, {oldest}",
                mend=f'pip install "{name}>={oldest}"',
            )
        elif not _in(versions[name], f"<={newest}") and not _in(versions[name], f"=={newest}.*"):
            yield Problem(
                problem=f"{name} {versions[name]} is newer than the newest that was tested, {newest}",
                mend=f'if something fails: pip install "{name}=={newest}.*"',
            )


def _in(version: str, specifier: str) -> bool:
    """Whether a version meets a specifier, pre-releases and builds of one's own (2.11.0+cu130) included."""
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except InvalidVersion:
        return True  # a build that does not say what it is
