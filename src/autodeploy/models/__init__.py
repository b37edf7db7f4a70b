"""What Hugging Face gives us; no model definitions live here.

- `locate.py`: folder, GGUF file or hub id -> folder, weight files, stored config; needs no transformers
- `resolve.py`: where a model lies -> Hugging Face config, dtype, limits
- `limits.py`: the context a model was made for, and the one wanted
- `config_overrides.py`: config and `model_kwargs` -> changed config
- `instantiate.py`: config -> nn.Module with parameters on the meta device
- `patches/`: upstream obstacles, one file each, meant to go
"""
