"""The plain torch decoder of all families, block by block.

A block is a coroutine: :meth:`DecoderBlock.steps` yields the input of every group of linears and is sent their
outputs. Whoever drives it sees every input without hooks, may park a sequence at a group, change the group's weights
and go on from there: no part of a block is computed twice.

It computes what transformers computes, in the block's dtype: norms and rotary tables in float32, softmax attention by
torch. What a description asks for and this file does not do is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tulle.core.delta_rule import gated_delta_rule
from tulle.core.state_space import state_space
from tulle.errors import UserError
from tulle.models.attention import at, attend, position_scale, positions_of, rotary_table, rotate
from tulle.models.batches import real_tokens
from tulle.models.description import XIELU as XIELU_SHAPES
from tulle.models.description import (
    Absent,
    Attention,
    Decoder,
    GatedDeltaNet,
    GatedMLP,
    InputGate,
    LatentAttention,
    LinearGroup,
    Mamba2,
    Mixture,
    Norm,
    PlainMLP,
    ShortConvolution,
)
from tulle.models.norms import NormModule, normed, rms_norm, unit_rms
from tulle.models.routing import Routes, choose
from tulle.models.state import OWN, Beside, StateLayout, TokenInputs, shared

Heads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries ``[B, H, T, head_dim]`` and keys ``[B, H_kv, T, head_dim]`` after the rotation, and values, to what the
attention is given instead (their quantisers)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""By the names of ``GatedMLP.activation`` and ``PlainMLP.activation``; xielu has numbers of its own
(:class:`XIELU`)."""
UNIT_EPS = 1e-6
"""Added to a head's squared length before it is made a unit."""


@dataclass
class GroupInput:
    """What a block yields at a group of linears, and takes back.

    The parked generator holds no large tensor but through this object. So its tensors can be moved away while it is
    parked: ``del given.x, given.residual``, and set ``residual``, ``carried`` and ``beside`` again before the next
    ``send`` (``x`` is not needed any more).
    """

    group: LinearGroup
    x: Tensor
    """``[B, T, C_in]``, or, at an expert, ``[n, C_in]`` of ``tokens``."""
    residual: Tensor
    """The residual stream ``[B, T, d]`` at this place."""
    adds: bool
    """Whether the group's output is added to the residual stream (o, down) as it is, but for ``residual_scale``: no
    norm comes in between."""
    tokens: Tensor | None = None
    """At an expert: which of the B·T tokens it sees, ascending ``[n]``."""
    carried: list[Tensor] = field(default_factory=list)
    """What a mixture of experts needs later on: its input, the sum of the outputs so far, and what the shared expert
    gave, where a norm keeps that apart."""
    beside: Beside = field(default_factory=dict)
    """What the block has beside the stream."""
    asked: tuple[Tensor, Tensor] | None = None
    """At a router, to be set before its outputs are sent: experts and tokens, ``[P]`` each, that are to run as well,
    with a weight of 0."""

    @property
    def role(self) -> str:
        return self.group.role

    def real(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Rows ``[N, C]`` of real tokens of a tensor that belongs to this input; ``valid``: bool ``[B, T]``, None:
        all."""
        if self.tokens is None:
            return real_tokens(x, valid)
        return x if valid is None else x[valid.flatten()[self.tokens]]


Steps = Generator[GroupInput, tuple[Tensor, ...], Tensor]
LatentSteps = Generator[GroupInput, tuple[Tensor, ...], tuple[Tensor, Tensor]]


class DecoderBlock(nn.Module):
    """Decoder layer ``index`` with weights: hidden ``[B, T, d]`` → hidden ``[B, T, d]``, causal, positions 0 … T − 1;
    with more channels where blocks read more than the stream (:mod:`tulle.models.state`).

    ``tensors`` holds the layer's tensors by relative name; one that already has the device and dtype is not copied.
    Linears and norms are submodules under their names in the checkpoint. Where sequences of one batch are padded at the
    right, nothing keeps padding away from real tokens but that all is causal. Padding elsewhere takes ``valid``, bool
    ``[B, T]`` of real tokens: positions count those alone, nobody sees the others, and no state takes anything of them.
    ``experts`` False: their tensors are not among ``tensors``; :meth:`hold` gives them one by one.

    Raises ``UserError`` for missing, unknown or misshapen tensors and for parts that are not implemented here.
    """

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        tensors: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        experts: bool = True,
    ):
        super().__init__()
        layer = self.layer = decoder.layers[index]
        check_tensors(layer.prefix, layer.tensors() if experts else layer.tensors_without_experts(), tensors)
        self._layout = StateLayout(decoder, index)
        name = self.layer.mixer.rotary
        self.rotary = None if name is None else decoder.rotary[name]
        for group in layer.all_groups() if experts else layer.groups:
            self._attach_linears(group)
        for norm, width in self.layer.norms():
            with torch.device("meta"):
                _attach(self, norm.name, NormModule(norm, width))
        feed_forward = self.layer.feed_forward
        if isinstance(feed_forward, PlainMLP) and feed_forward.activation == "xielu":
            with torch.device("meta"):
                _attach(self, f"{feed_forward.name}.act_fn", XIELU())
        for path, shape in self.layer.others().items():
            if not isinstance(feed_forward, PlainMLP) or path not in feed_forward.parameters:
                _attach_parameter(self, path, shape)
        self.load_state_dict({name: t.to(device, dtype) for name, t in tensors.items()}, assign=True)
        self.requires_grad_(False).eval()

    def _attach_linears(self, group: LinearGroup) -> None:
        """Empty ones."""
        for linear in group.linears:
            with torch.device("meta"):
                module = nn.Linear(linear.shape[1], linear.shape[0], bias=linear.bias)
            _attach(self, linear.name, module)

    def hold(self, expert: int, tensors: Mapping[str, Tensor]) -> None:
        """Gives the block an expert's tensors by relative name, until :meth:`release`."""
        groups = self.layer.experts[expert].groups
        check_tensors(self.layer.prefix, self.layer.tensors(expert), tensors)
        for group in groups:
            self._attach_linears(group)
        for name, tensor in tensors.items():
            module, _, last = name.rpartition(".")
            parameter = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            setattr(self.get_submodule(module), last, parameter)

    def release(self, expert: int) -> None:
        """Takes them away."""
        for linear in self.layer.experts[expert].linears():
            holder, _, last = linear.name.rpartition(".")
            delattr(self.get_submodule(holder), last)

    @property
    def device(self) -> torch.device:
        norm, _ = self.layer.norms()[0]
        return cast(Tensor, self.get_submodule(norm.name).weight).device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: that of the first norm's weight."""
        norm, _ = self.layer.norms()[0]
        return cast(Tensor, self.get_submodule(norm.name).weight).dtype

    def steps(self, hidden: Tensor, heads: Heads | None = None, valid: Tensor | None = None) -> Steps:
        """Yields every group's input in order and is sent the tuple of its linears' outputs; returns the block's
        output ``[B, T, d]`` in the block's dtype (``StopIteration.value``).

        Outputs are in the order of ``group.linears``, biases included. Between a yield and the next send only the
        yielded :class:`GroupInput` holds tensors of the sequence.
        """
        stream, beside = self._layout.split(hidden.to(self.dtype))
        inner = self._layer_steps(stream, beside, heads, valid)
        del hidden, stream
        given = next(inner)
        while True:
            given.beside = dict(beside)
            beside.clear()
            outputs = yield given
            beside |= given.beside
            try:
                given = inner.send(outputs)
            except StopIteration as end:
                return cast(Tensor, end.value)
            del outputs

    def _layer_steps(self, stream: Tensor, beside: Beside, heads: Heads | None, valid: Tensor | None) -> Steps:
        """All of the layer, in whose last place ``beside`` joins the stream again."""
        layer = self.layer
        rest = self._parts_steps(stream, beside, heads, valid)
        del stream
        out = yield from rest
        if layer.input_gate is not None:
            rest = self._input_steps(layer.input_gate, out, beside)
            del out
            out = yield from rest
        if layer.output_scale is not None:
            out = out * self.get_parameter(layer.output_scale)
        return self._layout.join(out, beside)

    def _parts_steps(self, hidden: Tensor, beside: Beside, heads: Heads | None, valid: Tensor | None) -> Steps:
        """Mixer and feed-forward."""
        layer = self.layer
        if isinstance(layer.mixer, Absent):
            rest = self._feed_forward_alone(hidden)
            del hidden
            return (yield from rest)
        given = self._given("qkv", hidden, layer.mixer_norm)
        del hidden
        if isinstance(layer.mixer, LatentAttention):
            mixed, residual = yield from self._latent_steps(given, layer.mixer, heads, valid)
        else:
            mixed, residual = self._mix((yield given), beside, heads, valid), given.residual
        given = GroupInput(layer.group("o"), mixed, residual, adds=layer.mixer_norm_after is None)
        del mixed, residual
        (y,) = yield given
        y = self._added(y, layer.mixer_norm_after)
        feed_forward = layer.feed_forward
        if isinstance(feed_forward, Absent):
            return given.residual + y
        if layer.parallel:
            given = self._entering(given.residual, layer.feed_forward_norm or layer.mixer_norm)
            given.residual = given.residual + y
        else:
            given = self._entering(given.residual + y, layer.feed_forward_norm)
        rest = self._feed_forward_steps(given, feed_forward)
        del given, y
        return (yield from rest)

    def _feed_forward_alone(self, hidden: Tensor) -> Steps:
        """Of a layer without a mixer."""
        feed_forward = self.layer.feed_forward
        assert not isinstance(feed_forward, Absent)
        rest = self._feed_forward_steps(self._entering(hidden, self.layer.feed_forward_norm), feed_forward)
        del hidden
        return (yield from rest)

    def _feed_forward_steps(self, given: GroupInput, feed_forward: GatedMLP | PlainMLP | Mixture) -> Steps:
        """From the feed-forward's input on."""
        layer = self.layer
        if isinstance(feed_forward, Mixture):
            return (yield from self._mixture_steps(given, feed_forward))
        inner = self._inner(feed_forward, (yield given))
        given = GroupInput(layer.group("down"), inner, given.residual, adds=layer.feed_forward_norm_after is None)
        del inner
        (y,) = yield given
        return given.residual + self._added(y, layer.feed_forward_norm_after)

    def _input_steps(self, gate: InputGate, hidden: Tensor, beside: Beside) -> Steps:
        """Of the layer's own input."""
        given = self._given("input_gate", hidden, None)
        del hidden
        (y,) = yield given
        inner = ACTIVATIONS[gate.activation](y) * beside.pop(OWN)
        given = GroupInput(self.layer.group("input_down"), inner, given.residual, adds=False)
        del y, inner
        (y,) = yield given
        return given.residual + self._norm(gate.norm, y)

    def _latent_steps(
        self, given: GroupInput, mixer: LatentAttention, heads: Heads | None, valid: Tensor | None
    ) -> LatentSteps:
        """Of latent attention: the narrow vectors, then what comes of them; the heads' outputs and the stream."""
        q, kv = yield given
        latent, rotated = kv.split((mixer.kv_rank, mixer.rotary_dim), -1)
        carried, residual = [latent, rotated], given.residual
        if mixer.query_norm is not None:
            group = self.layer.group("q_up")
            given = GroupInput(group, self._norm(mixer.query_norm, q), residual, adds=False, carried=carried)
            del q, kv, latent, rotated, carried, residual
            (q,) = yield given
            (latent, rotated), residual = given.carried, given.residual
        group = self.layer.group("kv_up")
        given = GroupInput(group, self._norm(mixer.kv_norm, latent), residual, adds=False, carried=[q, rotated])
        del q, latent, rotated, residual
        (up,) = yield given
        q, rotated = given.carried
        return self._attend_latent(mixer, q, rotated, up, heads, valid), given.residual

    def _attend_latent(
        self,
        mixer: LatentAttention,
        q: Tensor,
        rotated: Tensor,
        up: Tensor,
        heads: Heads | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Attention ``[B, T, H·value_dim]`` of queries and of keys and values, heads side by side, and the part of the
        keys that is rotated."""
        dims = (mixer.plain_dim, mixer.rotary_dim)
        q, up = (x.unflatten(-1, (mixer.heads, -1)).transpose(1, 2) for x in (q, up))
        k, v = up.split((mixer.plain_dim, mixer.value_dim), -1)
        plain, turned = q.split(dims, -1)
        rotated = rotated.unsqueeze(1)
        if self.rotary is not None:
            positions, longest = (None, q.shape[2]) if valid is None else positions_of(valid)
            cos, sin = (at(positions, t) for t in rotary_table(self.rotary, longest, q.device, q.dtype))
            turned, rotated = (rotate(x, cos, sin, self.rotary.interleaved) for x in (turned, rotated))
        q, k = torch.cat((plain, turned), -1), torch.cat((k, rotated.expand(-1, mixer.heads, -1, -1)), -1)
        if heads is not None:
            q, k, v = heads(q, k, v)
        return attend(q, k, v, scale=mixer.scale, valid=valid).transpose(1, 2).flatten(2)

    def _mixture_steps(self, given: GroupInput, mixture: Mixture) -> Steps:
        """Of a mixture of experts: the router, the shared expert, then one expert after the other."""
        layer, residual_width = self.layer, given.residual.shape
        own = mixture.expert_norm
        given.carried = [given.x if own is None else self._norm(own, given.residual)]
        logits, *shared_gate = yield given
        routes = self.routes(logits)
        if given.asked is not None:
            routes = routes.also(*given.asked, logits[..., 0].numel())
        del logits
        if mixture.shared is None:
            given.carried.append(torch.zeros_like(given.carried[0]).flatten(0, -2))
        else:
            carried = [*given.carried, *(gate.sigmoid() for gate in shared_gate)]
            del shared_gate
            x = carried[0] if own is None else self._norm(layer.feed_forward_norm, given.residual)
            given = GroupInput(layer.group("gate_up"), x, given.residual, adds=False, carried=carried)
            del carried, x
            inner = self._inner(mixture.shared, (yield given))
            adds = layer.feed_forward_norm_after is None and mixture.shared_gate is None
            given = GroupInput(layer.group("down"), inner, given.residual, adds=adds, carried=given.carried)
            del inner
            (y,) = yield given
            x, *gate = given.carried
            y = y * gate[0] if gate else y.clone()
            if own is None:
                given.carried = [x, y.flatten(0, -2)]
            else:
                given.carried = [x, torch.zeros_like(y).flatten(0, -2), self._norm(mixture.shared_norm_after, y)]
            del x, gate, y
        for expert in layer.experts:
            tokens, weights = routes.of_expert(expert.index)
            reads, writes = expert.groups
            x = given.carried[0]
            given = GroupInput(
                reads, x.flatten(0, -2)[tokens], given.residual, adds=False, tokens=tokens, carried=given.carried
            )
            del x
            inner = self.inner_of_expert((yield given))
            given = GroupInput(writes, inner, given.residual, adds=False, tokens=tokens, carried=given.carried)
            del inner
            (y,) = yield given
            given.carried[1].index_add_(0, tokens, (y * weights[:, None]).to(given.carried[1].dtype))
            del y
        y = self._norm(mixture.experts_norm_after, given.carried[1].reshape(residual_width))
        y = sum(given.carried[2:], y)
        return given.residual + self._added(y, layer.feed_forward_norm_after)

    def inner_of_expert(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """What an expert's down reads, of its gate's and up's outputs ``[n, I]``."""
        mixture = self.layer.feed_forward
        assert isinstance(mixture, Mixture)
        return self._inner(mixture.expert, outputs)

    def routes(self, logits: Tensor) -> Routes:
        """Which tokens go to which experts, of the router's outputs ``[B, T, E]``."""
        mixture = self.layer.feed_forward
        assert isinstance(mixture, Mixture)
        name = mixture.router.correction
        correction = None if name is None else self.get_parameter(name)
        experts, weights = choose(mixture.router, logits.flatten(0, -2), correction)
        scale = mixture.router.expert_scale
        return Routes.of(experts, weights if scale is None else weights * self.get_parameter(scale)[experts])

    def forward(self, hidden: Tensor, heads: Heads | None = None, valid: Tensor | None = None) -> Tensor:
        """The block's output ``[B, T, d]``, by its own submodules, so that hooks and replaced linears take part."""
        return drive(self.steps(hidden, heads, valid), lambda given: run_group(self, given.group, given.x))

    def _entering(self, hidden: Tensor, norm: Norm | None) -> GroupInput:
        """What the feed-forward reads first."""
        feed_forward = self.layer.feed_forward
        if not isinstance(feed_forward, Mixture):
            return self._given("gate_up", hidden, norm)
        router = feed_forward.router
        if router.input_scale is None:
            return self._given("router", hidden, norm)
        x = unit_rms(hidden, router.input_eps) * self.get_parameter(router.input_scale) * hidden.shape[-1] ** -0.5
        return GroupInput(self.layer.group("router"), x, hidden, adds=False)

    def _given(self, role: str, hidden: Tensor, norm: Norm | None) -> GroupInput:
        return GroupInput(self.layer.group(role), self._norm(norm, hidden), hidden, adds=False)

    def _norm(self, norm: Norm | None, x: Tensor) -> Tensor:
        return x if norm is None else cast(Tensor, self.get_submodule(norm.name)(x))

    def _added(self, y: Tensor, after: Norm | None) -> Tensor:
        """What is added to the residual stream."""
        y = self._norm(after, y)
        return y if self.layer.residual_scale == 1 else y * self.layer.residual_scale

    def _activation(self, feed_forward: GatedMLP | PlainMLP) -> Callable[[Tensor], Tensor]:
        found = ACTIVATIONS.get(feed_forward.activation)
        return self.get_submodule(f"{feed_forward.name}.act_fn") if found is None else found

    def _inner(self, feed_forward: GatedMLP | PlainMLP, outputs: tuple[Tensor, ...]) -> Tensor:
        """What the last linear of a feed-forward reads."""
        activation = self._activation(feed_forward)
        if isinstance(feed_forward, PlainMLP):
            (up,) = outputs
            return activation(up)
        gate, up = _parts(outputs, (feed_forward.intermediate,) * 2)
        return self._norm(feed_forward.inner_norm, gate_times_up(feed_forward, activation, gate, up))

    def _mix(self, outputs: tuple[Tensor, ...], beside: Beside, heads: Heads | None, valid: Tensor | None) -> Tensor:
        """What the mixer's last linear reads, of its first linears' outputs."""
        mixer = self.layer.mixer
        assert not isinstance(mixer, LatentAttention | Absent)
        if isinstance(mixer, GatedDeltaNet):
            return self._delta(mixer, valid, *(by_kind(mixer, *outputs) if mixer.fused else outputs))
        if isinstance(mixer, ShortConvolution):
            b, c, x = outputs[0].chunk(3, -1)
            return c * self._convolved(f"{mixer.name}.conv", b * x, valid)
        if isinstance(mixer, Mamba2):
            return self._mamba(mixer, valid, outputs[0])
        if mixer.kv_from is None:
            queries, keys, values = mixer.widths
            outputs = _parts(outputs, (2 * queries if mixer.output_gate else queries, keys, values))
        q, *kv = outputs
        if not mixer.output_gate:
            return self._attend(mixer, q, kv, beside, heads, valid)
        q, gate = (x.flatten(2) for x in q.unflatten(-1, (mixer.heads, 2, -1)).unbind(-2))
        return self._attend(mixer, q, kv, beside, heads, valid) * gate.sigmoid()

    def _own(self, mixer: GatedDeltaNet | Mamba2) -> dict[str, Tensor]:
        """Its tensors besides linears and norms, by the names that they have in it."""
        return {path.removeprefix(f"{mixer.name}."): self.get_parameter(path) for path in mixer.parameters}

    def _convolved(self, name: str, x: Tensor, valid: Tensor | None) -> Tensor:
        """x ``[B, T, C]`` behind the causal convolution ``name``, which keeps channels apart and sees no padding."""
        module = self.get_submodule(name)
        weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
        channels, _, kernel = weight.shape
        padded = functional.pad(_without_padding(x, valid).transpose(1, 2), (kernel - 1, 0))
        return functional.conv1d(padded, weight, bias, groups=channels).transpose(1, 2)

    def _delta(
        self, mixer: GatedDeltaNet, valid: Tensor | None, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor
    ) -> Tensor:
        """The gated delta rule of projected queries, keys and values ``[B, T, …]``, gate z, and b and a per head."""
        own = self._own(mixer)
        mixed = ACTIVATIONS[mixer.activation](self._convolved(f"{mixer.name}.conv1d", qkv, valid))
        shared = mixer.value_heads // mixer.key_heads
        q, k, v = (
            x.unflatten(-1, (-1, size)).transpose(1, 2).float()
            for x, size in zip(
                mixed.split(mixer.widths, -1), (mixer.key_dim, mixer.key_dim, mixer.value_dim), strict=True
            )
        )
        q, k = (
            (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)).repeat_interleave(shared, 1) for x in (q, k)
        )
        g = -own["A_log"].float().exp() * functional.softplus(a.float() + own["dt_bias"].float())
        out = gated_delta_rule(q * mixer.key_dim**-0.5, k, v, g.transpose(1, 2), b.float().sigmoid().transpose(1, 2))
        out = out.transpose(1, 2).to(qkv.dtype)
        gate = functional.silu(z.unflatten(-1, (-1, mixer.value_dim)).float())
        return (rms_norm(out, own["norm.weight"], mixer.eps) * gate).to(qkv.dtype).flatten(2)

    def _mamba(self, mixer: Mamba2, valid: Tensor | None, outputs: Tensor) -> Tensor:
        """Mamba-2 of its linear's outputs ``[B, T, …]``."""
        own = self._own(mixer)
        z, mixed, step = outputs.split(mixer.outputs, -1)
        mixed = ACTIVATIONS[mixer.activation](self._convolved(f"{mixer.name}.conv1d", mixed, valid))
        mixed = _without_padding(mixed, valid)  # the convolution's bias is in it
        x, b, c = (
            part.unflatten(-1, (-1, size)).transpose(1, 2).float()
            for part, size in zip(
                mixed.split(mixer.widths, -1), (mixer.head_dim, mixer.state, mixer.state), strict=True
            )
        )
        b, c = (part.repeat_interleave(mixer.heads // mixer.groups, 1) for part in (b, c))
        step = functional.softplus(step + own["dt_bias"]).clamp(*mixer.step_limits).transpose(1, 2).float()
        g = -own["A_log"].float().exp()[:, None] * step
        y = state_space(x * step[..., None], g, b, c) + own["D"].float()[:, None, None] * x
        y = y.transpose(1, 2).flatten(2).to(outputs.dtype) * functional.silu(z.float())
        y = y.unflatten(-1, (mixer.groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.eps)
        return own["norm.weight"] * y.flatten(2).to(outputs.dtype)

    def _attend(
        self,
        mixer: Attention,
        q: Tensor,
        kv: list[Tensor],
        beside: Beside,
        heads: Heads | None,
        valid: Tensor | None,
    ) -> Tensor:
        """Attention ``[B, T, H·head_dim]`` of projected queries, and of keys and values, or keys that are both, or
        none: then they are another layer's."""
        positions, longest = (None, q.shape[1]) if valid is None else positions_of(valid)
        q = self._placed(mixer, mixer.q_norm, q, positions, longest)
        if mixer.kv_from is None:
            k = self._placed(mixer, mixer.k_norm, kv[0], positions, longest)
            v = kv[-1].unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
            v = v if mixer.value_eps is None else unit_rms(v, mixer.value_eps)
            if self._layout.keeps(shared(self.layer.index)):
                beside[shared(self.layer.index)] = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], -1)
        else:
            both = beside[shared(mixer.kv_from)].chunk(2, -1)
            k, v = (x.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2) for x in both)
        if mixer.position_scale is not None:
            q = q * at(positions, position_scale(*mixer.position_scale, longest, q.device)).to(q.dtype)
        if heads is not None:
            q, k, v = heads(q, k, v)
        sinks = self.get_parameter(f"{mixer.name}.sinks") if mixer.sinks else None
        mixed = attend(q, k, v, mixer.window, mixer.scale, mixer.soft_cap, sinks, valid)
        return self._norm(mixer.output_norm, mixed.transpose(1, 2).flatten(2))

    def _placed(self, mixer: Attention, norm: Norm | None, x: Tensor, positions: Tensor | None, longest: int) -> Tensor:
        """Projected queries or keys ``[B, T, H·head_dim]``, normed and rotated: ``[B, H, T, head_dim]``."""
        by_head = mixer.norm_width == "head"
        x = x if by_head else self._norm(norm, x)
        x = x.unflatten(-1, (-1, mixer.head_dim))
        if by_head and not mixer.norm_after_rotary:
            x = self._norm(norm, x)
        x = x.transpose(1, 2)
        if self.rotary is not None:
            cos, sin = (at(positions, t) for t in rotary_table(self.rotary, longest, x.device, x.dtype))
            x = rotate(x, cos, sin, self.rotary.interleaved)
        return self._norm(norm, x) if by_head and mixer.norm_after_rotary else x


def gate_times_up(mlp: GatedMLP, activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """f(gate) ⊙ (up + offset), both limited where the MLP says so."""
    if mlp.limit is not None:
        gate, up = gate.clamp(max=mlp.limit), up.clamp(-mlp.limit, mlp.limit)
    return activation(gate) * (up + mlp.up_offset if mlp.up_offset else up)


def _without_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """x ``[B, T, C]`` with zeros at tokens that are not ``valid`` ``[B, T]``."""
    return x if valid is None else x * valid[..., None]


def _parts(outputs: tuple[Tensor, ...], widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Outputs of several linears, or of one that holds them all."""
    return outputs if len(outputs) > 1 else outputs[0].split(widths, -1)


def by_kind(mixer: GatedDeltaNet, qkvz: Tensor, ba: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values; z; b; a, of outputs of fused linears, which stand key head by key head."""
    shared = mixer.value_heads // mixer.key_heads
    values = shared * mixer.value_dim
    by_head = (x.unflatten(-1, (mixer.key_heads, -1)) for x in (qkvz, ba))
    widths = ((mixer.key_dim, mixer.key_dim, values, values), (shared, shared))
    q, k, v, z, b, a = (part.flatten(-2) for x, w in zip(by_head, widths, strict=True) for part in x.split(w, -1))
    return torch.cat((q, k, v), -1), z, b, a


class XIELU(nn.Module):
    """x ↦ α_p·x² + β·x above 0, α_n·(e^min(x, ε) − 1 − x) + β·x below; α_p = softplus(a_p), α_n = β + softplus(a_n)
    (Huang & Schlag 2024, "Deriving Activation Functions Using Integration", equation 6)."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in XIELU_SHAPES.items():
            self.register_buffer(name, torch.empty(shape))

    def forward(self, x: Tensor) -> Tensor:
        beta, positive = self.get_buffer("beta"), functional.softplus(self.get_buffer("alpha_p"))
        negative = beta + functional.softplus(self.get_buffer("alpha_n"))
        below = (torch.expm1(torch.minimum(x, self.get_buffer("eps"))) - x) * negative + beta * x
        return torch.where(x > 0, positive * x * x + beta * x, below)


def drive(steps: Steps, answer: Callable[[GroupInput], tuple[Tensor, ...]]) -> Tensor:
    """Runs a block to its end, every group's outputs being what ``answer`` says; the block's output."""
    try:
        given = next(steps)
        while True:
            given = steps.send(answer(given))
    except StopIteration as end:
        return cast(Tensor, end.value)


def run_group(block: nn.Module, group: LinearGroup, x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of a group's linears, as they are in the block now."""
    return tuple(block.get_submodule(name)(x) for name in group.names)


def embed(decoder: Decoder, tokens: Tensor, table: Tensor) -> Tensor:
    """Hidden ``[B, T, d]`` of tokens ``[B, T]``, in the dtype of the table ``[V, d]``."""
    hidden = functional.embedding(tokens, table)
    return hidden if decoder.embedding_scale == 1 else hidden * decoder.embedding_scale


def final_norm(decoder: Decoder, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
    """The last block's output ``[…, d]`` as the head reads it; ``outer`` has the norm's tensors by full name."""
    name = decoder.final_norm.name
    return normed(hidden, decoder.final_norm, outer[f"{name}.weight"], outer.get(f"{name}.bias"))


def logits(decoder: Decoder, normed: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits ``[…, V]`` of what the final norm gives; ``table`` is the head's, or the embedding's when tied. Scale and
    soft cap are in them."""
    found = functional.linear(normed, table, bias)
    if decoder.logit_scale != 1:
        found = found * decoder.logit_scale
    if decoder.logit_soft_cap is not None:
        found = (found / decoder.logit_soft_cap).tanh() * decoder.logit_soft_cap
    return found


class PlainDecoder:
    """The whole model, one block in memory at a time.

    ``read_block(index)`` gives a layer's tensors by relative name; ``outer`` holds embedding, final norm and, unless
    tied, head by full name. ``inputs``: of single layers; None: ``outer`` has what they are made of. With
    ``read_expert(index, expert)`` ``read_block`` leaves experts out, and a block is given one at a time
    (:mod:`tulle.models.expert_pass`).
    """

    def __init__(
        self,
        decoder: Decoder,
        read_block: Callable[[int], Mapping[str, Tensor]],
        outer: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        inputs: TokenInputs | None = None,
        read_expert: Callable[[int, int], Mapping[str, Tensor]] | None = None,
    ):
        self.decoder = decoder
        self._inputs = inputs or TokenInputs(decoder, self._part)
        self._read_block, self.device, self._dtype = read_block, device, dtype
        self.read_expert = read_expert
        self._outer = {name: t.to(device, dtype) for name, t in outer.items()}

    def block(self, index: int) -> DecoderBlock:
        whole = self.read_expert is None
        return DecoderBlock(self.decoder, index, self._read_block(index), self.device, self._dtype, experts=whole)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` of tokens ``[B, T]``; ``valid`` as in :class:`DecoderBlock`."""
        hidden = self.embed(tokens)
        for index in range(len(self.decoder.layers)):
            hidden = self.block(index)(self.enter(index, hidden, tokens), valid=valid)
        return self.predict(hidden)

    def enter(self, index: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Hidden states of ``tokens`` as block ``index`` takes them."""
        return self._inputs.join(index, hidden, tokens, lambda: self.embed(tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        return embed(self.decoder, tokens.to(self.device), self.embedding())

    def _part(self, name: str, rows: Tensor | None = None, columns: slice | None = None) -> Tensor:
        found = self._outer[name] if rows is None else self._outer[name][rows.to(self.device)]
        return found if columns is None else found[:, columns]

    def embedding(self) -> Tensor:
        """``[V, d]``."""
        return self._outer[self.decoder.embedding_name(self._outer)]

    def head(self) -> Tensor:
        """``[V, d]``."""
        return self.embedding() if self.decoder.tied else self._outer[self.decoder.head]

    def normed(self, hidden: Tensor) -> Tensor:
        """The final norm of the last block's output."""
        return final_norm(self.decoder, hidden, self._outer)

    def predict(self, hidden: Tensor) -> Tensor:
        """Logits of the last block's output."""
        bias = self._outer.get(self.decoder.head.removesuffix("weight") + "bias")
        return logits(self.decoder, self.normed(hidden), self.head(), bias)


def check_tensors(prefix: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Raises ``UserError`` unless the tensors' names and shapes are those of the description."""
    for name in wanted.keys() ^ found.keys():
        what = "tensor that the config asks for" if name in wanted else "no tensor that the config does not know"
        state = "none" if name in wanted else f"one of shape {tuple(found[name].shape)}"
        raise UserError(f"expected a {what}, {prefix}{name}, found {state}; check the checkpoint against its config")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(
                f"expected shape {shape} for {prefix}{name}, found {tuple(found[name].shape)}; check the checkpoint "
                "against its config"
            )


def _attach_parameter(root: nn.Module, path: str, shape: tuple[int, ...]) -> None:
    """Puts an empty parameter under a dotted name, for ``load_state_dict`` to fill."""
    *modules, last = path.split(".")
    holder = ".".join(modules)
    try:
        module = root.get_submodule(holder)
    except AttributeError:
        module = nn.Module()
        _attach(root, holder, module)
    module.register_parameter(last, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))


def _attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module under a dotted name, with empty modules between."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = cast(nn.Module, getattr(root, part))
    root.add_module(last, module)
