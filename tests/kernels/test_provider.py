"""Providers: the order they are asked in, attention backends by name, and what is said while they compile."""

from importlib.metadata import PackageNotFoundError

import pytest
import torch

from autodeploy.errors import ConfigError
from autodeploy.kernels import provider

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_priority_by_device() -> None:
    assert provider.priority(CPU) == ("cpu",)
    assert provider.priority(CUDA) == ("triton",)


def test_attention_backends() -> None:
    assert provider.mixer_priority(CPU, "auto") == ("cpu",)
    assert provider.mixer_priority(CPU, "cpu") == ("cpu",)
    assert provider.mixer_priority(CPU, "torch") == ()


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_an_unknown_attention_backend_is_refused_with_what_there_is(device: torch.device) -> None:
    with pytest.raises(ConfigError, match=rf"'flashy' is not available on {device.type}; choose one of auto, .*torch"):
        provider.mixer_priority(device, "flashy")


def test_flashinfer_is_asked_first_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[bool] = []
    monkeypatch.setattr(provider.flashinfer, "why_unavailable", lambda: None)
    monkeypatch.setattr(provider.flashinfer, "load", lambda: loaded.append(True))
    assert provider.mixer_priority(CUDA, "auto") == ("triton",) and not loaded
    assert provider.mixer_priority(CUDA, "flashinfer") == ("flashinfer", "triton") and loaded


@pytest.mark.parametrize("found", [None, "0.2.14"])
def test_flashinfer_that_cannot_be_used_is_refused_with_the_reason(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(provider.flashinfer, "version", version)
    reason = "not installed; install autodeploy" if found is None else "0.2.14 is installed; 0.7 or newer is needed"
    with pytest.raises(ConfigError, match=f"attn_backend='flashinfer' cannot be used: .*{reason}"):
        provider.mixer_priority(CUDA, "flashinfer")


def test_a_backend_of_another_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cpu' is not available on cuda"):
        provider.mixer_priority(CUDA, "cpu")


def test_compiling_is_announced_once() -> None:
    said: list[str] = []
    provider.prepare(CPU, said.append)
    provider.prepare(CPU, said.append)
    assert len(said) <= 1
    assert all("compiling" in line for line in said)


def test_a_provider_that_cannot_be_used_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(provider.triton, "why_unavailable", lambda: "torch finds no CUDA device")
    assert provider.unavailable(CUDA) == {"triton": "torch finds no CUDA device"}
    provider.prepare(CUDA, said.append)
    assert said == ["no triton kernels, the reference functions run: torch finds no CUDA device"]


def test_other_devices_compile_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider.cpu, "why_unavailable", lambda: pytest.fail("asked for the CPU kernels"))
    monkeypatch.setattr(provider.triton, "why_unavailable", lambda: None)
    provider.prepare(CUDA, pytest.fail)
