"""Methods inside transformers' Trainer do what they do in a loop written by hand."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tulle.methods.train.masks import HeldMasks
from tulle.methods.train.method import TrainingMethod, target_linears
from tulle.methods.train.squarehead import SquareHead
from tulle.methods.train.top_kast import TopKAST
from tulle.training.callback import STATE_FILE, MethodCallback

STEPS = 4


def model(seed: int = 0, prune: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    found = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    if prune:
        with torch.no_grad():
            for linear in target_linears(found).values():
                linear.weight.mul_(torch.rand_like(linear.weight) < 0.5)
    return found


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 40, (STEPS * 2, 12), generator=generator)]


def by_trainer(folder, trained: LlamaForCausalLM, *methods: TrainingMethod, resume=None, **settings) -> None:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01, weight_decay=0.1,
        lr_scheduler_type="constant", max_grad_norm=0, report_to=[], use_cpu=True, optim="adamw_torch",
        disable_tqdm=True, seed=0, logging_strategy="no", **({"save_strategy": "no"} | settings),
    )  # fmt: skip
    trainer = Trainer(model=trained, args=arguments, train_dataset=rows(), callbacks=[MethodCallback(*methods)])
    trainer._get_train_sampler = lambda *_: None  # in order, as the loop below
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def by_hand(trained: LlamaForCausalLM, *methods: TrainingMethod) -> None:
    for method in methods:
        method.prepare(trained, STEPS)
    # The Trainer's groups: all but norms decay, TopKAST's values too.
    norms = [p for name, p in trained.named_parameters() if "norm" in name]
    others = [p for name, p in trained.named_parameters() if "norm" not in name]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    data = rows()
    hidden = any(method.hidden_states for method in methods)
    for step in range(STEPS):
        pair = data[2 * step : 2 * step + 2]
        batch = {key: torch.stack([row[key] for row in pair]) for key in pair[0]}
        outputs = trained(**batch, output_hidden_states=hidden)
        loss = outputs.loss
        for method in methods:
            loss = loss + sum(method.loss_terms(batch, outputs).values())
        optimizer.zero_grad()
        loss.backward()
        for method in methods:
            method.after_backward(step)
        optimizer.step()
        for method in methods:
            method.after_step(step, [optimizer])
    for method in methods:
        method.finish()


@pytest.mark.parametrize("kind", ["held masks and a teacher", "top_kast"])
def test_trainer_equals_a_loop_written_by_hand(tmp_path, kind):
    def methods():
        if kind == "top_kast":
            return [TopKAST(refresh=2, penalty=0.01)]
        return [HeldMasks(), SquareHead(kl=0.5).teach(model(9))]

    first, second = model(prune=kind != "top_kast"), model(prune=kind != "top_kast")
    zeros = {name: linear.weight == 0 for name, linear in target_linears(first).items()}
    by_trainer(tmp_path, first, *methods())
    by_hand(second, *methods())
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        # Equal arithmetic; the Trainer adds the terms of its loss in another order.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    if kind != "top_kast":
        assert all((linear.weight[zeros[name]] == 0).all() for name, linear in target_linears(first).items())


class Counter(TrainingMethod):
    """Counts its steps."""

    steps_seen = 0

    def after_step(self, step, optimizers):
        self.steps_seen += 1

    def state(self):
        return {"seen": torch.tensor(self.steps_seen)}

    def load_state(self, state):
        self.steps_seen = int(state["seen"])


def test_a_resumed_trainer_puts_the_state_of_each_method_back(tmp_path):
    by_trainer(tmp_path, model(), HeldMasks(), Counter(), save_strategy="steps", save_steps=3)
    resumed = Counter()
    by_trainer(tmp_path, model(), HeldMasks(), resumed, resume=tmp_path / "checkpoint-3")
    assert resumed.steps_seen == STEPS


def test_state_travels_with_the_checkpoints_of_the_trainer(tmp_path):
    trained = model()
    method = HeldMasks()
    by_trainer(tmp_path, trained, method, save_strategy="steps", save_steps=2)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "checkpoint-2" / STATE_FILE)
    assert {f"0.{name}" for name in method.masks} == set(tensors)
