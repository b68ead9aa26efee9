"""Importing this module teaches transformers to load compressed models and Scaling Transformers.

``AutoModelForCausalLM.from_pretrained(OUT)`` then replaces the linears listed in ``quantization_config``
by :class:`tulle.hf.packed_linear.PackedLinear` and fills them with the packed tensors, whatever ``dtype`` is asked
for: that is the dtype of everything else (embeddings, norms, biases, activations). ``save_pretrained``
writes the packed form back.

``AutoConfig`` and ``AutoModelForCausalLM`` also know ``tulle.models.scaling_transformer`` then, from transformers 5.23
on, whose caches hold the states of convolutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tulle.errors import UserError
from tulle.format.spec import QUANT_METHOD, LinearSpec, QuantizationConfig
from tulle.hf.attention import IMPLEMENTATION, attach, grids_of
from tulle.hf.experts import Experts, put_experts, without_merges
from tulle.hf.packed_embedding import PackedEmbedding, TiedHead
from tulle.hf.packed_linear import DTYPES, PackedLinear
from tulle.models.checkpoint import Checkpoint
from tulle.models.description import describe, families

MISMATCH = "config.json and weights are not of one model"

if Version(transformers.__version__) >= Version("5.23"):
    from tulle.models import scaling_transformer

    AutoConfig.register("scaling_transformer", scaling_transformer.ScalingTransformerConfig)
    AutoModel.register(scaling_transformer.ScalingTransformerConfig, scaling_transformer.ScalingTransformerModel)
    AutoModelForCausalLM.register(
        scaling_transformer.ScalingTransformerConfig, scaling_transformer.ScalingTransformerForCausalLM
    )


@register_quantization_config(QUANT_METHOD)
class TulleConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed model.

    Raises ``UserError`` for a ``format_version`` not known here and for malformed entries.
    """

    def __init__(self, **settings: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.packed = QuantizationConfig.from_json({"quant_method": QUANT_METHOD} | settings)

    def to_dict(self) -> dict[str, Any]:
        return self.packed.to_json()


@register_quantizer(QUANT_METHOD)
class TulleQuantizer(HfQuantizer):
    """Puts the packed linears in place before transformers reads the weights."""

    requires_calibration = True
    quantization_config: TulleConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        linears = self.quantization_config.packed.linears
        files = kwargs.get("checkpoint_files")
        if files:
            require_packed_tensors(Checkpoint.open(Path(files[0]).parent), linears)
        held = put_experts(model, linears)
        for name, spec in linears.items():
            if name not in held:
                _replace(model, name, spec)
        _tie_head(model)
        for name, spec in linears.items():
            if spec.transform_of is not None:
                own, holder = (held.get(one) or _packed(model, one) for one in (name, spec.transform_of))
                own.share_transform(holder)
        grids = grids_of(self.quantization_config.packed.attention)
        if grids is not None:
            for layer in describe(model.config.to_dict()).layers:
                attach(model.get_submodule(_inner(model, layer.prefix + layer.mixer.name)), grids)
            model.set_attn_implementation(IMPLEMENTATION)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if not isinstance(module, PackedLinear | PackedEmbedding):
                continue
            for suffix, (kind, _) in module.spec.stored_tensors().items():
                found = module.get_buffer(suffix)
                # Before 5.0, transformers casts floating buffers to the dtype asked for. From float32 the way back is
                # exact.
                if found.dtype == torch.float32:
                    parent, _, child = suffix.rpartition(".")
                    setattr(module.get_submodule(parent), child, found.to(DTYPES[kind]))
                elif found.dtype != DTYPES[kind]:
                    raise UserError(
                        f"expected {name}.{suffix} as {kind}, found it cast to {found.dtype} by transformers; "
                        "upgrade it to 5.0 or load with dtype=torch.float32"
                    )

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        found: list[Any] = super().update_weight_conversions(weight_conversions, model)
        return without_merges(found) if any(isinstance(module, Experts) for module in model.modules()) else found

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def load(path: str | Path, dtype: torch.dtype | str = "auto", **kwargs: Any) -> PreTrainedModel:
    """A compressed folder as a transformers causal language model, in evaluation mode.

    ``dtype`` is that of activations and of the tensors that are not packed ("auto": as stored); other
    arguments go to ``from_pretrained``. Raises ``UserError`` when the folder is not a whole compressed model.
    """
    checkpoint = Checkpoint.open(path)
    require_packed_tensors(checkpoint, packed_linears(checkpoint))
    if checkpoint.config.get("model_type") in families():
        checkpoint.describe()
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, **kwargs).eval()


def load_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """A checkpoint, packed or dense, as transformers' own model.

    transformers reads a folder that it understands itself; of any other source it is given the tensors.
    """
    if checkpoint.config.get("model_type") in families():
        checkpoint.describe()  # transformers makes up tensors that are missing
    if checkpoint.source.plain:
        return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype, local_files_only=True)
    settings = dict(checkpoint.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = checkpoint.describe()
    state = {name: checkpoint.read(name).to(dtype) for name in checkpoint.names_of(model)}
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return found


def use_sparse_tensor_cores(model: PreTrainedModel) -> list[str]:
    """Lets the 2:4 linears of a loaded model, on a CUDA device in half precision, run on sparse tensor cores
    (``torch.sparse.to_sparse_semi_structured``), and returns their names.

    Taken are linears with at most two kept weights in every four input channels and float inputs; integer arithmetic
    stays as it is. Weights differ from :class:`PackedLinear`'s in nothing, sums in their order alone. Moving or casting
    the model undoes it. Raises ``UserError`` without such a device or without such linears.
    """
    from torch.sparse import to_sparse_semi_structured

    parameter = next(model.parameters())
    if parameter.device.type != "cuda" or parameter.dtype not in (torch.float16, torch.bfloat16):
        raise UserError(
            f"expected a model in float16 or bfloat16 on a CUDA device, found {parameter.dtype} on {parameter.device}; "
            'load it with dtype=torch.bfloat16 and call model.to("cuda") first'
        )
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedLinear) and fits_two_of_four(m)]
    if not found:
        raise UserError("expected linears with 2:4 sparsity, found none; compress with a recipe such as 2of4")
    for _, module in found:
        module.set_weight(to_sparse_semi_structured(module.dequantise().to(parameter.dtype)))
    return [name for name, _ in found]


def fits_two_of_four(linear: PackedLinear) -> bool:
    """Whether inputs are floats and the weight has at most two kept entries in every four input channels, in a shape
    that the kernels take (multiples of 64)."""
    rows, columns = linear.spec.shape
    if linear.grid is not None or not linear.spec.sparse or rows % 64 or columns % 64:
        return False
    stripes = linear.dequantise().reshape(rows, -1, 4) != 0
    return bool((stripes.sum(-1) <= 2).all())


def packed_linears(checkpoint: Checkpoint) -> dict[str, LinearSpec]:
    """The linears that the folder's ``quantization_config`` lists; ``UserError`` when it is not of Tulle."""
    packed = checkpoint.packed
    if packed is None:
        raise UserError(
            f"expected a model made by tulle compress, found a dense model in {checkpoint.path}; compress it first"
        )
    return packed.linears


def require_packed_tensors(checkpoint: Checkpoint, linears: dict[str, LinearSpec]) -> None:
    """Raises ``UserError`` when a packed tensor is missing or not of the dtype and shape its spec says."""
    for name, spec in linears.items():
        for suffix, (kind, shape) in spec.stored_tensors().items():
            info = checkpoint.info(f"{name}.{suffix}")
            if info.dtype != DTYPES[kind] or info.shape != tuple(shape):
                raise UserError(
                    f"expected {name}.{suffix} as {kind} {list(shape)}, found {info.dtype} "
                    f"{list(info.shape)}; {MISMATCH}"
                )


def _inner(model: PreTrainedModel, name: str) -> str:
    """A base model (AutoModel) has the same modules without the prefix, and no head."""
    if hasattr(model, model.base_model_prefix):
        return name
    return name.removeprefix(model.base_model_prefix + ".")


def _packed(model: PreTrainedModel, name: str) -> PackedLinear:
    module = model.get_submodule(_inner(model, name))
    assert isinstance(module, PackedLinear)
    return module


def _replace(model: PreTrainedModel, name: str, spec: LinearSpec) -> None:
    inner = _inner(model, name)
    if inner == name and not hasattr(model, model.base_model_prefix):
        return  # a head, which a base model does not have
    name = inner
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        linear = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"expected a linear {name}, found none in {type(model).__name__}; {MISMATCH}") from None
    if isinstance(linear, nn.Embedding) and tuple(linear.weight.shape) == tuple(spec.shape):
        weight = linear.weight
        scale = _embedding_scale(name, linear)
        packed = PackedEmbedding(spec, linear.padding_idx, device=weight.device, dtype=weight.dtype, multiplier=scale)
        setattr(parent, child, packed)
        return
    if not isinstance(linear, nn.Linear) or (linear.out_features, linear.in_features) != tuple(spec.shape):
        raise UserError(f"expected {name} as a linear of shape {list(spec.shape)}, found {linear}; {MISMATCH}")
    weight = linear.weight
    setattr(parent, child, PackedLinear(spec, linear.bias is not None, device=weight.device, dtype=weight.dtype))


def _embedding_scale(name: str, embedding: nn.Embedding) -> float:
    """What an embedding's rows are multiplied by (Gemma's). Raises ``UserError`` for a class that may do otherwise."""
    if type(embedding) is nn.Embedding:
        return 1.0
    scale = getattr(embedding, "scalar_embed_scale", None)
    if scale is None:
        raise UserError(
            f"expected {name} as an embedding that at most scales its rows, found {type(embedding).__name__}; use "
            "transformers 5.0 or newer, or the engine"
        )
    return float(scale)


def _tie_head(model: PreTrainedModel) -> None:
    """Gives a head that is tied to a packed embedding that embedding's table."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding) or not isinstance(head, nn.Linear):
        return
    if not model.config.get_text_config().tie_word_embeddings:
        return
    if Version(transformers.__version__) < Version("5.0"):
        raise UserError(
            "expected transformers 5.0 or newer for an embedding in codes that is tied to the head, found "
            f"{transformers.__version__}; upgrade it"
        )
    model.set_output_embeddings(TiedHead(embedding))
    # There is no parameter left that transformers could tie.
    model._tied_weights_keys = {}  # type: ignore[assignment]
    model.all_tied_weights_keys = {}
