// The schemas of the ops that this library has kernels for: a program without Python finds them
// here. Where Python runs, segkern/ops compares them with those that it states itself.
#include <stdexcept>

#include "../common.h"

namespace {

constexpr const char* kSchemas[] = {
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    "conv3x3(Tensor x, Tensor filters) -> Tensor",
    "conv3x3_backward(Tensor grad, Tensor x) -> Tensor",
    "dwconv3x3_gelu(Tensor x, Tensor filters, Tensor bias) -> Tensor",
    "dwconv3x3_gelu_backward(Tensor grad, Tensor x, Tensor filters, Tensor bias) -> (Tensor, "
    "Tensor, Tensor)",
    "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool relu, Tensor? "
    "up) -> (Tensor, Tensor, Tensor)",
    "linear(Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? residual, bool keep) "
    "-> (Tensor, Tensor)",
    "linear_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, int activation, Tensor? "
    "residual, Tensor(b!)? before) -> ()",
    "linear_assignment(Tensor cost, Tensor? n_targets) -> (Tensor, Tensor, Tensor)",
    "mask_bits(Tensor queries, Tensor features, float threshold) -> (Tensor, Tensor)",
    "masked_attn(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor open, float scale) -> (Tensor, "
    "Tensor)",
    "masked_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bits, Tensor open, "
    "Tensor out, Tensor norm, float scale) -> (Tensor, Tensor, Tensor)",
    "matching_cost(Tensor class_logits, Tensor mask_embed, Tensor features, Tensor labels, Tensor "
    "masks, Tensor points, Tensor? n_targets, float class_weight, float mask_weight, float "
    "dice_weight, Tensor? n_points=None) -> Tensor",
    "ms_deform_attn(Tensor value, SymInt[] shapes, Tensor reference, Tensor offsets, Tensor "
    "logits, bool normalized) -> Tensor",
    "ms_deform_attn_backward(Tensor grad, Tensor value, SymInt[] shapes, Tensor reference, Tensor "
    "offsets, Tensor logits, bool normalized, bool deterministic) -> (Tensor, Tensor, Tensor)",
    "neighborhood_attn(Tensor q, Tensor k, Tensor v, Tensor bias, int[] kernel, int[] dilation, "
    "float scale) -> Tensor",
    "neighborhood_attn_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor bias, int[] "
    "kernel, int[] dilation, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    "point_mask_loss(Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids, Tensor "
    "seed, int candidates, int important, int random, Tensor? cells=None) -> (Tensor bce, Tensor "
    "dice, Tensor sums, Tensor marks, Tensor packed)",
    "point_mask_loss_backward(Tensor grad_bce, Tensor grad_dice, Tensor sums, Tensor marks, "
    "Tensor packed, Tensor mask_logits, Tensor masks, Tensor active, Tensor sample_ids, Tensor "
    "seed, int candidates, int important, int random, Tensor? cells=None) -> Tensor",
    "point_sample(Tensor features, Tensor points) -> Tensor",
    "point_sample_backward(Tensor grad, Tensor points, SymInt h, SymInt w, bool deterministic) -> "
    "Tensor",
    "resize_argmax(Tensor maps, Tensor rows, Tensor columns) -> Tensor",
    "resize_sum(Tensor[] maps, Tensor? bias, bool relu) -> Tensor",
    "resize_sum_backward(Tensor grad, int[] sizes) -> Tensor[]",
    "segment_map(Tensor scores, Tensor labels, Tensor? stuff, Tensor masks, Tensor? features, "
    "int[] sizes, float overlap) -> (Tensor, Tensor, Tensor)",
    "segment_map_semantic(Tensor weights, Tensor masks, Tensor? features, int[] sizes, bool "
    "resize_scores, bool return_scores) -> (Tensor, Tensor, Tensor)",
    "segment_map_instance(Tensor queries, Tensor masks, Tensor? features, int[] sizes) -> "
    "(Tensor, Tensor, Tensor)",
    "segment_map_cover(Tensor bits, Tensor order, int width) -> Tensor",
    "upscale(Tensor x, Tensor weight, Tensor bias, Tensor filters, Tensor scale, Tensor shift, "
    "float eps, Tensor? embeddings) -> Tensor",
    "window_attn(Tensor qkv, Tensor qkv_bias, Tensor bias, int window, int shift, float scale) -> "
    "Tensor",
    "window_attn_backward(Tensor grad, Tensor qkv, Tensor qkv_bias, Tensor bias, int window, int "
    "shift, float scale) -> (Tensor, Tensor, Tensor)",
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(segkern, m) {
  for (const char* schema : kSchemas) {
    try {
      m.def(schema);
    } catch (const std::runtime_error&) {
      // it is there, of another copy of this library or of Python
    }
  }
}
