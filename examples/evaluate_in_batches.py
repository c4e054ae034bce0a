"""lm-evaluation-harness: the requests of `generate_until` join and leave one running batch, and end at their stop strings.

python examples/evaluate_in_batches.py [--model HUB_ID_OR_FOLDER]
"""

import argparse
import copy

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_fastattn
from hf_fastattn.eval.choices import SHIPPED


class BatchedLM(HFLM):
    """An `HFLM` for `lm_eval.simple_evaluate(model=...)`; its batch size says how many requests are given at once."""

    def _model_generate(self, context, max_length, stop, attention_mask, **options):
        temperature = options.pop("temperature", 0.0)
        options["do_sample"] = bool(options.get("do_sample", temperature > 0))
        config = copy.deepcopy(self.model.generation_config)
        config.update(**options, **({"temperature": temperature} if options["do_sample"] else {}))
        new = max_length - context.shape[1]
        found = torch.full((len(context), max_length), self.tokenizer.pad_token_id)
        found[:, :-new] = context
        # A stop string may be made of other tokens than the tokenizer would make of it: two more are looked at.
        last = 2 + max((len(self.tok_encode(text, add_special_tokens=False)) for text in stop), default=0)
        going = {str(row) for row in range(len(context))}
        with self.model.continuous_batching_context_manager(generation_config=config) as manager:
            for row, (tokens, mask) in enumerate(zip(context, attention_mask.bool(), strict=True)):
                manager.add_request(tokens[mask].tolist(), request_id=str(row), max_new_tokens=new, streaming=True)
            while going:
                output = manager.get_result(timeout=10)
                if output is None and not manager.is_running():
                    raise RuntimeError(f"the batch has ended: {manager.background_thread_status.fatal_error}")
                if output is None or output.request_id not in going:
                    continue
                assert output.error is None, output.error
                tokens = output.generated_tokens
                text = self.tok_decode(tokens[-last:], skip_special_tokens=False)
                if output.is_finished() or any(one in text for one in stop):
                    found[int(output.request_id), -new:][: len(tokens)] = torch.tensor(tokens)
                    going.remove(output.request_id)
                    manager.cancel_request(output.request_id)
        return found


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(SHIPPED), help="default: the small checkpoint that comes with hf_fastattn")
name = parser.parse_args().model

device = "cuda" if torch.cuda.is_available() else "cpu"
model = hf_fastattn.patch(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device))
lm = BatchedLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(name), batch_size=256)
texts = ["def add(a, b):\n", "import os\nimport", "class Queue:\n    def __init__(self):\n", "for line in open(path):\n"]
texts += [f"She had {count} apples, and" for count in range(2, 10)]
asked = {"until": ["\n", ". "], "max_gen_toks": 32}
requests = [Instance("generate_until", {}, (text, asked), place) for place, text in enumerate(texts)]
answers = lm.generate_until(requests)
call = hf_fastattn.report(model).last_call
print(*map(repr, answers), f"{len(requests)} requests in {call.batch_steps} steps", sep="\n")
