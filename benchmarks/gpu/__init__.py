"""What `benchmarks/gpu.py` is made of: our side and transformers' at real dimensions, each in processes of its own.

models.py       an entry of seed_models.yaml -> what to build, with random weights
ours.py         a built model -> the figures of one process
theirs.py       transformers on the same config
worker.py       the process: a job in, a line of JSON per figure out
jobs.py         which processes there are to run, and running one
targets.py      a record -> the figures asked for, beside their targets
"""
