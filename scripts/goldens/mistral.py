"""Mistral-7B-Instruct-v0.2's tokenizer from public packages: vocabulary, ids of varied texts, ids of conversations.

    pip install mistral-common==1.13.1 sentencepiece==0.2.3 transformers==5.23.0 tokenizers==0.23.3
    python -P scripts/goldens/mistral.py

`mistral-common` ships the SentencePiece model (`tokenizer.model.v1`, Apache-2.0) that v0.1 and v0.2 were trained with.
- `tokens`, `score_steps`, `types`: what a GGUF file would carry of it (a score is the sum of the steps up to its token);
- `ids`: transformers' ids of the texts, its LlamaTokenizer built from them as it does for a GGUF file;
- `sentencepiece`: SentencePiece's own ids where they differ, else null (it knows no special tokens in text, and puts a space
  before any text, even one that begins with a space);
- `chat`: mistral-common's ids of conversations, which are the definition of the format.
"""

import gzip
import json
import pathlib
import sys

import mistral_common
import sentencepiece
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

sys.path.append(str(pathlib.Path(__file__).parent))
from strings import varied  # noqa: E402
from tokenizer import ROOT, converter, write  # noqa: E402

MODEL = pathlib.Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
OUT = ROOT / "crates/model/tests/goldens/tokenizer_mistral.json.gz"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

CONVERSATIONS = [
    ["What is your favourite condiment?"],
    ["Is lying ever right?", "Rarely, and only to prevent harm.", "Do you have an example?"],
    ["How do I apologise?", "Say what you did.", "And then?", "Change what you do.", "Thank you."],
    ["Sum 1 2 3: 1,234.56", "It is 6.\n\n- one\n- two", "Warum? 为什么 😀", "Дважды два — четыре.", "ok"],
]


def kind(model, index):
    if model.is_byte(index):
        return BYTE
    if model.is_control(index):
        return CONTROL
    return UNKNOWN if model.is_unknown(index) else NORMAL


def main():
    model = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    indices = range(model.get_piece_size())
    vocabulary = {
        "tokenizer_type": "llama",
        "tokens": [model.id_to_piece(i) for i in indices],
        "scores": [model.get_score(i) for i in indices],
        "token_type": [kind(model, i) for i in indices],
    }
    backend, _ = converter().convert_gguf_tokenizer("llama", vocabulary)
    instruct = MistralTokenizer.v1()
    texts = varied()[:500]
    ids = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    own = [model.encode(text) for text in texts]
    chat = []
    for texts_of_turns in CONVERSATIONS:
        turns = [(UserMessage, AssistantMessage)[i % 2](content=text) for i, text in enumerate(texts_of_turns)]
        request = ChatCompletionRequest(messages=turns)
        chat.append({"turns": texts_of_turns, "ids": instruct.encode_chat_completion(request).tokens})
    write(
        OUT,
        {
            "tokens": vocabulary["tokens"],
            "score_steps": [b - a for a, b in zip([0, *vocabulary["scores"]], vocabulary["scores"])],
            "types": vocabulary["token_type"],
            "texts": texts,
            "ids": ids,
            "sentencepiece": [b if b != a else None for a, b in zip(ids, own)],
            "chat": chat,
        },
    )


if __name__ == "__main__":
    main()
