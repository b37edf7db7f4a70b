"""Fit a draft head to a model, on what the model itself goes on to say, and draft with it.

    python examples/fit_draft_head.py MODEL [FOLDER [STEPS]]

MODEL is a checkpoint folder. With FOLDER the head is kept there, for
`speculative_config={"method": "eagle", "model": FOLDER}`.
"""

import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from autodeploy import LLM, SamplingParams
from autodeploy.models.draft_head import DraftHead

LENGTH = 96
"""tokens of a text, prompt and continuation"""


def new_head(model: PreTrainedModel) -> DraftHead:
    """One untrained layer like the model's own, without its first and last norm."""
    config = AutoConfig.for_model(**model.config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    body = type(model)(config).base_model
    body.layers[0].input_layernorm = nn.Identity()
    head = DraftHead(body, config.hidden_size, has_norms=False, has_bias=False)
    head.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
    return head.float()


def continued_texts(folder: str, count: int) -> Tensor:
    """Token ids `[count, LENGTH]`: beginnings of Python's own documentation, continued by the model."""
    with LLM(folder) as llm:
        starts = [llm.get_tokenizer()(text).input_ids[: LENGTH // 6] for text in list(topics.values())[:count]]
        params = SamplingParams(temperature=0.7, seed=0, max_tokens=LENGTH, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": start} for start in starts], params, use_tqdm=False)
    texts = [[*output.prompt_token_ids, *output.outputs[0].token_ids][:LENGTH] for output in outputs]
    return torch.tensor(texts)


def fit_head(folder: str, output: Path, *, steps: int, texts: int = 64, batch: int = 8) -> None:
    """Train a head and write it to a folder in the layout of `method="eagle"`."""
    token_ids = continued_texts(folder, texts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    head = new_head(model)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    position_ids = torch.arange(LENGTH - 1)[None]
    for _ in range(steps):
        rows = token_ids[torch.randint(len(token_ids), (batch,), generator=order)]
        with torch.no_grad():
            hidden = model.base_model(rows).last_hidden_state
            meant = model.get_output_embeddings()(hidden[:, 1:]).softmax(-1)
            embedded = model.get_input_embeddings()(rows[:, 1:])
        guessed = head(embedded, hidden[:, :-1], position_ids.expand(len(rows), -1))
        logits = model.get_output_embeddings()(guessed)
        likely = F.cross_entropy(logits.flatten(0, 1), meant.flatten(0, 1))
        loss = F.smooth_l1_loss(guessed, hidden[:, 1:]) + 0.1 * likely
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    output.mkdir(parents=True, exist_ok=True)
    weights = {name.removeprefix("body."): value for name, value in head.state_dict().items()}
    own = {name: value.contiguous() for name, value in weights.items() if "embed_tokens" not in name}
    save_file(own, output / "model.safetensors")
    head.body.config.save_pretrained(output)


def main(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit_head(model, Path(folder), steps=20, texts=8)
        head = {"method": "eagle", "model": folder, "num_speculative_tokens": 3}
        with LLM(model, speculative_config=head) as llm:
            llm.generate("The with statement", SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
            print(f"{llm.stats().acceptance_length:.2f} tokens a step, of at most 4")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        fit_head(sys.argv[1], Path(sys.argv[2]), steps=int(sys.argv[3]) if len(sys.argv) > 3 else 300)
    else:
        main(sys.argv[1])
