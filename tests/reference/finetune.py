"""Fifty steps of fine-tuning with PEFT and torch: what cadre must reproduce step by step.

`CASES` is the table of what is trained; `train(folder, model_type, case, ...)` does it. See make_finetune_fixtures.py.
"""

import dataclasses

import peft
import torch
import torch.nn.functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

import adapters
import reference
from hub_tensors import hub_tensors

STEPS, SEQUENCES, TOKENS = 50, 3, 13
COUNTED = 0.6  # the share of tokens that count as targets
RANK, ALPHA = 4, 8
BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.999), 1e-8, 0.01, 1.0
LEAST_MARGIN = 2e-4  # between the last expert taken and the first one left, as scores, at every step
DRAWS = 200  # of a step's tokens, until every router is decisive


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained, and on which losses."""

    experts: bool = False  # LoRA on all experts too: routed, shared and the dense first layer's
    router: bool = False  # and on the routers
    full: bool = False  # every parameter in place of LoRA
    balance: float = 0.0  # the coefficient of the balance loss
    z: float = 0.0  # the coefficient of the router z-loss
    learning_rate: float = 1e-3


CASES = {
    "attention": Case(),
    "experts": Case(experts=True),
    "router-aux": Case(experts=True, router=True, balance=0.01, z=0.001),
    "full": Case(full=True, learning_rate=2e-4),
}

DEFINITIONS = {
    "loss": "mean cross-entropy over the tokens with loss_mask 1 of the whole batch; a token is the target of the"
    " logits before it, the first of a sequence is never one; without the terms below",
    "total": "loss + router_aux_loss_coef * aux_loss + router_z_loss_coef * z_loss",
    "aux_loss": "load_balancing_loss_func of transformers: experts * sum over e of f_e * p_e; f_e: how often e was"
    " chosen, p_e: the sum of e's probabilities, each over all tokens (whatever loss_mask says) of all MoE layers"
    " together and divided by tokens * layers; no gradient through f_e",
    "probabilities": {
        "qwen3_moe": "softmax of the router's logits",
        "olmoe": "softmax of the router's logits",
        "bailing_moe_v2": "sigmoid of the router's logits divided by their sum over all experts, without expert_bias;"
        " f_e counts what was chosen with expert_bias and groups",
    },
    "z_loss": "mean over all tokens of all MoE layers of logsumexp(router logits)^2",
    "grad": "gradients of the total at step 1, before clipping",
    "grad_norm": "over all trained tensors, before clipping; they are scaled by min(1, max_grad_norm / (norm + 1e-6))",
    "optimizer": "torch's AdamW; weight_decay on trained tensors of two dimensions (a fused stack of experts is that,"
    " as on the hub), 0 on others; an expert that no token chose has a gradient of 0, and its step counts",
}


def lora_config(model_type, case):
    """The PEFT config of a case; None if every parameter is trained."""
    if case.full:
        return None
    parameters = []
    bailing = model_type.startswith("bailing")
    if bailing:
        modules = ["query_key_value", "dense"]
        if case.experts:  # plain linears: routed, shared and the dense first layer's
            modules += ["gate_proj", "up_proj", "down_proj"]
    else:
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if case.experts:  # fused stacks
            parameters += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if case.router:
        parameters.append("mlp.gate.weight")
    return peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=modules,
        target_parameters=parameters or None,
        init_lora_weights=False,
        task_type=None if bailing else "CAUSAL_LM",  # PEFT asks such a model for methods of transformers'
    )


def file_name(parameter):
    """The name in an adapter's file of an adapter's parameter."""
    return parameter.replace(".default.", ".")


def hub_form(tensors):
    """Tensors by transformers' names -> by the hub's: fused stacks of experts are taken apart."""
    parts = {}
    for name, tensor in tensors.items():
        stack, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for e, both in enumerate(tensor):
                gate, up = both.chunk(2)
                parts[f"{stack}.{e}.gate_proj.weight"], parts[f"{stack}.{e}.up_proj.weight"] = gate, up
        elif kind == "down_proj":
            parts.update({f"{stack}.{e}.down_proj.weight": down for e, down in enumerate(tensor)})
        else:
            parts[name] = tensor
    return parts


class Trained:
    """A reference model with what a case trains of it; the adapter's weights come from the seed."""

    def __init__(self, folder, config, case, seed, dtype):
        self.reference = reference.load(folder, dtype)
        self.config, self.case = config, case
        self.adapter = None
        base = self.reference.model
        lora = lora_config(config["model_type"], case)
        if lora is not None:
            self.adapter = peft.get_peft_model(base, lora)
        parameters = (self.adapter or base).named_parameters()
        self.parameters = {name: p for name, p in parameters if p.requires_grad}
        if lora is not None:
            adapters.randomise(self.parameters, torch.Generator().manual_seed(seed))
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=case.learning_rate, betas=BETAS, eps=EPS, foreach=False)

    def named(self, tensors):
        """Tensors by parameter -> by the names in an adapter's file, or by the hub's."""
        if self.adapter is not None:
            tensors = {file_name(name): tensor for name, tensor in tensors.items()}
        else:
            tensors = hub_form(tensors)
            expected = {name for name in hub_tensors(self.config) if not name.endswith("expert_bias")}
            assert set(tensors) == expected, sorted(set(tensors) ^ expected)
        return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}

    def values(self):
        """What is trained, by name."""
        return self.named(self.parameters)

    def losses(self, input_ids, loss_mask):
        """Cross-entropy, balance loss, z-loss, and the least margin of any router."""
        logits, routings = self.reference(input_ids)
        targets = input_ids.masked_fill(~loss_mask, -100)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        margin = min(routing.score_margin.min().item() for routing in routings)
        return loss, self.balance_loss(routings), z_loss(routings), margin

    def balance_loss(self, routings):
        router_logits = tuple(routing.logits.flatten(0, 1) for routing in routings)
        if not self.config["model_type"].startswith("bailing"):
            experts, k = self.config["num_experts"], self.config["num_experts_per_tok"]
            return load_balancing_loss_func(router_logits, experts, k)
        scores = torch.cat(router_logits).sigmoid()
        probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = torch.cat([routing.chosen.flatten(0, 1) for routing in routings]).to(probabilities.dtype)
        return (chosen.mean(0) * probabilities.mean(0)).sum() * chosen.shape[-1]

    def step(self, losses):
        """The gradients of the losses, their norm, and a step of the optimizer with them clipped."""
        loss, balance, z = losses
        self.optimizer.zero_grad()
        (loss + self.case.balance * balance + self.case.z * z).backward()
        for parameter in self.parameters.values():
            if parameter.grad is None:  # of an expert that no token chose; torch would leave out its step
                parameter.grad = torch.zeros_like(parameter)
        gradients = self.named({name: p.grad for name, p in self.parameters.items()})
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        return gradients, norm.item()


def z_loss(routings):
    return torch.cat([routing.logits.logsumexp(-1).flatten() for routing in routings]).square().mean()


def draw_batch(vocab, generator):
    """Random tokens, and which of them count."""
    input_ids = torch.randint(vocab, (SEQUENCES, TOKENS), generator=generator)
    loss_mask = torch.rand(SEQUENCES, TOKENS, generator=generator) < COUNTED
    loss_mask[:, 0] = False
    return input_ids, loss_mask


def train(model, batches):
    """All steps -> the series by name, the gradients of step 1, the least margin of any router at any step.
    `batches` are (input_ids, loss_mask), one a step, or a generator of random numbers to draw them with: then a batch
    in which some router is near a tie is drawn again, because rounding would be visible there. The batches taken are
    returned last."""
    taken, series, first, least = [], {"loss": [], "aux_loss": [], "z_loss": [], "grad_norm": []}, None, float("inf")
    for step in range(STEPS):
        if isinstance(batches, torch.Generator):
            batch, losses, margin = decisive_batch(model, batches)
        else:
            batch = batches[step]
            *losses, margin = model.losses(*batch)
        gradients, norm = model.step(losses)
        first = first or gradients
        for values, value in zip(series.values(), [*(loss.item() for loss in losses), norm]):
            values.append(value)
        taken.append(batch)
        least = min(least, margin)
    return series, first, least, taken


def decisive_batch(model, generator):
    for _ in range(DRAWS):
        batch = draw_batch(model.config["vocab_size"], generator)
        *losses, margin = model.losses(*batch)
        if margin >= LEAST_MARGIN:
            return batch, losses, margin
    raise SystemExit(f"in {DRAWS} draws no batch routes decisively")
