"""The second-order estimate of what changes cost: against measured divergences, counted passes, resuming."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn

from random_decoders import plain_model, random_config, reference_model
from random_families import family_config, saved_model
from tulle.core.hessian import Hessian
from tulle.core.topk import Selection, top_k
from tulle.core.trials import Key
from tulle.models.checkpoint import Checkpoint
from tulle.models.decoder import DecoderBlock, PlainDecoder
from tulle.models.description import describe, expert_role
from tulle.models.fisher import divergences, kronecker_cost
from tulle.models.hub import local_folder

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Texts:
    tokens: Tensor
    valid: Tensor


def small_model(layers: int = 3) -> PlainDecoder:
    config = random_config("llama", 0) | {"num_hidden_layers": layers, "hidden_act": "silu", "rms_norm_eps": 1e-5}
    return plain_model(config, reference_model(config, 5, scale=0.5))


def hybrid_model() -> PlainDecoder:
    """A gated delta net and a layer of attention, whose q gives a gate besides."""
    config = family_config("qwen3_5_text", 2)
    return plain_model(config, reference_model(config, 5, scale=0.5))


def mixture_model() -> PlainDecoder:
    """Experts with a shared one that has a gate, one of them in memory at a time."""
    config = family_config("qwen2_moe", 1) | {"mlp_only_layers": [], "norm_topk_prob": False, "num_experts_per_tok": 2}
    with TemporaryDirectory() as folder:
        whole = saved_model(reference_model(config, 5, scale=0.5), Path(folder))
        layers = whole.decoder.layers
        tensors = [whole.block(index).state_dict() for index in range(len(layers))]

    def read(index: int, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensors[index][name] for name in names}

    return PlainDecoder(
        whole.decoder,
        lambda index: read(index, layers[index].tensors_without_experts()),
        whole._outer,
        read_expert=lambda index, expert: read(index, layers[index].tensors(expert)),
    )


def whole_block(model: PlainDecoder, index: int) -> DecoderBlock:
    """With all of its experts."""
    block = model.block(index)
    for expert in block.layer.experts:
        assert model.read_expert is not None
        block.hold(expert.index, model.read_expert(index, expert.index))
    return block


def texts(count: int, length: int, seed: int = 0) -> list[Texts]:
    tokens = torch.randint(0, 40, (count, length), generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(count, length, dtype=torch.bool)
    if length > 4:
        valid[::2, length - 3 :] = False
    half = count // 2
    return [Texts(tokens[:half], valid[:half]), Texts(tokens[half:], valid[half:])]


def changed_weights(model: PlainDecoder, size: float) -> Callable[[int], dict[Key, dict[str, Tensor]]]:
    """Of a block's number: every linear with noise of ``size`` times its own standard deviation."""

    def replaced(index: int) -> dict[Key, dict[str, Tensor]]:
        found: dict[Key, dict[str, Tensor]] = {}
        for number, (name, weight) in enumerate(whole_block(model, index).state_dict().items()):
            if weight.ndim == 2:
                generator = torch.Generator().manual_seed(100 * index + number)
                noise = torch.randn(weight.shape, generator=generator)
                found[index, name] = {name: weight + size * weight.std() * noise}
        return found

    return replaced


def measured(model: PlainDecoder, batches: Sequence[Texts], index: int, change: Callable[[DecoderBlock], Any]) -> float:
    """Mean KL divergence of the model with a block changed, nats per token."""

    class Whole(PlainDecoder):
        def block(self, at: int) -> DecoderBlock:
            return whole_block(model, at)

    class Changed(Whole):
        def block(self, at: int) -> DecoderBlock:
            block = super().block(at)
            if at == index:
                change(block)
            return block

    dense, other = (kind(model.decoder, model._read_block, model._outer) for kind in (Whole, Changed))
    total, tokens = 0.0, 0
    for batch in batches:
        wanted, found = (m(batch.tokens)[batch.valid].double().log_softmax(-1) for m in (dense, other))
        total += float(nn.functional.kl_div(found, wanted, log_target=True, reduction="sum"))
        tokens += len(wanted)
    return total / tokens


def with_weights(replaced: Mapping[str, Tensor]) -> Callable[[DecoderBlock], Any]:
    return lambda block: block.load_state_dict(dict(replaced), strict=False, assign=True)


def with_selection(role: str, selection: Selection) -> Callable[[DecoderBlock], None]:
    def change(block: DecoderBlock) -> None:
        for name in block.layer.group(role).names:
            block.get_submodule(name).register_forward_pre_hook(lambda m, x: (selection.apply(x[0]),))

    return change


def test_selected_inputs_of_lone_tokens_are_exact_to_second_order() -> None:
    """Without neighbours nothing is left out but third orders and the luck of 20,000 labels."""
    model, batches = small_model(), texts(20000, 1)
    widths = {group.role: group.inputs for group in model.decoder.layers[0].groups}
    chosen = {(i, role): top_k(0.1, width) for i in range(3) for role, width in widths.items()}
    found = divergences(
        model, batches, inputs=lambda i, tensors: [((i, role), {role: chosen[i, role]}) for role in widths]
    )
    few = texts(2000, 1)
    for (index, role), selection in chosen.items():
        wanted = measured(model, few, index, with_selection(role, selection))
        assert wanted < 0.05
        assert found[index, role] == pytest.approx(wanted, rel=0.1), (index, role)


def test_selected_inputs_of_experts_are_exact_to_second_order() -> None:
    """A token's experts count together; what it loses goes through the routers that follow, too."""
    model, batches = mixture_model(), texts(8000, 1)
    experts = model.decoder.layers[0].experts
    chosen = {group.role: top_k(0.1, group.inputs) for group in experts[0].groups}
    found = divergences(
        model,
        batches,
        inputs=lambda i, tensors: [((i, role), {expert_role(role): s}) for role, s in chosen.items()],
    )

    def thinned(role: str) -> Callable[[DecoderBlock], None]:
        def change(block: DecoderBlock) -> None:
            for group in (group for expert in block.layer.experts for group in expert.groups if group.role == role):
                for name in group.names:
                    module = block.get_submodule(name)
                    module.register_forward_pre_hook(lambda m, x: (chosen[role].apply(x[0]),))

        return change

    few = texts(2000, 1)
    for index, role in found:
        wanted = measured(model, few, int(index), thinned(str(role)))
        assert found[index, role] == pytest.approx(wanted, rel=0.15), (index, role)
    assert len(found) == 4


@pytest.mark.parametrize(("make", "moves"), [(small_model, 15), (hybrid_model, 13), (mixture_model, 26)])
def test_weights_at_one_input_are_exact_to_second_order(make: Callable[[], PlainDecoder], moves: int) -> None:
    """All tokens alike: gradients and inputs are independent, and the rest is the luck of labels."""
    model = make()
    batches = [Texts(torch.full((10000, 1), 7), torch.ones(10000, 1, dtype=torch.bool))]
    replaced = changed_weights(model, 0.02)

    def weights(index: int, tensors: Mapping[str, Tensor], hessians: Mapping[str, Hessian]) -> Any:
        return ((key, change) for key, change in replaced(index).items() if change.keys() <= tensors.keys())

    found = divergences(model, batches, weights=weights)
    one = [Texts(torch.full((1, 1), 7), torch.ones(1, 1, dtype=torch.bool))]
    exact = 0
    for index in range(len(model.decoder.layers)):
        for key, change in replaced(index).items():
            if ".experts." in str(key[1]) and key not in found:
                continue  # no token goes there
            if any(name in str(key[1]) for name in ("k_proj", "in_proj_a")) or "q_proj" in str(key[1]) and moves != 13:
                # A lone token attends to itself, whatever they say, and its state has nothing to forget.
                assert found[key] == pytest.approx(0, abs=1e-10)
                continue
            wanted = measured(model, one, index, with_weights(change))
            assert found[key] == pytest.approx(wanted, rel=0.05), key
            exact += 1
    assert exact == moves


@torch.no_grad()
def test_padding_counts_for_nothing() -> None:
    model, batches = small_model(), texts(8, 12)
    other = [Texts(torch.where(b.valid, b.tokens, 3), b.valid) for b in batches]
    replaced = changed_weights(model, 0.1)
    first, second = (divergences(model, b, weights=lambda i, t, h: replaced(i).items()) for b in (batches, other))
    assert first == pytest.approx(second, rel=1e-4)


def test_several_groups_of_one_trial_are_added_before_squaring() -> None:
    """(a + b)² is neither a² + b² nor more than twice that."""
    model, batches = small_model(1), texts(8, 12)
    down, up = top_k(0.3, model.decoder.layers[0].group("down").inputs), top_k(0.3, model.decoder.hidden)
    trials = [(("down",), {"down": down}), (("up",), {"gate_up": up}), (("both",), {"down": down, "gate_up": up})]
    found = divergences(model, batches, inputs=lambda i, tensors: trials)
    assert found["both",] > 0
    assert found["both",] != pytest.approx(found["down",] + found["up",], rel=1e-3)
    assert found["both",] <= 2 * (found["down",] + found["up",]) * (1 + 1e-6)


def test_kronecker_cost_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    g, x = torch.randn(50, 4, generator=generator), torch.randn(50, 6, generator=generator)
    change = torch.randn(4, 6, generator=generator)
    of_g, of_x = Hessian.zeros(4), Hessian.zeros(6)
    of_g.add(g)
    of_x.add(x)
    wanted = 0.5 * torch.trace((g.T @ g / 50) @ change @ (x.T @ x / 50) @ change.T)
    assert kronecker_cost(change, of_g, of_x) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_four_forward_passes_worth_whatever_the_depth(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch runs through every block twice and back once; a way back counts twice."""
    forward, backward = 0, 0
    steps, grad = DecoderBlock.steps, torch.autograd.grad

    def counted_steps(*arguments: Any, **settings: Any) -> Any:
        nonlocal forward
        forward += 1
        return steps(*arguments, **settings)

    def counted_grad(*arguments: Any, **settings: Any) -> Any:
        nonlocal backward
        backward += 1
        return grad(*arguments, **settings)

    monkeypatch.setattr(DecoderBlock, "steps", counted_steps)
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    model, batches = small_model(layers), texts(8, 12)
    replaced = changed_weights(model, 0.1)
    widths = {group.role: group.inputs for group in model.decoder.layers[0].groups}
    found = divergences(
        model,
        batches,
        weights=lambda i, tensors, h: replaced(i).items(),
        inputs=lambda i, tensors: [((i, role), {role: top_k(0.5, width)}) for role, width in widths.items()],
    )
    assert len(found) == layers * (7 + 4)
    assert forward == 2 * layers * len(batches)
    assert backward == (layers + 1) * len(batches)  # one more for head and labels
    assert (forward + 2 * backward) / (layers * len(batches)) <= 8


class Killed(Exception):
    pass


@pytest.mark.parametrize("when", ["survey 2/3", "sensitivity 1/3", "sensitivity 2/3", "sensitivity 3/3"])
def test_a_killed_survey_goes_on_where_it_stopped(when: str, tmp_path: Path) -> None:
    model, batches = small_model(), texts(8, 12)
    replaced = changed_weights(model, 0.1)
    asked: list[int] = []

    def weights(index: int, tensors: Mapping[str, Tensor], hessians: Mapping[str, Hessian]) -> Any:
        asked.append(index)
        return replaced(index).items()

    def progress(stage: str, done: int, total: int) -> None:
        said.append(stage)
        if stage == when:
            raise Killed

    said: list[str] = []
    wanted = divergences(model, batches, weights=weights, seed=3)
    asked.clear()
    with pytest.raises(Killed):
        divergences(model, batches, weights=weights, seed=3, folder=tmp_path, progress=progress)
    before = len(said)
    when = "never"
    found = divergences(model, batches, weights=weights, seed=3, folder=tmp_path, progress=progress)
    assert found == wanted
    assert said[before] == said[before - 1]  # with the block at which it was killed
    assert sorted(asked) == [0, 1, 2]
    again = divergences(model, batches, weights=weights, seed=3, folder=tmp_path, progress=progress)
    assert again == wanted and sorted(asked) == [0, 1, 2]
    assert json.loads((tmp_path / "costs.json").read_text())["done"] == 0


def test_equal_seeds_give_equal_results_and_others_do_not() -> None:
    model, batches = small_model(), texts(8, 12)
    replaced = changed_weights(model, 0.1)
    first, second, third = (
        divergences(model, batches, weights=lambda i, t, h: replaced(i).items(), seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != third


def test_costs_of_the_reference_model_rank_as_measured() -> None:
    """Inputs dropped at 40 % in every role of every block, the smallest 30 % of the weights pruned in every linear."""
    folder = local_folder("reference")
    checkpoint = Checkpoint.open(folder)
    state = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    decoder = describe(checkpoint.config)

    def read(index: int) -> dict[str, Tensor]:
        prefix = decoder.layers[index].prefix
        return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

    model = PlainDecoder(decoder, read, {name: state[name] for name in decoder.outer_tensors()})
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(inspect.getsource(json.decoder)).ids
    tokens = torch.tensor(text[: 4 * 96]).reshape(4, 96)
    batches = [Texts(tokens, torch.ones_like(tokens, dtype=torch.bool))]
    roles = {group.role: group.inputs for group in decoder.layers[0].groups}
    selections = {role: top_k(0.4, width) for role, width in roles.items()}

    def pruned(index: int) -> dict[Key, dict[str, Tensor]]:
        found: dict[Key, dict[str, Tensor]] = {}
        for linear in decoder.layers[index].linears():
            weight = read(index)[f"{linear.name}.weight"]
            found[index, linear.name] = {f"{linear.name}.weight": weight * (weight.abs() > weight.abs().quantile(0.3))}
        return found

    found = divergences(
        model,
        batches,
        weights=lambda i, tensors, h: pruned(i).items(),
        inputs=lambda i, tensors: [((i, role), {role: s}) for role, s in selections.items()],
    )
    of_inputs = {
        (i, role): measured(model, batches, i, with_selection(role, selections[role])) for i in (0, 4) for role in roles
    }
    of_weights = {
        key: measured(model, batches, i, with_weights(change)) for i in (0, 4) for key, change in pruned(i).items()
    }
    for wanted in (of_inputs, of_weights):
        rank = spearmanr([found[key] for key in wanted], list(wanted.values())).statistic
        assert rank > 0.85
        ratio = torch.tensor([found[key] / value for key, value in wanted.items()])
        assert 0.7 < float(ratio.median()) < 1.4
        assert 0.25 < float(ratio.min()) and float(ratio.max()) < 4
