"""Dr.LLM's routers: for each block a small perceptron that reads the prompt and chooses skip, execute or repeat.

All routers of a model are four stacked tensors, so that a checkpoint is one small file and layer l is one slice. What
they compute is in `drllm_fast.router_reference`; how a checkpoint folder looks is in `drllm_fast.router_files`.

After Dr.LLM (arXiv 2510.12773): two linear layers, 128 wide, GELU in its tanh form, Xavier-uniform weights, zero
biases, and at inference a knob from -1 to 1.
"""

from __future__ import annotations

import math
import os
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from drllm_fast import fingerprint, ops, router_files
from drllm_fast.budget import BudgetTable
from drllm_fast.decoder import decoder_of, unwrap
from drllm_fast.guard import Guard, row_means
from drllm_fast.policies import PromptBatch
from drllm_fast.router_reference import CLASSES, EXECUTE, REPEAT, SKIP, decide

FREE = (0.0, 0.0, 0.0)  # costs of the classes
PURE_ROUTER = -0.5  # the knob's position at which the routers alone decide

# What the knob blends, by position. Between two neighbours the probabilities are mixed linearly.
KNOB_ANCHORS = ((-1.0, SKIP), (PURE_ROUTER, None), (0.5, EXECUTE), (1.0, REPEAT))


def choose(logits: Tensor, knob: float = PURE_ROUTER) -> Tensor:
    """Decisions int8 [B] from logits [B, 3]: the most probable class after the knob's blend.

    Skip and repeat must be strictly the most probable: every tie executes the block, as the dense model would.

    The blend is p' = (1 - t) p_left + t p_right of the two neighbouring anchors: all skip at -1, the softmax of the
    logits at -0.5, all execute at 0.5, all repeat at 1. An anchor that holds half of the mass wins, so that everything
    is skipped below -0.75, executed from 0 to 0.75, repeated above; the routers have a say between -0.75 and 0.
    """
    scores = logits.float()
    if knob != PURE_ROUTER:
        right = next(i for i, (position, _) in enumerate(KNOB_ANCHORS) if i and knob <= position)
        (start, left_class), (stop, right_class) = KNOB_ANCHORS[right - 1 : right + 1]
        t = (knob - start) / (stop - start)
        scores = (1 - t) * _anchor(scores, left_class) + t * _anchor(scores, right_class)
    return decide(scores)


def _anchor(logits: Tensor, one_class: int | None) -> Tensor:
    if one_class is None:
        return logits.softmax(dim=-1)
    certain = torch.zeros_like(logits)
    certain.select(-1, one_class).fill_(1)
    return certain


def _check_finite(logits: Tensor, layer: int) -> None:
    # No NaN or infinity of a window gets lost on the way to the logits: 0 * inf and gelu(-inf) are NaN.
    if not math.isfinite(sum(map(sum, logits.tolist()))):
        rows = [row for row, fine in enumerate(logits.isfinite().all(dim=1).tolist()) if not fine]
        raise ValueError(
            f"layer {layer}: the hidden states of rows {rows[:8]} are not finite, or overflow in the router; look "
            "for NaN in the model's weights or inputs, and use bfloat16 or float32 if the model overflows float16"
        )


def model_name(model: nn.Module) -> str:
    """A transformers model's hub id, the last part of the folder that it was loaded from, or its type."""
    name = str(getattr(unwrap(model), "name_or_path", "") or decoder_of(model).config.model_type)
    if os.path.isdir(name) or os.path.isabs(name):
        name = Path(name).resolve().name  # where it lay on this machine is nobody's business
    return name


class LayerRouters(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="drllm-fast",
    tags=["dr-llm", "dynamic-depth", "layer-routing"],
    pipeline_tag="text-generation",
    paper_url="https://arxiv.org/abs/2510.12773",
    model_card_template=router_files.CARD,
):
    """The routers of all layers of one model, and the policy that asks them.

    w1 [L, h, d], b1 [L, h], w2 [L, 3, h], b2 [L, 3], fp32: L layers, h the width of a router, d the hidden size.

    num_layers, hidden_size   L and d of the base model
    router_size, windows      h, and into how many windows a prompt is pooled at most
    knob                      see the property
    base_model                {"name": str, "fingerprint": dict} of the model they were trained on; `bind` compares it.
                              None: only L and d are compared
    calibration               a BudgetTable, or what its `to_dict` gives: which penalty keeps which budget
    margin                    see the property
    guard                     a Guard: prompts unlike those it knows run every block once, whatever the routers say
    training_set, grader      what is known of the training, for the checkpoint's config and card: the hash of the
                              training set, who judged the answers
    generator                 for the initial weights

    Raises TypeError or ValueError.
    """

    _knob: float
    _margin: float
    _budget: float | None
    _penalty: float  # set by hand
    _of_budget: float | None  # the penalty that the budget asks for
    _calibration: BudgetTable | None
    _cost: tuple[tuple[float, float, float], torch.device, Tensor] | None  # the last costs, as a tensor

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        router_size: int = 128,
        windows: int = 8,
        knob: float = PURE_ROUTER,
        base_model: dict[str, Any] | None = None,
        calibration: BudgetTable | dict[str, Any] | None = None,
        margin: float = 0.0,
        guard: Guard | None = None,
        training_set: str | None = None,
        grader: str | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self._hub_mixin_config = None  # the mixin's copy of these arguments, which would not follow later changes
        sizes = {
            "num_layers": num_layers, "hidden_size": hidden_size, "router_size": router_size, "windows": windows
        }  # fmt: skip
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        known = isinstance(base_model, dict) and {"name", "fingerprint"} <= base_model.keys()
        if base_model is not None and not known:
            raise ValueError(f"base_model must be None or a dict with name and fingerprint, got {base_model!r:.80}")
        self.num_layers, self.hidden_size = num_layers, hidden_size
        self.router_size, self.windows = router_size, windows
        self._budget, self._of_budget, self._penalty, self._cost = None, None, 0.0, None
        self.knob = knob
        self.margin = margin
        self.base_model = base_model
        self.calibration = calibration
        self.guard = guard
        self.training_set, self.grader = training_set, grader

        self.w1 = nn.Parameter(torch.empty(num_layers, router_size, hidden_size, dtype=torch.float32))
        self.b1 = nn.Parameter(torch.empty(num_layers, router_size, dtype=torch.float32))
        self.w2 = nn.Parameter(torch.empty(num_layers, CLASSES, router_size, dtype=torch.float32))
        self.b2 = nn.Parameter(torch.empty(num_layers, CLASSES, dtype=torch.float32))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Xavier-uniform weights, layer by layer, and zero biases."""
        for weight in (*self.w1, *self.w2):
            nn.init.xavier_uniform_(weight, generator=generator)
        nn.init.zeros_(self.b1)
        nn.init.zeros_(self.b2)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        router_size: int = 128,
        windows: int = 8,
        generator: torch.Generator | None = None,
    ) -> LayerRouters:
        """Untrained routers that fit a transformers model and carry its name and fingerprint.

        Raises NotImplementedError for a model without
        a list of decoder layers.
        """
        decoder = decoder_of(model)
        return cls(
            num_layers=len(decoder.layers),
            hidden_size=decoder.config.hidden_size,
            router_size=router_size,
            windows=windows,
            base_model={"name": model_name(model), "fingerprint": fingerprint.fingerprint(model)},
            generator=generator,
        )

    @property
    def knob(self) -> float:
        """From -1 (skip everything) over -0.5 (the routers as trained) and 0.5 (execute everything) to 1 (repeat
        everything); `choose` says what lies between. TypeError or ValueError when set to anything else."""
        return self._knob

    @knob.setter
    def knob(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"knob must be a number from -1 to 1, got {value!r}")
        if not -1 <= value <= 1:  # NaN, too
            raise ValueError(
                f"knob must be from -1 (all skip) over -0.5 (routers alone) to 1 (all repeat), got {value}"
            )
        if value != PURE_ROUTER and self._budget is not None:
            raise ValueError(f"knob {value} and budget {self._budget} exclude each other; set budget = None first")
        self._knob = float(value)

    @property
    def calibration(self) -> BudgetTable | None:
        """Which penalty keeps which budget; without it no budget can be set. ValueError when set to what is none."""
        return self._calibration

    @calibration.setter
    def calibration(self, table: BudgetTable | dict[str, Any] | None) -> None:
        table = table if table is None or isinstance(table, BudgetTable) else BudgetTable.from_dict(table)
        budget = None if table is None else self._budget
        of_budget = None if budget is None else table.penalty(budget)
        self._calibration, self._budget, self._of_budget = table, budget, of_budget

    @property
    def budget(self) -> float | None:
        """The mean share of the dense model's visits to pay, from `calibration`; None (the default): no penalty.

        When set: TypeError for what is no number; ValueError for routers that are not calibrated, for a budget outside
        their table, and beside a knob other than -0.5."""
        return self._budget

    @budget.setter
    def budget(self, value: float | None) -> None:
        if value is None:
            self._budget, self._of_budget = None, None
            return
        if self.knob != PURE_ROUTER:
            raise ValueError(f"budget {value} and knob {self.knob} exclude each other; set knob = -0.5 first")
        if self.calibration is None:
            raise ValueError(
                "these routers have no table of budgets; make one with drllm-fast calibrate, or "
                "drllm_fast.training.calibrate"
            )
        of_budget = self.calibration.penalty(value)
        self._budget, self._of_budget = float(value), of_budget

    @property
    def penalty(self) -> float:
        """What each visit costs, in logits: what the budget asks for, without a budget what was set here (0 at first;
        below 0 where visits are to be more than the routers choose). TypeError or ValueError when set to what is no
        finite number, and beside a budget."""
        return self._penalty if self._of_budget is None else self._of_budget

    @penalty.setter
    def penalty(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"penalty must be a number, the cost of a visit in logits, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"penalty must be a finite number, the cost of a visit in logits, got {value}")
        if self._budget is not None:
            raise ValueError(f"penalty {value} and budget {self._budget} exclude each other; set budget = None first")
        self._penalty = float(value)

    @property
    def margin(self) -> float:
        """By how many logits skip or repeat must beat execute, 0 or more: deviate only when sure. A table of budgets
        holds for the margin it was made with. TypeError or ValueError when set to anything else."""
        return self._margin

    @margin.setter
    def margin(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"margin must be a number of 0 or more, got {value!r}")
        if not 0 <= value < math.inf:
            raise ValueError(f"margin must be a number of 0 or more, got {value}")
        self._margin = float(value)

    @property
    def costs(self) -> tuple[float, float, float]:
        """What is subtracted from the logits of skip, execute and repeat before the largest one is taken."""
        margin, penalty = self.margin, self.penalty
        return margin, penalty, margin + 2 * penalty

    # -- the policy ---------------------------------------------------------------------------------------------------
    def bind(self, model: nn.Module) -> None:
        """ValueError unless the routers fit `model`: number of layers, hidden size, and base model if it is known."""
        decoder = decoder_of(model)
        given = (len(decoder.layers), decoder.config.hidden_size)
        advice = "load the model that they were trained on, or make new ones with LayerRouters.for_model"
        if given != (self.num_layers, self.hidden_size):
            raise ValueError(
                f"these routers are for {self.num_layers} layers of hidden size {self.hidden_size}, the model has "
                f"{given[0]} of {given[1]}; {advice}"
            )
        if self.base_model is None:
            return
        try:
            fingerprint.check(model, self.base_model["fingerprint"])
        except ValueError as error:
            raise ValueError(
                f"these routers are for {self.base_model['name']!r}: {error}. Either {advice}; to use them on another "
                "model at your own risk, set routers.base_model = None"
            ) from error

    def logits(self, layer: int, prompts: PromptBatch) -> Tensor:
        """fp32 [B, 3] for the block `layer` from 0: one row for each prompt, the classes skip, execute and repeat.

        The routers move to the device of layer 0's hidden states; for a layer on another device its slice is copied.
        Differentiable. Raises ValueError for a layer there is not, for hidden states of another size, and
        for values that are not finite, naming layer and rows.
        """
        logits, _ = self._decide(layer, prompts, FREE)
        _check_finite(logits, layer)
        return logits

    def _decide(self, layer: int, prompts: PromptBatch, costs: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        """Logits less the costs, and decisions."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        hidden, cu_seqlens = prompts.hidden, prompts.cu_seqlens
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(f"hidden must be [P, {self.hidden_size}], got {list(hidden.shape)}")
        # This runs once a block while a prompt is read, so that microseconds count: parameters are taken from where
        # nn.Module keeps them, and the op is called without the checks of its public function.
        if layer == 0 and self._parameters["w1"].device != hidden.device:
            with torch.inference_mode(False):  # parameters moved in inference mode could not be trained any more
                self.to(hidden.device)
        w1, b1, w2, b2 = (p[layer] for p in self._parameters.values())
        if w1.device != hidden.device:
            w1, b1, w2, b2 = (w.to(hidden.device) for w in (w1, b1, w2, b2))
        cost = self._on_device(costs, b2.device)
        if cu_seqlens.dtype != torch.int32 or hidden.dtype == torch.float64:
            return ops.router(hidden, cu_seqlens, w1, b1, w2, b2, windows=self.windows, cost=cost)
        return torch.ops.drllm_fast.router.default(hidden, cu_seqlens, w1, b1, w2, b2, cost, self.windows)

    def _on_device(self, costs: tuple[float, float, float], device: torch.device) -> Tensor:
        known = self._cost  # another thread may replace it
        if known is None or known[:2] != (costs, device):
            with torch.inference_mode(False):  # `logits` may be differentiated with it
                known = self._cost = costs, device, torch.tensor(costs, dtype=torch.float32, device=device)
        return known[2]

    def route(self, layer: int, prompts: PromptBatch) -> Tensor:
        """int8 [B] on the CPU, for each prompt whether block `layer` is skipped (0), executed (1) or repeated (2)."""
        if torch.is_inference_mode_enabled():
            return self._route(layer, prompts)
        with torch.inference_mode():
            return self._route(layer, prompts)

    def _route(self, layer: int, prompts: PromptBatch) -> Tensor:
        logits, decisions = self._decide(layer, prompts, self.costs)
        elsewhere = not logits.is_cpu
        if elsewhere:  # one copy, for each waits for the device; the decisions follow from it
            logits = logits.cpu()
        _check_finite(logits, layer)
        if elsewhere or self.knob != PURE_ROUTER:
            decisions = choose(logits, self.knob)
        if self.guard is not None:
            if layer == 0:
                prompts.memory["guarded"] = self._guarded(prompts)
            elif "guarded" not in prompts.memory:
                raise ValueError(
                    f"layer {layer} was asked before layer 0, and the guard reads what enters layer 0; ask layer 0 of "
                    "these prompts first and keep their memory, or set routers.guard = None"
                )
            decisions = decisions.masked_fill(prompts.memory["guarded"], EXECUTE)
        return decisions

    def _guarded(self, prompts: PromptBatch) -> Tensor:
        """bool [B] on the CPU."""
        guard = self.guard = self.guard.to(prompts.hidden.device)
        return guard.unlike(row_means(prompts.hidden, prompts.cu_seqlens)).cpu()

    def extra_repr(self) -> str:
        base = "any" if self.base_model is None else repr(self.base_model["name"])
        return (
            f"num_layers={self.num_layers}, hidden_size={self.hidden_size}, router_size={self.router_size}, "
            f"windows={self.windows}, knob={self.knob}, budget={self.budget}, base_model={base}"
        )

    # -- checkpoints --------------------------------------------------------------------------------------------------
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: None = None, **kwargs: Any
    ) -> str | None:
        """Write `config.json`, `routers.safetensors` and, unless there is one, a card `README.md` into a folder.

        repo_id, push_to_hub, model_card_kwargs and the arguments of push_to_hub are those of huggingface_hub's
        ModelHubMixin. `config` is there for its sake and must be None: the config is made from the routers.
        """
        if config is not None:
            raise ValueError("config is written from the routers' own attributes; set those instead")
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> LayerRouters:
        """Read a checkpoint: from a folder, else a bundled one by its name (`router_files.bundled_routers`), else from
        the Hugging Face Hub by its id. On the CPU, in evaluation mode.

        The remaining arguments are those of huggingface_hub and matter for the Hub only. Raises OSError, naming the
        file, for one that is missing or damaged or cannot be fetched; ValueError for contents that are no routers.
        """
        # Not the mixin's own: it goes on without a config, and unpickles pytorch_model.bin where there are no
        # safetensors.
        config_file, weights_file = router_files.locate(
            os.fspath(pretrained_model_name_or_path),
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        config = router_files.read_config(config_file)
        weights = router_files.read_weights(weights_file, config)
        try:  # an own generator leaves the caller's random numbers alone
            radius = config.pop("guard_radius")
            if radius is not None:
                config["guard"] = Guard(weights.pop("prototypes"), weights.pop("centre"), float(radius))
            routers = cls(**config, generator=torch.Generator())
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_file}: {error}") from error
        routers.load_state_dict(weights)
        return routers.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = self.state_dict()
        if self.guard is not None:
            weights |= {"prototypes": self.guard.prototypes, "centre": self.guard.centre}
        router_files.write(save_directory, self.settings(), weights)

    def settings(self) -> dict[str, Any]:
        """The part of config.json that varies: what builds the same routers, weights and prototypes apart."""
        settings = {name: getattr(self, name, None) for name in router_files.SETTINGS}
        settings["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        settings["guard_radius"] = None if self.guard is None else self.guard.radius
        return settings

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return router_files.card(self.settings(), self._hub_mixin_info, **kwargs)
