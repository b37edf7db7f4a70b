"""The token engine: a `Program` and requests as token ids go in, sampled token ids come out.

One step reads the files in this order:

    request.py     what is asked for (`SamplingParams`), what is in flight (`Sequence`), what comes out (`TokenOutput`)
    scheduler.py   which sequences run next, and how many of their tokens (no torch)
    pages.py       which pages and slot a sequence owns (no torch)
    states.py      how much memory the states get, and their tensors
    batch.py       scheduled sequences -> the batch inputs of one packed row
    sampler.py     logits -> tokens
    flight.py      a batch on the device: run, and choose tokens
    engine.py      schedule -> batch -> run -> sample -> commit
    demo.py        the same interface as a naive loop, one request at a time: the readable reference

Text enters and leaves one layer above (`tokenizer.py`); `async_engine.py` puts the engine on a thread of its own.
"""
