"""Installs kd_detectron beside a torch and a Detectron2 that are already there (see the README)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="kd_detectron",
    version="0.2.0.dev0",
    description="Knowledge distillation for Detectron2 detectors",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The configs stand beside the package in the source tree and inside it when installed.
    packages=[
        *find_packages(include=["kd_detectron", "kd_detectron.*"]),
        "kd_detectron.configs",
    ],
    package_dir={"kd_detectron.configs": "configs"},
    package_data={
        "kd_detectron.configs": ["**/*.yaml", "studies/expected/*.json", "lazy/*.py"],
        "kd_detectron.runs": ["*.json"],
        "kd_detectron.torchvision": ["*.yaml"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        "fvcore>=0.1.5",
        "pycocotools>=2.0.6",
        "opencv-python>=4.8",
        "matplotlib>=3.7",
        "tabulate>=0.9",
        "tqdm>=4.65",
    ],
    extras_require={
        "torchvision": ["lightning==2.6.6", "torchmetrics==1.9.0"],
        "timm": ["timm>=1.0"],
        "onnx": ["onnx>=1.15", "onnxruntime>=1.17"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.6"],
    },
)
