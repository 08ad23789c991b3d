"""reelpool: several small cards act as one video generator.

The three packages `models`, `runtime` and `scheduler` lie beside this folder in a checkout and
inside it in an installed wheel; either way they are imported as `reelpool.models` and so on.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["__version__"]

_HERE = _Path(__file__).resolve().parent
if not (_HERE / "runtime").is_dir():  # source checkout: the three packages lie beside this folder
    __path__.append(str(_HERE.parent))
