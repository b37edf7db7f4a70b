"""Overriding a model's config: a config and the user's `model_kwargs` go in, the changed config comes out."""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from autodeploy.errors import ConfigError


def apply_overrides(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A new config with fields replaced; parts of a composite config take a mapping of their own.

    A smaller `num_hidden_layers` also shortens lists that have one entry per layer, unless they are given too.

    Raises:
        ConfigError: a field that the config does not have (with the nearest), or a value it refuses.
    """
    if not overrides:
        return config
    values = _overridden(config, overrides, where="")
    try:
        return type(config).from_dict(values)
    except Exception as error:  # each config class validates in its own way
        given = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        raise ConfigError(f"model_kwargs {given} do not make a valid {config.model_type} config: {error}") from error


def _overridden(config: PreTrainedConfig, overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = config.to_dict()
    renamed = {config.attribute_map.get(name, name): value for name, value in overrides.items()}
    for name, value in renamed.items():
        if name not in values:
            raise ConfigError(_unknown_field(config, name, where))
        if isinstance(value, Mapping) and name in config.sub_configs:
            values[name] = _overridden(getattr(config, name), value, where=f"{where}{name}.")
        else:
            values[name] = value
    layers_before, layers = config.to_dict().get("num_hidden_layers"), values.get("num_hidden_layers")
    if isinstance(layers_before, int) and isinstance(layers, int) and layers < layers_before:
        for name, value in values.items():
            if name not in renamed and isinstance(value, list) and len(value) == layers_before:
                values[name] = value[:layers]
    return values


def _unknown_field(config: PreTrainedConfig, name: str, where: str) -> str:
    values = config.to_dict()
    for part in config.sub_configs:
        if name in (values.get(part) or {}):
            return f"model_kwargs: {name!r} is a field of {part}; write {{{part!r}: {{{name!r}: ...}}}}"
    nearest = difflib.get_close_matches(name, [*values, *config.attribute_map], n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"model_kwargs: a {config.model_type} config has no field {where + name!r}{hint}"
