"""Limits: the longest context a model was made for and the one wanted go in, the one it gets comes out."""

from autodeploy.errors import ConfigError


def longest_context(made_for: int | None, wanted: int | None) -> int | None:
    """Longest context in tokens: what is wanted, else what the model was made for; None when neither says.

    Raises:
        ConfigError: more is wanted than the model was made for.
    """
    if wanted is None or made_for is None:
        return wanted or made_for
    if wanted > made_for:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {made_for} tokens this model was made for; lower it, or set "
            "the rope scaling you want through model_kwargs"
        )
    return wanted
