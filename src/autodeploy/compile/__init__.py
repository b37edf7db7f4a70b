"""Lowered graph -> Program.

program.py        Program and its named graphs: the only thing the runtime sees
backends.py       a backend by its name
bind.py           op nodes -> the chosen providers' functions
observe.py        what notices that a step looks at values
eager.py          torch-simple: the graph as it is
replay.py         replay: small steps are written down once and repeated as one call
inductor.py       torch-compile: the graph, or a region of it, through Inductor

cuda_graph.py     torch-cudagraph, torch-opt: steps of a few sizes are captured and repeated
capture_sizes.py  which sizes
segments.py       a graph -> regions that can be captured by tokens, and the calls between them
static_batch.py   a batch -> the same batch, padded, at fixed addresses
whole_graphs.py   steps of one token per sequence, each one graph
graphed_choice.py tokens chosen in those graphs
streams.py        marked branches -> calls on a second stream
piecewise.py      other steps, a graph for each region
capture.py        Capture: who records work and repeats it; CUDA's
"""
