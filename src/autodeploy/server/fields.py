"""What all parts of a request have in common: no field is ignored. Unknown and unsupported ones are refused by name."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from autodeploy.errors import InvalidRequestError

UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": (),
    "ec_transfer_params": (),
    "function_call": ("none",),
    "functions": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "logprob_token_ids": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (),
    "return_token_offsets": (),
    "service_tier": ("auto", "default"),
    "session_id": (),
    "spaces_between_special_tokens": (True,),
    "store": (),
    "stream_interval": (1,),
    "suffix": (),
    "thinking_token_budget": (),
    "truncation_side": (),
    "use_beam_search": (),
    "verbosity": (),
    "vllm_xargs": (),
    "watermarking": (),
    "web_search_options": (),
}
"""Fields of OpenAI's and vLLM's APIs that are not supported, and values that ask for nothing beside null and empty."""

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


class StrictModel(BaseModel):
    """A part of a request: no unknown fields, no silent conversion of types. A null is a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name: field for name, field in cls.model_fields.items()}
        kept = {}
        for name, value in values.items():
            if name not in known:
                if not _asks_for_nothing(name, value):
                    raise _refusal(name, sorted(known))
            elif value is not None or known[name].is_required():
                kept[name] = value
        return kept


def _asks_for_nothing(name: str, value: Any) -> bool:
    neutral = UNSUPPORTED_FIELDS.get(name)
    # Equality alone would take 0 for False and 1 for True.
    return neutral is not None and any(
        value == known and isinstance(value, bool) == isinstance(known, bool) for known in (*neutral, *_EMPTY)
    )


def _refusal(name: str, known: list[str]) -> InvalidRequestError:
    if name in UNSUPPORTED_FIELDS:
        return InvalidRequestError(f"the field {name!r} is not supported with this value; leave it out", name)
    nearest = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(known)}"
    return InvalidRequestError(f"unknown field {name[:100]!r}; {hint}", name[:100])
