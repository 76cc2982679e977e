"""The student as a TorchScript or ONNX file.

It is traced with Detectron2's own ``TracingAdapter`` on an image that the user gives, for any image
size; what the file returns is compared with what the model returns on that image. Faster, Mask
R-CNN and RetinaNet trace, also on the added backbones. Test-time augmentation does not: it resizes
images in numpy, which the tracer does not see.

Both files take one image, (3, H, W) float, 0 to 255, resized, in ``INPUT.FORMAT``'s channel order,
and return the fields of Detectron2's ``Instances`` in alphabetical order, then the image size (H,
W): ``pred_boxes`` (D, 4) in pixels of the given image, ``pred_classes`` (D,), ``pred_masks`` (D, 1,
28, 28) as probabilities inside the box where there is a mask head, and ``scores`` (D,). ONNX's
metadata, and TorchScript's extra file ``metadata.json``, say how a file is fed (:func:`interface`).
"""

import io
import json
import logging
import os
import warnings

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from detectron2.structures import Instances
from torch import nn

from kd_detectron.atomic_files import atomic_open
from kd_detectron.checkpoint.plain_export import find_checkpoint, load_plain_student
from kd_detectron.errors import ConfigError

logger = logging.getLogger(__name__)

_SCORE_TOLERANCE = 1e-3
_BOX_TOLERANCE = 0.1  # pixels


def export_torchscript(
    src: str, dst: str, image: str, *, checkpoint: str = "final", cfg: CfgNode | str | None = None
) -> str:
    """Writes a run's student as a traced TorchScript file; see the module for its interface.

    Args:
        src: a run's output folder or a checkpoint file.
        dst: the file to write, or a folder, for ``student_final.ts`` in it.
        image: an image file on which the student detects something.
        checkpoint: which one of a folder: "final", "best" or a file's name in it.
        cfg: the run's config, its path or its bare name; by default the ``config.yaml`` beside
            ``src``.

    Returns:
        the file written.

    Raises:
        ConfigError: the student cannot be loaded or traced, detects nothing on the image, or the
            traced one detects something else.
    """
    adapter, pixels, expected, facts = _ready_to_trace(find_checkpoint(src, checkpoint), image, cfg)
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's remarks on Detectron2's code
        traced = torch.jit.trace(adapter, (pixels,), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={"metadata.json": json.dumps(facts)})
        buffer.seek(0)
        found = torch.jit.load(buffer)(pixels)
    return _check_and_write(adapter, found, expected, buffer, dst, ".ts")


def export_onnx(
    src: str, dst: str, image: str, *, checkpoint: str = "final", cfg: CfgNode | str | None = None
) -> str:
    """Writes a run's student as an ONNX file of standard operators; needs onnx and onnxruntime.

    Args, returns and raises as :func:`export_torchscript`; a folder gets ``student_final.onnx``.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs a package that is not installed ({error.name}): pip install"
            " onnx onnxruntime"
        ) from error
    adapter, pixels, expected, facts = _ready_to_trace(find_checkpoint(src, checkpoint), image, cfg)
    names = [*sorted(expected.get_fields()), "image_size"]
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            adapter,
            (pixels,),
            buffer,
            opset_version=17,
            input_names=["image"],
            output_names=names,
            dynamic_axes={"image": {1: "height", 2: "width"}}
            | {name: {0: "detections"} for name in names[:-1]},
            dynamo=False,  # torch.export does not take Detectron2's data-dependent shapes
        )
    exported = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(exported, facts)
    buffer = io.BytesIO(exported.SerializeToString())
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    found = session.run(names, {"image": pixels.numpy()})
    found = tuple(map(torch.from_numpy, found))
    return _check_and_write(adapter, found, expected, buffer, dst, ".onnx")


def interface(cfg: CfgNode) -> dict[str, str]:
    """How an exported file is fed and what it returns, as text by key, for the file's metadata."""
    return {
        "input_format": cfg.INPUT.FORMAT,
        "min_size_test": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size_test": str(cfg.INPUT.MAX_SIZE_TEST),
        "pred_boxes": "x0, y0, x1, y1 in pixels of the given (resized) image",
    }


def _ready_to_trace(
    checkpoint: str, image: str, cfg: CfgNode | str | None
) -> tuple[TracingAdapter, torch.Tensor, Instances, dict[str, str]]:
    """Returns the student ready to trace, the image (3, H, W), the model's detections on it, and
    what :func:`interface` says."""
    cfg, model = load_plain_student(checkpoint, cfg)
    if isinstance(model, PanopticFPN):
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE of '{checkpoint}' is PanopticFPN, which has no export as "
            "TorchScript or ONNX; leave out --format, or export a Faster or Mask R-CNN or RetinaNet"
        )
    try:
        pixels = read_image(image, format=cfg.INPUT.FORMAT)
    except OSError as error:
        raise ConfigError(f"--image '{image}' is no image that can be read ({error})") from error
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    pixels = resize.get_transform(pixels).apply_image(pixels)
    pixels = torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))
    # torch.onnx.export sets back the mode it finds, so that the adapter must be in eval mode too.
    adapter = TracingAdapter(model, [{"image": pixels}], _detect).eval()
    with torch.no_grad():
        expected = _detect(model, [{"image": pixels}])[0]["instances"]
    if len(expected) == 0:
        raise ConfigError(
            f"the student detects nothing on --image '{image}', so that nothing can be traced: give"
            " an image with objects that it knows"
        )
    return adapter, pixels, expected, interface(cfg)


def _detect(model: nn.Module, inputs: list[dict]) -> list[dict]:
    """The detections in the given image's own pixels, masks not pasted."""
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference(inputs, do_postprocess=False)[0]
    else:
        instances = model(inputs)[0]["instances"]
    return [{"instances": instances}]


def _check_and_write(
    adapter: TracingAdapter,
    found: tuple[torch.Tensor, ...],
    expected: Instances,
    buffer: io.BytesIO,
    dst: str,
    suffix: str,
) -> str:
    """Writes an export, unless it detects something else than the model; returns the file.

    Detections may be ordered otherwise where scores are equal, and those at the end of the list may
    be others for the same reason.
    """
    dst = dst if dst.endswith(suffix) else os.path.join(dst, f"student_final{suffix}")
    found = adapter.outputs_schema(found)[0]["instances"]
    boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
    lowest = float(expected.scores.min())
    for box, score, label in zip(
        expected.pred_boxes.tensor, expected.scores, expected.pred_classes, strict=True
    ):
        same = (classes == label) & ((scores - score).abs() < _SCORE_TOLERANCE)
        same &= ((boxes - box).abs() < _BOX_TOLERANCE).all(dim=1)
        if not same.any() and float(score) > lowest + _SCORE_TOLERANCE:
            raise ConfigError(
                f"the export to '{dst}' was not written: it misses the model's detection of class"
                f" {int(label)} with score {float(score):.4f} at {box.tolist()} on the given image"
            )
    os.makedirs(os.path.dirname(os.path.abspath(dst)), exist_ok=True)
    with atomic_open(dst, "wb") as file:
        file.write(buffer.getvalue())
    logger.info("wrote %s, which detects on the given image what the model does", dst)
    return dst
