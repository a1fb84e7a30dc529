"""Decides whether a rollout server takes policies, as it is created, before vLLM's modules or the routes are loaded."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from ...common.log import warning
from ...common.settings import Settings
from ...errors import SettingsError
from ...install import releases
from ..wire import PREFIX

TAKES_POLICIES = "SWIFT_LORA_FIX_TAKES_POLICIES"  # in the environment, to tell the server's workers
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def install(server: Any) -> None:
    """Add the routes to a ``SwiftRolloutDeploy`` that is being created; one without LoRA layers is left unchanged.

    Raises SettingsError instead when SWIFT_LORA_FIX_TRANSPORT=reload asks for them.
    """
    is_reload = Settings.from_environment().transport == "reload"
    if not server.args.vllm_enable_lora:
        problem = (
            "policies need LoRA layers in the rollout server: start `swift rollout` with --vllm_enable_lora true (and "
            "--vllm_max_lora_rank as large as the adapter's rank)."
        )
        if is_reload:
            raise SettingsError(problem)
        warning(f"stepping aside, ms-swift's rollout server runs as it is: {problem}")
        return
    from .guard import Guard
    from .routes import Policies

    policies = Policies(server, is_reload)
    policies.install(server.app)
    server.app.add_middleware(Guard, policies=policies)
    os.environ[TAKES_POLICIES] = "1"
    _keep_port(server.args, sys.argv)
    _warn_if_open(server)


def takes_policies() -> bool:
    """In a server's worker: whether its server takes policies."""
    return os.environ.get(TAKES_POLICIES) == "1"


def _keep_port(args: Any, command: Sequence[str]) -> None:
    """Keep a restarted server on the port where its trainer looks for it. While connections of the old server linger,
    ms-swift silently takes the next port (``find_free_port`` binds without SO_REUSEADDR, uvicorn binds with it)."""
    given = [value for name, value in zip(command, command[1:]) if name == "--port"]
    given += [word.removeprefix("--port=") for word in command if word.startswith("--port=")]
    asked = given[-1] if given else ""
    if not asked.isdecimal() or int(asked) in (0, args.port):
        return
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, int(asked)))
        except OSError as error:
            warning(f"port {asked} is taken ({error}): this rollout server listens on {args.port} instead.")
            return
    args.port = int(asked)


def _warn_if_open(server: Any) -> None:
    args, ignores_key = server.args, not hasattr(server, "_require_api_key")
    if not args.api_key and args.host not in _LOOPBACK:
        warning(
            f"the rollout server listens on {args.host}:{args.port} without --api_key: whoever reaches this port can "
            "replace the policy. Set --api_key, or --host 127.0.0.1."
        )
    elif args.api_key and ignores_key:
        warning(
            f"--api_key guards the routes below {PREFIX}; ms-swift {releases.installed_swift()} ignores it "
            "for its own (rollouts among them), which anyone who reaches this port can call."
        )
