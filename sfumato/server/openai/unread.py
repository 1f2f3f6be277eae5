"""What clients send beside a request and what it means here: nothing, each with the reason.

`UNREAD`: fields that ask for nothing of the text. They are left out, and the header x-sfumato-ignored names them; a
strict server refuses them. `NEUTRAL`: fields that would change the text and are not supported, with the values that ask
for nothing: those are taken, any other is refused by the field's name. Both are the lists to add to when a client sends
something new; fields that have a meaning are in `bodies`, `items` and `spellings`.
"""

from __future__ import annotations

from typing import Any

_CACHE = "what was encoded is kept while there is room, for everybody"
_ROUTE = "there is one model here, and one way to it"
_TRACE = "nothing is reported to anybody"
_SPEED = "it is about speed alone"

UNREAD = {
    # OpenAI
    "service_tier": "there is one tier",
    "prompt_cache_retention": _CACHE,
    "prompt_cache_options": _CACHE,
    "cache_control": _CACHE,
    "client_metadata": _TRACE,
    "verbosity": "the model knows no such setting; ask in words",
    "prediction": _SPEED,
    "web_search_options": "nothing is fetched for a client",
    # OpenRouter and other gateways
    "provider": _ROUTE,
    "providerOptions": _ROUTE,
    "models": _ROUTE,
    "route": _ROUTE,
    "transforms": "a conversation is taken whole",
    "plugins": _ROUTE,
    "usage": "every answer says its usage",
    "session_id": _TRACE,
    "trace": _TRACE,
    "extra_headers": _TRACE,
    "trace_id": _TRACE,
    "tags": _TRACE,
    "litellm_metadata": _TRACE,
    "drop_params": _ROUTE,
    "search_settings": "nothing is fetched for a client",
    "disable_tool_validation": "calls are the model's own",
    "citation_options": "nothing is cited",
    # vLLM and SGLang
    "priority": "requests are served as they come",
    "request_id": "the header x-request-id is the place for it",
    "rid": "the header x-request-id is the place for it",
    "cache_salt": _CACHE,
    "kv_transfer_params": _SPEED,
    "vllm_xargs": "that engine's own settings",
    "guided_decoding_backend": "there is one implementation",
    "spaces_between_special_tokens": "no special token is in a text",
    "separate_reasoning": "thoughts are always apart; include_reasoning leaves them out",
    "stream_reasoning": "thoughts come as they are written",
    "thinking_token_budget": "thoughts have no budget of their own; max_tokens bounds both",
    "thinking_budget": "thoughts have no budget of their own; max_tokens bounds both",
    "mm_processor_kwargs": "only text is read",
    "return_tokens_as_token_ids": "tokens are given as text",
    # llama.cpp, LM Studio, Ollama
    "cache_prompt": _CACHE,
    "id_slot": _CACHE,
    "slot_id": _CACHE,
    "n_keep": "a conversation is taken whole",
    "n_cache_reuse": _CACHE,
    "samplers": "the sampler of a canvas is another; GET /v1/options lists what it takes",
    "timings_per_token": "the usage has the seconds",
    "return_progress": _SPEED,
    "t_max_predict_ms": _SPEED,
    "reasoning_format": "thoughts are always apart",
    "reasoning_budget": "thoughts have no budget of their own; max_tokens bounds both",
    "parse_tool_calls": "calls are always apart",
    "keep_alive": "the model stays loaded",
    "ttl": "the model stays loaded",
    "draft_model": _SPEED,
}
"""Field -> why it has no effect: of chats, completions and responses alike."""

CHAT_UNREAD = UNREAD | {"store": "an answer of this route cannot be asked for again, so that none is kept"}
"""Of chats and completions."""

RESPONSES_UNREAD = UNREAD | {
    "truncation": "a conversation is taken whole; one that is too long is an error",
    "max_tool_calls": "it counts the calls of tools that run at the vendor's",
    "context_management": "a conversation is taken whole; one that is too long is an error",
    "stream_options": "a stream holds the usage, and no padding",
    "access_programmatic": "calls are the model's own",
}
"""Of /v1/responses."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "length_penalty": (0, 1),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "do_sample": (True,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "xtc_probability": (0,),
    "dry_multiplier": (0,),
    "no_repeat_ngram_size": (0,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "stop_token_ids": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "return_token_ids": (False,),
    "prompt_logprobs": (0,),
    "n_probs": (0,),
    "truncate_prompt_tokens": (-1,),
    "lora_path": (),
    "safe_prompt": (False,),
}
"""Field -> the values that ask for nothing: of chats and completions alike; null always does."""

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = NEUTRAL | {
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "documents": ([],),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
}
"""Of chats."""

RESPONSES_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "moderation": (),
}
"""Of /v1/responses."""
