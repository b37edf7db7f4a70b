"""What tests of the FlashInfer provider get: a stand-in for the package, and the op table as before afterwards."""

import sys
from collections.abc import Iterator

import pytest

from autodeploy.kernels import flashinfer as provider
from autodeploy.ops import OPS
from tests.kernels.flashinfer import fake


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.Recorded]:
    """FlashInfer's kernels registered over the stand-in, and what that writes down."""
    module, found = fake.module()
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(provider, "why_unavailable", lambda: None)
    names = [f"{provider.__name__}.{name}" for name in ("attention", "norm")]
    for name in names:
        sys.modules.pop(name, None)
    provider.load.cache_clear()
    yield found
    provider.load.cache_clear()
    for name in names:
        sys.modules.pop(name, None)
    for op in OPS.values():
        op.kernels.pop(provider.PROVIDER, None)
