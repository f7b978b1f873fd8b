# SPDX-License-Identifier: Apache-2.0
"""The one place that decides whether the network may be asked, so that a machine without one fails at once."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

from adaptclip.errors import AdaptclipError, BackboneError

PROBE_TIMEOUT_S = 2.5
"""Longest wait for a host to answer, name look-up included; download libraries retry for about ten times that."""


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE was switched on, when the program started or since."""
    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def require_hub(what: str, *, error: type[AdaptclipError] = BackboneError) -> None:
    """Returns if the Hugging Face hub (HF_ENDPOINT) can be asked for `what`.

    Args:
        what: what is wanted, as the subject of the message, for example `The weights "openai" of ViT-B-16`.
        error: the kind of error to raise.

    Raises:
        AdaptclipError: of kind `error`, within three seconds: offline mode is on, or the hub does not answer.
    """
    obstacle = _obstacle()
    if obstacle is not None:
        raise error(
            f"{what}: not on this machine, and it cannot be downloaded because {obstacle}. Use a local copy "
            "(`--data-root FOLDER` for images; `--backbone local-dir:FOLDER` or a checkpoint file for a model), or "
            "start with what needs no download: `--card digits --backbone starter`."
        )


@contextlib.contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Inside the block, the hub's libraries read their cache only, without retries, if the hub cannot be reached."""
    before = constants.HF_HUB_OFFLINE
    # The libraries look this constant up at every request; their own arguments do not reach through open_clip.
    constants.HF_HUB_OFFLINE = _obstacle() is not None
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _obstacle() -> str | None:
    """Returns None if the hub can be asked, else the reason in words."""
    if is_offline():
        return "offline mode is on (unset HF_HUB_OFFLINE to download)"
    parts = urlsplit(constants.ENDPOINT)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    # Behind a proxy a direct connection says nothing about whether the download would work.
    if getproxies().keys() & {parts.scheme, "all"} and not proxy_bypass(host):
        return None
    reason = _probe(host, port)
    return None if reason is None else f"{host}:{port} does not answer ({reason})"


def _probe(host: str, port: int) -> str | None:
    """Returns None if the port accepts a connection within PROBE_TIMEOUT_S, else the reason in words."""
    outcome: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
            outcome.append(None)
        except OSError as reason:
            outcome.append(str(reason))

    # A thread, because neither the name look-up nor a list of addresses obeys the timeout of a socket.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return outcome[0] if outcome else f"nothing within {PROBE_TIMEOUT_S:g} s"
