"""The class swaps that route a model.

Two seams, no per-family code: the base model's instance gets a subclass whose forward packs, calls the original and
unpacks; each decoder layer's instance gets one whose forward runs the layer's visits. A third, thin one is the model
itself, whose `generate` notes where the prompt ends. Subclasses keep the name of their parent, so that everything
that goes by names (FSDP, `_no_split_modules`, saving) sees the model it knows; undoing the swap leaves no trace.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType

from torch import nn

from drllm_fast.active import ACTIVE
from drllm_fast.base_forward import base_forward
from drllm_fast.executor import RoutedForward
from drllm_fast.routing import Routing
from drllm_fast.settings import changed, current, mark


def routed_layer(original: type) -> dict:
    @functools.wraps(original.forward)
    def forward(self, hidden_states, *args, **kwargs):
        run: RoutedForward | None = ACTIVE.get()
        if run is None or run.owner is not self._drllm_routing:
            return original.forward(self, hidden_states, *args, **kwargs)
        return run.run_layer(self, original.forward, hidden_states, *args, **kwargs)

    return {"forward": forward}


def routed_base(original: type) -> dict:
    parameters = inspect.signature(original.forward).parameters.values()
    names = [p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        if args:  # families differ in the order of their arguments
            given = dict(zip(names, args, strict=False))
            if twice := given.keys() & kwargs.keys():
                raise TypeError(f"{type(self).__name__}.forward() got multiple values for {', '.join(sorted(twice))}")
            kwargs = {**given, **kwargs}
        run = ACTIVE.get()
        if run is not None and run.takes_base and run.owner is self._drllm_routing:
            return run.run_base(functools.partial(original.forward, self), **kwargs)
        return base_forward(self._drllm_routing, self, functools.partial(original.forward, self), **kwargs)

    return {"forward": forward, "routing": property(lambda self: self._drllm_routing)}


def routed_model(original: type) -> dict:
    """`generate` notes where the prompt ends. (A model with another head has no `generate`.)"""
    seam = {"routing": property(lambda self: self._drllm_routing)}
    if not hasattr(original, "generate"):
        return seam

    @functools.wraps(original.generate)
    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        routing = self._drllm_routing
        if not current(routing).disabled:
            _check_generation(kwargs, generation_config, self.generation_config)
        prompt = next(
            (x for x in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if x is not None), None
        )
        columns = 1 if prompt is None else prompt.shape[1]  # without a prompt, generate starts from one BOS token
        with changed(routing, prompt_columns=columns, count_positions=kwargs.get("position_ids") is None):
            return original.generate(self, inputs, generation_config, *args, **kwargs)

    @functools.wraps(original.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = original.prepare_inputs_for_generation(self, *args, **kwargs)
        mark(self._drllm_routing)
        return inputs

    def unless_routed(name):
        def method(self, *args, **kwargs):
            if not current(self._drllm_routing).disabled:
                _no_continuous_batching()
            return getattr(original, name)(self, *args, **kwargs)

        return functools.wraps(getattr(original, name))(method)

    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    seam |= {"generate": generate, "prepare_inputs_for_generation": prepare_inputs_for_generation}
    return seam | {name: unless_routed(name) for name in names if hasattr(original, name)}


def _check_generation(kwargs: dict, *configs: object) -> None:
    """`generate` options that would run and be wrong."""

    def option(name):
        values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    if (chunk := option("prefill_chunk_size")) is not None:
        raise NotImplementedError(
            f"prefill_chunk_size={chunk}: a routed model decides a path from the whole prompt; leave it unset"
        )
    if option("cache_implementation") == "paged":
        _no_continuous_batching()


def _no_continuous_batching():
    raise NotImplementedError(
        "continuous batching is not supported by a routed model: its paged cache has no slot per visit; use "
        "model.generate, or the dense model after model.disable_dynamic_routing()"
    )


_RECIPES = {recipe.__name__: recipe for recipe in (routed_layer, routed_base, routed_model)}


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


def swap(module: nn.Module, recipe: Callable[[type], dict], routing: Routing, index: int) -> None:
    """Give the module a routed subclass of its own class. `index`: of a layer, its number."""
    cls = type(module)
    routed = _subclass(cls, recipe.__name__)
    module.__class__ = routed  # first: if it is refused, nothing has changed
    module._drllm_routing, module._drllm_layer = routing, index
    _point_hooks(module, cls.forward, routed.forward)


def unswap(module: nn.Module) -> None:
    routed = type(module)
    module.__class__ = routed._drllm_original
    del module._drllm_routing, module._drllm_layer
    _point_hooks(module, routed.forward, type(module).forward)


def check_swapped(module: nn.Module) -> None:
    if "_drllm_original" not in vars(type(module)):
        raise RuntimeError(
            f"the class of {type(module).__name__} was changed while routing was on (by FSDP, for one); undo that first"
        )


def _point_hooks(module: nn.Module, old, new) -> None:
    """accelerate's hooks shadow a module's forward and keep the one they wrap in `_old_forward`: swap that, too."""
    for name in ("_old_forward", "forward"):
        bound = module.__dict__.get(name)
        if isinstance(bound, MethodType) and bound.__func__ is old:
            module.__dict__[name] = MethodType(new, module)
