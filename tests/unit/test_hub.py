# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import constants

from adaptclip import hub
from adaptclip.errors import BackboneError, DataError


@pytest.fixture
def online(monkeypatch):
    """Offline mode off and no proxy; the endpoint is then the test's own choice."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_offline_mode_is_refused_at_once_and_says_what_to_do(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(BackboneError) as caught:
        hub.require_hub("The weights 'openai' of ViT-B-16")
    assert time.monotonic() - start < 0.5
    message = str(caught.value)
    for part in ("The weights 'openai' of ViT-B-16", "HF_HUB_OFFLINE", "local-dir:", "--data-root", "--card digits"):
        assert part in message


def test_offline_variable_set_after_the_import_counts(online):
    assert not hub.is_offline()
    online.setenv("HF_HUB_OFFLINE", "true")
    assert hub.is_offline()


def test_error_kind_is_the_callers_choice(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="The images of eurosat"):
        hub.require_hub("The images of eurosat", error=DataError)


def test_a_host_that_answers_is_enough(online, listening):
    online.setattr(constants, "ENDPOINT", listening)
    hub.require_hub("anything")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{port}", "https://hub.invalid"])
def test_a_host_that_does_not_answer_is_an_error_at_once(online, endpoint):
    online.setattr(constants, "ENDPOINT", endpoint.format(port=_free_port()))
    start = time.monotonic()
    with pytest.raises(BackboneError, match="does not answer"):
        hub.require_hub("The model")
    assert time.monotonic() - start < 3


def test_a_silent_network_is_given_up_within_three_seconds(online):
    online.setattr(constants, "ENDPOINT", "https://hub.invalid")

    def hang(*args, **kwargs):
        time.sleep(20)
        raise TimeoutError("given up long ago")

    online.setattr(socket, "create_connection", hang)
    start = time.monotonic()
    with pytest.raises(BackboneError, match="nothing within"):
        hub.require_hub("The model")
    assert time.monotonic() - start < 3


def test_behind_a_proxy_nothing_is_probed(online):
    online.setattr(constants, "ENDPOINT", "https://hub.invalid")
    online.setenv("https_proxy", "http://proxy.invalid:3128")
    hub.require_hub("anything")
    online.setenv("no_proxy", "hub.invalid")
    with pytest.raises(BackboneError):
        hub.require_hub("anything")


def test_cache_only_inside_the_block_when_the_hub_is_silent(online, listening):
    online.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with hub.cache_if_unreachable():
        assert constants.is_offline_mode()
    assert not constants.is_offline_mode()
    online.setattr(constants, "ENDPOINT", listening)
    with hub.cache_if_unreachable():
        assert not constants.is_offline_mode()


def test_offline_switch_is_put_back_after_an_error(online):
    online.setattr(constants, "ENDPOINT", "https://hub.invalid")
    with pytest.raises(RuntimeError), hub.cache_if_unreachable():
        raise RuntimeError
    assert not constants.HF_HUB_OFFLINE
