"""The HTTP server: OpenAI-style requests go in, token ids go to the engine, text comes out.

fields.py, requests.py, answers.py    what requests and answers look like, and how a request becomes `SamplingParams`
prompts.py, logprobs.py, streaming.py text to tokens; outputs of a request -> answers, whole or as server-sent events
routes.py, app.py                     the routes that run the model, and all the others
failures.py, limits.py, metrics.py    everything that is not a success; what is too large; Prometheus
served.py                             what the routes work with
"""
