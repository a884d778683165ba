"""Models of transformers and ours, on the same random weights, for the benchmarks of models.

Run as a script it is the process of its own that `peak_memory` starts.
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # support.inputs

STAGES = ["stage1", "stage2", "stage3", "stage4"]
LABELS = 133
TARGETS = 16
QUERIES = ("class_queries_logits", "masks_queries_logits")  # of a model of transformers
TINY = {  # runs in a moment
    "num_labels": 7,
    "num_queries": 6,
    "hidden_dim": 32,
    "feature_size": 32,
    "mask_feature_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "num_attention_heads": 2,
    "dim_feedforward": 64,
    "encoder_feedforward_dim": 64,
    "train_num_points": 60,
}


TINY_PYRAMID = {  # a MaskFormer that runs in a moment
    "num_labels": 7,
    "fpn_feature_size": 32,
    "mask_feature_size": 32,
    "decoder_config": {
        "model_type": "detr",
        "num_queries": 6,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
    },
}


TINY_TASKS = {  # a OneFormer that runs in a moment
    **{name: value for name, value in TINY.items() if not name.endswith("feature_size")},
    "conv_dim": 32,
    "mask_dim": 32,
}


def save_weights(
    backbone: str, folder: Path, queries: int | None = None, kind: str = "mask2former"
) -> None:
    """Random weights, as transformers initialises and stores them.

    Args:
        backbone: of Mask2Former, "swin_tiny" to "swin_large", "resnet50" or "tiny"; or
            "eomt tiny", "eomt small", "eomt base" or "eomt large".
        folder: to write to.
        queries: None takes 100, of "tiny" 6; of a Mask2Former.
        kind: "mask2former", "maskformer" or "oneformer".
    """
    import transformers
    from transformers import ResNetConfig, SwinConfig

    from segkern.nn.backbones.swin import VARIANTS

    torch.manual_seed(0)
    if backbone.startswith("eomt "):
        _save_eomt(backbone.removeprefix("eomt "), folder)
        return
    tiny = backbone not in VARIANTS and backbone != "resnet50"
    if backbone in VARIANTS:
        body = SwinConfig(**VARIANTS[backbone], drop_path_rate=0.3, out_features=STAGES)
    elif not tiny:
        body = ResNetConfig(out_features=STAGES)
    else:
        body = SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], out_features=STAGES
        )
    if kind == "maskformer":
        settings = TINY_PYRAMID if tiny else {"num_labels": LABELS}
        config = transformers.MaskFormerConfig(backbone_config=body, **settings)
        transformers.MaskFormerForInstanceSegmentation(config).save_pretrained(folder)
        return
    if kind == "oneformer":
        settings = TINY_TASKS if tiny else {"num_labels": LABELS}
        config = transformers.OneFormerConfig(backbone_config=body, **settings)
        transformers.OneFormerForUniversalSegmentation(config).save_pretrained(folder)
        return
    settings = TINY if tiny else {"num_labels": LABELS}
    if queries is not None:
        settings = settings | {"num_queries": queries}
    config = transformers.Mask2FormerConfig(backbone_config=body, **settings)
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def _save_eomt(size: str, folder: Path) -> None:
    """An EoMT at the end of its training: without masks of attention."""
    from transformers import EomtConfig, EomtForUniversalSegmentation

    from segkern.models import EoMTConfig
    from segkern.models.eomt.huggingface import write_config

    settings = EoMTConfig.tiny(7) if size == "tiny" else EoMTConfig.preset(size)
    config = EomtConfig(**write_config(vars(settings)))
    model = EomtForUniversalSegmentation(config)
    model.attn_mask_probs.zero_()
    model.save_pretrained(folder)


@functools.cache
def weights(backbone: str, queries: int | None = None, kind: str = "mask2former") -> Path:
    """A folder that lasts as long as the process."""
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    save_weights(backbone, Path(folder.name), queries, kind)
    return Path(folder.name)


_kept = []


def open_model(impl: str, folder: Path, device: str) -> torch.nn.Module:
    """The model of "segkern..." or "transformers...", in eval mode."""
    if impl.startswith("segkern"):
        import segkern

        return segkern.open_model(folder).to(device)
    from transformers import AutoModelForUniversalSegmentation

    model = AutoModelForUniversalSegmentation.from_pretrained(folder)
    if model.config.model_type == "oneformer":
        model = _Asked(model)
    return model.eval().to(device)


class _Asked(torch.nn.Module):
    """A OneFormer of transformers that is always asked for the same task."""

    def __init__(self, model: torch.nn.Module):
        from segkern.models.oneformer.prompts import TASK_TOKENS

        super().__init__()
        self.model, row = model, TASK_TOKENS["panoptic"]
        length = model.config.task_seq_len
        tokens = torch.tensor([[*row, *[0] * (length - len(row))]])
        self.register_buffer("tokens", tokens, persistent=False)

    def forward(self, x: torch.Tensor, **targets):
        return self.model(x, self.tokens.expand(len(x), -1), **targets)


def build(impl, folder, kind, height, width, batch, dtype="float32", device="cpu", compiled=False):
    """The function to time: an inference, or a training step with its optimizer.

    Args:
        impl: "segkern" or "transformers", and what the caller adds after a comma; "checkpointing"
            trains with `gradient_checkpointing_enable`.
        dtype: "float32", "bfloat16" for autocast, or "bfloat16 weights" for a model and images
            that are bfloat16 themselves.
    """
    from segkern.structures.targets import Targets
    from support.inputs import moved, random_targets

    torch.manual_seed(0)
    model = open_model(impl, folder, device)
    x = torch.randn(batch, 3, height, width, device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    if dtype == "bfloat16 weights":
        model, x = model.bfloat16(), x.bfloat16()
    call = torch.compile(model) if compiled else model
    if kind == "inference":

        @torch.inference_mode()
        def run():
            with autocast:
                call(x)

        run.model = model  # profile.py looks into it
        return run
    one = random_targets([TARGETS], TINY["num_labels"], height, width)  # every model has as many
    masks, classes = (of_one * batch for of_one in one)
    if impl.endswith("checkpointing"):
        model.gradient_checkpointing_enable()
    if impl.startswith("segkern"):
        targets = Targets.from_lists(masks, classes).to(device)
        if getattr(model.config, "joint_tasks", False):
            targets = targets._replace(task=torch.zeros_like(targets.count))
    else:
        masks, classes = moved((masks, classes), device)
    model.train()
    # on a GPU everything stays there: the rate and the step count too
    options = {"fused": True, "capturable": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.05, **options)

    def step():
        optimizer.zero_grad()
        with autocast:
            if impl.startswith("segkern"):
                loss, _ = model.loss(x, targets)
            else:
                loss = call(x, mask_labels=masks, class_labels=classes).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    step.model = model
    return step


def peak_memory(*arguments, script: str = __file__) -> float:
    """Megabytes that a fresh process needs for two runs on the CPU, above the imports.

    Args:
        arguments: of `build`, up to the dtype.
        script: what to run; it prints the figure last.
    """
    values = [str(a) if isinstance(a, Path) else a for a in arguments]
    command = [sys.executable, script, json.dumps(values)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def _resident(field: str) -> float:
    """Resident megabytes of this process: VmRSS now, VmHWM at the highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def load(impl: str) -> None:
    """Imports what the models of "segkern..." or "transformers..." need."""
    if impl.startswith("segkern"):
        import segkern.models  # noqa: F401
    else:
        import transformers.models.eomt.modeling_eomt
        import transformers.models.mask2former.modeling_mask2former
        import transformers.models.maskformer.modeling_maskformer
        import transformers.models.oneformer.modeling_oneformer
        import transformers.models.swin.modeling_swin  # noqa: F401


def print_peak(build: Callable[[], Callable]) -> None:
    """Prints what building a function and two of its runs take above what is held now, in MB."""
    before = _resident("VmRSS")
    function = build()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading the weights does not count
    function()
    function()
    print(_resident("VmHWM") - before)


if __name__ == "__main__":
    impl, folder, *case = json.loads(sys.argv[1])
    load(impl)
    print_peak(lambda: build(impl, Path(folder), *case))
