import json
import multiprocessing
import os
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodeploy.checkpoint.files import open_weight_file
from autodeploy.checkpoint.gguf import transcribe_gguf
from autodeploy.config import parse_options
from autodeploy.debug.check import check
from autodeploy.debug.full_check import full_check
from autodeploy.errors import CheckpointError

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", "Ġ", *LETTERS, "th", "the"]
MERGES = ["t h", "th e"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
UP = numpy.random.default_rng(1).standard_normal((MLP, HIDDEN)).astype(numpy.float32)
Q8 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny model in a GGUF file: norms in float32, embedding in float16, the MLP's up projection in 8-bit blocks."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(len(TOKENS))
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    _add_tokenizer(writer)
    _add_tensors(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([control] * 4 + [normal] * (len(TOKENS) - 4))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_chat_template(TEMPLATE)


def _add_tensors(writer: gguf.GGUFWriter) -> None:
    random = numpy.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.2).astype(numpy.float32))

    embedding = random.standard_normal((len(TOKENS), HIDDEN)).astype(numpy.float16)
    writer.add_tensor("token_embd.weight", embedding)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        add(f"{prefix}.attn_norm.weight", HIDDEN)
        add(f"{prefix}.ffn_norm.weight", HIDDEN)
        add(f"{prefix}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"{prefix}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"{prefix}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
        add(f"{prefix}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"{prefix}.ffn_gate.weight", MLP, HIDDEN)
        writer.add_tensor(f"{prefix}.ffn_up.weight", gguf.quants.quantize(UP, Q8), raw_dtype=Q8)
        add(f"{prefix}.ffn_down.weight", HIDDEN, MLP)


def test_the_transcript_is_the_model_that_transformers_reads(file: Path) -> None:
    folder = transcribe_gguf(file, torch.float32)
    ids = torch.tensor([[1, 9, 5, 31, 32]])
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["max_position_embeddings"], config["num_key_value_heads"], config["eos_token_id"]) == (128, 2, 3)


def test_quantised_tensors_are_dequantised(file: Path) -> None:
    stored = open_weight_file(transcribe_gguf(file, torch.float32) / "model.safetensors")
    want = gguf.quants.dequantize(gguf.quants.quantize(UP, Q8), Q8)
    assert numpy.array_equal(stored.read("model.layers.1.mlp.up_proj.weight").numpy(), want)
    assert "lm_head.weight" not in stored.tensors  # tied: the file has no output tensor


def test_tokenizer_and_chat_template_survive(file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(transcribe_gguf(file, torch.float32))
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.encode("the", add_special_tokens=False) == [TOKENS.index("the")]
    chat = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == [1, TOKENS.index("the"), 2]


def test_a_file_is_transcribed_once_per_content_and_dtype(file: Path, tmp_path: Path) -> None:
    folder = transcribe_gguf(file, torch.bfloat16)
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert transcribe_gguf(file, torch.bfloat16) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert open_weight_file(folder / "model.safetensors").tensors["model.norm.weight"].dtype == torch.bfloat16
    assert transcribe_gguf(file, torch.float32) != folder
    os.utime(file, ns=(0, 0))
    assert transcribe_gguf(file, torch.bfloat16) != folder
    assert len(list((tmp_path / "cache" / "gguf").iterdir())) == 3  # and no temporary folder is left


@pytest.mark.slow
def test_two_processes_at_once_agree(file: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.starmap(transcribe_gguf, [(file, torch.float32)] * 2)
    assert first == second and (first / "model.safetensors").is_file()


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4 something else")
    with pytest.raises(CheckpointError, match=r"model\.gguf is no GGUF file"):
        transcribe_gguf(path, torch.float32)


def test_a_truncated_file_is_named_and_leaves_no_entry(file: Path, tmp_path: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf could not be read as GGUF"):
        transcribe_gguf(file, torch.float32)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"odd\.gguf.*no-such-architecture"):
        transcribe_gguf(path, torch.float32)


def test_a_gguf_file_can_be_checked(file: Path) -> None:
    report = check(str(file))
    assert report.passed, report.culprit
    full = full_check(str(file), parse_options({"dtype": "float32"}), prompts=[[1, 5, 3]], max_tokens=4)
    assert full.passed and full.prompts[0].ours.num_equal_tokens == 4
