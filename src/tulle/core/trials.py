"""What may be tried on a model to see what it costs: other weights, fewer inputs, other tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from tulle.core.hessian import Hessian
from tulle.core.topk import Selection

Key = tuple[int | float | str, ...]
"""Name of a trial."""
WeightTrials = Callable[[int, Mapping[str, Tensor], Mapping[str, Hessian]], Iterable[tuple[Key, Mapping[str, Tensor]]]]
"""Of a block's number, its tensors by relative name and H of the input of every role: (key, Ŵ under the names of the
tensors whose place they take, as ``self_attn.q_proj.weight``) of each trial. Asked for a block without its experts,
then for some of these, one at a time, each with its own tensors and H alone; costs under one key are added up."""
InputTrials = Callable[[int, Mapping[str, Tensor]], Iterable[tuple[Key, Mapping[str, Selection]]]]
"""Of a block's number and its tensors: (key, selection of inputs by role, or by
:func:`tulle.models.description.expert_role` for all of its experts) of each trial."""
TableTrials = Callable[[str, Hessian], Iterable[tuple[Key, Tensor]]]
"""Of ``embedding``, ``head`` or ``tied`` (one table for both) and H of the head's inputs: (key, table ``[V, d]``) of
each trial. Called more than once; gives the same every time."""
