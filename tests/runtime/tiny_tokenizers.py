"""Two small tokenizers, built from scratch: byte-level BPE, and BPE with byte fallback and leading-space marks."""

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import PreTrainedTokenizerFast

from autodeploy.runtime.tokenizer import Tokenizer

CORPUS = [
    "hello world, the end of a line",
    "héllo wörld 你好 世界",
    "😀 👍🏽 family: 👨‍👩‍👧",
    "the the the hello hello stop",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """GPT-2 style: every byte has a token, so that most non-English characters take several."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrap(backend, chat_template)


def byte_fallback(chat_template: str | None = None) -> Tokenizer:
    """SentencePiece style: words begin with a mark, unknown characters become <0xNN> tokens."""
    words = ["▁", "▁hello", "▁world", "he", "l", "o", "w", "a", "▁a", "é", "你", ",", "▁the", "st", "op", "s", "t"]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = BackendTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    return _wrap(backend, chat_template)


def _wrap(backend: BackendTokenizer, chat_template: str | None) -> Tokenizer:
    eos = "<|im_end|>" if backend.token_to_id("<|im_end|>") is not None else "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = chat_template
    return Tokenizer(tokenizer)
