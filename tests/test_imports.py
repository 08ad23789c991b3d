"""Who may import whom (design.md section 7), by `ast`; each rule is also shown to find a breach.

    reelpool.errors <- models <- runtime <- scheduler <- reelpool/__init__ <- cli <- __main__

A module is named by its import name (`reelpool.runtime.device`), wherever its file lies.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("models", "runtime", "scheduler")
LAYERS = ("errors", *FOLDERS, "", "cli", "__main__")  # "" is reelpool/__init__.py
SCRIPTS = ("jobs", "benchmarks", "tests")
MAX_LINES = 400
BANNED_NAMES = {"util", "utils", "common", "helper", "helpers", "misc"}
# Where a foreign package may be imported; `transformers` besides only inside functions.
HOMES = {
    "ray": r"reelpool\.scheduler\.(cluster|worker|transfer|ray_pool)|(tests|benchmarks)\..*",
    "pynvml": r"reelpool\.runtime\.device|tests\..*",
    "diffusers": r"(tests|benchmarks)\..*",
    "transformers": r"reelpool\.models(\..*)?|(tests|benchmarks)\..*",
}
PURE = (
    *(f"scheduler.{name}" for name in ("planner", "cost", "plan", "simulate", "faults", "job")),
    *(f"scheduler.{name}" for name in ("cards", "events", "pool_spec", "ray_environment")),
    *(f"models.{name}" for name in ("spec", "registry", "jsonfile", "vae_config", "parts")),
    *(f"models.{name}" for name in ("finder", "search_folders", "catalogue", "companions")),
    "models.vae_tiles",
    *(f"models.{name}" for name in ("experts", "presets", "defaults", "quant_mix", "assembly")),
    "scheduler.job_schema",
    "scheduler.job_inputs",
    *(f"scheduler.{name}" for name in ("plan_memory", "job_values")),
    *(f"runtime.{name}" for name in ("memory", "types", "schedule", "still", "card_bytes")),
    *(f"runtime.{name}" for name in ("vae_bytes", "residency")),
)


@dataclass(frozen=True)
class Source:
    """One file: `name` is its import name, `path` is relative to the root."""

    name: str
    path: Path
    text: str

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported name; `target` is absolute, as exact as the statement allows."""

    target: str
    line: int
    relative: bool
    in_function: bool
    for_types: bool


def read_sources(root: Path, folders: tuple[str, ...]) -> list[Source]:
    sources = []
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            path = file.relative_to(root)
            parts = [*path.parts[:-1], *([] if path.stem == "__init__" else [path.stem])]
            name = ".".join(["reelpool", *parts] if folder in FOLDERS else parts)
            sources.append(Source(name, path, file.read_text(encoding="utf-8")))
    return sources


def product(root: Path) -> list[Source]:
    return read_sources(root, ("reelpool", *FOLDERS))


def imports_of(source: Source) -> list[Import]:
    return list(_walk(ast.parse(source.text, source.path.as_posix()), source, False, False))


def _walk(node: ast.AST, source: Source, in_function: bool, for_types: bool) -> Iterator[Import]:
    for target, relative in _targets(node, source):
        yield Import(target, node.lineno, relative, in_function, for_types)
    in_function = in_function or isinstance(
        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    )
    guard = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _walk(
                    child, source, in_function, for_types or (guard and field == "body")
                )


def _targets(node: ast.AST, source: Source) -> list[tuple[str, bool]]:
    if isinstance(node, ast.Import):
        return [(alias.name, False) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = source.package.split(".")
        base = ".".join(above[: len(above) - node.level + 1]) if node.level else ""
        start = ".".join(part for part in (base, node.module) if part)
        return [(f"{start}.{alias.name}", node.level > 0) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
            return [(node.args[0].value, False)]
    return []


def layer(name: str) -> int | None:
    parts = name.split(".")
    head = parts[1] if len(parts) > 1 else ""
    return LAYERS.index(head) if head in LAYERS else None


def within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def find_layer_breaches(sources: list[Source]) -> list[str]:
    """Imports of a layer that lies higher, or from a place the map does not know."""
    known = {source.name for source in sources}
    breaches = []
    for source in sources:
        own = layer(source.name)
        if own is None:
            breaches.append(f"{source.path}: not on the map of who may import whom")
            continue
        for item in imports_of(source):
            if not within(item.target, "reelpool") or item.target == "reelpool.__version__":
                continue
            module = module_of(item.target, known)
            other = layer(module)
            if other is None or other > own or (own == 0 and module != source.name):
                breaches.append(f"{source.path}:{item.line}: may not import {item.target}")
    return breaches


def find_form_breaches(sources: list[Source]) -> list[str]:
    """Bare folder names; absolute imports inside the folders; relative ones outside."""
    breaches = []
    for source in sources:
        inside = source.name.split(".")[0] == "reelpool" and source.path.parts[0] in FOLDERS
        script = source.path.parts[0] in SCRIPTS
        for item in imports_of(source):
            absolute = within(item.target, "reelpool") and not item.relative
            allowed = item.target == "reelpool.__version__" or within(
                item.target, "reelpool.errors"
            )
            if not item.relative and item.target.split(".")[0] in FOLDERS:
                problem = "bare import, say reelpool. or use a relative one"
            elif inside and absolute and not allowed:
                problem = "import it relatively"
            elif script and item.relative:
                problem = "import it absolutely"
            else:
                continue
            breaches.append(f"{source.path}:{item.line}: {item.target}: {problem}")
    return breaches


def find_foreign_breaches(sources: list[Source]) -> list[str]:
    """Foreign packages outside of their homes, transformers at a module's top."""
    breaches = []
    for source in sources:
        for item in imports_of(source):
            package = item.target.split(".")[0]
            if package not in HOMES:
                continue
            where = f"{source.path}:{item.line}"
            if not re.fullmatch(HOMES[package], source.name):
                breaches.append(f"{where}: {package} may not be imported here")
            eager = not (item.in_function or item.for_types)
            if package == "transformers" and eager and within(source.name, "reelpool"):
                breaches.append(f"{where}: import transformers inside the function that needs it")
    return breaches


def module_of(target: str, known: set[str]) -> str:
    """The module that an import of `target` loads: `a.b.name` is `a.b` unless it is a module."""
    return target if target in known else target.rpartition(".")[0]


def find_cycles(sources: list[Source]) -> list[str]:
    """Groups of modules that import each other, imports inside functions counted."""
    known = {source.name for source in sources}
    above: dict[str, set[str]] = {}
    for source in sources:
        items = [item for item in imports_of(source) if not item.for_types]
        targets = {item.target for item in items if item.target != "reelpool.__version__"}
        above[source.name] = {module_of(target, known) for target in targets} & known
    breaches = []
    # A module that nothing left imports, or that imports nothing left, is in no cycle: drop it.
    while True:
        wanted = set().union(*above.values())
        loose = {name for name, targets in above.items() if not targets or name not in wanted}
        if not loose:
            break
        above = {name: targets - loose for name, targets in above.items() if name not in loose}
    if above:
        breaches.append("cycle among " + ", ".join(sorted(above)))
    return breaches


def find_long_files(sources: list[Source]) -> list[str]:
    lengths = ((source.path, len(source.text.splitlines())) for source in sources)
    return [f"{path}: {n} lines, {MAX_LINES - 1} allowed" for path, n in lengths if n >= MAX_LINES]


def find_banned_names(sources: list[Source]) -> list[str]:
    return [
        f"{source.path}: name it after what it does"
        for source in sources
        if BANNED_NAMES & {Path(part).stem for part in source.path.parts}
    ]


def find_silent_excepts(sources: list[Source]) -> list[str]:
    """Broad handlers (`suppress` too) without the reason on their line or the one above."""
    breaches = []
    for source in sources:
        reasons = _reason_lines(source.text)
        for node in ast.walk(ast.parse(source.text)):
            if _is_broad(node) and not {node.lineno, node.lineno - 1} & reasons:
                breaches.append(f"{source.path}:{node.lineno}: broad except without its reason")
    return breaches


def _is_broad(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        caught = [node.type]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        caught = list(node.args)
    else:
        return False
    caught = [
        item for kind in caught for item in (kind.elts if isinstance(kind, ast.Tuple) else [kind])
    ]
    return any(
        kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught
    )


def _reason_lines(text: str) -> set[int]:
    """Lines with a comment that says something: a tool's switch alone does not."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words = re.sub(r"(noqa|type:|pragma:)[^#]*", "", token.string)
            if re.search(r"\w{2,}\W+\w{2,}", words):
                lines.add(token.start[0])
    return lines


CHECKS = [
    find_layer_breaches,
    find_form_breaches,
    find_foreign_breaches,
    find_cycles,
    find_long_files,
    find_banned_names,
    find_silent_excepts,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_product_has_none(check):
    assert check(product(ROOT)) == []


@pytest.mark.parametrize("check", [find_form_breaches, find_foreign_breaches, find_banned_names])
def test_scripts_and_tests_have_none(check):
    assert check(read_sources(ROOT, SCRIPTS)) == []


def existing_pure_modules() -> list[str]:
    known = {source.name for source in product(ROOT)}
    return [f"reelpool.{name}" for name in PURE if f"reelpool.{name}" in known]


@pytest.mark.parametrize("module", existing_pure_modules())
def test_pure_module_loads_neither_ray_nor_torch(module):
    code = f"import sys, {module}; print(*({{'ray', 'torch'}} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


LONG = "x = 1\n" * MAX_LINES
BREACHES = {  # id: (check, {file: text}, part of the message)
    "models imports runtime": (
        find_layer_breaches,
        {"models/a.py": "from ..runtime import b"},
        "a.py:1",
    ),
    "runtime imports scheduler": (
        find_layer_breaches,
        {"runtime/a.py": "def f():\n    from ..scheduler.plan import Plan"},
        "a.py:2",
    ),
    "scheduler imports cli": (
        find_layer_breaches,
        {"scheduler/a.py": "import importlib\nimportlib.import_module('reelpool.cli.x')"},
        "reelpool.cli.x",
    ),
    "models imports public names": (
        find_layer_breaches,
        {"models/a.py": "from reelpool import generate"},
        "reelpool.generate",
    ),
    "errors imports models": (
        find_layer_breaches,
        {"reelpool/errors.py": "from reelpool.models import spec"},
        "errors.py:1",
    ),
    "file off the map": (find_layer_breaches, {"reelpool/extra.py": ""}, "not on the map"),
    "absolute inside": (
        find_form_breaches,
        {"runtime/a.py": "from reelpool.runtime.types import X"},
        "relatively",
    ),
    "bare": (find_form_breaches, {"reelpool/cli/a.py": "import runtime.types"}, "bare"),
    "relative in a job": (find_form_breaches, {"jobs/a.py": "from . import b"}, "absolutely"),
    "ray in runtime": (find_foreign_breaches, {"runtime/a.py": "import ray"}, "ray"),
    "ray in planner": (
        find_foreign_breaches,
        {"scheduler/planner.py": "from ray.util import state"},
        "planner.py:1",
    ),
    "pynvml in memory": (find_foreign_breaches, {"runtime/memory.py": "import pynvml"}, "pynvml"),
    "diffusers in models": (
        find_foreign_breaches,
        {"models/a.py": "def f():\n    import diffusers"},
        "diffusers",
    ),
    "diffusers in a job": (find_foreign_breaches, {"jobs/a.py": "import diffusers"}, "diffusers"),
    "transformers in runtime": (
        find_foreign_breaches,
        {"runtime/a.py": "def f():\n    import transformers"},
        "may not",
    ),
    "transformers at top": (
        find_foreign_breaches,
        {"models/text.py": "from transformers import UMT5EncoderModel"},
        "inside the function",
    ),
    "cycle of two": (
        find_cycles,
        {"models/a.py": "from .b import B", "models/b.py": "def f():\n    from . import a"},
        "reelpool.models.a, reelpool.models.b",
    ),
    "400 lines": (find_long_files, {"models/a.py": LONG}, "400 lines"),
    "utils": (find_banned_names, {"models/utils.py": ""}, "what it does"),
    "common folder": (find_banned_names, {"models/common/a.py": ""}, "what it does"),
    "except Exception": (
        find_silent_excepts,
        {"models/a.py": "try:\n    f()\nexcept Exception as e:\n    pass"},
        "a.py:3",
    ),
    "bare except": (
        find_silent_excepts,
        {"models/a.py": "try:\n    f()\nexcept:  # noqa: E722\n    pass"},
        "a.py:3",
    ),
    "in a tuple": (
        find_silent_excepts,
        {"models/a.py": "try:\n    f()\nexcept (ValueError, BaseException):\n    pass"},
        "a.py:3",
    ),
    "suppress": (
        find_silent_excepts,
        {"models/a.py": "with contextlib.suppress(Exception):\n    f()"},
        "a.py:1",
    ),
}
INNOCENT = {
    "reelpool/__init__.py": "__version__ = '1'\nfrom reelpool.scheduler.job import Job",
    "reelpool/errors.py": "from typing import Any",
    "reelpool/cli/__init__.py": "from reelpool.cli.app import main",
    "reelpool/cli/app.py": "from reelpool.scheduler import job\nfrom reelpool import __version__",
    "reelpool/__main__.py": "from reelpool.cli import main",
    "models/__init__.py": "",
    "models/text.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from transformers import PreTrainedTokenizer\n"
        "def load():\n    import transformers\n"
    ),
    "runtime/device.py": "import pynvml\nfrom ..models.text import load\nfrom . import wire",
    "runtime/wire.py": (
        "from typing import TYPE_CHECKING\n"
        "from reelpool import __version__\n"
        "from reelpool.errors import WireFormatError\n"
        "if TYPE_CHECKING:\n    from .device import Card\n"
    ),
    "scheduler/job.py": "from ..runtime import wire\nfrom ..models import text",
    "scheduler/worker.py": (
        "import ray\n"
        "try:\n    f()\nexcept Exception:  # the outermost frame: it re-raises\n    raise\n"
        "try:\n    f()\n# whatever a foreign plugin throws\nexcept BaseException:\n    raise\n"
        "try:\n    f()\nexcept ValueError:\n    raise\n"
    ),
}


def plant(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", BREACHES)
def test_planted_breach_is_found(case, tmp_path):
    check, files, expected = BREACHES[case]
    plant(tmp_path, files)
    found = check(read_sources(tmp_path, ("reelpool", *FOLDERS, *SCRIPTS)))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_innocent_tree_passes(check, tmp_path):
    plant(tmp_path, INNOCENT)
    assert check(product(tmp_path)) == []
