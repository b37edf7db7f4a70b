"""The HTTP server: OpenAI-style requests go in, token ids go to the engine, text comes out.

fields.py, requests.py, output_requests.py   what requests look like, and how they become `SamplingParams`
answers.py                                   what answers look like
prompts.py                                   texts and conversations -> token ids
streaming.py, chat.py, logprobs.py           outputs of a request -> answers, whole or as server-sent events
answer_reader.py, answer_parts.py,
tool_calls.py, json_scanner.py               a chat answer's text -> thoughts, text, calls of tools
routes.py, app.py                            the routes that run the model, and all the others
failures.py, limits.py, access.py             everything that is not a success; what is too large; who has no key
metrics.py, status.py, logs.py,
tracing.py, request_trace.py                 what operators watch
in_process.py                                the app without a socket, for replicas
options.py, run.py, served.py                 how the server listens, runs and ends; what the routes work with
"""
