"""Turning routing on and off."""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from drllm_fast.attention import PREFIX, register
from drllm_fast.decoder import decoder_of, routable_decoder, sliding_windows, unwrap
from drllm_fast.policies import as_policy
from drllm_fast.routing import Routing, set_budget
from drllm_fast.swap import check_swapped, routed_base, routed_layer, routed_model, swap, unswap


def enable_dynamic_routing(model: nn.Module, policy: object, *, budget: float | None = None) -> nn.Module:
    """Route the layers of a pretrained decoder-only model, in place, and return it.

    model: the one you call, and whose `generate` you call: with only the inner base model routed, `generate` of the
    outer model cannot tell prompt from draft and answer tokens. A PEFT or compiled wrapper is looked through.
    policy: a router checkpoint (folder, bundled name or hub id), `LayerRouters`, a path [L], a plan [B][L], or any
    `RoutingPolicy`.
    budget: the mean share of the dense model's visits to pay, for policies that keep one (0.8 for 80 %); it is set on
    the policy itself.

    Raises before anything has changed: TypeError for something that is no policy; ValueError for a path or a
    checkpoint that does not fit the model, and if routing is on already; OSError for a checkpoint that cannot be read;
    NotImplementedError for a model that cannot be routed exactly.
    """
    top = unwrap(model)
    decoder = routable_decoder(top)
    if hasattr(decoder, "_drllm_routing"):
        raise ValueError(
            "dynamic routing is on already for this model; change paths with model.routing.using(plan) or "
            "model.routing.budget, or call model.disable_dynamic_routing() first"
        )
    policy = as_policy(policy)
    num_layers = len(decoder.layers)
    if hasattr(policy, "bind"):
        policy.bind(top)
    if budget is not None:
        set_budget(policy, budget)
    original = decoder.config._attn_implementation
    if original.startswith(PREFIX):
        raise ValueError(
            "another routed model shares this model's config object; give this one a config of its own (model.config = "
            "copy.deepcopy(config) before it is built), or disable routing there first"
        )
    routing = Routing(policy, num_layers, sliding_windows(decoder), register(original))
    seams = [*((layer, routed_layer) for layer in decoder.layers), (decoder, routed_base)]
    seams += [(top, routed_model)] if top is not decoder else []

    with ExitStack() as undo:
        for index, (module, recipe) in enumerate(seams):
            swap(module, recipe, routing, index)
            undo.callback(unswap, module)
        decoder.config._attn_implementation = PREFIX + original
        undo.pop_all()
    routing.modules = [module for module, _ in seams]
    return model


def disable_dynamic_routing(model: nn.Module) -> nn.Module:
    """Undo `enable_dynamic_routing`: the model is bit-equal to what it was.

    ValueError if routing is not on; RuntimeError, before anything has changed, if a module's class was since."""
    decoder = decoder_of(model)
    if not hasattr(decoder, "_drllm_routing"):
        raise ValueError("dynamic routing is not on for this model")
    modules = decoder._drllm_routing.modules
    for module in modules:
        check_swapped(module)
    for module in modules:
        unswap(module)
    name = decoder.config._attn_implementation
    if name.startswith(PREFIX):  # else somebody has set another since
        decoder.config._attn_implementation = name.removeprefix(PREFIX)
    return model
