"""Measurements of a deployed model: a model and a load in; rates, shares of the machine's limits and JSON out.

machine.py     what this machine can do at most: memory read rate, matrix rate
latency.py     one request at a time: time to first token, time per output token
throughput.py  many requests at once: requests and tokens per second
profile/       where a step's time goes: a trace, and a table of ops against the limits
record.py      a result with everything needed to read it later: versions, machine, options, raw samples
"""
