"""Ray's switches that are environment variables. Must be set before Ray is imported."""

from __future__ import annotations

import os
import secrets


def set_ray_environment() -> None:
    """Set what is not set already: a token for a pool of this machine, fewer idle processes.

    Ray listens on every interface, whatever address it is given (seen with ss, Ray 2.60), and
    whoever reaches it can run code here, so a pool of this machine gets a token of its own. Without
    a set mode Ray would write one into the home folder, and every later `ray start` would want it.
    """
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # no idle workers: 544 MB instead of 700 for all of Ray's processes
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # an actor that asks for no GPU still sees its card: cards are our own resource
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
