"""The tensors of a checkpoint as they lie on the hub: name -> shape, from its config.json."""


def _experts(prefix, config, hidden):
    """Router and one tensor per expert and projection."""
    ff = config.get("moe_intermediate_size", config["intermediate_size"])
    yield f"{prefix}.gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _ffn(f"{prefix}.experts.{expert}", hidden, ff)


def _ffn(prefix, hidden, ff):
    yield f"{prefix}.gate_proj.weight", (ff, hidden)
    yield f"{prefix}.up_proj.weight", (ff, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, ff)


def _linear(prefix, rows, columns, bias):
    yield f"{prefix}.weight", (rows, columns)
    if bias:
        yield f"{prefix}.bias", (rows,)


def _heads(config):
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return heads, kv_heads, config.get("head_dim") or config["hidden_size"] // heads


def _qwen3_moe(config):
    hidden = config["hidden_size"]
    heads, kv_heads, head_dim = _heads(config)
    olmoe = config["model_type"] == "olmoe"
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows, columns in [
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_heads * head_dim, hidden),
            ("v_proj", kv_heads * head_dim, hidden),
            ("o_proj", hidden, heads * head_dim),
        ]:
            yield from _linear(f"{prefix}.self_attn.{name}", rows, columns, config["attention_bias"])
        yield f"{prefix}.self_attn.q_norm.weight", (heads * head_dim if olmoe else head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (kv_heads * head_dim if olmoe else head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        dense = layer in config.get("mlp_only_layers", []) or (layer + 1) % config.get("decoder_sparse_step", 1) != 0
        if dense:
            yield from _ffn(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _experts(f"{prefix}.mlp", config, hidden)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _bailing_moe(config):
    hidden = config["hidden_size"]
    heads, kv_heads, head_dim = _heads(config)
    v2 = family_of(config) == "bailing_moe_v2"
    layers = config["num_hidden_layers"]
    yield "model.word_embeddings.weight", (config["vocab_size"], hidden)
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        if layer >= layers:  # a multi-token-prediction layer, after the ordinary ones
            yield f"{prefix}.enorm.weight", (hidden,)
            yield f"{prefix}.hnorm.weight", (hidden,)
            yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
            yield f"{prefix}.final_layernorm.weight", (hidden,)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        rows = (heads + 2 * kv_heads) * head_dim
        yield from _linear(f"{prefix}.attention.query_key_value", rows, hidden, config["use_qkv_bias"])
        yield from _linear(f"{prefix}.attention.dense", hidden, heads * head_dim, config["use_bias"])
        if v2 and config["use_qk_norm"]:
            yield f"{prefix}.attention.query_layernorm.weight", (head_dim,)
            yield f"{prefix}.attention.key_layernorm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from _ffn(f"{prefix}.mlp", hidden, config["intermediate_size"])
            continue
        yield from _experts(f"{prefix}.mlp", config, hidden)
        if v2 and config["moe_router_enable_expert_bias"]:
            yield f"{prefix}.mlp.gate.expert_bias", (config["num_experts"],)
        if config.get("num_shared_experts"):
            shared = config["moe_intermediate_size"] * config["num_shared_experts"]
            yield from _ffn(f"{prefix}.mlp.shared_experts", hidden, shared)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


_FAMILIES = {
    "qwen3_moe": _qwen3_moe,
    "olmoe": _qwen3_moe,
    "bailing_moe": _bailing_moe,
    "bailing_moe_v2": _bailing_moe,
}


def family_of(config):
    """The hub's Ling 2.0 checkpoints may call themselves bailing_moe too: the class name decides."""
    return "bailing_moe_v2" if "BailingMoeV2ForCausalLM" in config["architectures"] else config["model_type"]


def hub_tensors(config):
    """Every tensor of the checkpoint, in layer order."""
    return dict(_FAMILIES[family_of(config)](config))
