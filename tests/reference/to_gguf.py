"""Turns a checkpoint of the hub into a GGUF file for llama.cpp.

    python to_gguf.py CHECKPOINT OUTPUT.gguf [--type f32|bf16]

Small on purpose: the four families of hub_tensors.py, no quantisation (llama-quantize does that).
MTP layers are left out. A tokenizer.json (byte-level BPE) goes along; without one the file has no vocabulary.
"""

import argparse
import json
import math
import pathlib

import gguf
import numpy as np
import torch
from safetensors import safe_open

from hub_tensors import family_of

ARCHITECTURES = {
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "bailing_moe": gguf.MODEL_ARCH.BAILINGMOE,
    "bailing_moe_v2": gguf.MODEL_ARCH.BAILINGMOE2,
}


class Unsupported(Exception):
    """llama.cpp has no such variant of the architecture."""


def rope_of(config):
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_kind(config):
    rope = rope_of(config)
    return rope.get("rope_type", rope.get("type", "default"))


def heads_of(config):
    heads = config["num_attention_heads"]
    return heads, config.get("head_dim") or config["hidden_size"] // heads


def refuse(config):
    """What llama.cpp would read wrongly, or not at all, though it knows the architecture."""
    family = family_of(config)
    heads, head_dim = heads_of(config)
    if rope_kind(config) == "dynamic":
        raise Unsupported("dynamic rope scaling")
    if family.startswith("bailing") and not config["num_shared_experts"]:
        raise Unsupported("no shared expert")
    if config.get("use_bias") or config.get("attention_bias"):
        raise Unsupported("a bias on the attention's output")
    if family == "bailing_moe" and config["first_k_dense_replace"]:
        raise Unsupported("dense layers first")
    if family == "bailing_moe_v2":
        if config["use_qkv_bias"]:
            raise Unsupported("a bias on query_key_value")
        if not config["use_qk_norm"]:
            raise Unsupported("no q/k norm")
        if heads * head_dim != config["hidden_size"]:
            raise Unsupported("heads * head_dim != hidden_size")
    if family == "olmoe" and config["norm_topk_prob"]:
        raise Unsupported("normalised expert weights")
    if family == "olmoe" and config["clip_qkv"]:
        raise Unsupported("clip_qkv")
    if family == "olmoe" and config["num_key_value_heads"] != heads:
        raise Unsupported("grouped attention")
    if family == "qwen3_moe" and not config["norm_topk_prob"]:
        raise Unsupported("expert weights that are not normalised")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise Unsupported("dense layers between")


def write_parameters(writer, config):
    family = family_of(config)
    rope = rope_of(config)
    heads, head_dim = heads_of(config)
    moe_ff = config.get("moe_intermediate_size", config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(moe_ff)

    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    rotated = config.get("rotary_dim") or int(head_dim * partial)
    writer.add_rope_dimension_count(rotated if family == "bailing_moe_v2" else head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta") or config["rope_theta"])
    kind = rope_kind(config)
    if kind != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:  # llama.cpp multiplies its own default by this (and ignores yarn_attn_factor)
            default = 1 + 0.1 * math.log(rope["factor"])
            writer.add_rope_scaling_attn_factors(rope["attention_factor"] / default)
        # beta_fast and beta_slow: llama.cpp reads them from its context parameters only

    if family.startswith("bailing"):
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["num_shared_experts"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if family == "bailing_moe_v2":
        writer.add_expert_shared_feed_forward_length(moe_ff)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def write_tokenizer(writer, folder, config):
    file = folder / "tokenizer.json"
    if not file.exists():
        writer.add_tokenizer_model("no_vocab")
        return
    tokenizer = json.loads(file.read_text())
    tokens = [f"[PAD{i}]" for i in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * config["vocab_size"]
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], gguf.TokenType.CONTROL
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])


def interleaved(rows, heads):
    """The rows of each head from halves (column i turns with i + half) to pairs (2 i with 2 i + 1)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


class Checkpoint:
    """Tensors by name out of all the shards of a folder; as an outline, their shapes without values."""

    def __init__(self, folder, outline=False):
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("model*.safetensors"))]
        self.where = {name: file for file in files for name in file.keys()}
        self.outline = outline

    def take(self, name):
        tensor = self.where[name].get_tensor(name)
        return tensor.to("meta") if self.outline else tensor


def named_tensors(checkpoint, config):
    """The tensors one after the other, by llama.cpp's names."""
    family = family_of(config)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)

    def named(name, suffix, tensor):
        return f"{names.get_name(name) or name}.{suffix}", tensor

    for name in checkpoint.where:
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue  # multi-token prediction
        stem, suffix = name.rsplit(".", 1)
        if ".mlp.experts." in name:
            if parts[5] == "0":
                merged = [name.replace(".experts.0.", f".experts.{e}.") for e in range(config["num_experts"])]
                experts = torch.stack([checkpoint.take(n) for n in merged])
                yield named(".".join(parts[:5] + parts[6:7]), suffix, experts)
            continue
        tensor = checkpoint.take(name)
        if name.endswith("expert_bias"):
            yield named(name, "bias", tensor)
        elif family == "bailing_moe" and stem.endswith("query_key_value"):
            heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
            rows = tensor.shape[0] // (heads + 2 * kv_heads)
            q, k, v = tensor.split([heads * rows, kv_heads * rows, kv_heads * rows])
            yield named(f"blk.{parts[2]}.attn_q", suffix, interleaved(q, heads))
            yield named(f"blk.{parts[2]}.attn_k", suffix, interleaved(k, kv_heads))
            yield named(f"blk.{parts[2]}.attn_v", suffix, v)
        elif name == "lm_head.weight":
            yield named(stem, suffix, normalised(tensor) if config.get("norm_head") else tensor)
        else:
            yield named(stem, suffix, tensor)
    if config["tie_word_embeddings"] and family.startswith("bailing"):  # llama.cpp asks for the head
        tensor = checkpoint.take("model.word_embeddings.weight")
        yield named("lm_head", "weight", normalised(tensor) if config.get("norm_head") else tensor)


def encoded(name, tensor, bf16):
    """What lies in the file: f32, or bf16 as bytes."""
    small = tensor.ndim == 1 or "ffn_gate_inp" in name
    if small or not bf16:
        return tensor.float().contiguous()
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8)


def write_file(writer, folder, config, bf16):
    """Tensor by tensor, so that memory holds one: first what there will be, then the values."""
    for name, tensor in named_tensors(Checkpoint(folder, outline=True), config):
        outline = encoded(name, tensor, bf16)
        as_bf16 = outline.dtype == torch.uint8
        dtype = np.dtype(np.uint8 if as_bf16 else np.float32)
        raw_dtype = gguf.GGMLQuantizationType.BF16 if as_bf16 else None
        writer.add_tensor_info(name, outline.shape, dtype, outline.nbytes, raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in named_tensors(Checkpoint(folder), config):
        writer.write_tensor_data(encoded(name, tensor, bf16).numpy())


def normalised(head):
    """NormHead, done once: as llama.cpp's own converter does."""
    return head.float() / (head.float().norm(dim=0, keepdim=True) + 1e-7)


def convert(folder, output, bf16=False):
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    refuse(config)
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family_of(config)]])
    write_parameters(writer, config)
    write_tokenizer(writer, folder, config)
    write_file(writer, folder, config, bf16)
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--type", choices=["f32", "bf16"], default="f32", help="of the matrices; the rest is f32")
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.output, arguments.type == "bf16")


if __name__ == "__main__":
    main()
