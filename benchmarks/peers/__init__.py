"""Peers: what `benchmarks/peers.py` and `servers.py` compare AutoDeploy with, each behind the same few lines of JSON.

conditions.py     how busy the machine is, and its limits
rounds.py         the turns of peers, and the samples they leave
summary.py bars.py       medians, ratios and shares of a record; bars as SVG
records.py        the record that a comparison leaves
process.py        a peer's process as the benchmark sees it: launched, asked, held still, ended
http_servers.py http_load.py workloads.py        servers: which there are, the client that loads them, what it asks
servers_page.py   their part of docs/performance.md
worker.py         the same process from inside: requests in, tokens and their times out
ours.py hf.py llamacpp.py genai.py vllmcpu.py    one peer each: how it loads a model and generates greedily
subjects.py       which peers there are, the environment each runs in, at which precisions, on which models
environments.py   makes those environments, with pip
models.py         the models, written once as checkpoint folders
vllm_cli.py       vLLM's own command line, made to start
files.py llamacpp_convert.py genai_convert.py vllm_convert.py      a checkpoint folder in, the peer's own files out
"""
