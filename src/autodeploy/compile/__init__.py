"""Lowered graph -> Program.

program.py   Program and its named graphs: the only thing the runtime sees
bind.py      op nodes -> the chosen providers' functions
eager.py     torch-simple: the graph as it is
replay.py    replay: small steps are written down once and repeated as one call
inductor.py  torch-compile: the graph through Inductor
"""
