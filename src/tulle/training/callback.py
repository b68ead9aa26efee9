"""Training methods inside transformers' ``Trainer``: ``Trainer(..., callbacks=[MethodCallback(HeldMasks())])``.

The Trainer fixes two things that our own loop does otherwise: it clips gradients before it calls back, so that the norm
counts what a method would have masked, and a loss term is added to the model's own loss by wrapping its ``forward``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tulle.methods.train.method import TrainingMethod

STATE_FILE = "training_methods.safetensors"


class MethodCallback(TrainerCallback):
    """Runs training methods at the Trainer's events; their state goes into its checkpoints.

    ``steps``: optimizer steps of the whole training, for methods with a schedule (default: ``args.max_steps``).
    """

    def __init__(self, *methods: TrainingMethod, steps: int | None = None):
        self.methods, self.steps = methods, steps

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        for method in self.methods:
            method.prepare(model, self.steps or max(args.max_steps, 0))
        if any(type(method).loss_terms is not TrainingMethod.loss_terms for method in self.methods):
            self._wrap(model)

    def _wrap(self, model: nn.Module) -> None:
        forward = model.forward
        hidden = any(method.hidden_states for method in self.methods)

        @functools.wraps(forward)  # the Trainer reads the signature to choose columns
        def with_terms(*arguments: Any, **inputs: Any) -> Any:
            if not model.training:
                return forward(*arguments, **inputs)
            outputs = forward(*arguments, **inputs | ({"output_hidden_states": True} if hidden else {}))
            if outputs.loss is not None:
                given = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
                for method in self.methods:
                    for term in method.loss_terms(given, outputs).values():
                        outputs.loss = outputs.loss + term
            return outputs

        self._forward = forward
        model.forward = with_terms

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE
        if state.global_step and file.is_file():
            tensors = load_file(file)
            for number, method in enumerate(self.methods):
                prefix = f"{number}."
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                method.load_state(own)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for method in self.methods:
            method.after_backward(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        for method in self.methods:
            method.after_step(state.global_step, [inner])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        tensors = {
            f"{number}.{name}": tensor.contiguous()
            for number, method in enumerate(self.methods)
            for name, tensor in method.state().items()
        }
        if tensors:
            save_file(tensors, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for method in self.methods:
            method.finish()
        if hasattr(self, "_forward"):
            del kwargs["model"].forward
