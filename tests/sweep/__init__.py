"""The sweep: every architecture that transformers maps to a causal language model, through every stage, to one verdict.

architectures.py  transformers' table -> configs as checkpoints have them, and the rules for what is no decoder
stages.py         one architecture -> what each stage found
reference.py      what transformers itself computes and generates
runner.py         many architectures -> a process each, bounded in time and memory, resumable
page.py           results -> docs/supported-models.md, and what was gained or lost against the pinned list
"""
