"""Turning routing on and off: what can be routed, and the class swaps that do it.

Two seams, no per-family code: the base model's instance gets a subclass whose forward packs, calls the original and
unpacks; each decoder layer's instance gets one whose forward runs the layer's visits. A third, thin one is the model
itself, whose `generate` notes where the prompt ends. Subclasses keep the name of their parent, so that everything
that goes by names (FSDP, `_no_split_modules`, saving) sees the model it knows; undoing the swap leaves no trace.
"""

from __future__ import annotations

import functools
import inspect
from types import MethodType

from torch import nn

from drllm_fast.active import ACTIVE
from drllm_fast.attention import PREFIX, register
from drllm_fast.base_forward import base_forward
from drllm_fast.decoder import decoder_of, routable_decoder, sliding_windows, unwrap
from drllm_fast.executor import RoutedForward
from drllm_fast.policies import as_policy
from drllm_fast.routing import Routing, set_budget
from drllm_fast.settings import changed


def enable_dynamic_routing(model: nn.Module, policy: object, *, budget: float | None = None) -> nn.Module:
    """Route the layers of a pretrained decoder-only model, in place, and return it.

    policy: a router checkpoint (folder or hub id), `LayerRouters`, a path [L], a plan [B][L], or any `RoutingPolicy`.
    budget: the mean share of the dense model's visits to pay, for policies that keep one (0.8 for 80 %).

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
    routing = Routing(policy, num_layers, sliding_windows(decoder), register(original))

    decoder.config._attn_implementation = PREFIX + original
    for index, layer in enumerate(decoder.layers):
        layer._drllm_layer = index
        _swap(layer, _routed_layer, routing)
    _swap(decoder, _routed_base, routing)
    if top is not decoder:
        _swap(top, _routed_model, routing)
    return model


def disable_dynamic_routing(model: nn.Module) -> nn.Module:
    """Undo `enable_dynamic_routing`: the model is bit-equal to what it was. ValueError if routing is not on."""
    top = unwrap(model)
    decoder = decoder_of(top)
    if not hasattr(decoder, "_drllm_routing"):
        raise ValueError("dynamic routing is not on for this model")
    for module in {id(m): m for m in (*decoder.layers, decoder, top)}.values():
        _unswap(module)
    for layer in decoder.layers:
        del layer._drllm_layer
    name = decoder.config._attn_implementation
    if name.startswith(PREFIX):  # else somebody has set another since
        decoder.config._attn_implementation = name.removeprefix(PREFIX)
    return model


# -- class swaps
def _routed_layer(original: type) -> dict:
    @functools.wraps(original.forward)
    def forward(self, hidden_states, *args, **kwargs):
        run: RoutedForward | None = ACTIVE.get()
        if run is None or run.owner is not self._drllm_routing:
            return original.forward(self, hidden_states, *args, **kwargs)
        return run.run_layer(self, original.forward, hidden_states, *args, **kwargs)

    return {"forward": forward}


def _routed_base(original: type) -> dict:
    names = [name for name in inspect.signature(original.forward).parameters if name != "self"]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if args:  # families differ in the order of their arguments
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return base_forward(self._drllm_routing, self, functools.partial(original.forward, self), **kwargs)

    return {"forward": forward, "routing": property(lambda self: self._drllm_routing)}


def _routed_model(original: type) -> dict:
    @functools.wraps(original.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        chunk = kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None))
        if chunk is None:
            chunk = getattr(self.generation_config, "prefill_chunk_size", None)
        if chunk is not None:
            raise NotImplementedError(
                f"prefill_chunk_size={chunk}: a routed model decides a path from the whole prompt; leave it unset"
            )
        if kwargs.get("cache_implementation", getattr(generation_config, "cache_implementation", None)) == "paged":
            _no_continuous_batching()
        prompt = next(
            (x for x in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if x is not None), None
        )
        columns = 1 if prompt is None else prompt.shape[1]  # without a prompt, generate starts from one BOS token
        own = kwargs.get("position_ids") is None
        with changed(self._drllm_routing, prompt_columns=columns, count_positions=own):
            return original.generate(self, inputs, generation_config, *args, **kwargs)

    def refused(self, *args, **kwargs):
        _no_continuous_batching()

    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    return {
        "generate": generate,
        "routing": property(lambda self: self._drllm_routing),
        **{name: refused for name in names if hasattr(original, name)},
    }


def _no_continuous_batching():
    raise NotImplementedError(
        "continuous batching is not supported by a routed model: its paged cache has no slot per visit; use "
        "model.generate, or the dense model after model.disable_dynamic_routing()"
    )


_RECIPES = {recipe.__name__: recipe for recipe in (_routed_layer, _routed_base, _routed_model)}


@functools.cache
def _subclass(original: type, recipe: str) -> type:
    made = type(
        original.__name__, (original,), {"__module__": original.__module__, "__qualname__": original.__qualname__}
    )
    # After the class exists: transformers wraps the forward of a layer's subclass when it is made.
    for name, value in _RECIPES[recipe](original).items():
        setattr(made, name, value)
    made._drllm_original, made.__reduce_ex__ = original, _reduce
    made._drllm_recipe = recipe
    return made


def _reduce(self, protocol):
    # Pickle looks a class up by its name and would find the original: rebuild the subclass on the other side.
    return _rebuild, (self._drllm_original, self._drllm_recipe), self.__dict__


def _rebuild(original: type, recipe: str) -> nn.Module:
    cls = _subclass(original, recipe)
    return cls.__new__(cls)


def _swap(module: nn.Module, recipe, routing: Routing) -> None:
    cls = type(module)
    module._drllm_routing = routing
    module.__class__ = _subclass(cls, recipe.__name__)
    _point_hooks(module, cls.forward, type(module).forward)


def _unswap(module: nn.Module) -> None:
    routed = type(module)
    module.__class__ = routed._drllm_original
    del module._drllm_routing
    _point_hooks(module, routed.forward, type(module).forward)


def _point_hooks(module: nn.Module, old, new) -> None:
    """accelerate's hooks shadow a module's forward and keep the one they wrap in `_old_forward`: swap that, too."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is old:
            module.__dict__[name] = MethodType(new, module)
