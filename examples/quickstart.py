"""Generate text for a few prompts with any model: `python examples/quickstart.py MODEL`."""

import sys

from autodeploy import LLM, SamplingParams


def main(model: str) -> None:
    """Print a continuation of each prompt and what the build rewrote."""
    prompts = ["The sky is blue because", "Three uses of a paper clip:"]
    with LLM(model) as llm:
        for output in llm.generate(prompts, SamplingParams(max_tokens=32, temperature=0.0)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
        print(llm.report.rewrites())


if __name__ == "__main__":
    main(sys.argv[1])
