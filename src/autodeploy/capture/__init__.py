"""nn.Module -> captured graph.

export.py  trace a model over one packed row of tokens, no weight materialised
hooks.py   Hugging Face's own interfaces (attention, masks, cache) -> captured ops, and what was seen on the way
experts.py Hugging Face's experts interface -> canonical ops over stacked weights
expert_blocks.py   loops over experts outside the interface, known by recordings of two runs -> canonical ops
expert_weights.py  which of a module's parameters are experts; random_weights.py  what recordings run on; tape.py  them
probe.py   norms and rotary functions recognised by their numbers -> canonical ops
gated_norms.py  norms of a tensor and a gate, by their numbers -> canonical ops
mixers.py  convolutions, scans and delta rules recognised by their numbers -> canonical ops
matrix_memory.py   the same for modules that are an xLSTM's memory
loops.py   loops over tokens -> a few runs of their body, marked in the graph
"""
