"""The Ling models of inclusionAI in plain torch: the reference for cadre's parity tests, and the trainer of its demo model.

`bailing_moe` is Ling-lite and Ling-plus, `bailing_moe_v2` is Ling-mini-2.0, Ling-flash-2.0 and Ling-1T. It is written from
the published equations: one causal forward over whole sequences, without a cache, with the hub's `config.json` as a dict
and the hub's tensor names as the state dict. Both are pre-norm decoders:

    x = x + dense(attention(input_layernorm(x)))
    x = x + mlp(post_attention_layernorm(x))          logits = lm_head(norm(x))

What differs:
                     bailing_moe                        bailing_moe_v2
    router matmul    in the model's dtype               in f32
    router scores    softmax over all experts           sigmoid
    chosen           top-k of the scores                top-k of scores + expert_bias, inside the best groups only
    expert weights   chosen scores (/ their sum)        chosen scores, without the bias (/ their sum), * routed_scaling_factor
    q and k          as projected                       RMS norm per head, before the rotation
    rotation         the whole head                     the first part of the head (partial_rotary_factor)
    lm_head          may be normalised (norm_head)      plain

    model = build(json.load(open("config.json")))
    init(model, seed=0)                        # or model.load_state_dict(safetensors.torch.load_file(...))
    logits = model(ids)                        # ids [batch, tokens] -> [batch, tokens, vocab] in f32
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def is_v2(config):
    """The hub's Ling-mini-2.0 calls itself model_type `bailing_moe` in some revisions: the class name decides first."""
    names = config.get("architectures") or [config.get("model_type", "")]
    return any(n in ("BailingMoeV2ForCausalLM", "bailing_moe_v2") for n in names)


def head_dim(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


class RmsNorm(nn.Module):
    """Normalised in f32, rounded to the model's dtype, then scaled: in bf16 that order is visible."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(config, tokens):
    """The angle per position of each rotated pair, and the factor on cos and sin (1, except for YaRN).
    The first is [pairs], or [tokens, pairs] if the scaling is dynamic."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = float(rope.get("rope_theta") or config.get("rope_theta", 10000.0))
    factor = float(rope.get("factor") or 1.0)
    limit = config.get("max_position_embeddings", 2048)
    dim = head_dim(config)
    if is_v2(config):
        part = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
        dim = config.get("rotary_dim") or int(dim * part)

    def frequencies(base):
        return 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)

    if kind == "dynamic":
        # The base grows with the length: position p takes that of a sequence of p + 1 tokens, as decoding token by
        # token with a cache does, where a key is turned once and never again. One base for all positions, from the
        # whole length, would make logits depend on how many tokens follow and on how a sequence is cut into chunks.
        def base_at(length):
            if length <= limit:
                return base
            return base * (factor * length / limit - (factor - 1)) ** (dim / (dim - 2))

        return torch.stack([frequencies(base_at(position + 1)) for position in range(tokens)]), 1.0
    freq = frequencies(base)
    if kind == "linear":
        return freq / factor, 1.0
    if kind != "yarn":
        return freq, 1.0

    # YaRN: fast pairs keep their angle, slow ones are slowed by `factor`, with a ramp between.
    original = rope.get("original_max_position_embeddings") or (limit if is_v2(config) else 4096)

    def pair_that_turns(times):
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_that_turns(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(rope.get("beta_slow") or 1)), dim - 1)
    slow = ((torch.arange(dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    freq = freq / factor * slow + freq * (1 - slow)

    def mscale(m):
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return freq, float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return freq, mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return freq, mscale(1)  # `mscale` alone counts for nothing, in transformers too


def rotate(x, cos, sin):
    """x [batch, heads, tokens, head_dim]: its first 2 * cos.shape[-1] columns turn, pairing column i with i + half."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.dim = head_dim(config)
        width = config["hidden_size"]
        # Rows: all query heads, then all key heads, then all value heads.
        rows = (self.heads + 2 * self.kv_heads) * self.dim
        self.query_key_value = nn.Linear(width, rows, bias=bool(config.get("use_qkv_bias")))
        self.dense = nn.Linear(self.heads * self.dim, width, bias=bool(config.get("use_bias")))
        self.qk_norm = is_v2(config) and config.get("use_qk_norm", True)
        if self.qk_norm:
            self.query_layernorm = RmsNorm(self.dim, config["rms_norm_eps"])
            self.key_layernorm = RmsNorm(self.dim, config["rms_norm_eps"])

    def forward(self, x, cos, sin):
        batch, tokens, _ = x.shape
        qkv = self.query_key_value(x).view(batch, tokens, -1, self.dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.qk_norm:
            q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # scaled by 1/sqrt(dim), softmax in f32
        return self.dense(y.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """x [tokens, hidden] -> the chosen experts and their weights, both [tokens, k]."""

    def __init__(self, config):
        super().__init__()
        self.k = config["num_experts_per_tok"]
        self.v2 = is_v2(config)
        self.groups = config.get("n_group") or 1
        self.kept_groups = config.get("topk_group") or self.groups
        self.normalise = config.get("norm_topk_prob", True) and self.k > 1
        self.scale = config.get("routed_scaling_factor", 1.0) if self.v2 else 1.0
        self.weight = nn.Parameter(torch.zeros(config["num_experts"], config["hidden_size"]))
        if self.v2 and config.get("moe_router_enable_expert_bias", True):
            self.register_buffer("expert_bias", torch.zeros(config["num_experts"]))
        else:
            self.expert_bias = None

    def forward(self, x):
        if not self.v2:
            scores = F.linear(x, self.weight).softmax(-1, dtype=torch.float32)
            weights, chosen = scores.topk(self.k)
            if self.normalise:
                weights = weights / weights.sum(-1, keepdim=True)
        else:
            with torch.autocast(x.device.type, enabled=False):
                scores = F.linear(x.float(), self.weight.float()).sigmoid()
            ranked = scores.detach()
            if self.expert_bias is not None:
                ranked = ranked + self.expert_bias.float()
            if self.groups > 1:
                groups = ranked.view(len(x), self.groups, -1)
                best = groups.topk(2).values.sum(-1).topk(self.kept_groups).indices
                dropped = torch.ones(len(x), self.groups, dtype=torch.bool, device=x.device).scatter(1, best, False)
                ranked = groups.masked_fill(dropped.unsqueeze(-1), -math.inf).view(len(x), -1)
            chosen = ranked.topk(self.k).indices
            weights = scores.gather(1, chosen)
            if self.normalise:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = weights * self.scale
        return chosen, weights


class Moe(nn.Module):
    """`counts` are the tokens per expert of the last forward."""

    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["moe_intermediate_size"]
        self.gate = Gate(config)
        self.experts = nn.ModuleList(Mlp(width, inner) for _ in range(config["num_experts"]))
        shared = config.get("num_shared_experts") or 0
        self.shared_experts = Mlp(width, inner * shared) if shared else None

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.gate(flat)
        self.counts = torch.bincount(chosen.flatten(), minlength=len(self.experts))
        # Sort the (token, expert) pairs by expert, run each expert once on its tokens, put the results back.
        order = chosen.flatten().argsort(stable=True)
        inputs = flat.index_select(0, order // chosen.shape[1]).split(self.counts.tolist())
        outputs = torch.cat([expert(i) for expert, i in zip(self.experts, inputs) if len(i)])
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        outputs = outputs.index_select(0, back).view(*chosen.shape, -1)
        y = (outputs.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view_as(x)


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = RmsNorm(width, eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RmsNorm(width, eps)
        dense = not config.get("num_experts") or index < (config.get("first_k_dense_replace") or 0)
        self.mlp = Mlp(width, config["intermediate_size"]) if dense else Moe(config)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden_size"], config.get("pad_token_id"))
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(config["hidden_size"], config["rms_norm_eps"])


class BailingMoe(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config.get("tie_word_embeddings"):
            self.lm_head.weight = self.model.word_embeddings.weight

    def head(self):
        """The output matrix; NormHead divides each of its columns by that column's length over the vocabulary."""
        weight = self.lm_head.weight
        if is_v2(self.config) or not self.config.get("norm_head"):
            return weight
        length = weight.float().norm(dim=0, keepdim=True) + 1e-7
        return (weight.float() / length.detach()).to(weight.dtype)  # no gradient through the length

    def forward(self, ids, trace=None, select=None):
        """`trace`: a list that gets the residual stream after the embedding and after every layer, then after the last norm.
        `select`: a boolean mask [batch, tokens]; then only those rows' logits are made: [selected, vocab]."""
        x = self.model.word_embeddings(ids)
        freq, scale = rope_frequencies(self.config, ids.shape[1])
        angles = (torch.arange(ids.shape[1]).float().unsqueeze(1) * freq).to(x.device)  # [tokens, pairs]
        cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
        trace = [] if trace is None else trace
        trace.append(x.detach())
        for layer in self.model.layers:
            x = layer(x, cos, sin)
            trace.append(x.detach())
        x = self.model.norm(x)
        trace.append(x.detach())
        if select is not None:
            x = x.flatten(0, 1).index_select(0, select.flatten().nonzero().squeeze(1))
        return F.linear(x, self.head()).float()


def build(config):
    """The model of a `config.json`, uninitialised: follow with `init` or `load_state_dict`."""
    return BailingMoe(config)


@torch.no_grad()
def init(model, seed, std=None, bias_std=0.0):
    """Random weights that depend on the seed alone. `bias_std` > 0 makes expert_bias, and the norms' weights, non-trivial."""
    rng = torch.Generator().manual_seed(seed)
    std = std or model.config.get("initializer_range", 0.02)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        noise = torch.randn(tensor.shape, generator=rng)
        if name.endswith(("layernorm.weight", "norm.weight")):
            tensor.copy_(1 + bias_std * noise)
        elif name.endswith("expert_bias"):
            tensor.copy_(bias_std * noise)
        elif name.endswith(".bias"):
            tensor.copy_(std * noise)
        else:
            tensor.copy_(std * noise)
    return model
