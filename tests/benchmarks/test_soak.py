"""The soak: a minute of it with real weights; its judgement of answers that are not whole."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Script = Callable[[str], Any]


@pytest.mark.slow
@pytest.mark.real_model
def test_a_minute_of_it(script: Script, smollm2: Path, tmp_path: Path) -> None:
    arguments = [str(smollm2), "--seconds", "60", "--prompts", "20", "--max-tokens", "8", "--output", str(tmp_path)]
    assert script("soak").main(arguments) == 0
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text())["results"]
    assert results["answers"] >= results["clients"] == 500 and len(results["memory_bytes"]) > 10


def _chunk(text: str, token: int, *margin: float) -> str:
    top = {f"t{at}": value for at, value in enumerate(margin)}
    return "data: " + json.dumps(
        {"choices": [{"text": text, "token_ids": [token], "logprobs": {"top_logprobs": [top]}}]}
    )


WHOLE = [_chunk("a", 1, -0.1, -2.0), _chunk("b", 2, -1.5, -1.0), "data: [DONE]"]


@pytest.mark.parametrize(
    "lines",
    [
        WHOLE[:2],
        [WHOLE[0], WHOLE[2]],
        [*WHOLE, WHOLE[0]],
        [WHOLE[0], *WHOLE],
        ["event: error", *WHOLE],
    ],
    ids=["cut off", "too short", "goes on", "doubled", "another line"],
)
def test_an_answer_that_is_not_whole_is_lost(script: Script, lines: list[str]) -> None:
    answer = script("soak").answer

    async def ask(lines: list[str]) -> Any:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, text="\n\n".join(lines)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await answer(client, "x", 2)

    with pytest.raises(ValueError, match=r"tokens instead|does not belong"):
        asyncio.run(ask(lines))
    assert asyncio.run(ask(WHOLE)) == {"text": "ab", "token_ids": [1, 2], "margin": 0.5}
