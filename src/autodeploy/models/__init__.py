"""What Hugging Face gives us; no model definitions live here.

- `resolve.py`: folder, GGUF file or hub id -> config, weight files, dtype, limits
- `config_overrides.py`: config and `model_kwargs` -> changed config
- `instantiate.py`: config -> nn.Module with parameters on the meta device
- `patches/`: upstream obstacles, one file each, meant to go
"""
