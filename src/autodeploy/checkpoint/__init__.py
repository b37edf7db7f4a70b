"""Weights, from files to final tensors, read once: index (what is where), recipe (what to make of it), load.

- `files.py`: safetensors and pickle files: names, shapes and lazily read tensors
- `index.py`: the files seen through the module's own names; also live modules and made-up weights, read the same way
- `recipe.py`: how one final tensor is made from named ones: slice, concat, cast, transpose
- `load.py`: all recipes into final tensors on their device, within the memory there is
- `gguf.py`: a GGUF file turned, once, into a checkpoint folder
"""
