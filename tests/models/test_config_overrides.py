import pytest
from transformers import Gemma3Config, Gemma3TextConfig, GPT2Config, LlamaConfig

from autodeploy.errors import ConfigError
from autodeploy.models.config_overrides import apply_overrides


def test_fields_are_replaced_in_a_copy() -> None:
    config = LlamaConfig(num_hidden_layers=4)
    changed = apply_overrides(
        config, {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    )
    assert (changed.num_hidden_layers, changed.rope_parameters["rope_theta"]) == (2, 5.0)
    assert config.num_hidden_layers == 4
    assert apply_overrides(config, {}) is config


def test_the_usual_name_works_where_the_config_has_another() -> None:
    assert apply_overrides(GPT2Config(n_layer=12), {"num_hidden_layers": 3}).n_layer == 3


def test_fewer_layers_shorten_lists_with_one_entry_per_layer() -> None:
    config = Gemma3TextConfig(num_hidden_layers=8)
    assert len(config.layer_types) == 8
    assert apply_overrides(config, {"num_hidden_layers": 3}).layer_types == config.layer_types[:3]
    given = ["full_attention"] * 2
    assert apply_overrides(config, {"num_hidden_layers": 2, "layer_types": given}).layer_types == given


def test_parts_of_a_composite_config() -> None:
    config = Gemma3Config()
    changed = apply_overrides(config, {"text_config": {"num_hidden_layers": 2}})
    assert changed.text_config.num_hidden_layers == 2
    assert changed.text_config.hidden_size == config.text_config.hidden_size
    with pytest.raises(ConfigError, match="'num_hidden_layers' is a field of text_config"):
        apply_overrides(config, {"num_hidden_layers": 2})
    with pytest.raises(ConfigError, match=r"'text_config\.num_layerz'; did you mean"):
        apply_overrides(config, {"text_config": {"num_layerz": 2}})


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"llama config has no field 'num_hiden_layers'; did you mean 'num_hidden_layers'"
    ):
        apply_overrides(LlamaConfig(), {"num_hiden_layers": 2})
    with pytest.raises(ConfigError, match=r"no field 'xyzzy'$"):
        apply_overrides(LlamaConfig(), {"xyzzy": 2})


def test_a_value_that_the_config_refuses() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers='two'"):
        apply_overrides(LlamaConfig(), {"num_hidden_layers": "two"})
