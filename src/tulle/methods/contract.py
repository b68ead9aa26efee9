"""What the block walker hands to a method, and what it wants back.

The loop belongs to the walker, the formula to the method. A method belongs to one of four stages, which a recipe runs
in this order:

- ``model``: before the walk, something that concerns the whole model (a rotation of the residual stream, which linears
  keep more bits);
- ``block``: before a block's linears are compressed, something that spans its groups or changes what they see
  (smoothing, transforms, quantisers of activations, learned clipping);
- ``linear``: the weights of one *group* of linears that share an input (``q/k/v``, ``o``, ``gate/up``, ``down``), with
  the statistics of that input as the transformed and quantised block sees it;
- ``refine``: after the linear steps in front of it, all compressed linears of a block together. Linear steps may follow

Notation as in the papers: X ``[T, C_in]`` tokens, W ``[C_out, C_in]``, Y = X·Wᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from tulle.core.grid import Grid, Quantised, row_chunks
from tulle.core.head_grids import HeadGrids
from tulle.core.hessian import Hessian
from tulle.core.token_grid import TokenGrid
from tulle.core.topk import Selection
from tulle.core.transform import BlockMatrix, Diagonal, Permutation, Transform, fold, run, stored
from tulle.core.trials import InputTrials, Key, TableTrials, WeightTrials
from tulle.errors import UserError
from tulle.models.description import STREAM_READERS, Expert, Linear, LinearGroup, Norm, require_plain_values, target_of

Statistic = Literal["hessian", "column_norm", "absmax", "rows", "sample"]
Stage = Literal["model", "block", "linear", "refine"]
Decision = Literal[
    "mask", "codes", "inputs", "cache", "smoothing", "rotation", "clipping", "order", "bits", "grids", "sparsities",
    "input sparsities", "selection",
]  # fmt: skip
"""What a step settles once and for all; a second step that settles the same of a role would work on the first one's
result. (Bases of the residual stream and of the values are in :class:`Decisions`.)"""


@dataclass
class Statistics:
    """Running statistics of the input X ``[T, C_in]`` of one group, over all calibration tokens.

    Only what the recipe's steps ask for is collected; the rest is ``None``.
    """

    tokens: int = 0
    hessian: Hessian | None = None
    """H = 2·XᵀX/T, ``[C_in, C_in]``, with its cached factorisations."""
    column_norm: Tensor | None = None
    """‖X_j‖₂ over the tokens, ``[C_in]``."""
    absmax: Tensor | None = None
    """max|X_j|, ``[C_in]``."""
    rows: Tensor | None = None
    """Whole tokens ``[K, C_in]``: those that carry the maxima of the channels, and some drawn at random
    (:class:`tulle.core.rotation.Extremes`). What a search for outliers needs of X."""
    sample: Tensor | None = None
    """Whole tokens ``[K, C_in]``, each as likely as any other (:class:`tulle.core.sample.Reservoir`)."""

    def add(self, x: Tensor, needs: frozenset[Statistic]) -> None:
        """Takes tokens X ``[T, C_in]``, float32 or bfloat16, into those of H, column norms and maxima that are needed,
        all float32."""
        self.tokens += x.shape[0]
        if "hessian" in needs:
            if self.hessian is None:
                self.hessian = Hessian.zeros(x.shape[1], x.device)
            self.hessian.add(x)
        if "column_norm" in needs:
            squares = x.float().square().sum(0)
            old = self.column_norm
            self.column_norm = squares.sqrt() if old is None else (old.square() + squares).sqrt()
        if "absmax" in needs:
            peak = x.abs().amax(0).float()
            self.absmax = peak if self.absmax is None else torch.maximum(self.absmax, peak)

    def transformed(self, transform: Transform) -> None:
        """Moves ``rows`` and ``absmax`` to x·T; the rest is no longer known and is dropped.

        ``sample`` moves along. max|x_j| is exact where T only scales or permutes channels, and the maximum over
        ``rows`` otherwise.
        """
        self.hessian = self.column_norm = None
        if self.sample is not None:
            self.sample = transform.apply(self.sample)
        if self.rows is not None:
            self.rows = transform.apply(self.rows)
        if self.absmax is not None:
            if transform.kind in ("diagonal", "permutation"):
                self.absmax = transform.apply(self.absmax).abs()
            else:
                self.absmax = None if self.rows is None else self.rows.abs().amax(0)


@dataclass
class LinearState:
    """One linear while the recipe's steps are applied to it.

    ``weight`` is always the effective float32 weight, i.e. exactly what would be written now. A pruning method sets
    ``mask`` and zeroes ``weight`` outside it; a quantiser keeps the mask it finds, sets ``quantised`` and replaces
    ``weight`` by the dequantised values.
    """

    name: str
    """Module path, e.g. ``model.layers.0.mlp.down_proj``."""
    weight: Tensor
    """``[C_out, C_in]`` float32."""
    dense: Tensor
    """The checkpoint's own weight, ``[C_out, C_in]``, up to what block methods fold into it from its neighbours, which
    leaves the block's function alone. Methods of the linear stage never change it."""
    role: str = ""
    mask: Tensor | None = None
    """bool ``[C_out, C_in]``, True = kept."""
    pattern: str | None = None
    """``"N:M"`` when the mask has that structure along the input channels."""
    quantised: Quantised | None = None
    transform: tuple[Transform, ...] = ()
    """Maps that run on the input; the weight that belongs to x·T is W·T⁻ᵀ. Siblings share one tuple."""
    input_grid: TokenGrid | None = None
    """Per-token dynamic quantiser of the (transformed) input; None = unquantised input."""
    input_selection: Selection | None = None
    """Which inputs a token keeps, after transforms and rounding; None: all. Siblings share one object."""
    ranges: tuple[Tensor, Tensor] | None = None
    """Learned ends (low, high) of the weights' grids, ``[C_out, G]`` each; a quantiser takes them for the extremes."""
    kept_bits: int | None = None
    """A quantiser takes this many bits instead of its own (mixed precision); None: its own."""
    allotted_grid: Grid | None = None
    """A quantiser takes this grid instead of its own (an allocation of bits); None: its own."""
    allotted: float | None = None
    """A pruning step takes this share of pruned weights instead of its own ``sparsity`` (an allocation); None: its own.
    A step with a ``pattern`` ignores it."""
    allotted_inputs: float | None = None
    """A selecting step drops this share of the inputs instead of its own ``share`` (an allocation); None: its own."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report, e.g. an escalated damping."""

    @property
    def input_bits(self) -> int | None:
        return None if self.input_grid is None else self.input_grid.bits

    def folded(self) -> Tensor:
        """W·T⁻ᵀ ``[C_out, C_in]`` for the dense W and the transform so far."""
        if not self.transform:
            return self.dense
        weight = torch.empty_like(self.dense)
        for rows in row_chunks(weight):
            weight[rows] = fold(self.transform, self.dense[rows])
        return weight


@dataclass
class GroupState:
    """The linears of one block that share one input."""

    role: str
    linears: list[LinearState]
    statistics: Statistics

    def add_transform(self, transform: Transform) -> None:
        """Puts one more map in front of the group's linears, with the values that the file will hold."""
        transform = stored(transform)
        require_no_selection(self)
        for linear in self.linears:
            linear.transform = (*linear.transform, transform)
        self.statistics.transformed(transform)


def require_no_selection(group: GroupState) -> None:
    """Raises ``UserError`` where inputs have been selected: what changes the inputs comes before that."""
    if any(linear.input_selection is not None for linear in group.linears):
        raise UserError(
            f"expected steps that change {group.role}'s inputs before the one that selects among them, found one "
            "after it; put teal or wina last of the steps on blocks"
        )


@dataclass
class ProducedRows:
    """Output rows of a linear that become input channels of another group; ``linear`` as in
    :class:`tulle.models.description.Producer`."""

    state: LinearState
    rows: slice = field(default_factory=lambda: slice(None))
    linear: bool = True

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces the rows ``[C, C_in]``; the linear's other rows stay."""
        self.state.dense = self.replaced(self.state.dense, change)
        if self.state.ranges is not None:
            low, high = self.state.ranges
            self.state.ranges = (self.replaced(low, change), self.replaced(high, change))

    def replaced(self, whole: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``whole`` ``[C_out, …]`` with these rows changed."""
        changed = change(whole[self.rows])
        if changed.shape == whole.shape:
            return changed
        whole = whole.clone()
        whole[self.rows] = changed
        return whole


@dataclass
class BlockState:
    """One decoder block before its linears are compressed, for methods of the block stage.

    The *graph folds* below rewrite norms, producers and readers together so that the block computes the same function;
    nothing of them remains at run time. ``GroupState.add_transform`` is the other way: a map that runs on the input.
    """

    index: int
    groups: dict[str, GroupState]
    """Every role of the block, with the statistics of its inputs."""
    gains: dict[str, Tensor]
    """Gain γ ``[C_in]`` of the norm that feeds a role's group and no other, offset included."""
    biases: dict[str, Tensor]
    """Biases by full linear name, where there are any."""
    producers: dict[str, tuple[ProducedRows, ...]]
    """What gives a role's input channels: the values for ``o``; up, then gate, for ``down``."""
    heads: int
    kv_heads: int
    head_dim: int
    norm_biases: dict[str, Tensor] = field(default_factory=dict)
    """Biases of the norms of ``gains``, by role, where they have one."""
    seed: int = 0
    """Of everything random in this block: the run's seed and the block's number."""
    attention: HeadGrids | None = None
    residual: tuple[Transform, ...] = ()
    """Maps of the residual stream that were folded into the checkpoint before the walk."""
    permutations: list[dict[str, Any]] = field(default_factory=list)
    """What channel permutations retained, per role, for the report."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report."""
    forward: Callable[[Tensor], Tensor] | None = None
    """Hidden ``[B, T, d]`` → hidden, by ``module`` as it stands."""
    module: nn.Module | None = None
    """The decoder block that learned methods put trainable linears into."""
    batches: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]] | None = None
    """(inputs of the compressed model, outputs of the dense block on its own inputs, bool ``[B, T]`` of real tokens)
    per batch; only for methods that ``learn``."""

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.index) * 64 + salt)

    def linears(self, roles: Sequence[str]) -> Iterator[LinearState]:
        for role in roles:
            yield from self.groups[role].linears

    def fold_diagonal(self, role: str, scale: Tensor, in_front: bool = False) -> None:
        """x·diag(d) reaches the role's linears from now on, ``scale`` d ``[C_in]`` being folded into what feeds them.

        Into γ of the norm (qkv, gate_up), the rows of v (o; d must be equal for the query heads that share a KV head)
        or the rows of up (down). Where nothing takes it (no norm, one that feeds two groups, an activation in between),
        it becomes a transform that runs on the input. Before any transform of the input; or, with ``in_front``, in
        front of those there are, after which the statistics of the group are no longer known.
        """
        group = self.groups[role] if in_front else self._foldable(role)
        require_no_selection(group)
        if in_front:
            group.statistics = Statistics(group.statistics.tokens)
        producers = self.producers.get(role, ())
        if role in self.gains:
            self.gains[role] = self.gains[role] * scale
            if role in self.norm_biases:
                self.norm_biases[role] = self.norm_biases[role] * scale
        elif producers and producers[0].linear:
            self._scale_rows(producers[0], self._per_producer(role, scale))
        else:
            first = stored(Diagonal(scale))
            for linear in group.linears:
                linear.transform = (first, *linear.transform)
            if not in_front:
                group.statistics.transformed(first)
            return
        for linear in group.linears:
            linear.dense = linear.dense / scale
        if not in_front:
            group.statistics.transformed(Diagonal(scale))

    def fold_permutation(self, role: str, index: Tensor) -> None:
        """x[:, index] reaches the role's linears; the producers' rows are permuted.

        For ``o`` (``index`` keeps heads together, alike for the query heads of one KV head) and ``down``. Where nothing
        gives the channels out in another order, it becomes a transform that runs on the input.
        """
        group = self._foldable(role)
        if not self.producers.get(role):
            group.add_transform(Permutation(index))
            return
        rows = self._per_producer(role, index) if role == "o" else index
        for producer in self.producers[role]:
            producer.change(lambda weight: weight[rows])
            self._change_bias(producer, lambda bias: bias[rows])
        if role in self.gains:
            self.gains[role] = self.gains[role][index]
            if role in self.norm_biases:
                self.norm_biases[role] = self.norm_biases[role][index]
        for linear in group.linears:
            linear.dense = linear.dense[:, index]
        group.statistics.transformed(Permutation(index))

    def fold_value_rotation(self, rotation: Transform) -> None:
        """v's heads come out as v·R from now on, R orthogonal on head_dim, and o reads them so."""
        group = self._foldable("o")
        value, size = require_plain_values(self.producers["o"]), self.head_dim
        value.state.ranges = None  # rows of other numbers

        def rotated(weight: Tensor) -> Tensor:
            heads = weight.reshape(-1, size, weight.shape[1]).transpose(1, 2)
            return rotation.apply(heads).transpose(1, 2).reshape(weight.shape).contiguous()

        value.change(rotated)
        self._change_bias(value, lambda bias: rotation.apply(bias.reshape(-1, size)).reshape(bias.shape))
        for linear in group.linears:
            heads = linear.dense.reshape(linear.dense.shape[0], -1, size)
            linear.dense = rotation.fold(heads).reshape(linear.dense.shape)
        statistics = group.statistics
        statistics.hessian = statistics.column_norm = None
        if statistics.rows is not None:
            rows = statistics.rows
            statistics.rows = run([rotation], rows.reshape(len(rows), -1, size)).reshape(rows.shape)
            statistics.absmax = statistics.rows.abs().amax(0)
        else:
            statistics.absmax = None
        if statistics.sample is not None:
            kept = statistics.sample
            statistics.sample = run([rotation], kept.reshape(len(kept), -1, size)).reshape(kept.shape)

    def _foldable(self, role: str) -> GroupState:
        group = self.groups[role]
        require_no_selection(group)
        if any(linear.transform for linear in group.linears):
            raise UserError(
                f"expected smoothing and folded permutations before a transform of {role}'s input, found one already "
                "there; put that step first"
            )
        return group

    def _per_producer(self, role: str, values: Tensor) -> Tensor:
        """Of one value per input channel, those per output row of the producer: for o, per KV head."""
        if role != "o":
            return values
        shared = self.heads // self.kv_heads
        heads = values.reshape(self.kv_heads, shared, self.head_dim)
        within = heads
        if not values.is_floating_point():
            within = heads - self.head_dim * torch.arange(self.heads, device=values.device).reshape(
                self.kv_heads, shared, 1
            )
        if bool((within != within[:, :1]).any()):
            raise ValueError("the query heads of one KV head must share one scaling or permutation")
        rows = within[:, 0]
        if not values.is_floating_point():
            rows = rows + self.head_dim * torch.arange(self.kv_heads, device=values.device)[:, None]
        return rows.reshape(-1)

    def _scale_rows(self, producer: ProducedRows, scale: Tensor) -> None:
        producer.change(lambda weight: weight * scale[:, None])
        if producer.state.ranges is not None:
            low, high = producer.state.ranges
            producer.state.ranges = (torch.minimum(low, high), torch.maximum(low, high))  # a negative factor swaps them
        self._change_bias(producer, lambda bias: bias * scale)

    def _change_bias(self, producer: ProducedRows, change: Callable[[Tensor], Tensor]) -> None:
        name = producer.state.name
        if name in self.biases:
            self.biases[name] = producer.replaced(self.biases[name], change)


@dataclass
class CompressedBlock:
    """One decoder block whose linears are compressed, for methods of the refine stage."""

    index: int
    groups: dict[str, GroupState]
    """Every role that the recipe compresses. A method leaves what it found in the linears' states."""
    module: nn.Module
    """The block as it will be stored, float32, quantisers of inputs included."""
    modules: dict[str, nn.Linear]
    """Its linears by full name."""
    forward: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Hidden ``[B, T, d]`` → the residual stream after attention, and after the block."""
    batches: Callable[[], Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]]
    """Per batch: inputs of the compressed model; the dense model's streams after attention and after the block, on its
    own inputs; bool ``[B, T]`` of real tokens."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report."""


@dataclass
class Decisions:
    """What the steps of the model stage decided, for the walk that follows."""

    residual: tuple[Transform, ...] = ()
    """Orthogonal maps of the residual stream, folded into every reader and writer. Steps that follow see the model
    after it."""
    values: dict[int, BlockMatrix] = field(default_factory=dict)
    """Block → orthogonal map of the KV heads' values ``[kv_heads, b, b]``, folded into v and o."""
    values_taken: bool = False
    """Whether a step gives the values another basis, here or block by block."""
    kept: dict[str, int] = field(default_factory=dict)
    """Full linear name → bits that quantisers take instead of their own (16: none)."""
    kept_inputs: dict[str, int] = field(default_factory=dict)
    """The same for the quantiser of a linear's input."""
    grids: dict[str, Grid] = field(default_factory=dict)
    """Full name of a linear or a table → grid that quantisers take instead of their own."""
    sparsity: dict[str, float] = field(default_factory=dict)
    """Full linear name → share of pruned weights that pruning steps take instead of their own."""
    input_sparsity: dict[str, float] = field(default_factory=dict)
    """Full linear name → share of inputs that selecting steps drop instead of their own."""
    notes: list[str] = field(default_factory=list)
    """Lines for the report."""

    @property
    def changes_basis(self) -> bool:
        return bool(self.residual or self.values)


@dataclass(kw_only=True)
class Survey(Decisions):
    """What a method of the model stage sees of the dense model, in the basis that the steps before it chose, and what
    it may decide."""

    layers: int
    rows: Callable[[int, str], Tensor]
    """Sampled input tokens ``[K, C_in]`` of a role of a block, in the dense model."""
    block: Callable[[int], dict[str, Tensor]]
    """Float32 tensors of a block without its experts by relative name."""
    groups: Sequence[Mapping[str, LinearGroup]]
    """Of every block, by role. Blocks may differ in linears and widths; a role may be missing. Those of experts are in
    ``experts``."""
    prefix: Callable[[int], str]
    """Of a block's full names."""
    hidden: int
    experts: Sequence[Sequence[Expert]] = ()
    """Of every block; empty: none has any."""
    expert: Callable[[int, int], dict[str, Tensor]] = lambda block, expert: {}
    """Float32 tensors of one of a block's experts by relative name."""
    chosen: Sequence[int] = ()
    """Experts that a token goes to, of every block."""
    seed: int = 0
    heads: Sequence[tuple[int, int, int]] = ()
    """Query heads, KV heads, head_dim of every block."""
    column_norm: Callable[[int, str], Tensor] | None = None
    """‖X_j‖₂ ``[C_in]`` of a role of a block over the tokens of the walk; for methods that need ``column_norm``. Of a
    group of an expert, whose first linear is named instead of a role: over the tokens that go there, as if they were
    all; zeros where none goes."""
    costs: Costs | None = None
    """``costs(tokens, weights, inputs, tables)``: for every trial the mean KL divergence (nats per token) of the next
    token's distribution from the dense model's, all the rest being dense, estimated on about ``tokens`` tokens
    (:mod:`tulle.models.fisher`): two passes forward and one backward, however many trials there are."""
    look: Callable[[See, Sequence[str]], None] | None = None
    """``look(see, roles)``: walks the model once and shows every block, with H of the inputs of ``roles`` in it."""
    head_hessian: Hessian | None = None
    """H of the head's inputs, where a step quantises a tied table."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """``embedding`` and ``head`` → module name; a tied model has an embedding alone."""
    table: Callable[[str], Tensor] | None = None
    """A table ``[V, d]`` by its key in ``tables``, as stored."""
    stored_bytes: int = 0
    """Of all tensors of the checkpoint that belong to the model, with their names in the file; a tied table counts
    once."""
    packed_bytes: Callable[[tuple[int, int], Grid], int] | None = None
    """Of a dense weight of shape ``(C_out, C_in)`` on a grid, as the file holds it."""
    weight_bytes: Callable[[str], int] = lambda name: 0
    """Of the weight of a module by its full name."""

    def linears(self, block: int, roles: Iterable[str], experts: bool = False) -> list[tuple[str, Linear]]:
        """A block's linears that ``roles`` target, in their order, each with its group's role; with ``experts`` theirs
        besides."""
        every = [*self.groups[block].values()]
        if experts:
            every += [group for expert in self.experts_of(block) for group in expert.groups]
        reached = (group for role in roles for group in every if target_of(group.role) == role)
        return [(group.role, linear) for group in reached for linear in group.linears]

    def experts_of(self, block: int) -> Sequence[Expert]:
        return self.experts[block] if self.experts else ()

    def units(self, block: int, roles: Sequence[str]) -> dict[str, Unit]:
        """What decides together: every linear of a block that ``roles`` target; but the gates, the ups and the downs of
        all its experts, under a name with ``*`` for the expert's number. Rare experts see too few tokens for a decision
        of their own. Names are relative."""
        found: dict[str, Unit] = {linear.name: ((role, linear),) for role, linear in self.linears(block, roles)}
        for expert in self.experts_of(block):
            for role in roles:
                for group in (group for group in expert.groups if target_of(group.role) == role):
                    for linear in group.linears:
                        name = linear.name.replace(f".{expert.index}.", ".*.")
                        found[name] = (*found.get(name, ()), (group.role, linear))
        return found

    def readers(self, block: int, roles: Iterable[str] = STREAM_READERS) -> list[LinearGroup]:
        """The groups of a block among ``roles`` that read the residual stream through a norm."""
        found = (self.groups[block].get(role) for role in STREAM_READERS if role in roles)
        return [group for group in found if group is not None and group.norm is not None]


def gain(tensors: Mapping[str, Tensor], norm: Norm | None) -> Tensor:
    """γ ``[d]`` of a norm, offset included, of a block's tensors by relative name."""
    assert norm is not None
    return tensors[f"{norm.name}.weight"] + norm.offset


See = Callable[[int, dict[str, Tensor], dict[str, Hessian]], None]
"""Of a block's number, its float32 tensors by relative name and H of the inputs of roles."""
Unit = tuple[tuple[str, Linear], ...]
"""Linears that share what is decided, each with its group's role."""


class Costs(Protocol):
    """:attr:`Survey.costs`."""

    def __call__(
        self,
        tokens: int,
        weights: WeightTrials | None = None,
        inputs: InputTrials | None = None,
        tables: TableTrials | None = None,
    ) -> dict[Key, float]: ...


class Method:
    """Base of every recipe step.

    Subclasses are frozen dataclasses of settings. They state their stage and which statistics they need, and implement
    :meth:`apply_linear` (stage ``linear``; :meth:`apply` where the siblings of a group must be seen together),
    :meth:`prepare` (``block``), :meth:`plan` (``model``) or :meth:`refine` (``refine``). ``validate`` is called once
    per linear before the run starts, with its shape, so that a setting that cannot work (group size, N:M) is refused
    before any time is spent.
    """

    stages: ClassVar[tuple[Stage, ...]] = ("linear",)
    """Where it acts, in order; the first decides its place in a recipe."""
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    learns: ClassVar[bool] = False
    """Whether it trains against the dense block's outputs; :meth:`prepare` then has ``BlockState.batches``."""
    settles: ClassVar[frozenset[Decision]] = frozenset()
    """What no other step of a recipe may settle for the same role. A pruning step must follow up ``sparsities``, a
    selecting step ``input sparsities``."""

    refuses_experts: ClassVar[str] = ""
    """Why it does not work on a model with experts, whose weights are in memory one at a time; empty: it does."""
    takes_tables: ClassVar[bool] = False
    """Whether a recipe may give it the embedding and the head: a quantiser that sets nothing but ``quantised``."""

    def settled_roles(self, decision: Decision, roles: Sequence[str]) -> Sequence[str]:
        """Of the targets, the roles for which it settles ``decision``."""
        return roles

    def changes_residual_basis(self, roles: Sequence[str]) -> bool:
        """Whether, with these targets, it gives the residual stream another basis."""
        return False

    def plan(self, survey: Survey, roles: tuple[str, ...]) -> None:
        raise NotImplementedError

    def prepare(self, block: BlockState, roles: tuple[str, ...]) -> None:
        raise NotImplementedError

    def refine(self, block: CompressedBlock, roles: tuple[str, ...]) -> None:
        raise NotImplementedError

    def apply(self, group: GroupState) -> None:
        for linear in group.linears:
            method = self.at(linear)
            if method is not None:
                method.apply_linear(linear, group.statistics)

    def at(self, linear: LinearState) -> Method | None:
        """This method with the sparsity that an allocation and the bits that mixed precision give the linear; None
        where those leave it unquantised."""
        own: dict[str, Any] = {}
        if linear.allotted_grid is not None and "codes" in self.settles:
            grid = linear.allotted_grid
            own |= {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
            own["scale_bits"] = grid.scale_bits
            if hasattr(self, "format"):
                own["format"] = grid.format
        if linear.allotted is not None and self.respects_allocation:
            own["sparsity"] = linear.allotted
        if linear.kept_bits is not None and hasattr(self, "bits"):
            if linear.kept_bits >= 16:
                return None
            own["bits"] = linear.kept_bits
            if hasattr(self, "format"):
                own["format"] = "int"  # floats have 4 bits
        return replace(self, **own) if own else self  # type: ignore[type-var]

    @property
    def respects_allocation(self) -> bool:
        """Whether it prunes to a sparsity of its own, in whose place another can be put (N:M cannot)."""
        return "linear" in self.stages and getattr(self, "sparsity", None) is not None

    def apply_linear(self, linear: LinearState, statistics: Statistics) -> None:
        raise NotImplementedError

    def validate(self, name: str, shape: tuple[int, int]) -> None:
        """Raises ``UserError`` when the settings do not fit a weight of this shape."""


Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: called by long work; the command line draws it."""
