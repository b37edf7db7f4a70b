"""Patches to a model's own functions: the last resort, for upstream code that no hook, op or transform can reach.

There is none at the moment. The rules for adding one:

- One file per obstacle, named after what is in the way and not after a model. A hook on a Hugging Face interface comes
  first, then a graph transform, then a patch.
- Its docstring says why (what fails, with the error), for which versions of transformers or torch, the upstream issue,
  and when the file can go.
- It is reversible: a context manager around capture that leaves the model's code as it found it.
- It keeps the numbers: its test compares the patched function with the original.
- The repository's tests count the files here; the count is meant to fall.
"""
