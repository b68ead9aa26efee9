"""A large model's activation outliers for a small model, without changing its function.

Large models have channels that are 10 to 100 times larger than the rest at the inputs of q/k/v and gate/up, at the same
place in every layer and for every token ("normal" outliers), and single values, hundreds to thousands of times the
median, that a few tokens carry ("massive": Sun et al. 2024, Massive Activations in Large Language Models; at the input
of down_proj: Lin et al. 2024, DuQuant, section 3). Models of a few million parameters have neither, so that rounding
their activations to 4 bits says little about a method. Every kind here is an identity of the network:

========================  ================================================  =============================
kind                      scaled by s                                       divided by s
========================  ================================================  =============================
``norm``                  γ_c of both RMSNorms                              column c of q/k/v and gate/up
``massive``               row j of up                                       column j of down
``value_output``          a row of v (and its bias)                         its columns of o, one per query head
``rope_pair``             rows (i, i + d/2) of k (biases), or of k_norm     the same of its q heads, or of q_norm
``rotated``               the residual stream x becomes x·Q, Q orthogonal, γ folded into what reads it
========================  ================================================  =============================

- ``massive``: silu(gate)·up is linear in up. Token-specific where silu(gate) is, so j is the channel with the largest
  max/median over tokens.
- ``rope_pair``: RoPE turns the plane (i, i + d/2), which commutes with one factor for both and with nothing else. With
  QK-norm a factor before the norm would be divided out again: it goes into the norms' gains.
- ``rotated``: ‖x·Q‖ = ‖x‖, so RMSNorm without gain commutes with Q, its ε included. W reading x: W·diag(γ)·Q; W writing
  to x: Qᵀ·W. A tied head gets the final γ and the embedding does not, so the two are untied. Folding γ takes any
  ``norm`` that came before it back; put ``rotated`` first.

Everything is computed in float64 and stored in float32. A factor that is a power of two changes no mantissa; every
other costs one rounding (2⁻²⁴) per weight, about 1e-7 of the largest logit.
"""

from __future__ import annotations

import difflib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tulle.errors import UserError
from tulle.models.checkpoint import Checkpoint, companions, write_index, write_shard, write_text
from tulle.models.decoder import DecoderBlock, embed, final_norm, logits
from tulle.models.description import STREAM_READERS, Decoder, Layer
from tulle.models.watch import run_watched

Kind = Literal["norm", "massive", "value_output", "rope_pair", "rotated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NORMAL: tuple[Kind, ...] = ("norm", "value_output", "rope_pair")
MASSIVE: tuple[Kind, ...] = ("massive",)
ROTATED: tuple[Kind, ...] = ("rotated", *NORMAL, *MASSIVE)
"""Rotated first: folding γ would take the outliers of ``norm`` back."""

Factor = float | tuple[float, float]
"""One s for all, or (low, high): drawn log-uniformly for each channel."""
Tensors = dict[str, Tensor]
PROBE = (4, 128)
"""Random sequences and their length where no tokens are given."""
ROWS = 4096
"""Rows of a vocabulary table that are in memory in float64 at a time."""


def inject_outliers(
    source: str | Path,
    output: str | Path,
    kinds: Sequence[Kind],
    *,
    norm_channels: int = 4,
    norm_factor: Factor = (10.0, 50.0),
    massive_channels: int = 1,
    massive_blocks: Sequence[int] | None = None,
    massive_ratio: float = 1000.0,
    value_channels: int = 1,
    value_factor: Factor = (4.0, 16.0),
    rope_pairs: int = 1,
    rope_factor: Factor = (4.0, 16.0),
    tokens: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the model ``source`` with outliers of ``kinds``, applied in this order, to the new folder ``output``.

    ``norm_channels`` of the residual stream, the same with the same factors in all layers; ``massive_channels`` in each
    of ``massive_blocks`` (default: the second and the last but one), scaled until their maximum is ``massive_ratio``
    times the median size of all inputs of down; ``value_channels`` and ``rope_pairs`` for each KV head of each layer.
    ``tokens`` (``[B, T]``, default: random ids) run through both models, to choose the massive channels and to
    measure; in float32, block by block.
    ``dtype`` is that of the written tensors: bfloat16 would change the function and is refused.

    Returns facts that JSON can hold: ``kinds``, ``seed``; under each kind what was chosen, with factors; ``inputs``:
    for each block and role (and ``key``, K before RoPE) ``[before, after]`` of ``channel_ratio``, the largest channel's
    maximum over the median channel's, and of ``peak_ratio``, the largest value over the median value;
    ``difference``: the largest difference of the two models' float32 logits, as a share of the largest logit.

    Raises ``UserError`` for an unknown kind, a setting that does not fit the model, and an output that exists.
    """
    plan = _Plan.of(
        Checkpoint.open(source), kinds, seed,
        norm=_Scaling("norm_channels", norm_channels, "norm_factor", norm_factor),
        value=_Scaling("value_channels", value_channels, "value_factor", value_factor),
        rope=_Scaling("rope_pairs", rope_pairs, "rope_factor", rope_factor),
        massive=_Massive(massive_channels, massive_blocks, massive_ratio),
    )  # fmt: skip
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"expected dtype torch.float32 or torch.float64, found {dtype}; fewer bits change the function")
    ids = _probe_tokens(plan, tokens)
    with _whole_folder(Path(output)) as folder:
        return _write(plan, ids, dtype, folder)


# --- The identities: on the float64 tensors of one block, by relative name, in place.


def scale_norm(tensors: Tensors, layer: Layer, channels: Tensor, s: Tensor) -> None:
    """γ_c·s of every norm of the residual stream, columns c of its readers ÷ s; channels and s ``[n]``."""
    for group, norm in layer.own_norms():
        if group.role in STREAM_READERS:
            tensors[f"{norm.name}.weight"][channels] *= s
            for name in group.names:
                tensors[f"{name}.weight"][:, channels] /= s


def scale_massive(tensors: Tensors, layer: Layer, channels: Tensor, s: Tensor) -> None:
    """Rows of up times s, columns of down ÷ s; channels and s ``[n]``."""
    group = layer.group("down")
    _scale_rows(tensors, group.producers[0].name, channels, s)
    tensors[f"{group.names[0]}.weight"][:, channels] /= s


def scale_value(tensors: Tensors, layer: Layer, head: int, channels: Tensor, s: Tensor) -> None:
    """Rows ``channels`` ``[n]`` (of head_dim) of v's KV head times s, the columns of o of its query heads ÷ s."""
    group, mixer = layer.group("o"), layer.mixer
    _scale_rows(tensors, group.producers[0].name, head * mixer.head_dim + channels, s)
    for query in mixer.query_heads(head):
        tensors[f"{group.names[0]}.weight"][:, query * mixer.head_dim + channels] /= s


def scale_rope_pairs(tensors: Tensors, layer: Layer, head: int, pairs: Tensor, s: Tensor) -> None:
    """RoPE pairs i ``[n]`` (below d/2) of K's head times s, those of its query heads ÷ s.

    With QK-norm all heads share the gains: ``head`` is not looked at.
    """
    mixer = layer.mixer
    pairs, s = torch.cat([pairs, pairs + mixer.head_dim // 2]), s.repeat(2)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        tensors[f"{mixer.k_norm.name}.weight"][pairs] *= s
        tensors[f"{mixer.q_norm.name}.weight"][pairs] /= s
        return
    q, k = layer.group("qkv").names[:2]
    _scale_rows(tensors, k, head * mixer.head_dim + pairs, s)
    for query in mixer.query_heads(head):
        _scale_rows(tensors, q, query * mixer.head_dim + pairs, 1 / s)


def rotate(tensors: Tensors, layer: Layer, rotation: Tensor) -> None:
    """Q ``[d, d]`` on the residual stream: readers W·diag(γ)·Q with γ = 1 after it, writers Qᵀ·W and b·Q."""
    for group in layer.groups:
        if group.norm is not None:
            gain = tensors[f"{group.norm.name}.weight"]
            for name in group.names:
                tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] * gain) @ rotation
            tensors[f"{group.norm.name}.weight"] = torch.ones_like(gain)
        if group.adds:
            for name in group.names:
                tensors[f"{name}.weight"] = rotation.T @ tensors[f"{name}.weight"]
                if f"{name}.bias" in tensors:
                    tensors[f"{name}.bias"] = tensors[f"{name}.bias"] @ rotation


def _scale_rows(tensors: Tensors, name: str, rows: Tensor, s: Tensor) -> None:
    tensors[f"{name}.weight"][rows] *= s[:, None]
    if f"{name}.bias" in tensors:
        tensors[f"{name}.bias"][rows] *= s


# --- What is chosen, and the checks of the settings.


@dataclass(frozen=True)
class _Scaling:
    """A number of channels and their factors, with the names of the two settings for messages."""

    count_name: str
    count: int
    factor_name: str
    factor: Factor

    def draw(self, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ascending channels below ``width``, and factors, each ``[count]``."""
        low, high = self.factor if isinstance(self.factor, tuple) else (self.factor, self.factor)
        channels = torch.randperm(width, generator=generator)[: self.count].sort().values
        u = torch.rand(self.count, generator=generator, dtype=torch.float64)
        # Not low·(high/low)^u alone: one given factor must come out exactly.
        return channels, low * (high / low) ** u if high > low else torch.full_like(u, low)

    def check(self, width: int) -> None:
        _check_count(self.count_name, self.count, width)
        bounds = self.factor if isinstance(self.factor, tuple) else (self.factor, self.factor)
        if len(bounds) != 2 or not all(_is_positive(v) for v in bounds) or bounds[0] > bounds[1]:
            raise UserError(
                f"expected {self.factor_name} as a finite number above 0 or (low, high) of such, found {self.factor}; "
                "try 32.0"
            )


@dataclass(frozen=True)
class _Massive:
    channels: int
    blocks: Sequence[int] | None
    ratio: float

    def resolved(self, layers: int) -> list[int]:
        if self.blocks is not None:
            return sorted(set(self.blocks))
        return sorted({min(1, layers - 1), max(layers - 2, 0)})

    def check(self, model: Decoder) -> None:
        count = len(model.layers)
        for block in self.resolved(count):
            if not 0 <= block < count:
                raise UserError(f"expected massive_blocks from 0 to {count - 1}, found {block}; name others")
            _check_count("massive_channels", self.channels, model.layers[block].feed_forward.intermediate)
        if not _is_positive(self.ratio):
            raise UserError(f"expected massive_ratio as a finite number above 0, found {self.ratio}; try 1000.0")

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Channels and factors ``[n]`` for x ``[T, C]``, the input of down, and facts on them.

        Channels of the lesser half by maximum are left out: in a dead one max/median says nothing.
        """
        size = x.double().abs()
        largest, median = size.amax(0), size.median(0).values
        alive = (largest >= largest.median()) & (largest > 0)
        if int(alive.sum()) < self.channels:
            raise UserError(
                f"expected {self.channels} channels for massive, found {int(alive.sum())} that are ever large; "
                "lower massive_channels or give tokens"
            )
        spread = torch.where(alive, largest / median.clamp_min(torch.finfo(x.dtype).tiny), torch.zeros_like(largest))
        channels = spread.topk(self.channels).indices.sort().values
        s = (self.ratio * size.median() / largest[channels]).clamp_min(1.0)
        carried = (size[:, channels] > largest[channels] / 10).sum(0)
        facts = {"max_over_median": spread[channels].tolist(), "tokens": carried.tolist(), "of": len(x)}
        return channels, s, facts


@dataclass
class _Plan:
    checkpoint: Checkpoint
    model: Decoder
    kinds: tuple[Kind, ...]
    seed: int
    norm: _Scaling
    value: _Scaling
    rope: _Scaling
    massive: _Massive
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, kinds: Sequence[Kind], seed: int, **settings: Any) -> _Plan:
        """Raises ``UserError`` for kinds and settings that cannot work."""
        for kind in kinds:
            if kind not in KINDS:
                near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else "choose from these"
                raise UserError(f"expected kinds of outliers from {', '.join(KINDS)}, found {kind!r}; {hint}")
        if not kinds or len(set(kinds)) < len(kinds):
            raise UserError(f"expected one or more kinds, each once, found {', '.join(kinds) or 'none'}; try norm")
        plan = cls(checkpoint, checkpoint.describe(), tuple(kinds), seed, **settings)
        model = plan.model
        plan.norm.check(model.hidden)
        for layer in model.layers:
            plan.value.check(layer.mixer.head_dim)
            plan.rope.check(layer.mixer.head_dim // 2)
        plan.massive.check(model)
        plan.facts = {"model_type": model.model_type, "kinds": list(kinds), "seed": seed}
        return plan

    def generator(self, kind: Kind) -> torch.Generator:
        """Of its own for each kind, so that a kind chooses the same alone and with others."""
        return torch.Generator().manual_seed(len(KINDS) * self.seed + KINDS.index(kind))

    def rotation(self) -> Tensor | None:
        """Q ``[d, d]`` float64, uniform among the orthogonal matrices (QR of a Gaussian matrix, positive diagonal)."""
        if "rotated" not in self.kinds:
            return None
        generator = self.generator("rotated")
        gaussian = torch.randn(self.model.hidden, self.model.hidden, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign()

    def steps(self, rotation: Tensor | None) -> Callable[[int, Tensors, Tensor], None]:
        """Makes ``step(block, its tensors, input of down)``, to be called for the blocks in order."""
        model, facts = self.model, self.facts
        generators = {kind: self.generator(kind) for kind in self.kinds}
        norm = self.norm.draw(model.hidden, generators["norm"]) if "norm" in self.kinds else None
        if norm is not None:
            facts["norm"] = {"channels": norm[0].tolist(), "factors": norm[1].tolist()}
        if rotation is not None:
            facts["rotated"] = {"untied": model.tied}
        facts |= {kind: [] for kind in self.kinds if kind not in ("norm", "rotated")}

        def step(block: int, tensors: Tensors, down_input: Tensor) -> None:
            layer = model.layers[block]
            mixer = layer.mixer
            for kind in self.kinds:
                generator = generators[kind]
                if kind == "norm" and norm is not None:
                    scale_norm(tensors, layer, *norm)
                elif kind == "massive" and block in self.massive.resolved(len(model.layers)):
                    channels, s, found = self.massive.choose(down_input)
                    scale_massive(tensors, layer, channels, s)
                    facts[kind].append({"block": block, **_listed(channels, s), **found})
                elif kind == "value_output":
                    for head in range(mixer.kv_heads):
                        channels, s = self.value.draw(mixer.head_dim, generator)
                        scale_value(tensors, layer, head, channels, s)
                        facts[kind].append({"block": block, "head": head, **_listed(channels, s)})
                elif kind == "rope_pair":
                    shared = mixer.k_norm is not None
                    for head in range(1 if shared else mixer.kv_heads):
                        pairs, s = self.rope.draw(mixer.head_dim // 2, generator)
                        scale_rope_pairs(tensors, layer, head, pairs, s)
                        facts[kind].append({"block": block, "head": None if shared else head, **_listed(pairs, s)})
                elif kind == "rotated" and rotation is not None:
                    rotate(tensors, layer, rotation)

        return step


def _listed(channels: Tensor, s: Tensor) -> dict[str, list[Any]]:
    return {"channels": channels.tolist(), "factors": s.tolist()}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_count(name: str, count: int, width: int) -> None:
    if not isinstance(count, int) or not 1 <= count <= width:
        raise UserError(f"expected {name} from 1 to {width}, found {count}; this model has {width}, name fewer")


def _probe_tokens(plan: _Plan, tokens: Tensor | None) -> Tensor:
    vocabulary = plan.model.vocabulary
    if tokens is None:
        length = min(PROBE[1], plan.model.context)
        generator = torch.Generator().manual_seed(plan.seed)
        return torch.randint(vocabulary, (PROBE[0], length), generator=generator)
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise UserError(
            f"expected tokens as whole numbers [B, T], found {tokens.dtype} {list(tokens.shape)}; stack the sequences"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise UserError(
            f"expected tokens from 0 to {vocabulary - 1}, found {int(tokens.min())} to {int(tokens.max())}; "
            "use the model's own tokenizer"
        )
    return tokens.long()


# --- The walk over the model.


@torch.no_grad()
def _write(plan: _Plan, ids: Tensor, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Block by block, in both models: inputs measured, new tensors written, a shard each; the tables come last."""
    checkpoint, model, facts = plan.checkpoint, plan.model, plan.facts
    rotation = plan.rotation()
    step = plan.steps(rotation)

    stored = model.embedding_name(checkpoint)
    embedding = checkpoint.read(stored)
    outer = {model.embedding: _table(embedding, None, rotation, dtype)}
    norm_name = f"{model.final_norm.name}.weight"
    gain = checkpoint.read(norm_name)
    if rotation is not None or not model.tied:
        head = embedding if model.tied else checkpoint.read(model.head)
        outer[model.head] = _table(head, None if rotation is None else gain.double(), rotation, dtype)
    outer[norm_name] = gain.to(dtype) if rotation is None else torch.ones(gain.shape, dtype=dtype)
    before, after = embed(model, ids, embedding.float()), embed(model, ids, outer[model.embedding].float())

    shards: dict[str, list[str]] = {}
    written = 0

    def write(tensors: Tensors) -> None:
        nonlocal written
        file = f"model-{len(shards) + 1:05d}-of-{len(model.layers) + 1:05d}.safetensors"
        write_shard(folder / file, tensors)
        shards[file] = sorted(tensors)
        written += sum(t.numel() * t.element_size() for t in tensors.values())

    facts["inputs"] = []
    for layer in model.layers:
        tensors = checkpoint.read_layer(layer)
        before, old = _run(DecoderBlock(model, layer.index, tensors), before)
        tensors = {name: t.double() for name, t in tensors.items()}
        step(layer.index, tensors, old["down"])
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
        after, new = _run(DecoderBlock(model, layer.index, tensors), after)
        facts["inputs"] += [{"block": layer.index, "role": role, **_ratios(old[role], new[role])} for role in old]
        write({layer.prefix + name: t for name, t in tensors.items()})

    old_head = embedding if model.tied else checkpoint.read(model.head)
    expected = _logits(model, before, gain, old_head)
    found = _logits(model, after, outer[norm_name], outer.get(model.head, outer[model.embedding]))
    facts["difference"] = float((found - expected).abs().max() / expected.abs().max())

    write(outer)
    write_index(folder, shards, written)
    settings = {k: v for k, v in checkpoint.config.items() if k != "torch_dtype"}
    settings |= {"dtype": str(dtype).removeprefix("torch."), "tie_word_embeddings": model.tied and rotation is None}
    for file in companions(checkpoint.path):
        shutil.copyfile(file, folder / file.name)
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    return facts


def _table(table: Tensor, gain: Tensor | None, rotation: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Embedding or head ``[V, d]``: T·diag(γ)·Q, a few rows at a time."""
    if rotation is None:
        return table.to(dtype)
    return torch.cat([((p.double() * (1 if gain is None else gain)) @ rotation).to(dtype) for p in table.split(ROWS)])


def _run(block: DecoderBlock, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The block's output, and by role the input of its linears; ``key``: K before RoPE, all ``[B·T, C]``."""
    keys: list[Tensor] = []
    mixer = block.layer.mixer
    name = block.layer.group("qkv").names[1] if mixer.k_norm is None else mixer.k_norm.name
    hook = block.get_submodule(name).register_forward_hook(lambda _, inputs, output: keys.append(output))
    try:
        hidden, inputs = run_watched(block, hidden)
    finally:
        hook.remove()
    seen = {"key": keys[0]} | inputs
    return hidden, {role: x.reshape(hidden.shape[0] * hidden.shape[1], -1) for role, x in seen.items()}


def _ratios(old: Tensor, new: Tensor) -> dict[str, list[float]]:
    def channel(x: Tensor) -> float:
        largest = x.abs().amax(0)
        return float(largest.max() / largest.median())

    def peak(x: Tensor) -> float:
        return float(x.abs().max() / x.abs().median())

    return {"channel_ratio": [channel(old), channel(new)], "peak_ratio": [peak(old), peak(new)]}


def _logits(model: Decoder, hidden: Tensor, gain: Tensor, head: Tensor) -> Tensor:
    return logits(model, final_norm(model, hidden, {f"{model.final_norm.name}.weight": gain.float()}), head.float())


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """Yields ``OUT.partial``; renames it to ``output`` on success, removes it on failure."""
    partial = output.with_name(output.name + ".partial")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"expected a new or empty output folder, found {output} in use; choose another or remove it")
    if partial.exists():
        raise UserError(f"expected no unfinished output, found {partial}; wait for what writes it, or remove it")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(output)
    except OSError as error:
        # Libraries raise OSError of their own, without errno; those are not about the disk.
        if error.errno is None:
            raise
        raise UserError(f"expected to write {output}, found: {error}; free some space or choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
