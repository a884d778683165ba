"""segkern.Mask2Former in other people's training loops: that of transformers, of Lightning, of
accelerate, a plain one, and several processes started by torchrun."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from segkern.models import Mask2Former, Mask2FormerConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
STEPS, BATCH, SIDE = 30, 2, 32


def built():
    """In float64: the losses of all loops are then the same to rounding, which a choice between
    two queries that are as good would make a difference of."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_dim", "feature_size", "mask_feature_size"), 32)
    sizes |= {"backbone_options": {"channels": (8, 8, 8, 8)}, "num_queries": 4}
    sizes |= {"train_num_points": 64, "decoder_layers": 2, "dim_feedforward": 32}
    return Mask2Former(replace(Mask2FormerConfig.tiny(2), **sizes)).double().train()


class Squares(Dataset):
    """Pictures of a bright square (label 1) on the ground (label 0), as an image processor gives
    them."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        picture = torch.full((3, SIDE, SIDE), -1.0, dtype=torch.float64)
        top, left = 4 * (i % 4), 6 * (i % 3)
        picture[:, top : top + 14, left : left + 14] = 1.0
        inside = picture[0] > 0
        return {
            "pixel_values": picture,
            "pixel_mask": torch.ones(SIDE, SIDE, dtype=torch.int64),
            "mask_labels": torch.stack((~inside, inside)).float(),
            "class_labels": torch.tensor([0, 1]),
        }


def collate(samples):
    """As transformers' examples collate: images together, labels in lists."""
    together = {k: torch.stack([s[k] for s in samples]) for k in ("pixel_values", "pixel_mask")}
    return together | {k: [s[k] for s in samples] for k in ("mask_labels", "class_labels")}


def batches():
    """Those of all steps, in the same order for every loop."""
    data = Squares()
    for step in range(STEPS):
        yield collate([data[(step * BATCH + i) % len(data)] for i in range(BATCH)])


def optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)


def plain():
    """The losses of a loop that has nothing else."""
    model, losses = built(), []
    steps = optimizer(model)
    for batch in batches():
        out = model(**batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
        losses.append(out.loss.item())
    return losses


@pytest.fixture(scope="module")
def expected():
    torch.set_num_threads(1)
    losses = plain()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    return losses


def assert_same(losses, expected):
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=1e-6)


def test_our_own_step(expected):
    """The same as `model.loss`, which our own loop trains."""
    from segkern.structures.targets import Targets

    model, losses = built(), []
    steps = optimizer(model)
    for batch in batches():
        targets = Targets.from_lists(batch["mask_labels"], batch["class_labels"])
        loss, _ = model.loss(batch["pixel_values"], targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert_same(losses, expected)


def test_accelerate(expected):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), built()
    model, steps = accelerator.prepare(model, optimizer(model))
    losses = []
    for batch in batches():
        out = model(**batch)
        accelerator.backward(out.loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
        losses.append(accelerator.gather(out.loss.detach()).mean().item())
    assert_same(losses, expected)
    assert accelerator.unwrap_model(model).config.num_labels == 2


def test_accelerate_in_bfloat16():
    """Its outputs are rebuilt in float32 from what the model gave."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, model = Accelerator(cpu=True, mixed_precision="bf16"), built().float()
    model = accelerator.prepare(model)
    batch = next(batches())
    out = model(**batch | {"pixel_values": batch["pixel_values"].float()})
    accelerator.backward(out.loss)
    assert out.loss.dtype == out.masks_queries_logits.dtype == torch.float32
    assert type(out).__name__ == "QueryOutput"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_lightning(expected, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = built(), []

        def training_step(self, batch):
            out = self.model(**batch)
            self.losses.append(out.loss.item())
            return out  # a dict with a loss

        def configure_optimizers(self):
            return optimizer(self)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module.train(), torch.utils.data.DataLoader(list(batches()), batch_size=None))
    assert_same(module.losses, expected)
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    again = built()
    again.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})


def trainer(folder, steps, **options):
    import transformers

    arguments = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        logging_steps=1,
        save_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )

    class Ordered(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_metrics(found):
        """Of `eval_do_concat_batches=False`: a tuple of arrays a batch, and its labels."""
        right, seen = 0, 0
        for (classes, masks, *_), (mask_labels, class_labels) in zip(
            found.predictions, found.label_ids
        ):
            assert masks.shape == (*classes.shape[:2], SIDE // 2, SIDE // 2)
            best = classes[..., 1].argmax(1)
            for b, (labels, names) in enumerate(zip(mask_labels, class_labels)):
                inside = masks[b, best[b]] > 0
                want = labels[list(names).index(1)][::2, ::2] > 0
                right, seen = right + (inside == want).mean(), seen + 1
        return {"right": right / seen}

    return Ordered(
        built(),
        arguments,
        data_collator=collate,
        train_dataset=Squares(),
        eval_dataset=Squares(),
        compute_metrics=compute_metrics,
    )


def logged(run):
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_transformers_trainer(expected, tmp_path):
    options = {"eval_do_concat_batches": False, "eval_strategy": "steps", "eval_steps": 15}
    run = trainer(tmp_path, STEPS, per_device_eval_batch_size=3, **options)
    run.train()
    assert_same(logged(run), expected)
    evaluated = [line for line in run.state.log_history if "eval_right" in line]
    assert [line["step"] for line in evaluated] == [15, 30]
    assert evaluated[-1]["eval_right"] > 0.8
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    names = list(run.predict(Squares()).predictions[0])
    assert len(names) == 5  # class and mask logits, and three hidden states: no losses
    again = trainer(tmp_path, STEPS, eval_do_concat_batches=False)
    with torch.no_grad():  # what is resumed does not come from here
        for p in again.model.parameters():
            p.zero_()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert_same(logged(again), expected)


def test_transformers_trainer_joins_what_it_evaluates(tmp_path):
    run = trainer(tmp_path, 1, per_device_eval_batch_size=2)
    run.compute_metrics = None
    found = run.predict(Squares())
    classes, masks, *_ = found.predictions
    assert classes.shape == (8, 4, 3)
    assert masks.shape == (8, 4, SIDE // 2, SIDE // 2)


PROCESS = """
import gc, json, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [{here!r}, {root!r}, {tests!r}]
from test_training_loops import built, batches, optimizer
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(built(), find_unused_parameters={unused})
steps, losses = optimizer(model), []
for batch in batches():
    half = {{k: v[rank : rank + 1] for k, v in batch.items()}}
    out = model(**half)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    steps.step()
    steps.zero_grad()
    loss = out.loss.detach()
    dist.all_reduce(loss)
    losses.append(loss.item() / 2)
total = sum(p.double().sum() for p in model.parameters()).item()
with open({folder!r} + f"/{{rank}}.json", "w") as file:
    json.dump([losses, total], file)
dist.barrier()
del model, steps, out, loss
gc.collect()  # or the reducer would hold the group until Python has no threads to end it with
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "unused",
    [
        pytest.param(False, id="plain"),
        pytest.param(True, id="find_unused_parameters", marks=pytest.mark.long),
    ],
)
def test_torchrun(unused, expected, tmp_path):
    script = tmp_path / "work.py"
    places = {"here": str(Path(__file__).parent), "root": str(ROOT), "tests": str(ROOT / "tests")}
    script.write_text(PROCESS.format(folder=str(tmp_path), unused=unused, **places))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (losses, total), other = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert other == [losses, total]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert losses[0] == pytest.approx(expected[0], rel=0.2)  # each divides by its own targets
