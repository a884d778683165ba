"""The deformable attention of transformers' DEIMv2, whose levels may differ in points."""

from transformers.models.deimv2 import modeling_deimv2 as theirs

from .deformable import ragged


class Deimv2MultiscaleDeformableAttention(theirs.Deimv2MultiscaleDeformableAttention):
    """The attention, which calls its sampling by a name of its own."""

    @property
    def ms_deformable_attn_core(self):
        """What samples."""
        bilinear = self.decoder_method == "default"
        return ragged if bilinear else vars(self)["ms_deformable_attn_core"]


PARTS = {
    "deformable_attention": {
        "Deimv2MultiscaleDeformableAttention": Deimv2MultiscaleDeformableAttention
    }
}
