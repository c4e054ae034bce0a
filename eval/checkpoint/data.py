"""Prepare the data: `python -m hf_fastattn.eval.checkpoint.data`.

Reads the packages, holds documents out, trains the tokenizer, and writes `heldout.json` and the tokenizer (shipped) and
the training tokens (`work/tokens/`, not shipped). Same packages, same bytes.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from hf_fastattn.eval.checkpoint.sources import Document, download_packages, read_documents

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
HELDOUT = HERE / "heldout.json"
TOKENS = HERE / "work" / "tokens"
KINDS = ("prose", "docs", "code")
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCABULARY = 8192
CONTEXT = 4096
HELDOUT_CHARACTERS = 120_000  # of each kind


def hold_out(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Split into (training, held out): whole documents of 4,000 to 25,000 characters, some of each kind."""
    shuffled = documents.copy()
    random.Random(seed).shuffle(shuffled)
    taken, held_out, training = dict.fromkeys(KINDS, 0), [], []
    for document in shuffled:
        if 4_000 <= len(document.text) <= 25_000 and taken[document.kind] < HELDOUT_CHARACTERS:
            taken[document.kind] += len(document.text)
            held_out.append(document)
        else:
            training.append(document)
    return training, held_out


def train_tokenizer(documents: list[Document]) -> Tokenizer:
    """Byte-level BPE with a beginning-of-sequence token put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained(folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_tokens(tokenizer: Tokenizer, documents: list[Document], folder: Path) -> dict[str, int]:
    """Write one array a kind, documents in a row, each between its bos and eos; return the token counts."""
    folder.mkdir(parents=True, exist_ok=True)
    eos, counts = tokenizer.token_to_id(EOS), {}
    for kind in KINDS:
        texts = [document.text for document in documents if document.kind == kind]
        encodings = tokenizer.encode_batch(texts)
        tokens = np.concatenate([np.array([*encoding.ids, eos], dtype=np.uint16) for encoding in encodings])
        np.save(folder / f"{kind}.npy", tokens)
        counts[kind] = len(tokens)
    return counts


def main() -> None:
    """Run the whole preparation and print one JSON line of counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, default=HERE / "work" / "packages")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    documents = read_documents(download_packages(arguments.packages))
    training, held_out = hold_out(documents, arguments.seed)
    # The library's tests would fill the vocabulary with their identifiers.
    tokenizer = train_tokenizer([document for document in training if not document.source.startswith("test/")])
    save_tokenizer(tokenizer, WEIGHTS)
    HELDOUT.write_text(json.dumps([vars(document) for document in held_out], indent=1, ensure_ascii=False) + "\n")
    counts = write_tokens(tokenizer, training, TOKENS)
    characters = {kind: sum(len(d.text) for d in training if d.kind == kind) for kind in KINDS}
    print(json.dumps({"documents": len(training), "held_out": len(held_out), "characters": characters, "tokens": counts}))


if __name__ == "__main__":
    main()
