"""Pages outlive a change of weights that they were not computed with: of embeddings, of what comes after the last keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_fastattn
from tests.batching.served import Driven, Twins
from tests.generation.calls import run
from tests.generation.test_prefix_stale import PROMPT, answers
from tests.tools.models import tiny

USED = int(PROMPT["input_ids"][0, 33])
UNUSED = next(token for token in range(127, 0, -1) if token not in PROMPT["input_ids"])


def row(model: Any, token: int) -> torch.Tensor:
    return model.get_input_embeddings().weight.data[token]


# What no key or value of the prompt is computed with; the tokens may change.
NOT_READ: dict[str, Callable[[Any], Any]] = {
    "a row of embeddings that no prompt has": lambda model: row(model, UNUSED).mul_(2),
    "the output layer": lambda model: model.lm_head.weight.data.neg_(),
    "the last norm": lambda model: model.model.norm.weight.data.mul_(torch.linspace(-1, 2, 64)),
    "the MLP of the last layer": lambda model: model.model.layers[-1].mlp.down_proj.weight.data.neg_(),
}
READ: dict[str, Callable[[Any], Any]] = {
    "one bit of a row": lambda model: row(model, USED).view(torch.int32)[5].bitwise_xor_(1),
    "two signs of a row": lambda model: row(model, USED)[1:4:2].neg_(),
    "rows exchanged": lambda model: model.get_input_embeddings().weight.data.copy_(
        model.get_input_embeddings().weight.data[torch.tensor([*range(1, 128), 0])]
    ),
    "new embeddings": lambda model: model.set_input_embeddings(torch.nn.Embedding(128, 64)),
    "a norm": lambda model: model.model.layers[2].input_layernorm.weight.data[7].mul_(1.5),
    "keys of the last layer": lambda model: model.model.layers[-1].self_attn.k_proj.weight.data[0].neg_(),
    "the MLP of a layer before the last": lambda model: model.model.layers[1].mlp.down_proj.weight.data[0].neg_(),
    "the norm after attention": lambda model: model.model.layers[1].post_attention_layernorm.weight.data[3].mul_(2),
}


def assert_as_stock(stock: Any, model: Any, reused: int, batch: Any = PROMPT) -> torch.Tensor:
    tokens = run(model, batch, 12)
    call = hf_fastattn.report(model).last_call
    assert (call.tokens_reused, call.prefix_unused) == (reused, {})
    assert torch.equal(tokens, run(stock, batch, 12))
    return tokens


def pair(**changes: Any) -> tuple[Any, Any]:
    return tiny("llama", **changes), hf_fastattn.patch(tiny("llama", **changes), prefix_cache=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", [*NOT_READ, *READ])
def test_what_pages_were_computed_with_is_looked_at(name: str, tied: bool) -> None:
    stock, model = pair(tie_word_embeddings=tied)
    assert_as_stock(stock, model, 0)
    assert_as_stock(stock, model, 69)
    for one in (stock, model):
        torch.manual_seed(5)
        {**NOT_READ, **READ}[name](one)
    found = name in NOT_READ and not (tied and name == "the output layer")
    assert_as_stock(stock, model, 69 * found)
    assert_as_stock(stock, model, 69)


def test_a_row_that_is_as_it_was_again() -> None:
    stock, model = pair()
    for factor, reused in ((1.0, 0), (2.0, 0), (0.5, 69), (2.0, 69)):
        for one in (stock, model):
            row(one, USED).mul_(factor)
        assert_as_stock(stock, model, reused)


def test_generated_tokens_are_of_the_rows_that_they_were_computed_with() -> None:
    """Rows change that only prompts of before had, tokens of theirs are generated, and the rows are as they were again."""
    stock, model = pair()
    every = torch.arange(128)[None]
    others = torch.tensor([token for token in range(128) if token not in PROMPT["input_ids"]])
    assert_as_stock(stock, model, 0, {"input_ids": every, "attention_mask": torch.ones_like(every)})
    before = row(model, others).clone()
    for one in (stock, model):
        one.get_input_embeddings().weight.data[others] *= -3
    tokens = assert_as_stock(stock, model, 0)
    assert set(tokens[0, 70:-1].tolist()) & set(others.tolist())
    for one in (stock, model):
        one.get_input_embeddings().weight.data[others] = before
    # Whole pages of the prompt, and nothing of what was generated after it.
    assert_as_stock(stock, model, 64, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


def test_generated_tokens_stay_whatever_other_rows_are() -> None:
    stock, model = pair()
    tokens = assert_as_stock(stock, model, 0)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    unused = next(token for token in range(128) if token not in tokens)
    for one in (stock, model):
        row(one, unused).neg_()
    assert_as_stock(stock, model, 81, batch)
    for one in (stock, model):
        row(one, int(tokens[0, 75])).neg_()
    assert_as_stock(stock, model, 0, batch)


def test_rows_of_a_batch_have_their_own_tokens() -> None:
    """Padded rows of few tokens: a change of what one of them has is seen, of what none has is not."""
    stock, model = pair()
    ids = torch.randint(1, 30, (3, 40), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    ids[1, :12] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    assert_as_stock(stock, model, 0, batch)
    assert_as_stock(stock, model, 39 + 27 + 39, batch)
    for token, reused in ((100, 39 + 27 + 39), (int(ids[1, 20]), 0)):
        for one in (stock, model):
            row(one, token).neg_()
        assert_as_stock(stock, model, reused, batch)


def wrapped(kind: str) -> Any:
    """A model whose embeddings PEFT has wrapped."""
    peft = pytest.importorskip("peft")
    if kind == "tokens":
        config = peft.TrainableTokensConfig(token_indices=[USED, UNUSED])
    else:
        config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False)
    torch.manual_seed(3)
    return peft.get_peft_model(tiny("llama"), config).eval()


@pytest.mark.parametrize("kind", ["tokens", "lora"])
def test_adapters_of_embeddings(kind: str) -> None:
    """They are seen whole: a change of any row makes all pages out of date."""
    stock, model = wrapped(kind), hf_fastattn.patch(wrapped(kind), prefix_cache=True)
    names = [name for name, weight in stock.named_parameters() if weight.requires_grad]
    assert names
    for _ in range(2):
        assert torch.equal(run(model, PROMPT, 12), run(stock, PROMPT, 12))
    if hf_fastattn.report(model).last_call.prefix_unused:
        pytest.skip("pages do not stay under this adapter")
    assert hf_fastattn.report(model).last_call.tokens_reused == 69
    for one in (stock, model):
        for name in names:
            one.get_parameter(name).data.add_(0.3)
    assert_as_stock(stock, model, 0)
    assert_as_stock(stock, model, 69)
    for one in (stock, model):
        row(one.get_base_model(), UNUSED).neg_() if kind == "tokens" else one.get_parameter(names[0]).data[:, UNUSED].add_(1)
    assert_as_stock(stock, model, 0)


def test_embeddings_that_write_to_themselves_are_seen_whole() -> None:
    """Rows are scaled to a largest norm as they are looked up."""
    stock, model = pair()
    for one in (stock, model):
        one.get_input_embeddings().max_norm = 1.0
    assert_as_stock(stock, model, 0)
    # The first call has scaled the rows.
    assert_as_stock(stock, model, 0)
    row(model, UNUSED).neg_()
    row(stock, UNUSED).neg_()
    assert_as_stock(stock, model, 0)


def test_embeddings_with_a_function_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads more than the rows of its tokens: whatever changes in them, nothing is found."""

    def looked_up(self: Any, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(ids, self.weight) + self.weight[UNUSED]

    monkeypatch.setattr(torch.nn.Embedding, "forward", looked_up)
    stock, model = pair()
    answers(model)
    for one in (stock, model):
        row(one, UNUSED).neg_()
    assert torch.equal(run(model, PROMPT, 12), run(stock, PROMPT, 12))
    assert hf_fastattn.report(model).last_call.tokens_reused == 0


@pytest.mark.parametrize(("token", "reused"), [(UNUSED, True), (USED, False)])
def test_batches_and_generate_look_at_the_same_rows(token: int, reused: bool) -> None:
    twins, prompt = Twins("llama", "cpu", page_size=4, prefix_cache=True), PROMPT["input_ids"][0].tolist()
    run(twins.model, PROMPT, 1)
    for model in (twins.stock, twins.model):
        row(model, token).mul_(-1)
    twins.changed()
    driven = Driven(twins)
    driven.add("again", prompt)
    driven.run()
    assert driven.tokens("again") == twins.alone(prompt)
    assert (twins.report.last_call.tokens_reused > 60) == reused
    driven.parts.release(driven.engine)
    # A batch may have had any token: what changes now is seen if a prompt has it.
    for model in (twins.stock, twins.model):
        row(model, UNUSED).mul_(-1)
    assert torch.equal(run(twins.model, PROMPT, 2), run(twins.stock, PROMPT, 2))
    assert twins.report.last_call.tokens_reused > 60
    for model in (twins.stock, twins.model):
        row(model, USED).mul_(3)
    assert_as_stock(twins.stock, twins.model, 0)
