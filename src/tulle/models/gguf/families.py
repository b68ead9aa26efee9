"""Families of GGUF files: what llama.cpp calls them, stores of them, and knows of them without a key.

A family is one entry of :data:`FAMILIES`. Reading (:mod:`tulle.models.gguf.config`) and writing
(:mod:`tulle.export.gguf_metadata`) follow the same entry. What an entry says is what llama.cpp computes (its
``src/models``) and what its converter stores (``conversion``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tulle.errors import UserError
from tulle.models.description import Attention, Decoder
from tulle.models.gguf import delta_net, gemma4
from tulle.models.gguf.names import Names

Config = Mapping[str, Any]
QKV = ("attn_q", "attn_k", "attn_v")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
PARTS = ("gate", "up", "down")
LAYER_NORMS = ("attn_norm", "ffn_norm", "output_norm")


@dataclass(frozen=True)
class Number:
    """A number under the architecture's name, beside its key in ``config.json`` and its place in the description."""

    key: str
    config: str
    of: Callable[[Decoder], float | None]
    """As the file has it; None: the key is left out."""
    default: float | Callable[[Config], float] | None
    """In a file without the key, or with 0; None: so is the config's."""
    rotary: bool = False
    """Whether the config has it among its rotary parameters."""


@dataclass(frozen=True)
class Experts:
    """Experts, of which a token goes to a few."""

    count: str
    """The config's key of how many there are."""
    module: str
    """Of a layer: their list."""
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width: str | None = None
    """The config's key of an expert's channels, where the file has them apart from ``feed_forward_length``."""
    shared: str | None = None
    """The same of the shared expert."""
    alone: bool = False
    """Whether the config has no width of dense layers."""
    chosen: str = "num_experts_per_tok"
    """The config's key of how many a token goes to."""
    beside: bool = False
    """Whether a dense feed-forward stands beside them."""
    fused: bool = False
    """Whether a tensor may hold gate and up of all of them, an expert's gate first."""
    counted: bool = False
    """Whether the file counts shared experts and dense first layers, and says how weights are made (DeepSeek)."""

    def stacks(self) -> dict[str, str]:
        """GGUF's modules that hold all experts → names of their parts, with {} for an expert's number."""
        return {
            f"ffn_{theirs}_exps": f"{self.module}.{{}}.{ours}" for theirs, ours in zip(PARTS, self.parts, strict=True)
        }


@dataclass(frozen=True)
class Windows:
    """Sliding windows."""

    every: int
    """Every so many layers one has none; 0: all layers have it."""
    default: int | None = None
    """Of a file that does not say. None: it has no windows."""
    layers: int | None = None
    """Only models of so many layers have windows."""
    fixed: bool = False
    """Whether the file cannot have another pattern."""
    used: bool = True
    """Whether llama.cpp applies them."""


@dataclass(frozen=True)
class Tables:
    """A rotary table of the layers with a window, never stretched; its θ is ``rope.freq_base_swa``."""

    theta: float | None
    """Of a file that does not say; None: the other table's."""
    used: bool = True
    """Whether llama.cpp takes θ from the key."""


@dataclass(frozen=True)
class Family:
    """How a GGUF architecture is called and stored."""

    architecture: str
    """``general.architecture``."""
    model_type: str
    """Of ``config.json``."""
    class_name: str
    when: str | None = None
    """A key that tells this family from others of the same architecture: it is there, and not 0."""
    permuted: bool = False
    """Rows of q and k are stored so that neighbouring channels are rotated together (ggml's "norm" rope)."""
    outer: Mapping[str, str | None] = field(default_factory=dict)
    """The same of modules outside of the layers."""
    names: Mapping[str, str | None] = field(default_factory=dict)
    """Modules that are called otherwise than in :data:`tulle.models.gguf.names.LAYER`."""
    biased: tuple[str, ...] = ()
    """GGUF's names of modules whose biases llama.cpp reads."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Config keys that are true where a module of the first layer has a bias."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Config keys that are true where the first layer has no such module."""
    present: Mapping[str, str] = field(default_factory=dict)
    """The same where it has one."""
    eps: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    """Keys of the norms' eps."""
    norm_offset: float = 0.0
    """Added to the weights of norms in the file."""
    fixed: Config = field(default_factory=lambda: {"hidden_act": "silu"})
    """Config keys that follow from the architecture."""
    derived: Mapping[str, Callable[[Config], Any]] = field(default_factory=dict)
    """Config keys that follow from the others."""
    numbers: tuple[Number, ...] = ()
    experts: Experts | None = None
    delta_net: bool = False
    """Layers without attention are gated delta nets."""
    tiled: bool = False
    """Their value heads stand in another order (:mod:`tulle.models.gguf.delta_net`)."""
    further: bool = False
    """The last layers may be heads for several tokens."""
    differing: bool = False
    """Heads and feed-forwards differ between layers, as Gemma 4's do (:mod:`tulle.models.gguf.gemma4`)."""
    convolution: str | None = None
    """The key of how many tokens gated short convolutions see; layers without heads of keys are such."""
    written: bool = True
    """Whether :mod:`tulle.export.gguf` writes it."""
    bare: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer that are no module's weight."""
    per_layer: Mapping[str, str] = field(default_factory=dict)
    """Keys (without the architecture's name) with a number per layer → tensors that have it in a folder."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Values that these keys must have where they are there."""
    windows: Windows | None = None
    """None: windows are refused."""
    partial: bool = False
    """Only a part of a head's channels may be rotated."""
    ratios: bool = False
    """llama.cpp reads a tensor ``rope_freqs``."""
    longrope: bool = False
    """llama.cpp reads tensors of longrope's factors."""
    yarn: Config = field(default_factory=dict)
    """What the config says of yarn besides, and no key does; llama.cpp may do otherwise."""
    mscale: bool = False
    """llama.cpp reads yarn's ramp (``yarn_beta_fast``) and ``yarn_log_multiplier``."""
    tables: Tables | None = None
    """Layers with a window have a rotary table of their own."""
    head: Literal["any", "own", "tied"] = "any"
    """Which heads llama.cpp reads: a tensor of its own, the embedding's table, or either."""
    square: bool = False
    """llama.cpp reads heads only that are as wide together as the stream."""

    def has_offset(self, theirs: str) -> bool:
        """Whether a tensor is a norm's weight that is stored with ``norm_offset`` added."""
        return self.norm_offset != 0 and theirs.endswith("norm.weight") and not theirs.endswith(delta_net.NORM)

    @cached_property
    def tensors(self) -> Names:
        left_out: dict[str, str | None] = {"output": None} if self.head == "tied" else {}
        if self.experts is None:
            return Names({**self.names, **left_out}, self.biased, bare=self.bare, outer=self.outer)
        dense: dict[str, str | None] = {} if self.experts.beside else dict.fromkeys(FEED_FORWARD)
        return Names({**dense, **self.names, **left_out}, self.biased, self.experts.stacks(), self.bare)


def _first(model: Decoder) -> Attention:
    return model.layers[0].attention


def _inverse_root(config: Config) -> float:
    """1/√head_dim."""
    return float(config["head_dim"] ** -0.5)


def _gemma_scale(widest: int) -> Callable[[Config], int]:
    """Models of so many layers scale by √(width/heads), others by √head_dim."""

    def scale(config: Config) -> int:
        wide = config["num_hidden_layers"] == widest
        return int(config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"])

    return scale


FUSED = {"ffn_up": "mlp.gate_up_proj", "ffn_gate": None}
AFTER: dict[str, str | None] = {
    "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
ONLY_AFTER = AFTER | {"attn_norm": None, "ffn_norm": None}
GEMMA: dict[str, Any] = {
    "names": AFTER | {"ffn_norm": "pre_feedforward_layernorm"}, "norm_offset": 1.0,
    "fixed": {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
}  # fmt: skip
BIASES: dict[str, Any] = {
    "biased": (*QKV, "attn_output", *FEED_FORWARD),
    "flags": {"attention_bias": "attn_q", "mlp_bias": "ffn_down"},
}
LAYER_EPS = "attention.layer_norm_epsilon"
GRANITE = (
    Number("attention.scale", "attention_multiplier", lambda model: _first(model).scale, _inverse_root),
    Number("embedding_scale", "embedding_multiplier", lambda model: model.embedding_scale, 1.0),
    Number("residual_scale", "residual_multiplier", lambda model: model.layers[0].residual_scale, 1.0),
    Number("logit_scale", "logits_scaling", lambda model: 1 / model.logit_scale, 1.0),
)
SCORE_CAP = Number("attn_logit_softcapping", "attn_logit_softcapping", lambda model: _first(model).soft_cap, 50.0)


def _logit_cap(default: float | None) -> Number:
    return Number("final_logit_softcapping", "final_logit_softcapping", lambda model: model.logit_soft_cap, default)


XIELU = {f"xielu.{name}": f"mlp.act_fn.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps")}

SMALL: dict[str, Any] = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": []}
SHARED: dict[str, str | None] = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in PARTS},
}
HYBRID: dict[str, Any] = {
    "names": {**delta_net.NAMES, "post_attention_norm": "post_attention_layernorm"}, "bare": delta_net.BARE,
    "delta_net": True, "tiled": True, "further": True, "norm_offset": 1.0, "partial": True, "written": False,
}  # fmt: skip

FAMILIES = (
    Family("llama", "mixtral", "MixtralForCausalLM", when="expert_count", permuted=True, ratios=True,
           names={"ffn_gate_inp": "block_sparse_moe.gate"},
           experts=Experts("num_local_experts", "block_sparse_moe.experts", ("w1", "w3", "w2"))),
    Family("llama", "llama", "LlamaForCausalLM", permuted=True, ratios=True, **BIASES),
    Family("qwen2", "qwen2", "Qwen2ForCausalLM", biased=QKV),
    Family("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Family("qwen2moe", "qwen2_moe", "Qwen2MoeForCausalLM", biased=QKV, head="own", square=True,
           names={"ffn_gate_inp": "mlp.gate", **SHARED}, fixed=SMALL | {"norm_topk_prob": False},
           experts=Experts("num_experts", "mlp.experts", width="moe_intermediate_size",
                           shared="shared_expert_intermediate_size")),
    Family("qwen3moe", "qwen3_moe", "Qwen3MoeForCausalLM", names={"ffn_gate_inp": "mlp.gate"},
           fixed=SMALL | {"norm_topk_prob": True},
           experts=Experts("num_experts", "mlp.experts", width="moe_intermediate_size")),
    Family("olmoe", "olmoe", "OlmoeForCausalLM", head="own", square=True, names={"ffn_gate_inp": "mlp.gate"},
           fixed={"hidden_act": "silu", "norm_topk_prob": False}, experts=Experts("num_experts", "mlp.experts")),
    Family("gpt-oss", "gpt_oss", "GptOssForCausalLM", head="own", windows=Windows(2),
           names={"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
           flags={"attention_bias": "attn_q"},
           biased=(*QKV, "attn_output", "ffn_gate_inp", *(f"ffn_{part}_exps" for part in PARTS)),
           bare={"attn_sinks.weight": "self_attn.sinks"}, yarn={"truncate": False},
           experts=Experts("num_local_experts", "mlp.experts", width="intermediate_size")),
    Family("granitemoe", "granitemoe", "GraniteMoeForCausalLM", permuted=True, ratios=True, numbers=GRANITE,
           required={"rope.scaling.finetuned": True}, names={"ffn_gate_inp": "block_sparse_moe.router.layer"},
           experts=Experts("num_local_experts", "block_sparse_moe.experts")),
    Family("glm4moe", "glm4_moe", "Glm4MoeForCausalLM", biased=(*QKV, "exp_probs_b"), partial=True, further=True,
           flags={"attention_bias": "attn_q"}, present={"use_qk_norm": "attn_q_norm"}, written=False, names={
               "post_attention_norm": "post_attention_layernorm", "ffn_norm": None, "ffn_gate_inp": "mlp.gate",
               **{f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in PARTS}},
           bare={"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"},
           fixed={"hidden_act": "silu", "n_group": 1, "topk_group": 1},
           experts=Experts("n_routed_experts", "mlp.experts", width="moe_intermediate_size", beside=True,
                           counted=True)),
    Family("qwen35", "qwen3_5_text", "Qwen3_5ForCausalLM", **HYBRID),
    Family("qwen35moe", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **HYBRID | {
           "names": {**HYBRID["names"], "ffn_gate_inp": "mlp.gate", **SHARED}},
           experts=Experts("num_experts", "mlp.experts", width="moe_intermediate_size",
                           shared="shared_expert_intermediate_size", alone=True)),
    Family("qwen3next", "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **HYBRID | {
           "names": {**HYBRID["names"], "ffn_gate_inp": "mlp.gate", **SHARED}, "tiled": False},
           experts=Experts("num_experts", "mlp.experts", width="moe_intermediate_size", fused=True,
                           shared="shared_expert_intermediate_size", alone=True)),
    Family("lfm2", "lfm2", "Lfm2ForCausalLM", eps=("attention.layer_norm_rms_epsilon", "norm_eps"), square=True,
           convolution="shortconv.l_cache", written=False, outer={"output_norm": None,
           "token_embd_norm": "model.embedding_norm"}, fixed={"block_auto_adjust_ff_dim": False}, names={
               "attn_norm": "operator_norm", "attn_q_norm": "self_attn.q_layernorm",
               "attn_k_norm": "self_attn.k_layernorm", "attn_output": "self_attn.out_proj", "ffn_norm": "ffn_norm",
               "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3", "ffn_down": "feed_forward.w2",
               **{f"shortconv.{part}": f"conv.{part}" for part in ("conv", "in_proj", "out_proj")},
           }),
    Family("gemma2", "gemma2", "Gemma2ForCausalLM", **GEMMA, head="tied", windows=Windows(2, 4096, fixed=True),
           numbers=(SCORE_CAP, _logit_cap(30.0)), derived={"query_pre_attn_scalar": _gemma_scale(46)}),
    Family("gemma3", "gemma3_text", "Gemma3ForCausalLM", **GEMMA, windows=Windows(6, fixed=True),
           numbers=(_logit_cap(None),), derived={"query_pre_attn_scalar": _gemma_scale(62)},
           tables=Tables(10000.0)),
    Family("gemma4", "gemma4_text", "Gemma4ForCausalLM", when="expert_count", head="tied", windows=Windows(6),
           ratios=True, differing=True, names=GEMMA["names"] | gemma4.EXPERTS, bare=gemma4.BARE | gemma4.SCALES,
           fixed=GEMMA["fixed"] | {"enable_moe_block": True}, numbers=(_logit_cap(None),), written=False,
           experts=Experts("num_experts", "experts", width="moe_intermediate_size", chosen="top_k_experts",
                           beside=True, fused=True)),
    Family("gemma4", "gemma4_text", "Gemma4ForCausalLM", head="tied", windows=Windows(6), ratios=True, differing=True,
           names=GEMMA["names"] | gemma4.MODULES, outer=gemma4.OUTER, bare=gemma4.BARE, fixed=GEMMA["fixed"],
           numbers=(_logit_cap(None),), written=False),
    Family("phi3", "phi3", "Phi3ForCausalLM", names={"attn_qkv": "self_attn.qkv_proj", **FUSED}, square=True,
           windows=Windows(0, used=False), partial=True, longrope=True),
    Family("olmo2", "olmo3", "Olmo3ForCausalLM", when="attention.sliding_window", names=ONLY_AFTER, head="own",
           square=True, windows=Windows(4), tables=Tables(None, used=False)),
    Family("olmo2", "olmo2", "Olmo2ForCausalLM", names=ONLY_AFTER, head="own", square=True),
    Family("granite", "granite", "GraniteForCausalLM", permuted=True, ratios=True, **BIASES, numbers=GRANITE,
           required={"rope.scaling.finetuned": True}),
    Family("glm4", "glm4", "Glm4ForCausalLM", biased=QKV, flags={"attention_bias": "attn_q"}, partial=True,
           names={"post_attention_norm": "post_self_attn_layernorm", "post_ffw_norm": "post_mlp_layernorm", **FUSED}),
    Family("cohere2", "cohere2", "Cohere2ForCausalLM", eps=(LAYER_EPS, "layer_norm_eps"), head="tied", square=True,
           names={"ffn_norm": None}, windows=Windows(4),
           numbers=(Number("logit_scale", "logit_scale", lambda model: model.logit_scale, 1.0),)),
    Family("starcoder2", "starcoder2", "Starcoder2ForCausalLM", eps=(LAYER_EPS, "norm_epsilon"), square=True,
           biased=(*QKV, "attn_output", *FEED_FORWARD, *LAYER_NORMS), flags={"use_bias": "attn_q"},
           names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj", "ffn_gate": None},
           fixed={"hidden_act": "gelu_pytorch_tanh"}),
    Family("exaone4", "exaone4", "Exaone4ForCausalLM", names=ONLY_AFTER, square=True, ratios=True,
           windows=Windows(4, 4096, layers=64)),
    Family("smollm3", "smollm3", "SmolLM3ForCausalLM", permuted=True,
           fixed={"hidden_act": "silu", "no_rope_layer_interval": 4}),
    Family("seed_oss", "seed_oss", "SeedOssForCausalLM", biased=QKV, flags={"attention_bias": "attn_q"},
           names={"post_attention_norm": "post_attention_layernorm"}),
    Family("ernie4_5", "ernie4_5", "Ernie4_5ForCausalLM"),
    Family("hunyuan-dense", "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM",
           names={"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}),
    Family("stablelm", "stablelm", "StableLmForCausalLM", eps=(LAYER_EPS, "layer_norm_eps"), partial=True, head="own",
           square=True, biased=(*QKV, *LAYER_NORMS), flags={"use_qkv_bias": "attn_q"},
           absent={"use_parallel_residual": "ffn_norm"}),
    Family("nemotron", "nemotron", "NemotronForCausalLM", eps=(LAYER_EPS, "norm_eps"), partial=True, head="own",
           square=True, norm_offset=1.0, fixed={"hidden_act": "relu2"}, names={"ffn_gate": None},
           biased=(*BIASES["biased"], *LAYER_NORMS), flags=BIASES["flags"]),
    Family("arcee", "arcee", "ArceeForCausalLM", permuted=True, ratios=True, fixed={"hidden_act": "relu2"},
           names={"ffn_gate": None}),
    Family("apertus", "apertus", "ApertusForCausalLM", ratios=True, head="own", per_layer=XIELU,
           biased=(*QKV, "attn_output"), flags={"attention_bias": "attn_q"},
           fixed={"hidden_act": "xielu", "rope_parameters": {"rope_type": "default"}},
           names={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm", "ffn_gate": None}),
    Family("mistral3", "ministral3", "Ministral3ForCausalLM", when="attention.temperature_scale", permuted=True,
           ratios=True, mscale=True, numbers=(Number("attention.temperature_scale", "llama_4_scaling_beta",
           lambda model: (_first(model).position_scale or (None,))[0], None, rotary=True),)),
    Family("mistral3", "mistral", "MistralForCausalLM", permuted=True, ratios=True, mscale=True,
           fixed={"hidden_act": "silu", "sliding_window": None}),
    Family("bitnet", "bitnet", "BitNetForCausalLM", head="tied", square=True,
           names={"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}),
)  # fmt: skip
"""A file's family is the first of its architecture that fits (``when``). Files of Mistral say llama, or mistral3."""

WRITTEN = {family.model_type: family for family in reversed(FAMILIES) if family.written}
WRITTEN |= {"mistral": WRITTEN["llama"]}
"""By ``model_type``: how a family is written. Mistral is Llama there: without its window they are one function."""


def family_of(metadata: Mapping[str, Any]) -> Family:
    """Raises ``UserError`` for an architecture that is not known, by its name."""
    architecture = metadata.get("general.architecture")
    for family in FAMILIES:
        if not isinstance(architecture, str) or family.architecture != architecture:
            continue
        told = family.when is None or metadata.get(f"{family.architecture}.{family.when}")
        if told is not None and not (isinstance(told, bool | int | float) and told == 0):
            return family
    known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
    raise UserError(f"expected a GGUF architecture of {known}, found {architecture!r:.80}")
