"""Several documents packed into one row, which do not see each other: a mask that looks up where each one ends.

python examples/packed_documents.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).to(device)
texts = [
    "def mean(values):\n    return sum(values)",
    "The river was high that spring.",
    "He knocked, and waited, and knocked again;",
]
documents = [torch.tensor(ids, device=device) for ids in tokenizer(texts).input_ids]

# For each position its document; tokens to come belong to the last one.
LONGEST = 1024
lengths = torch.tensor([len(document) for document in documents], device=device)
document_of = torch.full((LONGEST,), len(documents) - 1, device=device)
document_of[: lengths.sum()] = torch.arange(len(documents), device=device).repeat_interleave(lengths)


def same_document(b, h, q_idx, kv_idx):
    return document_of[q_idx] == document_of[kv_idx]


packed = torch.cat(documents)[None]
with torch.no_grad():
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    continued_alone = model.generate(documents[-1][None], max_new_tokens=16, do_sample=False)
    hf_fastattn.patch(model, variant=hf_fastattn.Variant(mask_mod=same_document))
    together = model(packed, use_cache=False).logits[0]
continued = model.generate(packed, max_new_tokens=16, do_sample=False)

# RoPE knows distances only, so that a document may begin at any position.
print(f"logits differ by {(together - alone).abs().max():.1e} from those of each document by itself")
print(f"the last document goes on with {tokenizer.decode(continued[0, packed.shape[1] :])!r}")
