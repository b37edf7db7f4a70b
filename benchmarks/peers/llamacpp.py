"""llama.cpp as a peer, through the C interface that llama-cpp-python exposes; a GGUF file is the model.

One request has a context of its own; several share one, filled anew at each step with what every request has waiting:
a driver in Python over `llama_decode`, so its rate for many requests is a lower bound.
"""

from collections.abc import Callable
from typing import Any

import llama_cpp as ll
import numpy as np
from worker import serve

MAX_BATCH_TOKENS = 2048


class LlamaCpp:
    """A model and, one at a time, the context that the last kind of load needed."""

    def __init__(self, job: dict[str, Any]) -> None:
        ll.llama_backend_init()
        self.threads = job["threads"]
        self.model = ll.llama_model_load_from_file(job["model"].encode(), ll.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {job['model']}")
        self.vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.shape: tuple[int, int] | None = None
        self.context: Any = None
        self._use_context(1, 4096)

    def _use_context(self, sequences: int, tokens_each: int) -> None:
        if self.shape == (sequences, tokens_each):
            return
        if self.context:
            ll.llama_free(self.context)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * tokens_each, sequences
        params.n_batch = MAX_BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        self.context, self.shape = ll.llama_init_from_model(self.model, params), (sequences, tokens_each)

    def generate(self, prompts: list[list[int]], lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        self._use_context(*((1, 4096) if len(prompts) == 1 else (len(prompts), 1024)))
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        waiting = [list(prompt) for prompt in prompts]
        positions, left = [0] * len(prompts), list(lengths)
        batch = ll.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        while any(left):
            batch.n_tokens = 0
            rows = {}
            for index in sorted(range(len(prompts)), key=lambda index: len(waiting[index])):  # decoding first
                room = MAX_BATCH_TOKENS - batch.n_tokens
                now, waiting[index] = waiting[index][:room], waiting[index][room:]
                for token in now:
                    self._add(batch, token, positions[index], index)
                    positions[index] += 1
                if now and not waiting[index]:
                    rows[index] = batch.n_tokens - 1
                    batch.logits[rows[index]] = 1
            if status := ll.llama_decode(self.context, batch):
                raise RuntimeError(f"llama_decode answered {status}")
            for index, row in rows.items():
                logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, row), (self.vocab_size,))
                token = int(logits.argmax())
                emit(index, [token])
                left[index] -= 1
                waiting[index] = [token] if left[index] else []
        ll.llama_batch_free(batch)

    def score(self, tokens: list[int]) -> list[tuple[float, int]]:
        self._use_context(1, 4096)
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)
        batch = ll.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = 0
        for position, token in enumerate(tokens):
            self._add(batch, token, position, 0)
            batch.logits[position] = 1
        if status := ll.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode answered {status}")
        scores = []
        for row, token in enumerate(tokens[1:]):
            logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(self.context, row), (self.vocab_size,))
            wide = logits.astype(np.float64)
            total = wide.max() + np.log(np.exp(wide - wide.max()).sum())
            scores.append((float(wide[token] - total), int(wide.argmax())))
        ll.llama_batch_free(batch)
        return scores

    @staticmethod
    def _add(batch: Any, token: int, position: int, sequence: int) -> None:
        slot = batch.n_tokens
        batch.token[slot], batch.pos[slot], batch.logits[slot] = token, position, 0
        batch.n_seq_id[slot], batch.seq_id[slot][0] = 1, sequence
        batch.n_tokens += 1

    def facts(self) -> dict[str, str]:
        return {"system": ll.llama_print_system_info().decode()}


if __name__ == "__main__":
    serve(LlamaCpp)
