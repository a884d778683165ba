"""Names of the weights: Hugging Face's OneFormer and ours, both ways.

As mask2former/huggingface_keys.py, whose table of the pixel decoder this shares: `#` stands for a
number. Projections to q, k and v of most attentions are one product there and three here.
"""

from torch import Tensor

from ..mask2former import huggingface_keys as shared
from ..mask2former.huggingface_keys import PIXEL_DECODER

LOGIT_SCALE = "contrastive.logit_scale"  # [1] here, a scalar there
TEXT_ENCODER = "text_encoder."  # begins the names of training's branch, here
_TEXT, _TASK = "model.text_mapper", "model.task_encoder"
_QUERIES = "model.transformer_module"
_DECODER = f"{_QUERIES}.decoder"
_LAYER = f"{_DECODER}.layers.#"
_START = f"{_DECODER}.query_transformer.decoder"
_JOINED = (  # here: attentions whose projections are one product there
    r"(?:query_decoder\.layers\.\d+\.cross|task_queries\.layers\.\d+\.(?:self|cross))_attn\."
)
_PRODUCT = ("in_proj_weight", "in_proj_bias", "out_proj")

_NAMES = [
    *PIXEL_DECODER,
    (f"{_TASK}.task_mlp.layers.#.0", "task_queries.task_mlp.#"),
    (f"{_DECODER}.query_input_projection", "task_queries.input_proj"),
    *(
        (f"{_START}.layers.#.{theirs}.{n}", f"task_queries.layers.#.{ours}.{n}")
        for theirs, ours in (("self_attn", "self_attn"), ("multihead_attn", "cross_attn"))
        for n in _PRODUCT
    ),
    *(
        (f"{_START}.layers.#.{theirs}", f"task_queries.layers.#.{ours}")
        for theirs, ours in (
            ("linear1", "linear1"),
            ("linear2", "linear2"),
            ("norm1", "self_norm"),
            ("norm2", "cross_norm"),
            ("norm3", "norm"),
        )
    ),
    (f"{_START}.norm", "task_queries.norm"),
    (f"{_QUERIES}.queries_embedder", "query_decoder.query_embed"),
    (f"{_QUERIES}.level_embed", "query_decoder.level_embed"),
    *(
        (f"{_LAYER}.cross_attn.multihead_attn.{n}", f"query_decoder.layers.#.cross_attn.{n}")
        for n in _PRODUCT
    ),
    *(
        (f"{_LAYER}.self_attn.self_attn.{n}", f"query_decoder.layers.#.self_attn.{n}")
        for n in ("q_proj", "k_proj", "v_proj", "out_proj")
    ),
    (f"{_LAYER}.cross_attn.norm", "query_decoder.layers.#.cross_norm"),
    (f"{_LAYER}.self_attn.norm", "query_decoder.layers.#.self_norm"),
    (f"{_LAYER}.ffn.linear1", "query_decoder.layers.#.linear1"),
    (f"{_LAYER}.ffn.linear2", "query_decoder.layers.#.linear2"),
    (f"{_LAYER}.ffn.norm", "query_decoder.layers.#.norm"),
    (f"{_DECODER}.decoder_norm", "query_decoder.norm"),
    (f"{_DECODER}.class_embed", "query_decoder.class_embed"),
    (f"{_DECODER}.mask_embed.layers.#.0", "query_decoder.mask_embed.#"),
    (f"{_TEXT}.text_encoder.token_embedding", "text_encoder.token_embed"),
    (f"{_TEXT}.text_encoder.positional_embedding", "text_encoder.position_embed"),
    *(
        (f"{_TEXT}.text_encoder.transformer.layers.#.{theirs}", f"text_encoder.layers.#.{ours}")
        for theirs, ours in (
            ("self_attn.in_proj_weight", "qkv.weight"),
            ("self_attn.in_proj_bias", "qkv.bias"),
            ("self_attn.out_proj", "proj"),
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            ("mlp.fc1", "fc1"),
            ("mlp.fc2", "fc2"),
        )
    ),
    (f"{_TEXT}.text_encoder.ln_final", "text_encoder.norm"),
    (f"{_TEXT}.text_projector.layers.#.0", "text_encoder.projector.#"),
    (f"{_TEXT}.prompt_ctx", "text_encoder.learned"),
    ("criterion.empty_weight", "criterion.empty_weight"),
    ("criterion.logit_scale", LOGIT_SCALE),
]


def from_huggingface(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Our names and products.

    Args:
        state: weights of transformers' OneFormerForUniversalSegmentation, of version 4 or 5.
        family: of the backbone: "swin", "dinat", "resnet", "timm_backbone" or "resnet_digits".

    Returns:
        The weights under our names; those that have none keep theirs.
    """
    out = shared.from_huggingface(state, family, _NAMES, _JOINED)
    if LOGIT_SCALE in out:
        out[LOGIT_SCALE] = out[LOGIT_SCALE].reshape(1)
    return out


def to_huggingface(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The names and products that transformers finds on disk.

    Args:
        state: our weights.
        family: of the backbone: "swin", "dinat", "resnet", "timm_backbone" or "resnet_digits".

    Returns:
        The weights under Hugging Face's names, without `criterion.seed`, which it does not have.
    """
    state = state | {LOGIT_SCALE: state[LOGIT_SCALE].reshape(())}
    return shared.to_huggingface(state, family, _NAMES, _JOINED)
