"""The package as a user gets it: the wheel's files, errors, public names, examples."""

import doctest
import importlib
import inspect
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
import typing
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import reelpool
from reelpool import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("models", "runtime", "scheduler")
# In the checkout for the reader's eye only.
NOT_SHIPPED = {".png", ".gif", ".mp4"}


def listed_files(*folders: str) -> list[str]:
    """Files that git tracks or would track, and that are there, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sorted({name for name in listed.split("\0") if name and (ROOT / name).is_file()})


def place_in_wheel(name: str) -> str:
    return name if name.startswith("reelpool/") else f"reelpool/{name}"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: an old build/ here would leak into it."""
    copy = tmp_path_factory.mktemp("checkout")
    top = ["pyproject.toml", "README.md", "LICENSE"]
    for name in [*top, *listed_files("reelpool", *FOLDERS)]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    # setuptools' own entry point, as pip calls it; without pip nothing is looked up on a network.
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", code, str(target)]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = target.glob("reelpool-*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel_files(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_runs_the_demo_model_it_holds(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = "import reelpool, reelpool.cli; print(reelpool.__file__); reelpool.cli.main()"
    arguments = ["demo", "-o", "demo.mp4", "--pool", "auto", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert (tmp_path / "demo.mp4").stat().st_size > 1000


def test_wheel_holds_every_file_of_the_packages(wheel_files):
    names = listed_files("reelpool", *FOLDERS)
    wanted = {
        place_in_wheel(name) for name in names if PurePosixPath(name).suffix not in NOT_SHIPPED
    }
    shipped = {name for name in wheel_files if ".dist-info/" not in name}
    missing, surplus = sorted(wanted - shipped), sorted(shipped - wanted)
    advice = "packages and package-data are explicit lists in pyproject.toml"
    assert (missing, surplus) == ([], []), f"missing {missing}, surplus {surplus}: {advice}"


def test_wheel_has_one_top_level_name_and_the_licence(wheel_files):
    assert {name.split("/")[0].partition("-")[0] for name in wheel_files} == {"reelpool"}
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel_files)


def error_classes(base: type[errors.ReelpoolError] = errors.ReelpoolError) -> list[type]:
    below = [found for child in base.__subclasses__() for found in error_classes(child)]
    ours = [kind for kind in (base, *below) if kind.__module__.startswith("reelpool")]
    return list(dict.fromkeys(ours))  # a test may have made some of its own


SAMPLES = {str: "text", int: 7, float: 0.5, bool: True, Path: Path("file"), type(None): None}


def sample(hint: object, salt: int) -> object:
    """A value of the annotated type, with `salt` in it where there is room."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is str:
        return f"text {salt}"
    if hint in SAMPLES:
        return SAMPLES[hint]
    if origin is typing.Literal:
        return args[0]
    if origin is tuple:
        return tuple(sample(arg, salt) for arg in args if arg is not Ellipsis)
    if origin is list:
        return [sample(args[0], salt)]
    if origin is dict or "Mapping" in str(origin):
        return {sample(args[0], salt): sample(args[1], salt)}
    if args:  # a union
        return sample(args[0], salt)
    raise NotImplementedError(f"say in tests/test_package.py what a {hint} looks like")


def construct(kind: type) -> errors.ReelpoolError:
    if kind.__init__ is Exception.__init__:
        return kind("one sentence")
    hints = typing.get_type_hints(kind.__init__)
    parameters = list(inspect.signature(kind).parameters.values())
    assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters), (
        f"{kind.__name__}: Ray loses fields that are not positional"
    )
    return kind(*(sample(hints[each.name], salt) for salt, each in enumerate(parameters)))


@pytest.mark.parametrize("kind", error_classes(), ids=lambda kind: kind.__name__)
def test_error_survives_pickling(kind):
    error = construct(kind)
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is kind
    assert (twin.args, vars(twin), str(twin)) == (error.args, vars(error), str(error))
    assert str(error)
    assert "\n" not in str(error)


def test_errors_all_live_in_one_file():
    for module in module_names():
        importlib.import_module(module)
    assert {kind.__module__ for kind in error_classes()} == {"reelpool.errors"}


def test_tree_in_header_names_every_error():
    drawn = errors.__doc__ or ""
    assert [kind.__name__ for kind in error_classes() if kind.__name__ not in drawn] == []


def test_all_equals_public_names():
    public = {
        name
        for name, value in vars(reelpool).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} <= set(reelpool.__all__)
    assert [name for name in reelpool.__all__ if not hasattr(reelpool, name)] == []
    assert len(set(reelpool.__all__)) == len(reelpool.__all__)


def module_names() -> list[str]:
    """Every module of the product but trainers of the demo model and `__main__`.

    Not by one walk over `reelpool.__path__`: in a checkout that holds the whole root.
    """
    places = {"reelpool": [str(Path(reelpool.__file__).parent)]}
    places |= {f"reelpool.{name}": [str(ROOT / name)] for name in FOLDERS}
    names = {"reelpool", *places}
    for prefix, path in places.items():
        names |= {found.name for found in pkgutil.walk_packages(path, f"{prefix}.")}
    last = {name: name.rpartition(".")[2] for name in names}
    return sorted(n for n in names if last[n] != "__main__" and not last[n].startswith("train"))


@pytest.mark.parametrize("name", module_names())
def test_examples_in_docstrings_hold(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
