"""The deformable attention of transformers' D-FINE, whose levels may differ in points."""

from transformers.models.d_fine import modeling_d_fine as theirs

from .deformable import ragged


class DFineMultiscaleDeformableAttention(theirs.DFineMultiscaleDeformableAttention):
    """The attention, which calls its sampling by a name of its own."""

    @property
    def ms_deformable_attn_core(self):
        """What samples."""
        bilinear = self.decoder_method == "default"
        return ragged if bilinear else vars(self)["ms_deformable_attn_core"]


PARTS = {
    "deformable_attention": {
        "DFineMultiscaleDeformableAttention": DFineMultiscaleDeformableAttention
    }
}
