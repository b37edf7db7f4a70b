"""What an engine counts, for metrics and tests."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters and gauges.

    Attributes:
        num_running, num_waiting: sequences now.
        num_preemptions: since the start.
        state_usage_fraction: share of pages (or slots) in use, of the fullest group.
        num_steps, prompt_tokens, generation_tokens: since the start; a prompt counts once, when its first token is out.
        num_overlapped_steps: of those steps, how many were scheduled before the tokens of the one before were read.
        prefix_cache_queried_tokens, prefix_cache_hit_tokens: tokens of prompts that started since the start, and how
            many of them were found in the prefix cache; one that starts again after a preemption is not counted again.
        num_drafts, draft_tokens, accepted_tokens: since the start, how often drafts were verified, how many tokens they
            had, and how many of those became tokens of the sequence; see `acceptance_length`.
        last_step_host_seconds: scheduling, building the batch and committing, in the last step.
        last_step_model_seconds: running the model and sampling, or waiting for either, in the last step.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    state_usage_fraction: float = 0.0
    num_steps: int = 0
    num_overlapped_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queried_tokens: int = 0
    prefix_cache_hit_tokens: int = 0
    num_drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    last_step_host_seconds: float = 0.0
    last_step_model_seconds: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Mean tokens that a verification yields: the accepted drafts and the token behind them."""
        return 1 + self.accepted_tokens / self.num_drafts if self.num_drafts else 1.0
