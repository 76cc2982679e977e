"""Objects as data has them at its worst, through a whole distilled step with every distiller.

Images without objects, single images and mixed sizes: ``test_unusual_batches_just_work``.
"""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from effort import effort
from tiny import NUM_CLASSES, all_distillers, every_distiller_cfg


def image_with(boxes, size=(64, 96)) -> dict:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(len(boxes)) % NUM_CLASSES
    instances.gt_masks = BitMasks(torch.ones(len(boxes), *size, dtype=torch.bool))
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": size[0], "width": size[1]}


def thousand_boxes():
    corners = torch.rand(1000, 2, generator=torch.Generator().manual_seed(1)) * 50
    return torch.cat([corners, corners + 1 + corners.flip(1) / 4], dim=1)


def built(tmp_path, opts=()):
    torch.manual_seed(0)
    return build_model(every_distiller_cfg(tmp_path, list(opts)))


def step(model, batch) -> dict:
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize(
    ("batch", "opts"),
    [
        pytest.param([image_with([[7, 9, 8, 10], [0, 0, 1, 1]])], [], id="1-pixel boxes"),
        pytest.param([image_with([[95.5, 63.5, 96, 64]])], [], id="half a pixel in the corner"),
        pytest.param([image_with(thousand_boxes())], [], id="1000 boxes"),
        pytest.param(
            [image_with([[5, 5, 40, 40]])] * 2,
            # Ground truth is not added and nothing overlaps enough: background alone.
            [
                *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
                *("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.999]),
            ],
            id="no foreground proposal",
        ),
    ],
)
def test_losses_and_gradients_stay_finite(tmp_path, batch, opts):
    model = built(tmp_path, opts)
    losses = step(model, batch)
    assert len(losses) == 5 + len(all_distillers())
    assert (losses["loss_box_reg"] == 0) == ("MODEL.ROI_HEADS.IOU_THRESHOLDS" in opts)
    assert all(torch.isfinite(value) for value in losses.values()), losses
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    assert all(p.grad is not None for p in model.distillers.parameters())


def test_teacher_that_computes_nan_makes_every_loss_nan(tmp_path):
    opts = [*("KD.BOXKD.FORM", "bounded"), *("KD.RPNKD.ANCHORS", "all")]
    batch = [image_with([[5, 5, 40, 40]])] * 2
    for given in ([], opts):
        model = built(tmp_path, given)
        for weights in model.teacher.model.parameters():
            weights.data.fill_(float("nan"))
        with EventStorage():
            losses = model(batch)
        hidden = {name for name, loss in losses.items() if loss.isfinite()}
        # Of the detector itself, and the loss for which the teacher has no part in it.
        detection = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
        assert hidden == {*detection, "loss_supcon"}


def test_teacher_is_the_same_after_many_steps_of_every_distiller(tmp_path):
    opts = [
        *("MODEL.BACKBONE.NAME", "build_mobilenetv2_fpn_backbone"),
        *("MODEL.MOBILENETV2.WIDTH_MULT", 0.125),
        *("KD.TEACHER.OPTS", ["MODEL.RESNETS.NORM", "BN"]),
        *("SOLVER.BASE_LR", 1e-6),
    ]
    model = built(tmp_path, opts)
    optimizer = build_optimizer(every_distiller_cfg(tmp_path, opts), model)
    teacher = model.teacher.fingerprint()
    student = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for index in range(effort(50, 200)):
        optimizer.zero_grad()
        step(model, [image_with([[3, 3, 20, 25]], size=(64, 32 * (1 + index % 2)))])
        optimizer.step()
    assert model.teacher.fingerprint() == teacher
    after = dict(model.named_parameters())
    assert not all(torch.equal(after[name], x) for name, x in student.items())
