"""What a user can do about a reason for which a call, or a forward in it, does as Transformers does."""

from __future__ import annotations

KEEP = "nothing: results are right, and other calls are not affected"
UNDO = "undo that, or call unpatch() and patch() again after it"
UNWRAP = "take the wrapper off; change logits by a LogitsProcessor, and look at states after the call"
HOOKS = "remove them for the call (handle.remove()); look at states with output_hidden_states in a forward after it"
ROWS = "remove it for the call, or set hook.takes_packed_rows = True on a hook that takes rows without padding"
ONE_DEVICE = "load the model on one device, without offloading (device_map={'': 0})"
SPREAD = "greedy search or sampling of dense layers, or all layers on one device (device_map={'': 0})"
OWN_CACHE = "leave the cache to generate(), or pass a hf_fastattn.PagedCache or a DynamicCache(config=model.config)"
CACHE_OPTION = "leave cache_implementation and use_cache alone; with 'static' also return_dict_in_generate"
MASK = "pad on the left, with a mask of ones and zeros [rows, columns]"
AFTERWARDS = "ask a forward over the finished sequences for them"
EVAL = "model.eval(), or set the dropout to 0"
NO_GRAD = "call it under torch.no_grad() or torch.inference_mode()"
LAYERED = "nothing: steps of such a model run layer by layer, over pages all the same"
DEFAULTS = "leave the option out, or as it is by default"
LOOPED = "nothing: Transformers' loop runs over recorded forwards"

ALONE = "nothing: the prompt is computed as a whole"
ALIKE = "the same hooks, modules, modes and caches on every rank"

# (part of a reason, what to do), the first that fits.
HINTS = (
    (
        "gather the weights from other processes",
        "nothing, results are right; quicker with whole weights for the call: deepspeed.zero.GatheredParameters, as TRL, "
        "or a second, unsharded model to generate with",
    ),
    ("may change what a token means", "leave these arguments out, and give prompts as input_ids"),
    ("is not given as tokens", "give prompts as input_ids"),
    ("behind a sliding window are released", ALONE),
    ("linear-attention layers keep a state", ALONE),
    ("gives tokens other positions", ALONE),
    ("layers have attention variants", "patch without variant="),
    ("states of the prompt's tokens are asked for", "ask a forward over the finished sequences for them"),
    ("asks for a prompt in pieces", "leave prefill_chunk_size out: long prompts run in pieces by themselves"),
    ("inputs are prepared by", "prepare_inputs_for_generation of Transformers, or none of it"),
    ("whose change could go unnoticed", "weights='frozen', if nothing writes to them while the model is patched"),
    ("rows choose their adapters", "set_adapter() for the whole call"),
    ("hides the last column", "pad on the left"),
    ("none of the prompt's columns", "a mask of ones and zeros [rows, columns]"),
    ("positions are given on several axes", "leave position_ids out"),
    ("do not count its tokens from 0", "leave position_ids out"),
    ("the call drafts for another one", "nothing: it is the other call that counts"),
    ("the cache is the user's", "leave the cache to generate()"),
    ("an attention variant reads the row", "a variant that does not read b: prompts of samples are then computed once"),
    ("equal rows are computed one by one: ", ROWS),
    ("padding stays, since", "leave that argument out, or give prompts of equal length"),
    ("padding stays: ", ROWS),
    ("hooks on all modules", HOOKS),
    ("streamer has changed the model", "change it before the call: from there on Transformers' loop runs"),
    ("may change the model when some rows", "one row a call, or a streamer of Transformers', such as TextIteratorStreamer"),
    ("was changed between two forwards", "change it before the call: steps after a change are launched layer by layer"),
    (
        "may change or move tensors",
        ONE_DEVICE,
    ),
    ("on several devices", SPREAD),
    ("has hooks", HOOKS),
    ("was replaced", UNWRAP),
    ("is called by a function of its own", "model.compile() is known; else take away what was put there"),
    ("may do more than launch kernels", "use PyTorch's or Transformers' module, or PEFT's, in its place"),
    ("may look at the whole batch", ROWS),
    (" adapter_names for ", "as many adapter_names as rows"),
    ("adapters are chosen by row, and autocast", "autocast to bfloat16 or float16"),
    ("copies from the host at every step", "model.merge_adapter() for the call"),
    ("scales activations by the whole batch", "give prompts of equal length, or weights with fixed scales"),
    ("is drawn for every row", EVAL),
    (" is active", EVAL),
    ("was repeated patch by patch", "install Transformers 5.23 or later"),
    ("is not known to belong to a row", "leave that argument out"),
    (" rows, there are ", "as many entries as rows"),
    ("depend on the length", LAYERED),
    ("mixture of experts", LAYERED),
    ("a linear attention records its past", "drafts need it; else a cache without activate_past_recording()"),
    ("rows get different numbers of tokens", "give prompts of equal length, or a cache without activate_past_recording()"),
    ("passes through a linear attention", MASK),
    ("a parameter is a", "plain weights in 16 bits, or those of bitsandbytes in 4 bits or of torchao"),
    ("the model is on ", ONE_DEVICE),
    ("weights are offloaded", ONE_DEVICE),
    ("input_ids are on", "inputs.to(model.device)"),
    ("capturing it failed", "free memory, or report this with the error; cuda_graphs=False does without"),
    ("recording a first forward failed", "nothing: the prompt ran without it; free memory if the error says so"),
    ("cuda_graphs=False", "patch with cuda_graphs=True"),
    ("backend ", "patch without backend=, on a CUDA device of capability 8.0 or later, in fp16 or bf16"),
    ("the call has no cache", CACHE_OPTION),
    ("cache_implementation=", CACHE_OPTION),
    ("use_cache=False", CACHE_OPTION),
    ("is returned", CACHE_OPTION),
    ("is a DynamicCache of", OWN_CACHE),
    ("the cache is a", "see the fallbacks, which say why it is not a PagedCache"),
    ("a forward without a PagedCache", OWN_CACHE),
    ("of the cache hold", OWN_CACHE),
    ("of the cache are", OWN_CACHE),
    ("in the cache are", OWN_CACHE),
    ("the cache holds", OWN_CACHE),
    ("holds keys in", OWN_CACHE),
    ("of cached keys", NO_GRAD),
    ("sliding window holds another number", OWN_CACHE),
    ("cache is ", OWN_CACHE),
    ("past_key_values is ", OWN_CACHE),
    ("of cache ", OWN_CACHE),
    ("of past_key_values ", OWN_CACHE),
    ("tensor parallel: the model was spread, or changed, after patch()", UNDO),
    ("tensor parallel: on this rank alone", ALIKE),
    ("tensor parallel: another rank differs", ALIKE),
    ("tensor parallel: ranks differ", ALIKE),
    ("tensor parallel: adapters", "merge_and_unload() before the model is saved, and load what was saved"),
    (
        "tensor parallel: ",
        "tp_plan='auto', on no more ranks than the model has key heads, without expert or sequence parallelism",
    ),
    ("another rank runs", "the same call, with the same options, on every rank"),
    ("it failed on another rank", "see what capturing failed with on the other rank"),
    ("looks at the logits", "use generate()'s own options where they say the same (bad_words_ids, suppress_tokens, ...)"),
    ("tokens are forced", "do_sample=False, num_beams=1, end tokens in place of stop strings"),
    ("forced tokens for", "ForcedTokens of [rows, max_new_tokens], one object a call"),
    ("in another order", "pass them as options of generate(), each once"),
    ("makes NaN of end tokens", "install Transformers 5.23 or later"),
    ("an exponential decay", "start it at a whole number of tokens"),
    ("sequences of no token", "shorter sequences, of at least one token"),
    ("no_repeat_ngram_size=", "a smaller one"),
    ("names a token that the head does not have", "leave out tokens that are not in the vocabulary"),
    ("may do more than its decoder and lm_head", LOOPED),
    ("is its own", LOOPED),
    ("drafts for another", KEEP),
    ("another call's loop", KEEP),
    ("beams that end with a stop string", "end tokens in its place"),
    ("beams whose cache is seen", CACHE_OPTION),
    ("beams are drawn", "do_sample=False"),
    ("beams with a ", "leave out temperature, top_k, top_p and the like: beams that are not drawn need none"),
    (" beams of ", "as many rows as prompts times num_beams, and room for a token"),
    (" beams, more than ", "fewer of them"),
    ("length_penalty=", "a smaller one"),
    ("low_memory=True", "leave low_memory out: the cache is not copied here"),
    ("the call asks for", LOOPED),
    ("is asked for", AFTERWARDS),
    ("are asked for", AFTERWARDS),
    ("stopping criteria ", "end tokens and stop_strings in their place, or TextStreamer for what has to be seen"),
    ("no length is set", "give max_new_tokens"),
    ("sampling='transformers'", "patch with sampling='fast' for draws on the device"),
    ("rows go on after a stop string", "give eos_token_id, and do without return_dict_in_generate"),
    (" end tokens, ", "fewer of them: at most 16 end tokens and 4,096 rows"),
    ("no room for a token", "a larger max_new_tokens or max_length"),
    ("with its own filter_value", "leave filter_value and min_tokens_to_keep as they are by default"),
    ("ignores new tokens", "a prompt_ignore_length of at most the prompt's"),
    ("is no token of the model", "give pad_token_id one of its tokens"),
    ("synced_gpus", "synced_gpus=False, if no weights are sharded"),
    ("was exchanged", "a class of your own, and Transformers' as they are"),
    ("needs more than its token, its position", MASK),
    ("ends within an image", "let text follow the image"),
    ("checkpointing", NO_GRAD),
    ("drop the cache", NO_GRAD),
    ("gradients are needed", NO_GRAD),
    ("no visible token", "give every row a token"),
    ("no row has a new token", MASK),
    ("positions for", "as many position_ids as tokens, or none"),
    ("position_ids of shape", "as many position_ids as tokens, on their device"),
    ("custom attention mask", MASK),
    ("the mask ", MASK),
    ("is_causal=False", "leave is_causal alone"),
    ("attn_implementation=", "attn_implementation='sdpa'"),
    ("was put in after patch()", UNDO),
    ("is not the one that was patched", UNDO),
    ("has keys and values", "num_hidden_layers as the model was loaded with"),
    ("writes to the cache as layer", "give each layer its place as layer_idx"),
    ("is not Transformers' own layer", "a layer of Transformers' in its place"),
    ("busy in another thread", "one call at a time, or a copy of the model for each thread"),
    ("is given", "leave that argument out"),
    (" has a ", ROWS),
    (" is set", DEFAULTS),
)


def hint_for(reason: str) -> str:
    """What the user can do about a reason; empty for an unknown one."""
    return next((hint for part, hint in HINTS if part in reason), "")


def with_hint(reason: str) -> str:
    """The reason, and what the user can do about it."""
    hint = hint_for(reason)
    return f"{reason} [what helps: {hint}]" if hint else reason
