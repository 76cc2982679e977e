"""CKD+ReviewKD of R101-R18 as a LazyConfig: what ckd_reviewkd_rcnn_r101_r18.yaml says in YAML.

Without the last section, and with Detectron2's GeneralizedRCNN, it is the undistilled student.
Optional, as in YAML: ``train.seed`` (SEED), ``train.max_corrupt_images``
(DATALOADER.MAX_CORRUPT_IMAGES), ``distillation_schedule`` (KD.SCHEDULE).
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from kd_detectron.distillers import CKD, ReviewKD
from kd_detectron.modeling import DistilledRCNN, FrozenTeacher

# ---- the student: Faster R-CNN, ResNet-18 FPN ----
model = get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
model.backbone.bottom_up.stages.depth = 18
# Basic blocks have one stride-2 place only.
model.backbone.bottom_up.stages.pop("stride_in_1x1")
model.backbone.bottom_up.freeze_at = 2
# torchvision's ImageNet weights: RGB, so mean and std are in RGB order.
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]

# ---- data and schedule: 8 images, the 1x number of samples ----
dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = model.input_format
dataloader.train.mapper.use_instance_mask = False
dataloader.train.total_batch_size = 8
train = get_config("common/train.py").train
train.init_checkpoint = "torchvision://resnet18"
train.max_iter = 180000
lr_multiplier = get_config("common/coco_schedule.py").lr_multiplier_1x
lr_multiplier.warmup_length = 1000 / train.max_iter
optimizer = get_config("common/optim.py").SGD
optimizer.lr = 0.01

# ---- distillation ----
model._target_ = DistilledRCNN
model.teacher = L(FrozenTeacher.from_name)(
    config_file="COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", device="${train.device}"
)
model.distillers = [L(CKD)(), L(ReviewKD)(in_channels=[256] * 5, out_channels=[256] * 5)]
model.distillation_weights = dict(CKD=0.1, ReviewKD=1.2)
