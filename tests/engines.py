"""What tests do with an engine: prompts go in, the tokens it generates come out."""

from collections.abc import Iterable, Sequence

from autodeploy.runtime.demo import DemoEngine
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams


def generated(engine: Engine | DemoEngine, prompts: Iterable[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """Add one request per prompt, all at once, and run the engine to the end; the tokens of each, in order."""
    tokens: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
        tokens[str(index)] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return list(tokens.values())
