"""Suites nobody here wrote, behind one interface: `run(setting)` asks a running server and returns what came of it.

setting.py            what a suite is given, and how its command is run
lm_eval.py tasks/     lm-evaluation-harness on local tasks, beside its own backend on the same weights
schemas.py schema_client.py       published JSON schemas through guided decoding, answers checked by `jsonschema`
loads.py              load generators: guidellm, aiperf, `vllm bench serve`
"""
