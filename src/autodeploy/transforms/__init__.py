"""Captured graph -> canonical -> cached -> lowered. `pipeline.py` is the one page with the order of things.

canonicalize/  one node per token mixer, norm, rotary, linear; masks become facts
fuse/          QKV, gate-up, add + norm; graph and weight recipes change together
cache/         every token mixer becomes its twin over state; logits only where wanted
lower/         device and kernel provider for every op
"""
