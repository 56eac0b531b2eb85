"""The references behind one face: load(folder, dtype)(input_ids) -> logits, the routing of each MoE layer."""

import dataclasses
import json

import safetensors.torch
import torch
import transformers

import bailing

transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass
class Routing:
    """What one router made of a batch; every field is [sequences, tokens, ...]."""

    logits: torch.Tensor  # before the softmax or sigmoid, in the graph
    chosen: torch.Tensor  # bool: which experts
    score_margin: torch.Tensor  # how far the last one taken was above the first one left
    logit_margin: torch.Tensor  # the same in units of router logits, about

    def shaped(self, shape):
        """From flat tokens to [sequences, tokens]."""
        return Routing(*(getattr(self, field.name).unflatten(0, shape) for field in dataclasses.fields(self)))

    @staticmethod
    def joined(parts):
        """One after the other along the tokens."""
        names = (field.name for field in dataclasses.fields(Routing))
        return Routing(*(torch.cat([getattr(part, name) for part in parts], 1) for name in names))


def _margins(scores, k):
    ranked = scores.sort(-1, descending=True).values
    return ranked[..., k - 1] - ranked[..., k]


def _softmax_routing(logits, k):
    """Of a router that takes the k greatest of softmax(logits)."""
    logits = logits.float()
    best = logits.topk(k, -1).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True)
    return Routing(logits, chosen, _margins(logits.softmax(-1), k), _margins(logits, k))


class _Transformers:
    def __init__(self, folder, dtype):
        self.model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        wrong = {kind: names for kind, names in loading.items() if names}
        assert not wrong, f"{folder}: {wrong}"
        self.dynamic = self.model.config.rope_parameters["rope_type"] == "dynamic"
        self.routers = []
        for module in self.model.modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(lambda module, _, output: self.routers.append((module.top_k, output[0])))

    def __call__(self, input_ids):
        if not self.dynamic:
            return self._forward(input_ids, use_cache=False)
        # Dynamic frequencies depend on the length so far: token by token, each key keeps those of its own position.
        cache = transformers.DynamicCache(config=self.model.config)
        steps = [self._forward(ids, cache=cache, use_cache=True) for ids in input_ids.split(1, 1)]
        logits, routings = zip(*steps)
        return torch.cat(logits, 1), [Routing.joined(layer) for layer in zip(*routings)]

    def _forward(self, input_ids, **options):
        self.routers.clear()
        logits = self.model(input_ids, **options).logits
        return logits, [_softmax_routing(out.view(*input_ids.shape, -1), k) for k, out in self.routers]


def _grouped_routing(logits, bias, k, groups, kept):
    """Of a router that takes the k greatest of sigmoid(logits) + bias inside the best groups only,
    a group being as good as the sum of its best two. The margin is the lesser of experts' and groups'."""
    scores = logits.sigmoid() + bias
    margin = torch.full(logits.shape[:-1], torch.inf)
    if groups > 1:
        grouped = scores.unflatten(-1, (groups, -1))
        of_group = grouped.topk(2, -1).values.sum(-1)
        best = of_group.topk(kept, -1).indices
        if kept < groups:
            margin = _margins(of_group, kept)
        dropped = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        scores = grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(k, -1).indices, True)
    margin = torch.minimum(margin, _margins(scores, k))
    return Routing(logits, chosen, margin, 4 * margin)  # a sigmoid's slope is 1/4 at most


class _Bailing:
    def __init__(self, folder, dtype):
        config = json.loads((folder / "config.json").read_text())
        self.model = bailing.build(config)
        tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors.update(safetensors.torch.load_file(file))
        if config["tie_word_embeddings"]:
            tensors["lm_head.weight"] = tensors["model.word_embeddings.weight"]
        extra = tuple(
            f"model.layers.{config['num_hidden_layers'] + i}." for i in range(config.get("num_nextn_predict_layers", 0))
        )
        self.model.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(extra)})
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)  # not the buffers: expert_bias stays in f32
        self.routings = []
        for module in self.model.modules():
            if isinstance(module, bailing.Gate):
                module.register_forward_pre_hook(self._watch)

    def _watch(self, gate, inputs):
        (x,) = inputs
        if not gate.v2:
            self.routings.append(_softmax_routing(x @ gate.weight.T, gate.k))
            return
        logits = x.float() @ gate.weight.float().T
        bias = gate.expert_bias if gate.expert_bias is not None else 0.0
        self.routings.append(_grouped_routing(logits, bias, gate.k, gate.groups, gate.kept_groups))

    def __call__(self, input_ids):
        self.routings.clear()
        logits = self.model(input_ids)
        return logits, [r.shaped(input_ids.shape) for r in self.routings]


def load(folder, dtype):
    """The checkpoint in a folder, its weights widened or rounded to dtype."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if model_type.startswith("bailing"):
        return _Bailing(folder, dtype)
    return _Transformers(folder, dtype)
