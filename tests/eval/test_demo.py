"""The demo on a tiny model with random weights: both parts run, agree, and show the counters."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_fastattn import cli
from hf_fastattn.eval import demo


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    # One token a byte: a byte-level vocabulary without merges.
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_demo_compares_stock_and_patched(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--new-tokens", "8", "--sample-tokens", "4", "--samples", "3", "--repeats", "1", "--dtype", "float32"]
    assert cli.main(["demo", checkpoint, "--device", "cpu", *options]) == 0
    shown = capsys.readouterr().out
    assert "all 8 tokens agree" in shown and "all 12 tokens agree" in shown
    # The prompt is cut to leave room for the new tokens, and is computed once for all samples.
    assert "252 prompt tokens computed" in shown
    assert "fallbacks: none" in shown


def test_disagreement_is_named() -> None:
    stock = demo.Run(torch.tensor([[5, 1, 2, 3]]), prompt_length=1, first_token=0.1, total=0.2)
    other = demo.Run(torch.tensor([[5, 1, 9, 3]]), prompt_length=1, first_token=0.1, total=0.2)
    shorter = demo.Run(torch.tensor([[5, 1, 2]]), prompt_length=1, first_token=0.1, total=0.2)
    assert demo.agreement({"stock": [stock], "patched": [stock]})[0]
    assert demo.agreement({"stock": [stock], "patched": [other]}) == (False, "tokens DIFFER, first at new token 2")
    assert demo.agreement({"stock": [stock], "patched": [shorter]}) == (False, "tokens DIFFER, first at new token 3")


def test_rate_leaves_the_first_token_out() -> None:
    run = demo.Run(torch.zeros(2, 6), prompt_length=1, first_token=0.5, total=2.5)
    assert run.tokens_per_second == pytest.approx(2 * 4 / 2.0)


def test_share_weights_takes_no_memory() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    twin = demo.share_weights(model)
    assert twin is not model and twin[0] is not model[0]
    ours, theirs = model.state_dict(keep_vars=True), twin.state_dict(keep_vars=True)
    assert all(ours[name] is theirs[name] for name in ours)


@pytest.mark.parametrize("arguments", [["--samples", "0"], ["--dtype", "float8"], ["--no-such-option"]])
def test_bad_arguments_end_with_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
