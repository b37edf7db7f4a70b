"""The HTTP server: OpenAI-style requests go in, token ids go to the engine, text comes out.

protocol.py    what requests and answers look like, and how a request becomes `SamplingParams`
streaming.py   outputs of a request -> answers, whole or as server-sent events
app.py         routes, errors, limits, metrics
"""
